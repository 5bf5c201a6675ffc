"""A RAC learns from a DGAE as from any teacher, and with seed noise it decodes from noise as a DGAE does."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny import smooth_images, untrained_dgae, untrained_rac
from torch import Tensor, nn

import rac
from rac.coders.rac import RAC
from rac.data import DataConfig
from rac.fields import LocalFieldConfig
from rac.flow import TimeGrid
from rac.latents import LatentSpec, Statistics
from rac.objectives.rac import RACObjective, RACWeights
from rac.recipes import RACRecipe
from rac.states import PAD, RGB
from rac.train import TrainConfig, log

LOCAL = LocalFieldConfig(widths=(8, 8), blocks=(1, 1), down=(8,), down_blocks=(0,), embedding=8)


@pytest.fixture
def teacher(tmp_path: Path) -> Path:
    rac.save(untrained_dgae(0.05, statistics=Statistics.of(0.1, 0.5)).eval(), tmp_path / "teacher")
    return tmp_path / "teacher"


@pytest.mark.parametrize("cached", [0, 4])
def test_a_rac_learns_from_a_dgae(teacher: Path, cached: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(log, "draw_curves", lambda records: b"")
    photos = tmp_path / "photos"
    photos.mkdir()
    for number, image in enumerate(smooth_images(5, 24, 24)):
        rac.write_image(image, photos / f"{number}.png")
    weights = RACWeights(velocity=1.0, reconstruction=1.0, latent=1.0, pixel=0.1)
    recipe = RACRecipe(
        teacher=str(teacher),
        field=LOCAL,
        spread="beside",
        steps=2,
        objective=RACObjective(weights=weights, steps=(1, 2), memory="store"),
        data=DataConfig(paths=(photos,), size=16, held_out=1, cached_crops=cached),
        train=TrainConfig(iterations=2, batch=2, device="cpu", tensorboard=False),
    )
    fitted = recipe.run(tmp_path / "run")
    assert fitted.metrics["psnr_teacher"] > 0
    student, original = rac.load(tmp_path / "run"), rac.load(teacher)
    assert student.teacher == str(teacher)
    assert student.spec.compatible(original.spec)
    latent = original.encode(smooth_images(2, 16, 16))
    assert student.decode(latent).shape == (2, 3, 16, 16)


class Beside(nn.Module):
    """A DGAE's velocity as the field of a RAC: it reads the latent off the fading channel, which it leads to PAD."""

    def __init__(self, velocity: nn.Module) -> None:
        super().__init__()
        self.velocity = velocity

    def forward(self, state: Tensor, time: Tensor) -> Tensor:
        t = time.view(-1, 1, 1, 1)
        latent = (state[:, RGB:] - t * PAD) / (1 - t)
        image = self.velocity(torch.cat([state[:, :RGB] - (1 - t) * PAD, latent], dim=1), time) - PAD
        return torch.cat([image, PAD - latent], dim=1)


def test_a_rac_with_noise_in_its_free_channels_is_a_dgae() -> None:
    """One velocity, two coders, the same image: what a RAC's decoding does with a DGAE's field, step by step."""
    spec = LatentSpec(1, 1)

    class Given(nn.Module):
        """Any velocity of (x, z)."""

        def forward(self, state: Tensor, time: Tensor) -> Tensor:
            x, z = state[:, :RGB], state[:, RGB:]
            return torch.tanh(x * z + time.view(-1, 1, 1, 1)) - 0.5 * x

    coder: RAC = untrained_rac(
        spec=spec, field=replace(LOCAL, widths=(8,), blocks=(1,), down=(), down_blocks=(), patch=1),
        spread="beside", seed_noise=1.0,
    )  # fmt: skip
    coder.field = Beside(Given())
    latent, noise = torch.randn(2, 1, 5, 6), torch.randn(2, 4, 5, 6)
    by_rac = coder.decode(latent, 6, noise=noise)
    state, nodes = noise[:, :RGB], TimeGrid.uniform(6).nodes
    for k in range(6):
        time = torch.full((2,), nodes[k])
        state = state + (nodes[k + 1] - nodes[k]) * Given()(torch.cat([state, latent], dim=1), time)
    torch.testing.assert_close(by_rac, state, rtol=1e-4, atol=1e-5)
