"""The mean-velocity identity: two derivatives that agree, the right sign, and no two answers for one question."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rac.draws import Draws
from rac.errors import RacError
from rac.fields import TinyFieldConfig
from rac.flow import Euler, MeanEuler, TimeGrid, integrate
from rac.flow.mean import mean_velocity_target, total_derivative
from rac.objectives.rac import Coding, RACObjective, RACWeights, mean_velocity_error, rac_terms
from rac.states import StateSpec, contract

times = st.floats(0.05, 0.95)


def normal(*shape: int, rng_seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(rng_seed), dtype=torch.float64)


def curved(state, time, interval):
    """An u(s, t, h) that is no mean velocity of anything, but curved in all it is given."""
    t, h = time.view(-1, 1, 1, 1), interval.view(-1, 1, 1, 1)
    return torch.sin(state) * t + h**2 * state + torch.exp(t * h)


def curved_derivative(state, velocity, time, interval):
    """v . grad_s u + d_t u - d_h u of `curved`, by hand: the far end t + h stays, so h falls as t rises."""
    t, h = time.view(-1, 1, 1, 1), interval.view(-1, 1, 1, 1)
    along_state = velocity * (torch.cos(state) * t + h**2)
    along_time = torch.sin(state) + h * torch.exp(t * h)
    along_interval = 2 * h * state + t * torch.exp(t * h)
    return along_state + along_time - along_interval


@given(time=times, end=times, rng_seed=st.integers(0, 2**31))
def test_derivatives_equal_the_closed_form(time, end, rng_seed):
    source, target = normal(2, 3, 2, 2, rng_seed=rng_seed), normal(2, 3, 2, 2, rng_seed=rng_seed + 1)
    t, r = torch.tensor([time, end], dtype=torch.float64), torch.tensor([end, time], dtype=torch.float64)
    state = source + t.view(-1, 1, 1, 1) * (target - source)
    expected = curved_derivative(state, target - source, t, r - t)
    exact = total_derivative(curved, source, target, t, r, "jvp")
    torch.testing.assert_close(exact, expected, rtol=1e-10, atol=1e-10)
    central = total_derivative(curved, source, target, t, r, "central", step=1e-4)
    torch.testing.assert_close(central, expected, rtol=1e-5, atol=1e-5)
    target_velocity = (target - source) + (r - t).view(-1, 1, 1, 1) * expected
    torch.testing.assert_close(
        mean_velocity_target(curved, source, target, t, r), target_velocity, rtol=1e-10, atol=1e-10
    )


@given(time=times, end=times)
def test_a_true_mean_velocity_obeys_the_identity_both_ways(time, end, mean_growth_field):
    """On a curved flow, along the tangent at s: the identity holds for r > t (decoding) and r < t (encoding)."""
    state = normal(1, 3, 2, 2)
    t, r = torch.tensor([time], dtype=torch.float64), torch.tensor([end], dtype=torch.float64)
    velocity = mean_growth_field.velocity(state, t)
    source, target = state - t * velocity, state + (1 - t) * velocity
    wanted = mean_velocity_target(mean_growth_field, source, target, t, r)
    torch.testing.assert_close(wanted, mean_growth_field(state, t, r - t), rtol=1e-8, atol=1e-8)


def test_jvp_equals_finite_difference_through_a_network():
    torch.manual_seed(0)
    field = TinyFieldConfig(widths=(8, 8), blocks=(1, 1), interval=True).build(4, 2).double()
    with torch.no_grad():
        for parameter in field.parameters():
            parameter.normal_(0, 0.2)
    source, target = normal(3, 4, 8, 8), normal(3, 4, 8, 8, rng_seed=1)
    t, r = torch.tensor([0.1, 0.5, 0.9]).double(), torch.tensor([0.8, 0.5, 0.2]).double()
    exact = total_derivative(field, source, target, t, r, "jvp")
    # A ReLU has kinks, which a short step rarely meets.
    central = total_derivative(field, source, target, t, r, "central", step=1e-7)
    assert float(exact.abs().max()) > 1e-3
    torch.testing.assert_close(central, exact, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("how", ["jvp", "central"])
def test_target_is_detached_whatever_it_is_made_of(how):
    scale = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
    source, target = normal(1, 3, 2, 2).requires_grad_(), normal(1, 3, 2, 2, rng_seed=1).requires_grad_()
    t, r = torch.tensor([0.3]).double(), torch.tensor([0.6]).double()
    wanted = mean_velocity_target(lambda s, t, h: scale * curved(s, t, h), source, target, t, r, how)
    assert not wanted.requires_grad


@given(time=times, end=times)
def test_mean_euler_is_exact_in_one_step_and_back(time, end, mean_growth_field):
    if abs(time - end) < 1e-3:
        return
    state = normal(2, 3, 2, 2)
    grid = TimeGrid.of((time, end))
    there = integrate(mean_growth_field, state, grid, MeanEuler())
    torch.testing.assert_close(there.end, mean_growth_field.solution(state, time, end), rtol=1e-12, atol=1e-12)
    back = integrate(mean_growth_field, there.end, grid.reversed(), MeanEuler())
    torch.testing.assert_close(back.end, state, rtol=1e-12, atol=1e-12)


def test_an_empty_interval_asks_for_the_velocity(mean_growth_field):
    state, t = normal(2, 3, 2, 2), torch.tensor([0.2, 0.7]).double()
    assert torch.equal(mean_growth_field(state, t, torch.zeros(2).double()), mean_growth_field.velocity(state, t))
    field = TinyFieldConfig(widths=(4, 4), blocks=(0, 0), interval=True).build(3, 2).double()
    torch.nn.init.normal_(list(field.parameters())[-2])
    assert torch.equal(field(state, t), field(state, t, torch.zeros(2).double()))
    other = field(state, t, torch.ones(2).double())
    assert not torch.equal(field(state, t), other)


def test_a_field_without_interval_refuses_one():
    field = TinyFieldConfig(widths=(4, 4), blocks=(0, 0)).build(3, 2)
    with pytest.raises(RacError, match="interval=True"):
        field(torch.zeros(1, 3, 4, 4), torch.zeros(1), torch.zeros(1))


def test_the_error_vanishes_for_a_true_mean_velocity_of_straight_lines():
    """Target = 3 source for every image: the flow is straight, u = v everywhere, and the error is 0 at once."""

    def field(state, time, interval=None):
        return 2 * state / (1 + 2 * time.view(-1, 1, 1, 1))

    source = normal(4, 3, 2, 2)
    t, r = torch.tensor([0.1, 0.6, 0.9, 0.4]).double(), torch.tensor([0.7, 0.6, 0.2, 1.0]).double()
    assert float(mean_velocity_error(field, source, 3 * source, t, r)) < 1e-20
    off = mean_velocity_error(lambda *given: field(*given) + 0.5, source, 3 * source, t, r)
    assert float(off) == pytest.approx(0.25, abs=1e-9)


def test_training_asks_both_ways_and_mostly_for_nothing():
    """Signed intervals: decoding and encoding are different questions. Three quarters of them are empty."""
    asked = []

    def field(state, time, interval):
        asked.append((time, interval))
        return 0 * state

    states = StateSpec(2, 3, 4)
    coding = Coding(field, states, lambda state: contract(state, states), None)
    weights = RACObjective(RACWeights(mean_velocity=1.0))
    image, latent = normal(4000, 3, 2, 2), normal(4000, 3, 1, 1)
    rac_terms(coding, image, latent, weights, Draws.whole(torch.Generator().manual_seed(0), 4000))
    time, interval = asked[-1]  # the evaluation whose error is taken; before it comes the derivative's
    assert float((interval == 0).double().mean()) == pytest.approx(0.75, abs=0.03)
    assert float((interval > 0).double().mean()) == pytest.approx(0.125, abs=0.03)
    assert float((interval < 0).double().mean()) == pytest.approx(0.125, abs=0.03)
    assert bool(((time + interval >= 0) & (time + interval <= 1)).all())


def test_euler_on_the_velocity_reaches_what_the_mean_velocity_says(mean_growth_field):
    state = normal(1, 3, 2, 2)
    one = integrate(mean_growth_field, state, TimeGrid.uniform(1), MeanEuler()).end
    many = integrate(mean_growth_field.velocity, state, TimeGrid.uniform(2000), Euler()).end
    torch.testing.assert_close(one, many, rtol=1e-3, atol=1e-3)
