"""Directories of coders in this library's own format: config.json, and safetensors with the statistics among them.

config.json holds `format`, the name of the family, `version`, and `config`, which the family itself reads.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..config import to_json
from ..latents import Statistics
from ..storage import CONFIG, DIFFUSERS, as_weights_error, read_format, read_settings, read_weights, write_directory
from .adapter import check_keys, statistics_of
from .protocol import Coder

STATISTICS = "statistics."
"""Prefix of the statistics' names in model.safetensors."""

DROP_IN_KEYS = (
    *("num_inference_steps", "in_channels", "out_channels", "latent_channels", "block_out_channels"),
    *("scaling_factor", "shift_factor", "latents_mean", "latents_std", "force_upcast"),
)
"""Keys of a diffusers model's config.json beside the family's own, apart from those that begin with an underscore."""


class NativeFiles(NamedTuple):
    """Contents of a directory, not yet a coder."""

    config: Any
    """JSON of the family's configuration."""
    tensors: dict[str, Tensor]
    """The coder's tensors, without its statistics."""
    statistics: Statistics | None
    """The statistics; None if the file has none."""
    said_by: str
    """The file that `config` is from, for messages."""
    source: str
    """The file that `tensors` are from, for messages."""


def write_native(
    coder: Coder,
    config: Any,
    format: str,
    version: int,
    directory: Path,
    dtype: torch.dtype | None,
    tensors: Mapping[str, Tensor] | None = None,
) -> None:
    """Writes a coder, completely or not at all; `dtype` narrows its weights. Raises `WeightsError` if refused.

    `tensors` are those to write; None: all of the coder's.
    """
    said = {"format": format, "version": version, "config": to_json(config)}
    # In full precision even among narrowed weights, so that their hash stays true.
    statistics = {STATISTICS + name: values for name, values in coder.statistics.named_buffers()}
    write_directory(directory, said, coder.state_dict() if tensors is None else tensors, dtype=dtype, exact=statistics)


def read_native(directory: Path, format: str, versions: tuple[int, ...]) -> NativeFiles:
    """Reads what `write_native` wrote, in any of these versions, the newest of which comes last.

    Raises `WeightsError` for another format or version, and for files missing or cut.
    """
    config = read_format(directory, format, versions)
    tensors, source = read_weights(directory)
    numbers = {name: tensors.pop(STATISTICS + name, None) for name in ("shift", "scale")}
    statistics = None
    if numbers["shift"] is not None and numbers["scale"] is not None:
        statistics = Statistics(numbers["shift"], numbers["scale"])
    return NativeFiles(config, tensors, statistics, str(directory / CONFIG), source)


def read_drop_in(directory: Path, key: str) -> NativeFiles:
    """Reads what a diffusers model of `rac.integrations.diffusers` saved, with the configuration under `key`.

    Raises `WeightsError` for files missing or cut, for unknown keys, and for values that cannot be statistics.
    """
    data, (found, source) = read_settings(directory), read_weights(directory, DIFFUSERS)
    tensors = {name.removeprefix("coder."): tensor for name, tensor in found.items()}
    with as_weights_error(str(directory / CONFIG)):
        check_keys(data, (key, *DROP_IN_KEYS))
        statistics = statistics_of(data)
    config = data.get(key)
    if isinstance(config, dict) and "num_inference_steps" in data:
        config["steps"] = data["num_inference_steps"]
    return NativeFiles(config, tensors, statistics, str(directory / CONFIG), source)
