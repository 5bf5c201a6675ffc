"""Walking back: what reversed Euler misses, what the exact inversions reach, and that failure is said."""

from __future__ import annotations

import math
import warnings

import numpy as np
import pytest
import torch

from rac.errors import ConvergenceWarning, RacError
from rac.flow import RK4, Euler, FixedPoint, Heun, MeanEuler, Midpoint, ReversibleHeun, TimeGrid, integrate

EXPLICIT = [Euler(), Midpoint(), Heun(), RK4()]


def states(dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(dtype)


def largest(difference: torch.Tensor) -> float:
    return float(difference.abs().max())


def round_trip(field, grid, solver, back=None, dtype=torch.float64):
    """The error of there-and-back, and the way back."""
    start = states(dtype)
    there = integrate(field, start, grid, solver)
    again = integrate(field, there.end, grid.reversed(), back or solver, carry=there.carry)
    return largest(again.end - start), again


# Walking back with step -h cancels the leading error of a rule of even order, so these gain one order.
@pytest.mark.parametrize(("solver", "order"), [(Euler(), 1), (Midpoint(), 3), (Heun(), 3), (RK4(), 5)])
@pytest.mark.parametrize("field", ["coupled_field", "steep_field"])
def test_error_of_the_round_trip_by_regression(solver, order, field, request):
    counts = [12, 16, 24, 32, 48]
    grids = [TimeGrid.uniform(steps) for steps in counts]
    errors = [round_trip(request.getfixturevalue(field), grid, solver)[0] for grid in grids]
    slope = -np.polyfit(np.log(counts), np.log(errors), 1)[0]
    assert slope == pytest.approx(order, abs=0.1), errors


def test_reversed_euler_is_not_the_inverse_of_euler(steep_field):
    """The fault that REFERENCE.md records: 0.64 at 4 steps on sin(3 s) + t, 0.012 at 256."""
    few, _ = round_trip(steep_field, TimeGrid.uniform(4), Euler())
    many, _ = round_trip(steep_field, TimeGrid.uniform(256), Euler())
    assert few > 0.5
    assert many < 0.02


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("grid", [TimeGrid.uniform(4), TimeGrid.of((0, 0.1, 0.35, 0.4, 1))], ids=["even", "uneven"])
@pytest.mark.parametrize("solver", EXPLICIT, ids=lambda solver: type(solver).__name__)
def test_fixed_point_undoes_every_explicit_solver(solver, grid, dtype, coupled_field):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        error, back = round_trip(coupled_field, grid, solver, FixedPoint(solver), dtype)
    assert error < 1e-5
    assert len(back.residuals) == grid.steps
    assert max(back.residuals) < 1e-5


def test_fixed_point_the_other_way_round(coupled_field):
    """Encoding by Euler is undone by a decoding fixed point: the rule knows no direction."""
    start = states()
    there = integrate(coupled_field, start, TimeGrid.uniform(4).reversed())
    again = integrate(coupled_field, there.end, TimeGrid.uniform(4), FixedPoint())
    assert largest(again.end - start) < 1e-5


def test_fixed_point_undoes_a_mean_velocity_step(mean_growth_field):
    error, _ = round_trip(mean_growth_field, TimeGrid.uniform(2), MeanEuler(), FixedPoint(MeanEuler(), iterations=200))
    assert error < 1e-5


def test_tighter_tolerance_leaves_less(coupled_field):
    loose = round_trip(coupled_field, TimeGrid.uniform(4), Euler(), FixedPoint(tolerance=1e-2))[1]
    tight = round_trip(coupled_field, TimeGrid.uniform(4), Euler(), FixedPoint(tolerance=1e-10))[1]
    assert max(tight.residuals) <= 1e-9 < max(loose.residuals) <= 1e-2 * max(1, largest(loose.end) + 1)
    assert tight.evaluations > loose.evaluations


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("steps", [1, 4, 16])
def test_reversible_heun_retraces_its_steps(steps, dtype, coupled_field):
    error, back = round_trip(coupled_field, TimeGrid.uniform(steps), ReversibleHeun(), dtype=dtype)
    assert error < (1e-5 if dtype == torch.float32 else 1e-12)
    assert back.evaluations == steps


def test_reversible_heun_retraces_where_the_fixed_point_cannot(steep_field):
    grid = TimeGrid.of((0, 0.2, 0.5, 1))
    error, _ = round_trip(steep_field, grid, ReversibleHeun())
    assert error < 1e-10


def test_reversible_heun_without_its_carry_does_not_retrace(coupled_field):
    errors, counts = [], [8, 12, 16, 24]
    for steps in counts:
        there = integrate(coupled_field, states(), TimeGrid.uniform(steps), ReversibleHeun())
        again = integrate(coupled_field, there.end, TimeGrid.uniform(steps).reversed(), ReversibleHeun())
        errors.append(largest(again.end - states()))
    assert errors[-1] > 1e-8, "far above rounding, so the exact round trip is the carry's doing"
    assert -np.polyfit(np.log(counts), np.log(errors), 1)[0] > 1.75


# --------------------------------------------------------------------------------------- what does not converge


def test_no_convergence_is_reported_with_its_residual(steep_field):
    """One step of length 1 on a field of slope 3: |h| L > 1, the iteration does not contract."""
    there = integrate(steep_field, states(), TimeGrid.uniform(1))
    with pytest.warns(ConvergenceWarning, match=r"t = 1 to 0 left a residual of .* after 30 iterations .*more steps"):
        back = integrate(steep_field, there.end, TimeGrid.uniform(1).reversed(), FixedPoint(iterations=30))
    assert len(back.residuals) == 1
    assert back.residuals[0] > 1e-3
    # The residual is that of the state returned, and no worse than the first guess, reversed Euler.
    again = integrate(steep_field, back.end, TimeGrid.uniform(1))
    assert largest(again.end - there.end) == pytest.approx(back.residuals[0], rel=1e-9)
    first = integrate(steep_field, there.end, TimeGrid.uniform(1).reversed())
    assert back.residuals[0] <= largest(integrate(steep_field, first.end, TimeGrid.uniform(1)).end - there.end)


@pytest.mark.filterwarnings("ignore::rac.ConvergenceWarning")
def test_where_it_does_not_converge_the_best_guess_is_kept(steep_field):
    there = integrate(steep_field, states(), TimeGrid.uniform(1)).end
    left = []
    for iterations in range(1, 16):
        back = integrate(steep_field, there, TimeGrid.uniform(1).reversed(), FixedPoint(iterations=iterations))
        again = integrate(steep_field, back.end, TimeGrid.uniform(1)).end
        left.append((again - there).abs().flatten(1).amax(1))
    falls = torch.stack(left).diff(dim=0)
    assert bool((falls <= 0).all()), "an iteration more made an image's answer worse"
    assert bool((falls < 0).any())


def test_more_steps_are_the_mend(steep_field):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        error, _ = round_trip(steep_field, TimeGrid.uniform(16), Euler(), FixedPoint(tolerance=1e-9, iterations=200))
    assert error < 1e-5


def test_too_few_iterations_are_reported(coupled_field):
    with pytest.warns(ConvergenceWarning, match="after 2 iterations"):
        _, back = round_trip(coupled_field, TimeGrid.uniform(2), Euler(), FixedPoint(iterations=2))
    assert max(back.residuals) > 1e-6


def test_one_bad_image_does_not_stop_the_others():
    """Image 1 sits where the field is steep and does not converge; image 0 must, and gives its best."""

    def field(state, time):
        slopes = torch.tensor([0.5, 8.0], dtype=state.dtype).view(-1, 1, 1, 1)
        return torch.sin(slopes * state)

    start = states()
    there = integrate(field, start, TimeGrid.uniform(2))
    with pytest.warns(ConvergenceWarning):
        back = integrate(field, there.end, TimeGrid.uniform(2).reversed(), FixedPoint())
    assert largest(back.end[0] - start[0]) < 1e-5
    assert bool(torch.isfinite(back.end).all())


def test_nan_is_reported_and_stays_with_its_image(coupled_field):
    start = states()
    start[1, 0, 0, 0] = math.nan
    with pytest.warns(ConvergenceWarning):
        back = integrate(coupled_field, start, TimeGrid.uniform(2).reversed(), FixedPoint())
    alone = integrate(coupled_field, states()[:1], TimeGrid.uniform(2).reversed(), FixedPoint())
    assert not all(residual <= 1e-6 for residual in back.residuals)
    torch.testing.assert_close(back.end[:1], alone.end, rtol=0, atol=1e-14)


def test_fixed_point_refuses_what_makes_no_sense():
    with pytest.raises(RacError, match="iterations 0"):
        FixedPoint(iterations=0)
    with pytest.raises(RacError, match="carry"):
        FixedPoint(ReversibleHeun())


# --------------------------------------------------------------------------------------- the coder


def test_a_coder_walks_its_grid_the_right_way(make_rac, images):
    coder = make_rac(lively=0.02).eval()
    latent = coder.encode(images(1, 16, 16), 3)
    assert coder.trajectory(latent, 3).times == TimeGrid.uniform(3).nodes
    assert coder.encode_trajectory(images(1, 16, 16), 3).times == TimeGrid.uniform(3).nodes[::-1]
    with pytest.raises(RacError, match="rising"):
        coder.encode(images(1, 16, 16), TimeGrid.uniform(3).reversed())
    with pytest.raises(RacError, match="rising"):
        coder.decode(latent, TimeGrid.uniform(3).reversed())


@torch.no_grad()
def test_a_coder_encodes_exactly_what_it_decoded(make_rac):
    """State of C = 3 and c = 3 f^2: nothing is cut off, so latent -> image -> latent must come back."""
    from rac.fields import TinyFieldConfig
    from rac.latents import LatentSpec

    coder = make_rac(
        lively=0.05,
        spec=LatentSpec(4, 48),
        field=TinyFieldConfig(widths=(8, 8, 8), blocks=(1, 1, 1)),
        state_channels=3,
        spread="shuffle",
    )
    latent = torch.randn(2, 48, 4, 4, generator=torch.Generator().manual_seed(1))
    image = coder.decode(latent, 4)
    euler = largest(coder.encode(image, 4) - latent)
    exact = largest(coder.encode(image, 4, FixedPoint()) - latent)
    assert largest(image - coder.decode(latent, 1)) > 1e-3, "the field does nothing; the test would be empty"
    assert exact < 1e-5 < euler
