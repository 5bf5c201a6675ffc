"""The named recipes."""

from __future__ import annotations

from dataclasses import replace

from ..coders.klvae import KLVAEConfig
from ..data import DataConfig
from ..fields import LdmFieldConfig, TinyFieldConfig
from ..objectives.rac import NANO, PAPER, RACObjective, RACWeights
from ..train import TrainConfig
from .klvae import KLVAERecipe
from .rac import RACRecipe

Recipe = KLVAERecipe | RACRecipe

_ONE_CORE = TrainConfig(lr=1e-3, warmup=100, schedule="cosine", final_lr=0.05, bf16=True, channels_last=True, threads=1)
"""What the recipes for small machines have in common."""


def klvae() -> KLVAERecipe:
    """The shipped teacher: f8, 8 channels, L1 + KL, on 64-pixel crops; about 40 minutes on one core."""
    return KLVAERecipe(
        network=KLVAEConfig(latent_channels=8),
        train=replace(_ONE_CORE, iterations=9_000, batch=16, final_lr=0.02),
    )


def rac() -> RACRecipe:
    """First stage of the shipped coder: velocity matching on the shipped teacher's latents; 15 minutes on one core."""
    return RACRecipe(
        teacher="klvae-f8d8",
        field=TinyFieldConfig(widths=(96, 64, 48), blocks=(3, 3, 2), patch=2),
        state_channels=8,
        spread="nearest",
        objective=RACObjective(weights=RACWeights(velocity=1.0)),
        data=DataConfig(cached_crops=30_000),
        train=replace(_ONE_CORE, iterations=4_500, batch=32),
    )


def rollout() -> RACRecipe:
    """Second stage: end-point and latent terms through 1 to 4 unrolled steps. Give the first stage as --start."""
    first = rac()
    return replace(
        first,
        objective=RACObjective(
            weights=RACWeights(velocity=1.0, reconstruction=1.0, latent=0.2, round_trip=1.0),
            steps=(1, 4),
            memory="store",
        ),
        data=replace(first.data, cached_crops=10_000),
        train=replace(first.train, iterations=1_000, batch=16, lr=3e-4, warmup=20, final_lr=0.02),
    )


def one_step() -> RACRecipe:
    """A plain decoder to compare with: the shipped coder's network, trained for a single step from latent to image."""
    first = rac()
    return replace(
        first,
        steps=1,
        objective=RACObjective(weights=RACWeights(reconstruction=1.0), steps=(1, 1), step_noise=0.0, memory="store"),
    )


def tiny() -> RACRecipe:
    """A small coder in five minutes on one core, for a first look: every kind of term, 1 to 2 unrolled steps."""
    return RACRecipe(
        teacher="klvae-f8d8",
        field=TinyFieldConfig(widths=(64, 48, 32), blocks=(2, 2, 1), patch=2),
        state_channels=8,
        spread="nearest",
        objective=RACObjective(
            weights=RACWeights(velocity=1.0, reconstruction=1.0, latent=1.0, round_trip=1.0),
            steps=(1, 2),
            memory="store",
        ),
        data=DataConfig(cached_crops=2_000),
        train=replace(_ONE_CORE, iterations=1_000, batch=16, ema=0.99, warmup=20, checkpoint_minutes=1.0),
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
    recipe.__name__.replace("_", "-"): (recipe.__doc__ or "", recipe())
    for recipe in (klvae, rac, rollout, one_step, tiny, paper, nano)
}
"""Name -> what it is for, and the recipe."""


def in_seconds(recipe: Recipe) -> Recipe:
    """The same recipe at a size that runs in seconds on a CPU, for trying it out and for tests."""
    return replace(
        recipe,
        data=replace(recipe.data, size=32, held_out=2, cached_crops=min(recipe.data.cached_crops, 8)),
        train=replace(recipe.train, iterations=3, batch=2, warmup=0, gallery_every=3, log_every=1),
    )
