"""Finding pictures: in folders, tar shards and data sets, and the photographs that scikit-image ships."""

from __future__ import annotations

import importlib.util
import itertools
import math
import os
import re
import stat
import warnings
from array import array
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path, PurePosixPath

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ..errors import RacError, install_extra
from ..files import MARKER, home_expanded
from ..images import PICTURE_SUFFIXES, is_picture
from ..progress import ProgressFn, counting
from .datasets import Rows, check_apart
from .pictures import Names, Pictures, Source, folder_class
from .tars import Tar

# Photographs among scikit-image's files; drawings, stereo twins and thumbnails are left out. Few pictures make a
# poor lottery, so the ones to hold out (the first quarter) are chosen: an object, an animal, a street scene.
_PHOTOGRAPHS = (
    *("coffee.png", "chelsea.png", "motorcycle_left.png"),
    *("astronaut.png", "rocket.jpg", "hubble_deep_field.jpg", "retina.jpg", "ihc.png"),
    *("camera.png", "brick.png", "grass.png", "gravel.png", "moon.png", "coins.png"),
)


def find_pictures(paths: Sequence[Path]) -> Pictures:
    """Finds all pictures under `paths`, each once, in an order that looks random but depends on their names alone.

    Paths are folders of pictures (searched through, linked folders too), folders of tar shards, tar shards, brace
    patterns of such (`shards-{000..099}.tar`), single pictures, and Hugging Face data sets
    (`hf:PATH_OR_NAME:split:column`). Where paths overlap a file still counts once. Cutting the list anywhere gives fair
    samples of every class, and the same ones everywhere. Without paths: scikit-image's photographs. A warning says what
    a search skipped: folders that rac wrote, folders that cannot be read, tar files beside pictures, pictures of
    other formats. Raises `RacError` if a path is missing, damaged, or holds no picture.
    """
    if not paths:
        folder = photographs()
        return Pictures([folder], np.arange(len(folder.names)))
    with counting("finding pictures") as progress:
        found = list(_sources([one for path in paths for one in _expanded(home_expanded(path))], progress))
    return Pictures(_each_once(found))


def collection_name(paths: Sequence[Path]) -> str:
    """Returns a name for the pictures under `paths` in reports: the names of files and folders, even for "."."""
    names = [str(path) if has_scheme(path, "hf", "hf-stream") else _name(path) for path in paths]
    return ", ".join(names) or "scikit-image photographs"


def _name(path: Path) -> str:
    path = home_expanded(path)
    # ".." has a name of its own, but tells no more than "." does.
    return path.name if path.name not in ("", "..") else path.resolve().name or str(path.resolve())


def has_scheme(path: Path, *kinds: str) -> bool:
    """Returns whether `path` begins with one of `kinds` and a colon, and so is not a path of the file system."""
    return str(path).startswith(tuple(f"{kind}:" for kind in kinds))


class Folder:
    """A folder of picture files, or some of them."""

    def __init__(self, path: Path, names: Names, keys: NDArray[np.uint64] | None = None) -> None:
        self.path = path
        self.names = names
        self.keys = np.array([_key(os.stat(path / name)) for name in names], np.uint64) if keys is None else keys
        """Device, number on the device and size of each file, N 3; the first two identify a file."""
        self.keys = self.keys.reshape(-1, 3)

    @classmethod
    def search(cls, path: Path, passed: Counter[str], tars: list[Path] | None = None) -> Folder:
        """Finds all pictures in the folder `path` and below, and appends the tar files there to `tars`.

        `passed` counts what is skipped. Raises `RacError` if the folder itself cannot be read.
        """
        letters, keys = bytearray(), array("Q")
        for name, found in _walk(path, passed):
            if is_picture(name):
                letters += name.encode("utf-8", "surrogateescape") + b"\0"
                keys.extend(_key(found))
            elif tars is not None and name.lower().endswith(".tar"):
                tars.append(path / name)
            elif kind := _kind(name):
                passed[kind] += 1
        return cls(path, Names(bytes(letters)), np.frombuffer(keys, np.uint64).copy())

    def describe(self, index: int) -> str:
        """Returns the picture's path from the folder."""
        return self.names[index]

    def size_hint(self, index: int) -> int:
        """Returns the file's size in bytes, as of when the folder was searched."""
        return int(self.keys[index, 2])

    def class_of(self, index: int) -> str | None:
        """Returns the name of the folder directly above the picture; None for pictures directly in `path`."""
        return folder_class(self.names[index])

    def read(self, index: int) -> bytes:
        """Returns the encoded bytes of picture `index`. Raises `OSError`."""
        return (self.path / self.names[index]).read_bytes()

    def where(self, keep: NDArray[np.bool_]) -> Folder:
        """Returns a folder of the pictures that `keep` selects."""
        return Folder(self.path, Names.of(self.names[int(k)] for k in np.flatnonzero(keep)), self.keys[keep])


def _key(found: os.stat_result) -> tuple[int, int, int]:
    return found.st_dev % 2**64, found.st_ino % 2**64, found.st_size


def _walk(root: Path, passed: Counter[str]) -> Iterator[tuple[str, os.stat_result]]:
    """Yields every file in `root` and below, by its path from there; each folder once, linked ones after all others."""
    entered: set[tuple[int, int]] = set()
    waiting, linked = deque([""]), deque[str]()
    while waiting or linked:
        inner = waiting.popleft() if waiting else linked.popleft()
        try:
            own = os.stat(root / inner)
            if (own.st_dev, own.st_ino) in entered:
                continue
            entered.add((own.st_dev, own.st_ino))
            with os.scandir(root / inner) as entries:
                found = sorted(entries, key=lambda entry: entry.name)
        except OSError as error:
            if not inner:
                raise RacError(f"{root} cannot be read ({error.strerror or error}); check its permissions") from None
            passed["folder(s) that cannot be read"] += 1
            continue
        if inner and any(entry.name == MARKER for entry in found):
            passed["folder(s) that rac wrote"] += 1
            continue
        for entry in found:
            name = f"{inner}/{entry.name}" if inner else entry.name
            try:
                status = entry.stat()
            except OSError:  # a link to nothing, or to itself
                if is_picture(name):
                    passed["link(s) to nothing"] += 1
                continue
            if stat.S_ISDIR(status.st_mode):
                (linked if entry.is_symlink() else waiting).append(name)
            elif stat.S_ISREG(status.st_mode):
                yield name, status


_OTHER_PICTURES = {".heic", ".heif", ".jxl", ".svg", ".dng", ".cr2", ".cr3", ".nef", ".arw", ".raf", ".orf", ".rw2"}
"""Suffixes of pictures that Pillow does not read by itself: those of phones, and the raw files of cameras."""


def _kind(name: str) -> str | None:
    """Returns the word in warnings for a file that may hold a picture but is skipped here; None for other files."""
    pure = PurePosixPath(name)
    suffix = pure.suffix.lower()
    if pure.name.startswith("."):
        return None
    if re.search(r"\.(tar\.\w+|tgz|tbz2?|txz|zip)$", pure.name.lower()):
        return "compressed archive(s)"
    if suffix not in PICTURE_SUFFIXES and (suffix in Image.registered_extensions() or suffix in _OTHER_PICTURES):
        return f"{suffix} file(s)"
    return None


def _sources(paths: Sequence[Path], progress: ProgressFn) -> Iterator[Source]:
    total = 0
    for path in paths:
        passed: Counter[str] = Counter()
        found = _sources_in(path, partial(_beyond, progress, total), passed)
        over = ", ".join(f"{count:,} {kind}" for kind, count in sorted(passed.items()))
        if not any(source.names for source in found):
            raise RacError(
                f"{path} holds no pictures; looked for {' '.join(PICTURE_SUFFIXES)}, and tar files of them"
                + (f"; passed over {over}" if over else "")
            )
        if over:
            warnings.warn(f"{path}: passed over {over}", stacklevel=2)
        total += sum(len(source.names) for source in found)
        progress(total)
        yield from found


def _beyond(progress: ProgressFn, before: int, done: int) -> None:
    progress(before + done)


def _sources_in(path: Path, progress: Callable[[int], None], passed: Counter[str]) -> list[Source]:
    if has_scheme(path, "hf"):
        return [Rows.open(str(path))]
    if path.is_dir():
        tars: list[Path] = []
        folder = Folder.search(path, passed, tars)
        if not folder.names:
            return [Tar.open(tar, progress) for tar in sorted(tars)]
        if tars:
            passed["tar file(s) beside pictures"] += len(tars)
        return [folder]
    if not path.is_file():
        raise RacError(_why_not(path))
    if is_picture(path.name) or (path.suffix.lower() != ".tar" and _is_readable(path.name)):
        return [Folder(path.parent, Names.of([path.name]))]
    return [Tar.open(path, progress)]


def _is_readable(name: str) -> bool:
    """Returns whether Pillow knows the format of a name's suffix, so that a file named by itself can be tried."""
    return PurePosixPath(name).suffix.lower() in Image.registered_extensions()


def _each_once(sources: Sequence[Source]) -> list[Source]:
    """Returns the sources without the files that an earlier one holds too, or the same one under another name."""
    check_apart([source for source in sources if isinstance(source, Rows)])
    kept: list[Source] = []
    seen: set[object] = set()
    for source in sources:
        identity = source.identity if isinstance(source, (Tar, Rows)) else None
        if identity is None or identity not in seen:
            kept.append(source)
        seen.add(identity)
    folders = [source for source in kept if isinstance(source, Folder)]
    if not folders:
        return kept
    files = np.concatenate([folder.keys for folder in folders])[:, :2]
    _, first = np.unique(files, axis=0, return_index=True)
    if len(first) == len(files):
        return kept
    keep = np.zeros(len(files), bool)
    keep[first] = True
    parts = iter(np.split(keep, np.cumsum([len(folder.keys) for folder in folders])[:-1]))
    return [source.where(next(parts)) if isinstance(source, Folder) else source for source in kept]


def _why_not(path: Path) -> str:
    if has_scheme(path, "hf-stream"):
        return f"{path} can only be read in its own order, for training, and without other paths; give hf:... instead"
    if re.match(r"[A-Za-z][\w+.-]+:/?", str(path)):
        return f"{path} is not a local file, which random crops need; download it first"
    if path.exists():
        return f"{path} is a pipe or a device, which cannot be read in any order; give files"
    return f"{path} does not exist; give folders of images or tar files of images"


_MOST_NAMES = 1_000_000
"""Names that braces may stand for; a slip of a digit would otherwise fill the memory."""
_BRACES = re.compile(r"\{([^{}]*)\}")


def _expanded(path: Path) -> list[Path]:
    """Returns `path`, or the paths that its braces stand for: {000..099} numbers of one width, {a,b,c} words."""
    pieces = _BRACES.split(str(path))
    if len(pieces) == 1 or path.exists():
        return [path]
    choices = [[piece] if number % 2 == 0 else _choices(piece, path) for number, piece in enumerate(pieces)]
    if (count := math.prod(map(len, choices))) > _MOST_NAMES:
        raise _too_many(path, count)
    return [Path("".join(chosen)) for chosen in itertools.product(*choices)]


def _too_many(path: Path, count: int) -> RacError:
    return RacError(f"{path} expands to {count:,} names, more than {_MOST_NAMES:,}; give their folder")


def _choices(inside: str, path: Path) -> list[str]:
    span = re.fullmatch(r"(\d+)\.\.(\d+)", inside)
    if span and int(span[1]) <= int(span[2]):
        if (count := int(span[2]) - int(span[1]) + 1) > _MOST_NAMES:
            raise _too_many(path, count)
        width = len(span[1]) if span[1].startswith("0") else 0
        return [str(number).zfill(width) for number in range(int(span[1]), int(span[2]) + 1)]
    if not span and "," in inside:
        return inside.split(",")
    raise RacError(f"{{{inside}}} in {path} is not a valid pattern; write {{000..099}}, from low to high, or {{a,b,c}}")


def photographs() -> Folder:
    """Returns scikit-image's photographs. Raises `RacError` if it is not installed."""
    spec = importlib.util.find_spec("skimage")
    if spec is None or not spec.submodule_search_locations:
        raise RacError(
            "no images were given, and scikit-image, whose photographs are the default, is not installed; give a "
            f"folder of images, or {install_extra('photos')}"
        )
    folder = Path(spec.submodule_search_locations[0]) / "data"
    found = Names.of(name for name in _PHOTOGRAPHS if (folder / name).is_file())
    if not found:
        raise RacError(f"{folder} holds none of scikit-image's photographs; reinstall it, or give a folder of images")
    return Folder(folder, found)
