"""Explained variance against scikit-learn's definition, and what round trips lose."""

from __future__ import annotations

import pytest
import torch

from rac import RacError
from rac.evaluate.latent_metrics import LatentAgreement
from rac.flow import Euler, Midpoint, TimeGrid
from rac.images import crop


def latents() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    teacher = torch.randn(6, 3, 5, 4, generator=generator)
    noise = torch.randn(6, 3, 5, 4, generator=generator)
    levels = torch.tensor([0.1, 0.5, 2.0]).view(1, 3, 1, 1)
    return teacher + levels * noise + torch.tensor([0.0, 1.0, 0.0]).view(1, 3, 1, 1), teacher


def explained_variance(latent: torch.Tensor, teacher_latent: torch.Tensor) -> torch.Tensor:
    agreement = LatentAgreement()
    agreement.update(latent, teacher_latent)
    return agreement.explained_variance()


def test_explained_variance_against_numpy() -> None:
    latent, teacher = latents()
    found = explained_variance(latent, teacher)
    for channel in range(3):
        error, target = (latent - teacher)[:, channel].double().numpy(), teacher[:, channel].double().numpy()
        assert float(found[channel]) == pytest.approx(1 - error.var() / target.var(), rel=1e-6)
    assert found[0] > 0.98
    assert found[2] < 0


def test_known_values() -> None:
    latent, teacher = latents()
    assert torch.equal(explained_variance(teacher, teacher), torch.ones(3, dtype=torch.float64))
    nothing = torch.zeros_like(teacher)
    torch.testing.assert_close(explained_variance(nothing, teacher), torch.zeros(3, dtype=torch.float64))
    agreement = LatentAgreement()
    agreement.update(teacher + 0.5, teacher)
    # A constant is no lost variance, so it is told apart.
    torch.testing.assert_close(agreement.explained_variance(), torch.ones(3, dtype=torch.float64))
    deviation = teacher.double().std(dim=(0, 2, 3), correction=0)
    torch.testing.assert_close(agreement.offset(), 0.5 / deviation, rtol=1e-6, atol=0)
    constant = torch.full_like(teacher, 0.3)
    assert explained_variance(latent, constant).isnan().all()


def test_batches_and_order_do_not_matter() -> None:
    latent, teacher = latents()
    agreement = LatentAgreement()
    for rows in ([5, 1], [0], [3, 2, 4]):
        agreement.update(latent[rows], teacher[rows])
    torch.testing.assert_close(agreement.explained_variance(), explained_variance(latent, teacher), rtol=1e-12, atol=0)


def test_mistakes_are_told() -> None:
    latent, teacher = latents()
    with pytest.raises(RacError, match="one shape"):
        explained_variance(latent[:, :2], teacher)
    with pytest.raises(RacError, match="no latents"):
        LatentAgreement().explained_variance()


def state_round_trip(coder, image, steps=None, solver=None):
    walk = coder.walk("encode", steps, solver or Euler())
    flow = coder.coded(image, walk).flow
    return crop(coder.state_round_trip(flow, walk), (image.shape[-2], image.shape[-1]))


def test_round_trips(make_rac, one_layer_coder, images) -> None:
    image = images(2, 18, 20)
    with torch.no_grad():
        # Nothing is compressed and nothing flows.
        torch.testing.assert_close(one_layer_coder.reconstruct(image), image)
        torch.testing.assert_close(state_round_trip(one_layer_coder, image), image)
        lossy = make_rac(lively=0.02).eval()
        grid = TimeGrid.uniform(64)
        through_state = state_round_trip(lossy, image, grid, Midpoint())
        through_latent = lossy.reconstruct(image, grid, Midpoint())
        assert through_state.shape == image.shape
        assert (through_state - image).abs().max() < 1e-3
        assert (through_latent - image).abs().max() > 0.1
        torch.testing.assert_close(through_latent, lossy.reconstruct(image, grid, Midpoint()))
