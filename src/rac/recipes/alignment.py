"""Alignment of a generator with a representation of the images, as REPA trains it (arXiv 2410.06940)."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from ..data import Batch
from ..errors import RacError
from ..fields.alignment import AlignmentHead
from ..fields.sit import Tapped
from ..generators.flow import FlowGenerator
from ..objectives.alignment import alignment, on_grid
from ..representations import Targets, load_representation


@dataclass(frozen=True)
class AlignmentConfig:
    """Settings of the alignment. Unused without a representation.

    Raises `RacError` for values out of their range.
    """

    representation: str | None = None
    """The representation: efficientnet-lite0, dinov2-s, dinov2-b, dinov2-l, siglip2-b, mae-b, or the directory or hub
    name of such a model. None: no alignment."""
    depth: int = 4
    """Block of the generator whose tokens are aligned, counted from 1: 4 for sizes S and B, 8 for L and XL."""
    weight: float = 0.5
    """Weight of the term `alignment`, beside the 1 of `velocity`."""
    width: int = 2048
    """Channels within the alignment head."""
    grid: int = 16
    """Rows and columns of tokens that the representation computes at least, whatever the size of the image."""

    def __post_init__(self) -> None:
        for name in ("depth", "width", "grid"):
            if getattr(self, name) < 1:
                raise RacError(f"{name} {getattr(self, name)} of the alignment must be at least 1")
        if not 0 < self.weight < math.inf:
            raise RacError(
                f"weight {self.weight} of the alignment must be above 0, and finite; to train without, leave out its "
                "representation"
            )

    def targets(self, token: int, blocks: int) -> Targets | None:
        """Returns the targets for tokens of `token` pixels, or None without a representation.

        Raises `RacError` if a generator of so many blocks has not the one that is aligned, and as
        `load_representation`.
        """
        if self.representation is None:
            return None
        if self.depth > blocks:
            raise RacError(f"depth {self.depth} of the alignment is beyond the {blocks} blocks of the field; lower it")
        return Targets(load_representation(self.representation), self.representation, token, self.grid)

    def tiny(self) -> AlignmentConfig:
        """Returns the same settings for a generator of one block or more."""
        return replace(self, depth=1, width=min(self.width, 32), grid=min(self.grid, 4))


class Aligned(nn.Module):
    """A generator in training with its alignment head: one module, with one optimiser, one clip and one average."""

    def __init__(self, generator: FlowGenerator, config: AlignmentConfig, channels: int) -> None:
        super().__init__()
        self.generator = generator
        self.head = AlignmentHead(generator.config.field.width, channels, config.width)
        self.depth = config.depth

    def forward(self, state: Tensor, time: Tensor, labels: Tensor | None) -> Tapped:
        """Returns the velocity B c h w and, from the same evaluation, the aligned tokens B N D, through the head."""
        velocity, tokens = self.generator.field.tapped(state, time, condition=labels, after=self.depth)
        return Tapped(velocity, self.head(tokens))

    def tokens(self, state: Tensor, time: Tensor, labels: Tensor | None) -> Tensor:
        """Returns the aligned tokens of `forward` alone, without computing what comes after them."""
        return self.head(self.generator.field.tokens(state, time, condition=labels, after=self.depth))

    def error(self, projected: Tensor, features: Tensor, latents: Tensor) -> Tensor:
        """Returns the term `alignment`, minus the mean cosine of tokens and features, a scalar.

        - `projected`: the aligned tokens, B N D.
        - `features`: the features of the images, B D h w.
        - `latents`: the latents, or anything of their shape B c h w; the tokens are those of its patches.
        """
        patch = self.generator.config.field.patch
        height, width = latents.shape[-2:]
        return alignment(projected, on_grid(features, height // patch, width // patch))


@torch.no_grad()
def with_features(batch: Batch, targets: Targets | None) -> Batch:
    """Returns the batch with features, those that it came with or else those that `targets`, if any, gives."""
    if targets is None or batch.features is not None:
        return batch
    return batch._replace(features=targets(batch.need("images")))
