"""Writing files completely or not at all, and explaining in one line why the system refused."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from .errors import RacError

MARKER = ".rac-output"
"""Name of the file that marks a folder of results; a search for pictures skips such folders."""
try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]


def write_bytes(path: str | os.PathLike[str], data: bytes, error: type[RacError] = RacError) -> None:
    """Writes `data` to `path`, completely or not at all.

    The bytes go to a temporary sibling that then takes the name, so a full disk or Ctrl-C leaves neither half a
    file nor a damaged older one. Raises `error` if the system refuses.
    """
    path = Path(path)
    with explained(path, error):
        _write_and_rename(path, data)


def cache_folder(kind: str) -> Path | None:
    """Returns the cache folder for files of one `kind`, which can be made again; None if there is no home directory.

    It lies in RAC_CACHE_DIR or, without that, in `rac` in XDG_CACHE_HOME or ~/.cache. It need not exist, and writing to
    it may fail: callers then go on without a cache.
    """
    given = os.environ.get("RAC_CACHE_DIR")
    base = given or os.path.join(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "rac")
    try:
        return Path(base).expanduser() / kind
    except RuntimeError:  # no HOME, and a user without an entry, as in containers
        return None


def make_folder(path: str | os.PathLike[str], error: type[RacError] = RacError) -> Path:
    """Creates the folder `path` with its parents, unless it exists. Raises `error` if the system refuses."""
    path = Path(path)
    with explained(path, error):
        path.mkdir(parents=True, exist_ok=True)
    return path


def make_output(path: str | os.PathLike[str]) -> Path:
    """Creates the folder `path` for results, with its parents, and marks it, so that a search for pictures skips it.

    A folder that holds other files already is left unmarked; `check_output` covers that case. Raises `RacError` if the
    system refuses.
    """
    folder = make_folder(home_expanded(path))
    if not any(folder.iterdir()):
        write_bytes(folder / MARKER, b"The files in this folder were written by rac; searches for pictures skip it.\n")
    return folder


def check_output(path: str | os.PathLike[str], searched: Sequence[Path]) -> None:
    """Raises `RacError` if results in the folder `path` would be found by a search for pictures in `searched`.

    They would be if it lies in one of these folders and holds files that rac did not write.
    """
    folder = home_expanded(path)
    if not folder.is_dir() or (folder / MARKER).exists() or not any(folder.iterdir()):
        return
    for other in searched:
        if folder.resolve().is_relative_to(home_expanded(other).resolve()):
            raise RacError(
                f"{folder} holds other files and lies in {other}, which is searched for pictures: results in it would "
                f"count as more pictures; choose a new folder, or one outside {other}"
            )


def home_expanded(path: str | os.PathLike[str]) -> Path:
    """Returns `path` with ~ replaced by the home folder.

    Raises `RacError` if there is no home folder, as in some containers.
    """
    try:
        return Path(path).expanduser()
    except RuntimeError:
        raise RacError(f"the home folder in {path} is not known; set HOME, or write the whole path") from None


def disk_full(error: OSError) -> bool:
    """Returns whether the system refused to write because the disk, or the user's share of it, is full."""
    return error.errno in (errno.ENOSPC, errno.EDQUOT)


@contextmanager
def explained(path: Path, error: type[RacError] = RacError) -> Iterator[None]:
    """Turns the system's refusal to write `path`, within the block, into one `error` that says how to mend it."""
    try:
        yield
    except OSError as refusal:
        raise error(f"cannot write {path}: {_reason(path, refusal)}") from refusal


@contextmanager
def locked(folder: Path, refusal: str) -> Iterator[None]:
    """Locks `folder` against other processes that call this, until the block or this process ends.

    Nothing is written. Raises `RacError` with the text `refusal` if another process holds the lock. Where the system
    knows no such lock (Windows, some network disks), the block runs without.
    """
    handle = None
    try:
        if fcntl is not None:
            handle = os.open(folder, os.O_RDONLY)
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise RacError(refusal) from None
            except OSError:
                pass
        yield
    finally:
        if handle is not None:
            os.close(handle)


def _write_and_rename(path: Path, data: bytes) -> None:
    # Not tempfile: its files are private to the user (0600) and would stay so after the renaming.
    # Of the name only so much that the longest names do not become too long.
    temporary = path.with_name(f".{path.name[:40]}.{hash(path.name) % 2**32:08x}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        # Still there only when something above failed, Ctrl-C included.
        if os.path.lexists(temporary):
            os.unlink(temporary)


def _reason(path: Path, refusal: OSError) -> str:
    if isinstance(refusal, PermissionError) or refusal.errno == errno.EROFS:
        return f"no permission to write in {path.parent}; choose another folder or change its permissions"
    if disk_full(refusal):
        return "the disk is full; free some space or choose another folder"
    if isinstance(refusal, FileNotFoundError) and not path.parent.exists():
        return f"the folder {path.parent} does not exist; create it first"
    if isinstance(refusal, (NotADirectoryError, FileExistsError)):
        return "there is a file where a folder is needed; choose another folder"
    if isinstance(refusal, IsADirectoryError):
        return "there is a folder of that name; choose another name"
    return f"{refusal.strerror or refusal}; choose another folder"
