"""Training images as an endless numbered stream of crops.

Crop n is a pure function of (rng_seed, n), so batch k is one of k: going on after an interruption needs no state.
"""

from __future__ import annotations

import io
import warnings
from collections import deque
from collections.abc import Generator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import lru_cache
from typing import NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from ..errors import ImageError, RacError
from ..images import from_pixels, read_picture
from ..runtime import generator
from .config import DataConfig
from .files import PictureFile, find_pictures


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

    def batch(self, first: int, count: int) -> Batch:
        """Draws `first` to `first + count - 1`; the same arguments always give the same batch, in any thread."""
        ...

    def held_out(self) -> Tensor:
        """Images that are never trained on, N 3 S S in [-1, 1]; always the same."""
        ...


class ImageStream:
    """Random square crops of the pictures a `DataConfig` names; each picture once an epoch.

    Damaged pictures are skipped: the next one of the epoch takes the place, a warning names the file once, and
    `skipped` holds all of them. Raises `RacError` if there are no pictures, or none that can be read.
    """

    def __init__(self, config: DataConfig, rng_seed: int = 0) -> None:
        self.config = config
        self.rng_seed = rng_seed
        self.skipped: dict[str, str] = {}
        """Names of the damaged pictures met so far, and what was wrong with each."""
        self._kept: dict[PictureFile, Image.Image] = {}
        self._room = config.keep_mb * 2**20
        self.held_out_pixels: NDArray[np.uint8]
        """The held-out images as pixels, N size size 3."""
        self.held_out_pixels, self._files = self._split(find_pictures(config.paths))

    def __len__(self) -> int:
        """Pictures to train on, damaged ones that were not met yet included."""
        return len(self._files)

    def batch(self, first: int, count: int) -> Batch:
        """Draws `first` to `first + count - 1` as a `Batch` without latents."""
        return Batch(from_pixels(np.stack([self.crop(draw) for draw in range(first, first + count)])))

    def held_out(self) -> Tensor:
        """The held-out images, N 3 size size in [-1, 1]: the centre of each held-out picture.

        Where there are fewer held-out pictures than `config.held_out`, further images are crops of the same ones.
        """
        return from_pixels(self.held_out_pixels)

    def crop(self, draw: int) -> NDArray[np.uint8]:
        """Crop number `draw`, as pixels: size size 3."""
        epoch, place = divmod(draw, len(self._files))
        order = permutation(len(self._files), self.rng_seed, epoch)
        for offset in range(len(order)):
            picture = self._open(self._files[order[(place + offset) % len(order)]])
            if picture is not None:
                return random_crop(picture, self.config, generator(self.rng_seed, "crop", draw))
        raise RacError(f"none of the {len(order)} pictures to train on can be read; the first: {self._first_skipped()}")

    def _split(self, files: list[PictureFile]) -> tuple[NDArray[np.uint8], list[PictureFile]]:
        """Crops of the first pictures that can be read, at most a quarter of all; and the pictures left to train on."""
        wanted = min(self.config.held_out, max(1, len(files) // 4))
        pictures: list[Image.Image] = []
        used = 0
        while len(pictures) < wanted and used < len(files):
            picture = self._open(files[used])
            used += 1
            if picture is not None:
                pictures.append(picture)
        if not pictures:
            raise RacError(f"none of the {used} pictures can be read; the first: {self._first_skipped()}")
        if used == len(files):
            raise RacError(
                f"{len(files)} picture(s), {len(self.skipped)} of them damaged, are too few: one is held out and "
                "none is left to train on; add images"
            )
        self._kept.clear()
        crops = [centre_crop(picture, self.config.size) for picture in pictures[: self.config.held_out]]
        for index in range(len(crops), self.config.held_out):
            crops.append(random_crop(pictures[index % len(pictures)], self.config, generator(0, "held out", index)))
        return np.stack(crops), files[used:]

    def _open(self, file: PictureFile) -> Image.Image | None:
        if file in self._kept:
            return self._kept[file]
        try:
            picture = read_picture(io.BytesIO(file.read()), convert=True, name=file.name)
        except (ImageError, OSError) as error:
            if file.name not in self.skipped:
                self.skipped[file.name] = str(error)
                warnings.warn(f"skipped from training: {error}", stacklevel=2)
            return None
        # Pictures come equally often, so keeping those that came first serves as well as any cleverer choice.
        size = 3 * picture.width * picture.height
        if size <= self._room:
            self._room -= size
            self._kept[file] = picture
        return picture

    def _first_skipped(self) -> str:
        return next(iter(self.skipped.values()))


@lru_cache(maxsize=4)
def permutation(count: int, rng_seed: int, epoch: int) -> list[int]:
    """The order in which epoch number `epoch` goes through `count` things."""
    return torch.randperm(count, generator=generator(rng_seed, "epoch", epoch)).tolist()


def random_crop(picture: Image.Image, config: DataConfig, rng: torch.Generator) -> NDArray[np.uint8]:
    """A random square region at a random scale, resampled with antialiasing to size size 3 pixels.

    Its side is log-uniform between `smallest_crop` and `largest_crop`; the whole short side of a smaller picture.
    """
    short = min(picture.size)
    low = min(config.smallest_crop or config.size, short)
    high = max(min(config.largest_crop or short, short), low)
    scale, across, down, mirror = torch.rand(4, generator=rng, dtype=torch.float64).tolist()
    side = round(low * (high / low) ** scale)
    left, top = int(across * (picture.width - side + 1)), int(down * (picture.height - side + 1))
    pixels = _resample(picture, (left, top, left + side, top + side), config.size)
    return pixels[:, ::-1] if config.flip and mirror < 0.5 else pixels


def centre_crop(picture: Image.Image, size: int) -> NDArray[np.uint8]:
    """The largest square in the centre, resampled with antialiasing to size size 3 pixels."""
    side = min(picture.size)
    left, top = (picture.width - side) // 2, (picture.height - side) // 2
    return _resample(picture, (left, top, left + side, top + side), size)


def _resample(picture: Image.Image, box: tuple[int, int, int, int], size: int) -> NDArray[np.uint8]:
    return np.asarray(picture.resize((size, size), Image.Resampling.BICUBIC, box=box))


def batches(stream: Stream, size: int, first: int, last: int, workers: int = 1) -> Generator[Batch, None, None]:
    """The batches of iterations `first` to `last - 1`, in order, made ahead by `workers` threads (0: none).

    Threads, not processes: decoding and resampling run outside Python's lock.
    """
    if workers == 0:
        for iteration in range(first, last):
            yield stream.batch(iteration * size, size)
        return
    pool = ThreadPoolExecutor(workers, thread_name_prefix="rac-data")
    ahead: deque[Future[Batch]] = deque()
    try:
        for iteration in range(first, last):
            ahead.append(pool.submit(stream.batch, iteration * size, size))
            if len(ahead) > workers + 1:
                yield ahead.popleft().result()
        while ahead:
            yield ahead.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)
