"""Grids, solvers and the one loop: order, direction, cost."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rac.errors import RacError
from rac.flow import (
    RK4,
    Euler,
    FixedPoint,
    Heun,
    MeanEuler,
    Midpoint,
    ReversibleHeun,
    TimeGrid,
    integrate,
    straight,
)
from rac.flow.times import shift, times_of

EXPLICIT = [Euler(), Midpoint(), Heun(), RK4()]
SOLVERS = [*EXPLICIT, ReversibleHeun(), FixedPoint(Euler(), 1e-13), FixedPoint(Midpoint(), 1e-13)]
COST = {"Euler": 1, "MeanEuler": 1, "Midpoint": 2, "Heun": 2, "RK4": 4, "ReversibleHeun": 1}


def name_of(solver: object) -> str:
    inner = f"({type(solver.solver).__name__})" if isinstance(solver, FixedPoint) else ""
    return type(solver).__name__ + inner


def states(rng_seed: int = 0, batch: int = 2) -> torch.Tensor:
    """Numbers in (0.1, 0.9), B 3 2 2."""
    generator = torch.Generator().manual_seed(rng_seed)
    return 0.1 + 0.8 * torch.rand(batch, 3, 2, 2, generator=generator, dtype=torch.float64)


# A grid of uneven steps, so that no solver can rely on equal ones.
def stretched(steps: int) -> TimeGrid:
    return TimeGrid.of([(k / steps + 0.3 * (k / steps) ** 2) / 1.3 for k in range(steps + 1)])


rising_grids = st.lists(st.floats(0, 1), min_size=2, max_size=6, unique=True).map(
    lambda nodes: TimeGrid.of(sorted(nodes))
)


# ------------------------------------------------------------------------------------------------ solvers


@pytest.mark.parametrize("backwards", [False, True], ids=["forwards", "backwards"])
@pytest.mark.parametrize("solver", SOLVERS, ids=name_of)
def test_order_of_accuracy_by_regression(solver, backwards, logistic_field):
    start = states()
    errors, counts = [], [12, 17, 24, 34, 48]
    for steps in counts:
        grid = stretched(steps).reversed() if backwards else stretched(steps)
        end = integrate(logistic_field, start, grid, solver).end
        errors.append(float((end - logistic_field.solution(start, grid.nodes[0], grid.nodes[-1])).abs().max()))
    slope = np.polyfit(np.log(counts), np.log(errors), 1)[0]
    assert -slope == pytest.approx(solver.order, abs=0.25), errors


@pytest.mark.parametrize("solver", SOLVERS, ids=name_of)
def test_reversed_grid_equals_negated_field(solver, coupled_field):
    """v'(s, t) = -v(s, 1 - t) on the mirrored grid does what v does on the reversed one."""

    def turned(state, time):
        return -coupled_field(state, 1 - time)

    grid = stretched(5)
    mirrored = TimeGrid.of([1 - node for node in reversed(grid.nodes)])
    there = integrate(coupled_field, states(), grid.reversed(), solver, keep="nodes")
    other = integrate(turned, states(), mirrored, solver, keep="nodes")
    for one, two in zip(there.states, other.states, strict=True):
        torch.testing.assert_close(one, two, rtol=0, atol=1e-12)
    assert there.evaluations == other.evaluations


@pytest.mark.parametrize(("t0", "t1"), [(0.25, 0.75), (0.75, 0.25)])
def test_where_each_solver_asks(t0, t1, coupled_field):
    def asked(solver) -> list[float]:
        times = []

        def field(state, time, interval=None):
            assert time.shape == (state.shape[0],)
            times.append(float(time[0]))
            return coupled_field(state, time)

        integrate(field, states(), TimeGrid.of((t0, t1)), solver)
        return times

    assert asked(Euler()) == [t0]
    assert asked(MeanEuler()) == [t0]
    assert asked(Midpoint()) == [t0, 0.5]
    assert asked(Heun()) == [t0, t1]
    assert asked(RK4()) == [t0, 0.5, 0.5, t1]
    assert asked(ReversibleHeun()) == [t0, t1]


@given(grid=rising_grids, backwards=st.booleans(), slope=st.floats(-2, 2))
def test_euler_is_the_sum_of_its_steps(grid, backwards, slope):
    grid = grid.reversed() if backwards else grid
    flow = integrate(lambda state, time: slope + time.view(-1, 1, 1, 1) + 0 * state, states(), grid)
    travelled = sum((t1 - t0) * (slope + t0) for t0, t1 in zip(grid.nodes[:-1], grid.nodes[1:], strict=True))
    torch.testing.assert_close(flow.end, states() + travelled, rtol=0, atol=1e-12)


@pytest.mark.parametrize("solver", [*EXPLICIT, ReversibleHeun()], ids=name_of)
def test_constant_velocity_is_exact_in_one_step(solver):
    source, target = states(1), states(2)
    flow = integrate(lambda state, time: target - source, source, TimeGrid.uniform(1), solver)
    torch.testing.assert_close(flow.end, target, rtol=0, atol=1e-14)


# ------------------------------------------------------------------------------------------------ the loop


@given(steps=st.integers(1, 40))
def test_steps_are_evaluations_of_euler(steps):
    flow = integrate(lambda state, time: state, states(), TimeGrid.uniform(steps))
    assert flow.evaluations == steps == TimeGrid.uniform(steps).steps == len(flow.times) - 1


@pytest.mark.parametrize("solver", [*EXPLICIT, ReversibleHeun(), MeanEuler()], ids=name_of)
@pytest.mark.parametrize("steps", [1, 2, 5])
def test_every_evaluation_is_counted(solver, steps, coupled_field):
    asked = 0

    def field(state, time, interval=None):
        nonlocal asked
        asked += 1
        return coupled_field(state, time)

    flow = integrate(field, states(), TimeGrid.uniform(steps), solver)
    begin = 1 if isinstance(solver, ReversibleHeun) else 0
    assert flow.evaluations == asked == COST[type(solver).__name__] * steps + begin


def test_fixed_point_counts_its_iterations(coupled_field):
    asked = 0

    def field(state, time):
        nonlocal asked
        asked += 1
        return coupled_field(state, time)

    flow = integrate(field, states(), TimeGrid.uniform(3).reversed(), FixedPoint())
    assert flow.evaluations == asked > 6


@given(grid=rising_grids, backwards=st.booleans())
def test_what_is_kept(grid, backwards):
    grid = grid.reversed() if backwards else grid
    start = states()
    nodes = integrate(lambda state, time: state.cos(), start, grid, keep="nodes")
    end = integrate(lambda state, time: state.cos(), start, grid)
    assert end.states == ()
    assert torch.equal(nodes.end, end.end)
    assert nodes.times == end.times == grid.nodes
    assert len(nodes.states) == len(grid.nodes)
    assert nodes.states[0] is start
    assert nodes.states[-1] is nodes.end


def test_integrating_does_not_change_the_start(coupled_field):
    for solver in SOLVERS:
        start = states()
        integrate(coupled_field, start, TimeGrid.uniform(2), solver)
        assert torch.equal(start, states())


# ------------------------------------------------------------------------------------------------ grids


@given(steps=st.integers(1, 100), alpha=st.floats(0.05, 20), rng_seed=st.integers(0, 2**31))
def test_made_grids_run_from_0_to_1(steps, alpha, rng_seed):
    for grid in (
        TimeGrid.uniform(steps),
        TimeGrid.shifted(steps, alpha),
        TimeGrid.random(steps, torch.Generator().manual_seed(rng_seed)),
    ):
        assert grid.nodes[0] == 0
        assert grid.nodes[-1] == 1
        assert grid.steps == steps == len(grid.nodes) - 1
        assert all(a < b for a, b in zip(grid.nodes[:-1], grid.nodes[1:], strict=True))
        assert grid.reversed().nodes == grid.nodes[::-1]
        assert grid.reversed().reversed() == grid


def test_uniform_steps_are_equal_and_shift_1_changes_nothing():
    assert TimeGrid.uniform(4).nodes == (0, 0.25, 0.5, 0.75, 1)
    assert TimeGrid.shifted(8, 1.0).nodes == pytest.approx(TimeGrid.uniform(8).nodes, abs=1e-15)


def test_random_grids_are_sorted_uniform_draws():
    generator = torch.Generator().manual_seed(3)
    grids = [TimeGrid.random(4, generator) for _ in range(2000)]
    assert len(set(grids)) == 2000
    # The k-th of n sorted uniform draws has mean k / (n + 1).
    means = np.mean([grid.nodes for grid in grids], axis=0)
    np.testing.assert_allclose(means, [0, 0.25, 0.5, 0.75, 1], atol=0.02)


@given(alpha=st.floats(0.05, 20), time=st.floats(0, 1))
def test_shift_is_undone_by_its_inverse_and_leans_to_the_source(alpha, time):
    given_time = torch.tensor(time, dtype=torch.float64)
    moved = shift(given_time, alpha)
    torch.testing.assert_close(shift(moved, 1 / alpha), given_time, rtol=0, atol=1e-12)
    assert alpha == 1 or float(moved - given_time) * (1 - alpha) >= -1e-12
    # SPEC 4: t_noise' = alpha t_noise / (1 + (alpha - 1) t_noise), with t_noise = 1 - t.
    noise = 1 - time
    assert 1 - float(moved) == pytest.approx(alpha * noise / (1 + (alpha - 1) * noise), abs=1e-12)


@pytest.mark.parametrize(
    ("distribution", "cumulative"),
    [
        ("uniform", lambda t: t),
        # The normal distribution N(0.4, 1) at logit(t), and arcsine's own (2 / pi) arcsin(sqrt(t)).
        ("logit_normal", lambda t: (1 + math.erf((math.log(t / (1 - t)) - 0.4) / math.sqrt(2))) / 2),
        ("arcsine", lambda t: 2 / math.pi * math.asin(math.sqrt(t))),
    ],
)
def test_times_have_the_distribution_they_are_named_after(distribution, cumulative):
    numbers = torch.linspace(0, 1, 1001, dtype=torch.float64)[1:-1]
    times = times_of(numbers, distribution)
    assert bool((times.diff() > 0).all())
    assert 0 < float(times[0]) < float(times[-1]) < 1
    assert [cumulative(float(time)) for time in times[::50]] == pytest.approx(numbers[::50].tolist(), abs=1e-9)
    assert 0 <= float(times_of(torch.zeros(1), distribution)) <= 1


def test_times_at_the_ends():
    times = times_of(torch.linspace(0, 1, 4001, dtype=torch.float64)[:-1], "ends")
    assert float((times == 0).double().mean()) == pytest.approx(0.5, abs=1e-3)
    assert float((times == 1).double().mean()) == pytest.approx(0.25, abs=1e-3)
    between = times[(times > 0) & (times < 1)]
    assert float(between.mean()) == pytest.approx(0.5, abs=1e-3)
    assert float(between.std()) == pytest.approx(12**-0.5, abs=1e-3)


@pytest.mark.parametrize(
    "nodes",
    [(), (0.0,), (0.0, 0.0), (0.0, 0.5, 0.5, 1.0), (0.0, 0.6, 0.5, 1.0), (-0.1, 1.0), (0.0, 1.1), (0.0, math.nan, 1.0)],
)
def test_wrong_nodes_are_refused(nodes):
    with pytest.raises(RacError, match="nod"):
        TimeGrid(nodes)


def test_shifted_grids_keep_their_ends_for_every_alpha():
    """Rounding must not push an end out of [0, 1]: alpha 0.1, 0.2 and 0.4 once did."""
    for alpha in np.linspace(0.05, 20, 400):
        nodes = TimeGrid.shifted(3, float(alpha)).nodes
        assert (nodes[0], nodes[-1]) == (0, 1)


@pytest.mark.parametrize("steps", [0, -3, 2.0, "4", True, None])
def test_wrong_steps_are_refused(steps):
    for make in (
        TimeGrid.uniform,
        lambda count: TimeGrid.shifted(count, 2.0),
        lambda count: TimeGrid.random(count, torch.Generator()),
    ):
        with pytest.raises(RacError, match="at least 1"):
            make(steps)


@pytest.mark.parametrize("alpha", [0.0, -1.0, math.nan])
def test_wrong_shift_is_refused(alpha):
    with pytest.raises(RacError, match="alpha"):
        TimeGrid.shifted(4, alpha)


# ------------------------------------------------------------------------------------------------ the path


@given(time=st.floats(0, 1), rng_seed=st.integers(0, 2**31))
def test_straight_path(time, rng_seed):
    source, target = states(rng_seed), states(rng_seed + 1)
    point = straight(source, target, torch.tensor(time, dtype=torch.float64))
    torch.testing.assert_close(point.state, source + time * (target - source), rtol=0, atol=1e-14)
    assert torch.equal(point.velocity, target - source)
    each = straight(source, target, torch.tensor([time, 1.0], dtype=torch.float64))
    assert torch.equal(each.state[0], point.state[0])
    assert torch.equal(each.state[1], target[1])
    assert torch.equal(straight(source, target, torch.tensor(0.0)).state, source)
