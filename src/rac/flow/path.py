"""The straight line from a source to a target: point and velocity."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class PathSample(NamedTuple):
    """A point of the path and the velocity there."""

    state: Tensor
    """B C H W, the point (1 - t) source + t target."""
    velocity: Tensor
    """B C H W, target - source, the same at every t."""


def straight(source: Tensor, target: Tensor, time: Tensor) -> PathSample:
    """The straight path at `time` (a scalar, or one per image: B), source at t = 0 and target at t = 1.

    Rectified Flow (arXiv 2209.03003), equation 1.
    """
    t = time if time.ndim == 0 else time.view(-1, *[1] * (source.ndim - 1))
    return PathSample((1 - t) * source + t * target, target - source)
