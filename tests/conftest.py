"""What the tests share: analytic fields, a coder without a network to speak of, synthetic images, real data."""

from __future__ import annotations

import math
import os
import tempfile

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("RAC_CACHE_DIR", os.path.join(tempfile.gettempdir(), "rac-tests"))

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from hypothesis import settings
from tiny import smooth_images, untrained_rac
from torch import Tensor

from rac.coders.rac import RAC
from rac.fields import TinyFieldConfig
from rac.latents import LatentSpec

DATA = Path(os.environ.get("RAC_DATA_DIR") or Path(__file__).parents[2] / "shared")
if (DATA / "weights").is_dir():
    os.environ.setdefault("RAC_WEIGHTS_DIR", str(DATA / "weights"))

torch.set_num_threads(1)
# The same examples on every run: a law that fails, fails for everybody.
settings.register_profile("rac", deadline=None, max_examples=25, derandomize=True)
settings.load_profile("rac")


@dataclass(frozen=True)
class LogisticField:
    """v = cos(3t) s (1 - s): curved in the state and in time, solved in closed form for states in (0, 1)."""

    def __call__(self, state: Tensor, time: Tensor) -> Tensor:
        return torch.cos(3 * _column(time, state)) * state * (1 - state)

    def solution(self, state: Tensor, t0: float, t1: float) -> Tensor:
        growth = (math.sin(3 * t1) - math.sin(3 * t0)) / 3
        return 1 / (1 + (1 / state - 1) * math.exp(-growth))


@dataclass(frozen=True)
class CoupledField:
    """A smooth field in which every site feels its neighbours; its Lipschitz constant is below `slope`."""

    slope: float = 0.9

    def __call__(self, state: Tensor, time: Tensor) -> Tensor:
        neighbours = (state + state.roll(1, -1) + state.roll(1, -2)) / 3
        return self.slope * torch.sin(neighbours + _column(time, state))


@dataclass(frozen=True)
class SteepField:
    """The toy field of REFERENCE.md, sin(3 s) + t, on which reversed Euler misses by 0.64 at 4 steps."""

    def __call__(self, state: Tensor, time: Tensor) -> Tensor:
        return torch.sin(3 * state) + _column(time, state)


@dataclass(frozen=True)
class MeanGrowthField:
    """The exact mean velocity of s' = (a + b t) s over the signed interval from t to t + h, and its velocity."""

    a: float = 0.7
    b: float = -1.3

    def __call__(self, state: Tensor, time: Tensor, interval: Tensor) -> Tensor:
        t, h = _column(time, state), _column(interval, state)
        rate = self.a + self.b * (t + h / 2)
        # expm1(h rate) / h, which is `rate` where h = 0.
        quotient = torch.where(h == 0, rate, torch.expm1(h * rate) / torch.where(h == 0, 1, h))
        return quotient * state

    def velocity(self, state: Tensor, time: Tensor) -> Tensor:
        return (self.a + self.b * _column(time, state)) * state

    def solution(self, state: Tensor, t0: float, t1: float) -> Tensor:
        exponent = self.a * (t1 - t0) + self.b * (t1**2 - t0**2) / 2
        return state * math.exp(exponent)


def _column(time: Tensor, like: Tensor) -> Tensor:
    return time.view(-1, *[1] * (like.ndim - 1))


@pytest.fixture(scope="session")
def logistic_field() -> LogisticField:
    return LogisticField()


@pytest.fixture(scope="session")
def coupled_field() -> CoupledField:
    return CoupledField()


@pytest.fixture(scope="session")
def steep_field() -> SteepField:
    return SteepField()


@pytest.fixture(scope="session")
def mean_growth_field() -> MeanGrowthField:
    return MeanGrowthField()


@pytest.fixture(scope="session")
def images() -> Callable[..., Tensor]:
    """`images(batch, height, width, rng_seed=0)`: synthetic images B 3 H W in [-1, 1]."""
    return smooth_images


@pytest.fixture(scope="session")
def make_rac() -> Callable[..., RAC]:
    """`make_rac(lively=0.0, dtype=float32, statistics=None, **RACConfig fields)`: a tiny coder with random weights."""
    return untrained_rac


@pytest.fixture(scope="session")
def one_layer_coder() -> RAC:
    """A coder that loses nothing: c = 3 f^2 latents fill every site of a three-channel state, the field is zero."""
    field = TinyFieldConfig(widths=(4, 4), blocks=(0, 0))
    return untrained_rac(spec=LatentSpec(2, 12), field=field, state_channels=3, spread="shuffle").eval()


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """Where the real images and weights lie: RAC_DATA_DIR, or `shared` beside the repository."""
    if not DATA.is_dir():
        pytest.skip(f"no real data: {DATA} does not exist (set RAC_DATA_DIR)")
    return DATA
