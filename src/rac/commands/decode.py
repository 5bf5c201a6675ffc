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
from .shared import for_each, in_tiles, load_coder, need_trained, note


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
    """Steps of the flow. None: as many as it was encoded with."""
    solver: SolverName | None = None
    """Solver of the flow. None: the one used for encoding."""
    tile: int | None = None
    """Work in tiles of this side, in less memory: exact for coders of plain convolutions, such as rac-64,
    blended for others. 0: whole. None: tiles of 1024 for images above 2048 x 2048."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1 or mps."""

    def run(self) -> int:
        """Decode; the exit code. Raises `RacError` if nothing could be done."""
        if self.steps is not None:
            check_steps(self.steps)
        files = _latent_files(self.path)
        make_output(self.out)
        coders: dict[str, Coder] = {}

        def work(file: Path) -> None:
            held = LatentFile.read(file)
            name = self.model or held.coder
            if name not in coders:
                coders[name] = load_coder(name, self.device)
                need_trained(coders[name], name, "decode")
                if self.steps is not None and coders[name].walk("decode") is None:
                    note(f"{name} decodes at once, so --steps changes nothing")
            image = self._decode(in_tiles(coders[name], self.tile, held.size), held, name)
            out = self.out / f"{file.stem}.png"
            write_image(crop(image, held.size), out)
            print(f"{out}: {held.size[1]} x {held.size[0]} pixels")

        return for_each(files, work, batch=self.path.is_dir())

    @torch.no_grad()
    def _decode(self, coder: Coder, held: LatentFile, name: str) -> Tensor:
        if differ := coder.spec.differences(held.spec):
            raise RacError(
                f"a latent of {name} has {'; '.join(differ)}; decode with {held.coder}, which made it, or with a coder "
                "that was trained on its latents"
            )
        latent = held.latent.to(pick_device(self.device))
        if coder.walk("decode") is None:
            return coder.decode(latent)
        solver = self.solver or held.solver or "euler"
        if solver not in SOLVERS:
            raise RacError(
                f"the latent was made with the unknown solver {solver!r}; give --solver {' or '.join(SOLVERS)}"
            )
        return coder.decode(latent, held.steps if self.steps is None else self.steps, SOLVERS[solver])


def _latent_files(path: Path) -> list[Path]:
    if not path.is_dir():
        return [path]
    files = sorted(path.glob("*.safetensors"))
    if not files:
        raise RacError(f"{path} holds no .safetensors files; give one that `rac encode` wrote, or a folder of them")
    return files
