"""Conversion of public RAE decoders: those of the paper's code, and those that diffusers saves as AutoencoderRAE.

Both have the same layers under other names, with query, key and value apart.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..config import from_json
from ..errors import WeightsError
from ..fields.transformer import positions
from ..latents import Statistics
from ..representations import Representation, load_representation
from ..representations.weight_files import read_pickled
from ..storage import CONFIG, DIFFUSERS, as_weights_error, fit_tensors, read_settings, read_tensors, read_weights
from .rae import RAE, VARIANCE_EPSILON, RAEConfig, ViTDecoderConfig

DIFFUSERS_CLASS = "AutoencoderRAE"
"""Value of `_class_name` in the config.json of an RAE saved by diffusers."""

DIFFUSERS_EPSILON = 1e-5
"""Number that diffusers adds to the standard deviation of latents."""

HEADS = {768: 12, 1024: 16, 1152: 16}
"""Heads of the published decoders, by their width: weights do not tell them."""

ENCODERS = {
    ("dinov2", 384): "dinov2-s",
    ("dinov2", 768): "dinov2-b",
    ("dinov2", 1024): "dinov2-l",
    ("siglip2", 768): "siglip2-b",
    ("mae", 768): "mae-b",
}
"""Representations by the names that diffusers gives them, and their number of channels."""

POSITIONS = "decoder_pos_embed"
"""Name of the fixed table of positions, which is computed here."""

_NAMES = (
    ("trainable_cls_token", "class_token"),
    ("decoder_embed.", "embed."),
    ("decoder_layers.", "blocks."),
    ("decoder_norm.", "norm."),
    ("decoder_pred.", "out."),
    (".layernorm_before.", ".before_attention."),
    (".layernorm_after.", ".before_mlp."),
    (".intermediate.dense.", ".mlp.0."),
    (".attention.output.dense.", ".attention.out."),
    (".attention.to_out.0.", ".attention.out."),
    (".output.dense.", ".mlp.2."),
    (".attention.attention.", ".attention."),
)
"""Parts of public names, and those that they have here; replaced in this order."""

_PARTS = {"query": 0, "key": 1, "value": 2, "to_q": 0, "to_k": 1, "to_v": 2}


def from_public(
    decoder: str | Path,
    representation: str,
    statistics: str | Path | None = None,
    *,
    heads: int | None = None,
) -> RAE:
    """Reads a decoder of the paper's code, without running code from its files.

    - `decoder`: the state dict of the decoder, a .pt or .safetensors file.
    - `representation`: the representation whose tokens it decodes, such as dinov2-b.
    - `statistics`: the file of `mean` and `var` of the tokens; None: latents stay as they are.
    - `heads`: heads of the attention; None: those of the published decoder of its width.

    Raises `WeightsError` for files that are missing, cut short or of another kind, and for a representation of another
    number of channels.
    """
    path = Path(decoder)
    tensors = read_tensors(path)[0] if path.suffix == ".safetensors" else read_pickled(path)
    values = Statistics.identity()
    if statistics is not None:
        found = read_pickled(Path(statistics))
        if not {"mean", "var"} <= found.keys():
            raise WeightsError(f"{statistics} holds no mean and var, but {', '.join(found)}; give the file of both")
        with as_weights_error(str(statistics)):
            scale = (found["var"].double() + VARIANCE_EPSILON).rsqrt()
            values = Statistics(*(_by_place(one) for one in (found["mean"], scale)))
    return _built(tensors, str(path), representation, heads, values)


def load_diffusers(directory: str | Path, representation: str | None = None) -> RAE:
    """Reads a directory that diffusers' AutoencoderRAE saved; the representation is loaded from its own source.

    - `directory`: the directory.
    - `representation`: the representation; None: the published one of the kind and size that config.json names.

    Raises `WeightsError` for a directory of another kind, for weights missing, cut or unknown, and if the encoder in it
    is not the representation, whose latents would be others.
    """
    directory = Path(directory)
    config, said_by = read_settings(directory), str(directory / CONFIG)
    tensors, source = read_weights(directory, DIFFUSERS)
    kind = (config.get("encoder_type", "dinov2"), config.get("encoder_hidden_size", 768))
    name = representation or ENCODERS.get(kind)
    if name is None:
        raise WeightsError(f"{said_by}: an encoder {kind[0]} of {kind[1]} channels is none of the published ones")
    with as_weights_error(said_by):
        statistics = _diffusers_statistics(config, tensors)
    wanted = {key.removeprefix("decoder."): one for key, one in tensors.items() if key.startswith("decoder.")}
    coder = _built(wanted, source, name, config.get("decoder_num_attention_heads"), statistics)
    _check_encoder(tensors, coder.encoder, name, source)
    return coder


def _diffusers_statistics(config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Statistics:
    mean, std = (tensors.get(f"_latents_{name}") for name in ("mean", "std"))
    if mean is None or std is None:
        raise WeightsError("the weights lack _latents_mean or _latents_std; save the model again")
    scaling = config.get("scaling_factor", 1.0)
    return Statistics(_by_place(mean), _by_place(scaling / (std.double() + DIFFUSERS_EPSILON)))


def _by_place(values: Tensor) -> Tensor:
    """Returns published statistics, (1), (1, c, h, w) or (c, h, w), in the shape () or (c, h, w)."""
    if values.numel() == 1:
        return values.reshape(())
    return values[0] if values.ndim == 4 else values


def _built(
    tensors: Mapping[str, Tensor], source: str, representation: str, heads: int | None, statistics: Statistics
) -> RAE:
    """Returns the RAE of a public decoder's tensors. Raises `WeightsError` naming `source`."""
    _check_positions(tensors.get(POSITIONS), source)
    named = fused({name: one.float() for name, one in tensors.items() if name != POSITIONS})
    config = RAEConfig(representation, _decoder_config(named, heads, source))
    encoder = load_representation(representation, affine=False)
    channels = named["embed.weight"].shape[1]
    if encoder.channels != channels:
        raise WeightsError(
            f"{source} decodes tokens of {channels} channels, those of {representation} have {encoder.channels}; give "
            "the representation that it was trained on"
        )
    with as_weights_error(source):
        coder = RAE(config, statistics, encoder)
    fit_tensors(coder.decoder, named, source)
    return coder.eval().requires_grad_(False)


def fused(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns a public decoder's tensors under the names of `ViTDecoder`, query, key and value joined."""
    found: dict[str, Tensor] = {}
    apart: dict[str, dict[int, Tensor]] = {}
    for name, tensor in tensors.items():
        for theirs, ours in _NAMES:
            name = name.replace(theirs, ours)
        if match := re.fullmatch(r"(.*\.attention\.)(query|key|value|to_[qkv])\.(weight|bias)", name):
            apart.setdefault(f"{match[1]}qkv.{match[3]}", {})[_PARTS[match[2]]] = tensor
        else:
            found[name] = tensor
    for name, parts in apart.items():
        found[name] = torch.cat([parts[place] for place in sorted(parts)])
    return found


def _decoder_config(tensors: Mapping[str, Tensor], heads: int | None, source: str) -> ViTDecoderConfig:
    for name in ("embed.weight", "blocks.0.mlp.0.weight", "out.weight", "class_token"):
        if name not in tensors:
            raise WeightsError(f"{source} is no decoder of an RAE: it lacks what is called {name} here")
    width, hidden = tensors["embed.weight"].shape[0], tensors["blocks.0.mlp.0.weight"].shape[0]
    heads = heads or HEADS.get(width)
    if heads is None:
        raise WeightsError(f"{source}: a decoder of width {width} is none of the published ones; give its heads")
    depth = len({name.split(".")[1] for name in tensors if name.startswith("blocks.")})
    with as_weights_error(source):
        return from_json(ViTDecoderConfig, {"depth": depth, "width": width, "heads": heads, "hidden": hidden})


def _check_positions(table: Tensor | None, source: str) -> None:
    """Raises `WeightsError` for positions that are not the fixed ones, which are computed here."""
    if table is None:
        return
    grid, width = math.isqrt(table.shape[1] - 1), table.shape[2]
    expected = torch.cat([torch.zeros(1, width), positions(grid, grid, width, torch.zeros(()))])
    if table.shape != (1, *expected.shape) or not torch.allclose(table[0].float(), expected, atol=1e-3):
        raise WeightsError(f"{source} has other positions than the fixed table; they were trained, or moved")


def _check_encoder(tensors: Mapping[str, Tensor], encoder: Any, name: str, source: str) -> None:
    """Raises `WeightsError` if an encoder among the tensors differs from the representation called `name`."""
    assert isinstance(encoder, Representation)
    theirs = {key.removeprefix("encoder."): one for key, one in tensors.items() if key.startswith("encoder.")}
    own = {key.removeprefix("model."): one for key, one in encoder.state_dict().items()}
    for key in theirs.keys() & own.keys():
        one, other = theirs[key].float(), own[key].float()
        if one.shape != other.shape or not torch.allclose(one, other, rtol=1e-2, atol=1e-2):
            raise WeightsError(
                f"{source} was trained on another encoder than {name}: their {key} differ; give the representation "
                "that it was trained on"
            )
