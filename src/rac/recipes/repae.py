"""Training of a KL-VAE and a SiT together, end to end, as REPA-E does (arXiv 2504.10483): recipe, task, preset.

The flow's own loss would make latents that are easy and empty, so it never reaches the coder. The alignment does: it
tells the encoder which latents a generator can make sense of.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from .. import hub, runtime
from ..coders.klvae import KLVAE
from ..coders.protocol import Coder
from ..data import Batch, DataConfig, Stream
from ..data.stream import Want
from ..draws import Draws
from ..errors import RacError
from ..evaluate.cost import CostRow
from ..fields import SiTFieldConfig, sit
from ..generators.flow import OWN_CODER
from ..generators.sampling import Sampling
from ..latents import LatentSpec
from ..objectives.flow import FlowObjective, flow_draw
from ..objectives.image_terms import ADVERSARIAL, check_weights
from ..objectives.klvae import decoder_terms, sampled
from ..representations import Targets
from ..train import Fitted, Part, PartTerms, Task, TrainConfig
from ..train.adversary import ImageNetworks
from ..train.discriminator import DiscriminatorConfig
from ..train.latent_norm import LatentNorm
from .alignment import Aligned, AlignmentConfig, with_features
from .recipe import (
    coder_terms,
    discriminator_parts,
    gallery,
    mean_psnr,
    prepared_from,
    run_recipe,
    tiny_data,
    tiny_discriminator,
    tiny_train,
)
from .sit import (
    SHOWN_SEEDS,
    check_classes,
    check_sizes,
    field_costs,
    field_terms,
    gallery_samples,
    held_out_terms,
    new_generator,
    sit_64,
    with_words,
)


@dataclass(frozen=True)
class RepaEWeights:
    """Weights of the terms of the coder. Those of the generator are 1 for `velocity`, and `align.weight`."""

    l1: float = 1.0
    """Weight of the mean absolute error of the decoded image."""
    perceptual: float = 1.0
    """Weight of LPIPS with VGG16, whose weight file is looked for in RAC_WEIGHTS_DIR."""
    kl: float = 1e-6
    """Weight of the divergence of the posterior from N(0, 1), summed over each image's latent."""
    adversarial: float = 0.1
    """Weight of the adversarial term: a fixed number, not balanced against the other terms."""
    coder_alignment: float = 1.5
    """Weight of the alignment in training the encoder."""

    def __post_init__(self) -> None:
        check_weights(vars(self))


@dataclass(frozen=True)
class RepaERecipe:
    """Recipe that trains a KL-VAE and a SiT on its latents together, aligned with a representation.

    The finished generator has the tuned coder with it, in its folder `coder`.
    """

    product: ClassVar[str] = "generator"
    steps_field: ClassVar[str | None] = None

    start: str
    """The KL-VAE to start from: a shipped name, a directory or a hub name."""
    field: SiTFieldConfig
    """The network of the generator; its number of classes must be that of the pictures, or 0 to leave labels alone."""
    align: AlignmentConfig
    """The alignment, with its weight in training the generator."""
    channels: int = 4
    """Channels of the coder's latents."""
    factor: int = 8
    """Downsampling factor of the coder."""
    weights: RepaEWeights = dataclasses.field(default_factory=RepaEWeights)
    coder_rate: float = 1.0
    """Learning rate of the coder, as a multiple of the run's."""
    batch_norm: bool = True
    """Normalise the generator's latents by the statistics of the batch, or of its piece where batches are accumulated,
    as published. Otherwise by running statistics, with which training does not depend on how a batch is cut."""
    discriminator: DiscriminatorConfig = dataclasses.field(default_factory=DiscriminatorConfig)
    objective: FlowObjective = dataclasses.field(default_factory=FlowObjective)
    sampling: Sampling = dataclasses.field(default_factory=Sampling)
    """Settings of the galleries, and the defaults of the finished generator."""
    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    train: TrainConfig = dataclasses.field(default_factory=TrainConfig)

    def __post_init__(self) -> None:
        if not 0 < self.coder_rate < float("inf"):
            raise RacError(f"coder_rate {self.coder_rate} must be above 0, and finite")

    @property
    def latents_of(self) -> str | None:
        """None: the coder changes, so its latents cannot be prepared."""
        return None

    @property
    def wants(self) -> frozenset[Want]:
        """Contents of a batch: images, and labels if there are classes."""
        return frozenset({"images", "labels"} if self.field.classes else {"images"})

    def prepares(self) -> dict[str, Any]:
        """Returns everything that prepared crops depend on, as JSON."""
        features = [self.align.representation, self.align.grid, self.factor * self.field.patch]
        return {**prepared_from(self), "features": features}

    def task(self, coder: Coder | None = None) -> RepaETask:
        """Builds the networks and the task that trains them; `coder` is trained in place of `start`. Reads no image.

        Raises `RacError` for a coder that is no KL-VAE, or has other latents than `channels` and `factor` say; for
        sizes that do not fit its factor, the patches and the discriminator; without a representation, and for a block
        to align that is not there. Raises `WeightsError` where weights are wanted and not found.
        """
        networks = ImageNetworks.build(
            asdict(self.weights), self.discriminator, self.train.rng_seed, "weights", self.data.sizes
        )
        start = hub.load(self.start) if coder is None else coder
        if not isinstance(start, KLVAE):
            raise RacError(f"{self.start} is a {type(start).__name__}, and only a KL-VAE is trained end to end")
        spec = start.spec
        check_sizes(spec, LatentSpec(self.factor, self.channels), self.start, self.data, self.field.patch)
        targets = self.align.targets(spec.factor * self.field.patch, self.field.depth)
        if targets is None:
            raise RacError(
                "without a representation nothing would tell the coder what to learn; give --align.representation"
            )
        side = self.data.size // spec.factor
        generator = new_generator(self.field, spec, side, self.sampling, None, self.train.rng_seed)
        aligned = Aligned(generator, self.align, targets.channels)
        if self.train.compile:
            aligned.compile()  # in place; the averaged copy and what is saved stay plain
        norm = LatentNorm(start.statistics, spec.channels, self.batch_norm)
        return RepaETask(self, start.requires_grad_(True), EndToEnd(aligned, norm), targets, networks)

    def trains(self, coder: Coder) -> bool:
        """Returns whether `task` accepts this coder."""
        return isinstance(coder, KLVAE)

    def costs(self, name: str, side: int) -> list[CostRow]:
        """Counts parameters and MACs of one evaluation of the generator, for images of `side` x `side`."""
        return field_costs(name, side, self.field, self.channels, self.factor)

    def tiny(self) -> RepaERecipe:
        """Returns the same recipe at a size that runs in seconds on a CPU."""
        return replace(
            self,
            field=replace(self.field, depth=2, width=32, heads=2),
            sampling=replace(self.sampling, steps=2),
            align=self.align.tiny(),
            discriminator=tiny_discriminator(self.discriminator),
            data=replace(tiny_data(self.data), cached_crops=8),
            train=tiny_train(self.train),
        )

    def run(self, directory: Path, *, resume: bool = False, crops: Path | None = None) -> Fitted:
        """Trains in `directory`; `directory`/generator holds the generator, and its folder coder the tuned KL-VAE.

        `resume` continues the run in `directory` from its newest checkpoint. Prepared crops with their features, if
        any, are kept in the folder `crops`, by default `directory`.crops. Raises `RacError` for pictures of another
        number of classes, and as `task` and `rac.train.fit`.
        """

        def targets(task: Task) -> Targets | None:
            assert isinstance(task, RepaETask)
            return task.targets

        check_classes(self.data, self.field.classes)
        return run_recipe(self, directory, resume=resume, crops=crops, wants=self.wants, targets=targets)


class EndToEnd(nn.Module):
    """A generator in training with its alignment head, and the running statistics of the latents it is given."""

    def __init__(self, aligned: Aligned, norm: LatentNorm) -> None:
        super().__init__()
        self.aligned = aligned
        self.norm = norm


@dataclass
class RepaETask:
    """Task that trains a KL-VAE, a discriminator and a SiT together."""

    recipe: RepaERecipe
    coder: KLVAE
    module: EndToEnd
    targets: Targets
    networks: ImageNetworks

    def __post_init__(self) -> None:
        recipe = self.recipe
        self.parts = {
            # What is saved is the newest coder, whose latents the running statistics describe.
            "coder": Part(self.coder, asdict(recipe.weights), rate=recipe.coder_rate, averaged=False),
            **discriminator_parts(self.networks),
            "generator": Part(self.module, {"velocity": 1.0, "alignment": recipe.align.weight}),
        }

    @property
    def frozen(self) -> Sequence[nn.Module]:
        """The representation, and LPIPS if its term has a weight."""
        return (self.targets, *self.networks.frozen)

    @property
    def encoder(self) -> Coder | None:
        """None: latents cannot be prepared."""
        return None

    def prepare(self, batch: Batch) -> Batch:
        """Describes the images of a batch that came without features."""
        return with_features(batch, self.targets)

    def terms(self, batch: Batch, draws: Draws, iteration: int) -> Iterator[PartTerms]:
        """Yields the terms of the coder, of the discriminator and of the generator, of one posterior sample each.

        - `coder`: `l1`, `perceptual`, `kl`, `adversarial`, and `coder_alignment`, that of the generator's tokens, which
          reaches the encoder through the state, the blocks up to the aligned one and the head. Labels are not dropped,
          and the running statistics are used and left alone.
        - `discriminator`: its own term, of decoded images without gradient.
        - `generator`: `velocity` and `alignment`, of the same latents without gradient, at the same times and with the
          same noise. The running statistics are renewed.
        """
        images, features, aligned = batch.need("images"), batch.need("features"), self.module.aligned
        classes = len(aligned.generator.classes)
        labels = batch.need("labels") if classes else None
        raw_latent, kl = sampled(self.coder, images, draws)
        draw = flow_draw(raw_latent, labels, classes, self.recipe.objective, draws)
        latent, losses = self.coder.statistics.normalise(raw_latent), self.networks.losses(iteration)
        terms = {**decoder_terms(self.coder, images, latent, losses), "kl": kl}
        sample = draw.sample(self.module.norm(raw_latent))
        tokens = aligned.tokens(sample.state, sample.time, labels)
        terms["coder_alignment"] = aligned.error(tokens, features, raw_latent)
        if self.recipe.weights.adversarial and ADVERSARIAL not in terms:
            terms[ADVERSARIAL] = kl.new_zeros(())  # before the discriminator is used
        yield from coder_terms(terms)
        sample = draw.sample(self.module.norm.observe(raw_latent))
        yield PartTerms("generator", field_terms(aligned, sample, features))

    def gallery(self, modules: Mapping[str, nn.Module], images: Tensor) -> tuple[Tensor, dict[str, float]]:
        """Returns a picture of held-out images, their reconstructions and samples, and metrics.

        `velocity` and `alignment` are the terms of the same names on the held-out images, without labels, at times and
        with noise that are always the same; `psnr` is that of the reconstructions.
        """
        coder, module = self._finished(modules)
        recipe, seed = self.recipe, self.recipe.train.rng_seed
        with runtime.reproducible():
            decoded = coder.reconstruct(images)
            latents, features = coder.encode(images), self.targets(images)
            metrics = held_out_terms(module.aligned, latents, features, recipe.objective, seed)
            samples = gallery_samples(module.aligned.generator, coder, seed)
        metrics |= {"psnr": mean_psnr(decoded, images), **self.networks.metrics(decoded, images)}
        shown = torch.arange(SHOWN_SEEDS) % len(images)
        return gallery({"original": images[shown], "KL-VAE": decoded[shown], **samples}), metrics

    def save(self, modules: Mapping[str, nn.Module], stream: Stream, directory: Path) -> None:
        """Writes the generator to `directory`, with the names of the classes, and the coder to its folder `coder`."""
        coder, module = self._finished(modules)
        with_words(module.aligned.generator.of_coder(coder), stream).save(directory)
        coder.save(directory / OWN_CODER)

    def _finished(self, modules: Mapping[str, nn.Module]) -> tuple[KLVAE, EndToEnd]:
        """Returns the coder, with the running statistics as its own, and the generator."""
        coder, module = modules["coder"], modules["generator"]
        assert isinstance(coder, KLVAE)
        assert isinstance(module, EndToEnd)
        device = next(coder.parameters()).device
        coder.set_channel_statistics(module.norm.mean, module.norm.std)
        coder.to(device)
        return coder, module


def repae_64() -> RepaERecipe:
    """klvae-f8d4 and the SiT of sit-64 trained together (REPA-E); hours on one core; needs LPIPS's weights."""
    alone = sit_64()
    return RepaERecipe(
        start="klvae-f8d4",
        field=sit("XS", 2, classes=10),
        align=AlignmentConfig("efficientnet-lite0"),
        coder_rate=0.2,
        discriminator=DiscriminatorConfig(betas=(0.9, 0.999), rate=0.2),
        objective=alone.objective,
        sampling=alone.sampling,
        data=alone.data,
        train=replace(alone.train, iterations=4_000, batch=32),
    )
