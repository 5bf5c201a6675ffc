"""PSNR and SSIM against scikit-image, and their edges."""

from __future__ import annotations

import math

import pytest
import torch

from rac import RacError
from rac.evaluate.image_metrics import psnr, ssim


def pair(height: int = 24, width: int = 33, batch: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    reference = torch.rand(batch, 3, height, width, generator=generator) * 2 - 1
    noise = torch.randn(batch, 3, height, width, generator=generator)
    return (reference + 0.1 * noise).clamp(-1, 1), reference


def test_against_scikit_image() -> None:
    metrics = pytest.importorskip("skimage.metrics", reason="scikit-image is not installed")
    image, reference = pair()
    for k in range(len(image)):
        ours, theirs = image[k].double().numpy(), reference[k].double().numpy()
        expected = metrics.peak_signal_noise_ratio(theirs, ours, data_range=2)
        assert float(psnr(image, reference)[k]) == pytest.approx(expected, abs=1e-4)
        options = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False}
        # From black = 0 up, as anyone with pixels would compute it.
        expected = metrics.structural_similarity(theirs + 1, ours + 1, data_range=2, channel_axis=0, **options)
        assert float(ssim(image, reference)[k]) == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("metric", [psnr, ssim])
def test_one_value_per_image_whatever_the_batch(metric) -> None:  # type: ignore[no-untyped-def]
    image, reference = pair()
    together = metric(image, reference)
    assert together.shape == (3,)
    for k in range(3):
        alone = metric(image[k : k + 1], reference[k : k + 1])
        assert alone.shape == (1,)
        assert torch.allclose(alone[0], together[k], atol=1e-6)


def test_known_value() -> None:
    black = torch.full((1, 3, 4, 4), -1.0)
    assert float(psnr(black, black + 0.2)) == pytest.approx(20)
    assert float(psnr(black, -black)) == pytest.approx(0, abs=1e-6)


def test_equal_images() -> None:
    image, _ = pair(batch=1)
    assert math.isinf(psnr(image, image))
    assert float(ssim(image, image)) == pytest.approx(1)


def test_images_are_clamped() -> None:
    white = torch.ones(1, 3, 12, 12)
    assert math.isinf(psnr(white + 5, white))
    assert float(ssim(white + 5, white)) == pytest.approx(1)


def test_small_images_have_no_ssim() -> None:
    image, reference = pair(10, 30)
    assert ssim(image, reference).isnan().all()
    assert not ssim(*pair(11, 30)).isnan().any()


def test_shapes_must_agree() -> None:
    image, reference = pair()
    for metric in (psnr, ssim):
        with pytest.raises(RacError, match="one shape"):
            metric(image[..., 1:], reference)
