"""Training of a SiT, or of a DiT^DH, on the latents of a frozen coder: the recipe, its task, and presets of SiT."""

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
from ..objectives.flow import FlowObjective, flow_sample, velocity_error
from ..train import Fitted, Part, PartTerms, Task, TrainConfig
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

    Latents have to be prepared: by `rac cache`, or by `data.cached_crops`.
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
        """Contents of a batch: latents, and labels if there are classes; no pixels."""
        return frozenset({"latents", "labels"} if self.field.classes else {"latents"})

    def prepares(self) -> dict[str, Any]:
        """Returns everything that prepared crops depend on, as JSON."""
        return {**prepared_from(self), "sample_posterior": self.sample_posterior}

    def task(self, coder: Coder | None = None) -> SiTTask:
        """Builds the network and the task that trains it. Reads no image.

        Raises `RacError` for a coder to train, which this recipe does not; for a coder of other latents than
        `channels` and `factor` say; and for sizes that do not fit its factor and the patches.
        """
        if coder is not None:
            raise RacError("this recipe trains a generator of latents, and leaves their coder as it is")
        frozen = hub.load(self.coder)
        spec = frozen.spec
        if (spec.channels, spec.factor) != (self.channels, self.factor):
            raise RacError(
                f"{self.coder} has latents of {spec.channels} channels and factor {spec.factor}, not "
                f"{self.channels} and {self.factor}; give --channels {spec.channels} --factor {spec.factor}"
            )
        if self.data.further_sizes:
            raise RacError("a generator is trained on latents of one size; leave out further_sizes")
        if self.data.size % (spec.factor * self.field.patch):
            raise RacError(
                f"size {self.data.size} must be a multiple of {spec.factor * self.field.patch}, the coder's factor "
                f"{spec.factor} times the patch {self.field.patch}"
            )
        torch.manual_seed(runtime.derived_seed(self.train.rng_seed, "weights"))
        # Names come with the pictures.
        names = tuple(map(str, range(self.field.classes)))
        side = self.data.size // spec.factor
        # Without classes there is nothing to be guided by.
        sampling = self.sampling if names else replace(self.sampling, guidance=1.0)
        module = FlowGenerator(FlowGeneratorConfig(spec, side, self.field, names, self.coder, sampling))
        if self.train.compile:
            module.field.compile()  # in place; the averaged copy and what is saved stay plain
        return SiTTask(module, frozen, self.objective, self.train.rng_seed)

    def trains(self, coder: Coder) -> bool:
        """Returns False: the recipe trains no coder."""
        return False

    def costs(self, name: str, side: int) -> list[CostRow]:
        """Counts parameters and MACs of one evaluation of the network, for images of `side` x `side`."""
        step = self.factor * self.field.patch
        latent = -(-side // step) * self.field.patch
        with torch.device("meta"):
            field = self.field.build(self.channels)
        cost = count(field, (1, self.channels, latent, latent), (1,))
        note = f"latents {self.channels} x {latent} x {latent}; per evaluation"
        return [CostRow(f"{name} field", cost.parameters, cost, note)]

    def tiny(self) -> SiTRecipe:
        """Returns the same recipe at a size that runs in seconds on a CPU."""
        return replace(
            self,
            field=self.field.tiny(),
            sampling=replace(self.sampling, steps=2),
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

        self._check_classes()
        return run_recipe(
            self,
            directory,
            resume=resume,
            crops=crops,
            look=look,
            wants=self.wants,
            sample_posterior=self.sample_posterior,
        )

    def _check_classes(self) -> None:
        """Raises `RacError` unless the pictures have as many classes as the field. Looks before crops are prepared."""
        if not self.field.classes:
            return
        found = open_stream(replace(self.data, cached_crops=0), wants={"labels"}).classes
        if len(found) != self.field.classes:
            some = ", ".join(found[:3])
            raise RacError(
                f"the pictures are of {len(found)} classes ({some}{', ...' if len(found) > 3 else ''}), not of "
                f"{self.field.classes}; give --field.classes {len(found)}, or choose others with --data.classes"
            )


@dataclass
class SiTTask:
    """Task that trains a velocity field on the latents of a frozen coder."""

    module: FlowGenerator
    coder: Coder
    """The frozen coder, which decodes the samples of galleries."""
    objective: FlowObjective
    rng_seed: int = 0

    def __post_init__(self) -> None:
        self.parts = {"generator": Part(self.module, {"velocity": 1.0})}

    @property
    def frozen(self) -> Sequence[nn.Module]:
        """The coder."""
        return (self.coder,)

    @property
    def encoder(self) -> Coder:
        """The coder, whose latents come with the batches."""
        return self.coder

    def prepare(self, batch: Batch) -> Batch:
        """Encodes the images of a batch that came without latents."""
        return with_latents(batch, self.coder)

    def terms(self, batch: Batch, draws: Draws, iteration: int) -> Iterator[PartTerms]:
        """Yields the term `velocity`: the mean squared error of the velocity."""
        field = self.module.field
        labels = batch.need("labels") if self.module.classes else None
        sample = flow_sample(batch.need("latents"), labels, len(self.module.classes), self.objective, draws)
        predicted = field(sample.state, sample.time, condition=sample.labels)
        yield PartTerms("generator", {"velocity": velocity_error(predicted, sample)})

    def gallery(self, modules: Mapping[str, nn.Module], images: Tensor) -> tuple[Tensor, dict[str, float]]:
        """Returns a picture of samples, always of the same seeds, a column for each class, and a metric.

        `velocity` is the term of the same name on the latents of the held-out images, without labels, at times and
        with noise that are always the same.
        """
        generator = modules["generator"]
        assert isinstance(generator, FlowGenerator)
        classes = len(generator.classes)
        shown = min(classes, SHOWN_CLASSES) or SHOWN_CLASSES
        labels = [label * classes // shown for label in range(shown)] if classes else [None] * shown
        wanted = [
            Wanted(row * shown + place, label) for row in range(SHOWN_SEEDS) for place, label in enumerate(labels)
        ]
        source = Source(generator, self.coder, generator.sampling, self.rng_seed)
        with runtime.reproducible():
            made = torch.cat([piece.images[0] for piece in source.samples(wanted, shown)])
            metrics = {"velocity": self._held_out(generator, images)}
        names = [f"sample {place + 1}" if label is None else f"class {label}" for place, label in enumerate(labels)]
        return gallery({name: made[place::shown] for place, name in enumerate(names)}), metrics

    def _held_out(self, generator: FlowGenerator, images: Tensor) -> float:
        latents = self.coder.encode(images)
        draws = Draws.whole(runtime.generator(self.rng_seed, "held out"), len(latents))
        errors = []
        for _ in range(HELD_OUT_DRAWS):
            sample = flow_sample(latents, None, 0, self.objective, draws)
            errors.append(velocity_error(generator.field(sample.state, sample.time), sample))
        return float(torch.stack(errors).double().mean())

    def save(self, modules: Mapping[str, nn.Module], stream: Stream, directory: Path) -> None:
        """Writes the generator to `directory`, with the names of the classes of the pictures."""
        generator = modules["generator"]
        assert isinstance(generator, FlowGenerator)
        named = generator.renamed(in_words(stream.classes)) if generator.classes else generator
        named.save(directory)


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
