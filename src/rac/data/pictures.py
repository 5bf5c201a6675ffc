"""Pictures that can be read when they are needed, and fingerprints that identify a collection of them.

A collection is a few dozen bytes a picture: names, and where to read. Any picture can be read without the others.
"""

from __future__ import annotations

import difflib
import hashlib
from collections import Counter
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import PurePosixPath
from typing import NamedTuple, Protocol, overload

import numpy as np
from numpy.typing import NDArray

from ..errors import RacError

SAMPLED = 32
"""Number of pictures, spread over the collection, whose contents count in its fingerprint."""
LISTED = 10_000
"""Largest number of pictures that a fingerprint lists, so that it can name those that changed."""


class Names(Sequence[str]):
    """A sequence of many names in little more memory than their letters take."""

    def __init__(self, letters: bytes) -> None:
        self.letters = letters
        """All names in UTF-8, a zero after each."""
        self._ends = np.flatnonzero(np.frombuffer(letters, np.uint8) == 0)

    @classmethod
    def of(cls, names: Iterable[str]) -> Names:
        """Returns a sequence of `names`.

        Names that are not Unicode (a file system allows that) come back as they were.
        """
        letters = bytearray()
        for name in names:
            letters += name.encode("utf-8", "surrogateescape") + b"\0"
        return cls(bytes(letters))

    def __len__(self) -> int:
        return len(self._ends)

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> list[str]: ...
    def __getitem__(self, index: int | slice) -> str | list[str]:
        if isinstance(index, slice):
            return [self[k] for k in range(len(self))[index]]
        return self.encoded(range(len(self))[index]).decode("utf-8", "surrogateescape")

    def encoded(self, index: int) -> bytes:
        """Returns name number `index`, at least 0, in UTF-8."""
        return self.letters[int(self._ends[index - 1]) + 1 if index else 0 : int(self._ends[index])]


class Source(Protocol):
    """One place that holds pictures: a folder, a tar shard, a data set."""

    @property
    def names(self) -> Names:
        """Names of its pictures, for ordering; they do not depend on where the source lies."""
        ...

    def describe(self, index: int) -> str:
        """Returns the name of picture `index` in messages."""
        ...

    def size_hint(self, index: int) -> int:
        """Returns a cheap fingerprint of picture `index` (its size in bytes if known), to notice that it was replaced.

        It is known without reading the picture.
        """
        ...

    def class_of(self, index: int) -> str | None:
        """Returns the class of picture `index`: its folder's name, or the data set's label; None if it has none."""
        ...

    def read(self, index: int) -> bytes:
        """Returns the encoded bytes of picture `index`; safe in any thread. Raises `OSError`."""
        ...


@dataclass(frozen=True)
class Picture:
    """A picture in a source, to be read when it is needed."""

    source: Source
    index: int

    @property
    def name(self) -> str:
        """Name for ordering; does not depend on where the collection lies."""
        return self.source.names[self.index]

    @property
    def description(self) -> str:
        """Name for messages, with the shard it is in."""
        return self.source.describe(self.index)

    @property
    def class_name(self) -> str | None:
        """The class that the picture belongs to; None if it belongs to none."""
        return self.source.class_of(self.index)

    def read(self) -> bytes:
        """Returns the encoded bytes; safe in any thread. Raises `OSError`."""
        return self.source.read(self.index)


@dataclass(frozen=True)
class Fingerprint:
    """Identity of a collection of pictures, wherever they lie."""

    count: int | None
    """Number of pictures; None for a data set that is read in its own order, whose length is not known."""
    hash: str
    """16 hex digits of SHA-256 over all names and sizes, and over the contents of `SAMPLED` pictures."""
    pictures: tuple[tuple[str, int], ...] | None = None
    """Names and sizes, sorted, of up to `LISTED` pictures; None for more."""

    def changes(self, before: Fingerprint) -> str:
        """Returns a few words on what changed since `before`."""
        if self.pictures is None or before.pictures is None:
            return f"{_count(self.count)} with fingerprint {self.hash}, was {_count(before.count)} with {before.hash}"
        now, then = Counter(self.pictures), Counter(before.pictures)
        new, gone = ({name for name, _ in (a - b).elements()} for a, b in ((now, then), (then, now)))
        kinds = (("new", new - gone), ("missing", gone - new), ("of another size", new & gone))
        changes = [f"{len(names):,} {kind}, such as {min(names)}" for kind, names in kinds if names]
        return "; ".join(changes) or "contents differ, names and sizes do not"


def _count(count: int | None) -> str:
    return "pictures" if count is None else f"{count:,} pictures"


class Pictures(Sequence[Picture]):
    """The pictures of several sources, in an order that looks random but depends on their names alone."""

    def __init__(self, sources: Sequence[Source], order: NDArray[np.int64] | None = None) -> None:
        self._sources = tuple(sources)
        self._starts = np.cumsum([0, *(len(source.names) for source in sources)])
        self._order = _order_of_digests(_digests(sources)) if order is None else order

    def __len__(self) -> int:
        return len(self._order)

    @overload
    def __getitem__(self, index: int) -> Picture: ...
    @overload
    def __getitem__(self, index: slice) -> Pictures: ...
    def __getitem__(self, index: int | slice) -> Picture | Pictures:
        if isinstance(index, slice):
            return Pictures(self._sources, self._order[index])
        number = int(self._order[index])
        place = int(np.searchsorted(self._starts, number, "right")) - 1
        return Picture(self._sources[place], number - int(self._starts[place]))

    @cached_property
    def classes(self) -> tuple[str, ...]:
        """Names of the classes of these pictures, in `class_order`; a label is a place in it."""
        return class_order({name for name in (picture.class_name for picture in self) if name is not None})

    def of_classes(self, chosen: Sequence[str], without: Sequence[str]) -> Pictures:
        """Returns the pictures of the classes `chosen` (all if none is), except those of the classes `without`.

        Raises `RacError` for a class that none of the pictures belongs to, naming the near ones.
        """
        keep = ClassChoice(chosen, without)
        if not keep.chooses:
            return self
        keep.check(self.classes)
        mask = np.fromiter((keep(picture.class_name) for picture in self), bool, len(self))
        if not mask.any():
            raise RacError(f"classes and without_classes leave none of the {len(self)} pictures; choose others")
        return Pictures(self._sources, self._order[mask])

    def fingerprint(self) -> Fingerprint:
        """Returns the fingerprint of these pictures: of their names, sizes and, for `SAMPLED` of them, contents."""
        digest = hashlib.sha256()
        listed: list[tuple[str, int]] | None = [] if len(self) <= LISTED else None
        for picture in self:
            encoded, size = picture.source.names.encoded(picture.index), picture.source.size_hint(picture.index)
            digest.update(encoded + b"\0%d\0" % size)
            if listed is not None:
                listed.append((picture.name, size))
        for place in np.unique(np.linspace(0, len(self) - 1, SAMPLED).astype(int)) if len(self) else ():
            with suppress(RacError, OSError):  # what cannot be read is skipped, and named, when its turn comes
                digest.update(hashlib.sha256(self[int(place)].read()).digest())
        return Fingerprint(len(self), digest.hexdigest()[:16], None if listed is None else tuple(sorted(listed)))


class ClassChoice(NamedTuple):
    """A choice of classes: those in `chosen`, or all if it is empty, except those in `without`."""

    chosen: Sequence[str]
    without: Sequence[str]

    @property
    def chooses(self) -> bool:
        """Whether anything is left out at all."""
        return bool(self.chosen or self.without)

    def __call__(self, name: str | None) -> bool:
        """Returns whether to take a picture of the class `name`.

        One without a class is taken unless classes are chosen.
        """
        return (not self.chosen or name in self.chosen) and name not in self.without

    def check(self, classes: Sequence[str]) -> None:
        """Raises `RacError` for a class that is not among `classes`, naming the near ones."""
        for name in (*self.chosen, *self.without):
            if name in classes:
                continue
            if not classes:
                raise RacError(
                    f"there is no class {name!r}, since no picture belongs to a class; classes are names of folders"
                )
            near = difflib.get_close_matches(name, classes, n=3, cutoff=0.5)
            hint = f"did you mean {' or '.join(near)}?" if near else f"there are {', '.join(classes[:8])}"
            raise RacError(f"there is no class {name!r}; {hint}{', ...' if not near and len(classes) > 8 else ''}")


def class_order(names: Iterable[str]) -> tuple[str, ...]:
    """Sorts names of classes: whole numbers by value, before words in the order of their letters."""
    return tuple(sorted(set(names), key=_class_key))


def _class_key(name: str) -> tuple[bool, int, str]:
    is_number = name.isascii() and name.isdecimal()
    return not is_number, int(name) if is_number else 0, name


def folder_class(name: str) -> str | None:
    """Returns the folder directly above a picture called `name`, a path with slashes; None if it is in none."""
    return PurePosixPath(name).parent.name or None


def _digests(sources: Sequence[Source]) -> bytearray:
    digests = bytearray()
    for source in sources:
        for index in range(len(source.names)):
            digests += hashlib.sha256(source.names.encoded(index)).digest()
    return digests


def _order_of_digests(digests: bytearray) -> NDArray[np.int64]:
    """Returns the sorted order of 32-byte strings, equal ones in the order they came."""
    words = np.frombuffer(digests, ">u8").reshape(-1, 4)
    return np.lexsort(words.T[::-1])
