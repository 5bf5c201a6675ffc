"""Hugging Face data sets: opening them, and rows in any order from one on this machine.

Spelled as hf:PATH_OR_NAME, with :SPLIT and :COLUMN after it where those are not "train" and the only column of images.
"""

from __future__ import annotations

import hashlib
import re
from pathlib import Path
from typing import Any, NamedTuple

from ..errors import ImageError, RacError, install_extra
from .pictures import Names


class HFPath(NamedTuple):
    """What hf:NAME:SPLIT:COLUMN says."""

    name: str
    split: str
    column: str | None

    @classmethod
    def read(cls, text: str) -> HFPath:
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
        self._size_hint = int.from_bytes(hashlib.sha256(rows._fingerprint.encode()).digest()[:6], "big")
        self._rows = encoded_images(rows.select_columns([column]), column)
        self._column = column
        self._text = text
        self.names = Names.of(f"{index:09d}" for index in range(len(rows)))

    @classmethod
    def open(cls, text: str) -> Rows:
        """Open what `text` spells. Raises `RacError`."""
        hf_path = HFPath.read(text)
        rows = load_rows(hf_path, text, streaming=False)
        column = image_column(hf_path, rows.features, text)
        return cls(rows, column, text)

    def describe(self, index: int) -> str:
        """See `Source`."""
        return f"row {index} of {self._text}"

    def size_hint(self, index: int) -> int:
        """See `Source`; one for all rows, which changes when any of them does."""
        return self._size_hint

    def read(self, index: int) -> bytes:
        """See `Source`."""
        return encoded(self._rows[index][self._column], self.describe(index))


def load_rows(hf_path: HFPath, text: str, streaming: bool) -> Any:
    """The split that is spelled; its images may be of any column. Raises `RacError`."""
    try:
        import datasets
    except ImportError:
        raise RacError(
            f"{text} needs Hugging Face's datasets, which is not installed; {install_extra('datasets')}"
        ) from None
    path = Path(hf_path.name).expanduser()
    try:
        if (path / "state.json").is_file() or (path / "dataset_dict.json").is_file():
            saved = datasets.load_from_disk(str(path))
            if isinstance(saved, datasets.DatasetDict):
                if hf_path.split not in saved:
                    raise RacError(f"{text} has no split {hf_path.split}; it has {', '.join(saved)}")
                saved = saved[hf_path.split]
            return saved.to_iterable_dataset() if streaming else saved
        name = str(path) if path.exists() else hf_path.name
        return datasets.load_dataset(name, split=hf_path.split, streaming=streaming)
    except RacError:
        raise
    except Exception as error:  # a loader fails in many ways, all with the same mend
        raise unreadable(text, error) from error


def unreadable(text: str, error: Exception) -> RacError:
    """The error to raise where the data set `text` fails with `error`."""
    reason = f"{type(error).__name__}: {error}".strip().splitlines()[0]
    return RacError(f"{text} cannot be read ({reason}); check the path or name, the split, and the connection")


def image_column(hf_path: HFPath, features: Any, text: str) -> str:
    """The name of the column that holds the images. Raises `RacError` where that is not clear."""
    from datasets import Image

    if hf_path.column is not None:
        if hf_path.column not in features:
            raise RacError(f"{text} has no column {hf_path.column}; it has {', '.join(features)}")
        return hf_path.column
    found = [name for name, kind in features.items() if isinstance(kind, Image)]
    found = found or [name for name in ("image", "jpg", "png", "webp") if name in features]
    if len(found) != 1:
        raise RacError(f"{text}: which column is the image? It has {', '.join(features)}; give hf:NAME:SPLIT:COLUMN")
    return found[0]


def encoded_images(rows: Any, column: str) -> Any:
    """The same rows, images left as they were encoded."""
    from datasets import Image

    decoded = rows.features is not None and isinstance(rows.features[column], Image)
    return rows.cast_column(column, Image(decode=False)) if decoded else rows


def encoded(value: Any, label: str) -> bytes:
    """The encoded bytes of one value of an image column. Raises `ImageError` naming `label` where it has none."""
    if isinstance(value, bytes):
        return value
    if isinstance(value, dict) and value.get("bytes") is not None:
        return value["bytes"]
    if isinstance(value, dict) and value.get("path"):
        import fsspec

        with fsspec.open(value["path"], "rb") as file:
            return file.read()
    raise ImageError(f"{label} holds {'nothing' if value is None else type(value).__name__}, no encoded picture")
