"""Conditions and guidance: what comes out, what it costs, and that solvers cannot tell."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from rac.errors import RacError
from rac.flow import RK4, Conditioned, Euler, Guided, Heun, ReversibleHeun, TimeGrid, integrate
from rac.flow.guidance import evaluations_of
from rac.flow.memory import retraced


class Pull(nn.Module):
    """A conditional field, label by label a constant, that counts how often it is asked."""

    def __init__(self, values: tuple[float, ...]) -> None:
        super().__init__()
        self.values = nn.Parameter(torch.tensor(values, dtype=torch.float64))
        self.calls = 0

    def forward(self, state: Tensor, time: Tensor, *interval: Tensor, condition: Tensor) -> Tensor:
        self.calls += 1
        velocity = torch.cos(state) * self.values[condition].view(-1, 1, 1, 1) + time.view(-1, 1, 1, 1)
        return velocity + interval[0].view(-1, 1, 1, 1) if interval else velocity


NULL = 2


def pair(network: Pull, labels: list[int], **settings) -> Guided:
    wanted = torch.tensor(labels)
    return Guided(Conditioned(network, wanted), Conditioned(network, torch.full_like(wanted, NULL)), **settings)


def constant(value: float):
    return lambda state, time: torch.full_like(state, value)


def zeros(batch: int = 2, channels: int = 4) -> Tensor:
    return torch.zeros(batch, channels, 2, 2, dtype=torch.float64)


@given(scale=st.floats(-3, 8), strong=st.floats(-5, 5), weak=st.floats(-5, 5))
def test_guided_velocity_is_the_extrapolation(scale, strong, weak):
    found = Guided(constant(strong), constant(weak), scale)(zeros(), torch.zeros(2))
    assert torch.allclose(found, torch.full_like(found, weak + scale * (strong - weak)), atol=1e-9)


def test_published_example():
    # v_u = 1, v_c = 3, scale 1.5: 1 + 1.5 * 2
    assert Guided(constant(3.0), constant(1.0), 1.5)(zeros(), torch.zeros(2)).unique().tolist() == [4.0]


def test_scale_one_asks_the_field_alone_and_zero_gives_the_weaker_one():
    network = Pull((1.0, 2.0, 5.0))
    state, time = torch.randn(2, 4, 2, 2, dtype=torch.float64), torch.rand(2, dtype=torch.float64)
    plain = Conditioned(network, torch.tensor([0, 1]))(state, time)
    network.calls = 0
    assert torch.equal(pair(network, [0, 1], scale=1.0)(state, time), plain)
    assert network.calls == 1
    null = Conditioned(network, torch.tensor([NULL, NULL]))(state, time)
    assert torch.allclose(pair(network, [0, 1], scale=0.0)(state, time), null)


def test_only_the_first_channels_are_guided_where_asked():
    found = Guided(constant(3.0), constant(1.0), 1.5, channels=3)(zeros(), torch.zeros(2))
    assert found[:, :3].unique().tolist() == [4.0]
    assert found[:, 3:].unique().tolist() == [3.0]


def test_the_interval_is_closed_and_decided_for_each_image():
    field = Guided(constant(3.0), constant(1.0), 1.5, interval=(0.25, 0.75))
    found = field(zeros(5), torch.tensor([0.0, 0.25, 0.5, 0.75, 1.0], dtype=torch.float64))
    assert found[:, 0, 0, 0].tolist() == [3.0, 4.0, 4.0, 4.0, 3.0]


@pytest.mark.parametrize("solver", [Euler(), Heun(), RK4(), ReversibleHeun()], ids=lambda one: type(one).__name__)
@pytest.mark.parametrize("interval", [(0.0, 1.0), (0.3, 0.8), (0.5, 0.5)])
@pytest.mark.parametrize("scale", [1.0, 2.0])
def test_evaluations_are_what_the_networks_were_asked(solver, interval, scale):
    network = Pull((1.0, 2.0, 5.0))
    inner = pair(network, [0, 1], scale=scale, interval=interval)
    # Guidance of guidance: a guided field, pushed away from a conditional one.
    field = Guided(inner, Conditioned(network, torch.tensor([1, 0])), 1.5)
    flow = integrate(field, zeros(), TimeGrid.uniform(5), solver)
    assert flow.evaluations == network.calls


def test_a_guided_step_costs_two():
    network = Pull((1.0, 2.0, 5.0))
    assert integrate(pair(network, [0, 1], scale=2.0), zeros(), TimeGrid.uniform(5)).evaluations == 10
    assert integrate(Conditioned(network, torch.tensor([0, 1])), zeros(), TimeGrid.uniform(5)).evaluations == 5
    assert evaluations_of(lambda state, time: state, torch.zeros(2)) == 1


def test_each_image_meets_its_own_label_in_any_batch():
    network, labels = Pull((1.0, 2.0, 5.0)), [0, 1, 0]
    state = torch.randn(3, 4, 2, 2, dtype=torch.float64)
    together = integrate(pair(network, labels, scale=2.5), state, TimeGrid.uniform(3)).end
    for i, label in enumerate(labels):
        alone = integrate(pair(network, [label], scale=2.5), state[i : i + 1], TimeGrid.uniform(3)).end
        assert torch.equal(together[i : i + 1], alone)


def test_an_interval_reaches_the_network():
    network = Pull((1.0, 2.0, 5.0))
    state, time, interval = zeros(), torch.zeros(2, dtype=torch.float64), torch.full((2,), 0.5, dtype=torch.float64)
    field = pair(network, [0, 1], scale=2.0)
    assert torch.allclose(field(state, time, interval), field(state, time) + 0.5)


def test_the_condition_gets_its_gradient_also_where_states_are_retraced():
    class Latent(nn.Module):
        def forward(self, state: Tensor, time: Tensor, *, condition: Tensor) -> Tensor:
            return torch.sin(state + condition) * (1 + time.view(-1, 1, 1, 1))

    state, grid = torch.randn(2, 4, 2, 2, dtype=torch.float64), TimeGrid.uniform(3)
    gradients = []
    for walk in (
        lambda field: integrate(field, state, grid, ReversibleHeun()),
        lambda field: retraced(field, state, grid),
    ):
        # Not a leaf: what an encoder made.
        source = torch.linspace(-1, 1, 32, dtype=torch.float64).view(2, 4, 2, 2).requires_grad_()
        flow = walk(Conditioned(Latent(), 2 * source))
        flow.end.square().sum().backward()
        gradients.append(source.grad)
    assert float(gradients[0].abs().max()) > 1e-3
    assert torch.allclose(*gradients, rtol=1e-9)


def test_guided_flows_pull_harder_towards_their_target():
    """Two points of the line, reached by conditional flows: guidance away from their mean ends beyond the own one."""
    target = {0: 1.0, 1: -1.0}
    for label, end in target.items():
        guided = Guided(constant(target[label]), constant(0.0), 2.0)
        assert integrate(guided, zeros(1), TimeGrid.uniform(4)).end.unique().tolist() == pytest.approx([2 * end])


@pytest.mark.parametrize(
    ("settings", "word"),
    [
        ({"scale": math.nan}, "scale"),
        ({"scale": math.inf}, "scale"),
        ({"scale": 2.0, "interval": (0.5, 0.2)}, "interval"),
        ({"scale": 2.0, "interval": (-0.1, 0.5)}, "interval"),
        ({"scale": 2.0, "interval": (0.0, math.nan)}, "interval"),
        ({"scale": 2.0, "channels": 0}, "channels"),
    ],
)
def test_settings_that_mean_nothing_are_refused(settings, word):
    with pytest.raises(RacError, match=word):
        Guided(constant(1.0), constant(0.0), **settings)
