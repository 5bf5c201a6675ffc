"""Generated images beside real ones: names, floors, latents, and what does not go together."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny import Colours

from rac import RacError
from rac.evaluate.generation import evaluate_generated, of_sets_alone
from rac.evaluate.image_sets import FeatureMoments, ImageSet, Preprocessing
from rac.evaluate.latent_metrics import latent_distance
from rac.evaluate.protocol import PROTOCOLS, Protocol
from rac.evaluate.set_metrics import Gaussian, frechet
from rac.evaluate.suite import MetricSuite

SETS = Protocol(
    "sets", Preprocessing(16, "centre"), metrics=("frechet", "kernel", "precision-recall"), extractor="inception-768"
)


@pytest.fixture
def suite(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> MetricSuite:
    monkeypatch.setenv("RAC_CACHE_DIR", str(tmp_path / "cache"))
    (tmp_path / "weights").write_bytes(b"weights")
    return MetricSuite(SETS.metrics, extractor=Colours(tmp_path / "weights"))


def test_metrics_have_their_floor_beside_them(images, suite: MetricSuite, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    real, made = ImageSet.of(images(40, 16, 16), "real"), ImageSet.of(images(12, 16, 16, 1) * 0.5, "made")
    told: list[tuple[int, int]] = []
    progress = lambda done, total: told.append((done, total))  # noqa: E731
    result = evaluate_generated(made, real, SETS, suite, made_by={"evaluations": 50}, progress=progress)
    names = ["gFID-colours", "KID-colours", "precision-colours", "recall-colours"]
    assert list(result.metrics) == list(result.floor) == names
    assert result.floor_count == 12
    assert result.metrics["gFID-colours"] > result.floor["gFID-colours"]
    assert told[-1] == (52, 52)
    # Generated images are real ones here, and no further away than other real ones.
    same = evaluate_generated(real, real, SETS, suite)
    assert same.metrics["gFID-colours"] == pytest.approx(0, abs=1e-9)
    assert same.floor_count == 20
    result.save(tmp_path / "result.json")
    kept = json.loads((tmp_path / "result.json").read_text())
    assert kept["made_by"]["evaluations"] == 50
    assert kept["compared_with"]["name"] == "real"


def test_moments_have_no_floor(images, suite: MetricSuite) -> None:  # type: ignore[no-untyped-def]
    made = ImageSet.of(images(12, 16, 16, 1), "made")
    moments = FeatureMoments("moments", "hash", Gaussian.of(torch.randn(20, 6)))
    with pytest.raises(RacError, match="holds only moments"):
        evaluate_generated(made, moments, SETS, suite)
    only = replace(SETS, metrics=("frechet",))
    result = evaluate_generated(made, moments, only, replace(suite, metrics=("frechet",)))
    assert result.floor == {}
    assert list(result.metrics) == ["gFID-colours"]


def test_metrics_of_one_image_are_left_out() -> None:
    assert of_sets_alone(PROTOCOLS["dev-128"]).metrics == ("kernel",)
    with pytest.raises(RacError, match="pixels-64 has no metrics of sets"):
        of_sets_alone(PROTOCOLS["pixels-64"])


def test_the_number_is_the_protocols(images, suite: MetricSuite) -> None:  # type: ignore[no-untyped-def]
    made = ImageSet.of(images(12, 16, 16), "made")
    with pytest.raises(RacError, match="is for 13 images, but made has 12"):
        evaluate_generated(made, made, replace(SETS, count=13), suite)


# ------------------------------------------------------------------------------------------ latents


def latents(count: int, seed: int, scale: float = 1.0) -> torch.Tensor:
    return scale * torch.randn(count, 2, 4, 4, generator=torch.Generator().manual_seed(seed))


def test_latents_that_are_alike_lie_at_the_floor() -> None:
    found = latent_distance(latents(200, 0), latents(400, 1))
    assert (found.count, found.shape, found.name) == (200, (2, 4, 4), "latent FD, 2 x 4 x 4")
    assert found.value == pytest.approx(found.floor, rel=0.15)
    assert latent_distance(latents(200, 0, 1.5), latents(400, 1)).value > 2 * found.floor
    # The distance is that of the numbers themselves, of equally many.
    plain = frechet(Gaussian.of(latents(200, 0).flatten(1)), Gaussian.of(latents(400, 1)[:200].flatten(1)))
    assert found.value == pytest.approx(plain)


def test_few_latents_are_averaged_over_places() -> None:
    assert latent_distance(latents(30, 0), latents(60, 1)).shape == (2, 2, 2)
    assert latent_distance(latents(8, 0), latents(60, 1)).shape == (2, 1, 1)
    with pytest.raises(RacError, match="more than 2 latents"):
        latent_distance(latents(2, 0), latents(60, 1))
    with pytest.raises(RacError, match="one shape"):
        latent_distance(latents(30, 0), latents(60, 1)[..., :2])
