"""`rac reconstruct`: images through a coder and back, as pictures and metrics."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import tyro
from PIL import Image
from torch import Tensor

from ..coders.protocol import Coder
from ..coders.rac import RAC
from ..errors import RacError
from ..evaluate.one_image import (
    Reconstruction,
    Results,
    coder_reconstruction,
    comparison,
    means,
    per_image,
    rac_reconstructions,
)
from ..files import make_folder, write_bytes
from ..flow.grid import check_steps
from ..flow.solvers import SOLVERS, SolverName
from ..images import check_size, image_files, read_image, write_picture
from ..report.pictures import trajectory_strip
from ..runtime import pick_device
from .shared import DEFAULT_CODER, for_each, in_tiles, load_coder, load_teacher, show, stems


@dataclass(frozen=True)
class Command:
    """Reconstruct an image, or each of a folder: encode, decode, compare.

    Writes for each image a strip (original, teacher, RAC at each number of steps) and the states on the way from the
    seed state to the image, and results.csv for all of them.
    """

    path: Annotated[Path, tyro.conf.Positional]
    """A picture, or a folder of pictures."""
    out: Path = Path("reconstructed")
    """Folder for the results; created if it does not exist."""
    model: str = DEFAULT_CODER
    """A shipped coder (see `rac models`), a directory, or a name on the hub."""
    steps: tuple[int, ...] = (1, 2, 4, 8)
    """Numbers of steps to compare; encoding takes as many as decoding."""
    solver: SolverName = "euler"
    """Solver of the flow."""
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
        """Reconstruct; the exit code. Raises `RacError` if nothing could be done."""
        if not self.steps:
            raise RacError("--steps needs at least one number of steps, such as 1 2 4 8")
        for number in self.steps:
            check_steps(number)
        if self.size is not None:
            check_size(self.size)
        files = image_files(self.path)
        coder = load_coder(self.model, self.device)
        teacher = load_teacher(coder, self.device)
        names = stems(files)
        make_folder(self.out)
        results: Results = {}

        def work(file: Path) -> None:
            image = read_image(file, self.size, convert=self.convert).to(pick_device(self.device))
            size = (image.shape[-2], image.shape[-1])
            fitting = in_tiles(coder, self.tile, size)
            made = self._reconstruct(fitting, teacher and in_tiles(teacher, self.tile, size), image)
            title = f"{file.name} · {image.shape[-1]} x {image.shape[-2]} · {self.model}"
            write_picture(comparison(image, made, title), self.out / f"{names[file]}-strip.png")
            if isinstance(fitting, RAC):
                states = self._states(fitting, image, title)
                write_picture(states, self.out / f"{names[file]}-trajectory.png")
            results[file.name] = made

        code = for_each(files, work, batch=self.path.is_dir())
        if results:
            write_bytes(self.out / "results.csv", per_image(results).to_csv().encode())
            show(means(results), f"{self.model}, {_images(len(results))}")
            print(f"Pictures and results.csv are in {self.out}")
        return code

    def _reconstruct(self, coder: Coder, teacher: Coder | None, image: Tensor) -> list[Reconstruction]:
        if isinstance(coder, RAC):
            return rac_reconstructions(coder, image, self.steps, SOLVERS[self.solver], teacher)
        return [coder_reconstruction(coder, image, Path(self.model).name)]

    @torch.no_grad()
    def _states(self, coder: RAC, image: Tensor, title: str) -> Image.Image:
        steps, solver = max(self.steps), SOLVERS[self.solver]
        flow = coder.trajectory(coder.encode(image, steps, solver), steps, solver)
        return trajectory_strip(flow, (image.shape[-2], image.shape[-1]), title)


def _images(number: int) -> str:
    return "1 image" if number == 1 else f"mean of {number} images"
