"""`rac compare`: several coders under one protocol, side by side."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from ..errors import RacError
from ..evaluate.comparison import short_name
from .evaluation import EvaluationOptions


@dataclass(frozen=True)
class Command(EvaluationOptions):
    """Compare several coders on the same images: one table of quality, parameters, MACs and speed, and pictures.

    A coder with a flow has one row for each number of steps. Writes table.md, comparison.json, report.html with its
    pictures, and the result of each coder as `rac evaluate` does.
    """

    models: Annotated[tuple[str, ...], tyro.conf.Positional] = ()
    """The coders to compare, RACs or any diffusers VAEs: shipped names (see `rac models`), directories, or names on the
    hub."""
    out: Path = Path("compared")
    """Folder for the results; created if it does not exist."""

    def run(self) -> int:
        """Compare; the exit code. Raises `RacError`."""
        if not self.models:
            raise RacError("name the coders to compare, such as: rac compare rac-64 klvae-f8d4 --data PICTURES")
        return self.evaluate_all(self.models, self.out, " against ".join(short_name(name) for name in self.models))
