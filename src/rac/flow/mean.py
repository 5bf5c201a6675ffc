"""The identity of mean velocities, and the two ways to take its derivative.

u(s, t, h) is the average of the velocity over the signed interval from t to t + h on the path through s. Its product
with h is the integral of v from t to r = t + h; differentiating that along the path, r held fixed, gives

    u = v + h du/dt,      du/dt = v . grad_s u + d_t u - d_h u

(MeanFlow, arXiv 2505.13447, equation 6, in this library's direction of time). The interval is signed: decoding uses
h > 0, encoding h < 0, and no point has two different targets.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from .path import straight
from .solvers import Field

Derivative = Literal["jvp", "central"]


def total_derivative(
    field: Field,
    source: Tensor,
    target: Tensor,
    time: Tensor,
    end: Tensor,
    how: Derivative = "jvp",
    step: float = 0.005,
) -> Tensor:
    """Returns du/dt of `field(state, time, interval)` along the straight path, the interval's far end fixed; detached.

    - `field`: the mean-velocity field.
    - `source`, `target`: the ends of the path, B C H W.
    - `time`, `end`: the two ends of the interval, B.
    - `how`: "jvp" is exact (forward mode); "central" takes two plain evaluations and needs no forward-mode support.
    - `step`: half width in time of "central" (MF-RAE uses 0.005).
    """

    def along(t: Tensor) -> Tensor:
        return field(straight(source, target, t).state, t, end - t)

    with torch.no_grad():
        if how == "jvp":
            return torch.func.jvp(along, (time,), (torch.ones_like(time),))[1]
        ahead, behind = along(time + step), along(time - step)
        return (ahead - behind) / (2 * step)


def mean_velocity_target(
    field: Field, source: Tensor, target: Tensor, time: Tensor, end: Tensor, how: Derivative = "jvp"
) -> Tensor:
    """Returns the target of u(s_t, t, end - t): v + (end - t) du/dt on the straight path, detached.

    - `field`: the mean-velocity field.
    - `source`, `target`: the ends of the path, B C H W.
    - `time`, `end`: the two ends of the interval, B.
    - `how`: how the derivative is taken, as for `total_derivative`.
    """
    interval = (end - time).view(-1, *[1] * (source.ndim - 1))
    return (target - source).detach() + interval * total_derivative(field, source, target, time, end, how)
