"""How to train, whatever is trained."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from ..errors import RacError


@dataclass(frozen=True)
class TrainConfig:
    """Settings of the loop. An iteration is one step of the optimiser."""

    iterations: int = 10_000
    batch: int = 32
    """Images per iteration, over all parts of an accumulated batch."""
    accumulate: int = 1
    """Split each batch into this many parts, to save memory; changes nothing else."""
    lr: float = 3e-4
    betas: tuple[float, float] = (0.9, 0.99)
    weight_decay: float = 0.0
    clip: float = 1.0
    """Largest norm of the whole gradient; 0: unlimited."""
    ema: float = 0.999
    """Decay of the averaged weights, which are the ones saved; lower at first, so that short runs work."""
    warmup: int = 0
    """Iterations in which the learning rate rises to `lr`."""
    schedule: Literal["constant", "cosine"] = "constant"
    final_lr: float = 0.0
    """With the cosine schedule: the learning rate at the end, as a fraction of `lr`."""
    bf16: bool = False
    """Compute convolutions and matrix products in bfloat16; weights stay float32."""
    channels_last: bool = False
    """Memory layout of images; faster together with bf16."""
    rng_seed: int = 0
    workers: int = 1
    """Threads that read images ahead; 0: none."""
    threads: int = 0
    """Threads torch computes with; 0: its own choice; -1: what is fastest here, measured at the start."""
    device: str = "auto"
    checkpoint_minutes: float = 5.0
    gallery_every: int = 500
    """Iterations between galleries of held-out images, with curves of the losses."""
    log_every: int = 20
    """Iterations between lines of log.jsonl."""
    tensorboard: bool = True
    """Write TensorBoard's events as well, where it is installed."""

    def __post_init__(self) -> None:
        counts = ("iterations", "batch", "accumulate", "gallery_every", "log_every")
        others = ("lr", "weight_decay", "clip", "warmup", "final_lr", "workers", "checkpoint_minutes")
        for name in (*counts, *others):
            least = 1 if name in counts else 0
            if not getattr(self, name) >= least:
                raise RacError(f"{name} {getattr(self, name)} must be at least {least}")
        if self.threads < -1:
            raise RacError(f"threads {self.threads} must be -1 (measured), 0 (torch chooses) or more")
        if self.accumulate > self.batch:
            raise RacError(f"a batch of {self.batch} cannot be split into {self.accumulate} parts; lower accumulate")
        for name, fraction in (("ema", self.ema), ("betas", self.betas[0]), ("betas", self.betas[1])):
            if not 0 <= fraction < 1:
                raise RacError(f"{name} {fraction} must be at least 0 and below 1")


# What may change when a run is resumed: it moves no number of the run, or only by rounding (another device).
FREE_ON_RESUME = frozenset(
    {"workers", "threads", "device", "checkpoint_minutes", "gallery_every", "log_every", "tensorboard", "keep_mb"}
)


def learning_rate(settings: TrainConfig, iteration: int) -> float:
    """The learning rate of iteration number `iteration`, counted from 0."""
    if iteration < settings.warmup:
        return settings.lr * (iteration + 1) / settings.warmup
    if settings.schedule == "constant":
        return settings.lr
    done = (iteration - settings.warmup) / max(1, settings.iterations - settings.warmup)
    return settings.lr * (settings.final_lr + (1 - settings.final_lr) * 0.5 * (1 + math.cos(math.pi * min(1.0, done))))


def ema_decay(settings: TrainConfig, iteration: int) -> float:
    """The averaging decay after iteration number `iteration`, counted from 0: (1 + k) / (10 + k) until `ema`."""
    return min(settings.ema, (1 + iteration) / (10 + iteration))
