"""`rac convert`: public checkpoints of generators to generators of this library, and back."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from .. import hub
from ..errors import RacError
from ..files import make_folder, make_output
from ..generators.convert import from_public, read_public, to_public, write_public
from ..generators.flow import FlowGenerator
from .shared import say

PUBLIC = (".pt", ".pth", ".safetensors")
"""Suffixes of public checkpoints."""


@dataclass(frozen=True)
class Command:
    """Turn a public checkpoint of SiT, REPA or LightningDiT into a generator, or a generator into such a checkpoint.

    The kind of the source decides: a .pt or .safetensors file is read, and a generator written to the folder --out; of
    a generator such a file is written to --out. Only tensors are read from a file, and no code is run.
    """

    source: Annotated[str, tyro.conf.Positional]
    """A public checkpoint (.pt, .pth, .safetensors); or a generator: a shipped name, a training run, a directory."""
    out: Path
    """Folder of the generator that is made, or the file (.pt, .safetensors) of the checkpoint."""
    coder: str | None = None
    """The coder that the checkpoint was trained on: for SiT and REPA the SD-VAE, stabilityai/sd-vae-ft-ema."""
    classes: tuple[str, ...] = ()
    """Names of the checkpoint's classes, in the order of their labels. None: their numbers."""
    heads: int | None = None
    """Heads of the checkpoint's attention. None: those of the published network of its width."""
    entry: Literal["ema", "model"] | None = None
    """Which weights to read where the checkpoint has both. None: the averaged ones, ema."""
    time: Literal["data", "noise"] | None = None
    """What the checkpoint's time 1 is: data, as in SiT and LightningDiT, or noise, as in REPA. None: noise where a
    checkpoint has REPA's heads; data in what is written."""
    learn_sigma: bool = False
    """Write twice as many output channels, as SiT's own code loads by default; the second half is zero."""

    def run(self) -> int:
        """Convert; the exit code. Raises `RacError`."""
        if Path(self.source).suffix in PUBLIC and not Path(self.source).is_dir():
            return self._read()
        return self._write()

    def _read(self) -> int:
        self._refuse({"learn-sigma": self.learn_sigma}, "is for writing a checkpoint, and this reads one")
        if self.coder is None:
            raise RacError(
                "the checkpoint does not say which coder's latents it makes; give --coder, for SiT and REPA the "
                "SD-VAE stabilityai/sd-vae-ft-ema"
            )
        if self.heads is not None and self.heads < 1:
            raise RacError(f"heads {self.heads} must be at least 1")
        if self.out.exists() and (not self.out.is_dir() or any(self.out.iterdir())):
            raise RacError(f"{self.out} exists and is no empty folder; choose another --out")
        tensors = read_public(self.source, self.entry or "ema")
        generator = from_public(
            tensors,
            hub.load(self.coder),
            self.coder,
            classes=self.classes or None,
            heads=self.heads,
            noise_time=None if self.time is None else self.time == "noise",
        )
        make_output(self.out)
        generator.save(self.out)
        kind = generator.kind
        say(
            f"{self.out}: a generator of {len(kind.classes):,} classes at {kind.side * kind.spec.factor} pixels; "
            f"try: rac generate {self.out}"
        )
        return 0

    def _write(self) -> int:
        reading = {"coder": self.coder, "classes": self.classes, "heads": self.heads, "entry": self.entry}
        self._refuse(reading, "is for reading a checkpoint, and this writes one")
        if self.out.suffix not in PUBLIC:
            raise RacError(f"--out {self.out} must be a file that ends in {', '.join(PUBLIC)}")
        if self.out.exists():
            raise RacError(f"{self.out} exists; choose another --out")
        generator = FlowGenerator.of(hub.load_generator(self.source))
        tensors = to_public(generator, noise_time=self.time == "noise", learn_sigma=self.learn_sigma)
        make_folder(self.out.parent)
        write_public(tensors, self.out)
        say(f"{self.out}: {len(tensors)} tensors, {sum(one.numel() for one in tensors.values()):,} numbers")
        return 0

    def _refuse(self, given: dict[str, object], why: str) -> None:
        """Raises `RacError` if one of these options was given."""
        for name, value in given.items():
            if value not in (None, (), False):
                raise RacError(f"--{name} {why}; leave it out")
