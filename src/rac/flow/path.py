"""The straight path from a source to a target: point and velocity."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class PathSample(NamedTuple):
    """A point of a path and the velocity there."""

    state: Tensor
    """The point (1 - t) source + t target, B C H W."""
    velocity: Tensor
    """The velocity target - source, B C H W, the same at every t."""


def straight(source: Tensor, target: Tensor, time: Tensor) -> PathSample:
    """Returns the point and velocity of the straight path at `time`: source at t = 0, target at t = 1.

    `time` is a scalar, or one number per image, B. Rectified Flow (arXiv 2209.03003), equation 1.
    """
    t = time if time.ndim == 0 else time.view(-1, *[1] * (source.ndim - 1))
    return PathSample((1 - t) * source + t * target, target - source)
