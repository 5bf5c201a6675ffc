"""`rac cache`: crops, a teacher's latents of them and a representation's features, prepared once, to train on."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import torch

from .. import hub
from ..data import DataConfig, Features, ImageStream, Latents
from ..data.cache import Layout, fresh_stream, plan_of, prepare
from ..errors import RacError
from ..representations import Targets, load_representation
from ..runtime import pick_device, set_threads
from .shared import note, part_of, say


@dataclass(frozen=True)
class Command:
    """Prepare crops, and latents and features of them, in files that training reads from the disk.

    If it is interrupted, run the same command again: it continues where it stopped and writes the same files. Train on
    the result with --data.paths FOLDER.
    """

    teacher: str | None = None
    """A shipped coder, a directory, a TAESD-family .pth file, or a name on the hub. None: prepare crops only."""
    representation: str | None = None
    """A representation whose features are prepared too, to align generators with (REPA): efficientnet-lite0, dinov2-s,
    dinov2-b, dinov2-l, siglip2-b, mae-b, or the directory or hub name of such a model. None: no features."""
    token: int = 16
    """Side, in pixels of the image, of the square that a feature stands for: the factor of the coder times the patch of
    the generator."""
    grid: int = 16
    """Rows and columns of tokens that the representation computes at least, whatever the size of the image."""
    data: DataConfig = field(default_factory=DataConfig)
    out: Path = Path("crops")
    """Folder for the shards; created if it does not exist."""
    crops: int | None = None
    """Number of random crops to prepare: the first ones that a training on the pictures themselves would use."""
    whole: bool = False
    """Prepare the centre of each picture once, instead of random crops."""
    pixels: bool = True
    """Store pixels. Without them only latents and features are stored; a training that needs images as well cuts them
    again from the pictures."""
    moments: bool = False
    """Store the mean and the log-variance of the teacher's posterior instead of latents, so that training can draw a
    new sample each time."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Number type of the latents or moments."""
    shard_size: int = 1024
    """Number of crops in a file, a multiple of 32. One file at a time is held in memory."""
    part: str = "0/1"
    """Share of the shards that this process makes: 0/4, 1/4, 2/4 and 3/4 together make all."""
    workers: int = 1
    """Number of threads that read pictures in advance; 0: none."""
    threads: int = 0
    """Number of threads that torch uses; 0: torch's own choice."""
    rng_seed: int = 0
    """Seed of the crops. A training with the same `--train.rng-seed` sees the same crops."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1 or mps."""

    def run(self) -> int:
        """Prepare; the exit code. Raises `RacError`."""
        if (self.crops is None) != self.whole or (self.crops is not None and self.crops < 1):
            raise RacError("give --crops with the number of random crops, at least 1, or --whole")
        if self.workers < 0:
            raise RacError(f"workers {self.workers} must be 0 (none) or more")
        part, layout = part_of(self.part), Layout(self.whole, self.pixels, self.moments, self.dtype, self.shard_size)
        set_threads(self.threads)
        device = pick_device(self.device)
        teacher = None if self.teacher is None else hub.load(self.teacher).to(device)
        if teacher is None and self.representation is None and not self.pixels:
            raise RacError("without --pixels and without --teacher there is nothing to prepare; give a teacher")
        latents = None if teacher is None else Latents(teacher, self.teacher, device)
        features = self._features(device)
        stream = fresh_stream(self.data, self.rng_seed)
        if self.whole and not isinstance(stream, ImageStream):
            raise RacError("--whole needs to know how many pictures there are; give --crops for a streamed data set")
        count = len(stream) if isinstance(stream, ImageStream) and self.whole else self.crops or 0
        data = replace(self.data, cached_crops=count)
        plan = plan_of(data, self.rng_seed, latents, layout, features)
        missing = prepare(self.out, plan, stream, latents, features, part=part, workers=self.workers)
        files = list(self.out.glob("*.safetensors"))
        size = sum(file.stat().st_size for file in files) / 2**20
        what = f"{self.out}: {len(files) - 1} shards, {size:,.1f} MiB"
        if missing:
            note(f"{what}; {len(missing)} more shards are left to the other parts")
            return 0
        kept = f" with {'moments' if self.moments else 'latents'} of {self.teacher}" if self.teacher else ""
        if self.representation:
            kept += f"{' and' if kept else ' with'} features of {self.representation}"
        say(f"{what}: {count:,} crops of {data.size} x {data.size}{kept}; train with --data.paths {self.out}")
        return 0

    def _features(self, device: torch.device) -> Features | None:
        if self.representation is None:
            return None
        targets = Targets(load_representation(self.representation), self.representation, self.token, self.grid)
        targets.check(self.data.size)
        return Features(targets.to(device), device)
