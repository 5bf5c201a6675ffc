"""What the verbs share: loading coders, going through a folder, printing."""

from __future__ import annotations

import os
import shutil
import sys
import textwrap
from collections.abc import Callable, Sequence
from contextlib import closing
from functools import lru_cache
from pathlib import Path
from typing import TypeVar

from .. import hub
from ..coders.protocol import Coder, Way
from ..coders.tiling import TILE, exact, tiled
from ..errors import RacError, out_of_memory
from ..progress import watched
from ..report.document import Table
from ..report.terminal import LEAST_WIDTH, table_text
from ..runtime import pick_device

DEFAULT_CODER = "rac-256"
"""The shipped coder that a verb takes if none is named."""

LARGE = 2048 * 2048
"""Pixels of an image above which coders work in tiles where nothing else is asked."""

WIDTH = 240
"""Width of tables where the output is no terminal: wide enough for all of ours."""

C = TypeVar("C", bound=Coder)


def load_coder(name: str, device: str) -> Coder:
    """The coder called `name`, on the device called `device`. Raises `RacError`."""
    coder = hub.load(name)
    coder.to(pick_device(device))
    return coder


def in_tiles(coder: C, tile: int | None, size: tuple[int, int]) -> C:
    """`coder` for an image of height and width `size`: in tiles of `tile` pixels, or whole for 0.

    None chooses: tiles for large images. A RAC stays one. Raises `RacError` for a tile that does not fit the coder.
    """
    if tile == 0 or (tile is None and size[0] * size[1] <= LARGE):
        return coder
    factor = coder.spec.factor
    return _in_tiles(coder, tile or -(-TILE // factor) * factor)


@lru_cache(maxsize=8)
def _in_tiles(coder: C, tile: int) -> C:
    pieces = tiled(coder, tile)
    if not exact(pieces):
        note(
            f"a {type(coder).__name__} looks at the whole image, so its tiles of {tile} pixels are blended and differ "
            "a little from it; --tile 0 works on the whole, --tile with a larger number differs less"
        )
    return pieces


def need_flow(coder: Coder, name: str, *ways: Way) -> None:
    """Raises `RacError` unless the coder called `name` walks a flow for these ways."""
    for way in ways:
        if coder.walk(way) is None:
            raise RacError(
                f"{name} is a {type(coder).__name__}, which {way}s at once and has no flow; give a coder that has one, "
                f"such as {DEFAULT_CODER}"
            )


def need_trained(coder: Coder, name: str, way: Way) -> None:
    """Raises `RacError` unless the coder called `name` was trained for this way."""
    if way not in coder.trained_ways:
        other = " and ".join(sorted(coder.trained_ways))
        mend = f"; {way} with its teacher {coder.teacher}" if coder.teacher else ""
        raise RacError(f"{name} was trained to {other} only, and does not {way} to anything of use{mend}")


def load_teacher(coder: Coder, device: str) -> Coder | None:
    """Returns the teacher that `coder` names, or None where it names none; prints a note if it cannot be loaded."""
    if coder.teacher is None:
        return None
    try:
        return load_coder(coder.teacher, device)
    except RacError as error:
        note(f"going on without the teacher: {error}")
        return None


def for_each(files: Sequence[Path], work: Callable[[Path], object], batch: bool) -> int:
    """Do `work` for each file; the exit code. Errors name the file.

    In a batch no file stops the others, whether it is damaged, cannot be read, is too large for the memory or has a
    name that cannot be written: all failures are listed at the end, and the code is 1, or 2 where nothing was done. A
    single file's error is raised.
    """
    failures: list[str] = []
    with closing(watched(files, lambda file: file.name)) as shown:
        for file in shown:
            try:
                work(file)
            except BrokenPipeError:  # the reader of this output has gone, which is no fault of the file
                raise
            except (RacError, OSError, MemoryError, UnicodeError, RuntimeError) as error:
                reason = _reason(error)
                message = reason if file.name in reason else f"{file}: {reason}"
                if not batch:
                    raise RacError(message) from error
                failures.append(message)
    if failures:
        note(f"{len(failures)} of {len(files)} files failed:")
        for failure in failures:
            print(f"  {failure}", file=sys.stderr)
    return 0 if not failures else 1 if len(failures) < len(files) else 2


def _reason(error: Exception) -> str:
    """Says in one line what went wrong with a file. Raises the error itself if it is a fault of the program."""
    if isinstance(error, RacError):
        return str(error)
    if out_of_memory(error):
        return "out of memory; take tiles (--tile), a smaller image (--size) or another device"
    if isinstance(error, OSError):
        return f"{error.strerror or error}; check the file and its permissions"
    if isinstance(error, UnicodeError):
        return f"a name cannot be written in this encoding ({error}); rename the file, or set PYTHONUTF8=1"
    raise error


def show(table: Table, title: str = "") -> None:
    """Print a table to stdout: as records where a terminal is too narrow for it, on wide lines if it is no terminal."""
    terminal = sys.stdout.isatty()
    width = shutil.get_terminal_size().columns if terminal else WIDTH
    if title:
        title = "\n".join(textwrap.wrap(title, max(width, LEAST_WIDTH)))
        print(f"\033[1m{title}\033[0m" if terminal and "NO_COLOR" not in os.environ else title)
    print(table_text(table, width), end="")


def note(line: str) -> None:
    """One line on stderr."""
    print(f"rac: {line}", file=sys.stderr, flush=True)
