"""The things that are trained here: a KL-VAE, and a RAC on a frozen teacher."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from ..coders.klvae import KLVAE
from ..coders.protocol import Coder
from ..coders.rac import RAC
from ..data import Batch, Stream
from ..draws import Draws
from ..errors import RacError
from ..evaluate.pictures import Panel, sheet, strip
from ..evaluate.protocol import Protocol, evaluate
from ..evaluate.references import Framing, References
from ..flow import Euler, MeanEuler
from ..images import from_pixels
from ..objectives.judged import ADVERSARIAL
from ..objectives.klvae import KLVAEWeights, decoder_terms, klvae_terms
from ..objectives.rac import Coding, RACObjective, rac_terms
from .jury import Jury, last_layer
from .task import Opponent

STATISTICS_BATCHES = 16
"""Training batches whose latents give a KL-VAE its scale and shift."""

SHOWN = 8
"""Images in a gallery, out of those held out."""

HELD_OUT = Protocol("held out", Framing(), figures=("psnr",))
"""What galleries are judged by."""


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
    jury: Jury = field(default_factory=Jury)
    train_encoder: bool = True

    def __post_init__(self) -> None:
        if not self.train_encoder:
            self.module.freeze_encoder()
        _check_weights(self.weights)

    @property
    def frozen(self) -> Sequence[nn.Module]:
        """See `Task`."""
        return self.jury.frozen

    @property
    def weights(self) -> Mapping[str, float]:
        """See `Task`."""
        unused = {ADVERSARIAL} if self.train_encoder else {ADVERSARIAL, "kl"}
        return {name: weight for name, weight in asdict(self.loss_weights).items() if name not in unused}

    @property
    def opponent(self) -> Opponent | None:
        """See `Task`."""
        return self.jury.opponent(last_layer(self.module.network.decoder), self.loss_weights.adversarial)

    def terms(self, batch: Batch, draws: Draws, iteration: int) -> dict[str, Tensor]:
        """See `Task`."""
        judges = self.jury.judges(iteration)
        if self.train_encoder:
            return klvae_terms(self.module, batch.images, draws, judges)
        latents = batch.latents
        if latents is None:
            with torch.no_grad():
                latents = self.module.encode(batch.images)
        return decoder_terms(self.module, batch.images, latents, judges)

    def gallery(self, module: nn.Module, images: Tensor) -> tuple[Tensor, dict[str, float]]:
        """Originals above, reconstructions from the posterior's mean below."""
        assert isinstance(module, KLVAE)
        judged = evaluate(module, References.of(images, "held out"), HELD_OUT, name="KL-VAE")
        decoded = module.reconstruct(images)
        figures = {"psnr": judged.figures["psnr"], **self.jury.figures(decoded, images)}
        return gallery({"original": images, "KL-VAE": decoded}), figures

    def save(self, module: nn.Module, directory: Path) -> None:
        """See `Task`."""
        assert isinstance(module, KLVAE)
        if self.train_encoder:
            module.fit_statistics(self._training_images(next(module.parameters()).device))
        module.save(directory)

    def _training_images(self, device: torch.device) -> Iterator[Tensor]:
        for k in range(STATISTICS_BATCHES):
            yield self.stream.batch(k * self.batch, self.batch).images.to(device)


@dataclass
class RACTask:
    """Trains a RAC to imitate a frozen teacher."""

    module: RAC
    teacher: Coder
    """Never trained, though gradients flow through its decoder."""
    objective: RACObjective
    jury: Jury = field(default_factory=Jury)

    def __post_init__(self) -> None:
        _check_weights(self.weights)

    @property
    def frozen(self) -> Sequence[nn.Module]:
        """See `Task`."""
        return (self.teacher, *self.jury.frozen)

    @property
    def weights(self) -> Mapping[str, float]:
        """See `Task`."""
        return {name: weight for name, weight in self.objective.weights.chosen().items() if name != ADVERSARIAL}

    @property
    def opponent(self) -> Opponent | None:
        """See `Task`."""
        return self.jury.opponent(last_layer(self.module.field), self.objective.weights.adversarial)

    def terms(self, batch: Batch, draws: Draws, iteration: int) -> dict[str, Tensor]:
        """See `Task`."""
        latents = batch.latents
        if latents is None:
            with torch.no_grad():
                latents = self.teacher.encode(batch.images)
        module = self.module
        judges = self.jury.judges(iteration)
        seed_noise = module.config.seed_noise
        solver = MeanEuler() if module.config.field.interval else Euler()
        coding = Coding(module.field, module.states, module.contract, self.teacher.decode, judges, seed_noise, solver)
        return rac_terms(coding, batch.images, latents, self.objective, draws)

    def gallery(self, module: nn.Module, images: Tensor) -> tuple[Tensor, dict[str, float]]:
        """Columns: original; teacher; RAC from the teacher's latent at one step, and at its own number where that is
        another; RAC alone.

        `psnr` is that of the last column but one, `explained_variance` that of the teacher's latents by RAC's.
        """
        assert isinstance(module, RAC)
        latents, steps = self.teacher.encode(images), module.config.steps
        decoded, told = module.decode(latents), f"{steps} step" + "s" * (steps > 1)
        picture = gallery(
            {
                "original": images,
                "teacher": self.teacher.decode(latents),
                "RAC, teacher's latent, 1 step": module.decode(latents, 1),
                f"RAC, teacher's latent, {told}": decoded,
                f"RAC alone, {told}": module.reconstruct(images),
            }
        )
        held_out, given = References.of(images, "held out"), replace(HELD_OUT, latents="teacher")
        one_step = replace(given, steps=1)
        alone = replace(HELD_OUT, figures=("psnr", "explained-variance"))
        own = evaluate(module, held_out, alone, name="RAC", teacher=self.teacher).figures
        return picture, {
            "psnr_teacher": evaluate(self.teacher, held_out, HELD_OUT, name="teacher").figures["psnr"],
            "psnr_1_step": evaluate(module, held_out, one_step, name="RAC", teacher=self.teacher).figures["psnr"],
            "psnr": evaluate(module, held_out, given, name="RAC", teacher=self.teacher).figures["psnr"],
            "psnr_round_trip": own["psnr"],
            "explained_variance": own["explained variance"],
            **self.jury.figures(decoded, images),
        }

    def save(self, module: nn.Module, directory: Path) -> None:
        """See `Task`."""
        assert isinstance(module, RAC)
        module.save(directory)


def _check_weights(weights: Mapping[str, float]) -> None:
    if not any(weights.values()):
        raise RacError(
            "no term but the adversarial one has a weight, so there is nothing to balance it against; give another, "
            "such as l1 or reconstruction"
        )


def gallery(columns: Mapping[str, Tensor]) -> Tensor:
    """Labelled columns of images, each B 3 H W, one row per image, as one picture 1 3 H W in [-1, 1]."""
    rows = [
        strip([Panel(image.float().cpu(), name) for name, image in zip(columns, row, strict=True)])
        for row in zip(*columns.values(), strict=True)
    ]
    return from_pixels(np.asarray(sheet(rows[:SHOWN])))
