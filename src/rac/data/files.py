"""Finding pictures: in folders, tar shards and data sets, and the photographs that scikit-image ships."""

from __future__ import annotations

import importlib.util
import itertools
import os
import re
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

import numpy as np

from ..errors import RacError, install_extra
from ..images import PICTURE_SUFFIXES, is_picture
from ..progress import ProgressFn, counting
from .datasets import Rows
from .pictures import Names, Pictures, Source
from .tars import Tar, is_tar

# Photographs among scikit-image's files; drawings, stereo twins and thumbnails are left out. Few pictures make a
# poor lottery, so the ones to hold out (the first quarter) are chosen: an object, an animal, a street scene.
_PHOTOGRAPHS = (
    *("coffee.png", "chelsea.png", "motorcycle_left.png"),
    *("astronaut.png", "rocket.jpg", "hubble_deep_field.jpg", "retina.jpg", "ihc.png"),
    *("camera.png", "brick.png", "grass.png", "gravel.png", "moon.png", "coins.png"),
)


def find_pictures(paths: Sequence[Path]) -> Pictures:
    """All pictures under `paths`, in an order that looks random but depends on their names alone.

    Paths are folders of pictures (searched through), folders of tar shards, tar shards, brace patterns of such
    (`shards-{000..099}.tar`), single pictures, and Hugging Face data sets (`hf:PATH_OR_NAME:split:column`). Cutting
    the list anywhere gives fair samples (of every label), and the same ones everywhere. Without paths: scikit-image's
    photographs. Raises `RacError` if a path is missing, damaged, or holds no picture.
    """
    if not paths:
        folder = photographs()
        return Pictures([folder], np.arange(len(folder.names)))
    with counting("finding pictures") as progress:
        return Pictures(list(_sources([one for path in paths for one in _expanded(path.expanduser())], progress)))


def has_scheme(path: Path, *kinds: str) -> bool:
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

    def describe(self, index: int) -> str:
        """See `Source`."""
        return self.names[index]

    def size_hint(self, index: int) -> int:
        """See `Source`."""
        return (self.path / self.names[index]).stat().st_size

    def read(self, index: int) -> bytes:
        """See `Source`."""
        return (self.path / self.names[index]).read_bytes()


def _sources(paths: Sequence[Path], progress: ProgressFn) -> Iterator[Source]:
    total = 0
    for path in paths:
        found = _sources_in(path, partial(_beyond, progress, total))
        if not any(source.names for source in found):
            raise RacError(f"{path} holds no pictures; looked for {' '.join(PICTURE_SUFFIXES)}, and tar files of them")
        total += sum(len(source.names) for source in found)
        progress(total)
        yield from found


def _beyond(progress: ProgressFn, before: int, done: int) -> None:
    progress(before + done)


def _sources_in(path: Path, progress: Callable[[int], None]) -> list[Source]:
    if has_scheme(path, "hf"):
        return [Rows.open(str(path))]
    if path.is_dir():
        folder = Folder.search(path)
        return (
            [folder]
            if folder.names
            else [Tar.open(tar, progress) for tar in sorted(path.rglob("*")) if is_tar(tar.name)]
        )
    if not path.is_file():
        raise RacError(_why_not(path))
    if is_picture(path.name):
        return [Folder(path.parent, Names.of([path.name]))]
    return [Tar.open(path, progress)]


def _why_not(path: Path) -> str:
    if has_scheme(path, "hf-stream"):
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
            "no images were given, and scikit-image, whose photographs are the default, is not installed; give a "
            f"folder of images, or {install_extra('photos')}"
        )
    folder = Path(spec.submodule_search_locations[0]) / "data"
    found = Names.of(name for name in _PHOTOGRAPHS if (folder / name).is_file())
    if not found:
        raise RacError(f"{folder} holds none of scikit-image's photographs; reinstall it, or give a folder of images")
    return Folder(folder, found)
