"""Hugging Face data sets: opening them, and rows in any order from one on this machine.

Written as hf:PATH_OR_NAME, with :SPLIT and :COLUMN after it where those are not "train" and the only column of images.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from functools import cached_property
from typing import Any, NamedTuple

from ..errors import ImageError, RacError, install_extra
from ..files import home_expanded
from .pictures import Names


class HFPath(NamedTuple):
    """Parts of a path hf:NAME:SPLIT:COLUMN."""

    name: str
    split: str
    column: str | None

    @classmethod
    def read(cls, text: str) -> HFPath:
        """Parses such a path; a split may be a slice such as train[:1000]. Raises `RacError`."""
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
        self._all = rows
        self._rows = encoded_images(rows.select_columns([column]), column)
        self._column = column
        self._text = text
        self.names = Names.of(f"{index:09d}" for index in range(len(rows)))
        self.identity = (rows._fingerprint, column)
        """Distinguishes the rows from those of another data set, split or slice."""

    @classmethod
    def open(cls, text: str) -> Rows:
        """Opens the data set that `text` names, hf:NAME:SPLIT:COLUMN. Raises `RacError`."""
        hf_path = HFPath.read(text)
        rows = load_rows(hf_path, text, streaming=False)
        column = image_column(hf_path, rows.features, text)
        return cls(rows, column, text)

    def describe(self, index: int) -> str:
        """Returns the number of row `index` and the name of the data set."""
        return f"row {index} of {self._text}"

    def size_hint(self, index: int) -> int:
        """Returns a number, the same for all rows, that changes when any of them does."""
        return self._size_hint

    def class_of(self, index: int) -> str | None:
        """Returns the name of the row's class, or the value of its column "label"; None without such a column."""
        return None if self._labels is None else self._labels.name_of(self._values[index])

    def read(self, index: int) -> bytes:
        """Returns the encoded bytes of row `index`. Raises `OSError`, and `ImageError` for a row without a picture."""
        return encoded(self._rows[index][self._column], self.describe(index))

    @property
    def text(self) -> str:
        """The path that the data set was opened by."""
        return self._text

    @cached_property
    def _labels(self) -> LabelColumn | None:
        return LabelColumn.of(self._all.features, self._text)

    @cached_property
    def _values(self) -> Any:
        assert self._labels is not None
        column = self._labels.column
        return self._all.select_columns([column])[:][column]


class LabelColumn(NamedTuple):
    """The column of a data set that holds the classes of its rows."""

    column: str
    names: tuple[str, ...] | None
    """Names of the classes by number, if the data set has them."""

    @classmethod
    def of(cls, features: Any, text: str) -> LabelColumn | None:
        """Returns the only column of classes, or the one called "label"; None if there is none. Raises `RacError`."""
        from datasets import ClassLabel

        found = [name for name, kind in features.items() if isinstance(kind, ClassLabel)]
        if "label" in features:
            found = ["label"]
        if len(found) > 1:
            raise RacError(f"{text}: which column is the class? It has {', '.join(found)}; call one of them label")
        if not found:
            return None
        kind = features[found[0]]
        return cls(found[0], tuple(kind.names) if isinstance(kind, ClassLabel) else None)

    def name_of(self, value: Any) -> str | None:
        """Returns the name of the class that a row's `value` stands for; None for -1 or no value, as in test sets."""
        if value is None or value == "" or (isinstance(value, int) and value < 0):
            return None
        return str(value) if self.names is None else self.names[value]


def check_apart(opened: Sequence[Rows]) -> None:
    """Raises `RacError` if two of the data sets may share rows: slices of one split."""
    begun: dict[tuple[str, str, str | None], Rows] = {}
    for rows in opened:
        hf_path = HFPath.read(rows.text)
        key = (hf_path.name, hf_path.split.split("[")[0], hf_path.column)
        other = begun.setdefault(key, rows)
        if other.identity != rows.identity:
            raise RacError(f"{other.text} and {rows.text} are of one split and may share rows; give one of them")


def load_rows(hf_path: HFPath, text: str, streaming: bool) -> Any:
    """Loads the split of a data set, with images in any column. Raises `RacError`."""
    try:
        import datasets
    except ImportError:
        raise RacError(
            f"{text} needs Hugging Face's datasets, which is not installed; {install_extra('datasets')}"
        ) from None
    path = home_expanded(hf_path.name)
    try:
        if (path / "state.json").is_file() or (path / "dataset_dict.json").is_file():
            saved = _chosen(datasets.load_from_disk(str(path)), hf_path, text)
            return saved.to_iterable_dataset() if streaming else saved
        name = str(path) if path.exists() else hf_path.name
        return datasets.load_dataset(name, split=hf_path.split, streaming=streaming)
    except RacError:
        raise
    except Exception as error:  # a loader fails in many ways, all with the same mend
        raise unreadable(text, error) from error


def _chosen(saved: Any, hf_path: HFPath, text: str) -> Any:
    """Returns the rows that `hf_path` names in a saved data set, or in several splits saved together."""
    import datasets

    if not isinstance(saved, datasets.DatasetDict):
        if text.count(":") == 1:
            return saved
        # One split that was saved alone; it may have kept its name.
        own = str(saved.split) if saved.split is not None else "train"
        saved = {own.split("[")[0]: saved}
    wanted = re.findall(r"(?:^|\+)\s*([^\[\]+\s]+)", hf_path.split)
    if missing := [name for name in wanted if name not in saved]:
        raise RacError(f"{text} has no split {missing[0]}; it has {', '.join(saved)}")
    if hf_path.split in saved:
        return saved[hf_path.split]
    spans = datasets.ReadInstruction.from_spec(hf_path.split).to_absolute({name: len(saved[name]) for name in wanted})
    parts = [saved[span.splitname].select(range(span.from_ or 0, _end(span, saved))) for span in spans]
    return parts[0] if len(parts) == 1 else datasets.concatenate_datasets(parts)


def _end(span: Any, saved: Any) -> int:
    return len(saved[span.splitname]) if span.to is None else span.to


def unreadable(text: str, error: Exception) -> RacError:
    """Returns the error to raise if the data set `text` fails with `error`."""
    reason = f"{type(error).__name__}: {error}".strip().splitlines()[0]
    return RacError(f"{text} cannot be read ({reason}); check the path or name, the split, and the connection")


def image_column(hf_path: HFPath, features: Any, text: str) -> str:
    """Returns the name of the column that holds the images. Raises `RacError` if that is not clear."""
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
    """Returns the same rows with images left as they were encoded."""
    from datasets import Image

    decoded = rows.features is not None and isinstance(rows.features[column], Image)
    return rows.cast_column(column, Image(decode=False)) if decoded else rows


def encoded(value: Any, label: str) -> bytes:
    """Returns the encoded bytes of one value of an image column. Raises `ImageError` naming `label` if it has none."""
    if isinstance(value, bytes):
        return value
    if isinstance(value, dict) and value.get("bytes") is not None:
        return value["bytes"]
    if isinstance(value, dict) and value.get("path"):
        import fsspec

        with fsspec.open(value["path"], "rb") as file:
            return file.read()
    raise ImageError(f"{label} holds {'nothing' if value is None else type(value).__name__}, no encoded picture")
