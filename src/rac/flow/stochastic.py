"""Stochastic integration from noise to data: the reverse SDE whose marginals are those of the flow.

For the straight path x_t = (1 - t) e + t x_1 with Gaussian e, the velocity v tells the score, s = (t v - x) / (1 - t),
and for every w(t) >= 0 the equation dx = (v + w s) dt + sqrt(2 w) dW carries noise at t = 0 to data at t = 1 through
the same densities as the flow (SiT, arXiv 2401.08740, equations 6 and 7, whose w is twice this one).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from ..errors import RacError
from .grid import TimeGrid, check_steps
from .solvers import Field, Step, velocity
from .times import shift

Diffusion = Literal["sigma", "sbdm", "constant", "increasing-decreasing", "decreasing"]
"""Name of a choice of w, as public samplers call them; see `diffusion_at`."""

SBDM_START = 1e-3
"""First time of the SDE with w = (1 - t) / t, which is infinite at 0."""


def score(velocity: Tensor, state: Tensor, time: float) -> Tensor:
    """Returns the score (t v - x) / (1 - t) of the density at `time` < 1, from velocity v and state x, B C H W."""
    return (time * velocity - state) / (1 - time)


def diffusion_at(diffusion: Diffusion, time: float) -> float:
    """Returns w at `time`.

    - `sigma`: 1 - t (SiT's default, and its `linear`); the drift is then (1 + t) v - x, finite everywhere.
    - `sbdm`: (1 - t) / t, that of the forward process.
    - `constant`: 1.
    - `increasing-decreasing`: sin^2(pi t).
    - `decreasing`: (1 + cos pi t)^2 / 4.
    """
    if diffusion == "sbdm":
        return (1 - time) / time
    if diffusion == "constant":
        return 1.0
    if diffusion == "increasing-decreasing":
        return math.sin(math.pi * time) ** 2
    if diffusion == "decreasing":
        return (1 + math.cos(math.pi * time)) ** 2 / 4
    return 1 - time


@dataclass(frozen=True)
class EulerMaruyama:
    """Euler-Maruyama's rule for the SDE of a velocity field; the step that ends at t = 1 adds no noise.

    One evaluation. Random numbers come from `noise`, so that each image can have its own.
    """

    noise: Callable[[Tensor], Tensor]
    """Function that returns standard normal numbers of the shape of the state."""
    diffusion: Diffusion = "sigma"
    """Choice of w."""
    last: Literal["mean", "tweedie"] = "mean"
    """Last step: along the drift alone, which is right where w goes to 0 at t = 1, or to the expected data
    x + (1 - t) v, which is the Euler step of the flow.
    """
    order = 1
    reversible = False

    def step(self, field: Field, state: Tensor, t0: float, t1: float, carry: Any = None) -> Step:
        """Carries `state` from t0 to t1. Raises `RacError` for a step backwards."""
        h = t1 - t0
        if h < 0:
            raise RacError("the SDE leads from noise to data; give a rising grid")
        v = velocity(field, state, t0)
        if t1 == 1 and self.last == "tweedie":
            return Step(state + h * v)
        w = diffusion_at(self.diffusion, t0)
        # w s, with the 1 - t of both taken together first: t0 < 1.
        mean = state + h * (v + w / (1 - t0) * (t0 * v - state))
        return Step(mean if t1 == 1 else mean + math.sqrt(2 * w * h) * self.noise(state))


def sde_grid(steps: int, diffusion: Diffusion = "sigma", alpha: float = 1.0, last: float = 0.04) -> TimeGrid:
    """Returns the grid of the SDE: `steps` - 1 noisy steps from 0 to 1 - `last`, and one from there to 1.

    - `steps`: number of evaluations, at least 2.
    - `diffusion`: choice of w; `sbdm` starts at `SBDM_START`.
    - `alpha`: shift of the nodes as in `TimeGrid.shifted`; `last` is a length of shifted time.
    - `last`: length of the last step, above 0 and below 1.

    Raises `RacError` for numbers out of these ranges.
    """
    if check_steps(steps) < 2:
        raise RacError(f"the SDE needs at least 2 steps, noisy ones and a last one, not {steps}; 250 are usual")
    if not 0 < last < 1 - SBDM_START:
        raise RacError(f"the last step of the SDE {last} must be above 0 and below 1; 0.04 is usual")
    start = SBDM_START if diffusion == "sbdm" else 0.0
    first, end = (_shifted(time, 1 / alpha if alpha > 0 else alpha) for time in (start, 1 - last))
    inner = (_shifted(first + (end - first) * k / (steps - 1), alpha) for k in range(1, steps - 1))
    return TimeGrid((start, *inner, 1 - last, 1.0))


def _shifted(time: float, alpha: float) -> float:
    return float(shift(torch.tensor(time, dtype=torch.float64), alpha))
