"""What coders with a Gaussian posterior share: its distribution, and the statistics of its means."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from ..errors import RacError


def gaussian(moments: Tensor) -> Any:
    """Returns diffusers' DiagonalGaussianDistribution of raw moments B 2c h w, mean and log-variance.

    It has `.mean`, `.std`, `.sample(generator)` and `.kl()`, the divergence from N(0, 1) summed per image.
    """
    from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution

    return DiagonalGaussianDistribution(moments)


@torch.no_grad()
def scale_and_shift(raw_latents: Iterable[Tensor]) -> tuple[float, float]:
    """Returns the scale and shift by which raw latents (batches B c h w) get mean 0 and variance 1 over all of them.

    Raises `RacError` if there are none, or if they are all one value.
    """
    count, total, squares = 0, 0.0, 0.0
    for raw_latent in raw_latents:
        exact = raw_latent.cpu().double()
        count += exact.numel()
        total += float(exact.sum())
        squares += float(exact.square().sum())
    if count == 0:
        raise RacError("no images to fit the latents' statistics on; give at least one batch")
    mean = total / count
    variance = squares / count - mean**2
    if not variance > 0:
        raise RacError(f"the latents' variance is {variance}; train the coder before fitting its statistics")
    return variance**-0.5, mean
