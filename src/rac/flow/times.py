"""Training-time distributions over [0, 1], and the time shift. t = 0 is the source, t = 1 the target."""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import RacError


def uniform(count: int, generator: torch.Generator) -> Tensor:
    """`count` independent times, uniform on [0, 1)."""
    return torch.rand(count, generator=generator, device=generator.device)


def shift(time: Tensor, alpha: float) -> Tensor:
    """Move times towards the source for alpha > 1, keeping 0 and 1.

    Written for time as noise level u = 1 - t, as in SD3 (arXiv 2403.03206, equation 23):
    u' = alpha u / (1 + (alpha - 1) u).
    """
    if not alpha > 0:
        raise RacError(f"time shift alpha {alpha} must be positive; 1 leaves times as they are")
    u = 1 - time
    return 1 - alpha * u / (1 + (alpha - 1) * u)
