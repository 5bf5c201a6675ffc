"""Weight files of metrics and perceptual terms: where they lie, how they are published, and how they are converted.

Nothing is downloaded. The networks are read from safetensors alone; files that are published as pickles are converted
once, without running code from them (`torch.load(weights_only=True)`).
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..errors import WeightsError
from ..storage import write_tensors

VARIABLE = "RAC_WEIGHTS_DIR"
"""Environment variable that names the folder of weight files."""

Tensors = Mapping[str, Tensor]


@dataclass(frozen=True)
class Published:
    """A file as its authors publish it."""

    names: tuple[str, ...]
    """File names under which it is known. Eight hexadecimal digits in one are the beginning of its SHA-256."""
    source: str
    """Publisher of the file."""

    def find(self, folder: Path) -> Path | None:
        """Returns the first of its names in `folder`; None if there is none."""
        return next((folder / name for name in self.names if (folder / name).is_file()), None)


@dataclass(frozen=True)
class WeightFile:
    """A weight file of this library, and the published files that it is made of."""

    names: tuple[str, ...]
    """Accepted file names; the first is the one that conversion writes."""
    purpose: str
    """Metrics or terms that need the file, for messages."""
    published: tuple[Published, ...]
    convert: Callable[..., dict[str, Tensor]]
    """Function that converts the tensors of the published files, in their order, to the tensors of this file."""


def find_weights(given: str | Path | None, file: WeightFile) -> Path:
    """Returns the path `given`, or that of `file` in the weights folder.

    Raises `WeightsError` saying how to obtain it.
    """
    if given is not None:
        return Path(given)
    folder = weights_folder()
    found = None if folder is None else located(file, folder)
    if found is not None:
        return found
    where = f"in {folder}, the folder of weights" if folder is not None else "anywhere, since no home folder is known"
    raise WeightsError(
        f"{file.purpose} needs {file.names[0]}, which is not {where} (environment variable {VARIABLE}); rac weights "
        "lists the published files that it is made from, and converts them"
    )


def located(file: WeightFile, folder: Path) -> Path | None:
    """Returns the path of `file` in `folder`, under any of its names; None if it is not there."""
    return next((folder / name for name in file.names if (folder / name).is_file()), None)


def weights_folder() -> Path | None:
    """Returns the folder that RAC_WEIGHTS_DIR names, else rac/weights in the user's cache.

    None without a home folder.
    """
    if named := os.environ.get(VARIABLE):
        return Path(os.path.expanduser(named))
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return None if cache.startswith("~") else Path(cache) / "rac" / "weights"


def convert(file: WeightFile, source: Path, target: Path) -> Path | None:
    """Makes `file` in the folder `target` out of the published files in the folder `source`.

    Returns the path written, completely or not at all, or None if a published file is missing.

    Raises:
        WeightsError: A published file is damaged, or holds other tensors than it should.
    """
    found = [published.find(source) for published in file.published]
    present = [path for path in found if path is not None]
    if len(present) < len(found):
        return None
    try:
        tensors = file.convert(*(read_pickled(path) for path in present))
    except KeyError as error:
        names = " and ".join(path.name for path in present)
        raise WeightsError(f"{names} lack the tensor {error}; download them again from their authors") from None
    target.mkdir(parents=True, exist_ok=True)
    path = target / file.names[0]
    write_tensors(path, {name: tensor.float().contiguous() for name, tensor in tensors.items()})
    return path


def sha256(path: Path) -> str:
    """Returns the SHA-256 of a file, in hexadecimal digits."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def read_pickled(path: Path) -> dict[str, Tensor]:
    """Reads a published pickle of tensors by their names, without running code from it. Raises `WeightsError`."""
    try:
        tensors = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # the unpickler fails in many ways on what is no state dict
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise WeightsError(f"{path} is not a state dict of tensors ({reason}); download it again") from error
    if not isinstance(tensors, dict) or not all(isinstance(tensor, Tensor) for tensor in tensors.values()):
        raise WeightsError(f"{path} holds no state dict of tensors; download it again")
    return tensors
