"""Training of an RAE's decoder on a frozen representation: the recipe, its task, and its presets."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from .. import runtime
from ..coders.protocol import Coder
from ..coders.rae import RAE, RAEConfig, ViTDecoder, ViTDecoderConfig, vit_decoder
from ..data import Batch, DataConfig, Stream
from ..draws import Draws
from ..errors import RacError
from ..evaluate.cost import CostRow, count
from ..objectives.image_terms import DISCRIMINATOR, ImageLosses
from ..objectives.rae import RAEWeights, augmented, decoder_terms, discriminator_term, noised
from ..representations.representation import PIXELS
from ..train import Fitted, PartTerms, TrainConfig
from ..train.adversary import ImageNetworks
from ..train.feature_discriminator import FeatureDiscriminatorConfig
from .recipe import (
    ONE_CORE,
    ONE_GPU,
    coder_parts,
    gallery,
    mean_psnr,
    prepared_from,
    run_recipe,
    tiny_data,
    tiny_train,
)

EPSILON = 1e-6
"""Number added to the length of the adversarial gradient, as in the paper's code."""


@dataclass(frozen=True)
class RAERecipe:
    """Recipe that trains a decoder of a frozen representation: an RAE.

    Raises `RacError` for values out of their range.
    """

    product: ClassVar[str] = "coder"
    steps_field: ClassVar[str | None] = None

    representation: str = "efficientnet-lite0"
    """The representation: efficientnet-lite0, dinov2-s, dinov2-b, dinov2-l, siglip2-b, mae-b, or a directory or a name
    on the hub of such a model."""
    channels: int = 112
    """Channels of the representation's tokens."""
    decoder: ViTDecoderConfig = dataclasses.field(default_factory=ViTDecoderConfig)
    tau: float = 0.8
    """Largest deviation of the noise on raw latents in training, in their own units: tokens of transformers have a
    deviation of 1, those of efficientnet-lite0 one of about 7. Above 0 the decoder forgives errors of a generator, and
    reconstructs a little less exactly."""
    weights: RAEWeights = dataclasses.field(default_factory=RAEWeights)
    perceptual_start: int = 0
    """Number of iterations before the perceptual term is used, which costs more than a small decoder."""
    discriminator: FeatureDiscriminatorConfig = dataclasses.field(default_factory=FeatureDiscriminatorConfig)
    statistics_images: int = 10_000
    """Number of training images whose latents give each channel and position its mean and variance."""
    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    train: TrainConfig = dataclasses.field(default_factory=TrainConfig)

    def __post_init__(self) -> None:
        if not 0 <= self.tau < float("inf"):
            raise RacError(f"tau {self.tau} must be at least 0, and finite")
        for name, least in (("channels", 1), ("perceptual_start", 0), ("statistics_images", 1)):
            if getattr(self, name) < least:
                raise RacError(f"{name} {getattr(self, name)} must be at least {least}")

    @property
    def latents_of(self) -> None:
        """None: tokens are computed from the images of each batch, which costs little beside the decoder."""
        return None

    def prepares(self) -> dict[str, Any]:
        """Returns everything that prepared crops depend on, as JSON."""
        return prepared_from(self)

    def task(self, coder: Coder | None = None) -> RAETask:
        """Builds the networks and the task that trains them; the decoder of `coder` is trained in place of a new one.

        Raises `RacError` for a representation of another number of channels, and for sizes that do not fit it;
        `WeightsError` where the representation, LPIPS or the discriminator's features are wanted and not found.
        """
        if self.data.further_sizes:
            raise RacError("an RAE has statistics for each position of one size; leave out further_sizes")
        if self.data.size % PIXELS:
            raise RacError(f"size {self.data.size} must be a multiple of {PIXELS}, the pixels of a token's side")
        networks = ImageNetworks.build(
            asdict(self.weights), self.discriminator, self.train.rng_seed, "weights", self.data.sizes
        )
        torch.manual_seed(runtime.derived_seed(self.train.rng_seed, "weights"))
        module = RAEConfig(self.representation, self.decoder).build() if coder is None else coder
        if not isinstance(module, RAE):
            raise RacError(f"this recipe trains an RAE, not a {type(module).__name__}")
        if module.spec.channels != self.channels:
            raise RacError(
                f"{module.config.representation} has tokens of {module.spec.channels} channels, not {self.channels}; "
                f"give --channels {module.spec.channels}"
            )
        return RAETask(module, self, networks)

    def trains(self, coder: Coder) -> bool:
        """Returns whether `task` accepts this coder."""
        return isinstance(coder, RAE)

    def costs(self, name: str, side: int) -> list[CostRow]:
        """Counts parameters and MACs of the decoder, for images of `side` x `side`."""
        with torch.device("meta"):
            decoder = ViTDecoder(self.decoder, self.channels)
        grid = -(-side // PIXELS)
        cost = count(decoder, (1, self.channels, grid, grid))
        return [CostRow(f"{name} decoder", cost.parameters, cost, f"latents {self.channels} x {grid} x {grid}")]

    def tiny(self) -> RAERecipe:
        """Returns the same recipe at a size that runs in seconds on a CPU."""
        start = min(self.discriminator.start, 1)
        return replace(
            self,
            decoder=ViTDecoderConfig(1, 32, 2, 64),
            perceptual_start=min(self.perceptual_start, 1),
            # Its weights are at hand without a file.
            discriminator=replace(
                self.discriminator, features="efficientnet-lite0", start=start, decoder_start=2 * start
            ),
            statistics_images=4,
            data=tiny_data(self.data),
            train=tiny_train(self.train),
        )

    def run(self, directory: Path, *, resume: bool = False, crops: Path | None = None) -> Fitted:
        """Trains in `directory`; `directory`/coder holds the result.

        `resume` continues the run in `directory` from its newest checkpoint. Prepared crops, if any, are kept in the
        folder `crops`, by default `directory`.crops. Raises as `task`, and as `rac.train.fit`.
        """
        return run_recipe(self, directory, resume=resume, crops=crops)


@dataclass
class RAETask:
    """Task that trains the decoder of an RAE, and the discriminator that looks at its images."""

    coder: RAE
    """The coder; its representation is frozen, its decoder is what is trained."""
    recipe: RAERecipe
    networks: ImageNetworks

    def __post_init__(self) -> None:
        self.coder.decoder.requires_grad_(True)
        self.parts = coder_parts(self.coder.decoder, asdict(self.recipe.weights), self.networks, "out", EPSILON)
        self._fitted = False

    @property
    def frozen(self) -> Sequence[nn.Module]:
        """The representation, and LPIPS if its term has a weight."""
        return (self.coder.encoder, *self.networks.frozen)

    @property
    def encoder(self) -> None:
        """None: batches need only images."""
        return None

    @torch.no_grad()
    def prepare(self, batch: Batch) -> Batch:
        """Returns the batch with raw latents, whatever it came with."""
        return batch._replace(latents=self._placed().moments(batch.need("images")))

    def terms(self, batch: Batch, draws: Draws, iteration: int) -> Iterator[PartTerms]:
        """Yields the terms of the decoder, and the discriminator's once it is trained."""
        image, raw_latents = batch.need("images"), batch.need("latents")
        coder, networks, settings = self.coder, self.networks, self.recipe.discriminator
        discriminator = networks.discriminator

        def judged(image: Tensor) -> Tensor:
            assert discriminator is not None
            return discriminator(augmented(image, draws))

        opposed = discriminator is not None and iteration >= settings.decoder_start
        perceptual = networks.lpips if iteration >= self.recipe.perceptual_start else None
        losses = ImageLosses(perceptual, judged if opposed else None)
        given = noised(raw_latents, self.recipe.tau, draws)
        yield PartTerms("coder", decoder_terms(coder.decode_raw, image, given, losses))
        if discriminator is not None and iteration >= settings.start:
            term = discriminator_term(coder.decode_raw, image, raw_latents, judged)
            yield PartTerms("discriminator", {DISCRIMINATOR: term})

    def gallery(self, modules: Mapping[str, nn.Module], images: Tensor) -> tuple[Tensor, dict[str, float]]:
        """Returns a picture, originals above, reconstructions below, and their metrics."""
        coder = self._placed().with_decoder(modules["coder"])
        with runtime.reproducible():
            decoded = coder.reconstruct(images)
            metrics = {"psnr": mean_psnr(decoded, images), **self.networks.metrics(decoded, images)}
        return gallery({"original": images, "RAE": decoded}), metrics

    def save(self, modules: Mapping[str, nn.Module], stream: Stream, directory: Path) -> None:
        """Writes the coder; its statistics are fitted on images of `stream` when it is first saved."""
        if not self._fitted:
            device, batch = self._placed().pixel_mean.device, self.recipe.train.batch
            total = self.recipe.statistics_images
            pieces = ((first, min(batch, total - first)) for first in range(0, total, batch))
            self.coder.fit_statistics(stream.batch(*piece).need("images").to(device) for piece in pieces)
            self._fitted = True
        self.coder.with_decoder(modules["coder"]).save(directory)

    def _placed(self) -> RAE:
        """Returns the coder, all of it on the device that its decoder was moved to."""
        device = next(self.coder.decoder.parameters()).device
        if self.coder.pixel_mean.device != device:
            self.coder.to(device)
        return self.coder


_STEPS = 2_502
"""Iterations of an epoch of ImageNet in batches of 512."""


def _published(size: str, representation: str = "dinov2-b", channels: int = 768, side: int = 256) -> RAERecipe:
    """Returns the settings of the paper: ImageNet, 16 epochs, the discriminator from the 6th, used from the 8th."""
    return RAERecipe(
        representation=representation,
        channels=channels,
        decoder=vit_decoder(size),
        discriminator=FeatureDiscriminatorConfig(start=6 * _STEPS, decoder_start=8 * _STEPS),
        data=DataConfig(size=side, flip=False, held_out=32, keep_mb=2_048),
        train=replace(
            ONE_GPU,
            iterations=16 * _STEPS,
            batch=512,
            lr=2e-4,
            betas=(0.9, 0.95),
            clip=0.0,
            warmup=_STEPS,
            final_lr=0.1,
            ema=0.9978,
            bf16=False,
            channels_last=False,
        ),
    )


def rae_b() -> RAERecipe:
    """An RAE of DINOv2-B with the small decoder of the paper, 86 M parameters, at 256 pixels."""
    return _published("B")


def rae_l() -> RAERecipe:
    """An RAE of DINOv2-B with the middle decoder of the paper, 304 M parameters, at 256 pixels."""
    return _published("L")


def rae_xl() -> RAERecipe:
    """The paper's RAE: DINOv2-B, and a decoder of 415 M parameters, at 256 pixels."""
    return _published("XL")


def rae_xl_512() -> RAERecipe:
    """The paper's RAE at 512 pixels: DINOv2-B at 448, latents of 768 x 32 x 32, a decoder of 415 M parameters."""
    return _published("XL", side=512)


def rae_128() -> RAERecipe:
    """An RAE of EfficientNet-Lite0 at 128 pixels, whose representation every machine has; hours on one core."""
    return RAERecipe(
        decoder=vit_decoder("XS"),
        tau=5.8,  # the paper's .8 of the tokens' deviation
        perceptual_start=6_000,
        discriminator=FeatureDiscriminatorConfig("efficientnet-lite0", start=7_600, decoder_start=7_800),
        statistics_images=5_000,
        data=DataConfig(size=128, smallest_crop=192, held_out=32, keep_mb=1_024),
        train=replace(
            ONE_CORE, iterations=8_500, batch=16, lr=8e-4, betas=(0.9, 0.95), warmup=200, final_lr=0.05, ema=0.9978
        ),
    )
