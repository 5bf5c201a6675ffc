"""RAC in the plane: points in place of images, the cells of a lattice in place of latents.

An image is a point of two moons, its latent the cell that the point lies in, and the seed state that cell's centre with
a little noise about it (`RACConfig.seed_noise`). One velocity field is trained by matching velocities on the straight
line from seed state to point: forwards it decodes, backwards it encodes. Everything is the library's own but the
network, a small perceptron.
"""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..errors import ConvergenceWarning, RacError
from ..flow import Euler, FixedPoint, ReversibleHeun, TimeGrid, integrate, straight
from ..runtime import generator

STEPS = (1, 2, 4, 8)
"""Numbers of steps that are compared."""


@dataclass(frozen=True)
class ToyConfig:
    """Settings of the training; the defaults take about 10 seconds on one core."""

    cell: float = 0.5
    """Side of a lattice cell: the larger it is, the coarser are the latents. The moons are about 3 wide and 1.7
    high."""
    seed_noise: float = 0.15
    """Standard deviation of the noise in seed states, in cells. 0: every cell decodes to one point."""
    iterations: int = 2_000
    batch: int = 512
    width: int = 96
    lr: float = 2e-3

    def __post_init__(self) -> None:
        for name in ("iterations", "batch", "width", "lr"):
            if not 0 < getattr(self, name) < math.inf:
                raise RacError(f"{name} must be above 0, not {getattr(self, name)}")
        # Finer cells take minutes to draw; in larger ones there is but one latent.
        if not 0.02 <= self.cell <= 10:
            raise RacError(f"cell {self.cell} must lie in 0.02 to 10; the moons are about 3 wide")
        if not 0 <= self.seed_noise <= 0.25:
            raise RacError(
                f"seed_noise {self.seed_noise} must lie in 0 to 0.25 cells, so that seed states stay in their cell"
            )


def moons(count: int, rng: torch.Generator) -> Tensor:
    """Draws points of two interleaved half circles with a little noise, count 2, about the origin."""
    angle = math.pi * torch.rand(count, generator=rng)
    upper = torch.rand(count, generator=rng) < 0.5
    x = torch.where(upper, angle.cos(), 1 - angle.cos()) - 0.5
    y = torch.where(upper, angle.sin(), 0.5 - angle.sin()) - 0.25
    return torch.stack([x, y], dim=1) + 0.07 * torch.randn(count, 2, generator=rng)


def to_latent(point: Tensor, cell: float) -> Tensor:
    """Returns the latents B 2 of points B 2: the whole numbers of their cells.

    This is the teacher's encoder, and the contraction of seed states.
    """
    return (point / cell).round()


def seed_state(latent: Tensor, config: ToyConfig, rng: torch.Generator) -> Tensor:
    """Returns the seed state B 2 of latents B 2: the cell's centre and noise, which `to_latent` removes again."""
    noise = torch.randn(latent.shape, generator=rng).clamp(-1.9, 1.9)  # at 0.25 cells it stays inside
    return config.cell * (latent + config.seed_noise * noise)


class ToyField(nn.Module):
    """A perceptron (state B 2, time B) -> velocity B 2, zero at first: the flow begins as the identity."""

    def __init__(self, cell: float, width: int) -> None:
        super().__init__()
        self.cell = cell
        last = nn.Linear(width, 2)
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)
        self.layers = nn.Sequential(
            nn.Linear(7, width), nn.SiLU(),
            nn.Linear(width, width), nn.SiLU(),
            nn.Linear(width, width), nn.SiLU(),
            last,
        )  # fmt: skip

    def forward(self, state: Tensor, time: Tensor) -> Tensor:
        """Returns the velocity B 2 at `state` B 2 and `time` B."""
        place = state / self.cell
        # One wave to a cell, and no faster one: a field that is steep between cells cannot be walked back.
        wave = 2 * math.pi * place
        return self.cell * self.layers(torch.cat([place, time[:, None], wave.sin(), wave.cos()], dim=1))


def train(
    config: ToyConfig, rng_seed: int = 0, progress: Callable[[int, int], None] = lambda done, total: None
) -> tuple[ToyField, float]:
    """Trains a field on the moons, and returns it, its weights averaged over the last iterations, with the final loss.

    Equal seeds give equal fields. `progress` is called with (iterations done, of all). Velocity matching, as the recipe
    `rac`.
    """
    torch.manual_seed(rng_seed % 2**64)  # torch takes no larger ones
    field = ToyField(config.cell, config.width)
    average = copy.deepcopy(field)
    optimiser = torch.optim.AdamW(field.parameters(), lr=config.lr, betas=(0.9, 0.99))
    rng = generator(rng_seed, "toy", "train")
    loss = math.nan
    for k in range(config.iterations):
        for group in optimiser.param_groups:
            group["lr"] = config.lr * 0.5 * (1 + math.cos(math.pi * k / config.iterations))
        point = moons(config.batch, rng)
        seed = seed_state(to_latent(point, config.cell), config, rng)
        time = torch.rand(config.batch, generator=rng)
        sample = straight(seed, point, time)
        error = (field(sample.state, time) - sample.velocity).square().mean()
        optimiser.zero_grad()
        error.backward()
        optimiser.step()
        keep = min(0.99, k / (k + 10))
        with torch.no_grad():
            for mean, new in zip(average.parameters(), field.parameters(), strict=True):
                mean.lerp_(new, 1 - keep)
        loss = keep * loss + (1 - keep) * float(error.detach()) if k else float(error.detach())
        progress(k + 1, config.iterations)
    return average.eval().requires_grad_(False), loss


@dataclass(frozen=True)
class ToyMetrics:
    """Metrics of a field at one number of steps; distances are in the plane, root mean squares over the points."""

    steps: int
    latents_found: float
    """Share of the points that are encoded to their own cell."""
    image_error: float
    """Distance from a point to the decoding of its encoded cell, without noise."""
    state_error: float
    """Distance from a point to itself, encoded and decoded without going through the latent."""
    euler: float
    """Distance from a seed state to itself, decoded by Euler and walked back by reversed Euler."""
    fixed_point: float
    """Distance from a seed state to itself, decoded by Euler and each step undone by fixed-point iteration."""
    undone: float
    """Share of the seed states that the fixed point finds again to 1e-5."""
    reversible: float
    """Distance from a seed state to itself, by the reversible solver, which retraces its own steps."""


@torch.no_grad()
def measure(
    field: ToyField, config: ToyConfig, point: Tensor, rng: torch.Generator, steps: Sequence[int] = STEPS
) -> list[ToyMetrics]:
    """Measures a field on points B 2 of the moons, in float64, so that rounding does not count.

    - `field`, `config`: the field, and the settings of its training.
    - `point`: the points.
    - `rng`: draws the noise.
    - `steps`: numbers of steps.
    """
    exact = copy.deepcopy(field).double()
    point = point.double()
    latent = to_latent(point, config.cell)
    seed = seed_state(latent, config, rng)
    undo = FixedPoint(Euler(), tolerance=1e-9, iterations=100)
    found = []
    for number in steps:
        grid = TimeGrid.uniform(number)
        back = grid.reversed()
        encoded = integrate(exact, point, back).end
        own = to_latent(encoded, config.cell)
        there = integrate(exact, seed, grid).end
        heun = integrate(exact, seed, grid, ReversibleHeun())
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)  # `undone` says it
            undone = integrate(exact, there, back, undo).end
        metrics = ToyMetrics(
            number,
            latents_found=float((own == latent).all(1).double().mean()),
            image_error=_rms(integrate(exact, config.cell * own, grid).end - point),
            state_error=_rms(integrate(exact, encoded, grid).end - point),
            euler=_rms(integrate(exact, there, back).end - seed),
            fixed_point=_rms(undone - seed),
            undone=float(((undone - seed).abs().amax(1) < 1e-5).double().mean()),
            reversible=_rms(integrate(exact, heun.end, back, ReversibleHeun(), carry=heun.carry).end - seed),
        )
        found.append(metrics)
    return found


def _rms(difference: Tensor) -> float:
    return float(difference.square().sum(1).mean().sqrt())
