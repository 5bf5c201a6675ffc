"""Directories that hold a module: config.json and safetensors, written whole or not at all, read strictly."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_bytes
from torch import Tensor, nn

from .config import from_json, read_json
from .errors import RacError, WeightsError
from .files import explained, make_folder

CONFIG = "config.json"
WEIGHTS = "model.safetensors"

T = TypeVar("T")


def write_directory(
    directory: str | Path,
    config: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    weights: str = WEIGHTS,
    dtype: torch.dtype | None = None,
) -> None:
    """Write `config` to config.json and `tensors` to the file `weights`, floats as `dtype` where one is given.

    Both are complete before either takes its name; files of these names are replaced, others in the directory stay.
    Raises `WeightsError` where the system refuses.
    """
    folder = make_folder(directory, WeightsError)
    with explained(folder / weights, WeightsError):
        staging = folder / f".saving-{os.getpid()}.tmp"
        try:
            staging.mkdir()
            write_tensors(staging / weights, tensors, dtype)
            (staging / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
            for name in (weights, CONFIG):
                os.replace(staging / name, folder / name)
        finally:
            shutil.rmtree(staging, ignore_errors=True)


def write_tensors(path: Path, tensors: Mapping[str, Tensor], dtype: torch.dtype | None = None) -> None:
    """One safetensors file, on disk when this returns (not atomic: write to a name that nobody reads yet)."""
    ready = {
        name: (tensor.to(dtype) if dtype is not None and tensor.is_floating_point() else tensor).detach().contiguous()
        for name, tensor in tensors.items()
    }
    # Not save_file: it makes files that only their owner can read.
    with open(path, "wb") as file:
        file.write(to_bytes(ready, {"format": "pt"}))
        file.flush()
        os.fsync(file.fileno())


def read_config(directory: Path, header: Mapping[str, Any], cls: type[T], key: str = "config") -> T:
    """Read `header` and, under `key`, a `cls` from config.json. Raises `WeightsError` naming what does not fit."""
    path = directory / CONFIG
    try:
        data = read_json(path)
        for name, value in header.items():
            if not isinstance(data, dict) or data.get(name) != value:
                found = data.get(name) if isinstance(data, dict) else None
                raise RacError(
                    f"{path} has {name} {found!r}, expected {value!r}; it was written by another program or version"
                )
        return from_json(cls, data.get(key), str(path))
    except WeightsError:
        raise
    except RacError as error:
        raise WeightsError(str(error)) from None


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors and the metadata of one safetensors file. Raises `WeightsError` if it is missing, cut or foreign."""
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


def load_tensors(module: nn.Module, directory: Path) -> None:
    """Fill `module` from model.safetensors, all of it and nothing else. Raises `WeightsError` where it does not fit."""
    path = directory / WEIGHTS
    if not path.is_file():
        raise WeightsError(f"{directory} holds no weights; expected {WEIGHTS} beside {CONFIG}")
    tensors, _ = read_tensors(path)
    fit_tensors(module, tensors, str(path))


def fit_tensors(module: nn.Module, tensors: Mapping[str, Tensor], source: str) -> None:
    """Copy `tensors` into `module`. Raises `WeightsError` naming one that is missing, unknown or of another shape."""
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
    """A hash of a state dict: equal if and only if names, shapes, types and values are."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]
