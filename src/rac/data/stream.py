"""Training images as an endless numbered stream of crops.

Crop n is a pure function of (rng_seed, n), so batch k is one of k: going on after an interruption needs no state.
"""

from __future__ import annotations

import io
import time
import warnings
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from concurrent.futures import Future, wait
from functools import lru_cache
from queue import SimpleQueue
from threading import Thread
from typing import NamedTuple, Protocol, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from ..errors import ImageError, RacError
from ..images import from_pixels, read_picture, upright_size
from ..runtime import generator
from .config import DataConfig
from .files import Picture, find_pictures

T = TypeVar("T")

Size = tuple[int, int]
"""Width and height."""


class Batch(NamedTuple):
    """Images to train on, with the teacher's latents where those were prepared."""

    images: Tensor
    """B 3 H W in [-1, 1]."""
    latents: Tensor | None = None
    """B c h w, normalised."""

    def rows(self, rows: slice) -> Batch:
        """Some of the images."""
        return Batch(self.images[rows], None if self.latents is None else self.latents[rows])

    def to(self, device: torch.device, layout: torch.memory_format = torch.contiguous_format) -> Batch:
        """The same on `device`, the images laid out as asked."""
        # Moved first, laid out there: the processor would be slower at it.
        images = self.images.to(device, non_blocking=True).contiguous(memory_format=layout)
        return Batch(images, None if self.latents is None else self.latents.to(device, non_blocking=True))


class Stream(Protocol):
    """An endless supply of training images, and a few that are never among them."""

    @property
    def skipped(self) -> Mapping[str, str]:
        """Names of the damaged pictures met so far, and what was wrong with each."""
        ...

    def batch(self, first: int, count: int) -> Batch:
        """Draws `first` to `first + count - 1`; the same arguments always give the same batch, in any thread."""
        ...

    def held_out(self) -> Tensor:
        """Images that are never trained on, N 3 S S in [-1, 1]; always the same."""
        ...


class PictureLike(Protocol):
    """A picture that can be read."""

    @property
    def label(self) -> str:
        """Name for messages."""
        ...

    def read(self) -> bytes:
        """The encoded bytes. Raises `OSError`."""
        ...


class Crops(ABC):
    """What streams of freshly cut crops share: reading, passing damaged pictures over, held-out images."""

    def __init__(self, config: DataConfig, rng_seed: int) -> None:
        self.config = config
        self.rng_seed = rng_seed
        self.skipped: dict[str, str] = {}
        """The damaged pictures met so far, and what was wrong with each."""
        self.held_out_pixels: NDArray[np.uint8]
        """The held-out images as pixels, N size size 3."""
        self._kept: dict[Picture, Image.Image] = {}
        self._room = config.keep_mb * 2**20

    @abstractmethod
    def crop(self, draw: int) -> NDArray[np.uint8]:
        """Crop number `draw`, as pixels: size size 3. Raises `RacError` if nothing can be read."""

    def batch(self, first: int, count: int) -> Batch:
        """Draws `first` to `first + count - 1` as a `Batch` without latents."""
        return Batch(from_pixels(np.stack([self.crop(draw) for draw in range(first, first + count)])))

    def held_out(self) -> Tensor:
        """The held-out images, N 3 size size in [-1, 1]: the centre of each held-out picture.

        Where there are fewer held-out pictures than `config.held_out`, further images are crops of the same ones.
        """
        return from_pixels(self.held_out_pixels)

    def _hold_out(self, pictures: Iterable[PictureLike], wanted: int) -> int:
        """Keep crops of the first `wanted` that can be read; returns how many were looked at."""
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

    def _cut_first(self, pictures: Iterable[PictureLike], choose: Callable[[Size], Region]) -> NDArray[np.uint8]:
        """A crop of the first picture that can be read."""
        looked = 0
        for picture in pictures:
            looked += 1
            pixels = self._try(picture, lambda picture: self._cut(picture, choose))
            if pixels is not None:
                return pixels
        raise RacError(f"none of the {looked} pictures to train on can be read; the first: {self._first_skipped()}")

    def _cut(self, picture: PictureLike, choose: Callable[[Size], Region]) -> NDArray[np.uint8]:
        if not self.config.draft:
            opened = self._open(picture)
            return cut(opened, choose(opened.size), self.config.size)
        encoded, name = picture.read(), picture.label
        size = upright_size(io.BytesIO(encoded), name)
        region = choose(size)
        # Half of what would be right is left to the resampling, which is better at it.
        shrink = next((shrink for shrink in (8, 4, 2) if region.side >= 2 * shrink * self.config.size), 1)
        opened = read_picture(io.BytesIO(encoded), convert=True, name=name, shrink=shrink)
        return cut(opened, region, self.config.size, 1 if opened.size == size else shrink)

    def _open(self, picture: PictureLike) -> Image.Image:
        if isinstance(picture, Picture) and picture in self._kept:
            return self._kept[picture]
        opened = read_picture(io.BytesIO(picture.read()), convert=True, name=picture.label)
        # Pictures come equally often, so keeping those that came first serves as well as any cleverer choice.
        size = 3 * opened.width * opened.height
        if isinstance(picture, Picture) and size <= self._room:
            self._room -= size
            self._kept[picture] = opened
        return opened

    def _try(self, picture: PictureLike, work: Callable[[PictureLike], T]) -> T | None:
        """What `work` gives, or None, with a warning the first time, for a damaged picture."""
        try:
            return work(picture)
        except (ImageError, OSError) as error:
            if picture.label not in self.skipped:
                self.skipped[picture.label] = str(error)
                warnings.warn(f"skipped from training: {error}", stacklevel=2)
            return None

    def _first_skipped(self) -> str:
        return next(iter(self.skipped.values()))


class ImageStream(Crops):
    """Random square crops of the pictures a `DataConfig` names; each picture once an epoch.

    Damaged pictures are skipped: the next one of the epoch takes the place, a warning names the file once, and
    `skipped` holds all of them. Raises `RacError` if there are no pictures, or none that can be read.
    """

    def __init__(self, config: DataConfig, rng_seed: int = 0) -> None:
        super().__init__(config, rng_seed)
        files = find_pictures(config.paths, config.exclude)
        used = self._hold_out(files, min(config.held_out, max(1, len(files) // 4)))
        if used == len(files):
            raise RacError(
                f"{len(files)} picture(s), {len(self.skipped)} of them damaged, are too few: one is held out and "
                "none is left to train on; add images"
            )
        self.files = files[used:]
        """The pictures to train on, damaged ones that were not met yet included."""

    def __len__(self) -> int:
        """Pictures to train on, damaged ones that were not met yet included."""
        return len(self.files)

    def crop(self, draw: int) -> NDArray[np.uint8]:
        """Crop number `draw`, as pixels: size size 3."""
        epoch, place = divmod(draw, len(self))
        order = permutation(len(self), self.rng_seed, epoch)
        pictures = (self.files[int(order[(place + offset) % len(self)])] for offset in range(len(self)))
        values = draw_values(generator(self.rng_seed, "crop", draw))
        return self._cut_first(pictures, lambda size: random_region(size, self.config, values))

    def whole(self, number: int) -> NDArray[np.uint8]:
        """The centre of picture `number` (of the next one, where it is damaged), as pixels: size size 3."""
        pictures = (self.files[(number + offset) % len(self)] for offset in range(len(self)))
        return self._cut_first(pictures, centre_region)


class InTurn:
    """Streams that take turns, `size` draws each, so that a batch of that size, or a part of it, comes from one.

    The streams number their draws alike; where they go through the same pictures, an epoch still shows each one once.
    """

    def __init__(self, streams: Sequence[Stream], size: int) -> None:
        self.streams = streams
        self.size = size

    @property
    def skipped(self) -> Mapping[str, str]:
        """The damaged pictures that any of them met."""
        return {name: why for stream in self.streams for name, why in stream.skipped.items()}

    def batch(self, first: int, count: int) -> Batch:
        """Draws `first` to `first + count - 1`, which must be of one turn."""
        return self.streams[first // self.size % len(self.streams)].batch(first, count)

    def held_out(self) -> Tensor:
        """Those of the first."""
        return self.streams[0].held_out()


@lru_cache(maxsize=4)
def permutation(count: int, rng_seed: int, epoch: int) -> NDArray[np.int64]:
    """The order in which epoch number `epoch` goes through `count` things."""
    return torch.randperm(count, generator=generator(rng_seed, "epoch", epoch)).numpy()


class Region(NamedTuple):
    """A square of a picture, in its pixels, and whether to mirror it."""

    left: int
    top: int
    side: int
    mirror: bool = False


def draw_values(rng: torch.Generator) -> list[float]:
    """The four numbers that choose a crop, each in [0, 1)."""
    return torch.rand(4, generator=rng, dtype=torch.float64).tolist()


def random_region(size: Size, config: DataConfig, values: Sequence[float]) -> Region:
    """A square at a place and a scale that four `values` of [0, 1) choose.

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
    """The largest square in the centre."""
    side = min(size)
    return Region((size[0] - side) // 2, (size[1] - side) // 2, side)


def random_crop(picture: Image.Image, config: DataConfig, rng: torch.Generator) -> NDArray[np.uint8]:
    """A random square region at a random scale, resampled with antialiasing to size size 3 pixels."""
    return cut(picture, random_region(picture.size, config, draw_values(rng)), config.size)


def centre_crop(picture: Image.Image, size: int) -> NDArray[np.uint8]:
    """The largest square in the centre, resampled with antialiasing to size size 3 pixels."""
    return cut(picture, centre_region(picture.size), size)


def cut(picture: Image.Image, region: Region, size: int, shrink: int = 1) -> NDArray[np.uint8]:
    """`region`, resampled with antialiasing to size size 3 pixels, of a picture that was decoded at 1 / `shrink`."""
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
    """The batches of iterations `first` to `last - 1`, in order, made ahead by `workers` threads (0: none).

    Of each batch of `size`, only `rows` are read where they are given: one process's share. Raises as `ahead`.
    """
    start, stop, _ = (rows or slice(size)).indices(size)
    return ahead(
        lambda iteration: stream.batch(iteration * size + start, stop - start), range(first, last), workers, patience
    )


def ahead(
    work: Callable[[int], T], items: Iterable[int], workers: int, patience: float = 600.0
) -> Generator[T, None, None]:
    """What `work` makes of each item, in order, made ahead by `workers` threads (0: none); a few wait at a time.

    Threads, not processes: decoding and resampling run outside Python's lock. Raises whatever `work` raises, and
    `RacError` if a thread ends or none of them delivers for `patience` seconds.
    """
    if workers == 0:
        yield from map(work, items)
        return
    jobs: SimpleQueue[tuple[int, Future[T]] | None] = SimpleQueue()

    def serve() -> None:
        while (job := jobs.get()) is not None:
            item, future = job
            if not future.set_running_or_notify_cancel():
                continue
            try:
                future.set_result(work(item))
            except Exception as error:
                future.set_exception(error)
            except BaseException as error:  # such as SystemExit, which would end the run as if all were well
                future.set_exception(RacError(f"a thread that reads images was ended by {error!r}"))

    # Not a thread pool: leaving it, and leaving Python, would wait for a thread that hangs.
    threads = [Thread(target=serve, name=f"rac-data-{k}", daemon=True) for k in range(workers)]
    waiting: deque[Future[T]] = deque()
    try:
        for thread in threads:
            thread.start()
        for item in items:
            waiting.append(Future())
            jobs.put((item, waiting[-1]))
            if len(waiting) > workers + 1:
                yield _awaited(waiting.popleft(), patience)
        while waiting:
            yield _awaited(waiting.popleft(), patience)
    finally:
        for future in waiting:
            future.cancel()
        until = time.monotonic() + _GOODBYE
        for _ in threads:
            jobs.put(None)
        for thread in threads:
            if thread.ident is not None:
                thread.join(max(0.0, until - time.monotonic()))


_GOODBYE = 2.0
"""Seconds that reading threads have to finish what they are at."""


def _awaited(future: Future[T], patience: float) -> T:
    if not wait([future], timeout=patience).done:
        raise RacError(
            f"no images came for {patience:.0f} seconds; the disk or the network that they are on hangs, "
            "or reading is slower than that: raise patience_minutes"
        )
    return future.result()
