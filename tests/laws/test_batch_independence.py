"""Image i does not know which batch it is in."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rac.draws import Draws
from rac.fields import LdmFieldConfig, TinyFieldConfig
from rac.flow import RK4, Euler, FixedPoint, Heun, Midpoint, ReversibleHeun, TimeGrid, integrate
from rac.latents import LatentSpec
from rac.objectives.image_terms import ImageLosses
from rac.objectives.rac import Coding, RACObjective, RACWeights, rac_terms
from rac.train.discriminator import DiscriminatorConfig

SOLVERS = [Euler(), Midpoint(), Heun(), RK4(), ReversibleHeun(), FixedPoint()]
CONFIGS = {
    "tiny": TinyFieldConfig(widths=(8, 8, 8), blocks=(1, 1, 1), position=True),
    "ldm": LdmFieldConfig(widths=(8, 8, 8), layers_per_block=1, groups=4),
}


def same(one: torch.Tensor, two: torch.Tensor) -> None:
    torch.testing.assert_close(one, two, rtol=0, atol=1e-11)


@pytest.fixture(scope="module", params=CONFIGS)
def coder(request, make_rac):
    return make_rac(lively=0.05, dtype=torch.float64, field=CONFIGS[request.param]).eval().requires_grad_(False)


def test_field(coder):
    state = torch.randn(5, 4, 8, 12, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    time = torch.linspace(0, 1, 5, dtype=torch.float64)
    together = coder.field(state, time)
    assert float(together.abs().max()) > 1e-3
    for i in range(5):
        same(together[i], coder.field(state[i : i + 1], time[i : i + 1])[0])


@pytest.mark.filterwarnings(
    "ignore::rac.ConvergenceWarning"
)  # what does not converge must not depend on company either
@pytest.mark.parametrize("solver", SOLVERS, ids=lambda solver: type(solver).__name__)
def test_encode_and_decode(coder, solver, images):
    batch = images(3, 8, 12).double()
    latent, decoded = coder.encode(batch, 2, solver), coder.decode(coder.encode(batch, 2), 2, solver)
    for i in range(3):
        alone = batch[i : i + 1]
        same(latent[i], coder.encode(alone, 2, solver)[0])
        same(decoded[i], coder.decode(coder.encode(alone, 2), 2, solver)[0])


def test_order_of_the_batch_does_not_matter(coder, images):
    batch = images(4, 8, 8).double()
    shuffled = torch.tensor([2, 0, 3, 1])
    same(coder.encode(batch)[shuffled], coder.encode(batch[shuffled]))


def test_fixed_point_stops_for_each_image_on_its_own(steep_field):
    """Image 0 needs fewer iterations than image 1; company must not refine it further."""
    state = torch.stack([torch.full((1, 2, 2), 0.001), torch.full((1, 2, 2), 0.5)]).double()
    grid = TimeGrid.of((0.9, 0.8))
    solver = FixedPoint(tolerance=1e-3)
    both = integrate(steep_field, state, grid, solver)
    alone = [integrate(steep_field, state[i : i + 1], grid, solver) for i in range(2)]
    assert alone[0].evaluations != alone[1].evaluations, "equally hard images would not show it"
    for i in range(2):
        same(both.end[i : i + 1], alone[i].end)
    assert both.residuals[0] == pytest.approx(max(alone[i].residuals[0] for i in range(2)), abs=1e-14)


# ------------------------------------------------------------------------------------------------ draws


def draw_all(draws: Draws, like: torch.Tensor) -> tuple[list[torch.Tensor], list[int]]:
    own = [draws.normal(like), draws.uniform(like), draws.normal(like[:, :1]), draws.uniform(like)]
    return own, [draws.integer(1, 8) for _ in range(5)]


@given(
    total=st.integers(1, 9),
    cut=st.integers(0, 9),
    rng_seed=st.integers(0, 2**31),
    dtype=st.sampled_from((torch.float32, torch.float64)),
)
def test_cut_draws_equal_whole_ones(total, cut, rng_seed, dtype):
    def generators():
        return torch.Generator().manual_seed(rng_seed), torch.Generator().manual_seed(rng_seed + 1)

    like = torch.zeros(total, 3, 2, 5, dtype=dtype)
    whole, shared = draw_all(Draws(*generators(), total, 0, total), like)
    first = 0
    for last in sorted({min(cut, total), total} - {0}):
        part, again = draw_all(Draws(*generators(), total, first, last - first), like[first:last])
        assert again == shared
        for one, two in zip(part, whole, strict=True):
            assert one.dtype == dtype
            assert torch.equal(one, two[first:last])
        first = last


def test_draws_are_what_they_are_called():
    draws = Draws.whole(torch.Generator().manual_seed(0), 2000)
    like = torch.zeros(2000, 3, 2, 2)
    normal = draws.normal(like)
    assert normal.shape == like.shape
    assert float(normal.mean()) == pytest.approx(0, abs=0.03)
    assert float(normal.std()) == pytest.approx(1, abs=0.03)
    uniform = draws.uniform(like)
    assert uniform.shape == (2000,)
    assert 0 <= float(uniform.min()) < float(uniform.max()) < 1
    assert float(uniform.mean()) == pytest.approx(0.5, abs=0.03)
    assert {draws.integer(2, 4) for _ in range(60)} == {2, 3, 4}


@pytest.mark.parametrize("random_grid", [False, True])
def test_parts_of_a_batch_add_up_to_its_loss_and_gradient(random_grid, make_rac, images):
    """Every term, with noise, random numbers of steps and random grids: accumulation equals one batch."""
    weights = RACWeights(**dict.fromkeys(RACWeights.__dataclass_fields__, 1.0))
    objective = RACObjective(weights, steps=(1, 3), random_grid=random_grid)
    coder = make_rac(
        lively=0.05,
        dtype=torch.float64,
        field=TinyFieldConfig(widths=(8, 8, 8), blocks=(1, 1, 1), interval=True),
        spec=LatentSpec(4, 4),
        contraction="projector",
    )
    teacher = torch.nn.Sequential(torch.nn.Upsample(scale_factor=4), torch.nn.Conv2d(4, 3, 1)).double()
    discriminator = DiscriminatorConfig(width=4, layers=1).build().double()
    losses = ImageLosses(lambda one, other: (one - other).abs().amax(dim=(1, 2, 3)), discriminator)
    coding = Coding(coder.field, coder.states, coder.contract, teacher, losses)
    batch = images(5, 8, 8).double()
    latent = torch.randn(5, 4, 2, 2, generator=torch.Generator().manual_seed(3), dtype=torch.float64)

    def terms(first: int, last: int) -> dict[str, torch.Tensor]:
        own, shared = torch.Generator().manual_seed(1), torch.Generator().manual_seed(2)
        draws = Draws(shared, own, 5, first, last - first)
        return rac_terms(coding, batch[first:last], latent[first:last], objective, draws)

    def gradients(loss: torch.Tensor) -> list[torch.Tensor]:
        return list(torch.autograd.grad(loss, list(coder.parameters())))

    whole, left, right = terms(0, 5), terms(0, 2), terms(2, 5)
    assert whole.keys() == {*RACWeights.__dataclass_fields__, "discriminator"}
    for name, value in whole.items():
        torch.testing.assert_close((2 * left[name] + 3 * right[name]) / 5, value, rtol=1e-9, atol=1e-9)
    parts = zip(gradients(sum(left.values())), gradients(sum(right.values())), strict=True)
    for one, (two, three) in zip(gradients(sum(whole.values())), parts, strict=True):
        torch.testing.assert_close((2 * two + 3 * three) / 5, one, rtol=1e-8, atol=1e-9)
