"""Settings of sampling, and random numbers that belong to a sample and not to its batch."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, TypeVar

import torch
from torch import Tensor

from ..errors import RacError
from ..flow import EulerMaruyama, TimeGrid, Walk, sde_grid
from ..flow.grid import check_steps
from ..flow.solvers import SOLVERS
from ..flow.stochastic import Diffusion
from ..runtime import derived_seed

T = TypeVar("T")

Method = Literal["euler", "heun", "midpoint", "rk4", "sde"]
"""Name of the rule of each step: a solver of the flow, or the SDE."""


@dataclass(frozen=True)
class Sampling:
    """Settings of sampling by a flow from noise to latents.

    Raises `RacError` for values out of their range, naming the field.
    """

    steps: int = 25
    """Number of steps: evaluations of Euler's rule and of the SDE, half of Heun's; guided ones cost twice as much."""
    method: Method = "euler"
    """Rule of each step: euler, heun, midpoint or rk4 along the flow, or the SDE with noise in each step."""
    guidance: float = 1.0
    """Scale of guidance, 1: none. The velocity is weaker + scale (velocity - weaker), where the weaker one is that
    without label, or another generator's (autoguidance).
    """
    interval: tuple[float, float] = (0.0, 1.0)
    """First and last time at which guidance acts; 0 is noise, 1 data."""
    channels: int | None = None
    """Guide only the first so many channels, as DiT and SiT's tables do with 3. None: all."""
    shift: float = 1.0
    """Above 1 puts more steps near the noise (`TimeGrid.shifted`); best the one that was trained with."""
    diffusion: Diffusion = "sigma"
    """Noise of the SDE: one of those of `rac.flow.stochastic.diffusion_at`."""
    last_step: float = 0.04
    """Length of the SDE's last step, without noise, in shifted time."""
    last: Literal["mean", "tweedie"] = "mean"
    """The SDE's last step: along the drift, or to the expected data."""

    def __post_init__(self) -> None:
        check_steps(self.steps)
        if not math.isfinite(self.guidance):
            raise RacError(f"guidance {self.guidance} must be a finite number; 1 is no guidance, 1.5 to 4 are usual")
        first, last = self.interval
        if not 0 <= first <= last <= 1:
            raise RacError(f"the interval {first} {last} of guidance must lie in [0, 1], the first number below")
        if self.channels is not None and self.channels < 1:
            raise RacError(f"channels {self.channels} to guide must be at least 1; leave it out to guide all")
        if not 0 < self.shift < math.inf:
            raise RacError(f"shift {self.shift} must be above 0, and finite; 1 leaves times as they are")
        if self.method == "sde":
            sde_grid(self.steps, self.diffusion, self.shift, self.last_step)

    @property
    def guides(self) -> bool:
        """Whether there is any guidance."""
        return self.guidance != 1

    def in_words(self) -> str:
        """Returns method, steps, guidance and shift as words, such as "25 euler steps, guidance 2"."""
        words = [f"{self.steps} {self.method} step{'' if self.steps == 1 else 's'}"]
        if self.guides:
            within = "" if self.interval == (0.0, 1.0) else f" from {self.interval[0]:g} to {self.interval[1]:g}"
            words.append(f"guidance {self.guidance:g}{within}")
        if self.shift != 1:
            words.append(f"shift {self.shift:g}")
        return ", ".join(words)

    def walk(self, noise: SampleNoise) -> Walk:
        """Returns the time grid and the solver; the SDE's random numbers come from `noise`."""
        if self.method == "sde":
            grid = sde_grid(self.steps, self.diffusion, self.shift, self.last_step)
            return Walk(grid, EulerMaruyama(noise, self.diffusion, self.last))
        grid = TimeGrid.uniform(self.steps) if self.shift == 1 else TimeGrid.shifted(self.steps, self.shift)
        return Walk(grid, SOLVERS[self.method])


class SampleNoise:
    """Standard normal numbers for samples, each from a generator of its own, which its seed starts.

    They are drawn on the CPU, so that a sample has the same ones on every device and in every batch. In place of a seed
    a `torch.Generator` may be given, which draws on its own device.
    """

    def __init__(self, rng_seeds: Sequence[int | torch.Generator]) -> None:
        self._generators = [
            one if isinstance(one, torch.Generator) else torch.Generator().manual_seed(one) for one in rng_seeds
        ]

    def draw(self, shape: Sequence[int]) -> Tensor:
        """Returns numbers B x `shape`, float32, on the CPU."""
        drawn = [torch.randn(tuple(shape), generator=one, device=one.device) for one in self._generators]
        return torch.stack([one.cpu() for one in drawn])

    def __call__(self, like: Tensor) -> Tensor:
        """Returns numbers of the shape, type and device of `like`, one row for each sample."""
        return self.draw(like.shape[1:]).to(like)


def sample_seeds(rng_seed: int, numbers: Sequence[int]) -> list[int]:
    """Returns the seeds of the samples of these numbers, which depend on `rng_seed` and the number alone."""
    return [derived_seed(rng_seed, "sample", number) for number in numbers]


def in_batches(things: Sequence[T], batch: int) -> Iterator[Sequence[T]]:
    """Yields `things` in pieces of `batch`, the last of which may be shorter."""
    for first in range(0, len(things), batch):
        yield things[first : first + batch]
