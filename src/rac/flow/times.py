"""Times for training, made from uniform numbers; and the time shift. t = 0 is the source, t = 1 the target."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from ..errors import RacError

TimeDistribution = Literal["uniform", "logit_normal", "arcsine", "ends"]


def times_of(numbers: Tensor, distribution: TimeDistribution, mean: float = 0.4, std: float = 1.0) -> Tensor:
    """Maps uniform numbers in [0, 1) to times of the named distribution, by its quantile function.

    - `uniform`: the numbers themselves.
    - `logit_normal`: sigmoid of N(`mean`, `std`^2), most in the middle (MeanFlow, arXiv 2505.13447, table 1d:
      N(-0.4, 1), there with t = 1 as the noise).
    - `arcsine`: sin^2(pi u / 2), most at the two ends, where flows of few steps are evaluated.
    - `ends`: 0 for half of them and 1 for a quarter, the others uniform. For the spread `beside`: there the state
      between the ends determines the velocity, and only the ends have something to learn.
    """
    if distribution == "logit_normal":
        return torch.sigmoid(torch.special.ndtri(numbers) * std + mean)
    if distribution == "arcsine":
        return torch.sin(numbers * torch.pi / 2).square()
    if distribution == "ends":
        return ((numbers - 0.5) * 4).clamp(0, 1)
    return numbers


def shift(time: Tensor, alpha: float) -> Tensor:
    """Moves times towards the source for alpha > 1, keeping 0 and 1.

    Written for time as noise level u = 1 - t, as in SD3 (arXiv 2403.03206, equation 23):
    u' = alpha u / (1 + (alpha - 1) u). `time` is of any shape, in [0, 1]. Raises `RacError` unless alpha > 0.
    """
    if not alpha > 0:
        raise RacError(f"time shift alpha {alpha} must be positive; 1 leaves times as they are")
    # The same for t = 1 - u, in the form that keeps both ends exactly.
    return time / (time + alpha * (1 - time))


REFERENCE_NUMBERS = 4096
"""Count of numbers in a latent that needs no shift: 4 x 32 x 32, the SD-VAE's at 256 pixels."""


def dimension_shift(channels: int, height: int, width: int) -> float:
    """Returns the shift of times that a latent of c x h x w asks for: sqrt(c h w / 4096), at least 1.

    At equal time, noise hides less of a latent that has more numbers, as they tell of each other (RAE, arXiv
    2510.11690, after SD3, arXiv 2403.03206).
    """
    return max(1.0, math.sqrt(channels * height * width / REFERENCE_NUMBERS))
