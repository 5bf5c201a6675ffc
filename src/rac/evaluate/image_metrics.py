"""Metrics of one image and its reference: PSNR, SSIM and MS-SSIM, one value per image.

All compare images in [-1, 1], clamped but not rounded to 8 bits: numbers do not depend on a file format, and lie
within a few hundredths of a dB of those of the written files up to about 40 dB.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d

from ..errors import RacError
from ..tensors import check_pair

DATA_RANGE = 2.0
"""Width of the range [-1, 1] of images."""

SSIM_WINDOW = 11
"""Side of SSIM's Gaussian window (sigma 1.5); smaller images have no SSIM."""

MS_SSIM_WEIGHTS = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)
"""Exponents of MS-SSIM, from the finest scale to the coarsest, which is a sixteenth of the size."""

MS_SSIM_SIDE = 176
"""Least side for MS-SSIM, whose window has to fit at a sixteenth of the size."""


def psnr(image: Tensor, reference: Tensor) -> Tensor:
    """Returns the peak signal to noise ratio in dB of B 3 H W images in [-1, 1], B; infinite where they are equal.

    The squared error is averaged over an image's pixels and channels. Raises `RacError` if the shapes differ.
    """
    image, reference = _comparable(image, reference)
    error = (image - reference).square().flatten(1).mean(dim=1)
    return 10 * torch.log10(DATA_RANGE**2 / error)


def ssim(image: Tensor, reference: Tensor) -> Tensor:
    """Returns the structural similarity of B 3 H W images in [-1, 1], B, at most 1; NaN for sides below 11 pixels.

    Wang et al. 2004: Gaussian window of 11 x 11 with sigma 1.5, K = (0.01, 0.03), averaged over channels; windows that
    leave the image do not count, as in scikit-image. Raises `RacError` if the shapes differ.
    """
    from torchmetrics.functional.image import structural_similarity_index_measure

    image, reference = _comparable(image, reference)
    if min(image.shape[-2:]) < SSIM_WINDOW:
        return image.new_full((image.shape[0],), torch.nan)
    # From black = 0 up: the term that compares luminances knows where black is.
    image, reference = image + 1, reference + 1
    _, similarity = structural_similarity_index_measure(image, reference, data_range=DATA_RANGE, return_full_image=True)
    # torchmetrics reflects at the borders and, from one version to another, counts these windows or not.
    border = SSIM_WINDOW // 2
    return similarity[..., border:-border, border:-border].mean(dim=(1, 2, 3))


def ms_ssim(image: Tensor, reference: Tensor) -> Tensor:
    """Returns the structural similarity at five scales of B 3 H W images in [-1, 1], B; NaN for sides below 176 pixels.

    Wang, Simoncelli and Bovik 2003, with its weights: contrast at each scale, luminance at the last; negative ones
    count as 0. Windows that leave the image do not count (in torchmetrics' own they do, at the last scale). Raises
    `RacError` if the shapes differ.
    """
    from torchmetrics.functional.image import structural_similarity_index_measure

    image, reference = _comparable(image, reference)
    found = image.new_ones(image.shape[0])
    if min(image.shape[-2:]) < MS_SSIM_SIDE:
        return found * torch.nan
    for weight in MS_SSIM_WEIGHTS[:-1]:
        _, contrast = structural_similarity_index_measure(
            image, reference, data_range=DATA_RANGE, return_contrast_sensitivity=True
        )
        found = found * contrast.clamp_min(0) ** weight
        image, reference = avg_pool2d(image, 2), avg_pool2d(reference, 2)
    return found * ssim(image, reference).clamp_min(0) ** MS_SSIM_WEIGHTS[-1]


def _comparable(image: Tensor, reference: Tensor) -> tuple[Tensor, Tensor]:
    check_pair(image, reference)
    if image.shape != reference.shape or image.ndim != 4:
        raise RacError(
            f"compare images of one shape B 3 H W, not {tuple(image.shape)} and {tuple(reference.shape)}; "
            "crop or read them at one size"
        )
    return image.detach().float().clamp(-1, 1), reference.detach().float().clamp(-1, 1)
