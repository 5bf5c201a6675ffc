"""Finding pictures: in folders, tar shards and data sets, and the photographs that scikit-image ships.

A collection is a few dozen bytes a picture: names, and where to read. Any picture can be read without the others.
"""

from __future__ import annotations

import hashlib
import importlib.util
import itertools
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Protocol, overload

import numpy as np
from numpy.typing import NDArray

from ..errors import RacError
from ..images import PICTURE_SUFFIXES
from .progress import Told, counting

# Photographs among scikit-image's files; drawings, stereo twins and thumbnails are left out. Few pictures make a
# poor lottery, so the ones to hold out (the first quarter) are chosen: an object, an animal, a street scene.
_PHOTOGRAPHS = (
    *("coffee.png", "chelsea.png", "motorcycle_left.png"),
    *("astronaut.png", "rocket.jpg", "hubble_deep_field.jpg", "retina.jpg", "ihc.png"),
    *("camera.png", "brick.png", "grass.png", "gravel.png", "moon.png", "coins.png"),
)


class Names(Sequence[str]):
    """Many names in little more memory than their letters take."""

    def __init__(self, letters: bytes) -> None:
        self.letters = letters
        """All names in UTF-8, a zero after each."""
        self._ends = np.flatnonzero(np.frombuffer(letters, np.uint8) == 0)

    @classmethod
    def of(cls, names: Iterable[str]) -> Names:
        """Hold `names`; those that are not Unicode (a file system allows that) come back as they were."""
        letters = bytearray()
        for name in names:
            letters += name.encode("utf-8", "surrogateescape") + b"\0"
        return cls(bytes(letters))

    def __len__(self) -> int:
        return len(self._ends)

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> list[str]: ...
    def __getitem__(self, index: int | slice) -> str | list[str]:
        if isinstance(index, slice):
            return [self[k] for k in range(len(self))[index]]
        return self.encoded(range(len(self))[index]).decode("utf-8", "surrogateescape")

    def encoded(self, index: int) -> bytes:
        """Name number `index`, at least 0, in UTF-8."""
        return self.letters[int(self._ends[index - 1]) + 1 if index else 0 : int(self._ends[index])]


class Source(Protocol):
    """One place that holds pictures: a folder, a tar shard, a data set."""

    @property
    def names(self) -> Names:
        """Names of its pictures: for messages and for ordering; they do not depend on where the source lies."""
        ...

    def label(self, index: int) -> str:
        """What a message calls picture `index`."""
        ...

    def trace(self, index: int) -> int:
        """What tells picture `index` from another of its name without reading it: its size, where that is known."""
        ...

    def read(self, index: int) -> bytes:
        """Its encoded bytes; any thread may ask. Raises `OSError`."""
        ...


@dataclass(frozen=True)
class Picture:
    """A picture somewhere, to be read when it is needed."""

    source: Source
    index: int

    @property
    def name(self) -> str:
        """Name for ordering; does not depend on where the collection lies."""
        return self.source.names[self.index]

    @property
    def label(self) -> str:
        """Name for messages: says which shard it is in."""
        return self.source.label(self.index)

    def read(self) -> bytes:
        """The encoded bytes; any thread may ask. Raises `OSError`."""
        return self.source.read(self.index)


class Pictures(Sequence[Picture]):
    """The pictures of several sources, in an order that looks random but depends on their names alone."""

    def __init__(self, sources: Sequence[Source], order: NDArray[np.int64] | None = None) -> None:
        self._sources = tuple(sources)
        self._starts = np.cumsum([0, *(len(source.names) for source in sources)])
        self._order = _order_of_digests(_digests(sources)) if order is None else order

    def __len__(self) -> int:
        return len(self._order)

    @overload
    def __getitem__(self, index: int) -> Picture: ...
    @overload
    def __getitem__(self, index: slice) -> Pictures: ...
    def __getitem__(self, index: int | slice) -> Picture | Pictures:
        if isinstance(index, slice):
            return Pictures(self._sources, self._order[index])
        number = int(self._order[index])
        place = int(np.searchsorted(self._starts, number, "right")) - 1
        return Picture(self._sources[place], number - int(self._starts[place]))

    def without(self, folders: Sequence[str]) -> Pictures:
        """Those that lie in none of these folders. Raises `RacError` for a folder that holds none of them."""
        parents = [set(PurePosixPath(picture.name).parts[:-1]) for picture in self]
        if missing := [folder for folder in folders if not any(folder in parts for parts in parents)]:
            raise RacError(f"no picture lies in the excluded folder(s) {', '.join(missing)}; give names of folders")
        kept = np.array([parts.isdisjoint(folders) for parts in parents])
        return Pictures(self._sources, self._order[kept])

    def fingerprint(self) -> str:
        """A hash of all names and traces, in their order."""
        digest = hashlib.sha256()
        for picture in self:
            digest.update(picture.source.names.encoded(picture.index))
            digest.update(b"\0%d\0" % picture.source.trace(picture.index))
        return digest.hexdigest()[:16]


def _digests(sources: Sequence[Source]) -> bytearray:
    digests = bytearray()
    for source in sources:
        for index in range(len(source.names)):
            digests += hashlib.sha256(source.names.encoded(index)).digest()
    return digests


def _order_of_digests(digests: bytearray) -> NDArray[np.int64]:
    """Places of 32-byte strings in their order, equal ones in the order they came."""
    words = np.frombuffer(digests, ">u8").reshape(-1, 4)
    return np.lexsort(words.T[::-1])


def find_pictures(paths: Sequence[Path], exclude: Sequence[str] = ()) -> Pictures:
    """All pictures under `paths`, in an order that looks random but depends on their names alone.

    Paths are folders of pictures (searched through), folders of tar shards, tar shards, brace patterns of such
    (`shards-{000..099}.tar`), single pictures, and Hugging Face data sets (`hf:PATH_OR_NAME:split:column`). Cutting
    the list anywhere gives fair samples (of every label), and the same ones everywhere. Without paths: scikit-image's
    photographs. Pictures in folders of a name in `exclude` are left out. Raises `RacError` if a path is missing,
    damaged, or holds no picture, and for an excluded folder that there is not.
    """
    if not paths:
        folder = photographs()
        return Pictures([folder], np.arange(len(folder.names)))
    with counting("finding pictures") as told:
        found = Pictures(list(_sources([one for path in paths for one in _expanded(path.expanduser())], told)))
    return found.without(exclude) if exclude else found


def is_spelled(path: Path, *kinds: str) -> bool:
    """Whether `path` is no path but begins with one of `kinds` and a colon."""
    return str(path).startswith(tuple(f"{kind}:" for kind in kinds))


class Folder:
    """A folder of picture files, or some of them."""

    def __init__(self, path: Path, names: Names) -> None:
        self.path = path
        self.names = names

    @classmethod
    def search(cls, path: Path) -> Folder:
        """All pictures in the folder `path` and below."""
        found = (Path(folder, name) for folder, _, files in os.walk(path) for name in files if is_picture(name))
        return cls(path, Names.of(file.relative_to(path).as_posix() for file in found if file.is_file()))

    def label(self, index: int) -> str:
        """See `Source`."""
        return self.names[index]

    def trace(self, index: int) -> int:
        """See `Source`."""
        return (self.path / self.names[index]).stat().st_size

    def read(self, index: int) -> bytes:
        """See `Source`."""
        return (self.path / self.names[index]).read_bytes()


def is_picture(name: str) -> bool:
    """Whether a file of this name is taken for a picture."""
    pure = PurePosixPath(name)
    return pure.suffix.lower() in PICTURE_SUFFIXES and not pure.name.startswith(".")


def _sources(paths: Sequence[Path], told: Told) -> Iterator[Source]:
    total = 0
    for path in paths:
        found = _sources_in(path, partial(_beyond, told, total))
        if not any(source.names for source in found):
            raise RacError(f"{path} holds no pictures; looked for {' '.join(PICTURE_SUFFIXES)}, and tar files of them")
        total += sum(len(source.names) for source in found)
        told(total)
        yield from found


def _beyond(told: Told, before: int, done: int) -> None:
    told(before + done)


def _sources_in(path: Path, told: Callable[[int], None]) -> list[Source]:
    from .tars import Tar

    if is_spelled(path, "hf"):
        from .datasets import Rows

        return [Rows.open(str(path))]
    if path.is_dir():
        folder = Folder.search(path)
        return [folder] if folder.names else [Tar.open(tar, told) for tar in sorted(path.rglob("*.tar"))]
    if not path.is_file():
        raise RacError(_why_not(path))
    if is_picture(path.name):
        return [Folder(path.parent, Names.of([path.name]))]
    return [Tar.open(path, told)]


def _why_not(path: Path) -> str:
    if is_spelled(path, "hf-stream"):
        return f"{path} can only be read from its beginning on; give it alone, and to train on, or give hf:... instead"
    if re.match(r"[A-Za-z][\w+.-]+:/?", str(path)):
        return f"{path} is not on this machine: crops are drawn in any order, from local files; download it first"
    if path.exists():
        return f"{path} is a pipe or a device, which can only be read from its beginning on; give files"
    return f"{path} does not exist; give folders of images or tar files of images"


_BRACES = re.compile(r"\{([^{}]*)\}")


def _expanded(path: Path) -> list[Path]:
    """`path`, or what its braces stand for: {000..099} numbers of one width, {a,b,c} words."""
    pieces = _BRACES.split(str(path))
    if len(pieces) == 1 or path.exists():
        return [path]
    choices = [[piece] if number % 2 == 0 else _choices(piece, path) for number, piece in enumerate(pieces)]
    return [Path("".join(chosen)) for chosen in itertools.product(*choices)]


def _choices(inside: str, path: Path) -> list[str]:
    span = re.fullmatch(r"(\d+)\.\.(\d+)", inside)
    if span and int(span[1]) <= int(span[2]):
        width = len(span[1]) if span[1].startswith("0") else 0
        return [str(number).zfill(width) for number in range(int(span[1]), int(span[2]) + 1)]
    if not span and "," in inside:
        return inside.split(",")
    raise RacError(f"{{{inside}}} in {path} stands for nothing; write {{000..099}}, from low to high, or {{a,b,c}}")


def photographs() -> Folder:
    """scikit-image's photographs. Raises `RacError` where it is not installed."""
    spec = importlib.util.find_spec("skimage")
    if spec is None or not spec.submodule_search_locations:
        raise RacError(
            "no images were given, and scikit-image, whose photographs would do, is not installed; "
            "pip install 'rectified-auto-coder[photos]', or give a folder of images"
        )
    folder = Path(spec.submodule_search_locations[0]) / "data"
    found = Names.of(name for name in _PHOTOGRAPHS if (folder / name).is_file())
    if not found:
        raise RacError(f"{folder} holds none of scikit-image's photographs; reinstall it, or give a folder of images")
    return Folder(folder, found)
