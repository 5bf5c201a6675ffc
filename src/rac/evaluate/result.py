"""The result of an evaluation: the metrics, and everything needed to reproduce them."""

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
    """Metrics of a coder, and everything needed to reproduce them. Written and read as JSON."""

    coder: str
    """Name that the coder was evaluated under."""
    coder_hash: str
    """Hash of the coder's weights."""
    protocol: Protocol
    steps: int | None
    """Number of steps of each way that is walked; None for a coder without a flow."""
    reference: ReferenceRecord
    metrics: dict[str, float]
    """Metrics by name. The name of a metric of sets says which features it uses: only `rFID` is an FID."""
    images_per_second: float
    """Rate of encoding and decoding images, in this run on this machine."""
    per_channel: dict[str, tuple[float, ...]]
    """Metrics of the latents, by channel."""
    per_image: dict[str, tuple[float, ...]]
    """Metrics of each image, in the order of `images`."""
    images: tuple[str, ...]
    weight_files: dict[str, str]
    """Names of the metrics' weight files, and the SHA-256 of each."""
    versions: dict[str, str]
    command: str
    compared_with: ReferenceRecord | None = None
    """The reference that metrics of sets compare with; None: the images themselves."""

    def save(self, path: str | Path) -> None:
        """Writes the result as JSON, completely or not at all; infinite and undefined values as strings.

        Raises `RacError` if the file cannot be written.
        """
        text = json.dumps(json_safe(to_json(self)), indent=2, allow_nan=False)
        write_bytes(path, (text + "\n").encode())

    @classmethod
    def load(cls, path: str | Path) -> Result:
        """Reads a file written by `save`, of this or an earlier version. Raises `RacError`."""
        data = read_json(Path(path))
        if isinstance(data, dict):
            data = in_todays_words(data)
            data |= {key: _with_numbers(data.get(key)) for key in ("metrics", "per_channel", "per_image")}
        return from_json(cls, data, str(path))


def versions() -> dict[str, str]:
    """Returns the versions of the software that metrics may depend on."""
    from .. import __version__

    packages = {package: metadata.version(package) for package in ("torch", "torchmetrics", "numpy", "pillow")}
    return {"rac": __version__, "python": platform.python_version(), **packages}


def command_line() -> str:
    """Returns the command line of this program, without the folder that it lies in."""
    return shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])


def _with_numbers(data: Any) -> Any:
    if isinstance(data, dict):
        return {key: _with_numbers(value) for key, value in data.items()}
    if isinstance(data, list):
        return [_with_numbers(value) for value in data]
    return float(data) if data in ("inf", "-inf", "nan") else data
