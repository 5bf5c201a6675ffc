"""From seeds and labels to images: the one loop that the command, galleries and metrics use."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from .. import runtime
from ..coders.protocol import Coder
from ..flow import Walk
from .protocol import LatentGenerator
from .sampling import Sampling, in_batches, sample_seeds


class Wanted(NamedTuple):
    """A sample to make."""

    number: int
    """Number of the sample, which chooses its seed."""
    label: int | None = None
    """Label of its class; None: none."""


class Samples(NamedTuple):
    """A batch of samples."""

    wanted: Sequence[Wanted]
    """Numbers and labels of the samples."""
    latents: Tensor
    """Their latents, B c h w."""
    images: tuple[Tensor, ...]
    """Their images, B 3 H W, about [-1, 1], not clamped: one tensor for each way of decoding that was asked for."""
    evaluations: int
    """Evaluations of the generator's networks that each latent took."""


@dataclass(frozen=True)
class Source:
    """A generator, the coder of its latents, and how both are used.

    Images are a function of this and of their number and label, and do not depend on their batch.
    """

    generator: LatentGenerator
    coder: Coder
    sampling: Sampling = field(default_factory=Sampling)
    rng_seed: int = 0
    """Chooses, with the number of a sample, its noise, and that of coders that decode from noise."""
    weaker: LatentGenerator | None = None
    """A weaker generator to be guided away from; None: the same one without label."""
    size: tuple[int, int] | None = None
    """Height and width of the latents; None: those that were trained on."""
    bf16: bool = False
    """Compute matrix products of the generator in bfloat16."""

    @torch.no_grad()
    def samples(
        self, wanted: Sequence[Wanted], batch: int = 8, walks: Sequence[Walk | None] = (None,)
    ) -> Iterator[Samples]:
        """Yields the samples, `batch` at a time, in their order.

        - `wanted`: numbers and labels; labels are given to all of them or to none.
        - `batch`: samples that are made together.
        - `walks`: the ways to decode each latent, as `Coder.walk` gives them; None: the coder's own.
        """
        for piece in in_batches(wanted, batch):
            labels = [one.label for one in piece if one.label is not None]
            seeds = sample_seeds(self.rng_seed, [one.number for one in piece])
            with runtime.autocast(self.generator.device, self.bf16):
                made = self.generator.sample(seeds, labels or None, self.sampling, weaker=self.weaker, size=self.size)
            noise = self.coder.noise_of(made.latent, [one.number for one in piece], self.rng_seed)
            images = tuple(self.coder.decoded(made.latent, walk, noise).image for walk in walks)
            yield Samples(piece, made.latent, images, made.evaluations)
