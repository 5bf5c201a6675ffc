"""Presets of DiT^DH on the latents of a representation autoencoder (RAE, arXiv 2510.11690); the recipe is SiT's."""

from __future__ import annotations

from dataclasses import replace

from ..data import DataConfig
from ..fields import ddt
from ..flow.times import dimension_shift
from ..generators.sampling import Sampling
from ..objectives.flow import FlowObjective
from .recipe import ONE_CORE, ONE_GPU
from .sit import SiTRecipe

PUBLISHED_CODER = "nyu-visionx/RAE-dinov2-wReg-base-ViTXL-n08"
"""The paper's RAE: DINOv2-B with registers, decoder of size XL, as diffusers saves it."""

_SHIFT_128 = dimension_shift(112, 8, 8)


def dit_dh_128() -> SiTRecipe:
    """A small DiT^DH of ten classes on the latents of rae-128, at 128 pixels; one core. Give --coder, --data.paths."""
    return SiTRecipe(
        coder="rae-128",
        field=ddt("XS", classes=10),
        channels=112,
        factor=16,
        sample_posterior=False,
        objective=FlowObjective(shift=_SHIFT_128),
        sampling=Sampling(steps=25, guidance=1.5, shift=_SHIFT_128),
        data=DataConfig(size=128, smallest_crop=192, cached_crops=20_000, held_out=32),
        train=replace(ONE_CORE, iterations=16_000, batch=64, lr=5e-4, warmup=200, betas=(0.9, 0.95), ema=0.9995),
    )


def _published(size: str, epochs: int = 800) -> SiTRecipe:
    """Returns the settings of RAE's paper: ImageNet at 256 pixels, batches of 1,024, 1,251 of them an epoch.

    The learning rate falls along a half cosine, where the paper holds it for 40 epochs and lets it fall linearly.
    """
    shift = dimension_shift(768, 16, 16)
    return SiTRecipe(
        coder=PUBLISHED_CODER,
        field=ddt(size, classes=1000),
        channels=768,
        factor=16,
        sample_posterior=False,
        objective=FlowObjective(shift=shift),
        sampling=Sampling(steps=50, shift=shift),
        data=DataConfig(size=256, held_out=32),
        train=replace(
            ONE_GPU,
            iterations=epochs * 1_251,
            batch=1_024,
            lr=2e-4,
            final_lr=0.1,
            betas=(0.9, 0.95),
            warmup=0,
            ema=0.9995,
            bf16=False,
            gallery_every=5_000,
        ),
    )


def dit_dh_s() -> SiTRecipe:
    """DiT^DH-S for 14 epochs, the published guide of the larger ones. Give a folder of rac cache as --data.paths."""
    return _published("S", 14)


def dit_dh_b() -> SiTRecipe:
    """DiT^DH-B on the latents of RAE, settings as published. Give a folder of rac cache as --data.paths."""
    return _published("B")


def dit_dh_l() -> SiTRecipe:
    """DiT^DH-L on the latents of RAE, settings as published. Give a folder of rac cache as --data.paths."""
    return _published("L")


def dit_dh_xl() -> SiTRecipe:
    """DiT^DH-XL as published, on the latents of RAE. Give a folder of rac cache as --data.paths."""
    return _published("XL")
