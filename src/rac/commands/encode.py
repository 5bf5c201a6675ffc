"""`rac encode`: images -> latents."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import tyro
from torch import Tensor

from ..coders.protocol import Coder
from ..errors import ConvergenceWarning, RacError
from ..files import make_folder
from ..flow import FixedPoint, Walk
from ..flow.grid import check_steps
from ..flow.solvers import SOLVERS, SolverName
from ..images import check_size, image_files, read_image
from ..runtime import pick_device
from .latent_files import LatentFile
from .outputs import result_names
from .shared import (
    DEFAULT_CODER,
    check_tile,
    for_each,
    in_tiles,
    load_coder,
    need_flow,
    need_trained,
    note,
    note_passed_over,
    say,
)


@dataclass(frozen=True)
class Command:
    """Encode an image, or a folder of them, to latents in .safetensors files.

    A RAC encodes by running its decoder's flow backwards.
    """

    path: Annotated[Path, tyro.conf.Positional]
    """A picture, or a folder of pictures."""
    out: Path = Path("latents")
    """Folder for the results; created if it does not exist."""
    model: str = DEFAULT_CODER
    """A shipped coder (see `rac models`), a directory, or a name on the hub."""
    steps: int | None = None
    """Number of steps of the flow. None: the coder's own number."""
    solver: SolverName = "euler"
    """Solver of the flow; decode with the same one."""
    exact: bool = False
    """Invert the steps of the decoder exactly by fixed-point iteration, which is slower, and print the remaining error.
    An image for which the iteration does not converge is encoded as without this option. An encoder does not know the
    channels of the state beside the image, so a small error does not mean that the latent is the one that was
    decoded."""
    size: int | None = None
    """Scale and crop images to squares of this side, in pixels. None: keep their size."""
    convert: bool = False
    """Convert grey, palette, CMYK, 16-bit and transparent pictures to 8-bit RGB without a message on stderr."""
    tile: int | None = None
    """Side of the tiles to work in, in pixels, to save memory. The result is the same for coders of plain convolutions,
    such as rac-64; for others the tiles are blended, which changes it a little. 0: no tiles. None: tiles of 1024 pixels
    for images of more than 2048 x 2048."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1 or mps."""

    def run(self) -> int:
        """Encode; the exit code. Raises `RacError` if nothing could be done."""
        if self.steps is not None:
            check_steps(self.steps)
        if self.size is not None:
            check_size(self.size)
        files = image_files(self.path)
        coder = load_coder(self.model, self.device)
        need_trained(coder, self.model, "encode")
        if self.exact:
            need_flow(coder, self.model, "encode")
            if SOLVERS[self.solver].reversible:
                raise RacError(
                    f"--exact does not work with {self.solver}, a reversible solver: its steps are retraced from its "
                    "last state, which no file stores; choose another --solver"
                )
        elif self.steps is not None and coder.walk("encode") is None:
            note(f"{self.model} encodes in one pass, so --steps changes nothing")
        check_tile(coder, self.tile)
        if self.path.is_dir():
            note_passed_over(self.path, files)
        names = result_names(files)
        make_folder(self.out)
        inexact: list[str] = []

        def work(file: Path) -> None:
            image = read_image(file, self.size, convert=self.convert).to(pick_device(self.device))
            fitting = in_tiles(coder, self.tile, (image.shape[-2], image.shape[-1]))
            encoded, out = self._encode(fitting, image, file, inexact), self.out / f"{names[file]}.safetensors"
            encoded.write(out)
            channels, height, width = encoded.latent.shape[1:]
            say(f"{out}: {channels} channels of {width} x {height}")

        code = for_each(files, work, batch=self.path.is_dir())
        if inexact:
            more = f" and {len(inexact) - 1} more" if len(inexact) > 1 else ""
            note(
                f"{inexact[0]}{more}: the fixed-point iteration does not converge, so encoded without --exact; a "
                "larger --steps may help"
            )
        return code

    @torch.no_grad()
    def _encode(self, coder: Coder, image: Tensor, file: Path, inexact: list[str]) -> LatentFile:
        size, solver = (image.shape[-2], image.shape[-1]), SOLVERS[self.solver]
        walk = coder.walk("encode", self.steps, solver)
        if walk is None:
            return LatentFile(coder.encode(image), coder.spec, size, self.model)
        latent = self._exactly(coder, image, walk, file, inexact) if self.exact else None
        if latent is None:
            latent = coder.encode(image, walk=walk)
        return LatentFile(latent, coder.spec, size, self.model, walk.steps, self.solver)

    def _exactly(self, coder: Coder, image: Tensor, walk: Walk, file: Path, inexact: list[str]) -> Tensor | None:
        """The latent by fixed points, or None, the file named in `inexact`, where a step has none to be found."""
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", ConvergenceWarning)
            coded = coder.coded(image, Walk(walk.grid, FixedPoint(walk.solver)))
        assert coded.flow is not None
        residual = max(coded.flow.residuals)
        if any(issubclass(warning.category, ConvergenceWarning) for warning in caught):
            inexact.append(file.name)
            return None
        say(f"{file.name}: largest residual {residual:.2g} in {coded.evaluations} evaluations")
        return coded.latent
