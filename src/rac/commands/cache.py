"""`rac cache`: crops and a teacher's latents of them, prepared once, to train on."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from .. import hub
from ..data import DataConfig, ImageStream, Latents
from ..data.cache import Layout, fresh_stream, plan_of, prepare
from ..errors import RacError
from ..runtime import pick_device, set_threads
from .shared import note, part_of


@dataclass(frozen=True)
class Command:
    """Prepare crops, and a teacher's latents of them, in shards that training reads from the disk.

    Broken off at any point, the same command goes on where it stopped, and ends with the same bytes. Train on the
    result with --data.paths FOLDER.
    """

    teacher: str | None = None
    """A shipped coder, a directory, a TAESD-family .pth file, or a name on the hub. None: crops alone."""
    data: DataConfig = field(default_factory=DataConfig)
    out: Path = Path("crops")
    """Folder for the shards; created if it does not exist."""
    crops: int | None = None
    """How many random crops to prepare: the first ones that training on the pictures themselves would see."""
    whole: bool = False
    """Instead of random crops, the centre of each picture, once."""
    pixels: bool = True
    """Keep the pixels; without, only latents are kept, and training needs the pictures as well."""
    moments: bool = False
    """Keep the raw moments of the teacher's posterior, mean and log-variance, instead of its mean as a latent: a
    training can then draw a new sample of it each time."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Number type of the latents or moments."""
    shard_size: int = 1024
    """Crops in a file, a multiple of 32; one file at a time is in memory."""
    part: str = "0/1"
    """Share of the shards that this process makes: 0/4, 1/4, 2/4 and 3/4 together make all."""
    workers: int = 1
    """Threads that read pictures ahead; 0: none."""
    threads: int = 0
    """Threads torch computes with; 0: torch's own choice."""
    rng_seed: int = 0
    """Seed of the crops. A training with the same `--train.rng-seed` sees the same crops."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1 or mps."""

    def run(self) -> int:
        """Prepare; the exit code. Raises `RacError`."""
        if (self.crops is None) != self.whole or (self.crops is not None and self.crops < 1):
            raise RacError("give either --crops, how many random ones, at least 1, or --whole")
        if self.workers < 0:
            raise RacError(f"workers {self.workers} must be 0 (none) or more")
        part, layout = part_of(self.part), Layout(self.whole, self.pixels, self.moments, self.dtype, self.shard_size)
        set_threads(self.threads)
        device = pick_device(self.device)
        teacher = None if self.teacher is None else hub.load(self.teacher).to(device)
        if teacher is None and not self.pixels:
            raise RacError("without --pixels and without --teacher there is nothing to prepare; give a teacher")
        latents = None if teacher is None else Latents(teacher, self.teacher, device)
        stream = fresh_stream(self.data, self.rng_seed)
        if self.whole and not isinstance(stream, ImageStream):
            raise RacError("--whole needs to know how many pictures there are; give --crops for a streamed data set")
        count = len(stream) if isinstance(stream, ImageStream) and self.whole else self.crops or 0
        data = replace(self.data, cached_crops=count)
        plan = plan_of(data, self.rng_seed, latents, layout)
        missing = prepare(self.out, plan, stream, latents, part=part, workers=self.workers)
        files = list(self.out.glob("*.safetensors"))
        size = sum(file.stat().st_size for file in files) / 2**20
        what = f"{self.out}: {len(files) - 1} shards, {size:,.1f} MiB"
        if missing:
            note(f"{what}; {len(missing)} more are left to the other parts")
            return 0
        kept = f" with {'moments' if self.moments else 'latents'} of {self.teacher}" if self.teacher else ""
        print(f"{what}: {count:,} crops of {data.size} x {data.size}{kept}; train with --data.paths {self.out}")
        return 0
