"""Sampling on laws whose answers are known: Gaussian data, mixtures in the plane, and published values."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from rac.draws import Draws
from rac.errors import RacError
from rac.fields import SiTFieldConfig
from rac.flow import Euler, EulerMaruyama, Guided, Heun, TimeGrid, integrate, sde_grid
from rac.flow.stochastic import diffusion_at, score
from rac.generators.flow import FlowGenerator, FlowGeneratorConfig
from rac.generators.sampling import SampleNoise, Sampling, sample_seeds
from rac.latents import LatentSpec
from rac.objectives.flow import FlowObjective, flow_sample, velocity_error

DATA_VARIANCE = 0.25


def gaussian(state: Tensor, time: Tensor) -> Tensor:
    """The exact velocity of the flow from N(0, 1) to N(0, 0.25)."""
    t = time.view(-1, *[1] * (state.ndim - 1))
    return state * (t * DATA_VARIANCE - (1 - t)) / ((1 - t) ** 2 + t**2 * DATA_VARIANCE)


def one() -> Tensor:
    return torch.ones(1, 1, 1, 1, dtype=torch.float64)


def carried(grid: TimeGrid, solver) -> tuple[float, int]:
    flow = integrate(gaussian, one(), grid, solver)
    return flow.end.item(), flow.evaluations


@pytest.mark.parametrize(
    ("steps", "euler"), [(1, 0.0), (2, 0.2), (4, 0.34054), (8, 0.41478), (16, 0.45568), (50, 0.48540)]
)
def test_euler_on_gaussian_data(steps, euler):
    assert carried(TimeGrid.uniform(steps), Euler()) == (pytest.approx(euler, abs=6e-6), steps)


@pytest.mark.parametrize(("steps", "heun"), [(1, 0.5), (2, 0.48), (4, 0.50483), (8, 0.50244)])
def test_heun_on_gaussian_data(steps, heun):
    assert carried(TimeGrid.uniform(steps), Heun()) == (pytest.approx(heun, abs=6e-6), 2 * steps)


def test_shifted_steps_on_gaussian_data():
    assert carried(TimeGrid.shifted(50, 6.9282), Euler())[0] == pytest.approx(0.44343, abs=6e-6)


def test_published_shifts_in_this_direction_of_time():
    nodes = TimeGrid.shifted(2, 1 / 0.3).nodes
    assert nodes[1] == pytest.approx(0.230769, abs=1e-6)
    assert TimeGrid.shifted(2, math.sqrt(768 * 256 / 4096)).nodes[1] == pytest.approx(0.126132, abs=1e-6)
    assert TimeGrid.shifted(2, math.sqrt(768 * 1024 / 4096)).nodes[1] == pytest.approx(0.067311, abs=1e-6)


class Fixed:
    """Noise of one value, which counts how often it is asked for."""

    def __init__(self, value: float) -> None:
        self.value, self.asked = value, 0

    def __call__(self, like: Tensor) -> Tensor:
        self.asked += 1
        return torch.full_like(like, self.value)


def test_published_step_of_the_sde():
    def field(state: Tensor, time: Tensor) -> Tensor:
        return torch.full_like(state, -1.0)

    x = 2 * one()
    assert score(torch.tensor(-1.0), torch.tensor(2.0), 0.25).item() == pytest.approx(-3)
    mean = EulerMaruyama(Fixed(0)).step(field, x, 0.25, 0.26).state.item()
    assert (mean - 2) / 0.01 == pytest.approx(-3.25)
    assert mean == pytest.approx(1.9675)
    assert EulerMaruyama(Fixed(1)).step(field, x, 0.25, 0.26).state.item() - mean == pytest.approx(0.12247, abs=5e-6)
    forward = EulerMaruyama(Fixed(0), "sbdm").step(field, x, 0.25, 0.26).state.item()
    assert (forward - 2) / 0.01 == pytest.approx(-10)


@pytest.mark.parametrize(
    ("diffusion", "values"),
    [
        ("sigma", (0.75, 0.5)),
        ("sbdm", (3.0, 1.0)),
        ("constant", (1.0, 1.0)),
        ("increasing-decreasing", (0.5, 1.0)),
        ("decreasing", ((1 + math.sqrt(0.5)) ** 2 / 4, 0.25)),
    ],
)
def test_published_choices_of_noise(diffusion, values):
    assert [diffusion_at(diffusion, t) for t in (0.25, 0.5)] == pytest.approx(values)


def variances(grid: TimeGrid, **settings) -> list[float]:
    """The exact variances at the nodes, from 1 on, of what the rule does to Gaussian data."""
    found = [1.0]
    for t0, t1 in zip(grid.nodes[:-1], grid.nodes[1:], strict=True):
        factor = EulerMaruyama(Fixed(0), **settings).step(gaussian, one(), t0, t1).state.item()
        noise = EulerMaruyama(Fixed(1), **settings).step(gaussian, 0 * one(), t0, t1).state.item()
        found.append(factor**2 * found[-1] + noise**2)
    return found


def test_the_last_step_of_the_sde_adds_no_noise_and_ends_near_the_data():
    grid = sde_grid(250)
    assert grid.steps == 250
    assert grid.nodes[-2:] == (0.96, 1.0)
    found = variances(grid)
    assert found[-2] == pytest.approx(0.23143, abs=6e-6)
    assert found[-1] == pytest.approx(0.24438, abs=6e-6)
    # Along the drift alone is right only where the noise vanishes at the end.
    assert variances(grid, diffusion="constant")[-1] == pytest.approx(0.173, abs=6e-4)
    assert variances(grid, diffusion="constant", last="tweedie")[-1] == pytest.approx(0.25, abs=0.02)


def test_expected_data_is_the_euler_step_of_the_flow():
    x = 0.3 * one()
    last = EulerMaruyama(Fixed(1), last="tweedie").step(gaussian, x, 0.96, 1.0).state
    assert torch.equal(last, Euler().step(gaussian, x, 0.96, 1.0).state)


@pytest.mark.parametrize("diffusion", ["sigma", "sbdm", "increasing-decreasing", "decreasing"])
def test_every_sde_ends_at_the_data_with_many_steps(diffusion):
    grid = sde_grid(4000, diffusion, last=1e-3)
    assert variances(grid, diffusion=diffusion)[-1] == pytest.approx(DATA_VARIANCE, abs=2e-3)


def test_last_step_of_a_shifted_sde_counts_in_shifted_time():
    grid = sde_grid(50, alpha=6.9282)
    assert grid.steps == 50
    assert grid.nodes[0] == 0
    assert grid.nodes[-2:] == (0.96, 1.0)
    # Unshifted again, the noisy steps are equal.
    back = [t / (t + (1 - t) / 6.9282) for t in grid.nodes[:-1]]
    gaps = [b - a for a, b in itertools.pairwise(back)]
    assert max(gaps) == pytest.approx(min(gaps))
    assert sde_grid(50, "sbdm").nodes[0] == 1e-3


def test_the_sde_asks_for_one_noise_less_than_evaluations():
    noise = Fixed(1)
    flow = integrate(gaussian, one(), sde_grid(8), EulerMaruyama(noise))
    assert (flow.evaluations, noise.asked) == (8, 7)


@pytest.mark.parametrize(("steps", "last"), [(1, 0.04), (0, 0.04), (8, 0.0), (8, 1.0), (8, math.nan)])
def test_impossible_sdes_are_refused(steps, last):
    with pytest.raises(RacError):
        sde_grid(steps, last=last)
    with pytest.raises(RacError, match="rising"):
        integrate(gaussian, one(), sde_grid(8).reversed(), EulerMaruyama(Fixed(1)))


def test_sampled_moments_agree_with_the_exact_ones():
    noise = SampleNoise(sample_seeds(0, range(400)))
    start = noise.draw((8, 4, 4)).double()
    walk = Sampling(steps=50, method="sde").walk(noise)
    end = integrate(gaussian, start, walk.grid, walk.solver).end
    exact = variances(walk.grid)[-1]
    count = end.numel()
    assert end.mean().abs() < 4 * math.sqrt(exact / count)
    assert end.var().item() == pytest.approx(exact, abs=4 * exact * math.sqrt(2 / count))


# ---------------------------------------------------------------------------------------------- mixtures in the plane

CENTRES = torch.tensor([[2.0, 0.0], [-2.0, 0.0], [0.0, 2.0]], dtype=torch.float64)
SPREAD = 0.3


def mixture(state: Tensor, time: Tensor, centres: Tensor = CENTRES, spread: float = SPREAD) -> Tensor:
    """The exact velocity of the flow from N(0, I) to equal Gaussians about the centres, for states B 2 1 1."""
    x, t = state.flatten(1), time.view(-1, 1)
    variance = (1 - t) ** 2 + (t * spread) ** 2
    apart = x[:, None] - t[..., None] * centres
    weights = torch.softmax(-apart.square().sum(-1) / (2 * variance), dim=1)[..., None]
    slope = (t * spread**2 - (1 - t))[..., None] / variance[..., None]
    return (weights * (centres + slope * apart)).sum(1).view_as(state)


def labelled(labels: Tensor):
    def field(state: Tensor, time: Tensor) -> Tensor:
        parts = [mixture(s[None], t[None], CENTRES[k : k + 1]) for s, t, k in zip(state, time, labels, strict=True)]
        return torch.cat(parts)

    return field


def start(count: int) -> Tensor:
    return SampleNoise(sample_seeds(1, range(count))).draw((2, 1, 1)).double()


@pytest.mark.parametrize("method", ["euler", "heun", "sde"])
def test_every_part_of_a_mixture_is_met_as_often_as_the_others(method):
    noise = SampleNoise(sample_seeds(1, range(1200)))
    begin = noise.draw((2, 1, 1)).double()
    walk = Sampling(steps=60, method=method).walk(noise)
    end = integrate(mixture, begin, walk.grid, walk.solver).end.flatten(1)
    nearest = torch.cdist(end, CENTRES).argmin(1)
    shares = nearest.bincount(minlength=3) / len(end)
    assert shares.tolist() == pytest.approx([1 / 3] * 3, abs=4 * math.sqrt(2 / 9 / 1200))
    for part, centre in enumerate(CENTRES):
        own = end[nearest == part]
        assert (own.mean(0) - centre).abs().max() < 0.1
        assert own.std(0).mean().item() == pytest.approx(SPREAD, abs=0.05)


def test_labels_choose_their_part_of_the_mixture():
    labels = torch.arange(60) % 3
    end = integrate(labelled(labels), start(60), TimeGrid.uniform(30)).end.flatten(1)
    assert torch.equal(torch.cdist(end, CENTRES).argmin(1), labels)


def test_guidance_moves_samples_away_from_the_other_parts():
    labels = torch.zeros(150, dtype=torch.int64)
    plain = integrate(labelled(labels), start(150), TimeGrid.uniform(30)).end.flatten(1)
    guided = integrate(Guided(labelled(labels), mixture, 2.0), start(150), TimeGrid.uniform(30)).end.flatten(1)
    away = CENTRES[0] - CENTRES[1:].mean(0)
    along = (guided - plain) @ (away / away.norm())
    assert along.mean() > 0.1
    # Where the data are sure of their class already, little is left to push.
    late = Guided(labelled(labels), mixture, 2.0, interval=(0.7, 1.0))
    moved = integrate(late, start(150), TimeGrid.uniform(30)).end.flatten(1) - plain
    assert moved.norm(dim=1).mean() < 0.5 * (guided - plain).norm(dim=1).mean()


def test_guiding_the_drift_of_the_sde_is_guiding_its_velocity():
    x, labels = start(5), torch.tensor([0, 1, 2, 0, 1])
    strong, weak = labelled(labels), mixture
    rule = EulerMaruyama(Fixed(0.7))
    guided = rule.step(Guided(strong, weak, 1.8), x, 0.4, 0.45).state
    parts = [rule.step(field, x, 0.4, 0.45).state for field in (weak, strong)]
    torch.testing.assert_close(guided, parts[0] + 1.8 * (parts[1] - parts[0]))


# ----------------------------------------------------------------------------------------------------- settings, seeds


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"steps": 0}, "steps 0"),
        ({"steps": 2.5}, "steps 2.5"),
        ({"guidance": math.nan}, "guidance nan"),
        ({"guidance": math.inf}, "guidance inf"),
        ({"interval": (0.8, 0.2)}, "interval 0.8 0.2"),
        ({"interval": (0.0, 1.5)}, "interval"),
        ({"channels": 0}, "channels 0"),
        ({"shift": 0.0}, "shift 0.0"),
        ({"shift": math.nan}, "shift nan"),
        ({"method": "sde", "steps": 1}, "at least 2 steps"),
        ({"method": "sde", "last_step": 1.0}, "last step"),
    ],
)
def test_settings_that_mean_nothing_are_refused(changes, words):
    with pytest.raises(RacError, match=words):
        replace(Sampling(), **changes)


def test_numbers_belong_to_a_sample_and_not_to_its_batch():
    seeds = sample_seeds(7, range(5))
    together = SampleNoise(seeds)
    first = together.draw((3, 4, 4))
    second = together(torch.zeros(5, 2, 2, dtype=torch.float64))
    alone = SampleNoise(seeds[3:4])
    assert torch.equal(alone.draw((3, 4, 4)), first[3:4])
    assert torch.equal(alone(torch.zeros(1, 2, 2, dtype=torch.float64)), second[3:4])
    assert len({*seeds, *sample_seeds(8, range(5))}) == 10


@pytest.mark.slow
def test_a_trained_generator_finds_the_classes_of_a_mixture():
    torch.manual_seed(0)
    field = SiTFieldConfig(depth=2, width=64, heads=2, patch=1, classes=3)
    generator = FlowGenerator(FlowGeneratorConfig(LatentSpec(1, 2), 1, field, ("right", "left", "up")))
    optimizer = torch.optim.AdamW(generator.parameters(), 3e-3, weight_decay=0.0)
    objective, rng = FlowObjective(label_dropout=0.2), torch.Generator().manual_seed(0)
    iterations = 600
    for iteration in range(iterations):
        labels = torch.randint(3, (256,), generator=rng)
        latents = CENTRES[labels].float() + SPREAD * torch.randn(256, 2, generator=rng)
        sample = flow_sample(latents.view(-1, 2, 1, 1), labels, 3, objective, Draws.whole(rng, 256))
        loss = velocity_error(generator.field(sample.state, sample.time, condition=sample.labels), sample)
        optimizer.zero_grad()
        loss.backward()
        optimizer.param_groups[0]["lr"] = 3e-3 * (1 - iteration / iterations)
        optimizer.step()
    generator.eval().requires_grad_(False)
    seeds, labels = sample_seeds(0, range(300)), [k % 3 for k in range(300)]
    plain = generator.sample(seeds, labels, Sampling(steps=50)).latent.flatten(1)
    assert (torch.cdist(plain, CENTRES.float()).argmin(1) == torch.tensor(labels)).float().mean() > 0.98
    for label, centre in enumerate(CENTRES.float()):
        own = plain[label::3]
        assert (own.mean(0) - centre).abs().max() < 0.15
        assert own.std(0).mean().item() == pytest.approx(SPREAD, abs=0.1)
    # Without labels all parts are met; guidance moves away from what they have in common.
    bare = torch.cdist(generator.sample(seeds, None, Sampling(steps=50)).latent.flatten(1), CENTRES.float()).argmin(1)
    assert bare.bincount(minlength=3).min() > 60
    guided = generator.sample(seeds, labels, Sampling(steps=50, guidance=2.5)).latent.flatten(1)
    assert guided.norm(dim=1).mean() > plain.norm(dim=1).mean() + 0.05
