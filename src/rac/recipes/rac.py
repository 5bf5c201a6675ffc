"""Training a RAC on a frozen teacher: the recipe, its task, and its presets."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from .. import hub, runtime
from ..coders.protocol import Coder
from ..coders.rac import RAC, RACConfig
from ..coders.taesd import POOLED_LATENT_STD
from ..coders.warm_start import copy_decoder
from ..data import Batch, DataConfig, Latents, open_stream
from ..draws import Draws
from ..errors import RacError
from ..evaluate.image_sets import ImageSet
from ..evaluate.reconstruction import measure
from ..fields import FieldConfig, LdmFieldConfig, LocalFieldConfig, TinyFieldConfig
from ..objectives.image_terms import ADVERSARIAL
from ..objectives.rac import NANO, PAPER, Coding, RACObjective, RACWeights, rac_terms
from ..states import Spread
from ..train import Fitted, TrainConfig, fit
from ..train.adversary import LossNetworks, last_layer
from ..train.discriminator import DiscriminatorConfig
from ..train.processes import Processes
from ..train.task import Adversary
from .recipe import HELD_OUT, ONE_CORE, ONE_GPU, check_weights, gallery


@dataclass(frozen=True)
class RACRecipe:
    """A RAC on images and a teacher."""

    teacher: str
    """A shipped name, a directory, a TAESD-family .pth file, or a name on the hub."""
    field: FieldConfig = dataclasses.field(default_factory=TinyFieldConfig)
    state_channels: int = 4
    """C of the states B C H W, the image's three among them."""
    spread: Spread = "shuffle"
    """How a latent is laid out in the seed state; see `rac.states.StateSpec`."""
    contraction: Literal["inverse", "projector"] = "inverse"
    """How a seed state becomes a latent: by the spread's own inverse, or by a learned projector."""
    steps: int = 4
    """Steps the finished coder takes where none are asked for."""
    seed_noise: float = 0.0
    """Noise in the sites of the seed state that the latent leaves free; see `RACConfig`."""
    start: str | None = None
    """A RAC to start from (same field and states), instead of random weights: a second stage of training."""
    start_from_teacher: bool = False
    """Start from the weights of the teacher's decoder, as far as the field has layers of that kind: TAESD-family
    teachers, `local` fields, spread `beside`."""
    objective: RACObjective = dataclasses.field(default_factory=RACObjective)
    discriminator: DiscriminatorConfig = dataclasses.field(default_factory=DiscriminatorConfig)
    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    train: TrainConfig = dataclasses.field(default_factory=TrainConfig)

    def run(self, directory: Path, *, resume: bool = False, crops: Path | None = None) -> Fitted:
        """Train in `directory`; `directory`/coder holds the result. See `rac.train.fit`.

        Prepared crops, if any, are kept in the folder `crops`; `directory`.crops where none is named.

        Raises `RacError` for sizes that do not fit the teacher's factor, and for a start of another shape, and
        `WeightsError` where LPIPS is wanted and its weights are not found.
        """
        weights = self.objective.weights
        loss_networks = LossNetworks.build(
            weights.perceptual, weights.adversarial, self.discriminator, self.train.rng_seed
        )
        teacher = hub.load(self.teacher)
        factor = teacher.spec.factor
        for size in self.data.sizes:
            if size % factor:
                raise RacError(f"size {size} must be a multiple of the teacher's factor {factor}")
        device = runtime.pick_device(self.train.device)
        with Processes.join(self.train.device, 60 * self.train.patience_minutes).in_turn():
            stream = open_stream(
                self.data,
                self.train.rng_seed,
                batch=self.train.batch,
                cache=crops or directory.parent / f"{directory.name}.crops",
                latents=Latents(teacher.to(device), self.teacher, device),
            )
        torch.manual_seed(runtime.derived_seed(self.train.rng_seed, "weights"))
        coder = self._coder(teacher)
        if self.train.compile:
            coder.field.compile()  # in place; the averaged copy and what is saved stay plain
        task = RACTask(coder, teacher, self.objective, loss_networks)
        return fit(task, stream, self.train, directory, recipe=self, resume=resume)

    def _coder(self, teacher: Coder) -> RAC:
        config = RACConfig(
            spec=teacher.spec,
            field=self.field,
            state_channels=self.state_channels,
            spread=self.spread,
            contraction=self.contraction,
            teacher=self.teacher,
            steps=self.steps,
            seed_noise=self.seed_noise,
        )
        if self.start is None:
            coder = RAC(config, teacher.statistics)
            if self.start_from_teacher:
                copy_decoder(teacher, coder)
            return coder
        start = hub.load(self.start)
        if not isinstance(start, RAC):
            raise RacError(f"start {self.start} is no RAC; give one that an earlier stage trained")
        if replace(start.config, teacher=config.teacher, steps=config.steps) != config:
            raise RacError(f"start {self.start} has another field, other states or other latents; give the ones it has")
        return start.requires_grad_(True)


@dataclass
class RACTask:
    """Trains a RAC to imitate a frozen teacher."""

    module: RAC
    teacher: Coder
    """Never trained, though gradients flow through its decoder."""
    objective: RACObjective
    loss_networks: LossNetworks = dataclasses.field(default_factory=LossNetworks)

    def __post_init__(self) -> None:
        check_weights(self.weights)

    @property
    def frozen(self) -> Sequence[nn.Module]:
        """See `Task`."""
        return (self.teacher, *self.loss_networks.frozen)

    @property
    def weights(self) -> Mapping[str, float]:
        """See `Task`."""
        return {name: weight for name, weight in self.objective.weights.chosen().items() if name != ADVERSARIAL}

    @property
    def adversary(self) -> Adversary | None:
        """See `Task`."""
        return self.loss_networks.adversary(last_layer(self.module.field), self.objective.weights.adversarial)

    def terms(self, batch: Batch, draws: Draws, iteration: int) -> dict[str, Tensor]:
        """See `Task`."""
        images, latents = batch.need("images"), batch.latents
        if latents is None:
            with torch.no_grad():
                latents = self.teacher.encode(images)
        module = self.module
        losses = self.loss_networks.losses(iteration)
        seed_noise = module.config.seed_noise
        coding = Coding(module.field, module.states, module.contract, self.teacher.decode, losses, seed_noise)
        return rac_terms(coding, images, latents, self.objective, draws)

    def gallery(self, module: nn.Module, images: Tensor) -> tuple[Tensor, dict[str, float]]:
        """Columns: original; teacher; RAC from the teacher's latent at one step, and at its own number where that is
        another; RAC alone.

        `psnr` is that of the last column but one, `explained_variance` that of the teacher's latents by RAC's.
        """
        assert isinstance(module, RAC)
        latents, steps = self.teacher.encode(images), module.config.steps
        decoded, steps_taken = module.decode(latents), f"{steps} step" + "s" * (steps > 1)
        picture = gallery(
            {
                "original": images,
                "teacher": self.teacher.decode(latents),
                "RAC, teacher's latent, 1 step": module.decode(latents, 1),
                f"RAC, teacher's latent, {steps_taken}": decoded,
                f"RAC alone, {steps_taken}": module.reconstruct(images),
            }
        )
        held_out, given = ImageSet.of(images, "held out"), replace(HELD_OUT, latents="teacher")
        one_step = replace(given, steps=1)
        alone = replace(HELD_OUT, metrics=("psnr", "explained-variance"))
        own = measure(module, held_out, alone, teacher=self.teacher).metrics
        return picture, {
            "psnr_teacher": measure(self.teacher, held_out, HELD_OUT).metrics["psnr"],
            "psnr_1_step": measure(module, held_out, one_step, teacher=self.teacher).metrics["psnr"],
            "psnr": measure(module, held_out, given, teacher=self.teacher).metrics["psnr"],
            "psnr_round_trip": own["psnr"],
            "explained_variance": own["explained variance"],
            **self.loss_networks.metrics(decoded, images),
        }

    def save(self, module: nn.Module, directory: Path) -> None:
        """See `Task`."""
        assert isinstance(module, RAC)
        module.save(directory)


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


def rac() -> RACRecipe:
    """First stage of the shipped coder: velocity matching on the shipped teacher's latents; 15 minutes on one core."""
    return RACRecipe(
        teacher="klvae-f8d8",
        field=TinyFieldConfig(widths=(96, 64, 48), blocks=(3, 3, 2), patch=2),
        state_channels=8,
        spread="nearest",
        objective=RACObjective(weights=RACWeights(velocity=1.0)),
        data=DataConfig(cached_crops=30_000),
        train=replace(ONE_CORE, iterations=4_500, batch=32),
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


def rac_64() -> RACRecipe:
    """First stage of the small coder of f8d4 latents: velocity matching at the ends of the flow; half an hour."""
    return RACRecipe(
        teacher="klvae-f8d4",
        field=LocalFieldConfig(widths=(96, 40, 20), blocks=(2, 1, 1), down=(16, 32), down_blocks=(0, 0)),
        state_channels=4,
        spread="beside",
        objective=_AT_THE_ENDS,
        data=DataConfig(cached_crops=40_000, held_out=32),
        train=replace(ONE_CORE, iterations=9_000, batch=32, warmup=50, final_lr=0.05),
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
        train=replace(ONE_CORE, iterations=1_400, batch=4, lr=2e-4, warmup=50, ema=0.995, final_lr=0.03),
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


def rac_128() -> RACRecipe:
    """First stage of a coder of that teacher's latents: velocity matching at the ends of the flow, on new crops."""
    return RACRecipe(
        teacher="klvae-128",
        field=LocalFieldConfig(widths=(192, 96, 48), blocks=(3, 2, 2), down=(32, 64), down_blocks=(0, 1)),
        state_channels=4,
        spread="beside",
        objective=_AT_THE_ENDS,
        data=DataConfig(size=128, held_out=32, keep_mb=2_048),
        train=replace(ONE_GPU, iterations=5_000, batch=256, lr=1e-3),
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
        train=replace(ONE_CORE, iterations=1_000, batch=16, ema=0.99, warmup=20, checkpoint_minutes=1.0),
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
