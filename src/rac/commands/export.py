"""`rac export`: a coder's halves as single files for other runtimes."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Literal

import torch
import tyro
from torch import Tensor, nn

from ..coders.protocol import Coder
from ..data.files import find_pictures
from ..errors import RacError, install_extra
from ..files import make_folder
from ..images import check_size, read_image
from ..integrations.export import (
    SUFFIX,
    Check,
    Format,
    Latents,
    Part,
    check,
    export,
    names,
    need,
    part_of,
)
from ..report.document import Table
from .shared import DEFAULT_CODER, load_coder, note, say, show

TOLERANCE = 1e-4
"""How far a file may be from PyTorch on the pictures it is checked on, for values up to 1; further for larger ones."""

SHAPES = ((1, 1.0, 1.0), (2, 0.5, 1.0), (1, 0.75, 0.5))
"""Batch, height and width of the pictures that a file is checked on; height and width as parts of `size`."""


@dataclass(frozen=True)
class Command:
    """Write a coder as an ONNX file or as an exported PyTorch program, and check the file against PyTorch.

    The number of steps is fixed in the file. Batch size, height and width are free; the sides of images must be
    multiples of the coder's factor (and a program takes up to 63 images, with sides of at least twice the factor or,
    for a DGAE, three times). The file contains its description in JSON: part, steps, factor, channels, whether latents
    are raw, their statistics, the channels of the noise that a decoder takes as a second input, and the range of
    images. It is under `rac` in the metadata of an ONNX file, and the extra file rac.json of a program.
    """

    model: Annotated[str, tyro.conf.Positional] = DEFAULT_CODER
    """A shipped coder (see `rac models`), a directory, or a name on the hub: a RAC or a diffusers autoencoder."""
    out: Path | None = None
    """File to write. None: the coder's name and the format's suffix. For both parts, -encode and -decode are added
    before the suffix."""
    format: Format = "onnx"
    """Format of the file."""
    part: Literal["encode", "decode", "both"] = "both"
    """Part of the coder to export; both parts make two files."""
    steps: int | None = None
    """Number of steps of the flow. None: the coder's own number."""
    latents: Latents = "normalised"
    """raw: on the scale of the teacher's own network, so that the file can replace its VAE. normalised: on the scale
    that `rac` uses."""
    size: int = 64
    """Largest side of the three pictures that the file is checked on; a multiple of 4 times the factor."""

    def run(self) -> int:
        """Write the files and check them; the exit code. Raises `RacError`."""
        check_size(self.size)
        if self.format == "onnx":
            need("onnx", "onnxscript")
        coder = load_coder(self.model, "cpu")
        unit = 4 * coder.spec.factor
        if self.size < unit or self.size % unit:
            raise RacError(f"--size {self.size} must be a multiple of {unit}, four times the coder's factor")
        parts: list[Part] = ["encode", "decode"] if self.part == "both" else [self.part]
        steps = {part: self._steps(coder, part) for part in parts}
        modules = [part_of(coder, part, steps[part], self.latents) for part in parts]
        images = _images(self.size)
        for part, module in zip(parts, modules, strict=True):
            path = self._path(part)
            make_folder(path.parent)
            description = export(module, path, self.format, self.model)
            *into, out = names(description)
            say(f"{path}: {', '.join(into)} -> {out}, {path.stat().st_size:,} bytes")
            if self.format == "onnx" and find_spec("onnxruntime") is None:
                note(f"not checked: onnxruntime is not installed; {install_extra('export')}")
                continue
            _judge(path, module, _inputs(coder, part, images, self._steps(coder, "encode"), self.latents), images)
        return 0

    def _steps(self, coder: Coder, part: Part) -> int | None:
        """The steps asked for; None for a way that takes one pass where the other way takes steps."""
        other: Part = "decode" if part == "encode" else "encode"
        one_pass = coder.walk(part) is None and coder.walk(other) is not None
        return None if one_pass and (self.part == "both" or part != self.part) else self.steps

    def _path(self, part: Part) -> Path:
        out = self.out or Path(Path(self.model).name + SUFFIX[self.format])
        if out.suffix != SUFFIX[self.format]:
            raise RacError(f"--out {out} must end in {SUFFIX[self.format]}, the suffix of --format {self.format}")
        return out if self.part != "both" else out.with_name(f"{out.stem}-{part}{out.suffix}")


def _images(size: int) -> list[Tensor]:
    """Photographs of scikit-image in three shapes; where it is missing, smooth waves."""
    images = []
    if find_spec("skimage") is not None:
        pictures = list(find_pictures(()))
    else:
        pictures = []
        note(f"scikit-image is not installed, so the check uses synthetic images; {install_extra('photos')}")
    for number, (batch, height, width) in enumerate(SHAPES):
        sides = int(size * height), int(size * width)
        if pictures:
            chosen = [pictures[(number + k) % len(pictures)] for k in range(batch)]
            images.append(torch.cat([read_image(io.BytesIO(one.read()), sides, convert=True) for one in chosen]))
        else:
            down, across = (torch.linspace(0, 6 + number, side) for side in sides)
            images.append(torch.sin(down[:, None] + across * torch.arange(1, 4)[:, None, None]).repeat(batch, 1, 1, 1))
    return images


def _inputs(
    coder: Coder, part: Part, images: Sequence[Tensor], steps: int | None, latents: Latents
) -> list[tuple[Tensor, ...]]:
    """What the part is asked on: the images, or the latents that the coder itself makes of them, with noise."""
    if part == "encode":
        return [(image,) for image in images]
    encode = part_of(coder, "encode", steps, latents)
    with torch.no_grad():
        found = [encode(image) for image in images]
    return [(latent,) if noise is None else (latent, noise) for latent in found for noise in [_noise(coder, latent)]]


def _noise(coder: Coder, latent: Tensor) -> Tensor | None:
    return coder.noise_of(latent, range(len(latent)))


def _judge(path: Path, module: nn.Module, inputs: Sequence[tuple[Tensor, ...]], images: Sequence[Tensor]) -> None:
    """Print how far the file is from PyTorch, and the times of both. Raises `RacError` where it is too far."""
    found = check(module, path, inputs)
    runtime = "ONNX Runtime" if path.suffix == SUFFIX["onnx"] else "exported"
    show(_table(found, images, runtime))
    with torch.no_grad():
        largest_value = max(float(module(*x).abs().max()) for x in inputs)
    allowed = TOLERANCE * max(1.0, largest_value)
    worst = max(found.largest)
    print(f"largest difference {worst:.1e}\n")
    if not worst <= allowed:
        raise RacError(f"{path} differs from PyTorch by {worst:.1e}, more than {allowed:.1e}; do not use it")


def _table(found: Check, images: Sequence[Tensor], runtime: str) -> Table:
    rows = []
    for image, largest, theirs, ours in zip(images, found.largest, found.theirs, found.ours, strict=True):
        batch, _, height, width = image.shape
        rows.append((f"{batch} x {height} x {width}", f"{largest:.1e}", f"{1000 * theirs:.1f}", f"{1000 * ours:.1f}"))
    return Table(("pictures", "largest difference", f"{runtime} ms", "PyTorch ms"), tuple(rows))
