"""Training of a KL-VAE, the teacher and the baseline: the recipe, its task, and its presets."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from .. import hub, runtime
from ..coders.klvae import KLVAE, KLVAEConfig
from ..coders.protocol import Coder
from ..config import differences
from ..data import Batch, DataConfig, Stream
from ..draws import Draws
from ..errors import RacError
from ..evaluate.cost import CostRow, halves
from ..objectives.klvae import KLVAEWeights, decoder_terms, klvae_terms
from ..train import Fitted, PartTerms, TrainConfig
from ..train.adversary import ImageNetworks
from ..train.discriminator import DiscriminatorConfig
from .recipe import (
    ONE_CORE,
    ONE_GPU,
    STATISTICS_BATCHES,
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
class KLVAERecipe:
    """Recipe that trains a KL-VAE on images."""

    product: ClassVar[str] = "coder"
    steps_field: ClassVar[str | None] = None

    network: KLVAEConfig = field(default_factory=KLVAEConfig)
    start: str | None = None
    """A KL-VAE of the same network to start from, instead of random weights: a shipped name, a directory or a hub
    name."""
    train_encoder: bool = True
    """Train the encoder too. Otherwise only the decoder is trained, and the latents of `start` do not change, so models
    trained on them can use the new decoder. It learns to decode the posterior's mean without noise, which is what
    `encode` returns."""
    weights: KLVAEWeights = field(default_factory=KLVAEWeights)
    discriminator: DiscriminatorConfig = field(default_factory=DiscriminatorConfig)
    data: DataConfig = field(default_factory=DataConfig)
    train: TrainConfig = field(default_factory=TrainConfig)

    @property
    def latents_of(self) -> str | None:
        """Name of the coder whose latents are trained on: `start` if the encoder is frozen, otherwise None."""
        return None if self.train_encoder else self.start

    def prepares(self) -> dict[str, Any]:
        """Returns everything that prepared crops depend on, as JSON."""
        return prepared_from(self)

    def task(self, coder: Coder | None = None) -> KLVAETask:
        """Builds the networks and the task that trains them; `coder` is trained in place of the recipe's own network.

        Raises `RacError` for a start of another shape, for a frozen encoder without a start, and for crops too small
        for the discriminator; `WeightsError` where LPIPS is wanted and its weights are not found.
        """
        networks = ImageNetworks.build(
            asdict(self.weights), self.discriminator, self.train.rng_seed, "weights", self.data.sizes
        )
        torch.manual_seed(runtime.derived_seed(self.train.rng_seed, "weights"))
        module = self._coder() if coder is None else coder.requires_grad_(True)
        if not isinstance(module, KLVAE):
            raise RacError(f"this recipe trains a KL-VAE, not a {type(module).__name__}")
        return KLVAETask(module, self.weights, self.train.batch, networks, self.train_encoder)

    def trains(self, coder: Coder) -> bool:
        """Returns whether `task` accepts this coder."""
        return isinstance(coder, KLVAE)

    def costs(self, name: str, side: int) -> list[CostRow]:
        """Counts parameters and MACs of encoder, decoder and both, for images of `side` x `side`."""
        coder = self.network.build()
        return halves(name, coder.network, coder.spec, side)

    def tiny(self) -> KLVAERecipe:
        """Returns the same recipe at a size that runs in seconds on a CPU."""
        return replace(
            self,
            discriminator=tiny_discriminator(self.discriminator),
            data=tiny_data(self.data),
            train=tiny_train(self.train),
        )

    def run(self, directory: Path, *, resume: bool = False, crops: Path | None = None) -> Fitted:
        """Trains in `directory`; its coder/ holds the result, a plain diffusers AutoencoderKL.

        `resume` continues the run in `directory` from its newest checkpoint. Prepared crops, if any, are kept in the
        folder `crops`, by default `directory`.crops. With a frozen encoder their latents are kept as well. Raises as
        `task`, and as `rac.train.fit`.
        """
        return run_recipe(self, directory, resume=resume, crops=crops)

    def _coder(self) -> KLVAE:
        coder = self.network.build()
        if self.start is None:
            if not self.train_encoder:
                raise RacError("without a start there is no encoder to keep; give start, or train the encoder too")
            return coder
        start = hub.load(self.start)
        if not isinstance(start, KLVAE):
            raise RacError(f"start {self.start} is not a KL-VAE; give one that an earlier stage trained")
        ours, theirs = coder.shape(), start.shape()
        if ours != theirs:
            raise RacError(f"start {self.start} has another network: {'; '.join(differences(ours, theirs))}")
        return start.requires_grad_(True)


@dataclass
class KLVAETask:
    """Task that trains a KL-VAE; its statistics are fitted on training images whenever it is saved.

    Without `train_encoder` only the decoder is trained, on the latents that `encode` gives (the posterior's means, no
    noise), or on prepared ones; encoder and statistics stay as they are, bit for bit.
    """

    module: KLVAE
    loss_weights: KLVAEWeights
    batch: int
    """Images in each of the batches that the statistics are fitted on."""
    networks: ImageNetworks = field(default_factory=ImageNetworks)
    train_encoder: bool = True

    def __post_init__(self) -> None:
        if not self.train_encoder:
            self.module.freeze_encoder()
        unused = set() if self.train_encoder else {"kl"}
        weights = {name: weight for name, weight in asdict(self.loss_weights).items() if name not in unused}
        self.parts = coder_parts(self.module, weights, self.networks, "network.decoder")

    @property
    def frozen(self) -> Sequence[nn.Module]:
        """The frozen LPIPS network, if its term has a weight."""
        return self.networks.frozen

    @property
    def encoder(self) -> KLVAE | None:
        """The coder itself if its encoder is frozen, otherwise None."""
        return None if self.train_encoder else self.module

    def prepare(self, batch: Batch) -> Batch:
        """Encodes the images if the encoder is frozen and the batch came without latents."""
        return batch if self.train_encoder else with_latents(batch, self.module)

    def terms(self, batch: Batch, draws: Draws, iteration: int) -> Iterator[PartTerms]:
        """Yields the terms of `klvae_terms`, or those of `decoder_terms` if the encoder is frozen."""
        losses = self.networks.losses(iteration)
        if self.train_encoder:
            yield from coder_terms(klvae_terms(self.module, batch.need("images"), draws, losses))
            return
        yield from coder_terms(decoder_terms(self.module, batch.need("images"), batch.need("latents"), losses))

    def gallery(self, modules: Mapping[str, nn.Module], images: Tensor) -> tuple[Tensor, dict[str, float]]:
        """Returns a picture, originals above, reconstructions from the posterior's mean below, and their metrics."""
        coder = modules["coder"]
        assert isinstance(coder, KLVAE)
        with runtime.reproducible():
            decoded = coder.reconstruct(images)
            metrics = {"psnr": mean_psnr(decoded, images), **self.networks.metrics(decoded, images)}
        return gallery({"original": images, "KL-VAE": decoded}), metrics

    def save(self, modules: Mapping[str, nn.Module], stream: Stream, directory: Path) -> None:
        """Writes the coder, its statistics fitted on images of `stream` unless its encoder is frozen."""
        coder = modules["coder"]
        assert isinstance(coder, KLVAE)
        if self.train_encoder:
            device = next(coder.parameters()).device
            batches = (stream.batch(k * self.batch, self.batch) for k in range(STATISTICS_BATCHES))
            coder.fit_statistics(batch.need("images").to(device) for batch in batches)
        coder.save(directory)


def klvae_f8d4() -> KLVAERecipe:
    """First stage of the f8d4 teacher, the SD-VAE at a quarter of its widths: L1 + KL; an hour on one core."""
    return KLVAERecipe(
        network=KLVAEConfig(widths=(32, 64, 128, 128), layers_per_block=2, latent_channels=4, norm_groups=8),
        data=DataConfig(held_out=16),
        train=replace(ONE_CORE, iterations=8_250, batch=8, lr=8e-4, final_lr=0.02),
    )


def klvae_f8d4_sharp() -> KLVAERecipe:
    """Second stage of the f8d4 teacher, its decoder alone: L1 + LPIPS + a discriminator. Give the first as --start."""
    first = klvae_f8d4()
    return replace(
        first,
        start="klvae-f8d4",
        train_encoder=False,
        weights=KLVAEWeights(l1=1.0, kl=0.0, perceptual=1.0, adversarial=0.2),
        discriminator=DiscriminatorConfig(start=200),
        data=replace(first.data, cached_crops=10_000),
        train=replace(first.train, iterations=1_500, lr=2e-4),
    )


def klvae_128() -> KLVAERecipe:
    """An f8 teacher on 128-pixel crops, in one stage: L1 + KL + LPIPS, then a discriminator; minutes on a large GPU."""
    return KLVAERecipe(
        network=KLVAEConfig(widths=(32, 64, 128, 128), layers_per_block=2, latent_channels=4, norm_groups=8),
        weights=KLVAEWeights(l1=1.0, kl=1e-6, perceptual=1.0, adversarial=0.2),
        discriminator=DiscriminatorConfig(width=64, norm_groups=8, start=1_800),
        data=DataConfig(size=128, held_out=32, keep_mb=2_048),
        train=replace(ONE_GPU, iterations=3_000, batch=128, lr=8e-4),
    )


SMALL_WIDTHS = {"f8": (32, 64, 128, 128), "f16": (32, 64, 64, 128, 128)}
"""Widths of small KL-VAEs at strides 1, 2, 4, ..., by factor."""


def small_klvae(compression: str) -> KLVAEConfig:
    """Returns the network of a small KL-VAE of a compression such as "f16d8": factor 16, 8 latent channels."""
    factor, channels = compression.split("d")
    return KLVAEConfig(SMALL_WIDTHS[factor], 2, int(channels), norm_groups=8)


def klvae_64(compression: str) -> KLVAERecipe:
    """Returns the counterpart of a small DGAE: the same encoder and latents, and the decoder of the SD-VAE's kind."""
    return KLVAERecipe(
        network=small_klvae(compression),
        weights=KLVAEWeights(l1=1.0, kl=1e-6, perceptual=1.0, adversarial=0.2),
        discriminator=DiscriminatorConfig(start=2_000),
        data=DataConfig(held_out=16, keep_mb=1_024),
        train=replace(ONE_CORE, iterations=5_000, batch=8, lr=4e-4),
    )


COUNTERPARTS = {
    f"klvae-64-{compression}": (
        f"The KL-VAE with the encoder of dgae-64-{compression}: L1 + KL + LPIPS, then a discriminator; one core.",
        klvae_64(compression),
    )
    for compression in ("f8d4", "f8d2", "f16d8", "f16d4")
}
"""Presets by name: a sentence on the purpose, and the recipe."""
