"""Tar shards: an index of where each picture begins, found once and kept."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import tarfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import numpy as np
import safetensors.numpy
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from ..errors import RacError
from ..files import cache_folder, make_folder, write_bytes
from ..images import is_picture
from .pictures import Names, folder_class

WORTH_KEEPING = 1_000
"""Least number of pictures for which an index is kept: fewer are found again quickly."""

_FORMAT = 2

TAR_SUFFIX = ".tar"
"""Suffix, in lower case, of the files that count as tar files where a folder is searched."""

_Index = dict[str, NDArray[Any]]
"""Arrays of an index: `letters` of `Names` (uint8), offsets and sizes of the pictures in the file in bytes (int64)."""


def is_tar(name: str) -> bool:
    """Returns whether a file of this name counts as a tar file: by its suffix, in any case, and not hidden."""
    pure = PurePosixPath(name)
    return pure.suffix.lower() == TAR_SUFFIX and not pure.name.startswith(".")


class Tar:
    """An uncompressed tar file of pictures, in webdataset's layout or any other; other members are skipped."""

    def __init__(self, path: Path, index: _Index) -> None:
        self.path = path
        self.names = Names(index["names"].tobytes())
        self._offsets = index["offsets"]
        self._sizes = index["sizes"]
        self.identity = (path.stat().st_dev, path.stat().st_ino)
        """Distinguishes the file from others, whatever it is called."""

    @classmethod
    def open(cls, path: Path, progress: Callable[[int], None] = lambda done: None) -> Tar:
        """Finds the pictures of `path`, or reads an index kept earlier; `progress` is called with their number so far.

        The index is kept in RAC_CACHE_DIR (by default ~/.cache/rac), where there is such a folder, and made anew when
        the file was changed or replaced. Raises `RacError` for a file that is not a tar file, compressed, cut short, or
        damaged between members.
        """
        try:
            stat = path.stat()
            # The time of change cannot be set back, as that of modification can.
            made_of = json.dumps([_FORMAT, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino])
            kept = _index_file(path)
            found = None if kept is None else _read_index(kept, made_of)
            if found is None:
                found = _scan(path, progress)
                _keep_index(kept, found, made_of)
        except (tarfile.TarError, OSError, EOFError, ValueError) as error:
            raise RacError(
                f"{path} cannot be read as a tar file ({error}); give an uncompressed, complete .tar, or a folder"
            ) from None
        return cls(path, found)

    def describe(self, index: int) -> str:
        """Returns the member's name, and the file that it is in."""
        return f"{self.names[index]} in {self.path}"

    def size_hint(self, index: int) -> int:
        """Returns the member's size in bytes."""
        return int(self._sizes[index])

    def class_of(self, index: int) -> str | None:
        """Returns the name of the folder directly above the member in the tar file; None for members in none."""
        return folder_class(self.names[index])

    def read(self, index: int) -> bytes:
        """Returns the encoded bytes of picture `index`. Raises `OSError`."""
        with open(self.path, "rb") as file:
            file.seek(int(self._offsets[index]))
            return file.read(int(self._sizes[index]))


class _Member(NamedTuple):
    name: str
    offset: int
    size: int


def _scan(path: Path, progress: Callable[[int], None]) -> _Index:
    found: list[_Member] = []
    with _header():
        tar = tarfile.open(path, "r:")  # noqa: SIM115  # which reads the first header
    with tar:
        for _, sample in itertools.groupby(_pictures(tar), key=lambda member: _key(member.name)):
            found += _plain(list(sample))
            if len(found) % 100 == 0:
                progress(len(found))
        _check_end(tar, path)
    return {
        "names": np.frombuffer(Names.of(member.name for member in found).letters, np.uint8),
        "offsets": np.array([member.offset for member in found], np.int64),
        "sizes": np.array([member.size for member in found], np.int64),
    }


def _pictures(tar: tarfile.TarFile) -> Iterator[_Member]:
    end = 0
    while True:
        with _header():
            member = tar.next()
        if member is None:
            return
        if tar.offset <= end:  # a size below zero, by which tarfile goes back, and round for ever
            raise tarfile.ReadError(f"the member at byte {member.offset:,} has a negative size")
        end = tar.offset
        if member.isfile() and not member.issparse() and is_picture(member.name):
            # A zero would end the name early where names are kept.
            yield _Member(member.name.replace("\0", "?"), member.offset_data, member.size)
        tar.members = []  # type: ignore[attr-defined]  # tarfile remembers every member, half a kilobyte each


@contextmanager
def _header() -> Iterator[None]:
    """Turns whatever tarfile raises on a damaged header, MemoryError among it, into its own error."""
    try:
        yield
    except (tarfile.TarError, OSError):
        raise
    except Exception as error:
        raise tarfile.ReadError(f"damaged header: {str(error) or type(error).__name__}") from error


def _key(name: str) -> str:
    """Returns webdataset's key of a member, shared by one sample: all before the first dot of the last part."""
    pure = PurePosixPath(name)
    return (pure.parent / pure.name.split(".")[0]).as_posix()


def _plain(sample: list[_Member]) -> Iterable[_Member]:
    """Returns the pictures of a sample: of 7.jpg and 7.depth.png the first.

    The suffix of the second says more than its kind.
    """
    plain = [member for member in sample if PurePosixPath(member.name).name.count(".") == 1]
    return plain or sample


def _check_end(tar: tarfile.TarFile, path: Path) -> None:
    """Raises an error if anything but zeros follows the last member.

    tarfile stops without a word at a header it cannot read. A file cut exactly between two members cannot be told from
    one whose writer left the end mark out.
    """
    with open(path, "rb") as file:
        file.seek(tar.offset)
        if file.read(tarfile.BLOCKSIZE).strip(b"\0"):
            raise tarfile.ReadError(f"no member begins at byte {tar.offset:,}, where one should")


def _index_file(path: Path) -> Path | None:
    folder = cache_folder("tars")
    name = f"{hashlib.sha256(os.fsencode(path.resolve())).hexdigest()[:24]}.safetensors"
    return None if folder is None else folder / name


def _keep_index(kept: Path | None, found: _Index, made_of: str) -> None:
    if kept is None or len(found["offsets"]) < WORTH_KEEPING:
        return
    with suppress(RacError):  # an index is a convenience
        make_folder(kept.parent)
        write_bytes(kept, safetensors.numpy.save(found, {"made_of": made_of}))


def _read_index(kept: Path | None, made_of: str) -> _Index | None:
    if kept is None:
        return None
    try:
        with safe_open(kept, "np") as file:
            if (file.metadata() or {}).get("made_of") != made_of:
                return None
            return {name: file.get_tensor(name) for name in ("names", "offsets", "sizes")}
    except (SafetensorError, OSError, UnicodeError):
        return None
