"""Coders of unknown families go through evaluation, comparison, page, costs, bench and export."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from sixth_family import AffineCoder
from torch import Tensor, nn
from torch.nn import functional as F

from rac.coders.protocol import Coded, Coder, Decoded, Keep, Network, Way
from rac.evaluate import ImageSet, Preprocessing, Protocol, compare, evaluate
from rac.evaluate.comparison import candidates
from rac.evaluate.comparison_report import Material, introduction, sections
from rac.evaluate.cost import coder_rows
from rac.evaluate.image_metrics import psnr
from rac.evaluate.one_image import Loaded, decode_noised, reconstruct, reconstructions
from rac.experiments.speed import Setting, coding_speeds
from rac.flow import Walk, integrate
from rac.images import from_pixels, to_pixels
from rac.integrations.export import part_of
from rac.latents import LatentSpec
from rac.report.document import Figure

FACTOR, CHANNELS = 4, 6
PROTOCOL = Protocol("tiny", Preprocessing(24, "centre"), metrics=("psnr", "ssim"))


class Drift(nn.Module):
    """A velocity of images; the enlarged latent beside them stays as it is."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Conv2d(3 + CHANNELS, 3, 3, padding=1)

    def forward(self, state: Tensor, time: Tensor) -> Tensor:
        change = torch.tanh(self.layer(state)) * (1 + time.view(-1, 1, 1, 1)) - state[:, :3]
        return torch.cat([change, torch.zeros_like(state[:, 3:])], dim=1)


class FromNoise(Coder):
    """Encodes in one pass, and decodes by a flow that starts at noise and ends at the image."""

    def __init__(self) -> None:
        super().__init__(LatentSpec(FACTOR, CHANNELS))
        self.look = nn.Conv2d(3, CHANNELS, FACTOR, stride=FACTOR)
        self.drift = Drift()

    def default_steps(self, way: Way) -> int | None:
        return 3 if way == "decode" else None

    def noise_shape(self, latent: Tensor) -> tuple[int, ...] | None:
        return len(latent), 3, latent.shape[-2] * FACTOR, latent.shape[-1] * FACTOR

    def _encode(self, image: Tensor, walk: Walk | None, keep: Keep) -> Coded:
        return Coded(self.finish(self._moments(image)), 1)

    def _moments(self, image: Tensor) -> Tensor:
        return self.look(image)

    def _decode(self, latent: Tensor, walk: Walk | None, noise: Tensor | None, keep: Keep) -> Decoded:
        assert walk is not None
        assert noise is not None
        state = torch.cat([0.1 * noise, F.interpolate(latent, scale_factor=FACTOR)], dim=1)
        flow = integrate(self.drift, state, walk.grid, walk.solver, keep=keep)
        return Decoded(flow.end[:, :3], flow.evaluations, flow)

    def networks(self) -> dict[str, Network]:
        return {
            "encoder": Network(self.look, lambda height, width: ((1, 3, height, width),), "encode"),
            "drift": Network(self.drift, lambda height, width: ((1, 3 + CHANNELS, height, width), (1,)), "decode"),
        }

    def _save(self, directory: Path, dtype: torch.dtype | None) -> None:
        raise NotImplementedError


@pytest.fixture(params=[AffineCoder, FromNoise])
def coder(request) -> Coder:
    torch.manual_seed(6)
    return request.param().eval().requires_grad_(False)


@pytest.fixture
def image_set(images) -> ImageSet:
    return ImageSet.of(images(5, 24, 24), "waves")


def test_evaluate_walks_what_is_walked(coder, image_set) -> None:
    result = evaluate(coder, image_set, PROTOCOL, name="sixth")
    assert result.steps == 3
    with torch.no_grad():
        part = next(image_set.batches(5))
        image = part.images
        latent = coder.encode(image)
        made = coder.decode(latent, noise=coder.noise_of(latent, part.names, PROTOCOL.rng_seed))
    written = torch.cat([from_pixels(to_pixels(one)) for one in made])
    assert result.per_image["psnr"] == pytest.approx(psnr(written, image).tolist(), abs=1e-4)


def test_each_image_of_an_evaluation_has_noise_of_its_own(coder, image_set) -> None:
    """Neither batches nor the order of the images change a number, and the seed is the protocol's."""
    exact = replace(PROTOCOL, rounded=False)
    found = [evaluate(coder, image_set, exact, batch=size).per_image["psnr"] for size in (1, 2, 5)]
    for other in found[1:]:
        assert other == pytest.approx(found[0], abs=1e-4)
    again = evaluate(coder, image_set, replace(exact, rng_seed=1)).per_image["psnr"]
    random = coder.noise_shape(torch.zeros(1, coder.spec.channels, 1, 1)) is not None
    assert (again != pytest.approx(found[0], abs=1e-6)) == random


def test_compare_and_its_report(coder, image_set, tmp_path) -> None:
    field = candidates({"sixth": coder}, PROTOCOL, steps=(1, 2))
    comparison = compare(field, image_set, PROTOCOL)
    assert [row.label for row in comparison.rows] == ["sixth, 1 step", "sixth, 2 steps"]
    one, two = (row.cost for row in comparison.rows)
    assert (two.macs_per_step, two.decoding_macs) == (one.macs_per_step, 2 * one.decoding_macs)
    assert ("psnr, state round trip" in comparison.metrics) == (coder.walk("encode") is not None)
    comparison.save(tmp_path / "comparison.json")
    material = Material((), field, comparison, image_set)
    drawn = sections(material, pictures=False, progress=lambda done, total: None)
    assert "waves" in introduction(material)
    from rac.evaluate.comparison_report import _best_and_worst, _step_by_step, _trajectories

    for section in (_best_and_worst(material), _step_by_step(material), _trajectories(material)):
        drawn.append(section)
    figures = [one for section in drawn for one in section.contents if isinstance(one, Figure)]
    assert len(figures) >= 5
    assert all(min(figure.picture.size) > 50 for figure in figures)


def test_one_image_for_command_and_page(coder, images) -> None:
    image = images(1, 22, 27)
    walked_both = coder.walk("encode") is not None
    made = reconstructions(coder, image, (1, 4), name="sixth")
    assert [one.name for one in made] == ["sixth, 1 step", "sixth, 4 steps"]
    assert [one.evaluations for one in made] == ([2, 8] if walked_both else [2, 5])
    assert made[0].decoding is None
    assert len(made[1].decoding.states) == 5
    shown = reconstruct(Loaded("sixth", coder), image, 4)
    (version,) = shown.versions
    assert torch.equal(version.image, made[1].image)
    assert (shown.encoding is not None) == walked_both
    assert [one.evaluations for one in decode_noised(Loaded("sixth", coder), image, 0.3)] == [1, 2, 4]


def test_cost_bench_and_export(coder, images) -> None:
    rows = coder_rows("sixth", coder, 32)
    noted = [row.note for row in rows if "at 3 steps" in row.note]
    assert len(noted) == 1
    assert (rows[-1].name == "sixth whole") == (len(coder.networks()) > 1)
    speeds = coding_speeds(coder, images(2, 24, 24), Setting(torch.device("cpu"), seconds=0, rounds=1), 2)
    assert set(speeds) == {"encode", "decode"}
    image = images(1, 24, 24)
    with torch.no_grad():
        torch.testing.assert_close(part_of(coder, "encode")(image), coder.encode(image))
