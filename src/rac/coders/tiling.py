"""Large images and large batches in bounded memory: any coder, worked off in tiles or image by image.

Of a RAC the field is tiled, evaluation by evaluation, and not the whole way from latent to image: the margin is then
what one evaluation looks at, whatever the number of steps and the solver, implicit ones included. What stays whole are
the states, a few of them at a time.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..errors import RacError
from ..fields.tiling import Function, Pieces, Tiling, in_slices, in_tiles, reach
from ..flow import Solver, TimeGrid, Trajectory
from ..images import pad_to_multiple
from .adapter import Adapter
from .protocol import Coder
from .rac import RAC

TILE = 1024
"""Pixels on a tile's side where none are asked for."""

Way = Callable[[Function], Function]


def tiled(coder: Coder, tile: int = TILE, overlap: int | None = None) -> Coder:
    """`coder`, worked off in tiles of at most `tile` x `tile` pixels.

    Where the networks are local (reach is not None) the result is the whole image's, up to rounding. Others, which
    normalise or attend over the whole image or know their place in it, see each tile alone: their tiles are blended
    linearly over `overlap` pixels (a quarter of `tile` where none are given), and `seam` says what that changes.
    `exact(coder)` tells which. A RAC stays a RAC, with the whole of its trajectory.

    Raises `RacError` unless both are multiples of the factor, and the overlap at most half of the tile.
    """
    factor = coder.spec.factor
    for name, pixels in (("tile", tile), ("overlap", overlap or 0)):
        if pixels < 0 or pixels % factor or (name == "tile" and not pixels):
            raise RacError(f"{name} {pixels} must be a positive multiple of the coder's factor {factor}")
    blocks = tile // factor
    margin = blocks // 8 if overlap is None else overlap // (2 * factor)

    def tiling(blocks_seen: int | None) -> Tiling:
        return Tiling(blocks, margin, exact=False) if blocks_seen is None else Tiling(blocks, blocks_seen, exact=True)

    if isinstance(coder, RAC):
        seen = reach(coder.field, _at_half_time, coder.config.state_channels, factor)
        field = Pieces(coder.field, partial(in_tiles, tiling=tiling(seen), block_in=factor, block_out=factor))
        projector = coder.projector
        if projector is not None:
            near = tiling(reach(projector, nn.Module.__call__, coder.config.state_channels, factor))
            projector = Pieces(projector, partial(in_tiles, tiling=near, block_in=factor, block_out=1))
        return RACInPieces(coder, field, projector)
    encoding, decoding = _reach_of(coder)
    return CoderInPieces(
        coder,
        partial(in_tiles, tiling=tiling(encoding), block_in=factor, block_out=1),
        partial(in_tiles, tiling=tiling(decoding), block_in=1, block_out=factor),
    )


def sliced(coder: Coder) -> Coder:
    """`coder`, whose networks see one image of the batch at a time: the same results, less memory."""
    if isinstance(coder, RAC):
        projector = None if coder.projector is None else Pieces(coder.projector, in_slices)
        return RACInPieces(coder, Pieces(coder.field, in_slices), projector)
    return CoderInPieces(coder, in_slices, in_slices)


def exact(coder: Coder) -> bool:
    """Whether a coder that `tiled` gave makes what the whole image makes, up to rounding."""
    if isinstance(coder, RACInPieces):
        ways = [part.way for part in (coder.field, coder.projector) if isinstance(part, Pieces)]
        return all(map(_exact, ways)) and exact(coder.original)
    if isinstance(coder, CoderInPieces):
        return _exact(coder.encode_way) and _exact(coder.decode_way) and exact(coder.original)
    return True


class Seam(NamedTuple):
    """How far a decode in tiles is from the whole one, in units of the image's [-1, 1]."""

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
    """Decode `latent` whole and in tiles: the largest and the mean absolute difference. Raises as `tiled`."""
    pieces = tiled(coder, tile, overlap).decode(latent, steps, solver)
    difference = (pieces - coder.decode(latent, steps, solver)).abs()
    return Seam(float(difference.max()), float(difference.mean()))


class RACInPieces(RAC):
    """A RAC whose networks work on pieces; files, weights and all else are those of the original."""

    def __init__(self, coder: RAC, field: nn.Module, projector: nn.Module | None) -> None:
        Coder.__init__(self)
        self.original = coder
        self.config, self.spec, self.teacher, self.states = coder.config, coder.spec, coder.teacher, coder.states
        self.field, self.projector = field, projector
        self.train(coder.training)

    def save(self, directory: str | Path, dtype: torch.dtype | None = None) -> None:
        """Write the original. See `RAC.save`."""
        self.original.save(directory, dtype)


class CoderInPieces(Coder):
    """Any other coder, encoding and decoding pieces."""

    def __init__(self, coder: Coder, encode_way: Way, decode_way: Way) -> None:
        super().__init__()
        self.original = coder
        self.spec, self.teacher = coder.spec, coder.teacher
        self.encode_way, self.decode_way = encode_way, decode_way
        self.train(coder.training)

    def encode(self, image: Tensor, steps: int | TimeGrid | None = None, solver: Solver | None = None) -> Tensor:
        """See `Coder.encode`."""
        padded, _ = pad_to_multiple(image, self.spec.factor)
        return self.encode_way(partial(self.original.encode, steps=steps, solver=solver))(padded)

    def decode(self, latent: Tensor, steps: int | TimeGrid | None = None, solver: Solver | None = None) -> Tensor:
        """See `Coder.decode`."""
        self.spec.check(latent)
        return self.decode_way(partial(self.original.decode, steps=steps, solver=solver))(latent)

    def trajectory(
        self, latent: Tensor, steps: int | TimeGrid | None = None, solver: Solver | None = None
    ) -> Trajectory:
        """See `Coder.trajectory`."""
        return self.original.trajectory(latent, steps, solver)

    def save(self, directory: str | Path, dtype: torch.dtype | None = None) -> None:
        """Write the original. See `Coder.save`."""
        self.original.save(directory, dtype)


def _at_half_time(field: nn.Module, state: Tensor) -> Tensor:
    return field(state, state.new_full((len(state),), 0.5))


def _reach_of(coder: Coder) -> tuple[int | None, int | None]:
    """The reach of a coder's encoder and decoder, where it shows its networks."""
    if not isinstance(coder, Adapter):
        return None, None
    factor, channels = coder.spec.factor, coder.spec.channels
    return (
        reach(coder, lambda asked, pixels: asked._encode(pixels), 3, factor),
        reach(coder, lambda asked, raw_latent: asked._decode(raw_latent), channels, 1),
    )


def _exact(way: Way) -> bool:
    return not isinstance(way, partial) or way.keywords["tiling"].exact
