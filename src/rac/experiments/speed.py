"""Speed of coders on this machine, encoding, decoding and training, and how much of the machine they use.

Rates are medians over rounds. The share is of the best rate that a plain convolution reached in the same run and
precision, so that it says more about the coder than about the machine.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from statistics import median
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .. import runtime
from ..coders.protocol import Coder
from ..data import Batch, Stream
from ..draws import Draws
from ..evaluate.cost import MacCounter
from ..train.config import TrainConfig
from ..train.step import TrainState, train_step
from ..train.task import PartTerms, Task


@dataclass(frozen=True)
class Setting:
    """Conditions of a measurement: device, precision and length."""

    device: torch.device
    bf16: bool = False
    """bfloat16 autocast and channels-last layout; otherwise plain float32."""
    seconds: float = 2.0
    """Least time for each measurement."""
    rounds: int = 3
    """Least number of rounds, after one for warming up."""

    def now(self) -> float:
        """Returns the time, once the device has finished its work."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()


@dataclass(frozen=True)
class Speed:
    """Speed of one job of one coder."""

    images: int
    """Number of images in a round."""
    seconds: float
    """Median seconds of a round."""
    flops: int
    """Floating point operations of a round: two for each multiply-accumulate of convolutions and matrix products."""
    parts: Mapping[str, float] = field(default_factory=dict)
    """Median seconds of a round by the parts of the work."""

    @property
    def images_per_second(self) -> float:
        """Number of images per second."""
        return self.images / self.seconds

    @property
    def gflops(self) -> float:
        """Achieved GFLOP/s."""
        return self.flops / self.seconds / 1e9


def timed(work: Callable[[], object], setting: Setting) -> list[float]:
    """Returns the seconds of each round of `work`, the first one left out."""
    work()
    taken: list[float] = []
    start = setting.now()
    while len(taken) < setting.rounds or setting.now() - start < setting.seconds:
        before = setting.now()
        work()
        taken.append(setting.now() - before)
    return taken


@torch.no_grad()
def best_convolution(setting: Setting) -> float:
    """Returns the GFLOP/s of the fastest of a few plain 3 x 3 convolutions, of the widths and sizes coders have."""
    best, share = 0.0, replace(setting, seconds=setting.seconds / 4)
    dtype, layout = torch.bfloat16 if setting.bf16 else torch.float32, runtime.memory_format(setting.bf16)
    for channels, side in ((64, 64), (128, 64), (256, 32), (512, 16)):
        x, weight = torch.ones(4, channels, side, side), torch.ones(channels, channels, 3, 3)
        x, weight = (each.to(setting.device, dtype, memory_format=layout) for each in (x, weight))
        flops = 2 * 9 * x.numel() * channels
        seconds = min(timed(partial(F.conv2d, x, weight, padding=1), share))
        best = max(best, flops / seconds / 1e9)
    return best


@torch.no_grad()
def coding_speeds(coder: Coder, images: Tensor, setting: Setting, steps: int | None = None) -> dict[str, Speed]:
    """Measures "encode" and "decode" of a coder.

    - `coder`: the coder.
    - `images`: a batch, B 3 H W in [-1, 1].
    - `setting`: conditions of the measurement.
    - `steps`: number of steps of the ways that are walked; None: the coder's own.
    """
    runtime.place(coder, setting.device, setting.bf16)
    images = images.to(setting.device, memory_format=runtime.memory_format(setting.bf16))
    back, there = coder.walk("encode", steps), coder.walk("decode", steps)
    latents = coder.encode(images, walk=back)
    jobs: dict[str, Callable[[], Tensor]] = {
        "encode": lambda: coder.encode(images, walk=back),
        "decode": lambda: coder.decode(latents, walk=there),
    }
    found = {}
    for name, job in jobs.items():
        with runtime.autocast(setting.device, setting.bf16):
            with MacCounter() as counter:
                job()
            found[name] = Speed(len(images), median(timed(job, setting)), 2 * counter.macs)
    return found


@torch.no_grad()
def generating_speed(work: Callable[[], object], images: int, setting: Setting) -> Speed:
    """Measures `work`, which generates the latents of `images` images."""
    with runtime.autocast(setting.device, setting.bf16):
        with MacCounter() as counter:
            work()
        return Speed(images, median(timed(work, setting)), 2 * counter.macs)


def training_speed(task: Task, stream: Stream, settings: TrainConfig, setting: Setting) -> Speed:
    """Measures one iteration of `task` at a time, on batches of `stream`, and the parts of its time.

    The parts are "data"; "teacher", what frozen networks make of each batch beforehand; "field", forward (for coders
    without one "forward" alone); "terms", the rest of the loss; "backward", with recomputation and clipping;
    "optimiser", with the averages.

    - `task`, `stream`: the task, and its images.
    - `settings`: settings of the training.
    - `setting`: conditions of the measurement.
    """
    settings = replace(settings, bf16=setting.bf16, channels_last=setting.bf16)
    state = TrainState.start(task, settings, setting.device)
    clock = _Clock(task, state, setting)
    rounds: list[dict[str, float]] = []

    def step() -> None:
        with clock.part("data"):
            batch = stream.batch(state.iteration * settings.batch, settings.batch)
            batch = batch.to(setting.device, runtime.memory_format(setting.bf16))
        train_step(clock, state, batch, settings)
        rounds.append(clock.taken())

    with MacCounter() as counter:
        step()
    rounds.clear()
    taken = timed(step, setting)
    parts = {name: median([one[name] for one in rounds[1:]]) for name in rounds[-1]}
    return Speed(settings.batch, median(taken), 2 * counter.macs, parts)


class _Clock:
    """A task whose parts are timed."""

    def __init__(self, task: Task, state: TrainState, setting: Setting) -> None:
        self._task, self._now = task, setting.now
        self.parts, self.frozen, self.encoder = task.parts, task.frozen, task.encoder
        self.gallery, self.save = task.gallery, task.save
        self._seconds: dict[str, float] = {}
        self._inside = False
        self._begun = self._stepping = self._asked = 0.0
        first = next(iter(state.parts.values()))
        if (field := dict(first.module.named_children()).get("field")) is not None:
            field.register_forward_pre_hook(self._before)
            field.register_forward_hook(self._after)
        first.optimizer.register_step_pre_hook(self._before_step)

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        start = self._now()
        yield
        self._add(name, self._now() - start)

    def prepare(self, batch: Batch) -> Batch:
        """Completes the batch by the task."""
        if batch.latents is not None or self.encoder is None:
            return self._task.prepare(batch)
        with self.part("teacher"):
            return self._task.prepare(batch)

    def terms(self, batch: Batch, draws: Draws, iteration: int) -> Iterator[PartTerms]:
        """Yields the terms of the task; the time between them is the backward pass."""
        supply = self._task.terms(batch, draws, iteration)
        self._begun = self._now()
        while True:
            start = self._now()
            self._add("backward", start - self._begun)
            self._inside = True
            terms = next(supply, None)
            self._inside, self._begun = False, self._now()
            self._add("terms", self._begun - start)
            if terms is None:
                return
            yield terms

    def taken(self) -> dict[str, float]:
        """Returns the seconds of the step that just ended, by part, in their order."""
        self._add("optimiser", self._now() - self._stepping)
        seconds, self._seconds = self._seconds, {}
        asked = seconds.get("field")
        if asked is None:
            seconds["forward"] = seconds.pop("terms")
        else:
            seconds["terms"] -= asked
        order = ("data", "teacher", "field", "forward", "terms", "backward", "optimiser")
        return {name: seconds[name] for name in order if name in seconds}

    def _add(self, name: str, seconds: float) -> None:
        self._seconds[name] = self._seconds.get(name, 0.0) + seconds

    def _before(self, *_: Any) -> None:
        self._asked = self._now()

    def _after(self, *_: Any) -> None:
        if self._inside:  # what is recomputed belongs to the backward pass
            self._add("field", self._now() - self._asked)

    def _before_step(self, *_: Any) -> None:
        self._stepping = self._now()
        self._add("backward", self._stepping - self._begun)
