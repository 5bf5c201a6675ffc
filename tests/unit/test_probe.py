"""Linear probe: what it finds, what it cannot know, and that neither order nor batches matter."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

import rac
from rac.cli import main
from rac.errors import RacError
from rac.evaluate import PROTOCOLS, ImageSet, measure
from rac.evaluate.probe import FOLDS, PER_TOKEN, POOLED, LinearProbe, _accuracy, _folds, _regression


def latents(count: int = 60, classes: int = 3, rng_seed: int = 0) -> tuple[Tensor, Tensor, list[str]]:
    """Latents 4 x 2 x 3 whose first channel tells the class in its mean over places alone, distinct images, labels."""
    rng = torch.Generator().manual_seed(rng_seed)
    labels = torch.arange(count) % classes
    latent = torch.randn(count, 4, 2, 3, generator=rng)
    latent[:, 0] += 2 * labels[:, None, None] - latent[:, 0].mean((1, 2), keepdim=True)
    return latent, torch.rand(count, 3, 4, 4, generator=rng) * 2 - 1, [f"c{label}" for label in labels.tolist()]


def probed(latent: Tensor, images: Tensor, labels: list[str], batch: int) -> dict[str, float]:
    probe = LinearProbe()
    for first in range(0, len(latent), batch):
        rows = slice(first, first + batch)
        probe.update(latent[rows], images[rows], labels[rows])
    return probe.accuracies()


def test_it_finds_what_is_there_and_nothing_where_nothing_is():
    latent, images, labels = latents()
    found = probed(latent, images, labels, 60)
    assert found[POOLED] == 1.0
    assert 0.6 < found[PER_TOKEN] < 0.95  # a single place is noisy
    noise = torch.randn(300, 4, 2, 3, generator=torch.Generator().manual_seed(2))
    _, images, labels = latents(300)
    assert probed(noise, images, labels, 300)[POOLED] == pytest.approx(1 / 3, abs=0.1)


def test_neither_order_nor_batches_change_a_number():
    latent, images, labels = latents(45)
    order = torch.randperm(45, generator=torch.Generator().manual_seed(1)).tolist()
    shuffled = probed(latent[order], images[order], [labels[place] for place in order], 7)
    assert shuffled == probed(latent, images, labels, 45)


def test_every_class_is_spread_over_all_parts():
    folds = _folds([0] * 7 + [1] * 10)
    assert folds[:7].bincount(minlength=FOLDS).tolist() == [2, 2, 1, 1, 1]
    assert folds[7:].bincount(minlength=FOLDS).tolist() == [2] * 5


def test_the_regression_is_at_its_minimum():
    rng = torch.Generator().manual_seed(0)
    x, y = torch.randn(200, 5, generator=rng), torch.randint(3, (200,), generator=rng)
    weight, bias = (one.requires_grad_() for one in _regression(x, y, 3))
    loss = torch.nn.functional.cross_entropy(x @ weight + bias, y) + 5e-4 * weight.square().sum()
    loss.backward()
    assert weight.grad.abs().max() < 1e-3
    assert bias.grad.abs().max() < 1e-3


def test_a_latent_of_many_places_is_thinned_evenly():
    latent = torch.zeros(4, 1, 8, 8)
    latent[2:] = 1.0
    images = torch.rand(4, 3, 4, 4)
    probe = LinearProbe()
    probe.update(latent, images, ["a", "a", "b", "b"])
    assert probe._tokens[0].shape == (4, 16, 1)
    assert probe.accuracies() == {POOLED: 1.0, PER_TOKEN: 1.0}


def test_what_cannot_be_probed_is_refused():
    latent, images, labels = latents(4)
    for given in (None, ["a", None, "b", "b"]):
        with pytest.raises(RacError, match="needs the classes of all images"):
            LinearProbe().update(latent, images, given)
    for given, words in ((["a"] * 4, "at least 2 classes"), (["a", "a", "a", "b"], "class b has one image")):
        with pytest.raises(RacError, match=words):
            probed(latent, images, given, 4)
    probe = LinearProbe()
    probe.update(latent, images, labels)
    probe.update(latent[..., :1], images, labels)
    with pytest.raises(RacError, match="images of one size"):
        probe.accuracies()


def test_any_coder_is_probed_under_a_protocol(make_rac, images):
    protocol = replace(PROTOCOLS["pixels-64"], metrics=("psnr", "probe"))
    image = images(12, 64, 64)
    image[6:] = image[6:].abs()  # bright ones
    found = measure(make_rac().eval(), ImageSet.of(image, "set", ["dark"] * 6 + ["light"] * 6), protocol)
    assert list(found.metrics) == ["psnr", POOLED, PER_TOKEN]
    assert 0 <= found.metrics[PER_TOKEN] <= 1
    with pytest.raises(RacError, match="needs the classes"):
        measure(make_rac().eval(), ImageSet.of(image, "set"), protocol)


@pytest.mark.slow
def test_the_command_adds_it_to_a_protocol(make_rac, images, tmp_path: Path, capsys):
    for number, image in enumerate(images(8, 64, 64)):
        path = tmp_path / "photos" / ("cat", "dog")[number % 2] / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        rac.write_image(image[None], path)
    rac.save(make_rac(), tmp_path / "coder")
    options = ["--model", "coder", "--data", "photos", "--metrics", "probe", "--steps", "1"]
    options += ["--no-pictures", "--robustness", "0", "--out", "out"]
    given = [str(tmp_path / one) if one in ("coder", "photos", "out") else one for one in options]
    assert main(["evaluate", *given]) == 0
    assert "probe" in capsys.readouterr().out
    (result,) = (tmp_path / "out" / "results").glob("*.json")
    found = json.loads(result.read_text())
    assert {POOLED, PER_TOKEN} <= found["metrics"].keys()
    assert "probe" in found["protocol"]["metrics"]
    assert main(["evaluate", *given[:5], "lpips", *given[6:]]) == 2
    assert "metric 'lpips' is not known" in capsys.readouterr().err


def test_what_is_tested_has_no_part_in_the_scaling():
    """One value far away spoils the scale of whatever it is counted in: that of its own test would be spoilt too."""
    labels = torch.arange(40) % 2
    features = (2.0 * labels - 1)[:, None]
    features[1] = 1e8
    assert _accuracy(features, labels, (torch.arange(40) >= 20).long()) == pytest.approx(0.75, abs=0.01)
