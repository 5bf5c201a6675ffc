"""Accuracy of undoing a RAC's flow: by reversed Euler, by fixed point, by a reversible solver."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..coders.rac import RAC
from ..errors import ConvergenceWarning
from ..flow import FixedPoint, ReversibleHeun, Solver, TimeGrid, Trajectory, integrate
from ..states import expand, image_of, image_state


@dataclass(frozen=True)
class Reversal:
    """Accuracy of one way back from a decoded state to its latent."""

    name: str
    start: str
    """Starting point of the way back: the whole state, or the image alone."""
    error: float
    """Largest absolute difference between the latent found and the one decoded."""
    evaluations: int
    """Field evaluations of the way back."""
    residual: float | None = None
    """Largest residual of a step, for fixed points; otherwise None."""
    converged: bool = True


@torch.no_grad()
def reversals(coder: RAC, latent: Tensor, steps: int) -> list[Reversal]:
    """Decodes `latent`, 1 c h w, in `steps` steps, and finds it again in several ways.

    From the whole final state the way back can be exact. From the image alone, which is what an encoder has, the
    state's other channels are only known to be near their constant, and what they held is lost.
    """
    seed, grid = expand(latent, coder.states), TimeGrid.uniform(steps)
    rule = _own_rule(coder)
    euler = integrate(coder.field, seed, grid, rule)
    heun = integrate(coder.field, seed, grid, ReversibleHeun())
    image = image_state(image_of(euler.end), coder.config.state_channels)
    back = grid.reversed()
    found = []
    for start, state in (("state", euler.end), ("image", image)):
        walked = integrate(coder.field, state, back, rule)
        found.append(_judged("Euler, reversed", start, coder, walked, latent))
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", ConvergenceWarning)
            solved = integrate(coder.field, state, back, FixedPoint(rule))
        failed = any(issubclass(warning.category, ConvergenceWarning) for warning in caught)
        found.append(_judged("Euler, fixed point", start, coder, solved, latent, converged=not failed))
    retraced = integrate(coder.field, heun.end, back, ReversibleHeun(), carry=heun.carry)
    found.append(_judged("reversible Heun", "state and carry", coder, retraced, latent))
    return found


@torch.no_grad()
def euler_errors(coder: RAC, latent: Tensor, steps: Sequence[int]) -> list[float]:
    """Returns, for each number of steps, the root mean square by which reversed Euler misses the seed state."""
    seed, rule = expand(latent, coder.states), _own_rule(coder)
    errors = []
    for number in steps:
        grid = TimeGrid.uniform(number)
        end = integrate(coder.field, seed, grid, rule).end
        again = integrate(coder.field, end, grid.reversed(), rule).end
        errors.append(float((again - seed).square().mean().sqrt()))
    return errors


def _own_rule(coder: RAC) -> Solver:
    """Returns Euler's rule as this coder takes it: with the step size as an input where its field accepts it."""
    walk = coder.walk("decode")
    assert walk is not None
    return walk.solver


def slope(steps: Sequence[int], errors: Sequence[float]) -> float:
    """Returns the order of convergence: minus the least-squares slope of log error over log steps."""
    x, y = [math.log(number) for number in steps], [math.log(error) for error in errors]
    mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
    across = sum((a - mean_x) ** 2 for a in x)
    return -sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True)) / across


def _judged(name: str, start: str, coder: RAC, walked: Trajectory, latent: Tensor, converged: bool = True) -> Reversal:
    error = float((coder.contract(walked.end) - latent).abs().max())
    residual = max(walked.residuals) if walked.residuals else None
    return Reversal(name, start, error, walked.evaluations, residual, converged)
