"""RAC's terms: named, unweighted, cheap where not wanted, and what they are zero for."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from rac.draws import Draws
from rac.errors import RacError
from rac.flow import TimeGrid, integrate
from rac.flow.memory import recomputed
from rac.objectives.rac import (
    NANO,
    PAPER,
    Coding,
    Memory,
    RACObjective,
    RACWeights,
    block_terms,
    fine_detail,
    path_error,
    rac_terms,
)
from rac.states import StateSpec, contract, expand, image_state

EVERY = RACWeights(**{**dict.fromkeys(RACWeights.__dataclass_fields__, 1.0), "perceptual": 0.0, "adversarial": 0.0})
"""But for the terms of `image_terms`, which tests/unit/test_image_terms.py is about."""
UNROLLED = RACWeights(**{**EVERY.__dict__, "mean_velocity": 0.0})
SPEC = StateSpec(4, 4, 4, "nearest")


def draws(batch: int = 2, rng_seed: int = 0) -> Draws:
    return Draws.whole(torch.Generator().manual_seed(rng_seed), batch)


def latents(batch: int = 2) -> torch.Tensor:
    return torch.randn(batch, 4, 2, 2, generator=torch.Generator().manual_seed(5), dtype=torch.float64)


@pytest.fixture(scope="module")
def image(images):
    return images(2, 8, 8).double()


def perfect(seed: torch.Tensor, target: torch.Tensor):
    """The field of straight lines between this very batch."""
    return lambda state, time, interval=None: target - seed


def teacher_of(image: torch.Tensor):
    return lambda latent: image


# ------------------------------------------------------------------------------------------------ presets


def test_presets_keep_the_originals_term_lists():
    """SPEC 1, the table of terms. The nano script has no separate pad term: it compares whole states."""
    shared = {
        "reconstruction": 1.0,
        "path_decode": 0.1,
        "path_encode": 0.1,
        "latent": 1.0,
        "state": 0.5,
        "pixel": 1.0,
        "round_trip": 1.0,
        "round_trip_state": 1.0,
    }
    assert NANO.chosen() == shared
    assert PAPER.chosen() == {**shared, "pad": 0.1}
    objective = RACObjective()
    assert objective.step_noise == 0.05
    assert objective.random_grid
    assert objective.steps == (4, 4)


# ------------------------------------------------------------------------------------------------ values


def test_all_terms_vanish_for_a_perfect_field(image):
    seed, target = expand(latents(), SPEC), image_state(image, 4)
    coding = Coding(perfect(seed, target), SPEC, lambda state: contract(state, SPEC), teacher_of(image))
    terms = rac_terms(coding, image, latents(), RACObjective(EVERY, step_noise=0.0), draws())
    assert list(terms) == list(EVERY.chosen())
    for name, value in terms.items():
        assert value.shape == (), name
        assert float(value) < 1e-20, name


def test_what_terms_measure_where_nothing_moves(image):
    """With a zero field every flow ends where it began, so each term is a plain distance."""
    latent = latents()
    seed, target = expand(latent, SPEC), image_state(image, 4)
    coding = Coding(lambda state, time: 0 * state, SPEC, lambda state: contract(state, SPEC), lambda latent: 0 * image)
    objective = RACObjective(UNROLLED, steps=(2, 2), random_grid=False, step_noise=0.0)
    terms = rac_terms(coding, image, latent, objective, draws())

    def distance(one: torch.Tensor, two: torch.Tensor) -> float:
        return float(((one - two) ** 2).mean())

    found = contract(target, SPEC)
    middle = (seed + target) / 2
    expected = {
        "reconstruction": distance(seed[:, :3], image),
        "pad": distance(seed[:, 3:], torch.full((1,), 0.5)),
        "path_decode": distance(seed, middle),
        "path_encode": distance(target, middle),
        "latent": distance(found, latent),
        "state": distance(target, seed),
        "pixel": float((image**2).mean()),
        "round_trip": distance(expand(found, SPEC)[:, :3], image),
        "round_trip_state": 0.0,
        "velocity": distance(target, seed),
        "latent_velocity": distance(contract(target, SPEC), latent),
        "coarse": distance(F.avg_pool2d(seed[:, :3], 4), F.avg_pool2d(image, 4)),
        "pattern": float(block_terms(seed[:, :3], image, 4)["pattern"]),
        "detail": distance(fine_detail(seed[:, :3], 4), fine_detail(image, 4)),
    }
    assert {name: float(value) for name, value in terms.items()} == pytest.approx(expected, abs=1e-12)


def test_block_terms_tell_tints_from_patterns():
    """What a tint, a pattern of blocks and detail of another period give; the pattern once more, place by place."""
    along = torch.arange(32)
    tint = torch.tensor([0.1, -0.2, 0.3], dtype=torch.float64).view(1, 3, 1, 1).expand(2, 3, 32, 32)
    pattern = (0.05 * torch.cos(2 * math.pi * along / 4)).double().view(1, 1, 1, 32).expand(2, 3, 32, 32)
    detail = (0.5 * torch.cos(2 * math.pi * along / 3.2)).double().view(1, 1, 32, 1).expand(2, 3, 32, 32)
    of_tint, of_pattern, of_detail = (block_terms(error, 0 * error, 4) for error in (tint, pattern, detail))
    assert float(of_tint["coarse"]) == pytest.approx((0.1**2 + 0.2**2 + 0.3**2) / 3)
    assert float(of_tint["pattern"]) == pytest.approx(0, abs=1e-12)
    assert float(of_pattern["coarse"]) == pytest.approx(0, abs=1e-12)
    assert float(of_pattern["pattern"]) == pytest.approx(0.05**2 / 2)
    assert float(of_detail["pattern"]) == pytest.approx(0, abs=1e-12)

    error = torch.randn(2, 3, 8, 12, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    places = torch.stack([error[..., y::4, x::4].mean(dim=(-2, -1)) for y in range(4) for x in range(4)])
    assert float(block_terms(error, 0 * error, 4)["pattern"]) == pytest.approx(
        float(places.var(dim=0, unbiased=False).mean())
    )


def test_fine_detail_is_what_a_mean_of_nine_takes_away(image):
    """Nothing in an even image; twice as much at twice the contrast; and once more in NumPy."""
    assert float(fine_detail(torch.full((1, 3, 8, 8), 0.3), 4).max()) < 1.01e-3
    assert torch.allclose(fine_detail(2 * image, 4), 2 * fine_detail(image, 4), rtol=1e-2)
    array = image.numpy()
    framed = np.pad(array, ((0, 0), (0, 0), (1, 1), (1, 1)), mode="edge")
    mean = sum(framed[..., y : y + 8, x : x + 8] for y in range(3) for x in range(3)) / 9
    squares = ((array - mean) ** 2).mean(axis=1).reshape(2, 2, 4, 2, 4).mean(axis=(2, 4))
    assert np.allclose(fine_detail(image, 4)[:, 0].numpy(), np.sqrt(squares + 1e-6))


@pytest.mark.parametrize("compare", ["image", "state"])
def test_compare_chooses_the_channels(image, compare):
    """Off by 1 in the pad channel alone: only the whole state notices."""
    seed, target = expand(latents(), SPEC), image_state(image, 4)
    wrong = target.clone()
    wrong[:, 3] += 1
    coding = Coding(perfect(seed, wrong), SPEC, lambda state: contract(state, SPEC), None)
    objective = RACObjective(RACWeights(reconstruction=1, pad=1), step_noise=0.0, compare=compare)
    terms = rac_terms(coding, image, latents(), objective, draws())
    assert float(terms["reconstruction"]) == pytest.approx(0.25 if compare == "state" else 0, abs=1e-12)
    assert float(terms["pad"]) == pytest.approx(1, abs=1e-12)


def test_path_error_leaves_the_ends_out_and_knows_the_direction():
    source, target = torch.zeros(1, 3, 2, 2), torch.ones(1, 3, 2, 2)
    grid = TimeGrid.of((0, 0.25, 0.5, 1))
    there = integrate(lambda state, time: target - source, source, grid, keep="nodes")
    assert float(path_error(there, source, target)) < 1e-12
    back = integrate(lambda state, time: target - source, target, grid.reversed(), keep="nodes")
    assert float(path_error(back, source, target)) < 1e-12
    still = integrate(lambda state, time: 0 * state, source, grid, keep="nodes")
    assert float(path_error(still, source, target)) == pytest.approx((0.25**2 + 0.5**2) / 2)
    one = integrate(lambda state, time: 0 * state, source, TimeGrid.uniform(1), keep="nodes")
    assert float(path_error(one, source, target)) == 0


def test_the_velocity_is_asked_for_on_the_line_at_that_time(image):
    seed, target = expand(latents(), SPEC), image_state(image, 4)

    def checking(state, time):
        t = time.view(-1, 1, 1, 1)
        assert torch.allclose(state, (1 - t) * seed + t * target)
        assert 0 < float(time[0]) != float(time[1])
        return target - seed + t

    coding = Coding(checking, SPEC, lambda state: contract(state, SPEC), None)
    weights = RACWeights(velocity=1, latent_velocity=1)
    terms = rac_terms(coding, image, latents(), RACObjective(weights), draws())
    time = draws_after_steps().uniform(image)
    assert float(terms["velocity"]) == pytest.approx(float(time.square().mean()))
    assert float(terms["latent_velocity"]) == pytest.approx(float(time.square().mean()))


def draws_after_steps() -> Draws:
    """What is left of `draws()` when the number of steps has been drawn."""
    left = draws()
    left.integer(*RACObjective().steps)
    return left


def test_noise_on_latents_reaches_what_is_decoded_and_not_what_encoding_aims_at(image):
    started: list[torch.Tensor] = []

    def still(state, time):
        started.append(state)
        return 0 * state

    coding = Coding(still, SPEC, lambda state: contract(state, SPEC), None)
    weights = RACWeights(reconstruction=1, latent=1, state=1)
    objective = RACObjective(weights, steps=(1, 1), step_noise=0.0, latent_noise=0.5)
    clean = rac_terms(coding, image, latents(), RACObjective(weights, steps=(1, 1), step_noise=0.0), draws())
    started.clear()
    noisy = rac_terms(coding, image, latents(), objective, draws())
    off = contract(started[0], SPEC) - latents()
    deviations = off.flatten(1).std(dim=1)
    assert bool((deviations > 0).all())
    assert bool((deviations < 0.75).all())
    assert float(deviations[0]) != pytest.approx(float(deviations[1]))
    assert noisy["latent"] == clean["latent"]
    assert noisy["state"] == clean["state"]


def test_noise_in_the_seed_fills_the_free_sites_alone(image):
    spec = StateSpec(4, 4, 4, "beside")
    started: list[torch.Tensor] = []

    def still(state, time):
        started.append(state)
        return 0 * state

    coding = Coding(still, spec, lambda state: contract(state, spec), None, seed_noise=0.25)
    objective = RACObjective(RACWeights(reconstruction=1), steps=(1, 1), step_noise=0.0)
    rac_terms(coding, image, latents(), objective, draws())
    assert torch.equal(contract(started[0], spec), latents())
    free = started[0][:, :3] - 0.5
    assert float(free.std()) == pytest.approx(0.25, rel=0.2)
    assert float(free.mean()) == pytest.approx(0, abs=0.05)


# ------------------------------------------------------------------------------------------------ cost


@pytest.mark.parametrize(
    ("weights", "evaluations"),
    [
        ({"reconstruction": 1}, 3),
        ({"reconstruction": 1, "pad": 1, "path_decode": 1}, 3),
        ({"latent": 1, "state": 1, "path_encode": 1}, 3),
        ({"pixel": 1}, 3),
        ({"round_trip": 1}, 6),
        ({"round_trip_state": 1}, 6),
        ({"velocity": 1}, 1),
        (dict.fromkeys(NANO.chosen(), 1), 12),
    ],
    ids=str,
)
def test_a_term_of_weight_0_costs_nothing(image, weights, evaluations):
    asked = 0

    def field(state, time):
        nonlocal asked
        asked += 1
        return 0 * state

    coding = Coding(field, SPEC, lambda state: contract(state, SPEC), teacher_of(image))
    objective = RACObjective(RACWeights(**weights), steps=(3, 3))
    terms = rac_terms(coding, image, latents(), objective, draws())
    assert asked == evaluations
    assert set(terms) == set(weights)


def test_steps_lie_between_the_bounds(image):
    seen = set()
    for rng_seed in range(40):
        asked = []
        coding = Coding(lambda state, time: asked.append(time) or 0 * state, SPEC, lambda s: contract(s, SPEC), None)  # noqa: B023
        objective = RACObjective(RACWeights(reconstruction=1), steps=(2, 4))
        rac_terms(coding, image, latents(), objective, draws(rng_seed=rng_seed))
        seen.add(len(asked))
    assert seen == {2, 3, 4}


# ------------------------------------------------------------------------------------------------ randomness


def test_same_draws_same_terms_and_other_draws_others(make_rac, image):
    coder = make_rac(lively=0.05, dtype=torch.float64)
    coding = Coding(coder.field, coder.states, coder.contract, None)
    objective = RACObjective(RACWeights(reconstruction=1))

    def value(rng_seed: int, **changes: object) -> float:
        made = RACObjective(**{**objective.__dict__, **changes})
        return float(rac_terms(coding, image, latents(), made, draws(rng_seed=rng_seed))["reconstruction"].detach())

    assert value(0) == value(0) != value(1)
    assert value(0, step_noise=0.0) != value(1, step_noise=0.0), "grids differ"
    assert value(0, random_grid=False) != value(1, random_grid=False), "noise differs"
    quiet = {"random_grid": False, "step_noise": 0.0}
    assert value(0, **quiet) == value(1, **quiet)


def test_step_noise_is_relative_to_each_images_own_deviation(image):
    """Image 1 is ten times image 0: so is its noise. The first noise meets the unperturbed seed state."""
    latent = latents()
    latent[1] = 10 * latent[0]
    asked = []
    spec = StateSpec(4, 4, 4, "nearest")
    coding = Coding(lambda state, time: asked.append(state) or 0 * state, spec, lambda s: contract(s, spec), None)
    objective = RACObjective(RACWeights(reconstruction=1), step_noise=0.05, random_grid=False)
    repeated, seeds = 200, expand(latent, spec)
    for rng_seed in range(repeated):
        rac_terms(coding, image, latent, objective, draws(rng_seed=rng_seed))
    noise = torch.stack([asked[4 * i] - seeds for i in range(repeated)])
    own = seeds.flatten(1).std(dim=1)
    measured = noise.transpose(0, 1).flatten(1).std(dim=1)
    assert (measured / own).tolist() == pytest.approx([0.05, 0.05], rel=0.05)
    assert float(own[1] / own[0]) == pytest.approx(10, rel=1e-9)


# ------------------------------------------------------------------------------------------------ gradients


def nano_like(make_rac) -> tuple[nn.Module, nn.Module, Coding]:
    coder = make_rac(lively=0.05, dtype=torch.float64, contraction="projector")
    teacher = nn.Sequential(nn.Upsample(scale_factor=4), nn.Conv2d(4, 3, 1)).double().requires_grad_(False)
    return coder, teacher, Coding(coder.field, coder.states, coder.contract, teacher)


def test_frozen_parts_get_no_gradient_and_pass_it_on(make_rac, image):
    coder, teacher, coding = nano_like(make_rac)
    latent = latents()
    terms = rac_terms(coding, image, latent, RACObjective(RACWeights(pixel=1)), draws())
    terms["pixel"].backward()
    assert all(parameter.grad is None for parameter in teacher.parameters())
    assert not latent.requires_grad
    assert not image.requires_grad
    for part in (coder.field, coder.projector):
        assert any(bool(parameter.grad.abs().sum() > 0) for parameter in part.parameters())


def test_recomputing_changes_neither_terms_nor_gradients(make_rac, image):
    coder, _, coding = nano_like(make_rac)

    def run(memory: Memory) -> tuple[dict, tuple]:
        objective = RACObjective(UNROLLED, memory=memory)
        terms = rac_terms(coding, image, latents(), objective, draws())
        return terms, torch.autograd.grad(sum(terms.values()), list(coder.parameters()))

    (plain, gradients), (again, others) = run("store"), run("recompute")
    for name, value in plain.items():
        assert torch.equal(value, again[name]), name
    for one, two in zip(gradients, others, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-12, atol=1e-14)


def stored(asked: Callable[[], object], module: nn.Module) -> int:
    """Bytes that `asked()` keeps for the backward pass, those of the module's parameters apart."""
    sizes: dict[int, int] = {}
    own = {parameter.untyped_storage().data_ptr() for parameter in module.parameters()}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        kept = asked()  # noqa: F841 - alive, so that no address is used twice
    return sum(sizes.values())


def test_a_recomputed_field_stores_its_input_alone(make_rac):
    field, state, time = make_rac(lively=0.05).field, torch.randn(1, 4, 32, 32), torch.zeros(1)
    assert stored(lambda: recomputed(field)(state, time), field) <= 4 * (state.numel() + 2)
    assert stored(lambda: field(state, time), field) > 10 * 4 * state.numel()


def test_the_objective_recomputes_where_it_is_asked_to(make_rac, image):
    coder, _, coding = nano_like(make_rac)

    def kept(memory: Memory) -> int:
        objective = RACObjective(UNROLLED, memory=memory)
        return stored(lambda: rac_terms(coding, image, latents(), objective, draws()), coder)

    assert kept("recompute") < kept("store") / 2


def test_gradients_flow_through_all_steps(image):
    """d(end)/d(scale) of s' = scale s over two equal steps is 2 (1 + scale / 2) / 2 s: no step is detached."""
    scale = torch.tensor(0.4, dtype=torch.float64, requires_grad=True)
    coding = Coding(lambda state, time: scale * state, SPEC, lambda s: contract(s, SPEC), None)
    objective = RACObjective(RACWeights(reconstruction=1), steps=(2, 2), random_grid=False, step_noise=0.0)
    rac_terms(coding, image, latents(), objective, draws())["reconstruction"].backward()
    seed = expand(latents(), SPEC)[:, :3]
    growth = (1 + scale.detach() / 2) ** 2
    expected = (2 * (growth * seed - image) * (1 + scale.detach() / 2) * seed).mean()
    torch.testing.assert_close(scale.grad, expected)


# ------------------------------------------------------------------------------------------------ bad input


def test_the_pixel_term_needs_a_teacher(image):
    coding = Coding(lambda state, time: 0 * state, SPEC, lambda s: contract(s, SPEC), None)
    with pytest.raises(RacError, match="teacher"):
        rac_terms(coding, image, latents(), RACObjective(NANO), draws())


@pytest.mark.parametrize("steps", [(0, 4), (5, 4), (-1, -1)])
def test_wrong_steps(steps):
    with pytest.raises(RacError, match="fewest"):
        RACObjective(steps=steps)


def test_nan_is_not_hidden(image):
    coding = Coding(lambda state, time: math.nan * state, SPEC, lambda s: contract(s, SPEC), teacher_of(image))
    terms = rac_terms(coding, image, latents(), RACObjective(NANO), draws())
    assert not any(math.isfinite(float(value)) for name, value in terms.items() if name != "pixel")


def test_a_state_of_three_channels_has_no_pad_to_miss(make_rac, images):
    coder = make_rac(lively=0.1, state_channels=3, spread="shuffle")
    image = images(2, 16, 16)
    coding = Coding(coder.field, coder.states, coder.contract, lambda latent: image)
    draws = Draws.whole(torch.Generator().manual_seed(0), 2)
    terms = rac_terms(coding, image, torch.randn(2, 4, 4, 4), RACObjective(PAPER), draws)
    assert float(terms["pad"]) == 0
    assert all(bool(torch.isfinite(term)) for term in terms.values())
