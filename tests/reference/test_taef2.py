"""The TAESD family against diffusers' AutoencoderTiny, and against published figures where the weights are at hand."""

from __future__ import annotations

import os
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import rac
from rac.coders.adapter import TinyCoder
from rac.coders.taesd import TAESD, TAESDConfig
from rac.images import from_pixels

SHARED = Path(os.environ.get("RAC_DATA_DIR", Path(__file__).parents[3] / "shared"))
WEIGHTS = SHARED / "weights" / "taef2_encoder.pth"
PHOTOGRAPHS = SHARED / "data" / "imagenet-dev-256.tar"

needs_weights = pytest.mark.skipif(not WEIGHTS.is_file(), reason=f"the TAEF2 weights are not in {WEIGHTS.parent}")
needs_photographs = pytest.mark.skipif(not PHOTOGRAPHS.is_file(), reason=f"{PHOTOGRAPHS} is not at hand")


@pytest.mark.parametrize("latent_channels", [4, 16])
def test_agrees_with_autoencoder_tiny(latent_channels: int) -> None:
    ours = TAESD(TAESDConfig(latent_channels)).eval()
    theirs = TinyCoder.from_config({"latent_channels": latent_channels}).eval()
    theirs.network.encoder.layers.load_state_dict(ours.network.encoder.state_dict())
    # diffusers keeps the soft clamp outside its layers, so its count begins one later
    decoder = {_one_less(name): tensor for name, tensor in ours.network.decoder.state_dict().items()}
    theirs.network.decoder.layers.load_state_dict(decoder)
    image = torch.rand(1, 3, 32, 48) * 2 - 1
    latent = ours.encode(image)
    torch.testing.assert_close(latent, theirs.encode(image))
    torch.testing.assert_close(ours.decode(4 * latent), theirs.decode(4 * latent))


@needs_weights
def test_taef2_is_recognised() -> None:
    coder = rac.load(WEIGHTS)
    assert coder.config == {"_class_name": "TAESD", "latent_channels": 32, "pooled": True, "width": 64}
    assert sum(parameter.numel() for parameter in coder.parameters()) == 2_677_027


@needs_weights
def test_taef2_gives_black_and_white_back() -> None:
    coder = rac.load(WEIGHTS)
    for value in (-1.0, 1.0):
        square = torch.full((1, 3, 64, 64), value)
        assert (coder.reconstruct(square) - square).abs().mean() < 0.05


@needs_weights
@needs_photographs
@pytest.mark.parametrize(
    ("size", "psnr", "ssim"),
    [(64, 25.16, 0.845), pytest.param(128, 27.32, 0.870, marks=pytest.mark.slow)],
)
def test_taef2_reaches_its_published_figures(size: int, psnr: float, ssim: float) -> None:
    """The figures were published for other ImageNet photographs, so they agree as well as two samples of them do.

    A mistaken pixel range costs more than 5 dB. The published SSIM is scikit-image's, with its uniform window.
    """
    structural_similarity = pytest.importorskip("skimage.metrics").structural_similarity
    coder, images = rac.load(WEIGHTS), _photographs(size)
    with torch.no_grad():
        latents = torch.cat([coder.encode(image) for image in images.split(4)])
        decoded = torch.cat([coder.decode(latent) for latent in latents.split(4)]).clamp(-1, 1)
    error = (decoded - images).div(2).square().mean(dim=(1, 2, 3))
    assert -10 * error.log10().mean().item() == pytest.approx(psnr, abs=0.6)
    # from 0 up, as SSIM's luminance term wants it
    pairs = zip((images + 1).numpy(), (decoded + 1).numpy(), strict=True)
    similarity = [structural_similarity(*pair, channel_axis=0, data_range=2.0) for pair in pairs]
    assert np.mean(similarity) == pytest.approx(ssim, abs=0.015)
    assert latents.square().mean().sqrt().item() == pytest.approx(1.0, abs=0.1)


def _one_less(name: str) -> str:
    index, rest = name.split(".", 1)
    return f"{int(index) - 1}.{rest}"


def _photographs(size: int) -> torch.Tensor:
    with tarfile.open(PHOTOGRAPHS) as tar:
        files = [tar.extractfile(member) for member in tar.getmembers() if member.isfile()]
        pictures = [Image.open(file).convert("RGB").resize((size, size), Image.Resampling.LANCZOS) for file in files]
    return torch.cat([from_pixels(np.asarray(picture)) for picture in pictures])
