"""The field with two carriers: it begins as its teacher, and computes only what its times ask for."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from rac.coders.rac import RAC, RACConfig
from rac.coders.taesd import TAESD, TAESDConfig
from rac.coders.tiling import exact, seam, tiled
from rac.coders.warm_start import carriers_of, copy_teacher
from rac.draws import Draws
from rac.errors import RacError
from rac.evaluate.cost import MacCounter, parameters
from rac.fields import CarriersField, CarriersFieldConfig, LocalFieldConfig
from rac.flow import Euler, FixedPoint, MeanEuler, Solver, TimeGrid, integrate
from rac.latents import LatentSpec
from rac.objectives.rac import Coding, RACObjective, RACWeights, rac_terms
from rac.states import PAD, StateSpec, expand, image_state

SMALL = CarriersFieldConfig(latent_channels=5, width=8, blocks=(1, 1, 1, 1), down_blocks=(1, 1, 1, 1), clamp=3.0)


def teacher_of(pooled: bool = False, latent_channels: int = 5, width: int = 16) -> TAESD:
    torch.manual_seed(1)
    return TAESD(TAESDConfig(latent_channels, pooled, width)).double().requires_grad_(False)


def begun_as(teacher: TAESD) -> RAC:
    torch.manual_seed(0)
    coder = RAC(RACConfig(teacher.spec, carriers_of(teacher), 4, "beside"), teacher.statistics).double()
    copy_teacher(teacher, coder)
    return coder.requires_grad_(False)


def stirred(config: CarriersFieldConfig = SMALL) -> CarriersField:
    """A field whose every weight has an effect."""
    torch.manual_seed(2)
    field = config.build(4, 8).double()
    with torch.no_grad():
        for parameter in field.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return field


def states(batch: int = 3) -> Tensor:
    return torch.randn(batch, 4, 16, 24, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


@pytest.mark.parametrize("steps", [1, 2, 5])
@pytest.mark.parametrize(("pooled", "latent_channels", "width"), [(False, 5, 16), (True, 5, 16), (True, 32, 8)])
def test_it_begins_as_both_halves_of_its_teacher(pooled, latent_channels, width, steps):
    teacher = teacher_of(pooled, latent_channels, width)
    coder = begun_as(teacher)
    image = torch.rand(2, 3, 24, 40, dtype=torch.float64) * 2 - 1
    latent = 2 * torch.randn(2, latent_channels, 3, 5, dtype=torch.float64)
    torch.testing.assert_close(coder.decode(latent, steps), teacher.decode(latent), rtol=0, atol=1e-9)
    torch.testing.assert_close(coder.encode(image, steps), teacher.encode(image), rtol=0, atol=1e-9)


def test_one_step_costs_what_the_half_of_the_teacher_costs():
    """Modulation apart, which is a few linear layers on one vector."""
    teacher, coder = teacher_of().float(), begun_as(teacher_of()).float()
    image, latent = torch.zeros(1, 3, 32, 32), torch.zeros(1, 5, 4, 4)

    def macs(work) -> int:
        with MacCounter() as counter:
            work()
        return counter.macs

    config = coder.config.field
    assert isinstance(config, CarriersFieldConfig)
    times = 2 * config.embedding * (2 * 2 * config.frequencies + config.embedding)
    blocks = sum(config.blocks) + sum(config.down_blocks)
    modulation = times + 2 * blocks * config.embedding * 2 * config.width
    decoding, encoding = macs(lambda: teacher.decode(latent)), macs(lambda: teacher.encode(image))
    assert decoding <= macs(lambda: coder.decode(latent, 1)) <= decoding + modulation
    assert encoding <= macs(lambda: coder.encode(image, 1)) <= encoding + modulation
    # A further step forwards needs both ways, one backwards the way down alone.
    assert macs(lambda: coder.decode(latent, 2)) > 2 * decoding + 0.9 * encoding
    assert macs(lambda: coder.encode(image, 2)) <= 2 * (encoding + modulation)


@pytest.mark.parametrize("interval", [True, False])
def test_each_image_of_a_batch_has_its_own_time(interval):
    field, state = stirred(replace(SMALL, interval=interval)), states(7)
    time = torch.tensor([0.0, 0.0, 0.25, 0.5, 1.0, 0.75, 1.0], dtype=torch.float64)
    h = torch.tensor([1.0, 0.0, 0.75, -0.5, -0.25, 0.0, 0.0], dtype=torch.float64)
    told = (h,) if interval else ()
    together = field(state, time, *told)
    apart = [field(state[k : k + 1], time[k : k + 1], *(each[k : k + 1] for each in told)) for k in range(len(state))]
    torch.testing.assert_close(together, torch.cat(apart), rtol=0, atol=1e-12)


@pytest.mark.parametrize("steps", [1, 2, 4])
def test_a_step_goes_straight_to_what_is_predicted(steps):
    """The last step forwards ends at the painted image, the last one backwards at the latent that was read."""
    field, states_ = stirred(), StateSpec(8, 5, 4, "beside")
    latent = torch.randn(1, 5, 2, 3, dtype=torch.float64)
    seed = expand(latent, states_)
    there = integrate(field, seed, TimeGrid.uniform(steps), MeanEuler(), keep="nodes")
    # Latents are carried along unchanged, so the seed's other channels end at the constant of an image state.
    torch.testing.assert_close(there.end[:, 3:], torch.full_like(there.end[:, 3:], PAD), rtol=0, atol=1e-9)
    image = torch.rand(1, 3, 16, 24, dtype=torch.float64)
    back = integrate(field, image_state(image, 4), TimeGrid.uniform(steps).reversed(), MeanEuler())
    torch.testing.assert_close(back.end[:, :3], torch.full_like(image, PAD), rtol=0, atol=1e-9)


def test_later_steps_see_what_the_earlier_ones_painted():
    """The image carrier matters between the ends of the flow, and not at its beginning."""
    field, state = stirred(), states(1)
    other = state.clone()
    other[:, :3] += 0.1

    def painted(state: Tensor, t: float, h: float) -> Tensor:
        time, interval = (torch.full((1,), number, dtype=torch.float64) for number in (t, h))
        return state[:, :3] + (1 - t) * field(state, time, interval)[:, :3]

    assert (painted(state, 0.5, 0.5) - painted(other, 0.5, 0.5)).abs().max() > 1e-3
    torch.testing.assert_close(painted(state, 0.0, 1.0), painted(other, 0.0, 1.0), rtol=0, atol=1e-12)


def test_a_coder_tells_euler_the_step_where_its_field_knows_it():
    coder = begun_as(teacher_of())

    def solver_of(coder: RAC, solver: Solver | None = None) -> Solver:
        walk = coder.walk("encode", 2, solver)
        assert walk is not None
        return walk.solver

    assert solver_of(coder) == solver_of(coder, Euler()) == MeanEuler()
    assert solver_of(coder, FixedPoint(Euler())) == FixedPoint(MeanEuler())
    assert coder.walk("encode", 2, FixedPoint(Euler())).inverse().solver == MeanEuler()
    plain = RAC(replace(coder.config, field=replace(coder.config.field, interval=False)))
    assert solver_of(plain) == Euler()
    local = LocalFieldConfig(widths=(8, 8, 8, 8), blocks=(1, 1, 1, 1), down=(), down_blocks=(), patch=1)
    assert solver_of(RAC(replace(coder.config, field=local)), FixedPoint(Euler())) == FixedPoint(Euler())


def test_a_graph_serves_all_times():
    """A traced field computes both ways and chooses by the times it meets."""
    field, state = stirred(), states(2)
    times = [torch.tensor(pair, dtype=torch.float64) for pair in ([0.0, 0.5], [1.0, 0.5])]
    program = torch.export.export(field, (state, *times)).module()
    for t, h in (([0.0, 0.0], [1.0, 0.5]), ([0.5, 0.25], [0.5, -0.25]), ([1.0, 1.0], [-1.0, -0.5])):
        told = (torch.tensor(t, dtype=torch.float64), torch.tensor(h, dtype=torch.float64))
        torch.testing.assert_close(program(state, *told), field(state, *told), rtol=0, atol=1e-10)


@pytest.mark.parametrize("pooled", [False, True])
def test_tiles_are_exact_where_nothing_pools(pooled):
    coder = RAC(RACConfig(LatentSpec(8, 5), replace(SMALL, pooled=pooled), 4, "beside")).double()
    coder.field = stirred(replace(SMALL, pooled=pooled))
    coder.requires_grad_(False)
    latent = torch.randn(1, 5, 17, 5, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    pieces = tiled(coder, 64)
    assert exact(pieces) is not pooled
    assert (seam(coder, latent, 64, steps=2).largest < 1e-9) is not pooled
    image = torch.rand(1, 3, 136, 40, dtype=torch.float64)
    difference = (pieces.encode(image, 2) - coder.encode(image, 2)).abs().max()
    assert bool(difference < 1e-9) is not pooled


def trained(field: CarriersField, **settings) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Terms and gradients of one iteration of four steps."""
    spec = StateSpec(8, 5, 4, "beside")
    coding = Coding(field, spec, lambda state: state, None, solver=MeanEuler())
    objective = RACObjective(
        weights=RACWeights(reconstruction=1.0, detail=2.0), steps=(4, 4), step_noise=0.0, random_grid=False, **settings
    )
    image = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    latent = torch.randn(2, 5, 2, 2, generator=torch.Generator().manual_seed(6), dtype=torch.float64)
    terms = rac_terms(coding, image, latent, objective, Draws.whole(torch.Generator().manual_seed(7), 2))
    field.zero_grad()
    terms["reconstruction"].backward()
    return terms, {name: p.grad.clone() for name, p in field.named_parameters() if p.grad is not None}


def test_recomputed_steps_have_the_same_gradients():
    _, stored = trained(stirred(), memory="store")
    _, again = trained(stirred(), memory="recompute")
    assert stored.keys() == again.keys()
    assert {"head.weight", "entry.weight", "joins.0.weight"} <= stored.keys()
    for name, gradient in stored.items():
        torch.testing.assert_close(again[name], gradient, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("memory", ["store", "recompute"])
def test_gradients_flow_through_the_last_steps_alone(memory):
    whole, through_all = trained(stirred(), memory=memory)
    cut, through_two = trained(stirred(), memory=memory, last_steps=(2, 0))
    _, through_four = trained(stirred(), memory=memory, last_steps=(4, 0))
    assert cut["reconstruction"].item() == pytest.approx(whole["reconstruction"].item(), abs=1e-12)
    torch.testing.assert_close(through_four["stem.weight"], through_all["stem.weight"], rtol=1e-9, atol=1e-12)
    assert not torch.allclose(through_two["stem.weight"], through_all["stem.weight"], rtol=1e-3)
    # What is walked without gradients is a constant: the same as starting the two steps from there.
    field, spec = stirred(), StateSpec(8, 5, 4, "beside")
    latent = torch.randn(2, 5, 2, 2, generator=torch.Generator().manual_seed(6), dtype=torch.float64)
    image = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    with torch.no_grad():
        middle = integrate(field, expand(latent, spec), TimeGrid.of([0.0, 0.25, 0.5]), MeanEuler()).end
    end = integrate(field, middle, TimeGrid.of([0.5, 0.75, 1.0]), MeanEuler()).end
    (end[:, :3] - image).square().mean().backward()
    torch.testing.assert_close(through_two["stem.weight"], field.stem.weight.grad, rtol=1e-9, atol=1e-12)


def test_steps_without_gradients_leave_bfloat16_its_gradients():
    field = stirred().float()
    spec = StateSpec(8, 5, 4, "beside")
    coding = Coding(field, spec, lambda state: state, None, solver=MeanEuler())
    weights = RACWeights(reconstruction=1.0)
    objective = RACObjective(weights, (4, 4), (1, 1), step_noise=0.0, random_grid=False, memory="store")
    with torch.autocast("cpu", torch.bfloat16):
        draws = Draws.whole(torch.Generator().manual_seed(0), 1)
        terms = rac_terms(coding, torch.rand(1, 3, 16, 16), torch.randn(1, 5, 2, 2), objective, draws)
    terms["reconstruction"].backward()
    assert field.stem.weight.grad is not None
    assert field.stem.weight.grad.abs().max() > 0


def test_sharp_terms_count_more_the_more_steps_there_are():
    plain, _ = trained(stirred(), memory="store")
    sharp, _ = trained(stirred(), memory="store", sharpen=0.5)
    assert sharp["detail"].item() == pytest.approx(2 * plain["detail"].item(), rel=1e-9)
    assert sharp["reconstruction"].item() == plain["reconstruction"].item()


def test_what_does_not_fit_is_refused():
    teacher = teacher_of()
    coder = begun_as(teacher)
    with pytest.raises(RacError, match="latent_channels 5"):
        RAC(replace(coder.config, field=replace(SMALL, latent_channels=4)))
    with pytest.raises(RacError, match="beside"):
        RAC(replace(coder.config, spread="shuffle"))
    with pytest.raises(RacError, match="sizes"):
        copy_teacher(teacher, RAC(replace(coder.config, field=SMALL)))
    local = LocalFieldConfig(widths=(8, 8, 8, 8), blocks=(1, 1, 1, 1), down=(), down_blocks=(), patch=1)
    with pytest.raises(RacError, match="carriers field"):
        copy_teacher(teacher, RAC(replace(coder.config, field=local)))
    with pytest.raises(RacError, match="upsample by 8"):
        SMALL.build(4, 16)
    with pytest.raises(RacError, match="one length"):
        replace(SMALL, down_blocks=(1, 1)).build(4, 8)
    with pytest.raises(RacError, match="must be at least 0"):
        RACObjective(last_steps=(0, -1))
    with pytest.raises(RacError, match="last_steps 0 0"):
        RACObjective(last_steps=(1, 0), step_noise=0.0, memory="reverse")


@pytest.mark.parametrize("hidden", [None, 4])
def test_fewer_hidden_channels_cost_fewer_parameters(hidden):
    field = replace(SMALL, hidden=hidden).build(4, 8)
    convolutions = 8 * (2 * 8 * 8 * 9 + 8 * 8 * 9) if hidden is None else 8 * (2 * 8 * 4 * 9 + 4 * 4 * 9)
    assert sum(p.numel() for name, p in field.named_parameters() if ".conv." in name and p.ndim == 4) == convolutions
    assert parameters(field) > convolutions
