"""The named recipes."""

from __future__ import annotations

from dataclasses import replace

from ..coders.klvae import KLVAEConfig
from ..coders.taesd import POOLED_LATENT_STD
from ..data import DataConfig
from ..fields import CarriersFieldConfig, LdmFieldConfig, LocalFieldConfig, TinyFieldConfig
from ..objectives.klvae import KLVAEWeights
from ..objectives.rac import NANO, PAPER, RACObjective, RACWeights
from ..train import TrainConfig
from ..train.discriminator import DiscriminatorConfig
from .klvae import KLVAERecipe
from .rac import RACRecipe

Recipe = KLVAERecipe | RACRecipe

_ONE_CORE = TrainConfig(lr=1e-3, warmup=100, schedule="cosine", final_lr=0.05, bf16=True, channels_last=True, threads=1)
"""What the recipes for small machines have in common."""

_ONE_GPU = TrainConfig(
    warmup=100,
    schedule="cosine",
    final_lr=0.02,
    bf16=True,
    channels_last=True,
    workers=12,
    threads=1,  # of each worker, which would otherwise all want every core
    checkpoint_minutes=4.0,
    gallery_every=1_000,
    log_every=50,
)
"""What the recipes for one large GPU have in common; their iterations are guesses, `tools/offline` plans them anew."""

_AT_THE_ENDS = RACObjective(weights=RACWeights(velocity=1.0, latent_velocity=0.1), times="ends", latent_noise=0.3)
"""First stage of the local coders: velocity matching, most of it near the seed state and near the image."""


def _through(most: int) -> RACObjective:
    """Second stage of the local coders: the end point through 1 to `most` unrolled steps, with LPIPS."""
    return replace(
        _AT_THE_ENDS,
        weights=RACWeights(velocity=0.5, latent_velocity=0.1, reconstruction=1.0, latent=0.1, perceptual=0.05),
        steps=(1, most),
        random_grid=False,
        step_noise=0.02,
        memory="store",
    )


def klvae() -> KLVAERecipe:
    """The shipped teacher: f8, 8 channels, L1 + KL, on 64-pixel crops; about 40 minutes on one core."""
    return KLVAERecipe(
        network=KLVAEConfig(latent_channels=8),
        train=replace(_ONE_CORE, iterations=9_000, batch=16, final_lr=0.02),
    )


def klvae_sharp() -> KLVAERecipe:
    """A sharper decoder for the shipped teacher's own latents: L1 + LPIPS + a discriminator; needs LPIPS's weights."""
    return KLVAERecipe(
        network=KLVAEConfig(latent_channels=8),
        start="klvae-f8d8",
        train_encoder=False,
        weights=KLVAEWeights(l1=1.0, kl=0.0, perceptual=1.0, adversarial=0.2),
        discriminator=DiscriminatorConfig(start=500),
        data=DataConfig(cached_crops=10_000),
        train=replace(_ONE_CORE, iterations=4_000, batch=8, lr=3e-4),
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


def klvae_f8d4() -> KLVAERecipe:
    """First stage of the f8d4 teacher, the SD-VAE at a quarter of its widths: L1 + KL; an hour on one core."""
    return KLVAERecipe(
        network=KLVAEConfig(widths=(32, 64, 128, 128), layers_per_block=2, latent_channels=4, norm_groups=8),
        data=DataConfig(held_out=16),
        train=replace(_ONE_CORE, iterations=8_250, batch=8, lr=8e-4, final_lr=0.02),
    )


def klvae_f8d4_sharp() -> KLVAERecipe:
    """Second stage of that teacher, its decoder alone: L1 + LPIPS + a discriminator. Give the first as --start."""
    first = klvae_f8d4()
    return replace(
        klvae_sharp(),
        network=first.network,
        start="klvae-f8d4",
        data=replace(first.data, cached_crops=10_000),
        discriminator=DiscriminatorConfig(start=200),
        train=replace(first.train, iterations=1_500, lr=2e-4),
    )


def rac_64() -> RACRecipe:
    """First stage of the small coder of f8d4 latents: velocity matching at the ends of the flow; half an hour."""
    return RACRecipe(
        teacher="klvae-f8d4",
        field=LocalFieldConfig(widths=(96, 40, 20), blocks=(2, 1, 1), down=(16, 32), down_blocks=(0, 0)),
        state_channels=4,
        spread="beside",
        objective=_AT_THE_ENDS,
        data=DataConfig(cached_crops=40_000, held_out=32),
        train=replace(_ONE_CORE, iterations=9_000, batch=32, warmup=50, final_lr=0.05),
    )


def rac_64_rollout() -> RACRecipe:
    """Second stage: the end point through 1 to 8 unrolled steps, with LPIPS. Give the first stage as --start."""
    first = rac_64()
    return replace(
        first,
        objective=_through(8),
        data=replace(first.data, cached_crops=20_000),
        train=replace(first.train, iterations=1_500, batch=16, lr=4e-4, warmup=20, final_lr=0.02),
    )


def rac_64_sizes() -> RACRecipe:
    """Third stage: more LPIPS; against tints, block patterns and blur; on new crops of 64, 128 and 224 pixels in turn.
    Give the second stage as --start."""
    second = rac_64_rollout()
    weights = replace(second.objective.weights, perceptual=0.4, coarse=30.0, pattern=100.0, detail=5.0)
    return replace(
        second,
        objective=replace(second.objective, weights=weights),
        data=replace(second.data, further_sizes=(128, 224), cached_crops=0, keep_mb=1_536),
        train=replace(second.train, batch=6, lr=3e-4),
    )


def rac_taef2() -> RACRecipe:
    """A coder of TAEF2's latents, begun as its decoder; give the .pth file as --teacher; an hour on one core."""
    return RACRecipe(
        teacher="taef2_decoder.pth",
        start_from_teacher=True,
        field=LocalFieldConfig(
            widths=(64, 64, 64, 64),
            blocks=(3, 3, 3, 1),
            hidden=56,
            down=(24, 48, 64),
            down_blocks=(0, 0, 0),
            patch=1,
            clamp=3 / POOLED_LATENT_STD,
            pooled=True,
        ),
        state_channels=4,
        spread="beside",
        steps=1,
        objective=RACObjective(
            weights=RACWeights(velocity=1.0, latent_velocity=0.05, reconstruction=1.0, perceptual=0.05),
            steps=(1, 2),
            random_grid=False,
            step_noise=0.0,
            times="ends",
            memory="store",
        ),
        data=DataConfig(size=128, held_out=16),
        train=replace(_ONE_CORE, iterations=1_400, batch=4, lr=2e-4, warmup=50, ema=0.995, final_lr=0.03),
    )


def rac_taef2_sharp() -> RACRecipe:
    """Second stage: mostly LPIPS; an hour on one core. Give the .pth file as --teacher, the first stage as --start."""
    first = rac_taef2()
    weights = RACWeights(velocity=0.2, latent_velocity=0.02, reconstruction=1.0, perceptual=6.0)
    return replace(
        first,
        start_from_teacher=False,
        objective=replace(first.objective, weights=weights),
        data=replace(first.data, keep_mb=1_536),
        train=replace(first.train, iterations=4_000, lr=3e-4, ema=0.998),
    )


def rac_taef2_detail() -> RACRecipe:
    """Third stage: against tints and blur, on crops of 224, 128 and 256 pixels in turn; 15 minutes on one core. Give
    the .pth file as --teacher, the second stage as --start."""
    second = rac_taef2_sharp()
    weights = replace(second.objective.weights, coarse=100.0, detail=1000.0)
    return replace(
        second,
        objective=replace(second.objective, weights=weights, steps=(1, 1)),
        data=replace(second.data, size=224, further_sizes=(128, 256), smallest_crop=160, held_out=6),
        train=replace(second.train, iterations=800, batch=2, lr=1e-4, warmup=20, ema=0.995),
    )


def rac_256() -> RACRecipe:
    """First stage of the coder of TAEF2's latents both ways, begun as TAEF2; ten minutes on one core."""
    return RACRecipe(
        teacher="taef2",
        start_from_teacher=True,
        field=CarriersFieldConfig(clamp=3 / POOLED_LATENT_STD, pooled=True),
        state_channels=4,
        spread="beside",
        steps=2,
        objective=RACObjective(
            weights=RACWeights(reconstruction=1.0, latent=1.0, perceptual=1.0, coarse=30.0, detail=100.0),
            steps=(1, 4),
            last_steps=(2, 1),
            sharpen=0.5,
            random_grid=False,
            step_noise=0.0,
            latent_noise=0.2,
            memory="store",
        ),
        data=DataConfig(size=128, smallest_crop=112, held_out=16, keep_mb=1_024),
        train=replace(
            _ONE_CORE,
            schedule="constant",
            iterations=336,
            batch=4,
            lr=1e-4,
            betas=(0.9, 0.999),
            ema=0.998,
            final_lr=0.02,
        ),
    )


def rac_256_sharp() -> RACRecipe:
    """Second stage: sharper, at a falling rate; a quarter of an hour on one core. Give the first stage as --start."""
    first = rac_256()
    weights = replace(first.objective.weights, perceptual=1.5, detail=150.0)
    return replace(
        first,
        start_from_teacher=False,
        objective=replace(first.objective, weights=weights, sharpen=0.75),
        train=replace(first.train, schedule="cosine", iterations=520, warmup=20, ema=0.99, rng_seed=1),
    )


def klvae_128() -> KLVAERecipe:
    """An f8 teacher on 128-pixel crops, in one stage: L1 + KL + LPIPS, then a discriminator; minutes on a large GPU."""
    return KLVAERecipe(
        network=KLVAEConfig(widths=(32, 64, 128, 128), layers_per_block=2, latent_channels=4, norm_groups=8),
        weights=KLVAEWeights(l1=1.0, kl=1e-6, perceptual=1.0, adversarial=0.2),
        discriminator=DiscriminatorConfig(width=64, norm_groups=8, start=1_800),
        data=DataConfig(size=128, held_out=32, keep_mb=2_048),
        train=replace(_ONE_GPU, iterations=3_000, batch=128, lr=8e-4),
    )


def rac_128() -> RACRecipe:
    """First stage of a coder of that teacher's latents: velocity matching at the ends of the flow, on new crops."""
    return RACRecipe(
        teacher="klvae-128",
        field=LocalFieldConfig(widths=(192, 96, 48), blocks=(3, 2, 2), down=(32, 64), down_blocks=(0, 1)),
        state_channels=4,
        spread="beside",
        objective=_AT_THE_ENDS,
        data=DataConfig(size=128, held_out=32, keep_mb=2_048),
        train=replace(_ONE_GPU, iterations=5_000, batch=256, lr=1e-3),
    )


def rac_128_rollout() -> RACRecipe:
    """Second stage: the end point through 1 to 4 unrolled steps, with LPIPS. Give the first stage as --start."""
    first = rac_128()
    return replace(
        first,
        objective=_through(4),
        train=replace(first.train, iterations=2_000, batch=128, lr=4e-4, warmup=20),
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
    for recipe in (
        klvae,
        klvae_sharp,
        rac,
        rollout,
        one_step,
        klvae_f8d4,
        klvae_f8d4_sharp,
        rac_64,
        rac_64_rollout,
        rac_64_sizes,
        rac_taef2,
        rac_taef2_sharp,
        rac_taef2_detail,
        rac_256,
        rac_256_sharp,
        klvae_128,
        rac_128,
        rac_128_rollout,
        tiny,
        paper,
        nano,
    )
}
"""Name -> what it is for, and the recipe."""


def in_seconds(recipe: Recipe) -> Recipe:
    """The same recipe at a size that runs in seconds on a CPU, for trying it out and for tests."""
    return replace(
        recipe,
        discriminator=replace(recipe.discriminator, width=8, start=min(recipe.discriminator.start, 1)),
        data=replace(
            recipe.data,
            size=32,
            further_sizes=(64,)[: len(recipe.data.further_sizes)],
            held_out=2,
            cached_crops=min(recipe.data.cached_crops, 8),
        ),
        train=replace(recipe.train, iterations=3, batch=2, warmup=0, gallery_every=3, log_every=1),
    )
