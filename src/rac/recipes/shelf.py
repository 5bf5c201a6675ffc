"""The named recipes."""

from __future__ import annotations

from dataclasses import replace

from ..coders.klvae import KLVAEConfig
from ..data import DataConfig
from ..fields import LdmFieldConfig, TinyFieldConfig
from ..objectives.rac import NANO, PAPER, RACObjective
from ..train import TrainConfig
from .klvae import KLVAERecipe
from .rac import RACRecipe

Recipe = KLVAERecipe | RACRecipe


def klvae() -> KLVAERecipe:
    """The shipped teacher: f8, 8 channels, L1 + KL, on 64-pixel crops; about 40 minutes on one core."""
    return KLVAERecipe(
        network=KLVAEConfig(latent_channels=8),
        train=TrainConfig(
            iterations=9_000,
            batch=16,
            lr=1e-3,
            warmup=100,
            schedule="cosine",
            final_lr=0.02,
            bf16=True,
            channels_last=True,
            threads=1,
        ),
    )


def paper() -> RACRecipe:
    """The paper's preset: SD-VAE's latents, nearest spread, an SD-VAE decoder at 0.1 of its parameters, K = 4."""
    return RACRecipe(
        teacher="stabilityai/sd-vae-ft-ema",
        field=LdmFieldConfig.scaled(0.1),
        state_channels=4,
        spread="nearest",
        contraction="inverse",
        objective=RACObjective(weights=PAPER),
        data=DataConfig(size=256),
        train=TrainConfig(iterations=100_000, batch=16, bf16=True, channels_last=True),
    )


def nano() -> RACRecipe:
    """The preset of the authors' nano script: TAESD's latents, its decoder's shape, a learned projector."""
    return RACRecipe(
        teacher="madebyollin/taesd",
        field=TinyFieldConfig(position=True, taesd_range=True),
        state_channels=4,
        spread="nearest",
        contraction="projector",
        objective=RACObjective(weights=NANO, compare="state"),
        data=DataConfig(size=256),
        train=TrainConfig(iterations=100_000, batch=16, clip=0.0, weight_decay=0.01, ema=0.0),
    )


RECIPES: dict[str, tuple[str, Recipe]] = {
    recipe.__name__: (recipe.__doc__ or "", recipe()) for recipe in (klvae, paper, nano)
}
"""Name -> what it is for, and the recipe."""


def in_seconds(recipe: Recipe) -> Recipe:
    """The same recipe at a size that runs in seconds on a CPU, for trying it out and for tests."""
    return replace(
        recipe,
        data=replace(recipe.data, size=32, held_out=2, cached_crops=min(recipe.data.cached_crops, 8)),
        train=replace(recipe.train, iterations=3, batch=2, warmup=0, gallery_every=3, log_every=1),
    )
