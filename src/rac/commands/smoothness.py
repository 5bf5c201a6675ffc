"""`rac smoothness`: how evenly decoded images move with the latent, coder against coder."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from ..config import json_safe, to_json
from ..errors import RacError
from ..evaluate.comparison import LatentSource, candidates
from ..evaluate.image_sets import ImageSet
from ..evaluate.protocol import protocol_named
from ..evaluate.smoothness import Smoothness, picture, smoothness, table
from ..files import check_output, make_output, write_bytes
from ..flow.grid import check_steps
from ..images import write_picture
from ..progress import counting
from ..report.document import utf8
from .shared import say, show


@dataclass(frozen=True)
class Command:
    """Measure the smoothness of coders between images, and under noise on latents.

    For each pair of images the latents between theirs are decoded. Roughness is the root mean square second difference
    of the images over that of their first differences: 0 if the image changes evenly. The change at sigma is how far
    noise on the latent moves the image, over sigma. Writes smoothness.png and smoothness.json.
    """

    models: Annotated[tuple[str, ...], tyro.conf.Positional] = ()
    """Coders: shipped names (see `rac models`), directories, names on the hub."""
    out: Path = Path("smoothness")
    """Folder for the results; created if it does not exist."""
    data: tuple[Path, ...] = ()
    """Folders of pictures, tar files, or single pictures. None: scikit-image's photographs."""
    protocol: str = "pixels-64"
    """Protocol by which pictures are cropped and scaled, with the seed of the noise; rac evaluate --help lists the
    protocols."""
    pairs: int = 8
    """Number of pairs of images: the first and the second, the second and the third, and so on."""
    steps: tuple[int, ...] = (8,)
    """Numbers of steps of coders with a flow."""
    latents: tuple[LatentSource, ...] = ("own",)
    """Latents that a coder with a teacher decodes: its own, its teacher's, or both, one after the other."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1 or mps."""

    def run(self) -> int:
        """Measure; the exit code. Raises `RacError`."""
        if not self.models:
            raise RacError("name the coders to measure, such as: rac smoothness klvae-f8d4 rac-64 --data PICTURES")
        if self.pairs < 1 or not self.steps or not self.latents:
            raise RacError(f"--pairs {self.pairs} must be at least 1, and --steps and --latents need a value each")
        for number in self.steps:
            check_steps(number)
        protocol = protocol_named(self.protocol)
        check_output(self.out, self.data)
        field = candidates(self.models, protocol, steps=self.steps, latents=self.latents, device=self.device)
        with counting("reading pictures") as progress:
            images = ImageSet.read(self.data, protocol.preprocessing, self.pairs + 1, progress)
        found: list[Smoothness] = []
        with counting("smoothness") as progress:
            for done, candidate in enumerate(field):
                progress(done, len(field))
                found.append(smoothness(candidate, images, self.pairs))
        out = make_output(self.out)
        write_picture(picture(field, images), out / "smoothness.png")
        text = json.dumps(json_safe([to_json(one) for one in found]), indent=2, allow_nan=False)
        write_bytes(out / "smoothness.json", utf8(text + "\n"))
        pairs = "1 pair" if self.pairs == 1 else f"{self.pairs} pairs"
        show(table(found), f"{pairs} of {images.name}, {protocol.name}")
        say("")
        say(f"The picture: {out / 'smoothness.png'}")
        return 0
