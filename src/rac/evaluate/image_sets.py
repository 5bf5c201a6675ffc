"""Sets of images to evaluate on or to compare with: where they come from, their preprocessing, hash and features.

Pictures are read strictly: training may skip a damaged one, an evaluation may not, as its numbers would silently be of
other images.
"""

from __future__ import annotations

import hashlib
import io
import zipfile
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import groupby, islice
from pathlib import Path, PurePosixPath
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
from ..representations import Extractor, Features, join
from .feature_cache import FeatureCache
from .set_metrics import Gaussian

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
"""Memory in megabytes for decoded images; larger sets are read from their files again each time."""


@dataclass(frozen=True)
class Preprocessing:
    """The way from a picture to one or more images: crop, size and filter.

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
    """Filter of `centre` and of `adm`'s second step; all are antialiased, on 8-bit pixels."""

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
        """Returns the images of an RGB picture.

        Raises `RacError` if it is smaller than `size`, which would enlarge it.
        """
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
                f"{name} is {picture.width} x {picture.height}, too small for images of {size} x {size}; leave it out, "
                "or choose a protocol of a smaller size: enlarged references make a coder look better than it is"
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
    """Some images of a set, of one size."""

    names: tuple[str, ...]
    images: Tensor
    """The images, B 3 H W in [-1, 1]."""
    labels: tuple[str | None, ...] | None = None
    """Class of each image, if the set has classes."""


@dataclass(frozen=True)
class ReferenceRecord:
    """Identity of the set of images that a result is about, or compares with."""

    name: str
    count: int | None
    """Number of images; None if a file of moments does not state it."""
    hash: str


def digest(pixels: Pixels) -> bytes:
    """Returns the SHA-256 of an image H W 3 of 8-bit pixels, its size included."""
    return hashlib.sha256(repr(pixels.shape).encode() + pixels.tobytes()).digest()


class ImageSet:
    """A set of named images, at least two, in a fixed order: read from files, reconstructed or generated.

    `hash` tells sets apart by their pixels alone: it is SHA-256 over the sorted SHA-256 hashes of the images, so names,
    order and file formats do not matter. `sizes` are those of the images, (height, width). `labels` are their classes,
    one each, or None where there are none: the names of the folders in which pictures lie.
    """

    def __init__(
        self,
        name: str,
        source: Callable[[], Iterator[Named]],
        progress: Callable[[int], None] | None = None,
        labels: Sequence[str | None] | None = None,
    ) -> None:
        """Reads all images once.

        - `name`: the name of the set.
        - `source`: returns names and pixels (H W 3, uint8) anew at each call, always the same.
        - `progress`: called with the number of images read.
        - `labels`: the class of each image; None: no classes.
        """
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
            digests.append(digest(pixels))
            sizes.add((pixels.shape[0], pixels.shape[1]))
            room -= pixels.nbytes
            if room >= 0:
                kept.append((image_name, pixels))
            if progress is not None:
                progress(len(names))
        if len(names) < 2:
            raise RacError(f"{name} has {len(names)} image(s), too few to evaluate a coder; give at least 2")
        if len(kept) == len(names):
            self._source = lambda: iter(kept)
        if labels is not None and len(labels) != len(names):
            raise RacError(f"{name} has {len(names)} images and {len(labels)} labels; give one for each")
        self.names = tuple(names)
        self.labels = None if labels is None else tuple(labels)
        self._digests = digests
        self.sizes = sizes
        self.hash = hashlib.sha256(b"".join(sorted(digests))).hexdigest()

    @classmethod
    def read(
        cls,
        paths: Sequence[Path],
        preprocessing: Preprocessing,
        count: int | None = None,
        progress: Callable[[int], None] | None = None,
    ) -> ImageSet:
        """Reads the first `count` images of folders, tar files or pictures, in the order of `find_pictures`.

        Without paths: scikit-image's photographs. Pictures of other modes are converted as `read_image` does. Raises
        `RacError` for an empty folder, for fewer images than `count` or than 2, and for a picture that is damaged, too
        small or, where nothing is cropped, of another size; it names the file.

        - `paths`: the folders, tar files and pictures.
        - `preprocessing`: how pictures become images.
        - `count`: number of images to read; None: all.
        - `progress`: called with the number of images read.
        """
        name = collection_name(paths)
        images = cls.of_pictures(find_pictures(paths), name, preprocessing, count, progress)
        if count is not None and len(images) < count:
            raise RacError(
                f"{name} has {len(images)} images, but the protocol asks for {count}; give more, or lower its count"
            )
        return images

    @classmethod
    def of_pictures(
        cls,
        pictures: Sequence[Picture],
        name: str,
        preprocessing: Preprocessing,
        count: int | None = None,
        progress: Callable[[int], None] | None = None,
    ) -> ImageSet:
        """Reads the first `count` images (None: all) of pictures that were found, in their order.

        `name` is that of the set; the other arguments are those of `read`. Raises `RacError` for fewer images than 2,
        and as `read` for a picture.
        """
        images = cls(name, partial(_read, pictures, preprocessing, count), progress)
        labels = tuple(_label_of(image) for image in images.names)
        images.labels = labels if any(labels) else None
        return images

    @classmethod
    def of(cls, images: Tensor, name: str, labels: Sequence[str | None] | None = None) -> ImageSet:
        """Returns a set of images N 3 H W in [-1, 1] that are in memory already, rounded to 8 bits."""
        named = [(f"{index:05d}", to_pixels(image)) for index, image in enumerate(images)]
        return cls(name, lambda: iter(named), labels=labels)

    @property
    def record(self) -> ReferenceRecord:
        """The identity of this set, as results keep it."""
        return ReferenceRecord(self.name, len(self), self.hash)

    def __len__(self) -> int:
        return len(self.names)

    def batches(self, size: int) -> Iterator[Batch]:
        """Yields all images in their order, up to `size` together; a batch has images of one size only."""
        done = 0
        for _, alike in groupby(self._source(), key=lambda named: named[1].shape):
            while part := list(islice(alike, size)):
                names, pixels = zip(*part, strict=True)
                labels = None if self.labels is None else self.labels[done : done + len(names)]
                done += len(names)
                yield Batch(names, from_pixels(np.stack(pixels)), labels)

    def features(
        self,
        extractor: Extractor,
        batch: int = 16,
        device: torch.device | str = "cpu",
        progress: Callable[[int], None] | None = None,
    ) -> Features:
        """Returns the features of all images in their order, computed once for each kind of extractor.

        They are kept in memory, and on disk by the hashes of the images, the extractor and its weights.

        - `extractor`: the network.
        - `batch`: images at a time.
        - `device`: where to compute.
        - `progress`: called with the number of images done.
        """
        key = f"{type(extractor).__name__} {extractor.path}"
        if key not in self._features:
            self._features[key] = self._kept_or_made(extractor, batch, device, progress)
        return self._features[key]

    def _kept_or_made(
        self,
        extractor: Extractor,
        batch: int,
        device: torch.device | str,
        progress: Callable[[int], None] | None,
    ) -> Features:
        cache = FeatureCache(extractor, self.hash)
        known = cache.known(self._digests)
        if known is not None:
            return known
        parts, done = [], 0
        for part in self.batches(batch):
            digests = self._digests[done : done + len(part.names)]
            parts.append(cache.features(digests, part.images.to(device)))
            done += len(part.names)
            if progress is not None:
                progress(done)
        cache.save()
        return join(parts)


@dataclass(frozen=True)
class FeatureMoments:
    """Mean and covariance of the features of a reference set, in place of its images.

    They are enough for Frechet distances, and for no other metric of sets.
    """

    name: str
    hash: str
    """SHA-256 of the file of moments."""
    pooled: Gaussian
    spatial: Gaussian | None = None

    @classmethod
    def read(cls, path: str | Path) -> FeatureMoments:
        """Reads an .npz file of moments with `mu` D and `sigma` D D.

        Such are published with ADM (Dhariwal and Nichol, arXiv 2105.05233) and with pytorch-fid; ADM's `mu_s` and
        `sigma_s` are those of the spatial features. Raises `RacError` for a file that is missing, is not an .npz
        file, lacks them, or holds pickled objects.
        """
        path = Path(path).expanduser()
        try:
            content = path.read_bytes()
            with np.load(io.BytesIO(content), allow_pickle=False) as arrays:
                if not {"mu", "sigma"} <= set(arrays.files):
                    raise RacError(f"{path} holds {', '.join(arrays.files) or 'nothing'}; expected mu and sigma")
                pooled = Gaussian.from_moments(*(torch.from_numpy(arrays[name]) for name in ("mu", "sigma")))
                spatial = None
                if {"mu_s", "sigma_s"} <= set(arrays.files):
                    spatial = Gaussian.from_moments(*(torch.from_numpy(arrays[name]) for name in ("mu_s", "sigma_s")))
        except RacError as error:
            raise RacError(f"{path}: {error}" if str(path) not in str(error) else str(error)) from None
        except (OSError, ValueError, TypeError, AttributeError, zipfile.BadZipFile) as error:
            reason = error.strerror if isinstance(error, OSError) and error.strerror else error
            raise RacError(
                f"{path} cannot be read as a file of moments ({reason}); give an .npz with the arrays mu and sigma"
            ) from None
        return cls(path.name, hashlib.sha256(content).hexdigest(), pooled, spatial)

    @property
    def record(self) -> ReferenceRecord:
        """The identity of this reference, as results keep it."""
        return ReferenceRecord(self.name, None, self.hash)

    def check(self, metrics: Collection[str], extractor: Extractor) -> None:
        """Raises `RacError` if one of `metrics` needs more than moments, or other features."""
        for metric in ("kernel", "precision-recall"):
            if metric in metrics:
                raise RacError(
                    f"{metric} compares the features of images, and {self.name} holds only moments; leave the metric "
                    "out, or give the reference images"
                )
        widths = [("frechet", self.pooled, extractor.width)]
        if "spatial-frechet" in metrics and self.spatial is None:
            raise RacError(f"{self.name} holds no moments of spatial features (mu_s, sigma_s); leave the sFID out")
        if self.spatial is not None and extractor.spatial_width is not None:
            widths.append(("spatial-frechet", self.spatial, extractor.spatial_width))
        for metric, gaussian, width in widths:
            if metric in metrics and len(gaussian.mean) != width:
                raise RacError(
                    f"{self.name} holds moments of {len(gaussian.mean)} features, the extractor has {width}; "
                    "give those of its own features"
                )


def read_reference(
    path: Path, preprocessing: Preprocessing, progress: Callable[[int], None] | None = None
) -> ImageSet | FeatureMoments:
    """Reads the reference of set metrics: an .npz file of moments, or pictures as `ImageSet.read` takes them."""
    if path.suffix == ".npz":
        return FeatureMoments.read(path)
    return ImageSet.read([path], preprocessing, progress=progress)


def _label_of(name: str) -> str | None:
    return PurePosixPath(name).parent.name or None


def _read(files: Sequence[Picture], preprocessing: Preprocessing, count: int | None) -> Iterator[Named]:
    return islice(_cut_all(files, preprocessing), count)


def _cut_all(files: Sequence[Picture], preprocessing: Preprocessing) -> Iterator[Named]:
    for file in files:
        try:
            encoded = file.read()
        except OSError as error:
            reason = error.strerror or error
            raise RacError(f"{file.description} cannot be read ({reason}); check its permissions") from error
        images = preprocessing.cut(read_picture(io.BytesIO(encoded), name=file.name), file.name)
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
