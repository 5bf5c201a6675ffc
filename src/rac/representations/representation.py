"""The base class of representations: frozen networks that describe every place of an image."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import RacError

if TYPE_CHECKING:
    from typing_extensions import Self

PIXELS = 16
"""Pixels of an image's side that a token stands for, unless another grid is asked for."""

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
"""Mean and deviation of ImageNet's pixels in [0, 1], by which many networks were trained."""


class Representation(nn.Module, ABC):
    """A frozen network that maps images to a grid of tokens, one for each patch of the image that it sees.

    - `channels`: number of channels of a token.
    - `patch`: side, in pixels, of the patch that a token stands for.
    - `statistics`: mean and deviation, of each channel, by which pixels in [0, 1] are normalised.

    It is always in evaluation mode, also within a module that trains; its parameters are frozen.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self, channels: int, patch: int, statistics: tuple[tuple[float, ...], tuple[float, ...]] = IMAGENET
    ) -> None:
        super().__init__()
        self.channels = channels
        self.patch = patch
        for name, values in zip(("mean", "std"), statistics, strict=True):
            self.register_buffer(name, torch.tensor(values).view(1, 3, 1, 1), persistent=False)

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """Returns the rows and columns of tokens of an image of this size: one for every 16 pixels, and at least one.

        For networks with patches of 14 this makes the image smaller first, 224 of 256 pixels, as REPA and RAE do.
        """
        return max(1, (height + PIXELS // 2) // PIXELS), max(1, (width + PIXELS // 2) // PIXELS)

    def forward(self, image: Tensor, grid: tuple[int, int] | None = None) -> Tensor:
        """Returns the tokens B C h w of images B 3 H W in [-1, 1].

        - `image`: the images, of any size; they are resized bicubically, without antialiasing, to h x w patches.
        - `grid`: the number of rows and columns, h and w; None: those of `grid`.

        Gradients flow to the images. Raises `RacError` for another shape, and for a grid without tokens.
        """
        if image.ndim != 4 or image.shape[1] != 3:
            raise RacError(f"a representation is made of images B 3 H W, not {tuple(image.shape)}")
        rows, columns = self.grid(image.shape[2], image.shape[3]) if grid is None else grid
        if rows < 1 or columns < 1:
            raise RacError(f"a grid of {rows} x {columns} tokens has none; give at least 1 x 1")
        pixels, size = (image + 1) / 2, (rows * self.patch, columns * self.patch)
        if pixels.shape[-2:] != size:
            pixels = F.interpolate(pixels, size, mode="bicubic", align_corners=False)
        return self._tokens((pixels - self.mean) / self.std, rows, columns)

    @abstractmethod
    def _tokens(self, pixels: Tensor, rows: int, columns: int) -> Tensor:
        """Returns the tokens B C `rows` `columns` of normalised pixels of just as many patches."""

    def train(self, mode: bool = True) -> Self:
        """Leaves the network in evaluation mode."""
        return super().train(False)
