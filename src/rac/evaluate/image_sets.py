"""The images that a coder is judged on: where they come from, how a picture becomes an image, and their hash.

Read strictly: training may skip a damaged picture, an evaluation may not, as its metrics would silently be of other
images.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import groupby, islice
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from ..data.files import collection_name, find_pictures
from ..data.pictures import Picture
from ..errors import RacError
from ..images import from_pixels, read_picture, to_pixels
from ..representations import Extractor, Features, extract

Pixels = NDArray[np.uint8]
Named = tuple[str, Pixels]

Crop = Literal["centre", "adm", "tiles", "none"]
Resize = Literal["bicubic", "bilinear", "lanczos", "box"]

_FILTERS = {
    "bicubic": Image.Resampling.BICUBIC,
    "bilinear": Image.Resampling.BILINEAR,
    "lanczos": Image.Resampling.LANCZOS,
    "box": Image.Resampling.BOX,
}

KEEP_MB = 512
"""Memory for decoded references; larger sets are read from their files again each time."""


@dataclass(frozen=True)
class Preprocessing:
    """How a picture becomes one or more images.

    - `centre`: its largest central square, resized to `size` once, antialiased.
    - `adm`: as the public ImageNet references were made (Dhariwal and Nichol, arXiv 2105.05233): halved by box filter
      while twice `size` fits, resized until the short side is `size`, the centre cropped.
    - `tiles`: cut into as many `size` x `size` squares as fit, centred, not resized. Many images out of few pictures.
    - `none`: as it is; with a `size`, every picture must be a square of that side already.
    """

    size: int | None = None
    """Side of the images; None, with crop `none` only: each picture's own size."""
    crop: Crop = "none"
    resize: Resize = "bicubic"
    """The filter of `centre` and of `adm`'s second step; all are antialiased, on 8-bit pixels."""

    def __post_init__(self) -> None:
        if self.crop not in ("centre", "adm", "tiles", "none"):
            raise RacError(f"crop {self.crop!r} is not known; expected centre, adm, tiles or none")
        if self.resize not in _FILTERS:
            raise RacError(f"resize {self.resize!r} is not known; expected {', '.join(_FILTERS)}")
        if self.size is None and self.crop != "none":
            raise RacError(f"crop {self.crop} needs a size; give one, or crop none for pictures as they are")
        if self.size is not None and self.size < 1:
            raise RacError(f"size {self.size} must be at least 1")

    def cut(self, picture: Image.Image, name: str) -> list[Image.Image]:
        """The images of an RGB picture. Raises `RacError` if it is smaller than `size`, which would enlarge it."""
        size = self.size
        if size is None:
            return [picture]
        if self.crop == "none" and picture.size != (size, size):
            raise RacError(
                f"{name} is {picture.width} x {picture.height}, the protocol wants pictures of {size} x {size} and "
                "does not crop; make them all one size, or choose a protocol that crops"
            )
        if min(picture.size) < size:
            raise RacError(
                f"{name} is {picture.width} x {picture.height}, too small for images of {size} x {size}; "
                "leave it out, or choose a protocol of a smaller size: enlarged references flatter a coder"
            )
        if self.crop == "centre":
            side = min(picture.size)
            return [picture.resize((size, size), _FILTERS[self.resize], box=_centred(picture, side, side))]
        if self.crop == "adm":
            return [_adm(picture, size, _FILTERS[self.resize])]
        if self.crop == "tiles":
            return _tiles(picture, size)
        return [picture]


class Batch(NamedTuple):
    """Some references of one size."""

    names: tuple[str, ...]
    images: Tensor
    """B 3 H W in [-1, 1]."""


class ImageSet:
    """A set of named images, at least two, in a fixed order.

    `hash` tells sets apart by their pixels alone: it is SHA-256 over the sorted SHA-256 hashes of the images, so names,
    order and file formats do not matter. `sizes` are those of the images, (height, width).
    """

    def __init__(
        self, name: str, source: Callable[[], Iterator[Named]], progress: Callable[[int], None] | None = None
    ) -> None:
        """`source` gives the images anew at each call, always the same; all are read once here."""
        self.name = name
        self._source = source
        self._features: dict[str, Features] = {}
        names: list[str] = []
        digests: list[bytes] = []
        sizes: set[tuple[int, int]] = set()
        kept: list[Named] = []
        room = KEEP_MB * 2**20
        for image_name, pixels in source():
            names.append(image_name)
            digests.append(hashlib.sha256(repr(pixels.shape).encode() + pixels.tobytes()).digest())
            sizes.add((pixels.shape[0], pixels.shape[1]))
            room -= pixels.nbytes
            if room >= 0:
                kept.append((image_name, pixels))
            if progress is not None:
                progress(len(names))
        if len(names) < 2:
            raise RacError(f"{name} gives {len(names)} image(s), too few to judge a coder by; give at least 2")
        if len(kept) == len(names):
            self._source = lambda: iter(kept)
        self.names = tuple(names)
        self.sizes = sizes
        self.hash = hashlib.sha256(b"".join(sorted(digests))).hexdigest()

    @classmethod
    def read(
        cls,
        paths: Sequence[Path],
        framing: Preprocessing,
        count: int | None = None,
        progress: Callable[[int], None] | None = None,
    ) -> ImageSet:
        """The first `count` images (all if None) of folders, tar files or single pictures; `find_pictures` orders them.

        Without paths: scikit-image's photographs. Pictures of other modes are converted as `read_image` does. Raises
        `RacError` for an empty folder, for fewer images than `count` or than 2, and for a picture that is damaged, too
        small or, where nothing is cropped, of another size; it names the file.
        """
        files = find_pictures(paths)
        name = collection_name(paths)
        references = cls(name, partial(_read, files, framing, count), progress)
        if count is not None and len(references) < count:
            raise RacError(
                f"{name} gives {len(references)} images, the protocol asks for {count}; give more, or lower its count"
            )
        return references

    @classmethod
    def of(cls, images: Tensor, name: str) -> ImageSet:
        """Images N 3 H W in [-1, 1] that are in memory already, rounded to 8 bits."""
        named = [(f"{index:05d}", to_pixels(image)) for index, image in enumerate(images)]
        return cls(name, lambda: iter(named))

    def __len__(self) -> int:
        return len(self.names)

    def batches(self, size: int) -> Iterator[Batch]:
        """All images in their order, up to `size` together; neighbours of different size do not share a batch."""
        for _, alike in groupby(self._source(), key=lambda named: named[1].shape):
            while part := list(islice(alike, size)):
                names, pixels = zip(*part, strict=True)
                yield Batch(names, from_pixels(np.stack(pixels)))

    def features(
        self,
        extractor: Extractor,
        batch: int = 16,
        device: torch.device | str = "cpu",
        progress: Callable[[int], None] | None = None,
    ) -> Features:
        """Their features, computed once for each kind of extractor."""
        key = f"{type(extractor).__name__} {extractor.path}"
        if key not in self._features:
            images = (part.images.to(device) for part in self.batches(batch))
            self._features[key] = extract(extractor, images, progress)
        return self._features[key]


def _read(files: Sequence[Picture], framing: Preprocessing, count: int | None) -> Iterator[Named]:
    return islice(_cut_all(files, framing), count)


def _cut_all(files: Sequence[Picture], framing: Preprocessing) -> Iterator[Named]:
    for file in files:
        try:
            encoded = file.read()
        except OSError as error:
            raise RacError(
                f"{file.description} cannot be read ({error.strerror or error}); check its permissions"
            ) from error
        images = framing.cut(read_picture(io.BytesIO(encoded), name=file.name), file.name)
        for index, image in enumerate(images):
            yield file.name if len(images) == 1 else f"{file.name}#{index}", np.asarray(image)


def _centred(picture: Image.Image, width: int, height: int) -> tuple[int, int, int, int]:
    left, top = (picture.width - width) // 2, (picture.height - height) // 2
    return left, top, left + width, top + height


def _adm(picture: Image.Image, size: int, resample: Image.Resampling) -> Image.Image:
    while min(picture.size) >= 2 * size:
        picture = picture.resize((picture.width // 2, picture.height // 2), Image.Resampling.BOX)
    scale = size / min(picture.size)
    picture = picture.resize((round(picture.width * scale), round(picture.height * scale)), resample)
    return picture.crop(_centred(picture, size, size))


def _tiles(picture: Image.Image, size: int) -> list[Image.Image]:
    columns, rows = picture.width // size, picture.height // size
    left, top, _, _ = _centred(picture, columns * size, rows * size)
    corners = [(left + size * column, top + size * row) for row in range(rows) for column in range(columns)]
    return [picture.crop((x, y, x + size, y + size)) for x, y in corners]
