"""`rac reconstruct`: images through a coder and back, as pictures and metrics."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from ..errors import RacError, printable
from ..evaluate.comparison import short_name
from ..evaluate.one_image import Reconstruction, Seeded, comparison, means, per_image, reconstructions
from ..files import make_output, write_bytes
from ..flow.grid import check_steps
from ..flow.solvers import SOLVERS, SolverName
from ..images import check_size, image_files, read_image, write_image, write_picture
from ..report.document import utf8
from ..report.pictures import trajectory_strip
from ..runtime import pick_device
from .outputs import result_names
from .shared import (
    DEFAULT_CODER,
    check_tile,
    for_each,
    in_tiles,
    load_coder,
    load_teacher,
    need_trained,
    note,
    note_passed_over,
    say,
    show,
)


@dataclass(frozen=True)
class Command:
    """Encode and decode an image, or every image of a folder, and compare the result with the original.

    Writes for each image its reconstruction (at the largest number of steps), a strip (original, teacher, the coder at
    each number of steps) and the states between seed state and image; and results.csv for all images.
    """

    path: Annotated[Path, tyro.conf.Positional]
    """A picture, or a folder of pictures."""
    out: Path = Path("reconstructed")
    """Folder for the results; created if it does not exist."""
    model: str = DEFAULT_CODER
    """A shipped coder (see `rac models`), a directory, or a name on the hub."""
    steps: tuple[int, ...] = (1, 2, 4)
    """Numbers of steps to compare; each encodes and decodes in the same number."""
    solver: SolverName = "euler"
    """Solver of the flow."""
    rng_seed: int = 0
    """Seed of the noise that some coders decode from; an image's noise depends on it and on the result's name."""
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
        """Reconstruct; the exit code. Raises `RacError` if nothing could be done."""
        if not self.steps:
            raise RacError("--steps needs at least one number of steps, such as 1 2 4")
        for number in self.steps:
            check_steps(number)
        if self.size is not None:
            check_size(self.size)
        files = image_files(self.path)
        coder = load_coder(self.model, self.device)
        teacher = load_teacher(coder, self.device)
        encodes = "encode" in coder.trained_ways
        if not encodes:
            if teacher is None:
                need_trained(coder, self.model, "encode")
            note(f"{self.model} was trained to decode only, so its teacher {coder.teacher} encodes the images")
        for one in filter(None, (coder, teacher)):
            check_tile(one, self.tile)
        if self.path.is_dir():
            note_passed_over(self.path, files)
        names = result_names(files)
        make_output(self.out)
        results: dict[str, list[Reconstruction]] = {}

        def work(file: Path) -> None:
            image = read_image(file, self.size, convert=self.convert).to(pick_device(self.device))
            size = (image.shape[-2], image.shape[-1])
            fitting = in_tiles(coder, self.tile, size)
            made = reconstructions(
                fitting,
                image,
                tuple(dict.fromkeys(self.steps)),
                SOLVERS[self.solver],
                teacher and in_tiles(teacher, self.tile, size),
                short_name(self.model),
                Seeded(self.rng_seed, names[file]),
            )
            title = f"{printable(file.name)} · {image.shape[-1]} x {image.shape[-2]} · {self.model}"
            write_picture(comparison(image, made, title), self.out / f"{names[file]}-strip.png")
            own = [one for one in made if one.from_teacher != encodes]
            best = next((one for one in own if one.decoding is not None), own[-1])
            write_image(best.image, self.out / f"{names[file]}-reconstruction.png")
            if best.decoding is not None:
                states = trajectory_strip(best.decoding, size, title)
                write_picture(states, self.out / f"{names[file]}-trajectory.png")
            results[file.name] = [one.without_flows() for one in made]

        code = for_each(files, work, batch=self.path.is_dir())
        if results:
            write_bytes(self.out / "results.csv", utf8(per_image(results).to_csv()))
            show(means(results), f"{self.model}, {_images(len(results))}")
            say(f"Pictures and results.csv are in {self.out}")
        return code


def _images(number: int) -> str:
    return "1 image" if number == 1 else f"mean of {number} images"
