"""Coding of large images and large batches in bounded memory: a coder's networks work in tiles or image by image.

The networks are tiled, and not the way from latent to image: where a field is evaluated many times, the margin
is what one evaluation looks at, whatever the number of steps and the solver, implicit ones included. What stays whole
are the states, a few of them at a time.
"""

from __future__ import annotations

import copy
from functools import partial
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from ..errors import RacError
from ..fields.tiling import Pieces, Tiling, in_slices, in_tiles, reach
from ..flow import Solver, TimeGrid
from .protocol import Coder, Network

TILE = 1024
"""Default side of a tile in pixels."""

C = TypeVar("C", bound=Coder)


def tiled(coder: C, tile: int = TILE, overlap: int | None = None) -> C:
    """Returns `coder` with networks that work in tiles of at most `tile` x `tile` pixels.

    Where the networks are local (reach is not None) the result equals the whole image's, up to rounding. Others, which
    normalise or attend over the whole image or know their place in it, see each tile alone: their tiles are blended
    linearly over `overlap` pixels (by default a quarter of `tile`), and `seam` measures what that changes.
    `exact(coder)` tells the two cases apart. The class stays, weights are shared, and `save` writes the files of
    `coder`.

    Raises `RacError` unless both are multiples of the factor, and the overlap at most half of the tile.
    """
    check_tile(coder, tile, overlap)
    factor = coder.spec.factor
    blocks = tile // factor
    margin = blocks // 8 if overlap is None else overlap // (2 * factor)

    def in_pieces(network: Network) -> nn.Module:
        block_in, block_out = _blocks(network, factor)
        seen = reach(network.module, partial(_call, network), network.shapes(factor, factor)[0][1], block_in)
        tiling = Tiling(blocks, margin, exact=False) if seen is None else Tiling(blocks, seen, exact=True)
        way = partial(in_tiles, tiling=tiling, block_in=block_in, block_out=block_out)
        return Pieces(network.module, way, exact=tiling.exact)

    return coder.with_networks(in_pieces)


def check_tile(coder: Coder, tile: int, overlap: int | None = None) -> None:
    """Raises `RacError` unless tiles of these sizes in pixels, as for `tiled`, suit the factor of `coder`."""
    factor = coder.spec.factor
    for name, pixels in (("tile", tile), ("overlap", overlap or 0)):
        if pixels < 0 or pixels % factor or (name == "tile" and not pixels):
            raise RacError(
                f"{name} {pixels} must be a positive multiple of the coder's factor {factor}, such as {32 * factor}"
            )


def sliced(coder: C) -> C:
    """Returns `coder` with networks that see one image of the batch at a time: the same results, less memory."""
    return coder.with_networks(lambda network: Pieces(network.module, in_slices))


def exact(coder: Coder) -> bool:
    """Returns whether a coder made by `tiled` gives the results of the whole image, up to rounding."""
    return all(part.exact for part in coder.modules() if isinstance(part, Pieces))


class Seam(NamedTuple):
    """Difference between decoding in tiles and decoding whole, in units of the image's [-1, 1]."""

    largest: float
    mean: float


@torch.no_grad()
def seam(
    coder: Coder,
    latent: Tensor,
    tile: int = TILE,
    overlap: int | None = None,
    steps: int | TimeGrid | None = None,
    solver: Solver | None = None,
) -> Seam:
    """Decodes `latent` whole and in tiles, and returns the largest and the mean absolute difference.

    - `coder`, `latent`: the coder, and latents B c h w.
    - `tile`, `overlap`: side and overlap of the tiles in pixels, as for `tiled`.
    - `steps`, `solver`: as for `Coder.decode`.

    Raises `RacError` as `tiled`.
    """
    pieces = tiled(coder, tile, overlap).decode(latent, steps, solver)
    difference = (pieces - coder.decode(latent, steps, solver)).abs()
    return Seam(float(difference.max()), float(difference.mean()))


def _call(network: Network, module: nn.Module, x: Tensor) -> Tensor:
    """Returns the network's function of its first argument; further ones, such as the time, are 1/2."""
    _, *others = network.shapes(1, 1)
    return module(x, *(x.new_full((len(x), *shape[1:]), 0.5) for shape in others))


def _blocks(network: Network, factor: int) -> tuple[int, int]:
    """Returns the pixels on the side of a block of f x f image pixels, in the network's input and in its output."""
    side = 16  # blocks, for networks that shrink what they are given
    abstract = copy.deepcopy(network.module).to("meta", torch.float32).eval()
    given = [torch.empty(shape, device="meta") for shape in network.shapes(side * factor, side * factor)]
    with torch.no_grad():
        return given[0].shape[-1] // side, abstract(*given).shape[-1] // side
