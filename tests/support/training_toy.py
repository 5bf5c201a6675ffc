"""A one-layer task and a synthetic stream to train it on; run as a script, a training that a test can kill."""

from __future__ import annotations

import math
import sys
import time
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rac.data import Batch
from rac.data.pictures import Fingerprint
from rac.draws import Draws
from rac.objectives.image_terms import ImageLosses, image_terms
from rac.runtime import generator
from rac.storage import write_tensors
from rac.train import TrainConfig, fit
from rac.train.discriminator import DiscriminatorConfig, PatchDiscriminator
from rac.train.task import Adversary

PICTURES = Fingerprint(None, "toy")
"""The fingerprint of images that no file holds."""


@dataclass
class ToyStream:
    """Images of smooth noise, each a function of its number."""

    pause: float = 0.0
    dtype: torch.dtype = torch.float32
    skipped: dict[str, str] = field(default_factory=dict)
    classes: tuple[str, ...] = ()
    fingerprint: Fingerprint = PICTURES

    def batch(self, first: int, count: int) -> Batch:
        time.sleep(self.pause)
        return Batch(torch.cat([self._image(draw) for draw in range(first, first + count)]))

    def held_out(self) -> Tensor:
        return torch.cat([self._image(-1 - k) for k in range(2)])

    def _image(self, draw: int) -> Tensor:
        coarse = torch.rand(1, 3, 4, 4, generator=generator(3, "toy image", draw), dtype=torch.float64)
        return F.interpolate(2 * coarse - 1, scale_factor=2, mode="bilinear").to(self.dtype)


def one_layer() -> nn.Module:
    torch.manual_seed(0)
    return nn.Conv2d(3, 3, 3, padding=1)


@dataclass
class ToyTask:
    """Clean an image of noise: one term with noise of each image's own, one with a number the batch shares."""

    module: nn.Module = field(default_factory=one_layer)
    frozen: tuple[nn.Module, ...] = ()
    weights: dict[str, float] = field(default_factory=lambda: {"clean": 1.0, "faint": 0.5, "unused": 0.0})
    adversary: Adversary | None = None

    def terms(self, batch: Batch, draws: Draws, iteration: int) -> dict[str, Tensor]:
        images = batch.images
        clean = self.module(images + 0.3 * draws.normal(images))
        strength = float(torch.rand((), generator=draws.shared))
        faint = self.module(strength * images * draws.uniform(images).view(-1, 1, 1, 1))
        return {"clean": F.mse_loss(clean, images), "faint": faint.square().mean(), "unused": clean.abs().mean()}

    def gallery(self, module: nn.Module, images: Tensor) -> tuple[Tensor, dict[str, float]]:
        cleaned = module(images)
        return cleaned[:1], {"psnr": float(10 * torch.log10(4 / F.mse_loss(cleaned, images)))}

    def save(self, module: nn.Module, directory: Path) -> None:
        write_tensors(directory / "model.safetensors", module.state_dict())


@dataclass
class AdversarialTask(ToyTask):
    """The same against a discriminator, from iteration `start` on."""

    start: int = 0
    adversary: Adversary | None = None

    def __post_init__(self) -> None:
        torch.manual_seed(1)
        last = [parameter for parameter in self.module.parameters() if parameter.ndim > 1][-1]
        judge = DiscriminatorConfig(width=4, layers=1).build().to(last.dtype)
        self.adversary = Adversary(judge, last, weight=0.7, rate=2.0)

    def terms(self, batch: Batch, draws: Draws, iteration: int) -> dict[str, Tensor]:
        images = batch.images
        clean = self.module(images + 0.3 * draws.normal(images))
        losses = ImageLosses(discriminator=self.adversary.module if iteration >= self.start else None)
        return {
            "clean": F.mse_loss(clean, images),
            "faint": clean.square().mean(),
            **image_terms(losses, clean, images),
        }

    @property
    def judge(self) -> PatchDiscriminator:
        return self.adversary.module


def contents(run: Path) -> dict[str, bytes]:
    """The newest checkpoint and the coder of a run, as bytes."""
    newest = max((run / "checkpoints").iterdir())
    files = [*newest.glob("*.safetensors"), run / "coder" / "model.safetensors"]
    return {f"{file.parent.name}/{file.name}": file.read_bytes() for file in files}


SLOW = TrainConfig(
    iterations=200, batch=4, accumulate=2, checkpoint_minutes=0.002, device="cpu", threads=1, tensorboard=False
)
"""Long enough to be killed in the middle: a checkpoint about every tenth of a second."""


@dataclass
class PoisonedStream(ToyStream):
    """The last image of some batches holds a value that is not a number."""

    poisoned: tuple[int, ...] = ()
    size: int = 4
    with_latents: bool = False

    def batch(self, first: int, count: int) -> Batch:
        images = super().batch(first, count).images
        last = (first // self.size + 1) * self.size - 1
        if first // self.size in self.poisoned and last < first + count:
            images[last - first, 0, 2, 3] = math.nan
        return Batch(images, images.mean(1, keepdim=True) if self.with_latents else None)


if __name__ == "__main__":
    # The run's folder, how many minutes it waits for others, and iterations at which an image is not finite.
    stream = PoisonedStream(pause=0.03, poisoned=tuple(map(int, sys.argv[3:])))
    fit(ToyTask(), stream, replace(SLOW, patience_minutes=float(sys.argv[2])), Path(sys.argv[1]))
