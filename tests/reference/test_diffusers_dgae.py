"""AutoencoderDGAE: a DGAE as a diffusers model, saved and read by either library, its noise drawn by generators."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny import smooth_images, untrained_dgae

import rac
from rac.coders.dgae import DGAE
from rac.errors import RacError
from rac.integrations.diffusers import AutoencoderDGAE, AutoencoderRAC
from rac.latents import Statistics


@pytest.fixture(scope="module")
def coder() -> DGAE:
    return untrained_dgae(0.05, statistics=Statistics.of(0.3, 0.5)).eval().requires_grad_(False)


@pytest.fixture(scope="module")
def vae(coder: DGAE) -> AutoencoderDGAE:
    return AutoencoderDGAE.from_dgae(coder)


def test_it_codes_as_its_coder_does_in_raw_latents(coder: DGAE, vae: AutoencoderDGAE) -> None:
    image = smooth_images(2, 16, 24)
    posterior = vae.encode(image).latent_dist
    assert torch.equal(posterior.mode(), coder.posterior(image).mean)
    assert torch.equal(posterior.std, coder.posterior(image).std)
    latent = coder.encode(image)
    raw_latent = coder.statistics.denormalise(latent)
    torch.testing.assert_close(vae.decode(raw_latent).sample, coder.decode(latent), rtol=1e-4, atol=1e-5)
    assert (vae.config.latent_channels, 2 ** (len(vae.config.block_out_channels) - 1)) == (4, 4)
    assert (vae.config.scaling_factor, vae.config.shift_factor) == (0.5, pytest.approx(0.3))


def test_generators_draw_the_noise(coder: DGAE, vae: AutoencoderDGAE) -> None:
    raw_latent = torch.randn(2, 4, 2, 3, generator=torch.Generator().manual_seed(0))

    def drawn(*seeds: int) -> torch.Tensor:
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        return vae.decode(raw_latent, generator=generators if len(seeds) > 1 else generators[0]).sample

    assert torch.equal(drawn(1, 2), drawn(1, 2))
    assert torch.equal(drawn(1, 2)[0], drawn(1, 3)[0])
    assert not torch.equal(drawn(1, 2)[1], drawn(1, 3)[1])
    assert not torch.equal(drawn(4), drawn(5))
    noise = torch.randn(2, 3, 8, 12, generator=torch.Generator().manual_seed(4))
    latent = coder.statistics.normalise(raw_latent)
    torch.testing.assert_close(drawn(4), coder.decode(latent, noise=noise), rtol=1e-4, atol=1e-5)
    assert torch.equal(vae.decode(raw_latent).sample, vae.decode(raw_latent).sample)


def test_steps_are_those_of_decoding(vae: AutoencoderDGAE) -> None:
    raw_latent = torch.zeros(1, 4, 2, 2)
    three, one = vae.decode(raw_latent).sample, vae.decode(raw_latent, num_inference_steps=1).sample
    assert vae.num_inference_steps == 3
    assert torch.equal(three, vae.decode(raw_latent, num_inference_steps=3).sample)
    assert not torch.equal(three, one)
    vae.encode(smooth_images(1, 16, 16), num_inference_steps=5)  # in one pass


def test_saved_by_either_and_read_by_either(coder: DGAE, vae: AutoencoderDGAE, tmp_path: Path) -> None:
    vae.save_pretrained(tmp_path)
    raw_latent = torch.randn(1, 4, 2, 2, generator=torch.Generator().manual_seed(0))
    again = AutoencoderDGAE.from_pretrained(tmp_path)
    torch.testing.assert_close(again.decode(raw_latent).sample, vae.decode(raw_latent).sample)
    loaded = rac.load(tmp_path)
    assert isinstance(loaded, DGAE)
    assert loaded.spec == coder.spec
    latent = coder.encode(smooth_images(1, 16, 16))
    assert torch.equal(loaded.decode(latent), coder.decode(latent))
    card = (tmp_path / "README.md").read_text()
    assert "diffusion-guided autoencoder" in card
    assert "4 channels at 1/4" in card
    rac.save(loaded, tmp_path / "own")
    assert torch.equal(rac.load(tmp_path / "own").decode(latent), coder.decode(latent))


def test_changed_default_steps_are_saved(coder: DGAE, tmp_path: Path) -> None:
    vae = AutoencoderDGAE.from_dgae(coder)
    vae.num_inference_steps = 7
    vae.save_pretrained(tmp_path)
    assert rac.load(tmp_path).default_steps("decode") == 7


def test_half_precision_tiles_and_slices(coder: DGAE) -> None:
    vae = AutoencoderDGAE.from_dgae(coder)
    image = smooth_images(2, 32, 32)
    whole = vae(image).sample
    vae.enable_slicing()
    torch.testing.assert_close(vae(image).sample, whole, atol=1e-5, rtol=0)
    vae.enable_tiling(16)
    assert vae(image).sample.shape == whole.shape
    vae.disable_tiling()
    vae.disable_slicing()
    half = vae.to(torch.bfloat16)(image.bfloat16()).sample
    assert half.dtype == torch.bfloat16
    assert float((half.float() - whole).abs().mean()) < 0.1
    sampled = vae(image.bfloat16(), sample_posterior=True, generator=torch.Generator().manual_seed(0)).sample
    assert not torch.equal(sampled, half)


def test_other_families_are_refused(make_rac) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(RacError, match="expected a DGAE"):
        AutoencoderDGAE.from_dgae(make_rac())
    with pytest.raises(RacError, match="expected a RAC"):
        AutoencoderRAC.from_rac(untrained_dgae())
