"""Random numbers that do not depend on how a batch is cut.

A batch may be processed in parts (accumulation, ranks). Each part draws for the whole batch and keeps its own rows, so
image i meets the same numbers however the batch is cut, and equal seeds give equal training. Where a whole batch of
numbers would take too much memory, every image has a generator of its own instead, and a part draws its own rows alone.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

LARGE = 2**26
"""Count of numbers for a whole batch, 256 MB, from which on every image has a generator of its own."""


@dataclass(frozen=True)
class Draws:
    """Random draws for images `first` to `first + count` of a batch of `total`.

    Every part of a batch must start from generators in the same state, and make the same draws in the same order.
    """

    shared: torch.Generator
    """Generator of numbers that the whole batch shares, such as a time grid; on the CPU."""
    own: torch.Generator
    """Generator of numbers that each image has of its own; on the device where they are needed."""
    total: int
    first: int
    count: int

    @classmethod
    def whole(cls, generator: torch.Generator, count: int) -> Draws:
        """Returns draws for a batch that is not cut, all from one generator on the CPU."""
        return cls(generator, generator, count, 0, count)

    def normal(self, like: Tensor, rng_seed: int | None = None) -> Tensor:
        """Draws standard normal numbers of the shape, type and device of `like`, whose first dimension is `count`.

        With an `rng_seed` (from `rng_seed()`) the same numbers come again as often as they are asked for. Batches of
        `LARGE` numbers and more, over all parts, are drawn image by image, each from a generator of its own.
        """
        device, shape = self.own.device, like.shape[1:]
        generator = self.own if rng_seed is None else torch.Generator(device).manual_seed(rng_seed)
        if self.total * shape.numel() < LARGE:
            return self._rows(torch.randn(self.total, *shape, generator=generator, device=device)).to(like)
        seeds = torch.randint(2**62, (self.total,), generator=generator, device=device)
        # Row by row into its place: a second copy of the part is what there may be no room for.
        numbers = torch.empty(self.count, *shape, dtype=like.dtype, device=like.device)
        for row, seed in zip(numbers, self._rows(seeds).tolist(), strict=True):
            row.copy_(torch.randn(shape, generator=torch.Generator(device).manual_seed(seed), device=device))
        return numbers

    def uniform(self, like: Tensor) -> Tensor:
        """Draws one number in [0, 1) per image: `count`, with the type and device of `like`."""
        numbers = torch.rand(self.total, generator=self.own, device=self.own.device)
        return self._rows(numbers).to(like)

    def integer(self, low: int, high: int) -> int:
        """Draws one whole number from low to high, both included, for the whole batch."""
        return int(torch.randint(low, high + 1, (), generator=self.shared))

    def rng_seed(self) -> int:
        """Draws a seed for `normal`, for the whole batch."""
        return self.integer(0, 2**62)

    def _rows(self, numbers: Tensor) -> Tensor:
        return numbers[self.first : self.first + self.count]
