"""Latents on disk: one safetensors file, the tensor `latent` and all that decoding needs in its metadata."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from ..config import from_json, to_json
from ..errors import RacError
from ..files import write_bytes
from ..latents import LatentSpec, read_spec

FORMAT = "rac-latent-2"
FORMATS = (FORMAT, "rac-latent-1")
"""What can be read. The first version had the statistics as numbers, where the second has their hash."""


@dataclass(frozen=True)
class LatentFile:
    """A latent and where it came from."""

    latent: Tensor
    """1 c h w, normalised."""
    spec: LatentSpec
    size: tuple[int, int]
    """Height and width of the image, before padding."""
    coder: str
    """Name or directory of the coder that made it."""
    steps: int | None = None
    """Steps it was encoded with, for a RAC."""
    solver: str | None = None

    def write(self, path: Path) -> None:
        """Write the file, whole or not at all. Raises `RacError` for NaN in the latent and where refused."""
        self.spec.check(self.latent)
        known = {name: value for name, value in to_json(_Origin.of(self)).items() if value is not None}
        metadata = {"format": FORMAT, "origin": json.dumps(known)}
        write_bytes(path, save({"latent": self.latent.detach().cpu().contiguous()}, metadata))

    @classmethod
    def read(cls, path: Path) -> LatentFile:
        """Read what `write` wrote. Raises `RacError` for a missing, cut or foreign file, and for NaN in the latent."""
        latent, metadata = _read(path)
        try:
            known = json.loads(metadata.get("origin", ""))
        except json.JSONDecodeError as error:
            raise RacError(f"{path} has damaged metadata ({error}); encode the image again") from None
        source = f"the metadata of {path}"
        try:
            spec, _ = read_spec(known.get("spec") if isinstance(known, dict) else None, f"the spec in {source}")
            origin = from_json(_Origin, {**known, "spec": to_json(spec)}, source)
            origin.spec.check(latent)
        except RacError as error:
            raise RacError(str(error) if str(path) in str(error) else f"{path}: {error}") from None
        _check_size(origin, latent, path)
        return cls(latent, origin.spec, (origin.height, origin.width), origin.coder, origin.steps, origin.solver)


@dataclass(frozen=True)
class _Origin:
    """The metadata, as JSON."""

    spec: LatentSpec
    height: int
    width: int
    coder: str
    steps: int | None = None
    solver: str | None = None

    @classmethod
    def of(cls, file: LatentFile) -> _Origin:
        return cls(file.spec, *file.size, file.coder, file.steps, file.solver)


def _read(path: Path) -> tuple[Tensor, dict[str, str]]:
    if not path.is_file():
        raise RacError(f"{path} does not exist; give a .safetensors file that `rac encode` wrote")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") not in FORMATS:
                raise RacError(f"{path} is a safetensors file, but not a latent that `rac encode` wrote")
            return file.get_tensor("latent"), metadata
    except (SafetensorError, OSError) as error:
        raise RacError(
            f"{path} is cut short, or was not written by `rac encode` ({error}); encode the image again"
        ) from None


def _check_size(origin: _Origin, latent: Tensor, path: Path) -> None:
    factor = origin.spec.factor
    padded = (-(-origin.height // factor), -(-origin.width // factor))
    if padded != tuple(latent.shape[-2:]):
        raise RacError(
            f"{path} has a latent of {latent.shape[-2]} x {latent.shape[-1]}, but an image of {origin.height} x "
            f"{origin.width} makes {padded[0]} x {padded[1]} at factor {factor}; encode the image again"
        )
