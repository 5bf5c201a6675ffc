"""Training of a RAC on a frozen teacher: the recipe, its task, and its presets."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from .. import hub, runtime
from ..coders.protocol import Coder
from ..coders.rac import RAC, RACConfig
from ..coders.taesd import POOLED_LATENT_STD
from ..coders.warm_start import start_from
from ..data import Batch, DataConfig, Stream
from ..draws import Draws
from ..errors import RacError
from ..evaluate.cost import CostRow, flow_row
from ..evaluate.latent_metrics import LatentAgreement
from ..fields import (
    CarriersFieldConfig,
    FieldConfig,
    LdmFieldConfig,
    LocalFieldConfig,
    TinyFieldConfig,
    UNetFieldConfig,
)
from ..flow import Euler, MeanEuler
from ..flow.grid import steps_in_words
from ..objectives.rac import NANO, PAPER, Coding, RACObjective, RACWeights, rac_terms
from ..states import Spread
from ..train import Fitted, PartTerms, Task, TrainConfig
from ..train.adversary import ImageNetworks
from ..train.discriminator import DiscriminatorConfig
from .recipe import (
    ONE_CORE,
    ONE_GPU,
    SMALL_UNET,
    check_latents,
    coder_parts,
    coder_terms,
    gallery,
    mean_psnr,
    prepared_from,
    run_recipe,
    tiny_data,
    tiny_discriminator,
    tiny_train,
    with_latents,
)


@dataclass(frozen=True)
class RACRecipe:
    """Recipe that trains a RAC on images and a teacher."""

    product: ClassVar[str] = "coder"
    steps_field: ClassVar[str | None] = "steps"

    teacher: str
    """The teacher: a shipped name, a directory, a TAESD-family .pth file, or a name on the hub."""
    field: FieldConfig = dataclasses.field(default_factory=TinyFieldConfig)
    state_channels: int = 4
    """Number of channels C of the states B C H W, including the three of the image."""
    spread: Spread = "shuffle"
    """Layout of a latent in the seed state: one of those that `rac.states.StateSpec` describes."""
    contraction: Literal["inverse", "projector"] = "inverse"
    """How a seed state becomes a latent: by the inverse of the spread, or by a learned projector."""
    steps: int = 4
    """Default number of steps of the finished coder."""
    seed_noise: float = 0.0
    """Standard deviation of Gaussian noise in the parts of the seed state that the latent does not fill."""
    start: str | None = None
    """A RAC of the same field and states to start from, instead of random weights: a second stage of training."""
    start_from_teacher: bool = False
    """Start from the weights of the teacher where the field has the same layers. Needs a teacher of the TAESD family
    and spread `beside`; `carriers` fields take the weights of its encoder and decoder, `local` ones those of its
    decoder."""
    objective: RACObjective = dataclasses.field(default_factory=RACObjective)
    discriminator: DiscriminatorConfig = dataclasses.field(default_factory=DiscriminatorConfig)
    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    train: TrainConfig = dataclasses.field(default_factory=TrainConfig)

    @property
    def latents_of(self) -> str:
        """Name of the teacher, whose latents are trained on."""
        return self.teacher

    def prepares(self) -> dict[str, Any]:
        """Returns everything that prepared crops depend on, as JSON."""
        return prepared_from(self)

    def task(self, coder: Coder | None = None) -> RACTask:
        """Builds the networks and the task that trains them; `coder`, with its own teacher, may replace the network.

        Raises `RacError` for sizes that do not fit the teacher's factor or the discriminator, and for a start of
        another shape; `WeightsError` where LPIPS is wanted and its weights are not found.
        """
        weights = asdict(self.objective.weights)
        networks = ImageNetworks.build(
            weights, self.discriminator, self.train.rng_seed, "objective.weights", self.data.sizes
        )
        name = self.teacher if coder is None else coder.teacher
        if name is None:
            raise RacError("the coder names no teacher, so it cannot be trained on one's latents")
        teacher = hub.load(name)
        for size in self.data.sizes:
            if size % teacher.spec.factor:
                raise RacError(f"size {size} must be a multiple of the teacher's factor {teacher.spec.factor}")
        torch.manual_seed(runtime.derived_seed(self.train.rng_seed, "weights"))
        module = self._coder(teacher) if coder is None else coder.requires_grad_(True)
        if not isinstance(module, RAC):
            raise RacError(f"this recipe trains a RAC, not a {type(module).__name__}")
        if self.train.compile:
            module.field.compile()  # in place; the averaged copy and what is saved stay plain
        return RACTask(module, teacher, self.objective, networks)

    def trains(self, coder: Coder) -> bool:
        """Returns whether `task` accepts this coder."""
        return isinstance(coder, RAC)

    def costs(self, name: str, side: int) -> list[CostRow]:
        """Counts parameters and MACs of the field, for images of `side` x `side`."""
        field = self.field.build(self.state_channels, self.field.factor)
        return [flow_row(f"{name} field", field, self.state_channels, self.steps, side)]

    def tiny(self) -> RACRecipe:
        """Returns the same recipe at a size that runs in seconds on a CPU."""
        return replace(
            self,
            discriminator=tiny_discriminator(self.discriminator),
            data=tiny_data(self.data),
            train=tiny_train(self.train),
        )

    def run(self, directory: Path, *, resume: bool = False, crops: Path | None = None) -> Fitted:
        """Trains in `directory`; `directory`/coder holds the result.

        `resume` continues the run in `directory` from its newest checkpoint. Prepared crops, if any, are kept in the
        folder `crops`, by default `directory`.crops. Warns of a teacher whose latents are far from mean 0 and deviation
        1. Raises as `task`, and as `rac.train.fit`.
        """

        def look(task: Task, stream: Stream) -> None:
            assert task.encoder is not None
            check_latents(task.encoder, self.teacher, stream.batch(0, self.train.batch))

        return run_recipe(self, directory, resume=resume, crops=crops, look=look)

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
                start_from(teacher, coder)
            return coder
        start = hub.load(self.start)
        if not isinstance(start, RAC):
            raise RacError(f"start {self.start} is not a RAC; give one that an earlier stage trained")
        if replace(start.config, teacher=config.teacher, steps=config.steps) != config:
            raise RacError(f"start {self.start} has another field, other states or other latents; give the ones it has")
        return start.requires_grad_(True)


@dataclass
class RACTask:
    """Task that trains a RAC to imitate a frozen teacher."""

    module: RAC
    teacher: Coder
    """The frozen teacher; gradients flow through its decoder."""
    objective: RACObjective
    networks: ImageNetworks = dataclasses.field(default_factory=ImageNetworks)

    def __post_init__(self) -> None:
        self.parts = coder_parts(self.module, self.objective.weights.chosen(), self.networks, "field")

    @property
    def frozen(self) -> Sequence[nn.Module]:
        """The teacher, and LPIPS if its term has a weight."""
        return (self.teacher, *self.networks.frozen)

    @property
    def encoder(self) -> Coder:
        """The teacher, whose latents come with the batches."""
        return self.teacher

    def prepare(self, batch: Batch) -> Batch:
        """Encodes the images of a batch that came without latents, by the teacher."""
        return with_latents(batch, self.teacher)

    def terms(self, batch: Batch, draws: Draws, iteration: int) -> Iterator[PartTerms]:
        """Yields the terms of `rac_terms`."""
        module, losses = self.module, self.networks.losses(iteration)
        seed_noise = module.config.seed_noise
        solver = MeanEuler() if module.config.field.interval else Euler()
        coding = Coding(module.field, module.states, module.contract, self.teacher.decode, losses, seed_noise, solver)
        yield from coder_terms(rac_terms(coding, batch.need("images"), batch.need("latents"), self.objective, draws))

    def gallery(self, modules: Mapping[str, nn.Module], images: Tensor) -> tuple[Tensor, dict[str, float]]:
        """Returns a picture of originals and reconstructions, and their metrics.

        Its columns: original; teacher; RAC from the teacher's latent at one step, and at its own number where that is
        another; RAC alone. `psnr` is that of the last column but one, `explained_variance` that of the teacher's
        latents by RAC's.
        """
        coder = modules["coder"]
        assert isinstance(coder, RAC)
        steps, agreement = coder.config.steps, LatentAgreement()
        with runtime.reproducible():
            latents, own_latents = self.teacher.encode(images), coder.encode(images)
            agreement.update(own_latents, latents)
            places = range(len(images))  # of coders that decode from noise, each image has its own
            by_teacher = self.teacher.decode(latents, noise=self.teacher.noise_of(latents, places))
            noise = coder.noise_of(latents, places)
            one_step = coder.decode(latents, 1, noise=noise)
            decoded = one_step if steps == 1 else coder.decode(latents, noise=noise)
            alone = coder.decode(own_latents, noise=noise)
            metrics = {
                "psnr_teacher": mean_psnr(by_teacher, images),
                "psnr_1_step": mean_psnr(one_step, images),
                "psnr": mean_psnr(decoded, images),
                "psnr_round_trip": mean_psnr(alone, images),
                "explained_variance": float(agreement.explained_variance().mean()),
                **self.networks.metrics(decoded, images),
            }
        steps_taken = steps_in_words(steps)
        picture = gallery(
            {
                "original": images,
                "teacher": by_teacher,
                "RAC, teacher's latent, 1 step": one_step,
                f"RAC, teacher's latent, {steps_taken}": decoded,
                f"RAC alone, {steps_taken}": alone,
            }
        )
        return picture, metrics

    def save(self, modules: Mapping[str, nn.Module], stream: Stream, directory: Path) -> None:
        """Writes the coder to `directory`."""
        coder = modules["coder"]
        assert isinstance(coder, RAC)
        coder.save(directory)


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
    """Second stage of the small coder: the end point through 1 to 8 steps, with LPIPS. Give the first as --start."""
    first = rac_64()
    return replace(
        first,
        objective=_through(8),
        data=replace(first.data, cached_crops=20_000),
        train=replace(first.train, iterations=1_500, batch=16, lr=4e-4, warmup=20, final_lr=0.02),
    )


def rac_64_sizes() -> RACRecipe:
    """Third stage of the small coder: fewer tints, less blur; 64, 128 and 224 pixels. Give the second as --start."""
    second = rac_64_rollout()
    weights = replace(second.objective.weights, perceptual=0.4, coarse=30.0, pattern=100.0, detail=5.0)
    return replace(
        second,
        objective=replace(second.objective, weights=weights),
        data=replace(second.data, further_sizes=(128, 224), cached_crops=0, keep_mb=1_536),
        train=replace(second.train, batch=6, lr=3e-4),
    )


def rac_taef2() -> RACRecipe:
    """A coder of TAEF2's latents that only decodes and starts as TAEF2's decoder; an hour on one core."""
    return RACRecipe(
        teacher="taef2",
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
    """Second stage of the TAEF2 coder: mostly LPIPS; an hour on one core. Give the first as --start."""
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
    """Third stage of the TAEF2 coder: fewer tints, less blur; 128 to 256 pixels. Give the second as --start."""
    second = rac_taef2_sharp()
    weights = replace(second.objective.weights, coarse=100.0, detail=1000.0)
    return replace(
        second,
        objective=replace(second.objective, weights=weights, steps=(1, 1)),
        data=replace(second.data, size=224, further_sizes=(128, 256), smallest_crop=160, held_out=6),
        train=replace(second.train, iterations=800, batch=2, lr=1e-4, warmup=20, ema=0.995),
    )


def rac_256() -> RACRecipe:
    """First stage of rac-256, a coder of TAEF2's latents that starts as TAEF2; ten minutes on one core."""
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
            ONE_CORE,
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
    """Second stage of the coder rac-256: sharper; 15 minutes on one core. Give the first as --start."""
    first = rac_256()
    weights = replace(first.objective.weights, perceptual=1.5, detail=150.0)
    return replace(
        first,
        start_from_teacher=False,
        objective=replace(first.objective, weights=weights, sharpen=0.75),
        train=replace(first.train, schedule="cosine", iterations=520, warmup=20, ema=0.99, rng_seed=1),
    )


def rac_256_long() -> RACRecipe:
    """Third stage of the coder rac-256, by Muon: what steps bring; an hour on one core. Give the second as --start."""
    second = rac_256_sharp()
    return replace(
        second,
        data=replace(second.data, smallest_crop=96, largest_crop=192),
        train=replace(
            second.train,
            optimizer="muon",
            lr=1.5e-4,
            iterations=2_000,
            warmup=50,
            ema=0.998,
            rng_seed=3,
            gallery_every=200,
        ),
    )


def rac_128() -> RACRecipe:
    """First stage of a coder of klvae-128's latents: velocity matching at the ends of the flow, on new crops."""
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
    """Second stage of the klvae-128 coder: the end point through 1 to 4 steps, LPIPS. Give the first as --start."""
    first = rac_128()
    return replace(
        first,
        objective=_through(4),
        train=replace(first.train, iterations=2_000, batch=128, lr=4e-4, warmup=20),
    )


def decoder_plain() -> RACRecipe:
    """A plain decoder of klvae-f8d4's latents: a small U-Net, one step; see decoder-rac and decoder-dgae."""
    return RACRecipe(
        teacher="klvae-f8d4",
        field=UNetFieldConfig(network=SMALL_UNET),
        state_channels=4,
        spread="beside",
        steps=1,
        objective=RACObjective(
            weights=RACWeights(reconstruction=1.0, perceptual=1.0),
            steps=(1, 1),
            random_grid=False,
            step_noise=0.0,
            memory="store",
        ),
        data=DataConfig(cached_crops=20_000, held_out=32),
        train=replace(ONE_CORE, iterations=5_000, batch=8, lr=4e-4),
    )


def decoder_rac() -> RACRecipe:
    """A RAC of the same network and latents as decoder-plain: velocity matching, and 1 to 4 steps unrolled."""
    weights = RACWeights(velocity=1.0, latent_velocity=0.1, reconstruction=1.0, perceptual=1.0)
    plain = decoder_plain()
    objective = replace(plain.objective, weights=weights, steps=(1, 4), step_noise=0.02, times="ends")
    return replace(plain, steps=4, objective=objective)


def decoder_rac_noise() -> RACRecipe:
    """A RAC that decodes as a DGAE does: decoder-rac with noise in its seed's free sites; velocity matching alone."""
    rac = decoder_rac()
    weights = RACWeights(velocity=1.0, latent_velocity=0.1)
    return replace(rac, steps=8, seed_noise=1.0, objective=replace(rac.objective, weights=weights, times="uniform"))


def rac_rae_128() -> RACRecipe:
    """A RAC of rae-128's latents, a step as costly as that decoder; an hour on one core. Give --teacher."""
    return RACRecipe(
        teacher="rae-128",
        field=LocalFieldConfig(widths=(128, 80, 40, 20), blocks=(2, 1, 1, 1), down=(16, 32, 48), down_blocks=(0, 0, 0)),
        state_channels=4,
        spread="beside",
        objective=_AT_THE_ENDS,
        data=DataConfig(size=128, smallest_crop=192, held_out=32, keep_mb=1_024),
        train=replace(ONE_CORE, iterations=6_000, batch=16, warmup=50, final_lr=0.05),
    )


def rac_rae_128_rollout() -> RACRecipe:
    """Second stage of the RAC of rae-128: 1 to 4 unrolled steps, LPIPS. Give --teacher, and the first as --start."""
    first = rac_rae_128()
    return replace(
        first,
        objective=_through(4),
        train=replace(first.train, iterations=800, batch=8, lr=4e-4, warmup=20, final_lr=0.02),
    )


def tiny() -> RACRecipe:
    """A small coder in five minutes on one core, for a first look: every kind of term, 1 to 2 unrolled steps."""
    return RACRecipe(
        teacher="klvae-f8d4",
        field=LocalFieldConfig(widths=(64, 32, 16), blocks=(2, 1, 1), down=(16, 32), down_blocks=(0, 0)),
        state_channels=4,
        spread="beside",
        objective=RACObjective(
            weights=RACWeights(velocity=1.0, latent_velocity=0.1, reconstruction=1.0, latent=0.1, round_trip=1.0),
            steps=(1, 2),
            times="ends",
            memory="store",
        ),
        data=DataConfig(cached_crops=2_000),
        train=replace(ONE_CORE, iterations=1_600, batch=16, ema=0.99, warmup=20, checkpoint_minutes=1.0),
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
