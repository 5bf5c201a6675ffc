"""Conversion of public checkpoints of SiT, REPA and LightningDiT into generators, and back.

SiT and LightningDiT have this library's time, 1 at the data. REPA's is 1 at the noise: v(x, t) = -v'(x, 1 - t). That is
converted exactly, in the weights: the output layer is negated, and the rotation that takes the waves of 1 - t to those
of t is folded into the first layer of the time's network.
"""

from __future__ import annotations

import argparse
import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import save as to_safetensors
from torch import Tensor

from ..coders.protocol import Coder
from ..errors import WeightsError
from ..fields import SiTFieldConfig
from ..fields.transformer import TIME_FREQUENCIES, positions
from ..files import write_bytes
from ..storage import as_weights_error, fit_tensors, read_tensors
from .flow import FlowGenerator, FlowGeneratorConfig
from .sampling import Sampling

HEADS = {384: 6, 768: 12, 1024: 16, 1152: 16}
"""Heads of the published sizes, by their width: weights do not tell them."""

POSITIONS, PROJECTORS, ROTATIONS = "pos_embed", "projectors.", "feat_rope."
"""Names of the public tensors that are not needed: fixed tables, and REPA's alignment heads."""

_NAMES = (
    ("patches.", "x_embedder.proj."),
    ("label.", "y_embedder.embedding_table."),
    ("head.modulation.", "final_layer.adaLN_modulation."),
    ("head.norm.", "final_layer.norm_final."),
    ("head.out.", "final_layer.linear."),
    (".modulation.", ".adaLN_modulation."),
    (".attention.qkv.", ".attn.qkv."),
    (".attention.out.", ".attn.proj."),
    (".before_attention.", ".norm1."),
    (".before_mlp.", ".norm2."),
    (".mlp.0.", ".mlp.fc1."),
    (".mlp.2.", ".mlp.fc2."),
    (".mlp.gate.", ".mlp.w12."),
    (".mlp.out.", ".mlp.w3."),
    ("time.", "t_embedder.mlp."),
)
"""Parts of names here, and those that they have in public checkpoints; replaced in this order."""


def read_public(path: str | Path, entry: Literal["ema", "model"] = "ema") -> dict[str, Tensor]:
    """Reads the state dict of a public checkpoint, a .pt or .safetensors file, without running code from it.

    - `path`: the file.
    - `entry`: the averaged weights or those of the last iteration, where the file has both.

    Raises `WeightsError` for a file that is missing, cut short, or holds anything but tensors and settings.
    """
    path = Path(path)
    if path.suffix == ".safetensors":
        return read_tensors(path)[0]
    try:
        # Checkpoints of training scripts have their options beside the weights.
        with torch.serialization.safe_globals([argparse.Namespace]):
            found: Any = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise WeightsError(f"{path} does not exist; give a public checkpoint, .pt or .safetensors") from None
    except Exception as error:  # the unpickler fails in many ways on what is no pickle
        raise WeightsError(
            f"{path} is cut short, or holds more than tensors and settings; download it again"
        ) from error
    if isinstance(found, dict) and isinstance(found.get(entry), dict):
        found = found[entry]
    if not isinstance(found, dict) or not found or not all(isinstance(one, Tensor) for one in found.values()):
        raise WeightsError(f"{path} holds no state dict, nor one under {entry!r}; give a checkpoint of SiT or the like")
    return {name.removeprefix("module."): tensor for name, tensor in found.items()}


def from_public(
    tensors: Mapping[str, Tensor],
    coder: Coder,
    name: str | None = None,
    *,
    classes: Sequence[str] | None = None,
    heads: int | None = None,
    noise_time: bool | None = None,
    sampling: Sampling | None = None,
) -> FlowGenerator:
    """Returns the generator of a public state dict: SiT's, REPA's or LightningDiT's.

    Where the network predicts a variance as well, that half of the output is dropped.

    - `tensors`: the state dict, as `read_public` gives it.
    - `coder`: the coder whose latents it generates, normalised alike.
    - `name`: the coder's name, for the generator's record.
    - `classes`: names of the classes; None: their numbers.
    - `heads`: heads of the attention; None: those of the published network of its width.
    - `noise_time`: whether its time is 1 at the noise, as in REPA; None: if the state dict has REPA's projectors.
    - `sampling`: the generator's own settings; None: the defaults.

    Raises `WeightsError` for a state dict of another kind, for missing and unknown tensors, and for latents of another
    number of channels than the coder's.
    """
    wanted = {key: one for key, one in tensors.items() if not key.startswith((POSITIONS, PROJECTORS, ROTATIONS))}
    config = _config_of(tensors, heads)
    rows = tensors["y_embedder.embedding_table.weight"].shape[0] - 1
    names = tuple(map(str, range(rows))) if classes is None else tuple(classes)
    channels, side = _latents_of(tensors, config)
    if channels != coder.spec.channels:
        raise WeightsError(
            f"the checkpoint generates latents of {channels} channels, the coder's have {coder.spec.channels}; "
            "give the coder that it was trained on"
        )
    with as_weights_error():
        settings = FlowGeneratorConfig(coder.spec, side, config, names, name, sampling or Sampling())
    generator = FlowGenerator(settings)
    own = {key: _public(key) for key in generator.field.state_dict()}
    back = {public: key for key, public in own.items()}
    named = {back.get(key, key): tensor.float() for key, tensor in wanted.items()}
    for part in ("weight", "bias"):
        named[f"head.out.{part}"] = _without_variance(named[f"head.out.{part}"], channels, config.patch)
    if noise_time if noise_time is not None else any(key.startswith(PROJECTORS) for key in tensors):
        named = turned(named)
    fit_tensors(generator.field, named, "the checkpoint")
    return generator.eval().requires_grad_(False)


def to_public(generator: FlowGenerator, *, noise_time: bool = False, learn_sigma: bool = False) -> dict[str, Tensor]:
    """Returns the state dict that public code of SiT or LightningDiT loads: `from_public`, backwards.

    - `generator`: the generator; its field's style decides which code that is.
    - `noise_time`: for code whose time is 1 at the noise, as REPA's (its projectors are not made).
    - `learn_sigma`: double the output, as SiT's default asks for; the second half is zero.

    Raises `WeightsError` for a DiT^DH, and for a field with an interval, which those networks do not have.
    """
    config = generator.config.field
    if config.kind != "sit":
        raise WeightsError(f"the generator's field is a {config.kind}, which code of SiT or LightningDiT cannot run")
    if config.interval:
        raise WeightsError("SiT and LightningDiT have no interval; a mean-velocity field cannot be given to them")
    tensors = {name: tensor.detach().clone() for name, tensor in generator.field.state_dict().items()}
    if noise_time:
        tensors = turned(tensors)
    if learn_sigma:
        for part in ("weight", "bias"):
            output = tensors[f"head.out.{part}"].unflatten(0, (config.patch**2, -1))
            tensors[f"head.out.{part}"] = torch.cat([output, torch.zeros_like(output)], dim=1).flatten(0, 1)
    grid = generator.config.side // config.patch
    table = positions(grid, grid, config.width, tensors["patches.weight"])[None]
    return {POSITIONS: table, **{_public(name): tensor for name, tensor in tensors.items()}}


def write_public(tensors: Mapping[str, Tensor], path: str | Path) -> None:
    """Writes a state dict of `to_public` to `path`: a .safetensors file, or one of torch with the entry "ema".

    The file is written completely or not at all. Raises `WeightsError` if the system refuses.
    """
    path = Path(path)
    whole = {name: tensor.contiguous() for name, tensor in tensors.items()}
    if path.suffix == ".safetensors":
        write_bytes(path, to_safetensors(whole), WeightsError)
        return
    buffer = io.BytesIO()
    torch.save({"ema": whole}, buffer)
    write_bytes(path, buffer.getvalue(), WeightsError)


def turned(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns the weights of the field -v(x, 1 - t), from those of v(x, t); twice gives the same again.

    cos(w (1 - t)) = cos w cos wt + sin w sin wt and sin(w (1 - t)) = sin w cos wt - cos w sin wt, for each of the
    frequencies w of the time's embedding.
    """
    weight = tensors["time.0.weight"].double()
    w = torch.exp(-math.log(1e4) / TIME_FREQUENCIES * torch.arange(TIME_FREQUENCIES, dtype=torch.float64))
    cosines, sines = weight.chunk(2, dim=1)
    folded = torch.cat([cosines * w.cos() + sines * w.sin(), cosines * w.sin() - sines * w.cos()], dim=1)
    return {
        **tensors,
        "time.0.weight": folded.to(tensors["time.0.weight"].dtype),
        "head.out.weight": -tensors["head.out.weight"],
        "head.out.bias": -tensors["head.out.bias"],
    }


def _public(name: str) -> str:
    for ours, theirs in _NAMES:
        name = name.replace(ours, theirs)
    return name


def _config_of(tensors: Mapping[str, Tensor], heads: int | None) -> SiTFieldConfig:
    """Returns the configuration of the network, read off the shapes of its weights. Raises `WeightsError`."""
    for name in ("x_embedder.proj.weight", "y_embedder.embedding_table.weight", "final_layer.linear.weight"):
        if name not in tensors:
            raise WeightsError(f"the checkpoint lacks {name}: it is none of SiT, REPA or LightningDiT")
    if any(".q_norm." in name for name in tensors):
        raise WeightsError("the checkpoint normalises queries and keys, which this network does not")
    width, _, patch, _ = tensors["x_embedder.proj.weight"].shape
    heads = heads or HEADS.get(width)
    if heads is None:
        raise WeightsError(f"a network of width {width} is none of the published ones; say how many heads it has")
    depth = len({name.split(".")[1] for name in tensors if name.startswith("blocks.")})
    gated = any(".mlp.w12." in name for name in tensors)
    classes = tensors["y_embedder.embedding_table.weight"].shape[0] - 1
    with as_weights_error():
        return SiTFieldConfig(
            depth=depth, width=width, heads=heads, patch=patch, classes=classes, style="rms" if gated else "layer"
        )


def _latents_of(tensors: Mapping[str, Tensor], config: SiTFieldConfig) -> tuple[int, int]:
    """Returns channels and side of the latents. Raises `WeightsError` for positions that are not the fixed ones."""
    table = tensors.get(POSITIONS)
    if table is None:
        raise WeightsError(f"the checkpoint lacks {POSITIONS}, which tells the size of its latents")
    grid = math.isqrt(table.shape[1])
    expected = positions(grid, grid, config.width, torch.zeros(()))
    if table.shape != (1, *expected.shape) or not torch.allclose(table[0].float(), expected, atol=1e-3):
        raise WeightsError("the checkpoint has other positions than SiT's fixed table; they were trained, or moved")
    return tensors["x_embedder.proj.weight"].shape[1], grid * config.patch


def _without_variance(output: Tensor, channels: int, patch: int) -> Tensor:
    """Returns the rows of the output layer that make the velocity: the first half of the channels of each pixel."""
    pixels = output.unflatten(0, (patch**2, -1))
    return pixels[:, :channels].flatten(0, 1) if pixels.shape[1] == 2 * channels else output
