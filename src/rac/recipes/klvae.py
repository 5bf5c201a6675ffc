"""Training a KL-VAE, the teacher and the baseline: the recipe, its task, and its presets."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .. import hub, runtime
from ..coders.klvae import KLVAE, KLVAEConfig
from ..config import differences
from ..data import Batch, DataConfig, Latents, Stream, open_stream
from ..draws import Draws
from ..errors import RacError
from ..evaluate.image_sets import ImageSet
from ..evaluate.reconstruction import measure
from ..objectives.image_terms import ADVERSARIAL
from ..objectives.klvae import KLVAEWeights, decoder_terms, klvae_terms
from ..train import Fitted, TrainConfig, fit
from ..train.adversary import LossNetworks, last_layer
from ..train.discriminator import DiscriminatorConfig
from ..train.processes import Processes
from ..train.task import Adversary
from .recipe import HELD_OUT, ONE_CORE, ONE_GPU, check_weights, gallery


@dataclass(frozen=True)
class KLVAERecipe:
    """A KL-VAE on images."""

    network: KLVAEConfig = field(default_factory=KLVAEConfig)
    start: str | None = None
    """A KL-VAE to start from (same network), instead of random weights: a shipped name, a directory or a hub name."""
    train_encoder: bool = True
    """Without it only the decoder is trained, and the latents of `start` stay as they are, bit for bit: whatever was
    trained on them fits the new coder too. It then learns to decode the posterior's mean, which is what `encode` gives,
    without noise."""
    weights: KLVAEWeights = field(default_factory=KLVAEWeights)
    discriminator: DiscriminatorConfig = field(default_factory=DiscriminatorConfig)
    data: DataConfig = field(default_factory=DataConfig)
    train: TrainConfig = field(default_factory=TrainConfig)

    def run(self, directory: Path, *, resume: bool = False, crops: Path | None = None) -> Fitted:
        """Train in `directory`; its coder/ holds the result, a plain diffusers AutoencoderKL. See `rac.train.fit`.

        Prepared crops, if any, are kept in the folder `crops`; `directory`.crops where none is named. With a frozen
        encoder their latents are kept as well.

        Raises `RacError` for a start of another shape and for a frozen encoder without a start, and `WeightsError`
        where LPIPS is wanted and its weights are not found.
        """
        loss_networks = LossNetworks.build(
            self.weights.perceptual, self.weights.adversarial, self.discriminator, self.train.rng_seed
        )
        torch.manual_seed(runtime.derived_seed(self.train.rng_seed, "weights"))
        coder = self._coder()
        device = runtime.pick_device(self.train.device)
        cache = crops or directory.parent / f"{directory.name}.crops"
        with Processes.join(self.train.device, 60 * self.train.patience_minutes).in_turn():
            if self.train_encoder:
                stream = open_stream(self.data, self.train.rng_seed, batch=self.train.batch, cache=cache)
            else:
                stream = open_stream(
                    self.data,
                    self.train.rng_seed,
                    batch=self.train.batch,
                    cache=cache,
                    latents=Latents(coder.to(device), self.start, device),
                )
        task = KLVAETask(coder, self.weights, stream, self.train.batch, loss_networks, self.train_encoder)
        return fit(task, stream, self.train, directory, recipe=self, resume=resume)

    def _coder(self) -> KLVAE:
        coder = self.network.build()
        if self.start is None:
            if not self.train_encoder:
                raise RacError("without a start there is no encoder to keep; give start, or train the encoder too")
            return coder
        start = hub.load(self.start)
        if not isinstance(start, KLVAE):
            raise RacError(f"start {self.start} is no KL-VAE; give one that an earlier stage trained")
        ours, theirs = (shape_of(one) for one in (coder, start))
        if ours != theirs:
            raise RacError(f"start {self.start} has another network: {'; '.join(differences(ours, theirs))}")
        return start.requires_grad_(True)


def shape_of(coder: KLVAE) -> dict[str, Any]:
    """A KL-VAE's configuration without its statistics and without what leaves no trace in the weights."""
    shaping = (
        "block_out_channels",
        "layers_per_block",
        "latent_channels",
        "norm_num_groups",
        "mid_block_add_attention",
    )
    return {name: coder.config[name] for name in shaping}


STATISTICS_BATCHES = 16
"""Training batches whose latents give a KL-VAE its scale and shift."""


@dataclass
class KLVAETask:
    """Trains a KL-VAE; its statistics are fitted, on training images, whenever it is saved.

    Without `train_encoder` only what decodes is trained, on the latents that `encode` gives (the posterior's means, no
    noise), or on prepared ones; encoder and statistics stay as they are, bit for bit.
    """

    module: KLVAE
    loss_weights: KLVAEWeights
    stream: Stream
    batch: int
    loss_networks: LossNetworks = field(default_factory=LossNetworks)
    train_encoder: bool = True

    def __post_init__(self) -> None:
        if not self.train_encoder:
            self.module.freeze_encoder()
        check_weights(self.weights)

    @property
    def frozen(self) -> Sequence[nn.Module]:
        """See `Task`."""
        return self.loss_networks.frozen

    @property
    def weights(self) -> Mapping[str, float]:
        """See `Task`."""
        unused = {ADVERSARIAL} if self.train_encoder else {ADVERSARIAL, "kl"}
        return {name: weight for name, weight in asdict(self.loss_weights).items() if name not in unused}

    @property
    def adversary(self) -> Adversary | None:
        """See `Task`."""
        return self.loss_networks.adversary(last_layer(self.module.network.decoder), self.loss_weights.adversarial)

    def terms(self, batch: Batch, draws: Draws, iteration: int) -> dict[str, Tensor]:
        """See `Task`."""
        losses = self.loss_networks.losses(iteration)
        if self.train_encoder:
            return klvae_terms(self.module, batch.need("images"), draws, losses)
        images, latents = batch.need("images"), batch.latents
        if latents is None:
            with torch.no_grad():
                latents = self.module.encode(images)
        return decoder_terms(self.module, images, latents, losses)

    def gallery(self, module: nn.Module, images: Tensor) -> tuple[Tensor, dict[str, float]]:
        """Originals above, reconstructions from the posterior's mean below."""
        assert isinstance(module, KLVAE)
        judged = measure(module, ImageSet.of(images, "held out"), HELD_OUT)
        decoded = module.reconstruct(images)
        metrics = {"psnr": judged.metrics["psnr"], **self.loss_networks.metrics(decoded, images)}
        return gallery({"original": images, "KL-VAE": decoded}), metrics

    def save(self, module: nn.Module, directory: Path) -> None:
        """See `Task`."""
        assert isinstance(module, KLVAE)
        if self.train_encoder:
            module.fit_statistics(self._training_images(next(module.parameters()).device))
        module.save(directory)

    def _training_images(self, device: torch.device) -> Iterator[Tensor]:
        for k in range(STATISTICS_BATCHES):
            yield self.stream.batch(k * self.batch, self.batch).need("images").to(device)


def klvae() -> KLVAERecipe:
    """The shipped teacher: f8, 8 channels, L1 + KL, on 64-pixel crops; about 40 minutes on one core."""
    return KLVAERecipe(
        network=KLVAEConfig(latent_channels=8),
        train=replace(ONE_CORE, iterations=9_000, batch=16, final_lr=0.02),
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
        train=replace(ONE_CORE, iterations=4_000, batch=8, lr=3e-4),
    )


def klvae_f8d4() -> KLVAERecipe:
    """First stage of the f8d4 teacher, the SD-VAE at a quarter of its widths: L1 + KL; an hour on one core."""
    return KLVAERecipe(
        network=KLVAEConfig(widths=(32, 64, 128, 128), layers_per_block=2, latent_channels=4, norm_groups=8),
        data=DataConfig(held_out=16),
        train=replace(ONE_CORE, iterations=8_250, batch=8, lr=8e-4, final_lr=0.02),
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


def klvae_128() -> KLVAERecipe:
    """An f8 teacher on 128-pixel crops, in one stage: L1 + KL + LPIPS, then a discriminator; minutes on a large GPU."""
    return KLVAERecipe(
        network=KLVAEConfig(widths=(32, 64, 128, 128), layers_per_block=2, latent_channels=4, norm_groups=8),
        weights=KLVAEWeights(l1=1.0, kl=1e-6, perceptual=1.0, adversarial=0.2),
        discriminator=DiscriminatorConfig(width=64, norm_groups=8, start=1_800),
        data=DataConfig(size=128, held_out=32, keep_mb=2_048),
        train=replace(ONE_GPU, iterations=3_000, batch=128, lr=8e-4),
    )
