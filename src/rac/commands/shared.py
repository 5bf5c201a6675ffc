"""What the verbs share: loading coders, going through a folder, printing."""

from __future__ import annotations

import os
import re
import shutil
import sys
import textwrap
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from functools import lru_cache
from pathlib import Path
from typing import TypeVar

from .. import hub
from ..coders import tiling
from ..coders.protocol import Coder, Way
from ..coders.tiling import TILE, exact, tiled
from ..errors import RacError, out_of_memory, printable
from ..files import disk_full
from ..progress import watched
from ..report.document import Table
from ..report.terminal import LEAST_WIDTH, table_text
from ..runtime import pick_device

DEFAULT_CODER = "rac-256"
"""The shipped coder that a verb takes if none is named."""

LARGE = 2048 * 2048
"""Pixels of an image above which coders work in tiles where nothing else is asked."""

WIDTH = 240
"""Width of tables where the output is not a terminal: wide enough for all of ours."""

C = TypeVar("C", bound=Coder)


def part_of(text: str) -> tuple[int, int]:
    """Returns (k, n) of a share written as "k/n", of work that n processes divide. Raises `RacError`."""
    found = re.fullmatch(r"(\d{1,6})/(\d{1,6})", text)
    if not found or int(found[1]) >= int(found[2]):
        raise RacError(f"part {text!r} must be k/n with k from 0 to n - 1, such as 0/4")
    return int(found[1]), int(found[2])


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


def check_tile(coder: Coder, tile: int | None) -> None:
    """Raises `RacError` unless `coder` can work in tiles of this side; 0 and None always suit."""
    if tile:
        tiling.check_tile(coder, tile)


@lru_cache(maxsize=8)
def _in_tiles(coder: C, tile: int) -> C:
    pieces = tiled(coder, tile)
    if not exact(pieces):
        note(
            f"a {type(coder).__name__} looks at the whole image, so tiles of {tile} pixels, which are blended, change "
            "the result a little; a larger --tile changes it less, --tile 0 not at all"
        )
    return pieces


def need_flow(coder: Coder, name: str, *ways: Way) -> None:
    """Raises `RacError` unless the coder called `name` walks a flow for these ways."""
    for way in ways:
        if coder.walk(way) is None:
            raise RacError(
                f"{name} is a {type(coder).__name__}, which {way}s in one pass, without a flow; give a coder with a "
                f"flow, such as {DEFAULT_CODER}"
            )


def need_trained(coder: Coder, name: str, way: Way) -> None:
    """Raises `RacError` unless the coder called `name` was trained for this way."""
    if way not in coder.trained_ways:
        other = " and ".join(sorted(coder.trained_ways))
        mend = f"{way} with its teacher {coder.teacher}" if coder.teacher else f"choose another coder to {way}"
        raise RacError(f"{name} was trained to {other} only; {mend}")


def load_teacher(coder: Coder, device: str) -> Coder | None:
    """Returns the teacher that `coder` names, or None where it names none; prints a note if it cannot be loaded."""
    if coder.teacher is None:
        return None
    try:
        return load_coder(coder.teacher, device)
    except RacError as error:
        note(f"continuing without the teacher: {error}")
        return None


def note_passed_over(folder: Path, taken: Sequence[Path]) -> None:
    """Prints a note of what is in `folder` beside the files `taken`, hidden files apart, counted by kind."""
    files = set(taken)
    others = [entry for entry in folder.iterdir() if entry not in files and not entry.name.startswith(".")]
    kinds = Counter("folder" if entry.is_dir() else f"{entry.suffix.lower()} file".strip() for entry in others)
    if kinds:
        counted = (f"{count:,} {kind}{'s' if count > 1 else ''}" for kind, count in sorted(kinds.items()))
        note(f"{folder}: passed over {', '.join(counted)}")


def for_each(files: Sequence[Path], work: Callable[[Path], object], batch: bool) -> int:
    """Do `work` for each file; the exit code. Errors name the file.

    In a batch no file stops the others, whether it is damaged, cannot be read, is too large for the memory or has a
    name that cannot be written: all failures are listed at the end, and the code is 1, or 2 where nothing was done. A
    single file's error is raised.
    """
    failures: dict[Path, str] = {}
    with closing(watched(files, lambda file: file.name)) as shown:
        for file in shown:
            try:
                work(file)
            except BrokenPipeError:  # the reader of this output has gone, which is no fault of the file
                raise
            except (RacError, OSError, MemoryError, UnicodeError, RuntimeError) as error:
                if isinstance(error, OSError) and disk_full(error):  # no line can be printed any more
                    raise
                failures[file] = _reason(error)
                if not batch:
                    raise RacError(_with_name(file, failures[file])) from error
    if failures:
        _list_failures(failures, len(files))
    return 0 if not failures else 1 if len(failures) < len(files) else 2


def _list_failures(failures: Mapping[Path, str], total: int) -> None:
    reasons = set(failures.values())
    if len(failures) > 1 and len(reasons) == 1:  # such as an option that suits none of the files
        note(f"{len(failures)} of {total} files failed, all for the same reason: {reasons.pop()}")
        return
    note(f"{len(failures)} of {total} files failed:")
    for file, reason in failures.items():
        print(f"  {printable(_with_name(file, reason))}", file=sys.stderr)


def _with_name(file: Path, reason: str) -> str:
    return reason if file.name in reason else f"{file}: {reason}"


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
    """Print a table to stdout: as records where a terminal is too narrow for it, on wide lines elsewhere."""
    terminal = sys.stdout.isatty()
    width = shutil.get_terminal_size().columns if terminal else WIDTH
    if title:
        title = "\n".join(textwrap.wrap(printable(title), max(width, LEAST_WIDTH)))
        print(f"\033[1m{title}\033[0m" if terminal and "NO_COLOR" not in os.environ else title)
    print(table_text(table, width), end="")


def say(line: str) -> None:
    """Prints one line on stdout."""
    print(printable(line))


def note(line: str) -> None:
    """Prints one line on stderr."""
    print(f"rac: {printable(line)}", file=sys.stderr, flush=True)
