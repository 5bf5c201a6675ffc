"""Time grids. A grid of K + 1 nodes is K steps; a falling grid integrates backwards."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from operator import index

import torch

from ..errors import RacError
from . import times

MOST_STEPS = 100_000
"""Steps that a grid may have: many more than any solver needs, and few enough to be held."""


@dataclass(frozen=True)
class TimeGrid:
    """Strictly rising or strictly falling time nodes in [0, 1], as plain numbers.

    Raises `RacError` for fewer than two nodes, nodes outside [0, 1], and nodes that do not rise or fall strictly.
    """

    nodes: tuple[float, ...]
    """Times from the first to the last of an integration: rising nodes decode, falling ones encode."""

    def __post_init__(self) -> None:
        if len(self.nodes) < 2:
            raise RacError(f"a time grid needs at least 2 nodes, not {len(self.nodes)}")
        if not all(0 <= node <= 1 for node in self.nodes):
            raise RacError(f"time nodes must lie in [0, 1], not {self.nodes}")
        gaps = [b - a for a, b in zip(self.nodes[:-1], self.nodes[1:], strict=True)]
        if not (all(gap > 0 for gap in gaps) or all(gap < 0 for gap in gaps)):
            raise RacError(f"time nodes must rise or fall strictly, not {self.nodes}")

    @classmethod
    def of(cls, nodes: Sequence[float] | torch.Tensor) -> TimeGrid:
        """Returns a grid of the given nodes: numbers, or a tensor of K + 1.

        Raises `RacError` for fewer than two nodes, nodes outside [0, 1], and nodes that do not rise or fall strictly.
        """
        return cls(tuple(float(node) for node in nodes))

    @classmethod
    def uniform(cls, steps: int) -> TimeGrid:
        """Returns a grid of `steps` equal steps from 0 to 1.

        Raises `RacError` unless it is a whole number of at least 1.
        """
        steps = check_steps(steps)
        return cls(tuple(k / steps for k in range(steps + 1)))

    @classmethod
    def shifted(cls, steps: int, alpha: float) -> TimeGrid:
        """Returns uniform nodes moved by `times.shift`: alpha > 1 puts more of them near the source.

        Raises as `uniform`.
        """
        return cls.of(times.shift(torch.tensor(cls.uniform(steps).nodes, dtype=torch.float64), alpha))

    @classmethod
    def random(cls, steps: int, generator: torch.Generator) -> TimeGrid:
        """Returns a grid of 0, `steps` - 1 sorted uniform draws, and 1 (RAC, section 3.2).

        `generator`, on the CPU, draws them.
        """
        steps = check_steps(steps)
        while True:
            inner = torch.rand(steps - 1, generator=generator, dtype=torch.float64).sort().values.tolist()
            nodes = (0.0, *inner, 1.0)
            if len(set(nodes)) == len(
                nodes
            ):  # two equal draws are all but impossible, yet would be a step of no length
                return cls(nodes)

    @property
    def steps(self) -> int:
        """Number of steps, which is the number of evaluations that Euler's rule takes."""
        return len(self.nodes) - 1

    def reversed(self) -> TimeGrid:
        """Returns the same nodes in the opposite direction."""
        return TimeGrid(self.nodes[::-1])


def steps_in_words(steps: int) -> str:
    """Returns a number of steps in words, such as "1 step" and "4 steps"."""
    return f"{steps} step{'' if steps == 1 else 's'}"


def check_steps(steps: int) -> int:
    """Returns `steps` as an int. Raises `RacError` unless it is a whole number from 1 to `MOST_STEPS`."""
    try:
        number = 0 if isinstance(steps, bool) else index(steps)  # takes numpy's integers, too
    except TypeError:
        number = 0
    if number < 1:
        raise RacError(f"steps {steps!r} must be a whole number of at least 1; 4 is a good start")
    if number > MOST_STEPS:
        raise RacError(f"steps {number:,} are more than {MOST_STEPS:,}; 4 is a good start")
    return number
