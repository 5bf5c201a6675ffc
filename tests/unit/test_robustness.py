"""The correction curve: equal noise for all, no noise at sigma 0, and nothing hangs on batches."""

from __future__ import annotations

import pytest
import torch

from rac.coders.klvae import KLVAEConfig
from rac.evaluate.image_metrics import psnr
from rac.evaluate.image_sets import ImageSet
from rac.evaluate.robustness import noised_latents, robustness_curve
from rac.evaluate.suite import MetricSuite


@pytest.fixture(scope="module")
def teacher():  # type: ignore[no-untyped-def]
    torch.manual_seed(0)
    return KLVAEConfig(widths=(8, 8, 8), latent_channels=4, norm_groups=4).build().eval().requires_grad_(False)


@pytest.fixture(scope="module")
def references(images) -> ImageSet:  # type: ignore[no-untyped-def]
    return ImageSet.of(images(5, 16, 24), "waves")


def curve(teacher, references, **options):  # type: ignore[no-untyped-def]
    settings = {"name": "teacher", "images": 5, "sigmas": (0.0, 0.5, 2.0), **options}

    def decode(latent, names):
        return teacher.decode(latent)

    decoders = {"teacher": decode, "twin": decode, "grey": lambda latent, names: 0 * decode(latent, names)}
    return robustness_curve(decoders, teacher, references, MetricSuite.load(("psnr",)), **settings)


def test_equal_decoders_get_equal_latents(teacher, references) -> None:  # type: ignore[no-untyped-def]
    rows = curve(teacher, references).metrics["psnr"]
    assert rows["teacher"] == rows["twin"]
    assert rows["grey"][0] == pytest.approx(rows["grey"][2], abs=1e-9)
    assert len(set(rows["teacher"])) == 3


def test_no_noise_is_the_plain_reconstruction(teacher, references) -> None:  # type: ignore[no-untyped-def]
    image = next(references.batches(5)).images
    plain = float(psnr(teacher.reconstruct(image), image).mean())
    assert curve(teacher, references).metrics["psnr"]["teacher"][0] == pytest.approx(plain, abs=1e-5)


def test_batches_and_seed(teacher, references) -> None:  # type: ignore[no-untyped-def]
    one, other = (curve(teacher, references, batch=size).metrics["psnr"]["teacher"] for size in (1, 4))
    assert one == pytest.approx(other, abs=1e-4)
    reseeded = curve(teacher, references, rng_seed=1).metrics["psnr"]["teacher"]
    assert reseeded[0] == pytest.approx(one[0], abs=1e-4)
    assert abs(reseeded[2] - one[2]) > 1e-4


def test_images_are_limited_and_progress_told(teacher, references) -> None:  # type: ignore[no-untyped-def]
    told: list[tuple[int, int]] = []
    found = curve(teacher, references, images=3, batch=2, progress=lambda done, of: told.append((done, of)))
    assert found.images == 3
    assert told == [(2, 3), (3, 3)]


def test_noise_has_the_size_it_says(teacher, images) -> None:  # type: ignore[no-untyped-def]
    references = ImageSet.of(images(8, 32, 32), "waves")
    plain, moved = noised_latents(teacher, next(references.batches(8)), (0.0, 0.7))
    assert float((moved - plain).std()) == pytest.approx(0.7, rel=0.05)
