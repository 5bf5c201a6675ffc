"""Directories that hold a module: config.json and safetensors, written completely or not at all, read strictly."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_bytes
from torch import Tensor, nn

from .config import read_json
from .errors import RacError, WeightsError
from .files import explained, make_folder

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
DIFFUSERS = "diffusion_pytorch_model"
"""Prefix of the names of weight files written by diffusers."""


def write_directory(
    directory: str | Path,
    config: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    weights: str = WEIGHTS,
    dtype: torch.dtype | None = None,
    *,
    exact: Mapping[str, Tensor] = MappingProxyType({}),
) -> None:
    """Writes a configuration and tensors to `directory`, completely or not at all.

    Both files are complete before either takes its name; files of these names are replaced, others in the directory
    stay.

    - `directory`: where to write.
    - `config`: the JSON of config.json.
    - `tensors`: the tensors of the file `weights`.
    - `weights`: the name of that file.
    - `dtype`: the type that floats in `tensors` are stored as; None: their own.
    - `exact`: further tensors, which keep their type.

    Raises `WeightsError` if the system refuses.
    """
    folder = make_folder(directory, WeightsError)
    with explained(folder / weights, WeightsError):
        staging = folder / f".saving-{os.getpid()}.tmp"
        try:
            staging.mkdir()
            write_tensors(staging / weights, {**as_type(tensors, dtype), **exact})
            (staging / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
            for name in (weights, CONFIG):
                os.replace(staging / name, folder / name)
        finally:
            shutil.rmtree(staging, ignore_errors=True)


def as_type(tensors: Mapping[str, Tensor], dtype: torch.dtype | None) -> dict[str, Tensor]:
    """Returns `tensors` with their floats as `dtype`; None leaves them as they are."""
    return {
        name: tensor.to(dtype) if dtype is not None and tensor.is_floating_point() else tensor
        for name, tensor in tensors.items()
    }


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Writes one safetensors file, which is on disk when this returns.

    Not atomic: write to a name that nobody reads yet.
    """
    ready = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
    # Not save_file: it makes files that only their owner can read.
    with open(path, "wb") as file:
        file.write(to_bytes(ready, {"format": "pt"}))
        file.flush()
        os.fsync(file.fileno())


@contextmanager
def as_weights_error(source: str = "") -> Iterator[None]:
    """Turns a `RacError` of the block into a `WeightsError` with the same message, which begins with `source`."""
    try:
        yield
    except RacError as error:
        message = str(error)
        raise WeightsError(message if source in message else f"{source}: {message}") from None


def read_settings(directory: Path) -> dict[str, Any]:
    """Reads the JSON object in config.json. Raises `WeightsError`."""
    path = directory / CONFIG
    with as_weights_error():
        data = read_json(path)
    if not isinstance(data, dict):
        raise WeightsError(f"{path} holds {data!r}, expected a JSON object; save the coder again")
    return data


def read_format(directory: Path, format: str, versions: tuple[int, ...]) -> Any:
    """Reads the value of `config` in a config.json of this library: {"format": ..., "version": ..., "config": ...}.

    - `directory`: the directory of config.json.
    - `format`: the value of `format` that is expected.
    - `versions`: the values of `version` that can be read, the newest last.

    Raises `WeightsError` for another format or version, and for unknown keys.
    """
    data, said_by = read_settings(directory), str(directory / CONFIG)
    if unknown := data.keys() - {"format", "version", "config"}:
        raise WeightsError(f"{said_by} has unknown keys, {', '.join(sorted(unknown))}; correct or remove them")
    known: dict[str, tuple[Any, ...]] = {"format": (format,), "version": versions}
    for name, values in known.items():
        if data.get(name) not in values:
            raise WeightsError(
                f"{said_by} has {name} {data.get(name)!r}, expected {values[-1]!r}; it was written by another "
                "program or version"
            )
    return data.get("config")


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Reads the tensors and the metadata of one safetensors file.

    Raises `WeightsError` if it is missing, cut short or no safetensors file.
    """
    if not path.is_file():
        raise WeightsError(f"{path} does not exist; expected a safetensors file there")
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, dict(file.metadata() or {})  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        size = path.stat().st_size
        raise WeightsError(
            f"{path} ({size} bytes) is not a whole safetensors file ({error}); copy or download it again"
        ) from None


def read_weights(directory: Path, stem: str = "model") -> tuple[dict[str, Tensor], str]:
    """Reads the tensors of `stem`.safetensors, its shards or its only variant, and returns the file's name as well.

    Raises `WeightsError` where there are none, or several variants, and for pickled weights.
    """
    whole, index = directory / f"{stem}.safetensors", directory / f"{stem}.safetensors.index.json"
    # "model.fp16.safetensors" and, in shards, "model.safetensors.index.fp16.json"
    others = [*directory.glob(f"{stem}.*.safetensors"), *directory.glob(f"{stem}.safetensors.index.*.json")]
    variants = sorted(file for file in others if "-of-" not in file.name)
    found = next((file for file in (whole, index) if file.is_file()), None)
    if found is None and len(variants) > 1:
        names = ", ".join(file.name for file in variants)
        raise WeightsError(f"{directory} holds several variants of its weights, {names}; leave one of them")
    if found is None and variants:
        found = variants[0]
    if found is None:
        if pickles := sorted(file.name for file in directory.glob("*.bin")):
            raise WeightsError(
                f"{directory} holds only pickled weights ({pickles[0]}), which can run code when read; "
                "convert them with diffusers: save_pretrained(directory, safe_serialization=True)"
            )
        raise WeightsError(f"{directory} has a {CONFIG} but holds no weights; expected {whole.name} beside it")
    if found.suffix != ".json":
        return read_tensors(found)[0], str(found)
    with as_weights_error():
        shards = read_json(found)
    if not isinstance(shards, dict) or not isinstance(shards.get("weight_map"), dict):
        raise WeightsError(f"{found} lists no shards under weight_map; save the coder again")
    tensors: dict[str, Tensor] = {}
    for name in sorted(set(map(str, shards["weight_map"].values()))):
        tensors |= read_tensors(directory / Path(name).name)[0]
    return tensors, str(found)


def fit_tensors(module: nn.Module, tensors: Mapping[str, Tensor], source: str) -> None:
    """Copies `tensors` into `module`. Raises `WeightsError` naming one that is missing, unknown or of another shape."""
    own = module.state_dict()
    missing, unknown = sorted(own.keys() - tensors.keys()), sorted(tensors.keys() - own.keys())
    if missing or unknown:
        name, kind = (missing[0], "lacks") if missing else (unknown[0], "has an unknown")
        raise WeightsError(
            f"{source} {kind} tensor {name} ({len(missing)} missing, {len(unknown)} unknown); "
            "the weights belong to another configuration"
        )
    for name, tensor in tensors.items():
        if tensor.shape != own[name].shape:
            raise WeightsError(
                f"{source}: {name} has shape {tuple(tensor.shape)}, the configuration asks for "
                f"{tuple(own[name].shape)}; use the config.json that belongs to these weights"
            )
    module.load_state_dict(dict(tensors))


def weights_hash(tensors: Mapping[str, Tensor]) -> str:
    """Returns a hash of a state dict that is equal if and only if names, shapes, types and values are."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]
