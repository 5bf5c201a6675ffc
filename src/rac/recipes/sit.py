"""Training of a SiT or a DiT^DH on the latents of a frozen coder, alone or with REPA: the recipe, its task, presets."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from .. import hub, runtime
from ..coders.protocol import Coder
from ..data import Batch, DataConfig, Stream, open_stream
from ..data.class_words import in_words
from ..data.stream import Want
from ..draws import Draws
from ..errors import RacError
from ..evaluate.cost import CostRow, count
from ..fields import LatentFieldConfig, sit
from ..generators.flow import FlowGenerator, FlowGeneratorConfig
from ..generators.sample import Source, Wanted
from ..generators.sampling import Sampling
from ..latents import LatentSpec
from ..objectives.flow import FlowObjective, FlowSample, flow_sample, velocity_error
from ..representations import Targets
from ..train import Fitted, Part, PartTerms, Task, TrainConfig
from .alignment import Aligned, AlignmentConfig, with_features
from .recipe import (
    ONE_CORE,
    ONE_GPU,
    check_latents,
    gallery,
    prepared_from,
    run_recipe,
    tiny_data,
    tiny_train,
    with_latents,
)

SHOWN_CLASSES, SHOWN_SEEDS = 8, 2
"""Most classes, and number of samples of each, in a gallery."""

HELD_OUT_DRAWS = 8
"""Number of times and noises with which each held-out latent is tried."""


@dataclass(frozen=True)
class SiTRecipe:
    """Recipe that trains a SiT or a DiT^DH on the latents of a coder, and the labels of their pictures.

    Latents have to be prepared: by `rac cache`, or by `data.cached_crops`. With a representation to align with (REPA),
    so are its features; where `rac cache` prepared none, they are computed of the images in each iteration.
    """

    product: ClassVar[str] = "generator"
    steps_field: ClassVar[str | None] = None

    coder: str
    """The coder of the latents: a shipped name, a directory, a TAESD-family .pth file, or a name on the hub."""
    field: LatentFieldConfig
    """The network; its number of classes must be that of the pictures, or 0 to leave their labels alone."""
    channels: int = 4
    """Channels of the coder's latents."""
    factor: int = 8
    """Downsampling factor of the coder."""
    sample_posterior: bool = True
    """Draw the latents anew from the coder's posterior each time, where it has one (`rac cache --moments`)."""
    objective: FlowObjective = dataclasses.field(default_factory=FlowObjective)
    align: AlignmentConfig = dataclasses.field(default_factory=AlignmentConfig)
    sampling: Sampling = dataclasses.field(default_factory=Sampling)
    """Settings of the galleries, and the defaults of the finished generator."""
    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    train: TrainConfig = dataclasses.field(default_factory=TrainConfig)

    @property
    def latents_of(self) -> str:
        """Name of the coder, whose latents are trained on."""
        return self.coder

    @property
    def wants(self) -> frozenset[Want]:
        """Contents of a batch: latents, and labels if there are classes; no pixels, unless features need them."""
        return frozenset({"latents", "labels"} if self.field.classes else {"latents"})

    def prepares(self) -> dict[str, Any]:
        """Returns everything that prepared crops depend on, as JSON."""
        found = {**prepared_from(self), "sample_posterior": self.sample_posterior}
        if self.align.representation is None:
            return found
        return {**found, "features": [self.align.representation, self.align.grid, self.factor * self.field.patch]}

    def task(self, coder: Coder | None = None) -> SiTTask:
        """Builds the network and the task that trains it. Reads no image.

        Raises `RacError` for a coder to train, which this recipe does not; for a coder of other latents than
        `channels` and `factor` say; for sizes that do not fit its factor and the patches; and for a block to align that
        is not there. Raises `WeightsError` for a coder or a representation that is not found.
        """
        if coder is not None:
            raise RacError("this recipe trains a generator of latents, and leaves their coder as it is")
        frozen = hub.load(self.coder)
        spec = frozen.spec
        check_sizes(spec, LatentSpec(self.factor, self.channels), self.coder, self.data, self.field.patch)
        targets = self.align.targets(spec.factor * self.field.patch, self.field.depth)
        side, rng_seed = self.data.size // spec.factor, self.train.rng_seed
        module = new_generator(self.field, spec, side, self.sampling, self.coder, rng_seed)
        task = SiTTask(module, frozen, self.objective, rng_seed, self.align, targets)
        if self.train.compile:
            (task.aligned or module.field).compile()  # in place; the averaged copy and what is saved stay plain
        return task

    def trains(self, coder: Coder) -> bool:
        """Returns False: the recipe trains no coder."""
        return False

    def costs(self, name: str, side: int) -> list[CostRow]:
        """Counts parameters and MACs of one evaluation of the network, for images of `side` x `side`."""
        return field_costs(name, side, self.field, self.channels, self.factor)

    def tiny(self) -> SiTRecipe:
        """Returns the same recipe at a size that runs in seconds on a CPU."""
        return replace(
            self,
            field=self.field.tiny(),
            sampling=replace(self.sampling, steps=2),
            align=self.align.tiny(),
            data=replace(tiny_data(self.data), cached_crops=8),
            train=tiny_train(self.train),
        )

    def run(self, directory: Path, *, resume: bool = False, crops: Path | None = None) -> Fitted:
        """Trains in `directory`; `directory`/generator holds the result.

        `resume` continues the run in `directory` from its newest checkpoint. Prepared crops, if any, are kept in the
        folder `crops`, by default `directory`.crops. Warns of latents that are far from mean 0 and deviation 1. Raises
        `RacError` for pictures of another number of classes, and as `task` and `rac.train.fit`.
        """

        def look(task: Task, stream: Stream) -> None:
            assert task.encoder is not None
            check_latents(task.encoder, self.coder, stream.batch(0, self.train.batch))

        def targets(task: Task) -> Targets | None:
            assert isinstance(task, SiTTask)
            return task.targets

        check_classes(self.data, self.field.classes)
        return run_recipe(
            self,
            directory,
            resume=resume,
            crops=crops,
            look=look,
            wants=self.wants,
            sample_posterior=self.sample_posterior,
            targets=targets,
        )


def check_sizes(spec: LatentSpec, expected: LatentSpec, name: str, data: DataConfig, patch: int) -> None:
    """Raises `RacError` unless a generator with patches of `patch` can learn the latents of pictures of one size.

    - `spec`: the latents of the coder.
    - `expected`: the latents that the recipe is for.
    - `name`: the name of the coder, for messages.
    - `data`: says the size of the pictures.
    - `patch`: the side of the patches.
    """
    if (spec.channels, spec.factor) != (expected.channels, expected.factor):
        raise RacError(
            f"{name} has latents of {spec.channels} channels and factor {spec.factor}, not {expected.channels} and "
            f"{expected.factor}; give --channels {spec.channels} --factor {spec.factor}"
        )
    if data.further_sizes:
        raise RacError("a generator is trained on latents of one size; leave out further_sizes")
    if data.size % (spec.factor * patch):
        raise RacError(
            f"size {data.size} must be a multiple of {spec.factor * patch}, the coder's factor {spec.factor} times the "
            f"patch {patch}"
        )


def check_classes(data: DataConfig, classes: int) -> None:
    """Raises `RacError` unless the pictures have `classes` classes, if any. Looks before crops are prepared."""
    if not classes:
        return
    found = open_stream(replace(data, cached_crops=0), wants={"labels"}).classes
    if len(found) != classes:
        some = ", ".join(found[:3])
        raise RacError(
            f"the pictures are of {len(found)} classes ({some}{', ...' if len(found) > 3 else ''}), not of {classes}; "
            f"give --field.classes {len(found)}, or choose others with --data.classes"
        )


def field_costs(name: str, side: int, config: LatentFieldConfig, channels: int, factor: int) -> list[CostRow]:
    """Counts parameters and MACs of one evaluation of a field.

    - `name`: the name of the recipe.
    - `side`: side of the images.
    - `config`: the configuration of the field.
    - `channels`, `factor`: those of the latents.
    """
    latent = -(-side // (factor * config.patch)) * config.patch
    with torch.device("meta"):
        field = config.build(channels)
    cost = count(field, (1, channels, latent, latent), (1,))
    note = f"latents {channels} x {latent} x {latent}; per evaluation"
    return [CostRow(f"{name} field", cost.parameters, cost, note)]


def new_generator(
    config: LatentFieldConfig, spec: LatentSpec, side: int, sampling: Sampling, coder: str | None, rng_seed: int
) -> FlowGenerator:
    """Returns a generator with random weights, its classes named by their numbers.

    - `config`: the configuration of the field.
    - `spec`: the latents.
    - `side`: height and width of the latents.
    - `sampling`: the settings it samples with.
    - `coder`: the name of the coder of the latents.
    - `rng_seed`: seed of the weights.
    """
    torch.manual_seed(runtime.derived_seed(rng_seed, "weights"))
    # Names come with the pictures.
    names = tuple(map(str, range(config.classes)))
    # Without classes there is nothing to be guided by.
    sampling = sampling if names else replace(sampling, guidance=1.0)
    return FlowGenerator(FlowGeneratorConfig(spec, side, config, names, coder, sampling))


@dataclass
class SiTTask:
    """Task that trains a velocity field on the latents of a frozen coder."""

    module: FlowGenerator
    coder: Coder
    """The frozen coder, which decodes the samples of galleries."""
    objective: FlowObjective
    rng_seed: int = 0
    align: AlignmentConfig = dataclasses.field(default_factory=AlignmentConfig)
    targets: Targets | None = None
    """Features that the tokens after block `align.depth` are aligned with; None: none."""

    def __post_init__(self) -> None:
        self.parts = {"generator": Part(self.module, {"velocity": 1.0})}
        self.aligned: Aligned | None = None
        if self.targets is not None:
            self.aligned = Aligned(self.module, self.align, self.targets.channels)
            self.parts = {"generator": Part(self.aligned, {"velocity": 1.0, "alignment": self.align.weight})}

    @property
    def frozen(self) -> Sequence[nn.Module]:
        """The coder, and the representation if there is one."""
        return (self.coder,) if self.targets is None else (self.coder, self.targets)

    @property
    def encoder(self) -> Coder:
        """The coder, whose latents come with the batches."""
        return self.coder

    def prepare(self, batch: Batch) -> Batch:
        """Encodes the images of a batch that came without latents, and describes those without features."""
        return with_features(with_latents(batch, self.coder), self.targets)

    def terms(self, batch: Batch, draws: Draws, iteration: int) -> Iterator[PartTerms]:
        """Yields the term `velocity`, the mean squared error of the velocity, and `alignment` where that is trained.

        Both are of one evaluation.
        """
        labels = batch.need("labels") if self.module.classes else None
        sample = flow_sample(batch.need("latents"), labels, len(self.module.classes), self.objective, draws)
        yield PartTerms("generator", field_terms(self.aligned or self.module, sample, batch.features))

    def gallery(self, modules: Mapping[str, nn.Module], images: Tensor) -> tuple[Tensor, dict[str, float]]:
        """Returns a picture of samples, always of the same seeds, a column for each class, and metrics.

        `velocity`, and `alignment` where that is trained, are the terms of the same names on the held-out images,
        without labels, at times and with noise that are always the same.
        """
        module = trained(modules)
        with runtime.reproducible():
            samples = gallery_samples(generator_of(module), self.coder, self.rng_seed)
            features = None if self.targets is None else self.targets(images)
            metrics = held_out_terms(module, self.coder.encode(images), features, self.objective, self.rng_seed)
        return gallery(samples), metrics

    def save(self, modules: Mapping[str, nn.Module], stream: Stream, directory: Path) -> None:
        """Writes the generator to `directory`, with the names of the classes of the pictures."""
        with_words(generator_of(trained(modules)), stream).save(directory)


Trained = FlowGenerator | Aligned
"""The module of a generator in training: with an alignment head, or alone."""


def trained(modules: Mapping[str, nn.Module]) -> Trained:
    """Returns the module of the part "generator"."""
    module = modules["generator"]
    assert isinstance(module, Trained)
    return module


def generator_of(module: Trained) -> FlowGenerator:
    """Returns the generator alone."""
    return module.generator if isinstance(module, Aligned) else module


def field_terms(module: Trained, sample: FlowSample, features: Tensor | None) -> dict[str, Tensor]:
    """Returns the terms of one evaluation of the field.

    - `module`: the generator. With an alignment head there are two terms, `velocity` and `alignment`; otherwise one.
    - `sample`: the point at which the field is asked.
    - `features`: the features of the images, B D h w, for the alignment.
    """
    if not isinstance(module, Aligned):
        return {"velocity": velocity_error(module.field(sample.state, sample.time, condition=sample.labels), sample)}
    assert features is not None
    velocity, tokens = module(sample.state, sample.time, sample.labels)
    return {"velocity": velocity_error(velocity, sample), "alignment": module.error(tokens, features, sample.state)}


def held_out_terms(
    module: Trained, latents: Tensor, features: Tensor | None, objective: FlowObjective, rng_seed: int
) -> dict[str, float]:
    """Returns the means of `field_terms` on latents, without labels, at times and with noise that are always the same.

    - `module`: the generator.
    - `latents`: the latents of held-out images, B c h w.
    - `features`: the features of these images, for the alignment.
    - `objective`: gives the distribution of the times.
    - `rng_seed`: seed of times and noise.
    """
    draws = Draws.whole(runtime.generator(rng_seed, "held out"), len(latents))
    found = [
        field_terms(module, flow_sample(latents, None, 0, objective, draws), features) for _ in range(HELD_OUT_DRAWS)
    ]
    return {name: float(torch.stack([terms[name] for terms in found]).double().mean()) for name in found[0]}


def gallery_samples(generator: FlowGenerator, coder: Coder, rng_seed: int) -> dict[str, Tensor]:
    """Returns samples for a gallery, always of the same seeds: for each class that is shown, a few images."""
    classes = len(generator.classes)
    shown = min(classes, SHOWN_CLASSES) or SHOWN_CLASSES
    labels = [label * classes // shown for label in range(shown)] if classes else [None] * shown
    wanted = [Wanted(row * shown + place, label) for row in range(SHOWN_SEEDS) for place, label in enumerate(labels)]
    source = Source(generator, coder, generator.sampling, rng_seed)
    made = torch.cat([piece.images[0] for piece in source.samples(wanted, shown)])
    names = [f"sample {place + 1}" if label is None else f"class {label}" for place, label in enumerate(labels)]
    return {name: made[place::shown] for place, name in enumerate(names)}


def with_words(generator: FlowGenerator, stream: Stream) -> FlowGenerator:
    """Returns the generator with the names of the classes of the pictures, if it knows classes."""
    return generator.renamed(in_words(stream.classes)) if generator.classes else generator


_GUIDED = Sampling(steps=25, guidance=2.0)

_MIDDLE = FlowObjective(times="logit_normal")
"""Times most of which lie in the middle of the flow, as in SD3."""


def sit_64() -> SiTRecipe:
    """A SiT of ten classes at 64 pixels, on the latents of klvae-f8d4; two hours on one core. Give --data.paths."""
    return SiTRecipe(
        coder="klvae-f8d4",
        field=sit("XS", 2, classes=10),
        objective=_MIDDLE,
        sampling=_GUIDED,
        data=DataConfig(size=64, smallest_crop=192, cached_crops=40_000, held_out=32),
        train=replace(ONE_CORE, iterations=16_000, batch=64, lr=5e-4, warmup=200, betas=(0.9, 0.999), ema=0.9995),
    )


def sit_128() -> SiTRecipe:
    """A SiT of ten classes at 128 pixels, on the latents of taef2; hours on one core. Give --data.paths."""
    return replace(
        sit_64(),
        coder="taef2",
        channels=32,
        data=DataConfig(size=128, smallest_crop=192, cached_crops=20_000, held_out=32),
    )


def sit_256() -> SiTRecipe:
    """A SiT-S of ten classes at 256 pixels, on the latents of taef2, for one GPU. Give --data.paths."""
    return replace(
        sit_128(),
        field=sit("S", 2, classes=10),
        objective=replace(_MIDDLE, shift=2.0),
        sampling=replace(_GUIDED, shift=2.0),
        data=DataConfig(size=256, cached_crops=40_000, held_out=32),
        train=replace(ONE_GPU, iterations=40_000, batch=256, lr=3e-4, betas=(0.9, 0.999), ema=0.9995),
    )


def sit_128_repa() -> SiTRecipe:
    """sit-128 aligned with EfficientNet-Lite0 (REPA), which pip brings; hours on one core. Give --data.paths."""
    return replace(sit_128(), align=AlignmentConfig("efficientnet-lite0"))


def _published(size: str) -> SiTRecipe:
    """Returns the settings of SiT's paper: ImageNet at 256 pixels, batches of 256, 400,000 iterations."""
    return SiTRecipe(
        coder="stabilityai/sd-vae-ft-ema",
        field=sit(size, 2, classes=1000),
        sampling=Sampling(steps=250, method="sde", guidance=1.5),
        data=DataConfig(size=256, held_out=32),
        train=replace(
            ONE_GPU,
            iterations=400_000,
            batch=256,
            lr=1e-4,
            betas=(0.9, 0.999),
            clip=0.0,
            warmup=0,
            schedule="constant",
            final_lr=0.0,
            ema=0.9999,
            gallery_every=5_000,
        ),
    )


def sit_s_2() -> SiTRecipe:
    """SiT-S/2 as published, on the SD-VAE's latents. Give a folder of rac cache --moments as --data.paths."""
    return _published("S")


def sit_b_2() -> SiTRecipe:
    """SiT-B/2 as published, on the SD-VAE's latents. Give a folder of rac cache --moments as --data.paths."""
    return _published("B")


def sit_l_2() -> SiTRecipe:
    """SiT-L/2 as published, on the SD-VAE's latents. Give a folder of rac cache --moments as --data.paths."""
    return _published("L")


def sit_xl_2() -> SiTRecipe:
    """SiT-XL/2 as published, on the SD-VAE's latents. Give a folder of rac cache --moments as --data.paths."""
    return _published("XL")


def _published_repa(size: str, depth: int) -> SiTRecipe:
    """Returns the settings of REPA's paper: those of SiT's, the gradient clipped, aligned with DINOv2-B."""
    recipe = _published(size)
    return replace(
        recipe,
        align=AlignmentConfig("facebook/dinov2-base", depth),
        sampling=replace(recipe.sampling, guidance=1.8, interval=(0.3, 1.0)),
        train=replace(recipe.train, clip=1.0),
    )


def sit_b_2_repa() -> SiTRecipe:
    """SiT-B/2 with REPA as published, aligned with DINOv2-B. Give a folder of rac cache --moments as --data.paths."""
    return _published_repa("B", 4)


def sit_xl_2_repa() -> SiTRecipe:
    """SiT-XL/2 with REPA as published, aligned with DINOv2-B. Give a folder of rac cache --moments as --data.paths."""
    return _published_repa("XL", 8)
