"""Sets of images: features kept on disk, files of moments, labels, names."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from rac import RacError, write_image
from rac.evaluate import FeatureMoments, ImageSet, Preprocessing, Protocol, evaluate
from rac.evaluate.set_metrics import Gaussian, frechet
from rac.evaluate.suite import MetricSuite
from rac.representations import Features

COLOURS = Protocol("colours", Preprocessing(), metrics=("psnr", "frechet"), extractor="inception-768")


class Colours(torch.nn.Module):
    """An extractor that counts the images it sees; its features are the means of channels and of their squares."""

    width, label, spatial_width, has_logits = 6, "colours", None, False

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path, self.seen = path, 0

    def forward(self, image: Tensor) -> Features:
        self.seen += len(image)
        return Features(torch.cat([image.mean(dim=(2, 3)), image.square().mean(dim=(2, 3))], dim=1))


@pytest.fixture
def weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file of weights for the extractor, and a cache of its own for the test."""
    monkeypatch.setenv("RAC_CACHE_DIR", str(tmp_path / "cache"))
    (tmp_path / "weights").write_bytes(b"first")
    return tmp_path / "weights"


# ------------------------------------------------------------------------------------------- features on disk


def test_features_are_found_again_in_any_order(weights: Path, images) -> None:
    image, first = images(9, 16, 16), Colours(weights)
    features = ImageSet.of(image, "one").features(first, batch=4)
    again = Colours(weights)
    turned = ImageSet.of(image.flip(0), "other").features(again)
    assert (first.seen, again.seen) == (9, 0)
    assert torch.equal(turned.pooled, features.pooled.flip(0))


def test_other_weights_or_images_are_looked_at_anew(weights: Path, images) -> None:
    image = images(9, 16, 16)
    ImageSet.of(image, "one").features(Colours(weights))
    fewer = Colours(weights)
    ImageSet.of(image[:8], "fewer").features(fewer)
    assert fewer.seen == 8
    weights.write_bytes(b"second")
    other = Colours(weights)
    ImageSet.of(image, "one").features(other)
    assert other.seen == 9


def test_a_damaged_file_is_made_again(weights: Path, images, tmp_path: Path) -> None:
    image = images(9, 16, 16)
    ImageSet.of(image, "one").features(Colours(weights))
    (kept,) = (tmp_path / "cache" / "features").iterdir()
    kept.write_bytes(kept.read_bytes()[:-7])
    once, twice = Colours(weights), Colours(weights)
    ImageSet.of(image, "one").features(once)
    ImageSet.of(image, "one").features(twice)
    assert (once.seen, twice.seen) == (9, 0)
    assert [file.suffix for file in (tmp_path / "cache" / "features").iterdir()] == [".safetensors"]


def test_reconstructions_are_kept_too(weights: Path, make_rac, images) -> None:
    coder, waves = make_rac(lively=0.05).eval(), ImageSet.of(images(9, 24, 24), "waves")
    results, seen = [], []
    for steps in (1, 1, 2):
        extractor = Colours(weights)
        suite = MetricSuite(COLOURS.metrics, extractor=extractor)
        results.append(evaluate(coder, waves, replace(COLOURS, steps=steps), suite=suite, batch=4).metrics)
        seen.append(extractor.seen)
        waves = ImageSet.of(images(9, 24, 24), "waves")
    assert seen == [18, 0, 9]
    assert results[0] == results[1] != results[2]


def test_old_features_make_room(weights: Path, images, tmp_path: Path, monkeypatch) -> None:
    folder = tmp_path / "cache" / "features"
    for seed in range(3):
        ImageSet.of(images(9, 16, 16, seed), "one").features(Colours(weights))
    old = set(folder.iterdir())
    assert len(old) == 3
    for file in old:
        os.utime(file, (1_000, 1_000))
    monkeypatch.setattr("rac.evaluate.feature_cache.LIMIT_GB", 0)
    ImageSet.of(images(9, 16, 16, 9), "one").features(Colours(weights))
    assert len(list(folder.iterdir())) == 1
    assert not old & set(folder.iterdir())


@pytest.mark.parametrize("cache", ["/dev/null/cache", "/proc/cache"])
def test_no_right_to_write_is_no_matter(weights: Path, images, monkeypatch, cache: str) -> None:
    monkeypatch.setenv("RAC_CACHE_DIR", cache)
    extractor = Colours(weights)
    assert ImageSet.of(images(9, 16, 16), "one").features(extractor).pooled.shape == (9, 6)
    assert extractor.seen == 9


def test_no_home_is_no_matter() -> None:
    script = (
        "import os, pwd\n"
        "def nobody(uid): raise KeyError(uid)\n"
        "pwd.getpwuid = nobody\n"
        "from rac.files import cache_folder\n"
        "print(cache_folder('features'))\n"
    )
    names = ("HOME", "RAC_CACHE_DIR", "XDG_CACHE_HOME")
    environment = {name: value for name, value in os.environ.items() if name not in names}
    ran = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "None"


# ------------------------------------------------------------------------------------------- moments


def test_gaussians_of_moments() -> None:
    normal = Gaussian.from_moments(torch.zeros(2), torch.eye(2))
    other = Gaussian.from_moments(torch.tensor([1.0, 0.0]), 4 * torch.eye(2))
    # |m|^2 + tr(I + 4 I - 2 * 2 I)
    assert frechet(normal, other) == pytest.approx(3, abs=1e-12)
    assert frechet(other, other) == 0


def test_moments_of_features_are_the_features() -> None:
    generator = torch.Generator().manual_seed(0)
    mix = torch.randn(12, 12, generator=generator, dtype=torch.float64)
    one, two = (torch.randn(n, 12, generator=generator, dtype=torch.float64) @ mix for n in (60, 40))
    from_moments = Gaussian.from_moments(one.mean(0), torch.cov(one.T))
    expected = frechet(Gaussian.of(one), Gaussian.of(two))
    assert frechet(from_moments, Gaussian.of(two)) == pytest.approx(expected, rel=1e-9)
    assert frechet(from_moments, Gaussian.of(one)) == pytest.approx(0, abs=1e-9)


def test_singular_covariances_have_distances() -> None:
    few = torch.randn(5, 20, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    singular = Gaussian.from_moments(few.mean(0), torch.cov(few.T).float())
    assert frechet(singular, singular) == pytest.approx(0, abs=1e-6)
    point = Gaussian.from_moments(torch.zeros(20), torch.zeros(20, 20))
    expected = float(few.mean(0).square().sum() + torch.cov(few.T).trace())
    assert frechet(singular, point) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(
    ("words", "mean", "covariance"),
    [
        ("mean D and a covariance", torch.zeros(3), torch.eye(2)),
        ("NaN", torch.zeros(2), torch.full((2, 2), torch.nan)),
        ("not symmetric", torch.zeros(2), torch.tensor([[1.0, 0.5], [0.0, 1.0]])),
        ("negative variance", torch.zeros(2), torch.tensor([[1.0, 2.0], [2.0, 1.0]])),
    ],
)
def test_bad_moments_are_refused(words: str, mean: Tensor, covariance: Tensor) -> None:
    with pytest.raises(RacError, match=words):
        Gaussian.from_moments(mean, covariance)


def moments_file(path: Path, features: Tensor) -> Path:
    np.savez(path, mu=features.mean(0).numpy(), sigma=torch.cov(features.double().T).numpy())
    return path


def test_a_file_of_moments_stands_for_its_images(tmp_path: Path, weights: Path, make_rac, images) -> None:
    coder, waves = make_rac(lively=0.05).eval(), ImageSet.of(images(9, 24, 24), "waves")
    others = ImageSet.of(images(12, 24, 24, 7), "others")
    suite = MetricSuite(COLOURS.metrics, extractor=Colours(weights))
    moments = FeatureMoments.read(moments_file(tmp_path / "m.npz", others.features(suite.extractor).pooled))
    of_file, of_images, own = (
        evaluate(coder, waves, COLOURS, suite=suite, reference=reference) for reference in (moments, others, None)
    )
    assert of_file.metrics["rFID-colours"] == pytest.approx(of_images.metrics["rFID-colours"], rel=1e-5)
    assert of_images.metrics["rFID-colours"] != pytest.approx(own.metrics["rFID-colours"], rel=0.01)
    assert (of_file.compared_with.name, of_file.compared_with.count) == ("m.npz", None)
    assert of_images.compared_with == others.record
    assert of_file.reference == waves.record
    of_file.save(tmp_path / "result.json")
    assert type(of_file).load(tmp_path / "result.json") == of_file


def test_what_needs_more_than_moments_is_refused_before_work(tmp_path, weights, make_rac, images) -> None:
    waves = ImageSet.of(images(9, 24, 24), "waves")
    moments = FeatureMoments.read(moments_file(tmp_path / "m.npz", torch.randn(20, 6)))
    narrow = FeatureMoments.read(moments_file(tmp_path / "n.npz", torch.randn(20, 5)))
    extractor = Colours(weights)
    for metric, reference, words in (
        ("kernel", moments, "kernel compares the features of images, and m.npz holds only moments"),
        ("precision-recall", moments, "only moments"),
        ("frechet", narrow, "moments of 5 features, the extractor has 6"),
    ):
        protocol = Protocol("p", Preprocessing(), metrics=("psnr", metric), extractor="inception-768")
        suite = MetricSuite(protocol.metrics, extractor=extractor)
        with pytest.raises(RacError, match=words):
            evaluate(make_rac().eval(), waves, protocol, suite=suite, reference=reference)
    assert extractor.seen == 0


def test_files_that_are_no_moments(tmp_path: Path) -> None:
    (tmp_path / "text.npz").write_text("hello")
    np.savez(tmp_path / "other.npz", images=np.zeros(3))
    np.savez(tmp_path / "pickled.npz", mu=np.array([object()]), sigma=np.eye(1))
    for name, words in (
        ("missing", "cannot be read as a file of moments"),
        ("text", "cannot be read"),
        ("other", "holds images; expected mu and sigma"),
        ("pickled", "cannot be read"),
    ):
        with pytest.raises(RacError, match=words):
            FeatureMoments.read(tmp_path / f"{name}.npz")


# ------------------------------------------------------------------------------------------- labels and names


def test_labels_are_folders_and_stay_with_their_images(tmp_path: Path, images) -> None:
    for index in range(6):
        folder = tmp_path / "set" / ("cats" if index % 2 else "dogs")
        folder.mkdir(parents=True, exist_ok=True)
        write_image(images(1, 24, 24, index), folder / f"{index}.png")
    found = ImageSet.read([tmp_path / "set"], Preprocessing(24, "centre"))
    assert found.labels is not None
    for part in found.batches(4):
        assert part.labels == tuple(name.split("/")[0] for name in part.names)
    assert ImageSet.of(images(2, 8, 8), "two").labels is None
    assert ImageSet.of(images(2, 8, 8), "two", ["a", None]).labels == ("a", None)
    with pytest.raises(RacError, match="2 images and 1 labels"):
        ImageSet.of(images(2, 8, 8), "two", ["a"])


def test_the_working_directory_has_a_name(tmp_path: Path, images, monkeypatch) -> None:
    (tmp_path / "holiday").mkdir()
    for index in range(2):
        write_image(images(1, 24, 24, index), tmp_path / "holiday" / f"{index}.png")
    monkeypatch.chdir(tmp_path / "holiday")
    assert ImageSet.read([Path(".")], Preprocessing()).name == "holiday"
