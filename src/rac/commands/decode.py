"""`rac decode`: latents -> images."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import tyro
from torch import Tensor

from ..coders.protocol import Coder
from ..errors import RacError
from ..files import make_output
from ..flow.grid import check_steps
from ..flow.solvers import SOLVERS, SolverName
from ..images import crop, write_image
from ..runtime import pick_device
from .latent_files import LatentFile
from .shared import check_tile, for_each, in_tiles, load_coder, need_trained, note, note_passed_over, say


@dataclass(frozen=True)
class Command:
    """Decode a .safetensors file that `rac encode` wrote, or a folder of them, to PNG images."""

    path: Annotated[Path, tyro.conf.Positional]
    """A latent file, or a folder of them."""
    out: Path = Path("decoded")
    """Folder for the results; created if it does not exist."""
    model: str | None = None
    """The coder to decode with. None: the one named in the file."""
    steps: int | None = None
    """Number of steps of the flow. None: as many as the image was encoded with."""
    solver: SolverName | None = None
    """Solver of the flow. None: the one used for encoding."""
    rng_seed: int = 0
    """Seed of the noise that some coders decode from; an image's noise depends on it and on the name of its file."""
    tile: int | None = None
    """Side of the tiles to work in, in pixels, to save memory. The result is the same for coders of plain convolutions,
    such as rac-64; for others the tiles are blended, which changes it a little. 0: no tiles. None: tiles of 1024 pixels
    for images of more than 2048 x 2048."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1 or mps."""

    def run(self) -> int:
        """Decode; the exit code. Raises `RacError` if nothing could be done."""
        if self.steps is not None:
            check_steps(self.steps)
        files = _latent_files(self.path)
        coders: dict[str, Coder] = {}

        def coder_called(name: str) -> Coder:
            if name not in coders:
                coder = load_coder(name, self.device)
                need_trained(coder, name, "decode")
                check_tile(coder, self.tile)
                coders[name] = coder
                if self.steps is not None and coder.walk("decode") is None:
                    note(f"{name} decodes in one pass, so --steps changes nothing")
            return coders[name]

        if self.model is not None:  # refused before any file is read
            coder_called(self.model)
        if self.path.is_dir():
            note_passed_over(self.path, files)
        make_output(self.out)

        def work(file: Path) -> None:
            held = LatentFile.read(file)
            name = self.model or held.coder
            image = self._decode(in_tiles(coder_called(name), self.tile, held.size), held, name, file.stem)
            out = self.out / f"{file.stem}.png"
            write_image(crop(image, held.size), out)
            say(f"{out}: {held.size[1]} x {held.size[0]} pixels")

        return for_each(files, work, batch=self.path.is_dir())

    @torch.no_grad()
    def _decode(self, coder: Coder, held: LatentFile, name: str, image_name: str) -> Tensor:
        if differ := coder.spec.differences(held.spec):
            raise RacError(
                f"a latent of {name} has {'; '.join(differ)}; decode with {held.coder}, which made it, or with a coder "
                "that was trained on its latents"
            )
        latent = held.latent.to(pick_device(self.device))
        noise = coder.noise_of(latent, (image_name,), self.rng_seed)
        if coder.walk("decode") is None:
            return coder.decode(latent, noise=noise)
        solver = self.solver or held.solver or "euler"
        if solver not in SOLVERS:
            raise RacError(
                f"the latent was made with the unknown solver {solver!r}; give --solver {' or '.join(SOLVERS)}"
            )
        return coder.decode(latent, held.steps if self.steps is None else self.steps, SOLVERS[solver], noise=noise)


def _latent_files(path: Path) -> list[Path]:
    if not path.is_dir():
        return [path]
    files = sorted(path.glob("*.safetensors"))
    if not files:
        raise RacError(f"{path} holds no .safetensors files; give one that `rac encode` wrote, or a folder of them")
    return files
