"""A cache of image features on disk: Inception on 50,000 images takes longer than all that follows.

It is optional: where there is no home directory, or no permission to write, nothing is kept.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from contextlib import suppress
from functools import lru_cache
from pathlib import Path

import torch
from safetensors.torch import save
from torch import Tensor

from ..errors import RacError
from ..files import cache_folder, make_folder, write_bytes
from ..representations import Extractor, Features, extract, join
from ..storage import read_tensors

LIMIT_GB = 8.0
"""Limit on the size of all files in the folder, in GB; beyond it, those not read for the longest time are removed."""

_PARTS = ("pooled", "spatial", "logits")


class FeatureCache:
    """A cache of an extractor's features of images, found again by each image's own hash.

    A file holds the features of one set. It lies in the folder `features` of the cache (`rac.files.cache_folder`), and
    its name is a hash of the extractor's kind, its weights and `key`: features of other weights are never taken.
    """

    def __init__(self, extractor: Extractor, key: str | None) -> None:
        """Opens the file of an extractor and a key.

        `key` identifies the images: the hash of a set, or whatever its images follow from. None: no file.
        """
        self.extractor = extractor
        self._path = None if key is None else _file(extractor, key)
        self._rows: dict[bytes, int] = {}
        self._kept: Features | None = None
        self._new: dict[bytes, Features] = {}
        if self._path is not None:
            self._read(self._path)

    def features(self, digests: Sequence[bytes], images: Tensor) -> Features:
        """Returns the features of images B 3 H W in [-1, 1], from the cache or computed now.

        `digests` are the hashes of the images.
        """
        rows = [self._rows.get(digest, -1) for digest in digests]
        if self._kept is not None and min(rows) >= 0:
            return _rows_of(self._kept, torch.tensor(rows))
        found = extract(self.extractor, [images])
        if self._path is not None:
            self._new |= {digest: _rows_of(found, torch.tensor([row])) for row, digest in enumerate(digests)}
        return found

    def known(self, digests: Sequence[bytes]) -> Features | None:
        """Returns the features of all of these images if all of them are in the cache, otherwise None."""
        rows = [self._rows.get(digest, -1) for digest in digests]
        return None if self._kept is None or min(rows) < 0 else _rows_of(self._kept, torch.tensor(rows))

    def save(self) -> None:
        """Writes new features, completely or not at all; does nothing if that is not possible."""
        if self._path is None or not self._new:
            return
        features = join([*([] if self._kept is None else [self._kept]), *self._new.values()])
        digests = [*self._rows, *self._new]
        tensors = {"digests": torch.tensor([list(digest) for digest in digests], dtype=torch.uint8)}
        tensors |= {
            name: tensor.contiguous() for name, tensor in zip(_PARTS, features, strict=True) if tensor is not None
        }
        with suppress(RacError, OSError):
            make_folder(self._path.parent)
            write_bytes(self._path, save(tensors))
            _make_room(self._path.parent)
        self._new = {}

    def _read(self, path: Path) -> None:
        with suppress(RacError, OSError, KeyError):
            tensors, _ = read_tensors(path)
            features = Features(tensors["pooled"], tensors.get("spatial"), tensors.get("logits"))
            rows = {bytes(digest): row for row, digest in enumerate(tensors["digests"].numpy())}
            if len(rows) == len(features.pooled):
                self._rows, self._kept = rows, features
                os.utime(path)  # the time by which old files are removed


def _file(extractor: Extractor, key: str) -> Path | None:
    folder, weights = cache_folder("features"), _weights_hash(extractor.path)
    if folder is None or weights is None:
        return None
    name = hashlib.sha256(f"{type(extractor).__name__} {weights} {key}".encode()).hexdigest()
    return folder / f"{name[:32]}.safetensors"


def _weights_hash(path: Path) -> str | None:
    try:
        stat = path.stat()
        return _hash_of(path, stat.st_size, stat.st_mtime_ns)
    except OSError:
        return None


@lru_cache(maxsize=16)
def _hash_of(path: Path, size: int, time: int) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _rows_of(features: Features, rows: Tensor) -> Features:
    return Features(*(None if tensor is None else tensor[rows] for tensor in features))  # type: ignore[arg-type]


def _make_room(folder: Path) -> None:
    files = sorted(folder.glob("*.safetensors"), key=lambda file: file.stat().st_mtime, reverse=True)
    total = 0
    for file in files:
        total += file.stat().st_size
        if total > LIMIT_GB * 2**30 and file != files[0]:
            file.unlink(missing_ok=True)
