"""Random numbers that do not depend on how a batch is cut.

A batch may be worked off in parts (accumulation, ranks). Each part draws for the whole batch and keeps its own rows, so
image i meets the same numbers however the batch is cut, and equal seeds give equal training.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Draws:
    """Draws for images `first` to `first + count` of a batch of `total`, from one generator.

    Every part of a batch must start from a generator in the same state, and make the same draws in the same order.
    """

    generator: torch.Generator
    total: int
    first: int
    count: int

    @classmethod
    def whole(cls, generator: torch.Generator, count: int) -> Draws:
        """Draws for a batch that is not cut."""
        return cls(generator, count, 0, count)

    def normal(self, like: Tensor) -> Tensor:
        """Standard normal numbers of the shape, type and device of `like`, whose first dimension is `count`."""
        numbers = torch.randn(self.total, *like.shape[1:], generator=self.generator, device=self.generator.device)
        return self._own(numbers).to(like)

    def uniform(self, like: Tensor) -> Tensor:
        """One number in [0, 1) per image: `count`, with the type and device of `like`."""
        numbers = torch.rand(self.total, generator=self.generator, device=self.generator.device)
        return self._own(numbers).to(like)

    def integer(self, low: int, high: int) -> int:
        """One whole number from low to high, both included, for the whole batch."""
        drawn = torch.randint(low, high + 1, (), generator=self.generator, device=self.generator.device)
        return int(drawn)

    def _own(self, numbers: Tensor) -> Tensor:
        return numbers[self.first : self.first + self.count]
