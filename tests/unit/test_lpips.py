"""LPIPS: its formula, its edges, its gradients; the published values are in tests/reference."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from rac import RacError, WeightsError
from rac.evaluate.suite import SHORTEST_SIDE
from rac.representations.lpips import FILES, LPIPS, Backbone

BACKBONES: list[Backbone] = ["alex", "vgg16"]


def random_lpips(backbone: Backbone) -> LPIPS:
    torch.manual_seed(0)
    distance = LPIPS(backbone).eval().requires_grad_(False)
    for index in range(5):
        distance.get_submodule(f"lin{index}").weight.abs_()
    return distance


@pytest.mark.parametrize("backbone", BACKBONES)
def test_equal_images_have_no_distance_and_others_have(backbone: Backbone, images) -> None:
    distance, image = random_lpips(backbone), images(2, 40, 48)
    assert torch.equal(distance(image, image), torch.zeros(2))
    assert (distance(image, -image) > 0).all()
    torch.testing.assert_close(distance(image, -image), distance(-image, image))


@pytest.mark.parametrize("backbone", BACKBONES)
def test_each_image_is_judged_alone(backbone: Backbone, images) -> None:
    distance, image, other = random_lpips(backbone), images(5, 32, 40), images(5, 32, 40, rng_seed=1)
    together = distance(image, other)
    alone = torch.cat([distance(image[k : k + 1], other[k : k + 1]) for k in range(5)])
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-6)
    torch.testing.assert_close(distance(image.flip(0), other.flip(0)).flip(0), together, rtol=0, atol=1e-6)


def test_gradients_are_finite_even_where_nothing_is_seen() -> None:
    distance = random_lpips("vgg16")
    distance.conv0.bias.fill_(-100)  # no channel of any layer but the first wakes up
    image = torch.zeros(1, 3, 16, 16, requires_grad=True)
    distance(image, torch.ones(1, 3, 16, 16)).sum().backward()
    assert torch.isfinite(image.grad).all()


@pytest.mark.parametrize("backbone", BACKBONES)
def test_the_shortest_side_is_told(backbone: Backbone, images) -> None:
    distance = random_lpips(backbone)
    least = distance.trunk.least
    assert SHORTEST_SIDE[f"lpips-{backbone}"] == least
    assert torch.isfinite(distance(images(1, least, least), images(1, least, least, 1))).all()
    with pytest.raises(RacError, match=f"at least {least} pixels"):
        distance(images(1, least - 1, 64), images(1, least - 1, 64))
    with pytest.raises(RacError, match="one shape"):
        distance(images(1, 64, 64), images(1, 64, 65))


def test_weights_are_looked_for_in_the_named_folder(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("RAC_WEIGHTS_DIR", str(tmp_path))
    with pytest.raises(WeightsError, match=r"lpips_alex_v0\.1\.safetensors.*RAC_WEIGHTS_DIR"):
        LPIPS.load("alex")
    save_file(random_lpips("alex").state_dict(), tmp_path / FILES["alex"].names[0])
    assert not any(parameter.requires_grad for parameter in LPIPS.load("alex").parameters())
    with pytest.raises(WeightsError, match=r"lpips_alex.*tensor conv"):
        LPIPS.load("vgg16", tmp_path / FILES["alex"].names[0])
    with pytest.raises(RacError, match="alex or vgg16"):
        LPIPS("squeeze")  # type: ignore[arg-type]
