"""Exact encoding: an explicit solver's steps are undone one by one, each by fixed-point iteration."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from dataclasses import field as dataclass_field
from typing import Any

import torch
from torch import Tensor

from ..errors import ConvergenceWarning, RacError
from .solvers import Euler, Field, Solver, Step


@dataclass(frozen=True)
class FixedPoint:
    """The exact inverse of an explicit solver, as a solver.

    Reversed Euler is not the inverse of Euler: it evaluates the field at the wrong end, and misses by O(1/K). A step of
    this rule from t1 to t0 finds the state that the explicit step from t0 carries to the given one, by
    s <- s + (given - step(s)), so that

        there = integrate(field, state, grid, Euler())
        back = integrate(field, there.end, grid.reversed(), FixedPoint(Euler()))

    returns to `state`. The iteration contracts where |h| times the field's Lipschitz constant is below 1: take more
    steps if it does not. The remaining error, max |given - step(s)|, is the step's residual; above the tolerance a
    `ConvergenceWarning` says so.
    """

    solver: Solver = dataclass_field(default_factory=Euler)
    """The explicit rule to undo; a reversible one raises `RacError`."""
    tolerance: float = 1e-6
    """Largest absolute residual to stop at, in units of the state's largest absolute value where that exceeds 1."""
    iterations: int = 50
    """Limit on the iterations of each step, each one step of `solver`; at least 1."""

    def __post_init__(self) -> None:
        if self.iterations < 1:
            raise RacError(f"iterations {self.iterations} of the fixed point must be at least 1")
        if self.solver.reversible:
            raise RacError("a reversible solver needs no fixed point; integrate the reversed grid with its carry")

    @property
    def order(self) -> int:
        """Global order of accuracy, that of the solver it undoes."""
        return self.solver.order

    reversible = False

    def step(self, field: Field, state: Tensor, t0: float, t1: float, carry: Any = None) -> Step:
        """Returns the state at t1 that `solver` carries to `state` at t0. Each image of the batch stops on its own."""
        tolerance = self.tolerance * _largest(state).clamp(min=1)
        # Reversed Euler's answer is the natural first guess.
        guess = best = self.solver.step(field, state, t0, t1, None).state
        least = torch.full_like(tolerance, torch.inf)
        for _ in range(self.iterations):
            error = state - self.solver.step(field, guess, t1, t0, None).state
            residual = _largest(error)
            better = residual < least
            best, least = torch.where(better, guess, best), torch.where(better, residual, least)
            active = (residual > tolerance) & torch.isfinite(residual)
            if not active.any():
                break
            guess = torch.where(active, guess + error, guess)
        if not (least <= tolerance).all():
            warnings.warn(
                f"the fixed point of the step from t = {t0:.3g} to {t1:.3g} left a residual of "
                f"{float(least.max()):.3g} after {self.iterations} iterations "
                f"(tolerance {float(tolerance.max()):.3g}); take more steps",
                ConvergenceWarning,
                stacklevel=2,
            )
        return Step(best, None, float(least.max()))


def _largest(state: Tensor) -> Tensor:
    """Returns the largest absolute value of each image's state, B 1 1 1."""
    return state.detach().abs().flatten(1).amax(1).view(-1, *[1] * (state.ndim - 1))
