"""The features that the tokens of a generator are aligned with (REPA, arXiv 2410.06940)."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import RacError
from ..storage import weights_hash
from .representation import Representation


class Targets(nn.Module):
    """The features of a representation on the grid of a generator's tokens.

    - `representation`: the representation.
    - `name`: its name, for messages and the record of what was prepared.
    - `token`: side, in pixels of the image, of the square that a token of the generator stands for.
    - `grid`: rows and columns of tokens that the representation computes at least: networks recognise little in an
      image of few patches, so small images are made larger for them. 16 is the grid of REPA at 256 pixels.

    Raises `RacError` for numbers below 1.
    """

    def __init__(self, representation: Representation, name: str, token: int = 16, grid: int = 16) -> None:
        super().__init__()
        for what, number in (("token", token), ("grid", grid)):
            if number < 1:
                raise RacError(f"{what} {number} of the features must be at least 1")
        self.representation = representation
        self.name = name
        self.token = token
        self.grid = grid

    @property
    def channels(self) -> int:
        """Number of channels of a feature."""
        return self.representation.channels

    def check(self, size: int) -> None:
        """Raises `RacError` unless images of `size` x `size` are whole tokens."""
        if size % self.token:
            raise RacError(f"size {size} must be a multiple of {self.token}, the side of a token in pixels")

    def identity(self) -> dict[str, Any]:
        """Returns the JSON that distinguishes these features from others."""
        weights = weights_hash(self.representation.state_dict())
        return {"name": self.name, "weights": weights, "token": self.token, "grid": self.grid}

    def forward(self, image: Tensor) -> Tensor:
        """Returns the features B C h w of images B 3 H W in [-1, 1], with h = H / token, in float32.

        They are resampled bilinearly from the grid of the representation. Raises `RacError` for sides that are not
        whole tokens.
        """
        height, width = image.shape[-2:]
        for side in (height, width):
            self.check(side)
        rows, columns = (max(self.grid, own) for own in self.representation.grid(height, width))
        found = self.representation(image, (rows, columns)).float()
        wanted = (height // self.token, width // self.token)
        if wanted == (rows, columns):
            return found
        return F.interpolate(found, wanted, mode="bilinear", align_corners=False)
