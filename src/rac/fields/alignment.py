"""The alignment head of REPA (arXiv 2410.06940), from the tokens of a generator to those of a representation."""

from __future__ import annotations

from torch import nn


class AlignmentHead(nn.Sequential):
    """Three linear layers with SiLU between them: tokens B N `width` to B N `out`.

    - `width`: channels of the generator's tokens.
    - `out`: channels of the representation.
    - `hidden`: channels in between.
    """

    def __init__(self, width: int, out: int, hidden: int = 2048) -> None:
        layers = nn.Linear(width, hidden), nn.Linear(hidden, hidden), nn.Linear(hidden, out)
        super().__init__(layers[0], nn.SiLU(), layers[1], nn.SiLU(), layers[2])
        for layer in layers:
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)
