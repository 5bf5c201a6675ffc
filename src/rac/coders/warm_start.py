"""A RAC's field that begins as its teacher's decoder."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from ..errors import RacError
from ..fields import LocalField
from ..fields.conv import ResidualBlock
from .protocol import Coder
from .rac import RAC
from .taesd import TAESD

HUSH = 0.1
"""What the random weights of layers that read features of both kinds are scaled by."""


@torch.no_grad()
def copy_decoder(teacher: Coder, coder: RAC) -> None:
    """Copy the convolutions of a TAESD-family decoder into a `local` field, stride by stride.

    What the field has beyond them stays random, scaled by `HUSH` where its features meet the copied ones; the teacher's
    last level (full resolution), its pooling and its clamp have no counterpart. Raises `RacError` for another teacher,
    field or spread, and for widths below the teacher's.
    """
    if not isinstance(teacher, TAESD) or not isinstance(coder.field, LocalField) or coder.config.spread != "beside":
        raise RacError(
            "a start from the teacher's decoder needs a TAESD-family teacher, a local field with a carrier, and spread "
            f"beside; got {type(teacher).__name__}, {coder.config.field.kind} and {coder.config.spread}"
        )
    field: Any = coder.field  # torch's types know layers in lists as modules only
    source = _runs(teacher.network.decoder)
    stem = next(source)
    width = stem[0].out_channels
    if min(field.config.widths) < width:
        raise RacError(f"widths {field.config.widths} must be at least the teacher's {width}")
    slots = [slot - field.coarse_from * field.factor**2 for slot in coder.states.slots()]
    field.stem.weight.mul_(HUSH)
    # The teacher reads raw latents, the field normalised ones.
    field.stem.weight[:width, slots] = stem[0].weight / teacher.spec.scale
    field.stem.bias[:width] = stem[0].bias
    for layer in (field.bottom, *field.joins):
        if layer is not None:
            layer.weight.mul_(HUSH)
    for place, level in enumerate(field.levels):
        if place:
            _copy(next(source)[0], field.ups[place - 1])
        for theirs, ours in zip(next(source), level, strict=False):
            for one, other in zip(_convolutions(theirs), _convolutions(ours), strict=True):
                _copy(one, other)


def _runs(decoder: nn.Sequential) -> Iterator[list[Any]]:
    """The decoder's layers with weights: a convolution alone, the blocks of one stride together."""
    blocks: list[nn.Module] = []
    for layer in decoder:
        if isinstance(layer, ResidualBlock):
            blocks.append(layer)
        elif isinstance(layer, nn.Conv2d):
            if blocks:
                yield blocks
            blocks = []
            yield [layer]


def _convolutions(block: nn.Module) -> list[nn.Conv2d]:
    assert isinstance(block, ResidualBlock)
    return [layer for layer in block.conv if isinstance(layer, nn.Conv2d)]


def _copy(theirs: nn.Module, ours: nn.Module) -> None:
    """Into the first channels; what else comes into those is hushed."""
    assert isinstance(theirs, nn.Conv2d)
    assert isinstance(ours, nn.Conv2d)
    out, into = theirs.weight.shape[:2]
    ours.weight[:out].mul_(HUSH)
    ours.weight[:out, :into] = theirs.weight
    if ours.bias is not None and theirs.bias is not None:
        ours.bias[:out] = theirs.bias
