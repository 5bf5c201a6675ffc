"""What an evaluation gives: the metrics, and all one needs to get them again."""

from __future__ import annotations

import json
import platform
import shlex
import sys
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from ..config import from_json, json_safe, read_json, to_json
from ..files import write_bytes
from .image_sets import ReferenceRecord
from .protocol import Protocol, in_todays_words


@dataclass(frozen=True)
class Result:
    """What came out, and all one needs to get it again. Written and read as JSON."""

    coder: str
    """As it was named."""
    coder_hash: str
    """Hash of its weights."""
    protocol: Protocol
    steps: int | None
    """Number of steps of each way that is walked; None for a coder that takes both at once."""
    reference: ReferenceRecord
    metrics: dict[str, float]
    """The name of a metric of sets says whose features it is made of: only `rFID` is an FID."""
    images_per_second: float
    """Through the coder, there and back, in this run on this machine."""
    per_channel: dict[str, tuple[float, ...]]
    """Metrics of the latents, by channel."""
    per_image: dict[str, tuple[float, ...]]
    """Metrics of each image, in the order of `images`."""
    images: tuple[str, ...]
    weight_files: dict[str, str]
    """Weight files of the metrics, and the SHA-256 of each."""
    versions: dict[str, str]
    command: str
    compared_with: ReferenceRecord | None = None
    """What metrics of sets compare with; None: the images themselves."""

    def save(self, path: str | Path) -> None:
        """Write JSON, whole or not at all; infinite and undefined values as strings. Raises `RacError`."""
        text = json.dumps(json_safe(to_json(self)), indent=2, allow_nan=False)
        write_bytes(path, (text + "\n").encode())

    @classmethod
    def load(cls, path: str | Path) -> Result:
        """Read what `save` wrote, results of earlier versions included. Raises `RacError`."""
        data = read_json(Path(path))
        if isinstance(data, dict):
            data = in_todays_words(data)
            data |= {key: _with_numbers(data.get(key)) for key in ("metrics", "per_channel", "per_image")}
        return from_json(cls, data, str(path))


def versions() -> dict[str, str]:
    """Returns the versions of what metrics may depend on."""
    from .. import __version__

    packages = {package: metadata.version(package) for package in ("torch", "torchmetrics", "numpy", "pillow")}
    return {"rac": __version__, "python": platform.python_version(), **packages}


def command_line() -> str:
    """What was typed to start this program, without the folder it lies in."""
    return shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])


def _with_numbers(data: Any) -> Any:
    if isinstance(data, dict):
        return {key: _with_numbers(value) for key, value in data.items()}
    if isinstance(data, list):
        return [_with_numbers(value) for value in data]
    return float(data) if data in ("inf", "-inf", "nan") else data
