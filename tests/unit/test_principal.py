"""Principal axes against their definition."""

from __future__ import annotations

import pytest
import torch

from rac.errors import RacError
from rac.evaluate.principal import COLOUR_SPREAD, PrincipalAxes, latent_axes, latent_colours


def test_axes_of_a_known_cloud() -> None:
    generator = torch.Generator().manual_seed(0)
    turn, _ = torch.linalg.qr(torch.randn(5, 5, generator=generator, dtype=torch.float64))
    scales = torch.tensor([4.0, 2.0, 1.0, 0.1, 0.1], dtype=torch.float64)
    points = torch.randn(4000, 5, generator=generator, dtype=torch.float64) * scales @ turn.T + 7
    found = PrincipalAxes.fit(points, 3)
    assert torch.allclose(found.deviations.double(), scales[:3], rtol=0.05)
    assert torch.allclose((found.axes.double() @ turn[:, :3]).abs(), torch.eye(3, dtype=torch.float64), atol=0.05)
    assert torch.allclose(found.shares.double(), scales[:3].square() / scales.square().sum(), rtol=0.1)
    assert torch.allclose(found.axes @ found.axes.T, torch.eye(3), atol=1e-5)
    assert float(found.axes.gather(1, found.axes.abs().argmax(1, keepdim=True)).min()) > 0
    projected = found.project(points)
    assert float(projected.mean(dim=0).abs().max()) < 1e-3
    assert torch.allclose(projected.std(dim=0), found.deviations, rtol=1e-3)


def test_more_axes_than_points_and_constant_points() -> None:
    assert len(PrincipalAxes.fit(torch.randn(2, 50), 3).axes) == 2
    still = PrincipalAxes.fit(torch.ones(6, 4), 2)
    assert torch.equal(still.project(torch.ones(3, 4)), torch.zeros(3, 2))
    with pytest.raises(RacError, match="at least 2 points"):
        PrincipalAxes.fit(torch.ones(1, 4), 2)


@pytest.mark.parametrize("channels", [2, 4, 16])
def test_latents_as_colours(channels: int) -> None:
    latent = torch.randn(1, channels, 5, 7, generator=torch.Generator().manual_seed(1))
    colours = latent_colours(latent, latent_axes([latent]), 8)
    assert colours.shape == (3, 40, 56)
    assert float(colours.abs().max()) <= 1
    assert torch.equal(colours[:, ::8, ::8].repeat_interleave(8, 1).repeat_interleave(8, 2), colours)
    # Every axis fills its colour alike; what has no third axis has no blue.
    spreads = colours.flatten(1).std(dim=1)
    axes = min(channels, 3)
    assert torch.allclose(spreads[:axes], torch.tensor(1 / COLOUR_SPREAD), atol=0.03)
    assert not spreads[axes:].any()
