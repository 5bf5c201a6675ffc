"""Hugging Face data sets: rows in any order from one on this machine, or one read in its own order.

Spelled as hf:PATH_OR_NAME, with :SPLIT and :COLUMN after it where those are not "train" and the only column of images.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from threading import Lock
from typing import Any, NamedTuple

from ..errors import ImageError, RacError
from ..runtime import generator
from .config import DataConfig
from .files import Names
from .stream import Crops, draw_values, permutation, random_region

WINDOW = 512
"""Pictures of a streamed data set that are in memory together, still encoded, to be drawn from in random order."""
_WINDOWS_KEPT = 3
"""Threads and processes ask for neighbouring batches at about the same time."""


class Spelling(NamedTuple):
    """What hf:NAME:SPLIT:COLUMN says."""

    name: str
    split: str
    column: str | None

    @classmethod
    def read(cls, text: str) -> Spelling:
        """Read it; a split may be a slice such as train[:1000]. Raises `RacError`."""
        found = re.fullmatch(r"hf(?:-stream)?:([^:]+)(?::([^:\[\]]+(?:\[[^\[\]]*\])?))?(?::([^:]+))?", text)
        if not found:
            raise RacError(f"{text} is not hf:PATH_OR_NAME, hf:PATH_OR_NAME:SPLIT or hf:PATH_OR_NAME:SPLIT:COLUMN")
        return cls(found[1], found[2] or "train", found[3])


class Rows:
    """A data set on this machine (a folder, one saved to disk, or one from the hub), as a `Source`.

    Rows are named by their numbers. They stay on the disk, memory-mapped, until they are read.
    """

    def __init__(self, rows: Any, column: str, text: str) -> None:
        self._trace = int.from_bytes(hashlib.sha256(rows._fingerprint.encode()).digest()[:6], "big")
        self._rows = _encoded_images(rows.select_columns([column]), column)
        self._column = column
        self._text = text
        self.names = Names.of(f"{index:09d}" for index in range(len(rows)))

    @classmethod
    def open(cls, text: str) -> Rows:
        """Open what `text` spells. Raises `RacError`."""
        spelling = Spelling.read(text)
        rows = _load(spelling, text, streaming=False)
        column = _column(spelling, rows.features, text)
        return cls(rows, column, text)

    def label(self, index: int) -> str:
        """See `Source`."""
        return f"row {index} of {self._text}"

    def trace(self, index: int) -> int:
        """See `Source`; one for all rows, which changes when any of them does."""
        return self._trace

    def read(self, index: int) -> bytes:
        """See `Source`."""
        return _encoded(self._rows[index][self._column], self.label(index))


@dataclass(frozen=True)
class _Row:
    label: str
    value: Any

    def read(self) -> bytes:
        return _encoded(self.value, self.label)


class StreamedImages(Crops):
    """Random crops of a data set that is read from its beginning on, for what is too large to be fetched.

    The first readable rows are held out. The others are drawn in random order within windows of `WINDOW` rows; when
    the last row was read, the next epoch begins. Crop n is a function of (rng_seed, n) and of the rows, so resuming
    stores nothing: rows before it are read, at most one epoch of them, and dropped without being decoded. That it
    resumes exactly hangs on the data set: its rows must come in the same order every time. Each process reads all
    rows, and decodes its own. Raises `RacError` for a data set that cannot be read, or is too small.
    """

    def __init__(self, config: DataConfig, rng_seed: int = 0) -> None:
        super().__init__(config, rng_seed)
        self._text = str(config.paths[0])
        if config.exclude:
            raise RacError(f"the rows of {self._text} lie in no folders; leave out exclude {' '.join(config.exclude)}")
        spelling = Spelling.read(self._text)
        rows = _load(spelling, self._text, streaming=True)
        features: dict[str, Any] = rows.features or next(iter(rows), {})
        column = _column(spelling, features, self._text)
        self._rows = _encoded_images(rows.select_columns([column]), column)
        self._column = column
        self._total: int | None = None
        """Rows of the data set, once all were read."""
        self._skip = self._hold_out(self._read(0), config.held_out)
        self._lock = Lock()
        self._windows: dict[int, list[_Row]] = {}
        self._seek(0)
        self._window(0)

    def crop(self, draw: int) -> Any:
        """Crop number `draw`, as pixels: size size 3. Waits for the data set's next window, where that is needed."""
        number, place = divmod(draw, WINDOW)
        window = self._window(number)
        order = permutation(len(window), self.rng_seed, number)
        pictures = (window[int(order[(place + offset) % len(window)])] for offset in range(len(window)))
        values = draw_values(generator(self.rng_seed, "crop", draw))
        return self._cut_first(pictures, lambda size: random_region(size, self.config, values))

    def _window(self, number: int) -> list[_Row]:
        """Rows `WINDOW` x `number` and on of all epochs, laid end to end."""
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
        """Make window `number` the next one to be read; 0, unless the data set was read to its end before."""
        start = number * WINDOW % (self._total - self._skip) if self._total else 0
        self._reading, self._next = self._read(self._skip + start), number

    def _take(self, count: int) -> list[_Row]:
        """The next rows, from the beginning again after the last."""
        found = list(islice(self._reading, count))
        while len(found) < count:
            self._reading = self._read(self._skip)
            more = list(islice(self._reading, count - len(found)))
            if not more:
                raise RacError(f"{self._text} has only {self._skip} rows, which are held out; give more")
            found += more
        return found

    def _read(self, first: int) -> Iterator[_Row]:
        """Rows `first` and on, to the last."""
        rows, index = iter(self._rows), -1
        while True:
            try:
                row = next(rows, None)
            except Exception as error:  # what a server, a file or a loading script can do
                raise _unreadable(self._text, error) from error
            if row is None:
                self._total = index + 1
                return
            index += 1
            if index >= first:
                yield _Row(f"row {index} of {self._text}", row[self._column])


def _load(spelling: Spelling, text: str, streaming: bool) -> Any:
    """The split that is spelled; its images may be of any column."""
    try:
        import datasets
    except ImportError:
        raise RacError(
            f"{text} needs Hugging Face's datasets, which is not installed; "
            "pip install 'rectified-auto-coder[datasets]'"
        ) from None
    path = Path(spelling.name).expanduser()
    try:
        if (path / "state.json").is_file() or (path / "dataset_dict.json").is_file():
            saved = datasets.load_from_disk(str(path))
            if isinstance(saved, datasets.DatasetDict):
                if spelling.split not in saved:
                    raise RacError(f"{text} has no split {spelling.split}; it has {', '.join(saved)}")
                saved = saved[spelling.split]
            return saved.to_iterable_dataset() if streaming else saved
        name = str(path) if path.exists() else spelling.name
        return datasets.load_dataset(name, split=spelling.split, streaming=streaming)
    except RacError:
        raise
    except Exception as error:  # a loader fails in many ways, all with the same mend
        raise _unreadable(text, error) from error


def _unreadable(text: str, error: Exception) -> RacError:
    reason = f"{type(error).__name__}: {error}".strip().splitlines()[0]
    return RacError(f"{text} cannot be read ({reason}); check the path or name, the split, and the connection")


def _column(spelling: Spelling, features: Any, text: str) -> str:
    from datasets import Image

    if spelling.column is not None:
        if spelling.column not in features:
            raise RacError(f"{text} has no column {spelling.column}; it has {', '.join(features)}")
        return spelling.column
    found = [name for name, kind in features.items() if isinstance(kind, Image)]
    found = found or [name for name in ("image", "jpg", "png", "webp") if name in features]
    if len(found) != 1:
        raise RacError(f"{text}: which column is the image? It has {', '.join(features)}; give hf:NAME:SPLIT:COLUMN")
    return found[0]


def _encoded_images(rows: Any, column: str) -> Any:
    """The same rows, images left as they were encoded."""
    from datasets import Image

    decoded = rows.features is not None and isinstance(rows.features[column], Image)
    return rows.cast_column(column, Image(decode=False)) if decoded else rows


def _encoded(value: Any, label: str) -> bytes:
    if isinstance(value, bytes):
        return value
    if isinstance(value, dict) and value.get("bytes") is not None:
        return value["bytes"]
    if isinstance(value, dict) and value.get("path"):
        import fsspec

        with fsspec.open(value["path"], "rb") as file:
            return file.read()
    raise ImageError(f"{label} holds {'nothing' if value is None else type(value).__name__}, no encoded picture")
