"""Training images, with the labels of their classes, as an endless numbered stream of crops.

Crop n is a pure function of (rng_seed, n), so batch k is one of k: continuing after an interruption needs no state.
"""

from __future__ import annotations

import hashlib
import io
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import islice
from threading import Lock
from typing import Any, Literal, NamedTuple, Protocol, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from ..errors import ImageError, RacError
from ..images import from_pixels, read_picture, upright_size
from ..runtime import generator
from .config import DataConfig
from .datasets import HFPath, LabelColumn, encoded, encoded_images, image_column, load_rows, unreadable
from .files import collection_name, find_pictures
from .pictures import ClassChoice, Fingerprint, Picture, Pictures, class_order
from .prefetch import ahead

T = TypeVar("T")

Size = tuple[int, int]
"""Width and height."""


Want = Literal["images", "latents", "labels", "features"]
"""Something that a batch can hold."""

IMAGES: frozenset[Want] = frozenset({"images"})
"""Default contents of batches: images alone."""


class Batch(NamedTuple):
    """Images to train on, their latents, labels and features, in the same order.

    What the stream was not opened for is None.
    """

    images: Tensor | None = None
    """Images, B 3 H W in [-1, 1]."""
    latents: Tensor | None = None
    """Latents, B c h w, normalised."""
    labels: Tensor | None = None
    """Labels, B, int64: places in the stream's `classes`."""
    features: Tensor | None = None
    """Features of the images by a representation, B C h w."""

    @property
    def size(self) -> int:
        """The number of images."""
        return next(len(tensor) for tensor in self if tensor is not None)

    def need(self, what: Want) -> Tensor:
        """Returns the batch's images, latents, labels or features.

        Raises `RacError` if the stream was not opened for them.
        """
        found = getattr(self, what)
        if found is None:
            raise RacError(f"the batch holds no {what}; include {what!r} in the stream's wants")
        return found

    def rows(self, rows: slice) -> Batch:
        """Returns the given rows of everything."""
        return Batch(*(None if tensor is None else tensor[rows] for tensor in self))

    def to(self, device: torch.device, layout: torch.memory_format = torch.contiguous_format) -> Batch:
        """Returns the batch on `device`, with images in the memory format `layout`."""
        moved = Batch(*(None if tensor is None else tensor.to(device, non_blocking=True) for tensor in self))
        if moved.images is None:
            return moved
        # Moved first, laid out there: the processor would be slower at it.
        return moved._replace(images=moved.images.contiguous(memory_format=layout))


class Stream(Protocol):
    """An endless supply of training images, and a few that are never among them."""

    @property
    def skipped(self) -> Mapping[str, str]:
        """Names of the damaged pictures met so far, and what was wrong with each."""
        ...

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the classes that labels stand for, in `class_order`; empty if no picture belongs to any."""
        ...

    @property
    def fingerprint(self) -> Fingerprint:
        """Fingerprint of the stream's pictures, held-out ones included."""
        ...

    def batch(self, first: int, count: int) -> Batch:
        """Returns draws `first` to `first + count - 1`.

        The same arguments always give the same batch, in any thread.
        """
        ...

    def held_out(self) -> Tensor:
        """Returns images that are never trained on, N 3 S S in [-1, 1]; always the same."""
        ...


class PictureLike(Protocol):
    """A picture that can be read."""

    @property
    def description(self) -> str:
        """Name for messages."""
        ...

    @property
    def class_name(self) -> str | None:
        """The class that the picture belongs to; None if it belongs to none."""
        ...

    def read(self) -> bytes:
        """Returns the encoded bytes. Raises `OSError`."""
        ...


class Crop(NamedTuple):
    """A square piece of a picture."""

    pixels: NDArray[np.uint8]
    """Pixels, size size 3."""
    class_name: str | None
    """The class of the picture that it was cut from, which is another than the one drawn if that one is damaged."""


class Crops(ABC):
    """Base class of streams of freshly cut crops: reading, skipping damaged pictures, held-out images, labels."""

    def __init__(self, config: DataConfig, rng_seed: int, wants: Collection[Want]) -> None:
        self.config = config
        self.rng_seed = rng_seed
        self.wants = frozenset(wants)
        """Contents of batches: images, labels or both; freshly cut crops have neither latents nor features."""
        self.skipped: dict[str, str] = {}
        """Damaged pictures met so far, and what was wrong with each."""
        self.held_out_pixels: NDArray[np.uint8]
        """The held-out images as pixels, N size size 3."""
        self._kept: dict[Picture, Image.Image] = {}
        self._room = config.keep_mb * 2**20

    @property
    @abstractmethod
    def classes(self) -> tuple[str, ...]:
        """Names of the classes that labels stand for; empty if no picture belongs to any."""

    @property
    @abstractmethod
    def fingerprint(self) -> Fingerprint:
        """Fingerprint of the stream's pictures, held-out ones included."""

    @abstractmethod
    def crop(self, draw: int) -> Crop:
        """Returns crop number `draw`. Raises `RacError` if nothing can be read."""

    def batch(self, first: int, count: int) -> Batch:
        """Returns draws `first` to `first + count - 1`, with the contents that the stream was opened for."""
        crops = [self.crop(draw) for draw in range(first, first + count)]
        images = from_pixels(np.stack([crop.pixels for crop in crops])) if "images" in self.wants else None
        labels = None
        if "labels" in self.wants:
            labels = torch.tensor([self.label(crop.class_name) for crop in crops], dtype=torch.int64)
        return Batch(images, None, labels)

    def label(self, class_name: str | None) -> int:
        """Returns the place of a class in `classes`; -1 for None."""
        return -1 if class_name is None else self._labels[class_name]

    @cached_property
    def _labels(self) -> dict[str, int]:
        return {name: label for label, name in enumerate(self.classes)}

    def held_out(self) -> Tensor:
        """Returns the held-out images, N 3 size size in [-1, 1]: the centre of each held-out picture.

        Where there are fewer held-out pictures than `config.held_out`, further images are crops of the same ones.
        """
        return from_pixels(self.held_out_pixels)

    def _hold_out(self, pictures: Iterable[PictureLike], wanted: int) -> int:
        """Keeps crops of the first `wanted` pictures that can be read; returns how many were looked at."""
        found: list[Image.Image] = []
        used = 0
        for picture in pictures:
            used += 1
            if (opened := self._try(picture, self._open)) is not None:
                found.append(opened)
            if len(found) == wanted:
                break
        if not found:
            raise RacError(f"none of the {used} pictures can be read; the first: {self._first_skipped()}")
        self._kept.clear()
        crops = [centre_crop(picture, self.config.size) for picture in found[: self.config.held_out]]
        for index in range(len(crops), self.config.held_out):
            crops.append(random_crop(found[index % len(found)], self.config, generator(0, "held out", index)))
        self.held_out_pixels = np.stack(crops)
        return used

    def _cut_first(self, pictures: Iterable[PictureLike], choose: Callable[[Size], Region]) -> Crop:
        """Returns a crop of the first picture that can be read."""
        looked = 0
        for picture in pictures:
            looked += 1
            pixels = self._try(picture, lambda picture: self._cut(picture, choose))
            if pixels is not None:
                return Crop(pixels, picture.class_name)
        raise RacError(f"none of the {looked} pictures to train on can be read; the first: {self._first_skipped()}")

    def _cut(self, picture: PictureLike, choose: Callable[[Size], Region]) -> NDArray[np.uint8]:
        if not self.config.draft:
            opened = self._open(picture)
            return cut(opened, choose(opened.size), self.config.size)
        encoded, name = picture.read(), picture.description
        size = upright_size(io.BytesIO(encoded), name)
        region = choose(size)
        # Half of what would be right is left to the resampling, which is better at it.
        shrink = next((shrink for shrink in (8, 4, 2) if region.side >= 2 * shrink * self.config.size), 1)
        opened = read_picture(io.BytesIO(encoded), name=name, shrink=shrink)
        return cut(opened, region, self.config.size, 1 if opened.size == size else shrink)

    def _open(self, picture: PictureLike) -> Image.Image:
        if isinstance(picture, Picture) and picture in self._kept:
            return self._kept[picture]
        opened = read_picture(io.BytesIO(picture.read()), name=picture.description)
        # Pictures come equally often, so keeping those that came first serves as well as any cleverer choice.
        size = 3 * opened.width * opened.height
        if isinstance(picture, Picture) and size <= self._room:
            self._room -= size
            self._kept[picture] = opened
        return opened

    def _try(self, picture: PictureLike, work: Callable[[PictureLike], T]) -> T | None:
        """Returns the result of `work`, or None, with a warning the first time, for a damaged picture."""
        try:
            return work(picture)
        except (ImageError, OSError) as error:
            if picture.description not in self.skipped:
                self.skipped[picture.description] = str(error)
                warnings.warn(f"skipped from training: {error}", stacklevel=2)
            return None

    def _first_skipped(self) -> str:
        return next(iter(self.skipped.values()))


class ImageStream(Crops):
    """Random square crops of the pictures a `DataConfig` names; each picture once an epoch.

    Damaged pictures are skipped: the next one of the epoch takes the place, a warning names the file once, and
    `skipped` holds all of them. Raises `RacError` if there are no pictures, or none that can be read.
    """

    def __init__(self, config: DataConfig, rng_seed: int = 0, wants: Collection[Want] = IMAGES) -> None:
        super().__init__(config, rng_seed, wants)
        self.pictures = find_pictures(config.paths).of_classes(config.classes, config.without_classes)
        """All pictures, held-out ones included, in their order."""
        files = self.pictures
        if "labels" in wants:
            check_labelled(files, config)
        used = self._hold_out(files, min(config.held_out, max(1, len(files) // 4)))
        if used == len(files):
            raise RacError(
                f"{len(files)} picture(s), {len(self.skipped)} of them damaged, are too few: one is held out and "
                "none is left to train on; add images"
            )
        self.files = files[used:]
        """The pictures to train on, including damaged ones that were not met yet."""

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the classes of all pictures, held-out ones included."""
        return self.pictures.classes

    @cached_property
    def fingerprint(self) -> Fingerprint:
        """Fingerprint of the stream's pictures, held-out ones included."""
        return self.pictures.fingerprint()

    def __len__(self) -> int:
        """Returns the number of pictures to train on, including damaged ones that were not met yet."""
        return len(self.files)

    def crop(self, draw: int) -> Crop:
        """Returns crop number `draw`."""
        epoch, place = divmod(draw, len(self))
        order = permutation(len(self), self.rng_seed, epoch)
        pictures = (self.files[int(order[(place + offset) % len(self)])] for offset in range(len(self)))
        values = draw_values(generator(self.rng_seed, "crop", draw))
        return self._cut_first(pictures, lambda size: random_region(size, self.config, values))

    def centre(self, number: int) -> Crop:
        """Returns the centre of picture `number`, or of the next one if it is damaged."""
        pictures = (self.files[(number + offset) % len(self)] for offset in range(len(self)))
        return self._cut_first(pictures, centre_region)


def check_labelled(pictures: Pictures, config: DataConfig) -> None:
    """Raises `RacError` unless each of the pictures belongs to a class, naming one that does not."""
    where = collection_name(config.paths)
    if not pictures.classes:
        raise RacError(
            f"labels are needed, but no picture of {where} belongs to a class; classes are the folders directly above "
            "pictures, so give a folder of folders, or a data set with a column of classes"
        )
    without = [picture for picture in pictures if picture.class_name is None]
    if without:
        raise RacError(
            f"labels are needed, but {len(without):,} of the {len(pictures):,} pictures of {where} belong to no class, "
            f"such as {without[0].description}; move them into folders of a class, or choose classes"
        )


WINDOW = 512
"""Number of pictures of a streamed data set that are in memory together, still encoded, to be drawn in random order."""


_WINDOWS_KEPT = 3
"""Number of windows kept, as threads and processes ask for neighbouring batches at about the same time."""


@dataclass(frozen=True)
class _Row:
    description: str
    value: Any
    class_name: str | None = None

    def read(self) -> bytes:
        return encoded(self.value, self.description)


class StreamedImages(Crops):
    """Random crops of a data set that is read from its beginning on, for what is too large to be fetched.

    The first readable rows are held out. The others are drawn in random order within windows of `WINDOW` rows; when
    the last row was read, the next epoch begins. Crop n is a function of (rng_seed, n) and of the rows, so resuming
    stores nothing: rows before it are read, at most one epoch of them, and dropped without being decoded. Exact resume
    requires the data set to keep its order. Each process reads all rows, and decodes its own. Raises `RacError` for a
    data set that cannot be read, is too small, or has no names of classes where labels are asked for.
    """

    def __init__(self, config: DataConfig, rng_seed: int = 0, wants: Collection[Want] = IMAGES) -> None:
        super().__init__(config, rng_seed, wants)
        self._text = str(config.paths[0])
        hf_path = HFPath.read(self._text)
        rows = load_rows(hf_path, self._text, streaming=True)
        features: dict[str, Any] = rows.features or next(iter(rows), {})
        self._column = image_column(hf_path, features, self._text)
        self._classified = LabelColumn.of(features, self._text)
        self._choice = ClassChoice(config.classes, config.without_classes)
        if "labels" in wants or self._choice.chooses:
            self._check_classes()
        columns = [self._column, *([self._classified.column] if self._classified else [])]
        self._rows = encoded_images(rows.select_columns(columns), self._column)
        self._total: int | None = None
        """Number of rows of the data set that are taken, once all were read."""
        self._skip = self._hold_out(self._read(0), config.held_out)
        self._lock = Lock()
        self._windows: dict[int, list[_Row]] = {}
        self._seek(0)
        self._window(0)

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the classes, as the data set lists them; empty if they are not known before all is read."""
        names = self._classified.names if self._classified else None
        return class_order(name for name in names or () if self._choice(name))

    @cached_property
    def fingerprint(self) -> Fingerprint:
        """Fingerprint of the rows that are held out, since the others are read only in their turn."""
        return Fingerprint(None, hashlib.sha256(self.held_out_pixels.tobytes()).hexdigest()[:16])

    def crop(self, draw: int) -> Crop:
        """Returns crop number `draw`. Waits for the data set's next window, where that is needed."""
        number, place = divmod(draw, WINDOW)
        window = self._window(number)
        order = permutation(len(window), self.rng_seed, number)
        pictures = (window[int(order[(place + offset) % len(window)])] for offset in range(len(window)))
        values = draw_values(generator(self.rng_seed, "crop", draw))
        return self._cut_first(pictures, lambda size: random_region(size, self.config, values))

    def label(self, class_name: str | None) -> int:
        """Returns the place of a class in `classes`.

        Raises `RacError` for a row without one, where labels are asked for.
        """
        if class_name is None and "labels" in self.wants:
            raise RacError(
                f"labels are needed, but a row of {self._text} has none; choose classes, so that it is left out"
            )
        return super().label(class_name)

    def _check_classes(self) -> None:
        if self._classified is None or self._classified.names is None:
            raise RacError(
                f"{self._text} does not list its classes, as a data set that is read in its own order must; download "
                "it and give hf:..., or leave out labels and classes"
            )
        self._choice.check(class_order(self._classified.names))

    def _window(self, number: int) -> list[_Row]:
        """Returns rows `WINDOW` x `number` and on of all epochs, laid end to end."""
        with self._lock:
            if number not in self._windows and number < self._next:
                self._seek(0)
            while number not in self._windows:
                if self._total is not None and number > self._next:
                    self._seek(number)
                self._windows[self._next] = self._take(WINDOW)
                self._next += 1
                # The first one stays: whoever fits statistics of training images comes back to it.
                for old in sorted(self._windows)[1:-_WINDOWS_KEPT]:
                    if old != number:
                        del self._windows[old]
            return self._windows[number]

    def _seek(self, number: int) -> None:
        """Makes window `number` the next one to be read; 0, unless the data set was read to its end before."""
        start = number * WINDOW % (self._total - self._skip) if self._total else 0
        self._reading, self._next = self._read(self._skip + start), number

    def _take(self, count: int) -> list[_Row]:
        """Returns the next rows, from the beginning again after the last."""
        found = list(islice(self._reading, count))
        while len(found) < count:
            self._reading = self._read(self._skip)
            more = list(islice(self._reading, count - len(found)))
            if not more:
                raise RacError(f"{self._text} has only {self._skip} rows, which are held out; give more")
            found += more
        return found

    def _read(self, first: int) -> Iterator[_Row]:
        """Yields rows `first` and on, to the last, of those that are taken."""
        rows, index, taken = iter(self._rows), -1, 0
        while True:
            try:
                row = next(rows, None)
            except Exception as error:  # what a server, a file or a loading script can do
                raise unreadable(self._text, error) from error
            if row is None:
                self._total = taken
                return
            index += 1
            name = self._classified.name_of(row[self._classified.column]) if self._classified else None
            if not self._choice(name):
                continue
            if taken >= first:
                yield _Row(f"row {index} of {self._text}", row[self._column], name)
            taken += 1


class InTurn:
    """Streams that take turns, `size` draws each, so that a batch of that size, or a part of it, comes from one.

    The streams number their draws alike; where they go through the same pictures, an epoch still shows each one once.
    """

    def __init__(self, streams: Sequence[Stream], size: int) -> None:
        self.streams = streams
        self.size = size

    @property
    def skipped(self) -> Mapping[str, str]:
        """The damaged pictures that any of the streams met."""
        return {name: why for stream in self.streams for name, why in stream.skipped.items()}

    @property
    def classes(self) -> tuple[str, ...]:
        """The classes of the first stream, as all go through the same pictures."""
        return self.streams[0].classes

    @property
    def fingerprint(self) -> Fingerprint:
        """The fingerprint of the first stream's pictures, as all go through the same ones."""
        return self.streams[0].fingerprint

    def batch(self, first: int, count: int) -> Batch:
        """Returns draws `first` to `first + count - 1`, which must be of one turn."""
        return self.streams[first // self.size % len(self.streams)].batch(first, count)

    def held_out(self) -> Tensor:
        """Returns the held-out images of the first stream."""
        return self.streams[0].held_out()


@lru_cache(maxsize=4)
def permutation(count: int, rng_seed: int, epoch: int) -> NDArray[np.int64]:
    """Returns the order in which epoch number `epoch` goes through `count` things."""
    return torch.randperm(count, generator=generator(rng_seed, "epoch", epoch)).numpy()


class Region(NamedTuple):
    """A square of a picture, in its pixels, and whether to mirror it."""

    left: int
    top: int
    side: int
    mirror: bool = False


def draw_values(rng: torch.Generator) -> list[float]:
    """Returns the four numbers that choose a crop, each in [0, 1)."""
    return torch.rand(4, generator=rng, dtype=torch.float64).tolist()


def random_region(size: Size, config: DataConfig, values: Sequence[float]) -> Region:
    """Returns a square at a place and a scale that four `values` of [0, 1) choose.

    Its side is log-uniform between `smallest_crop` and `largest_crop`; the whole short side of a smaller picture.
    """
    width, height = size
    short = min(size)
    low = min(config.smallest_crop or config.size, short)
    high = max(min(config.largest_crop or short, short), low)
    scale, across, down, mirror = values
    side = round(low * (high / low) ** scale)
    left, top = int(across * (width - side + 1)), int(down * (height - side + 1))
    return Region(left, top, side, config.flip and mirror < 0.5)


def centre_region(size: Size) -> Region:
    """Returns the largest square in the centre."""
    side = min(size)
    return Region((size[0] - side) // 2, (size[1] - side) // 2, side)


def random_crop(picture: Image.Image, config: DataConfig, rng: torch.Generator) -> NDArray[np.uint8]:
    """Cuts a random square region at a random scale, resampled with antialiasing to size size 3 pixels."""
    return cut(picture, random_region(picture.size, config, draw_values(rng)), config.size)


def centre_crop(picture: Image.Image, size: int) -> NDArray[np.uint8]:
    """Cuts the largest square in the centre, resampled with antialiasing to size size 3 pixels."""
    return cut(picture, centre_region(picture.size), size)


def cut(picture: Image.Image, region: Region, size: int, shrink: int = 1) -> NDArray[np.uint8]:
    """Cuts a region out of a picture, resampled with antialiasing to size size 3 pixels.

    - `picture`: the picture, decoded at 1 / `shrink` of its size.
    - `region`: the square to cut, in pixels of the full size.
    - `size`: side of the result.
    - `shrink`: the fraction at which the picture was decoded.
    """
    left, top, side, mirror = region
    box = (left / shrink, top / shrink, (left + side) / shrink, (top + side) / shrink)
    pixels = np.asarray(picture.resize((size, size), Image.Resampling.BICUBIC, box=box))
    return pixels[:, ::-1] if mirror else pixels


def batches(
    stream: Stream,
    size: int,
    first: int,
    last: int,
    workers: int = 1,
    *,
    rows: slice | None = None,
    patience: float = 600.0,
) -> Generator[Batch, None, None]:
    """Yields the batches of iterations `first` to `last - 1`, in order, made ahead by threads.

    - `stream`: gives the batches.
    - `size`: images in a batch.
    - `first`, `last`: the first iteration, and the one after the last.
    - `workers`: threads that make batches ahead; 0: none.
    - `rows`: the only rows to read of each batch, one process's share; None: all.
    - `patience`: seconds to wait for a batch.

    Raises whatever reading raises, and `RacError` if a thread ends or none of them delivers for `patience` seconds.
    """
    start, stop, _ = (rows or slice(size)).indices(size)
    return ahead(
        lambda iteration: stream.batch(iteration * size + start, stop - start), range(first, last), workers, patience
    )
