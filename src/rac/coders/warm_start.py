"""Initialisation of a RAC's field from its teacher's decoder."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..errors import RacError
from ..fields import LocalField
from ..fields.conv import ResidualBlock
from ..states import PAD, RGB
from .protocol import Coder
from .rac import RAC
from .taesd import TAESD, PooledBlock


@torch.no_grad()
def copy_decoder(teacher: Coder, coder: RAC) -> None:
    """Copies the teacher's decoder into the field of `coder`, so that one step from t = 0 decodes as the teacher does.

    The copy is exact, to rounding, where the field has the decoder's widths, blocks, clamp and pooling; with fewer
    `hidden` channels it keeps those that weigh most. The way down starts without effect. Raises `RacError` for a
    teacher outside the TAESD family, and for a field or spread without the layers for it.
    """
    if not (isinstance(teacher, TAESD) and isinstance(coder.field, LocalField) and coder.config.spread == "beside"):
        raise RacError(
            "a start from the teacher's decoder needs a TAESD-family teacher, a local field and spread beside; got "
            f"{type(teacher).__name__}, {coder.config.field.kind} and {coder.config.spread}"
        )
    field: Any = coder.field  # torch's types know layers in lists as modules only
    decoder, config = teacher.network.decoder, field.config
    convolutions: list[Any] = [layer for layer in decoder if isinstance(layer, nn.Conv2d)]
    stem, *ups, last = convolutions
    theirs = [layer for layer in decoder if isinstance(layer, ResidualBlock)]
    ours = [block for level in field.levels for block in level]
    widths, blocks = (stem.out_channels,) * (len(ups) + 1), _blocks_between_upsamplings(decoder)
    if (config.widths, config.blocks, config.carrier) != (widths, blocks, True):
        raise RacError(
            f"widths {config.widths}, blocks {config.blocks}, carrier {config.carrier} are not the teacher's: "
            f"give widths {widths}, blocks {blocks}, patch 1, and a carrier"
        )
    scale = teacher.statistics.scale  # the teacher reads raw latents, the field normalised ones
    image_sites = RGB * coder.spec.factor**2
    field.stem.weight.zero_()
    field.stem.weight[:, [slot - image_sites for slot in coder.states.slots()]] = stem.weight / scale
    field.stem.bias.copy_(stem.bias)
    for up, upsampling in zip(ups, field.ups, strict=True):
        upsampling.weight.copy_(up.weight)
    for one, block in zip(theirs, ours, strict=True):
        _copy_block(one, block)
    half, middle = teacher.affine()
    field.head.weight[:RGB] = last.weight / half
    field.head.bias[:RGB] = (last.bias - middle) / half - PAD
    for layer in (*field.joins, *([] if field.bottom is None else [field.bottom])):
        nn.init.zeros_(layer.weight)
        nn.init.zeros_(layer.bias)


def _blocks_between_upsamplings(decoder: nn.Sequential) -> tuple[int, ...]:
    counts = [0]
    for layer in decoder:
        if isinstance(layer, nn.Upsample):
            counts.append(0)
        counts[-1] += isinstance(layer, ResidualBlock)
    return tuple(counts)


def _copy_block(theirs: Any, ours: Any) -> None:
    first, second, third = (theirs.conv[place] for place in (0, 2, 4))
    into = _heaviest(first, second, ours.conv[0].out_channels)
    out = _heaviest(second, third, ours.conv[2].out_channels)
    everything = torch.arange(first.in_channels)
    for place, layer, read, write in (
        (0, first, everything, into),
        (2, second, into, out),
        (4, third, out, everything),
    ):
        ours.conv[place].weight.copy_(layer.weight[write][:, read])
        ours.conv[place].bias.copy_(layer.bias[write])
    if ours.pool is not None and isinstance(theirs, PooledBlock):
        ours.pool.load_state_dict(theirs.pool.state_dict())


def _heaviest(makes: nn.Conv2d, reads: nn.Conv2d, count: int) -> Tensor:
    """Returns the `count` channels between two convolutions whose weights are largest, in their order."""
    weight = makes.weight.flatten(1).norm(dim=1) * reads.weight.transpose(0, 1).flatten(1).norm(dim=1)
    return weight.topk(count).indices.sort().values
