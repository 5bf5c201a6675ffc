"""Settings of the training loop, whatever is trained."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal, get_args

from ..config import free_on_resume
from ..errors import RacError
from ..runtime import check_threads

Optimizer = Literal["adamw", "muon"]


@dataclass(frozen=True)
class TrainConfig:
    """Settings of the training loop. An iteration is one step of the optimizer.

    Raises `RacError` for values out of their range, naming the field.
    """

    iterations: int = field(default=10_000, metadata=free_on_resume(lambda settings: settings.schedule == "constant"))
    """Length of the run in iterations, including those before a resume."""
    batch: int = 32
    """Images per iteration, over all parts of an accumulated batch."""
    accumulate: int = 1
    """Split each batch into this many parts, to save memory; changes nothing else."""
    optimizer: Optimizer = "adamw"
    """Rule by which gradients change weights. "muon": Muon for the weights of linear layers and convolutions, AdamW for
    the rest, with one learning rate; steadier than AdamW for small batches."""
    lr: float = 3e-4
    """Highest learning rate."""
    betas: tuple[float, float] = (0.9, 0.99)
    """Decays of AdamW's two moments."""
    weight_decay: float = 0.0
    """Weight decay of AdamW."""
    clip: float = 1.0
    """Largest norm of the whole gradient; 0: unlimited."""
    ema: float = 0.999
    """Decay of the averaged weights, which are the ones that are saved. It is lower at first, so that short runs
    work."""
    warmup: int = 0
    """Number of iterations over which the learning rate rises to `lr`."""
    schedule: Literal["constant", "cosine"] = "constant"
    """Learning rate after the warmup: constant, or falling along a half cosine."""
    final_lr: float = 0.0
    """Learning rate at the end of the cosine schedule, as a fraction of `lr`."""
    bf16: bool = False
    """Compute convolutions and matrix products in bfloat16; weights stay float32."""
    channels_last: bool = False
    """Memory layout of images; faster together with bf16."""
    rng_seed: int = 0
    """Seed of weights, crops, times and noise; equal seeds give equal runs."""
    workers: int = field(default=1, metadata=free_on_resume())
    """Number of threads that read images in advance; 0: none."""
    threads: int = field(default=0, metadata=free_on_resume())
    """Number of threads that torch uses in each process. 0: torch's choice, at most an equal share of the cores; -1:
    the fastest number on this machine, measured at the start."""
    compile: bool = False
    """Compile the field of a RAC with torch.compile. The start is slow, and on a CPU steps are seldom faster."""
    device: str = field(default="auto", metadata=free_on_resume())
    """Device to train on: auto, cpu, cuda, cuda:1 or mps."""
    shard: Literal["none", "fsdp"] = field(default="none", metadata=free_on_resume())
    """How several processes hold the weights: all of them on each process, or spread over the processes to save memory
    (FSDP2)."""
    minutes: float = field(default=0.0, metadata=free_on_resume())
    """Number of minutes after which the run is saved and stopped, for a resume to continue it; 0: no limit. Finishing
    the iteration and saving take a little longer."""
    checkpoint_minutes: float = field(default=5.0, metadata=free_on_resume())
    """Longest time between two checkpoints, in minutes."""
    patience_minutes: float = field(default=15.0, metadata=free_on_resume())
    """Longest wait for a batch or for another process, in minutes. After that the run ends with an error."""
    on_divergence: Literal["stop", "skip"] = field(default="stop", metadata=free_on_resume())
    """Reaction to a loss or gradient that is not finite. "stop" ends the run and keeps the batch for inspection; "skip"
    continues without that batch.
    """
    gallery_every: int = field(default=500, metadata=free_on_resume())
    """Iterations between galleries of held-out images, with curves of the losses."""
    log_every: int = field(default=20, metadata=free_on_resume())
    """Iterations between lines of log.jsonl."""
    tensorboard: bool = field(default=True, metadata=free_on_resume())
    """Write TensorBoard's events as well, where it is installed."""

    def __post_init__(self) -> None:
        counts = ("iterations", "batch", "accumulate", "gallery_every", "log_every")
        others = ("lr", "weight_decay", "clip", "warmup", "final_lr", "workers", "minutes", "checkpoint_minutes")
        if not self.patience_minutes > 0:
            raise RacError(f"patience_minutes {self.patience_minutes} must be above 0")
        for name in (*counts, *others):
            least = 1 if name in counts else 0
            if not least <= getattr(self, name) < math.inf:
                raise RacError(f"{name} {getattr(self, name)} must be at least {least}, and finite")
        check_threads(self.threads)
        if self.accumulate > self.batch:
            raise RacError(f"a batch of {self.batch} cannot be split into {self.accumulate} parts; lower accumulate")
        if self.optimizer not in get_args(Optimizer):
            raise RacError(f"optimizer {self.optimizer!r} is unknown; expected {', '.join(get_args(Optimizer))}")
        if self.optimizer == "muon" and self.shard == "fsdp":
            raise RacError("optimizer muon needs whole matrices, which shard fsdp cuts; use adamw, or shard none")
        for name, fraction in (("ema", self.ema), ("betas", self.betas[0]), ("betas", self.betas[1])):
            if not 0 <= fraction < 1:
                raise RacError(f"{name} {fraction} must be at least 0 and below 1")


def learning_rate(settings: TrainConfig, iteration: int) -> float:
    """Returns the learning rate of iteration number `iteration`, counted from 0."""
    if iteration < settings.warmup:
        return settings.lr * (iteration + 1) / settings.warmup
    if settings.schedule == "constant":
        return settings.lr
    done = (iteration - settings.warmup) / max(1, settings.iterations - settings.warmup)
    return settings.lr * (settings.final_lr + (1 - settings.final_lr) * 0.5 * (1 + math.cos(math.pi * min(1.0, done))))


def ema_decay(most: float, iteration: int) -> float:
    """Returns the averaging decay after iteration k = `iteration`, counted from 0: (1 + k) / (10 + k) until `most`."""
    return min(most, (1 + iteration) / (10 + iteration))
