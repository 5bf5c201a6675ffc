"""Collections of pictures, wherever they lie.

A collection is a few dozen bytes a picture: names, and where to read. Any picture can be read without the others.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol, overload

import numpy as np
from numpy.typing import NDArray


class Names(Sequence[str]):
    """Many names in little more memory than their letters take."""

    def __init__(self, letters: bytes) -> None:
        self.letters = letters
        """All names in UTF-8, a zero after each."""
        self._ends = np.flatnonzero(np.frombuffer(letters, np.uint8) == 0)

    @classmethod
    def of(cls, names: Iterable[str]) -> Names:
        """Hold `names`; those that are not Unicode (a file system allows that) come back as they were."""
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
        """Name number `index`, at least 0, in UTF-8."""
        return self.letters[int(self._ends[index - 1]) + 1 if index else 0 : int(self._ends[index])]


class Source(Protocol):
    """One place that holds pictures: a folder, a tar shard, a data set."""

    @property
    def names(self) -> Names:
        """Names of its pictures: for messages and for ordering; they do not depend on where the source lies."""
        ...

    def describe(self, index: int) -> str:
        """What a message calls picture `index`."""
        ...

    def size_hint(self, index: int) -> int:
        """What tells picture `index` from another of its name without reading it: its size, where that is known."""
        ...

    def read(self, index: int) -> bytes:
        """Its encoded bytes; any thread may ask. Raises `OSError`."""
        ...


@dataclass(frozen=True)
class Picture:
    """A picture somewhere, to be read when it is needed."""

    source: Source
    index: int

    @property
    def name(self) -> str:
        """Name for ordering; does not depend on where the collection lies."""
        return self.source.names[self.index]

    @property
    def description(self) -> str:
        """Name for messages: says which shard it is in."""
        return self.source.describe(self.index)

    def read(self) -> bytes:
        """The encoded bytes; any thread may ask. Raises `OSError`."""
        return self.source.read(self.index)


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

    def fingerprint(self) -> str:
        """A hash of all names and traces, in their order."""
        digest = hashlib.sha256()
        for picture in self:
            digest.update(picture.source.names.encoded(picture.index))
            digest.update(b"\0%d\0" % picture.source.size_hint(picture.index))
        return digest.hexdigest()[:16]


def _digests(sources: Sequence[Source]) -> bytearray:
    digests = bytearray()
    for source in sources:
        for index in range(len(source.names)):
            digests += hashlib.sha256(source.names.encoded(index)).digest()
    return digests


def _order_of_digests(digests: bytearray) -> NDArray[np.int64]:
    """Places of 32-byte strings in their order, equal ones in the order they came."""
    words = np.frombuffer(digests, ">u8").reshape(-1, 4)
    return np.lexsort(words.T[::-1])
