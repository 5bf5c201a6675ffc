"""Smoothness: exact for decoders whose lines are known, the same noise along a line, and what is refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from tiny import smooth_images, untrained_dgae
from torch import Tensor, nn

import rac
from rac.coders.protocol import Coder, Decoded, Keep, Network
from rac.errors import RacError
from rac.evaluate import ImageSet, Preprocessing, Protocol
from rac.evaluate.comparison import Candidate, candidates
from rac.evaluate.smoothness import POINTS, SIGMAS, interpolation, picture, smoothness, table
from rac.flow import Walk
from rac.latents import LatentSpec

PROTOCOL = Protocol("tiny", Preprocessing(16, "centre"), metrics=("psnr",))


class Pixels(Coder):
    """The image is its own latent; decoding bends it: x + bend x^2."""

    def __init__(self, bend: float) -> None:
        super().__init__(LatentSpec(1, 3))
        self.bend = nn.Parameter(torch.tensor(bend))

    def _moments(self, image: Tensor) -> Tensor:
        return image

    def _decode(self, latent: Tensor, walk: Walk | None, noise: Tensor | None, keep: Keep) -> Decoded:
        return Decoded(latent + self.bend * latent.square(), 1)

    def networks(self) -> dict[str, Network]:
        return {}

    def _save(self, directory: Path, dtype: torch.dtype | None) -> None:
        raise NotImplementedError


def candidate(coder: Coder, steps: int = 2) -> Candidate:
    (found,) = candidates({"one": coder.eval().requires_grad_(False)}, PROTOCOL, steps=(steps,))
    return found


@pytest.fixture
def image_set() -> ImageSet:
    return ImageSet.of(smooth_images(4, 16, 16), "waves")


def test_an_even_decoder_has_no_roughness_and_moves_by_sigma(image_set: ImageSet) -> None:
    found = smoothness(candidate(Pixels(0.0)), image_set, 3)
    assert found.roughness == pytest.approx(0, abs=1e-5)
    assert found.sensitivity == pytest.approx((1.0,) * len(SIGMAS), abs=0.05)
    assert found.pairs == 3


def test_roughness_is_its_formula(image_set: ImageSet) -> None:
    """On a line x(k) = a + k d the bent image has second difference 2 bend d^2, whatever k."""
    found = smoothness(candidate(Pixels(0.5)), image_set, 1)
    one, other = (part.images for part, _ in zip(image_set.batches(1), range(2), strict=False))
    step = (other - one).double() / POINTS
    line = [one.double() + k * step for k in range(POINTS + 1)]
    bent = torch.cat([x + 0.5 * x.square() for x in line])
    first = (bent[1:] - bent[:-1]).square().mean()
    second = (2 * 0.5 * step.square()).square().mean()
    assert found.roughness == pytest.approx(float((second / first).sqrt()), rel=1e-4)


def test_bending_more_is_rougher(image_set: ImageSet) -> None:
    rough = [smoothness(candidate(Pixels(bend)), image_set, 2).roughness for bend in (0.0, 0.1, 0.4)]
    assert rough == sorted(rough)
    assert rough[0] < rough[1] < rough[2] <= 2


def test_a_line_is_decoded_from_one_noise(image_set: ImageSet) -> None:
    one = candidate(untrained_dgae())  # its velocity is zero, so it gives the noise back
    (part,) = image_set.batches(4)
    line = interpolation(one, "a", part.images[:1], part.images[1:2])
    assert all(torch.equal(image, line[0]) for image in line)
    with pytest.raises(RacError, match="decodes every latent to one image"):
        smoothness(one, image_set, 1)


def test_a_seed_and_nothing_else_changes_the_noise(image_set: ImageSet) -> None:
    one = candidate(untrained_dgae(0.05))
    assert smoothness(one, image_set, 2) == smoothness(one, image_set, 2)
    other = replace(one, protocol=replace(one.protocol, rng_seed=3))
    assert smoothness(other, image_set, 2) != smoothness(one, image_set, 2)


def test_table_and_picture(image_set: ImageSet) -> None:
    field = [candidate(Pixels(0.1)), candidate(untrained_dgae(0.05))]
    drawn = picture(field, image_set)
    assert min(drawn.size) > 300
    rows = table([smoothness(one, image_set, 1) for one in field])
    assert rows.columns[0] == "coder"
    assert [row[0] for row in rows.rows] == ["one", "one, 2 steps"]


@pytest.mark.parametrize(("pairs", "message"), [(0, "pairs 0 must be at least 1"), (4, "4 pairs need 5 images")])
def test_too_few_are_refused(image_set: ImageSet, pairs: int, message: str) -> None:
    with pytest.raises(RacError, match=message):
        smoothness(candidate(Pixels(0.1)), image_set, pairs)


def test_verb(tmp_path: Path) -> None:
    from rac.cli import main

    photos = tmp_path / "photos"
    photos.mkdir()
    for number, image in enumerate(smooth_images(3, 64, 64)):
        rac.write_image(image, photos / f"{number}.png")
    rac.save(untrained_dgae(0.05).eval(), tmp_path / "coder")
    common = ["--data", str(photos), "--out", str(tmp_path / "out"), "--device", "cpu"]
    assert main(["smoothness", str(tmp_path / "coder"), "--pairs", "2", "--steps", "1", "2", *common]) == 0
    with Image.open(tmp_path / "out" / "smoothness.png") as drawn:
        assert min(drawn.size) > 300
    assert '"roughness"' in (tmp_path / "out" / "smoothness.json").read_text()
    for wrong in (["--pairs", "0"], ["--pairs", "9"], ["--steps", "0"], ["--protocol", "pixel"]):
        assert main(["smoothness", str(tmp_path / "coder"), *wrong, *common]) == 2
    assert main(["smoothness", *common]) == 2
