"""Training of a DGAE, encoder and flow decoder together or the decoder alone: the recipe, its task, and its presets."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from .. import hub, runtime
from ..coders.dgae import DGAE, DGAEConfig
from ..coders.klvae import KLVAEConfig
from ..coders.protocol import Coder
from ..data import Batch, DataConfig, Stream
from ..draws import Draws
from ..errors import RacError
from ..evaluate.cost import CostRow, coder_rows
from ..fields import UNetConfig
from ..flow.times import TimeDistribution
from ..objectives.dgae import DGAEWeights, decoder_terms, dgae_terms
from ..train import Fitted, PartTerms, TrainConfig
from ..train.adversary import ImageNetworks
from ..train.discriminator import DiscriminatorConfig
from .klvae import small_klvae
from .rac import decoder_plain
from .recipe import (
    ONE_CORE,
    SMALL_UNET,
    STATISTICS_BATCHES,
    coder_parts,
    coder_terms,
    gallery,
    mean_psnr,
    prepared_from,
    run_recipe,
    tiny_data,
    tiny_train,
    with_latents,
)


@dataclass(frozen=True)
class DGAERecipe:
    """Recipe that trains a DGAE on images."""

    product: ClassVar[str] = "coder"
    steps_field: ClassVar[str | None] = "steps"

    encoder: KLVAEConfig = field(default_factory=lambda: DGAEConfig().encoder)
    """The KL-VAE whose encoder it has."""
    decoder: UNetConfig = field(default_factory=UNetConfig)
    """The U-Net."""
    steps: int = 50
    """Default number of steps of the finished coder."""
    start: str | None = None
    """A coder to start from, instead of random weights: a KL-VAE, whose encoder is taken, or a DGAE of the same
    networks. A shipped name, a directory or a hub name."""
    train_encoder: bool = True
    """Train the encoder too. Without it only the decoder is trained, on the latents that `start` gives; they stay as
    they are, bit for bit. The decoder then learns to decode the posterior's mean, without noise.
    """
    weights: DGAEWeights = field(default_factory=DGAEWeights)
    times: TimeDistribution = "uniform"
    """Distribution of the times at which the velocity is learned."""
    data: DataConfig = field(default_factory=DataConfig)
    train: TrainConfig = field(default_factory=TrainConfig)

    @property
    def latents_of(self) -> str | None:
        """Name of the coder whose latents are trained on: `start` if the encoder is frozen, otherwise None."""
        return None if self.train_encoder else self.start

    def prepares(self) -> dict[str, Any]:
        """Returns everything that prepared crops depend on, as JSON."""
        return prepared_from(self)

    def task(self, coder: Coder | None = None) -> DGAETask:
        """Builds the networks and the task that trains them; `coder` is trained in place of the recipe's own network.

        Raises `RacError` for a start of another family or shape, and for a frozen encoder without a start;
        `WeightsError` where LPIPS is wanted and its weights are not found.
        """
        weights = {**asdict(self.weights), "adversarial": 0.0}
        networks = ImageNetworks.build(weights, DiscriminatorConfig(), self.train.rng_seed, "weights", self.data.sizes)
        torch.manual_seed(runtime.derived_seed(self.train.rng_seed, "weights"))
        start = None if self.start is None else hub.load(self.start)
        module = self._coder(start) if coder is None else coder.requires_grad_(True)
        if not isinstance(module, DGAE):
            raise RacError(f"this recipe trains a DGAE, not a {type(module).__name__}")
        if self.train.compile:
            module.field.compile()  # in place; the averaged copy and what is saved stay plain
        return DGAETask(module, self.weights, self.times, self.train.batch, networks, self._teacher(module, start))

    def trains(self, coder: Coder) -> bool:
        """Returns whether `task` accepts this coder."""
        return isinstance(coder, DGAE)

    def costs(self, name: str, side: int) -> list[CostRow]:
        """Counts parameters and MACs of encoder, U-Net and both, for images of `side` x `side`."""
        with torch.device("meta"):
            coder = self._config().build()
        return coder_rows(name, coder, side)

    def tiny(self) -> DGAERecipe:
        """Returns the same recipe at a size that runs in seconds on a CPU.

        A recipe of a frozen encoder keeps its networks, whose shape `start` decides.
        """
        encoder = replace(self.encoder, widths=(8,) * len(self.encoder.widths), layers_per_block=1, norm_groups=4)
        return replace(
            self,
            encoder=encoder if self.train_encoder else self.encoder,
            decoder=replace(self.decoder, width=8, blocks=1, norm_groups=4),
            steps=min(self.steps, 2),
            data=tiny_data(self.data),
            train=tiny_train(self.train),
        )

    def run(self, directory: Path, *, resume: bool = False, crops: Path | None = None) -> Fitted:
        """Trains in `directory`; `directory`/coder holds the result.

        `resume` continues the run in `directory` from its newest checkpoint. Prepared crops, if any, are kept in the
        folder `crops`, by default `directory`.crops. With a frozen encoder their latents are kept as well. Raises as
        `task`, and as `rac.train.fit`.
        """
        return run_recipe(self, directory, resume=resume, crops=crops)

    def _config(self) -> DGAEConfig:
        return DGAEConfig(self.encoder, self.decoder, self.steps, self.latents_of)

    def _coder(self, start: Coder | None) -> DGAE:
        coder = self._config().build()
        if start is not None:
            coder.take_encoder(start)
        elif not self.train_encoder:
            raise RacError("without a start there is no encoder to keep; give start, or train the encoder too")
        return coder

    def _teacher(self, module: DGAE, start: Coder | None) -> Coder | None:
        """Returns the coder whose latents a decoder is trained on; `module` itself where there is no start."""
        return None if self.train_encoder else start or module


@dataclass
class DGAETask:
    """Task that trains a DGAE; its statistics are fitted on training images whenever it is saved.

    With a teacher only the U-Net is trained, on the latents that the teacher's `encode` gives (the posterior's means,
    no noise), or on prepared ones; encoder and statistics stay as they are, bit for bit.
    """

    module: DGAE
    loss_weights: DGAEWeights
    times: TimeDistribution
    batch: int
    """Images in each of the batches that the statistics are fitted on."""
    networks: ImageNetworks = field(default_factory=ImageNetworks)
    teacher: Coder | None = None
    """The coder with the frozen encoder, whose latents come with the batches; None: the encoder is trained."""

    def __post_init__(self) -> None:
        if self.teacher is not None:
            self.module.freeze_encoder()
        unused = set() if self.teacher is None else {"kl"}
        weights = {name: weight for name, weight in asdict(self.loss_weights).items() if name not in unused}
        self.parts = coder_parts(self.module, weights, self.networks, "field")

    @property
    def frozen(self) -> Sequence[nn.Module]:
        """The teacher, if there is one, and LPIPS if its term has a weight."""
        if self.teacher is None or self.teacher is self.module:
            return self.networks.frozen
        return (self.teacher, *self.networks.frozen)

    @property
    def encoder(self) -> Coder | None:
        """The teacher, if there is one."""
        return self.teacher

    def prepare(self, batch: Batch) -> Batch:
        """Encodes the images if there is a teacher and the batch came without latents."""
        return batch if self.teacher is None else with_latents(batch, self.teacher)

    def terms(self, batch: Batch, draws: Draws, iteration: int) -> Iterator[PartTerms]:
        """Yields the terms of `dgae_terms`, or those of `decoder_terms` if the encoder is frozen."""
        losses, images = self.networks.losses(iteration), batch.need("images")
        if self.teacher is None:
            yield from coder_terms(dgae_terms(self.module, images, draws, losses, self.times))
            return
        yield from coder_terms(decoder_terms(self.module, images, batch.need("latents"), draws, losses, self.times))

    def gallery(self, modules: Mapping[str, nn.Module], images: Tensor) -> tuple[Tensor, dict[str, float]]:
        """Returns a picture of originals and reconstructions, and their metrics.

        Its columns: original; decoded from the posterior's mean in one step, and in the coder's own number. Each image
        has noise of its own, the same in every gallery. `psnr` is that of the last column.
        """
        coder = modules["coder"]
        assert isinstance(coder, DGAE)
        steps = coder.config.steps
        with runtime.reproducible():
            latents = coder.encode(images)
            noise = coder.noise_of(latents, range(len(images)))
            one_step = coder.decode(latents, 1, noise=noise)
            decoded = coder.decode(latents, noise=noise)
            metrics = {
                "psnr_1_step": mean_psnr(one_step, images),
                "psnr": mean_psnr(decoded, images),
                **self.networks.metrics(decoded, images),
            }
        columns = {"original": images, "DGAE, 1 step": one_step, f"DGAE, {steps} step{'s' * (steps > 1)}": decoded}
        return gallery(columns), metrics

    def save(self, modules: Mapping[str, nn.Module], stream: Stream, directory: Path) -> None:
        """Writes the coder, its statistics fitted on images of `stream` unless its encoder is frozen."""
        coder = modules["coder"]
        assert isinstance(coder, DGAE)
        if self.teacher is None:
            device = next(coder.parameters()).device
            batches = (stream.batch(k * self.batch, self.batch) for k in range(STATISTICS_BATCHES))
            coder.fit_statistics(batch.need("images").to(device) for batch in batches)
        coder.save(directory)


# ------------------------------------------------------------------------------------------- presets of the paper

WIDTHS = {"b": 128, "m": 192, "l": 256}
"""Base widths of the paper's three U-Nets, with 123, 276 and 491 million parameters."""

COMPRESSIONS = {"f8d4": (1, 2, 4, 4), "f16d8": (1, 2, 2, 4, 4), "f32d16": (1, 2, 2, 4, 4, 4)}
"""Widths of the encoder at strides 1, 2, 4, ..., in units of 128; latents of 256 x 256 are 4096, 2048, 1024 numbers."""


def published(size: str, compression: str) -> DGAERecipe:
    """Returns the paper's preset of a size ("b", "m", "l") and a compression (one of `COMPRESSIONS`), at 256 pixels."""
    channels = int(compression.split("d")[1])
    widths = tuple(128 * multiple for multiple in COMPRESSIONS[compression])
    return DGAERecipe(
        encoder=KLVAEConfig(widths, 2, channels, norm_groups=32, middle_attention=True),
        decoder=UNetConfig(width=WIDTHS[size]),
        data=DataConfig(size=256, held_out=16),
        train=TrainConfig(
            iterations=500_000,
            batch=96,
            lr=1e-4,
            betas=(0.9, 0.95),
            weight_decay=0.1,
            clip=1.0,
            ema=0.9999,
            warmup=10_000,
            schedule="cosine",
            final_lr=0.1,
            bf16=True,
            channels_last=True,
        ),
    )


# ------------------------------------------------------------------------------------------- presets for one core


def small(compression: str) -> DGAERecipe:
    """Returns the preset for one core of a compression such as "f16d8", at 64 pixels."""
    return DGAERecipe(
        encoder=small_klvae(compression),
        decoder=SMALL_UNET,
        steps=8,
        data=DataConfig(held_out=16, keep_mb=1_024),
        train=replace(ONE_CORE, iterations=5_000, batch=8, lr=4e-4, final_lr=0.05),
    )


def decoder_dgae() -> DGAERecipe:
    """A DGAE's decoder on klvae-f8d4's latents, to set beside decoder-plain and decoder-rac of the same network."""
    plain = decoder_plain()
    return DGAERecipe(
        encoder=small_klvae("f8d4"),
        decoder=SMALL_UNET,
        steps=8,
        start=plain.teacher,
        train_encoder=False,
        data=plain.data,
        train=plain.train,
    )


def _presets() -> Iterator[tuple[str, str, DGAERecipe]]:
    for size in WIDTHS:
        for compression in COMPRESSIONS:
            text = f"DGAE-{size.upper()} of the paper at {compression}, for several large GPUs: velocity + KL + LPIPS."
            yield f"dgae-{size}-{compression}", text, published(size, compression)
    for compression in ("f8d4", "f8d2", "f16d8", "f16d4"):
        text = f"A small DGAE at {compression}, 64-pixel crops, one core; klvae-64-{compression} has the same encoder."
        yield f"dgae-64-{compression}", text, small(compression)
    yield "decoder-dgae", decoder_dgae.__doc__ or "", decoder_dgae()


PRESETS = {name: (text, recipe) for name, text, recipe in _presets()}
"""Presets by name: a sentence on the purpose, and the recipe."""
