"""Alignment of a generator's tokens with a representation of the image, pure (REPA, arXiv 2410.06940, equation 8)."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F


def alignment(projected: Tensor, target: Tensor) -> Tensor:
    """Returns minus the cosine of projected tokens and their targets, both B N D, averaged over tokens: a scalar.

    -1 is perfect. No gradient reaches `target`.
    """
    return -F.cosine_similarity(projected.float(), target.detach().float(), dim=-1).mean()


def on_grid(features: Tensor, height: int, width: int) -> Tensor:
    """Returns the features B D h w of an image as tokens B N D of a grid of height x width, row by row.

    They are resampled bilinearly where their own grid is another.
    """
    if features.shape[-2:] != (height, width):
        features = F.interpolate(features, (height, width), mode="bilinear", align_corners=False)
    return features.flatten(2).transpose(1, 2)
