"""Finding pictures: in folders, in tar files, and the photographs that scikit-image ships."""

from __future__ import annotations

import hashlib
import importlib.util
import tarfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from ..errors import RacError
from ..images import PICTURE_SUFFIXES

# Photographs among scikit-image's files; drawings, stereo twins and thumbnails are left out. Few pictures make a
# poor lottery, so the ones to hold out (the first quarter) are chosen: an object, an animal, a street scene.
_PHOTOGRAPHS = (
    *("coffee.png", "chelsea.png", "motorcycle_left.png"),
    *("astronaut.png", "rocket.jpg", "hubble_deep_field.jpg", "retina.jpg", "ihc.png"),
    *("camera.png", "brick.png", "grass.png", "gravel.png", "moon.png", "coins.png"),
)


@dataclass(frozen=True)
class PictureFile:
    """A picture somewhere on the disk: a whole file, or a stretch of a tar file."""

    name: str
    """Name for messages and for ordering; does not depend on where the collection lies."""
    path: Path
    offset: int = 0
    length: int = -1
    """Bytes to read from `offset`; -1: to the end."""

    def read(self) -> bytes:
        """The encoded bytes. Opened anew each time, so any thread may read. Raises `OSError`."""
        with open(self.path, "rb") as file:
            file.seek(self.offset)
            return file.read(self.length)


def find_pictures(paths: Sequence[Path]) -> list[PictureFile]:
    """All pictures under `paths`, in an order that looks random but depends on their names alone.

    Cutting this list anywhere therefore gives fair samples (of every label), and the same ones everywhere. Without
    paths: scikit-image's photographs. Raises `RacError` if a path is missing or holds no picture.
    """
    if not paths:
        return _photographs()
    found = [picture for path in paths for picture in _find(path.expanduser())]
    return sorted(found, key=lambda picture: hashlib.sha256(picture.name.encode()).digest())


def _find(path: Path) -> list[PictureFile]:
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if _is_picture(file.name) and file.is_file())
        found = [PictureFile(file.relative_to(path).as_posix(), file) for file in files]
    elif not path.is_file():
        raise RacError(f"{path} does not exist; give folders of images or tar files of images")
    elif _is_picture(path.name):
        found = [PictureFile(path.name, path)]
    else:
        found = _index_tar(path)
    if not found:
        raise RacError(f"{path} holds no pictures; looked for {' '.join(PICTURE_SUFFIXES)}")
    return found


def _index_tar(path: Path) -> list[PictureFile]:
    """Where each picture of a tar file begins, so that any of them can be read without the others."""
    try:
        with tarfile.open(path, "r:") as tar:
            members = [member for member in tar if member.isfile() and _is_picture(member.name)]
    except (tarfile.TarError, OSError, EOFError) as error:
        raise RacError(
            f"{path} cannot be read as a tar file ({error}); give an uncompressed, complete .tar, or a folder"
        ) from None
    return [PictureFile(member.name, path, member.offset_data, member.size) for member in members]


def _is_picture(name: str) -> bool:
    pure = PurePosixPath(name)
    return pure.suffix.lower() in PICTURE_SUFFIXES and not pure.name.startswith(".")


def _photographs() -> list[PictureFile]:
    spec = importlib.util.find_spec("skimage")
    if spec is None or not spec.submodule_search_locations:
        raise RacError(
            "no images were given, and scikit-image, whose photographs would do, is not installed; "
            "pip install 'rectified-auto-coder[photos]', or give a folder of images"
        )
    folder = Path(spec.submodule_search_locations[0]) / "data"
    found = [PictureFile(name, folder / name) for name in _PHOTOGRAPHS if (folder / name).is_file()]
    if not found:
        raise RacError(f"{folder} holds none of scikit-image's photographs; reinstall it, or give a folder of images")
    return found
