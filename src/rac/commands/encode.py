"""`rac encode`: images -> latents."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import tyro
from torch import Tensor

from ..coders.protocol import Coder
from ..coders.rac import RAC
from ..errors import RacError
from ..files import make_folder
from ..flow import FixedPoint
from ..flow.grid import check_steps
from ..flow.solvers import SOLVERS, SolverName
from ..images import check_size, image_files, read_image
from ..runtime import pick_device
from .latent_files import LatentFile
from .shared import DEFAULT_CODER, for_each, in_tiles, load_coder, need_rac, stems


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
    """Steps of the flow. None: the coder's own number."""
    solver: SolverName = "euler"
    """Solver of the flow. Decode with the same one."""
    exact: bool = False
    """Undo the decoder's steps exactly, by fixed-point iteration, and print the residual: slower. An encoder does not
    know the state's channels beside the image, so a small residual does not prove that the latent is the original."""
    size: int | None = None
    """Scale and crop images to squares of this side. None: keep their size."""
    convert: bool = False
    """Convert grey, palette, CMYK, 16-bit and transparent pictures to 8-bit RGB without a message on stderr."""
    tile: int | None = None
    """Work in tiles of this side, in less memory: exact for coders of plain convolutions, such as the shipped RAC,
    blended for others. 0: whole. None: tiles of 1024 for images above 2048 x 2048."""
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
        if self.exact:
            need_rac(coder, self.model)
            if SOLVERS[self.solver].reversible:
                raise RacError(
                    f"--exact is for explicit solvers; {self.solver} is undone by its carry, which no file keeps"
                )
        names = stems(files)
        make_folder(self.out)

        def work(file: Path) -> None:
            image = read_image(file, self.size, convert=self.convert).to(pick_device(self.device))
            fitting = in_tiles(coder, self.tile, (image.shape[-2], image.shape[-1]))
            encoded, out = self._encode(fitting, image, file), self.out / f"{names[file]}.safetensors"
            encoded.write(out)
            channels, height, width = encoded.latent.shape[1:]
            print(f"{out}: {channels} channels of {width} x {height}")

        return for_each(files, work, batch=self.path.is_dir())

    @torch.no_grad()
    def _encode(self, coder: Coder, image: Tensor, file: Path) -> LatentFile:
        size = (image.shape[-2], image.shape[-1])
        if not isinstance(coder, RAC):
            return LatentFile(coder.encode(image), coder.spec, size, self.model)
        if not self.exact:
            latent = coder.encode(image, self.steps, SOLVERS[self.solver])
        else:
            back = coder.encode_trajectory(image, self.steps, FixedPoint(SOLVERS[self.solver]))
            print(f"{file.name}: largest residual {max(back.residuals):.2g} in {back.evaluations} evaluations")
            latent = coder.contract(back.end)
        return LatentFile(latent, coder.spec, size, self.model, self.steps or coder.config.steps, self.solver)
