"""`rac weights`: the weight files that metrics and perceptual terms ask for."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from ..errors import RacError
from ..report.document import Table
from ..representations import WEIGHT_FILES
from ..representations.weight_files import VARIABLE, WeightFile, convert, located, sha256, weights_folder
from .shared import note, say, show


@dataclass(frozen=True)
class Command:
    """List the weight files of metrics and training: what needs each, whether it is there, and who publishes it.

    Nothing is downloaded. Put the published files, unchanged, into a folder, and give the folder with --convert.
    """

    convert: Path | None = None
    """Folder with published files; every weight file that can be made from them is written."""
    out: Path | None = None
    """Folder for the converted files. None: the folder of weights (environment variable RAC_WEIGHTS_DIR)."""

    def run(self) -> int:
        """Convert what is asked for, and list what is there; exit code 1 if there was nothing to convert."""
        folder = self.out or weights_folder()
        if folder is None:
            raise RacError(f"no home folder is known; give --out, or set the environment variable {VARIABLE}")
        made = [] if self.convert is None else _convert_all(self.convert.expanduser(), folder.expanduser())
        rows = tuple(_row(file, folder.expanduser()) for file in WEIGHT_FILES)
        show(Table(("file", "for", "found", "SHA-256", "made of"), rows), f"looked for in {folder}")
        if self.convert is not None and not made:
            note(f"nothing in {self.convert} can be converted; the last column of the table names the files that can")
            return 1
        return 0


def _convert_all(source: Path, target: Path) -> list[Path]:
    if not source.is_dir():
        raise RacError(f"{source} is not a folder; give the folder of the published files")
    made: dict[Path, None] = {}
    for file in WEIGHT_FILES:
        if target / file.names[0] in made:
            continue
        for path in filter(None, (published.find(source) for published in file.published)):
            _check_name(path)
        if (written := convert(file, source, target)) is not None:
            made[written] = None
            say(str(written))
    return list(made)


def _check_name(path: Path) -> None:
    """Warn if a file's name promises another SHA-256."""
    promised = re.search(r"-([0-9a-f]{8})\.pth$", path.name)
    if promised and not (digest := sha256(path)).startswith(promised[1]):
        note(
            f"{path.name} has a SHA-256 that begins with {digest[:8]}: it is damaged, or a different file of the same "
            "name"
        )


def _row(file: WeightFile, folder: Path) -> tuple[str, ...]:
    path = located(file, folder)
    made_of = "; ".join(f"{published.names[0]} ({published.source})" for published in file.published)
    found = ("no", "-") if path is None else (path.name, sha256(path)[:16])
    return (file.names[0], file.purpose, *found, made_of)
