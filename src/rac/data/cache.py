"""Crops and their latents, prepared once: a frozen teacher need not encode the same image again and again."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import safetensors.torch
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..config import differences, to_json
from ..errors import RacError
from ..files import make_folder, write_bytes
from ..images import from_pixels
from ..latents import LatentSpec
from ..storage import weights_hash
from .config import DataConfig
from .stream import Batch, ImageStream, Stream, permutation

_ENCODED_AT_ONCE = 32


class Teacher(Protocol):
    """What the cache asks of a coder that is an `nn.Module` too."""

    @property
    def spec(self) -> LatentSpec:
        """What its latents are."""
        ...

    def encode(self, image: Tensor) -> Tensor:
        """Image B 3 H W in [-1, 1] -> latent B c h w."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """Its weights."""
        ...


class CachedStream:
    """Prepared crops, each once an epoch, with their latents where a teacher encoded them."""

    def __init__(
        self,
        pixels: Tensor,
        latents: Tensor | None,
        held_out: Tensor,
        rng_seed: int,
        skipped: Mapping[str, str] | None = None,
    ) -> None:
        self._pixels: NDArray[np.uint8] = pixels.numpy()
        self._latents = latents
        self._held_out: NDArray[np.uint8] = held_out.numpy()
        self._rng_seed = rng_seed
        self.skipped: Mapping[str, str] = skipped or {}
        """Pictures that were damaged when the crops were prepared."""

    def __len__(self) -> int:
        """Prepared crops."""
        return len(self._pixels)

    def batch(self, first: int, count: int) -> Batch:
        """Draws `first` to `first + count - 1`."""
        places = (divmod(draw, len(self)) for draw in range(first, first + count))
        chosen = [permutation(len(self), self._rng_seed, epoch)[place] for epoch, place in places]
        latents = None if self._latents is None else self._latents[chosen]
        return Batch(from_pixels(self._pixels[chosen]), latents)

    def held_out(self) -> Tensor:
        """The held-out images of the stream that the crops came from."""
        return from_pixels(self._held_out)


def open_stream(
    config: DataConfig,
    rng_seed: int = 0,
    *,
    cache: Path | None = None,
    teacher: Teacher | None = None,
    teacher_name: str | None = None,
    device: torch.device | None = None,
) -> Stream:
    """The stream a `DataConfig` asks for: always new crops, or `config.cached_crops` prepared ones.

    Prepared crops are read from the file `cache`, which is made first if it is not there: crops as pixels, and the
    latents that `teacher` (on `device`) gives for them. Without a teacher, or without `cached_crops`, batches carry no
    latents. Raises `RacError` if the file was made from other data or by another teacher, or is damaged.
    """
    if not config.cached_crops:
        return ImageStream(config, rng_seed)
    if cache is None:
        raise RacError(f"cached_crops is {config.cached_crops}, but no file was named to keep them in; give cache")
    made_from = _identity(config, rng_seed, teacher, teacher_name)
    if not cache.exists():
        _build(cache, made_from, ImageStream(config, rng_seed), teacher, device or torch.device("cpu"))
    return _read(cache, made_from, rng_seed)


def _identity(config: DataConfig, rng_seed: int, teacher: Teacher | None, name: str | None) -> dict[str, Any]:
    data = to_json(replace(config, keep_mb=0))
    data["paths"] = [str(path.expanduser().resolve()) for path in config.paths]
    identity = {"data": data, "rng_seed": rng_seed, "teacher": None}
    if teacher is not None:
        identity["teacher"] = {
            "name": name,
            "spec": to_json(teacher.spec),
            "weights": weights_hash(teacher.state_dict()),
        }
    return identity


def _build(
    path: Path, made_from: dict[str, Any], stream: ImageStream, teacher: Teacher | None, device: torch.device
) -> None:
    from rich.console import Console
    from rich.progress import track

    console = Console(stderr=True)
    crops: list[Tensor] = []
    latents: list[Tensor] = []
    count = stream.config.cached_crops
    for first in track(
        range(0, count, _ENCODED_AT_ONCE),
        f"preparing {count} crops",
        console=console,
        transient=True,
        disable=not console.is_terminal,
    ):
        pixels = np.stack([stream.crop(draw) for draw in range(first, min(first + _ENCODED_AT_ONCE, count))])
        crops.append(torch.from_numpy(pixels))
        if teacher is not None:
            with torch.no_grad():
                latents.append(teacher.encode(from_pixels(pixels).to(device)).float().cpu())
    tensors = {"pixels": torch.cat(crops), "held_out": torch.from_numpy(stream.held_out_pixels)}
    if latents:
        tensors["latents"] = torch.cat(latents).contiguous()
    metadata = {"made_from": json.dumps(made_from), "skipped": json.dumps(stream.skipped)}
    make_folder(path.parent)
    write_bytes(path, safetensors.torch.save(tensors, metadata))


def _read(path: Path, made_from: dict[str, Any], rng_seed: int) -> CachedStream:
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
        found, skipped = json.loads(metadata["made_from"]), json.loads(metadata.get("skipped", "{}"))
        tensors = safetensors.torch.load_file(path)
    except (SafetensorError, OSError, KeyError, json.JSONDecodeError):
        raise RacError(f"{path} is damaged or holds no prepared crops; delete it to prepare them again") from None
    if changed := differences(made_from, found):
        raise RacError(f"{path} was prepared otherwise: {'; '.join(changed)}; delete it to prepare it again")
    return CachedStream(tensors["pixels"], tensors.get("latents"), tensors["held_out"], rng_seed, skipped)
