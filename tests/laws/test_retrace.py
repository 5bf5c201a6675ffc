"""Walking the states back in the backward pass: the gradients of plain autograd, and one evaluation's memory."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from rac.draws import Draws
from rac.errors import RacError
from rac.flow import ReversibleHeun, TimeGrid, Trajectory, integrate
from rac.flow.memory import retraced
from rac.objectives.rac import Coding, RACObjective, RACWeights, rac_terms

GRIDS = {
    "one step": TimeGrid.uniform(1),
    "uneven": TimeGrid((0.0, 0.05, 0.4, 0.45, 1.0)),
    "backwards": TimeGrid.uniform(6).reversed(),
}


@pytest.fixture
def field(make_rac) -> nn.Module:
    return make_rac(lively=0.1, dtype=torch.float64).field


def state(rng_seed: int = 0) -> Tensor:
    return torch.randn(2, 4, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(rng_seed))


def loss_of_end(flow: Trajectory) -> Tensor:
    return (flow.end * state(1)).sum() + flow.end.square().mean()


def loss_of_nodes(flow: Trajectory) -> Tensor:
    return sum(((k + 1) * (one * state(k)).sin().sum() for k, one in enumerate(flow.states)), loss_of_end(flow))


@pytest.mark.parametrize("grid", GRIDS.values(), ids=GRIDS)
@pytest.mark.parametrize(("keep", "loss_of"), [("end", loss_of_end), ("nodes", loss_of_nodes)])
def test_gradients_are_those_of_plain_autograd(field, grid, keep, loss_of):
    def run(unroll: Callable[[Tensor], Trajectory]) -> tuple[Tensor, tuple[Tensor, ...]]:
        start = state().requires_grad_()
        loss = loss_of(unroll(start))
        return loss, torch.autograd.grad(loss, (start, *field.parameters()))

    plain, slopes = run(lambda start: integrate(field, start, grid, ReversibleHeun(), keep=keep))
    ours, others = run(lambda start: retraced(field, start, grid, keep=keep))
    assert torch.equal(plain, ours)
    assert all(bool(slope.abs().max() > 1e-3) for slope in slopes)
    for one, two in zip(slopes, others, strict=True):
        torch.testing.assert_close(two, one, rtol=1e-8, atol=1e-8 * float(one.abs().max()))


def test_a_start_without_gradient_and_a_frozen_layer(field):
    frozen, *trained = field.parameters()
    frozen.requires_grad_(False)
    flow = retraced(field, state(), TimeGrid.uniform(3))
    flow.end.sum().backward()
    assert frozen.grad is None
    assert all(parameter.grad is not None for parameter in trained)
    assert (flow.evaluations, flow.states) == (4, ())


def test_without_gradients_it_is_integration(field):
    with torch.no_grad():
        flow = retraced(field, state(), TimeGrid.uniform(3), keep="nodes")
        plain = integrate(field, state(), TimeGrid.uniform(3), ReversibleHeun(), keep="nodes")
    assert not flow.end.requires_grad
    assert flow.evaluations == plain.evaluations
    assert all(torch.equal(one, two) for one, two in zip(flow.states, plain.states, strict=True))


def saved(asked: Callable[[], object]) -> int:
    """Bytes that `asked()` keeps for the backward pass, parameters included."""
    sizes: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        kept = asked()  # noqa: F841 - alive, so that no address is used twice
    return sum(sizes.values())


def test_bytes_do_not_grow_with_the_steps(field):
    start = state()
    one, sixteen = (saved(lambda k=k: retraced(field, start, TimeGrid.uniform(k))) for k in (1, 16))
    assert one == sixteen == 2 * start.nbytes
    assert saved(lambda: integrate(field, start, TimeGrid.uniform(16), ReversibleHeun())) > 100 * one


def test_under_autocast_later_evaluations_keep_their_gradients(make_rac):
    """Weights narrowed without gradients must not be taken for others' from autocast's cache."""
    field, start = make_rac(lively=0.1).field, state().float()

    def slopes(unroll: Callable[..., Trajectory]) -> tuple[Tensor, ...]:
        with torch.autocast("cpu", torch.bfloat16):
            end = unroll(field, start, TimeGrid.uniform(2)).end
            after = field(start, start.new_full((2,), 0.3))
            loss = end.square().mean() + 10 * after.float().square().mean()
        return torch.autograd.grad(loss, list(field.parameters()))

    plain = slopes(lambda *args: integrate(*args, ReversibleHeun()))
    for one, two in zip(plain, slopes(retraced), strict=True):
        assert float((two - one).norm() / one.norm()) < 0.2


# ------------------------------------------------------------------------------------------------ in the objective

WEIGHTS = RACWeights(
    reconstruction=1, path_decode=0.1, path_encode=0.1, latent=1, state=1, round_trip=1, round_trip_state=1, velocity=1
)
REVERSE = RACObjective(WEIGHTS, steps=(3, 3), step_noise=0.0, memory="reverse")


def test_the_objective_with_it(make_rac, images, monkeypatch):
    """The same terms and gradients as with states that are stored and the same solver."""
    coder = make_rac(lively=0.1, dtype=torch.float64)
    image, latent = images(2, 16, 16).double(), torch.randn(2, 4, 4, 4, dtype=torch.float64)

    def run() -> tuple[dict[str, Tensor], tuple[Tensor, ...]]:
        draws = Draws.whole(torch.Generator().manual_seed(0), 2)
        coding = Coding(coder.field, coder.states, coder.contract, None)
        terms = rac_terms(coding, image, latent, REVERSE, draws)
        return terms, torch.autograd.grad(sum(terms.values()), list(coder.parameters()))

    terms, slopes = run()
    stored = lambda field, start, grid, keep: integrate(field, start, grid, ReversibleHeun(), keep=keep)  # noqa: E731
    monkeypatch.setattr("rac.objectives.rac.retraced", stored)
    plain, others = run()
    for name, value in plain.items():
        assert torch.equal(value, terms[name]), name
    for one, two in zip(others, slopes, strict=True):
        torch.testing.assert_close(two, one, rtol=1e-8, atol=1e-8 * float(one.abs().max()))


def test_its_memory_does_not_grow_with_the_steps(make_rac, images):
    coder, image, latent = make_rac(lively=0.1), images(2, 16, 16), torch.randn(2, 4, 4, 4)
    coding = Coding(coder.field, coder.states, coder.contract, None)
    objective = replace(REVERSE, weights=RACWeights(reconstruction=1, latent=1, round_trip=1))

    def kept(steps: int) -> int:
        draws = Draws.whole(torch.Generator().manual_seed(0), 2)
        return saved(lambda: rac_terms(coding, image, latent, replace(objective, steps=(steps, steps)), draws))

    assert kept(16) == kept(1)


# ------------------------------------------------------------------------------------------------ bad input


def test_step_noise_is_refused():
    with pytest.raises(RacError, match="step_noise"):
        RACObjective(memory="reverse")


def test_an_unknown_memory_is_refused():
    with pytest.raises(RacError, match="store, recompute, reverse"):
        RACObjective(memory="forget")  # type: ignore[arg-type]


def test_a_field_that_is_a_plain_function_is_refused(steep_field):
    with pytest.raises(RacError, match="module"):
        retraced(steep_field, state(), TimeGrid.uniform(1))
