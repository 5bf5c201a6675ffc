"""The things that are trained here: a KL-VAE, and a RAC on a frozen teacher."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from ..coders.klvae import KLVAE
from ..coders.protocol import Coder
from ..coders.rac import RAC
from ..data import Batch, Stream
from ..draws import Draws
from ..evaluate.latents import LatentAgreement
from ..evaluate.metrics import psnr
from ..objectives.klvae import KLVAEWeights, klvae_terms
from ..objectives.rac import Coding, RACObjective, rac_terms

STATISTICS_BATCHES = 16
"""Training batches whose latents give a KL-VAE its scale and shift."""


@dataclass
class KLVAETask:
    """Trains a KL-VAE; its statistics are fitted, on training images, whenever it is saved."""

    module: KLVAE
    loss_weights: KLVAEWeights
    stream: Stream
    batch: int
    frozen: Sequence[nn.Module] = ()

    @property
    def weights(self) -> Mapping[str, float]:
        """See `Task`."""
        return asdict(self.loss_weights)

    def terms(self, batch: Batch, draws: Draws, iteration: int) -> dict[str, Tensor]:
        """See `Task`."""
        return klvae_terms(self.module, batch.images, draws)

    def gallery(self, module: nn.Module, images: Tensor) -> tuple[Tensor, dict[str, float]]:
        """Originals above, reconstructions from the posterior's mean below."""
        assert isinstance(module, KLVAE)
        again = module.reconstruct(images)
        return sheet([images, again]), {"psnr": mean_psnr(again, images)}

    def save(self, module: nn.Module, directory: Path) -> None:
        """See `Task`."""
        assert isinstance(module, KLVAE)
        device = next(module.parameters()).device
        module.fit_statistics(self._training_images(device))
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

    @property
    def frozen(self) -> Sequence[nn.Module]:
        """See `Task`."""
        return (self.teacher,)

    @property
    def weights(self) -> Mapping[str, float]:
        """See `Task`."""
        return self.objective.weights.chosen()

    def terms(self, batch: Batch, draws: Draws, iteration: int) -> dict[str, Tensor]:
        """See `Task`."""
        latents = batch.latents
        if latents is None:
            with torch.no_grad():
                latents = self.teacher.encode(batch.images)
        module = self.module
        coding = Coding(module.field, module.states, module.contract, self.teacher.decode)
        return rac_terms(coding, batch.images, latents, self.objective, draws)

    def gallery(self, module: nn.Module, images: Tensor) -> tuple[Tensor, dict[str, float]]:
        """Rows: originals; the teacher; RAC from the teacher's latents at one step and at its own number; RAC alone.

        `psnr` is that of the fourth row, `explained_variance` that of the teacher's latents by RAC's.
        """
        assert isinstance(module, RAC)
        latents = self.teacher.encode(images)
        own = module.encode(images)
        rows: dict[str, Callable[[], Tensor]] = {
            "psnr_teacher": lambda: self.teacher.decode(latents),
            "psnr_1_step": lambda: module.decode(latents, steps=1),
            "psnr": lambda: module.decode(latents),
            "psnr_round_trip": lambda: module.decode(own),
        }
        decoded = {name: row() for name, row in rows.items()}
        figures = {name: mean_psnr(image, images) for name, image in decoded.items()}
        agreement = LatentAgreement()
        agreement.update(own, latents)
        figures["explained_variance"] = float(agreement.explained_variance().mean())
        return sheet([images, *decoded.values()]), figures

    def save(self, module: nn.Module, directory: Path) -> None:
        """See `Task`."""
        assert isinstance(module, RAC)
        module.save(directory)


def mean_psnr(image: Tensor, reference: Tensor) -> float:
    """Mean over the images of their PSNR, in dB."""
    return float(psnr(image, reference).mean())


def sheet(rows: Sequence[Tensor]) -> Tensor:
    """Rows of images, each B 3 H W, as one picture 1 3 (rows H) (B W)."""
    return torch.cat([torch.cat(list(row.float().cpu()), dim=-1) for row in rows], dim=-2)[None]
