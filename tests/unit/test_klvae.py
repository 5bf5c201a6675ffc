from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

import rac
from rac.coders.adapter import WEIGHTS
from rac.coders.klvae import KLVAE, KLVAEConfig
from rac.draws import Draws
from rac.errors import RacError
from rac.objectives.klvae import KLVAEWeights, klvae_terms


@pytest.fixture
def coder() -> KLVAE:
    torch.manual_seed(0)
    return KLVAEConfig(widths=(8, 16, 16), latent_channels=3).build()


@pytest.fixture
def images() -> torch.Tensor:
    return torch.rand(4, 3, 16, 24, generator=torch.Generator().manual_seed(1)) * 2 - 1


def draws(count: int = 4) -> Draws:
    return Draws.whole(torch.Generator().manual_seed(2), count)


def test_the_config_reaches_the_network() -> None:
    coder = KLVAEConfig(
        widths=(8, 16), layers_per_block=2, latent_channels=5, norm_groups=8, middle_attention=True
    ).build()
    assert coder.spec.factor == 2
    assert coder.spec.channels == 5
    names = coder.network.state_dict().keys()
    assert "encoder.down_blocks.0.resnets.1.conv1.weight" in names
    assert "decoder.mid_block.attentions.0.to_q.weight" in names
    assert coder.network.encoder.conv_norm_out.num_groups == 8


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"widths": (8, 12), "norm_groups": 8}, "width 12 does not divide"),
        ({"widths": ()}, "one positive width"),
        ({"layers_per_block": 0}, "layers_per_block must be at least 1, not 0"),
        ({"latent_channels": -1}, "latent_channels must be at least 1, not -1"),
    ],
)
def test_bad_configs_are_refused(config: dict[str, object], message: str) -> None:
    with pytest.raises(RacError, match=message):
        KLVAEConfig(**config)


def test_the_latent_is_the_posterior_mean(coder: KLVAE, images: torch.Tensor) -> None:
    assert torch.equal(coder.encode(images), coder.posterior(images).mean)


def test_statistics_make_the_latents_standard(coder: KLVAE, images: torch.Tensor) -> None:
    coder.fit_statistics(images.split(3))
    latent = coder.encode(images)
    assert latent.mean().abs() < 1e-5
    assert (latent.var(correction=0) - 1).abs() < 1e-4
    torch.testing.assert_close(coder.decode(latent), coder.network.decode(coder.posterior(images).mean).sample)


def test_statistics_travel_with_the_weights(coder: KLVAE, images: torch.Tensor, tmp_path: Path) -> None:
    coder.fit_statistics([images])
    coder.save(tmp_path)
    assert rac.load(tmp_path).spec == coder.spec


def test_statistics_need_images_that_differ(coder: KLVAE) -> None:
    with pytest.raises(RacError, match="no images"):
        coder.fit_statistics([])
    for parameter in coder.parameters():
        torch.nn.init.zeros_(parameter)
    with pytest.raises(RacError, match="variance"):
        coder.fit_statistics([torch.zeros(1, 3, 16, 16)])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_on_disk_is_float32_in_memory(coder: KLVAE, dtype: torch.dtype, tmp_path: Path) -> None:
    coder.to(memory_format=torch.channels_last).save(tmp_path / "whole")
    coder.save(tmp_path / "half", dtype)
    assert (tmp_path / "half" / WEIGHTS).stat().st_size < 0.6 * (tmp_path / "whole" / WEIGHTS).stat().st_size
    loaded = rac.load(tmp_path / "half").network.state_dict()
    for name, tensor in coder.network.state_dict().items():
        assert torch.equal(loaded[name], tensor.to(dtype).float())


def test_terms_are_the_formulas(coder: KLVAE, images: torch.Tensor) -> None:
    coder.fit_statistics([images])
    terms = klvae_terms(coder, images, draws())
    moments = coder.network.encode(images).latent_dist.parameters
    mean, log_variance = moments.chunk(2, dim=1)
    noise = torch.randn(mean.shape, generator=torch.Generator().manual_seed(2))
    decoded = coder.network.decode(mean + (0.5 * log_variance).exp() * noise).sample
    torch.testing.assert_close(terms["l1"], (decoded - images).abs().mean())
    kl = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance)
    torch.testing.assert_close(terms["kl"], kl.sum() / len(images))
    assert terms.keys() == {"l1", "kl"}


def test_terms_do_not_depend_on_how_the_batch_is_cut(coder: KLVAE, images: torch.Tensor) -> None:
    whole = klvae_terms(coder, images, draws())
    halves = [klvae_terms(coder, images[first : first + 2], replace(draws(), first=first, count=2)) for first in (0, 2)]
    for name, term in whole.items():
        torch.testing.assert_close((halves[0][name] + halves[1][name]) / 2, term)


def test_sizes_that_do_not_divide_and_autocast(coder: KLVAE, images: torch.Tensor) -> None:
    with torch.autocast("cpu", torch.bfloat16):
        terms = klvae_terms(coder, images[..., :13, :19], draws())
    assert {term.dtype for term in terms.values()} == {torch.float32}
    (terms["l1"] + KLVAEWeights().kl * terms["kl"]).backward()
    assert all(parameter.grad is not None for parameter in coder.parameters())


def test_a_few_iterations_lower_the_loss(coder: KLVAE, images: torch.Tensor) -> None:
    optimiser = torch.optim.AdamW(coder.parameters(), lr=3e-3)
    losses = []
    for _ in range(12):
        loss = klvae_terms(coder, images, draws())["l1"]
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]
