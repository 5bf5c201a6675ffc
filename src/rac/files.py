"""Writing files whole or not at all, and saying in one line why not."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .errors import RacError


def write_bytes(path: str | os.PathLike[str], data: bytes, error: type[RacError] = RacError) -> None:
    """Write `data` to `path`: complete, or not at all.

    The bytes go to a temporary sibling that then takes the name, so a full disk or Ctrl-C leaves neither half a
    file nor a damaged older one. Raises `error` where the system refuses.
    """
    path = Path(path)
    with explained(path, error):
        _write_and_rename(path, data)


def make_folder(path: str | os.PathLike[str], error: type[RacError] = RacError) -> Path:
    """Create the folder `path` with its parents, unless it is there. Raises `error` where refused."""
    path = Path(path)
    with explained(path, error):
        path.mkdir(parents=True, exist_ok=True)
    return path


@contextmanager
def explained(path: Path, error: type[RacError] = RacError) -> Iterator[None]:
    """Turn the system's refusal to write `path` into one `error` with the mend in it."""
    try:
        yield
    except OSError as refusal:
        raise error(f"cannot write {path}: {_reason(path, refusal)}") from refusal


def _write_and_rename(path: Path, data: bytes) -> None:
    # Not tempfile: its files are private to the user (0600) and would stay so after the renaming.
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
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
    if refusal.errno in (errno.ENOSPC, errno.EDQUOT):
        return "the disk is full; free some space or choose another folder"
    if isinstance(refusal, FileNotFoundError) and not path.parent.exists():
        return f"the folder {path.parent} does not exist; create it first"
    if isinstance(refusal, (NotADirectoryError, FileExistsError)):
        return "a file stands where a folder is needed; choose another folder"
    if isinstance(refusal, IsADirectoryError):
        return "a folder of that name is there; choose another name"
    return f"{refusal.strerror or refusal}; choose another folder"
