"""Networks applied piece by piece, so that large images fit in memory: tile by tile, or one image at a time.

Lengths are in blocks: f x f pixels of an image or a state, one site of a latent. A tile always begins at a block's
edge, and where the image ends the tile ends too, so the zeros that convolutions pad with lie where they do without
tiles.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ..errors import RacError

M = TypeVar("M", bound=nn.Module)

Function = Callable[..., Tensor]
"""A function of a tensor B C H W, and perhaps of further arguments, such as the time."""


# ----------------------------------------------------------------------------------------------- how far it looks

RADII = (8, 32, 128)
"""Distances in blocks at which `reach` looks for an effect; networks that look beyond the last are not local."""


def reach(module: M, function: Callable[[M, Tensor], Tensor], channels: int, block: int) -> int | None:
    """Returns how many blocks beyond a block its output depends on; None if unbounded or dependent on the place.

    A copy of the module is called, in float64 and with even weights, so that nothing hides behind a weight of zero: a
    NaN in one block spreads to all that depends on it. The answer is then tested on a piece cut out of a longer input,
    which a network that knows its place (relative position) or strides beyond a block does not pass.

    - `module`: the network.
    - `function`: calls the network: function(module, x), x 1 `channels` H W with sides that are multiples of `block`.
    - `channels`: channels of the input.
    - `block`: side of a block in pixels of the input.
    """
    if any(isinstance(part, _OVER_ALL) for part in module.modules()):
        return None  # the NaN would say so too, at some cost for large networks
    even = _with_even_weights(module)

    def asked(x: Tensor) -> Tensor:
        with torch.no_grad(), torch.autocast("cpu", enabled=False):
            return function(even, x)

    found = [_spread(asked, channels, block, down) for down in (True, False)]
    if None in found:
        return None
    blocks = max(size for size in found if size is not None)
    return blocks if all(_holds(asked, channels, block, blocks, down) for down in (True, False)) else None


_OVER_ALL = (nn.GroupNorm, nn.modules.instancenorm._InstanceNorm, nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d)
"""Layers that make every site of their output depend on every site of their input."""


def _with_even_weights(module: M) -> M:
    even = copy.deepcopy(module).to("cpu", torch.float64).eval()
    with torch.no_grad():
        for parameter in even.parameters():
            parameter.fill_(1 / max(1, parameter[0].numel()) if parameter.ndim else 1.0)
    return even


def _strip(channels: int, block: int, length: int, down: bool) -> Tensor:
    """Returns a random input one block wide and `length` blocks long: enough to look along one side."""
    sides = (length * block, block) if down else (block, length * block)
    return torch.rand(1, channels, *sides, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def _along(x: Tensor, first: int, count: int, down: bool) -> Tensor:
    return x.narrow(-2 if down else -1, first, count)


def _spread(function: Callable[[Tensor], Tensor], channels: int, block: int, down: bool) -> int | None:
    for radius in RADII:
        length = 2 * radius + 1
        x = _strip(channels, block, length, down)
        _along(x, radius * block, block, down).fill_(torch.nan)
        lost = function(x).isnan().any(dim=1).any(dim=-1 if down else -2).flatten()
        blocks = lost.view(length, -1).any(dim=1).nonzero().flatten() - radius
        farthest = int(blocks.abs().max()) if len(blocks) else 0
        if farthest < radius:
            return farthest
    return None


def _holds(function: Callable[[Tensor], Tensor], channels: int, block: int, blocks: int, down: bool) -> bool:
    length = 3 * blocks + 4
    x = _strip(channels, block, length, down)
    whole = function(x)
    per_block = whole.shape[-2 if down else -1] // length
    for first in (blocks + 1, blocks + 2):
        low, count = (first - blocks) * block, (2 * blocks + 1) * block
        piece = _along(function(_along(x, low, count, down)), blocks * per_block, per_block, down)
        if (piece - _along(whole, first * per_block, per_block, down)).abs().max() > 1e-11 * whole.abs().max():
            return False
    return True


# ----------------------------------------------------------------------------------------------- tile by tile


@dataclass(frozen=True)
class Tiling:
    """Cutting of an image into tiles.

    Raises `RacError` for tiles of no block, and for blends over more than half a tile.
    """

    tile: int
    """Largest number of blocks on each side of a tile; the tiles of a row are as even as they can be."""
    margin: int
    """Number of blocks around the tile that are computed with it, except where the image ends."""
    exact: bool
    """Cut the margins off, which is exact where they cover the network's reach; otherwise blend them linearly."""

    def __post_init__(self) -> None:
        if self.tile < 1 or self.margin < 0:
            raise RacError(
                f"a tile needs at least 1 block and a margin of at least 0, not {self.tile} and {self.margin}"
            )
        # The tiles of a row may be half as long as `tile`, and each may blend with one neighbour at a time.
        if not self.exact and 4 * self.margin > self.tile:
            raise RacError(
                f"tiles of {self.tile} blocks are too small to blend over {2 * self.margin}; "
                "give larger tiles, or half of them at most as overlap"
            )


@dataclass(frozen=True)
class _Part:
    """Place of one tile along one side of the image: its own part, and the wider part that is computed."""

    low: int
    first: int
    last: int
    high: int

    def weights(self, per_block: int, like: Tensor) -> Tensor:
        """Returns a weight for each computed pixel: 1 inside, falling linearly to 0 over overlaps with neighbours."""
        weights = like.new_ones((self.high - self.low) * per_block)
        for margin, ahead in ((self.first - self.low, True), (self.high - self.last, False)):
            length = 2 * margin * per_block
            if length:
                ramp = (torch.arange(length, device=like.device, dtype=like.dtype) + 0.5) / length
                (weights[:length] if ahead else weights[-length:]).copy_(ramp if ahead else ramp.flip(0))
        return weights


def in_tiles(function: Function, tiling: Tiling, block_in: int, block_out: int) -> Function:
    """Returns a function that applies `function` to an image tile by tile, and puts the results together.

    Only the input and the output are ever held whole.

    - `function`: function of an image. Further arguments, such as the time, go to each tile as they are.
    - `tiling`: how the image is cut.
    - `block_in`, `block_out`: pixels of a block's side in its input and in its output.
    """

    def tiled(whole: Tensor, *others: Tensor) -> Tensor:
        height, width = (side // block_in for side in whole.shape[-2:])
        out: Tensor | None = None
        for down in _parts(height, tiling):
            for across in _parts(width, tiling):
                rows = slice(down.low * block_in, down.high * block_in)
                columns = slice(across.low * block_in, across.high * block_in)
                made = function(whole[..., rows, columns], *others)
                if out is None:
                    out = made.new_zeros(*made.shape[:2], height * block_out, width * block_out)
                _put(out, made, down, across, block_out, tiling.exact)
        assert out is not None
        return out

    return tiled


def _put(out: Tensor, made: Tensor, down: _Part, across: _Part, block: int, exact: bool) -> None:
    """Writes a tile's own part into `out`, or adds all of the tile by its weights."""
    if exact:
        rows, columns = (slice(part.first * block, part.last * block) for part in (down, across))
        own = [slice((part.first - part.low) * block, (part.last - part.low) * block) for part in (down, across)]
        out[..., rows, columns] = made[..., own[0], own[1]]
    else:
        rows, columns = (slice(part.low * block, part.high * block) for part in (down, across))
        out[..., rows, columns] += made * down.weights(block, made).unsqueeze(1) * across.weights(block, made)


def _parts(length: int, tiling: Tiling) -> Iterator[_Part]:
    count = -(-length // tiling.tile)
    edges = [length * k // count for k in range(count + 1)]
    for first, last in pairwise(edges):
        yield _Part(max(0, first - tiling.margin), first, last, min(length, last + tiling.margin))


# ----------------------------------------------------------------------------------------------- image by image


def in_slices(function: Function) -> Function:
    """Returns a function that applies `function` to a batch one image at a time.

    All its arguments have the batch first.
    """

    def sliced(*batch: Tensor) -> Tensor:
        return torch.cat([function(*one) for one in zip(*(each.split(1) for each in batch), strict=True)])

    return sliced


class Pieces(nn.Module):
    """A network applied in pieces; `way` turns its function into one that works so, such as `in_slices`."""

    def __init__(self, network: nn.Module, way: Callable[[Any], Function], exact: bool = True) -> None:
        super().__init__()
        self.network = network
        self.way = way
        self.exact = exact
        """Whether the pieces give the result of the whole, up to rounding."""
        self.train(network.training)

    def forward(self, *args: Tensor) -> Tensor:
        """Returns the network's own result, exactly or nearly, depending on `way`."""
        return self.way(self.network)(*args)
