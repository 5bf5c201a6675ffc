"""Normalisation of latents while their coder is trained: a batch norm whose statistics become those of the coder."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..latents import Statistics
from .processes import answered

EPSILON = 1e-4
"""Number added to variances."""

MOMENTUM = 0.1
"""Share of the newest batch in the running statistics."""


class LatentNorm(nn.Module):
    """Batch norm of raw latents, channel by channel, without a scale and a shift that are learned.

    REPA-E, arXiv 2504.10483, section 4. The modes of the module do not matter: `forward` always uses the running
    statistics and leaves them alone, `observe` renews them.

    - `statistics`: the statistics to begin with, of shape () or (c).
    - `channels`: the number of channels, c.
    - `by_batch`: let `observe` normalise by the statistics of the batch in hand, over all processes, as in the paper.
      Otherwise it normalises by the running ones of before the iteration, so that training does not depend on how a
      batch is cut into pieces.
    """

    mean: Tensor
    variance: Tensor

    def __init__(self, statistics: Statistics, channels: int, by_batch: bool = True) -> None:
        super().__init__()
        self.by_batch = by_batch
        self.register_buffer("mean", statistics.shift.expand(channels).clone())
        self.register_buffer("variance", statistics.scale.expand(channels) ** -2 - EPSILON)

    @property
    def std(self) -> Tensor:
        """The numbers, c, by which raw latents are divided."""
        return (self.variance + EPSILON).sqrt()

    def forward(self, raw_latent: Tensor) -> Tensor:
        """Returns raw latents B c h w, normalised by the running statistics. Gradients flow to them."""
        return _normalised(raw_latent, self.mean, self.variance)

    @torch.no_grad()
    def observe(self, raw_latent: Tensor) -> Tensor:
        """Returns raw latents B c h w, normalised, and renews the running statistics by them. No gradient flows."""
        count, mean, variance = self._moments(raw_latent.float())
        if self.by_batch:
            latents = _normalised(raw_latent, mean, variance)
            found = variance * count / (count - 1)
        else:
            latents = self(raw_latent)
            # About the running mean, so that pieces of a batch have the variance of the whole as their mean.
            found = variance + (mean - self.mean).square()
        self.mean.lerp_(mean, MOMENTUM)
        self.variance.lerp_(found, MOMENTUM)
        return latents

    def _moments(self, raw_latent: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Returns count, mean and variance of each channel; if they are to normalise, over all processes."""
        distance = raw_latent - self.mean.view(-1, 1, 1)
        sums, squares = distance.sum(dim=(0, 2, 3)), distance.square().sum(dim=(0, 2, 3))
        count = sums.new_full((1,), distance.numel() / len(sums))
        if self.by_batch and torch.distributed.is_available() and torch.distributed.is_initialized():
            found = torch.cat([sums, squares, count])
            with answered():
                torch.distributed.all_reduce(found)
            sums, squares, count = found.split([len(sums), len(sums), 1])
        shift = sums / count
        return count, self.mean + shift, squares / count - shift.square()


def _normalised(raw_latent: Tensor, mean: Tensor, variance: Tensor) -> Tensor:
    return (raw_latent - mean.view(-1, 1, 1)) / (variance + EPSILON).sqrt().view(-1, 1, 1)
