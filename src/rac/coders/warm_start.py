"""Initialisation of a RAC's field from its teacher: from its decoder, or from both its halves."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import RacError
from ..fields import CarriersField, CarriersFieldConfig, LocalField
from ..fields.conv import ResidualBlock
from ..states import PAD, RGB
from .protocol import Coder
from .rac import RAC
from .taesd import TAESD, PooledBlock


def start_from(teacher: Coder, coder: RAC) -> None:
    """Copies the teacher's weights into the field of `coder`: both halves if it has layers for both, or the decoder's.

    Raises `RacError` as `copy_teacher` and `copy_decoder`.
    """
    if isinstance(coder.field, CarriersField):
        copy_teacher(teacher, coder)
    else:
        copy_decoder(teacher, coder)


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
    widths, blocks = (stem.out_channels,) * (len(ups) + 1), _blocks_between(decoder, _doubles)
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


@torch.no_grad()
def copy_teacher(teacher: Coder, coder: RAC) -> None:
    """Copies the teacher into the field of `coder`, which then decodes in one step, and encodes, as the teacher does.

    The copy is exact, to rounding. More steps give the same, for nothing that joins the two ways has an effect yet.
    Where the field has fewer `hidden` channels than the teacher, those that weigh most are kept. Raises `RacError` for
    a teacher outside the TAESD family, and for a field of other sizes.
    """
    if not (isinstance(teacher, TAESD) and isinstance(coder.field, CarriersField)):
        raise RacError(
            "a start from both halves of the teacher needs a TAESD-family teacher and a carriers field; got "
            f"{type(teacher).__name__} and {coder.config.field.kind}"
        )
    field: Any = coder.field
    network, config, scale = teacher.network, field.config, teacher.statistics.scale
    wanted = carriers_of(teacher)
    found = (config.latent_channels, config.width, config.blocks, config.down_blocks, config.pooled)
    if found != (wanted.latent_channels, wanted.width, wanted.blocks, wanted.down_blocks, wanted.pooled):
        raise RacError(f"the field {config} does not have the teacher's sizes; start from {wanted}")
    entry, *downs, latent_head = (layer for layer in network.encoder if isinstance(layer, nn.Conv2d))
    stem, *ups, head = (layer for layer in network.decoder if isinstance(layer, nn.Conv2d))
    for theirs, ours in zip(
        (entry, *downs, latent_head, stem, *ups, head),
        (field.entry, *field.downs, field.latent_head, field.stem, *field.ups, field.head),
        strict=True,
    ):
        ours.load_state_dict(theirs.state_dict())
    # The teacher writes and reads raw latents, the field normalised ones.
    field.latent_head.weight.mul_(scale)
    field.latent_head.bias.mul_(scale)
    field.stem.weight.div_(scale)
    for half, levels in ((network.encoder, field.down_levels), (network.decoder, field.levels)):
        blocks = [layer for layer in half if isinstance(layer, ResidualBlock)]
        for one, block in zip(blocks, (block for level in levels for block in level), strict=True):
            _copy_block(one, block)


def carriers_of(teacher: TAESD) -> CarriersFieldConfig:
    """Returns the configuration of a field that `copy_teacher` can fill."""
    network: Any = teacher.network
    decoder, encoder = network.decoder, network.encoder
    return CarriersFieldConfig(
        latent_channels=teacher.spec.channels,
        width=encoder[0].out_channels,
        blocks=_blocks_between(decoder, _doubles),
        down_blocks=_blocks_between(encoder, _halves),
        clamp=3 * float(teacher.statistics.scale),
        pooled=any(isinstance(layer, PooledBlock) for layer in decoder),
    )


def _blocks_between(half: nn.Sequential, changes_stride: Callable[[nn.Module], bool]) -> tuple[int, ...]:
    """Returns the number of residual blocks at each stride of a decoder or an encoder."""
    counts = [0]
    for layer in half:
        if changes_stride(layer):
            counts.append(0)
        counts[-1] += isinstance(layer, ResidualBlock)
    return tuple(counts)


def _doubles(layer: nn.Module) -> bool:
    return isinstance(layer, nn.Upsample)


def _halves(layer: nn.Module) -> bool:
    return isinstance(layer, nn.Conv2d) and layer.stride == (2, 2)


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
