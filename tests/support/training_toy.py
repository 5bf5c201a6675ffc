"""A one-layer task and a synthetic stream to train it on; run as a script, a training that a test can kill."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rac.data import Batch, Stream
from rac.data.pictures import Fingerprint
from rac.draws import Draws
from rac.objectives.image_terms import ImageLosses, image_terms
from rac.runtime import generator
from rac.storage import write_tensors
from rac.train import Part, PartTerms, TrainConfig, fit
from rac.train.adversary import AdaptiveWeight
from rac.train.discriminator import DiscriminatorConfig, PatchDiscriminator
from rac.train.processes import leave

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
    encoder: None = None

    @property
    def parts(self) -> dict[str, Part]:
        return {"model": Part(self.module, self.weights)}

    def prepare(self, batch: Batch) -> Batch:
        return batch

    def terms(self, batch: Batch, draws: Draws, iteration: int) -> Iterator[PartTerms]:
        yield PartTerms("model", self.losses(batch, draws, iteration))

    def losses(self, batch: Batch, draws: Draws, iteration: int) -> dict[str, Tensor]:
        images = batch.images
        clean = self.module(images + 0.3 * draws.normal(images))
        strength = float(torch.rand((), generator=draws.shared))
        faint = self.module(strength * images * draws.uniform(images).view(-1, 1, 1, 1))
        return {"clean": F.mse_loss(clean, images), "faint": faint.square().mean(), "unused": clean.abs().mean()}

    def gallery(self, modules: Mapping[str, nn.Module], images: Tensor) -> tuple[Tensor, dict[str, float]]:
        cleaned = modules["model"](images)
        return cleaned[:1], {"psnr": float(10 * torch.log10(4 / F.mse_loss(cleaned, images)))}

    def save(self, modules: Mapping[str, nn.Module], stream: Stream, directory: Path) -> None:
        write_tensors(directory / "model.safetensors", modules["model"].state_dict())


@dataclass
class AdversarialTask(ToyTask):
    """The same against a discriminator, from iteration `start` on."""

    start: int = 0
    adversarial: float = 0.7
    rate: float = 2.0

    def __post_init__(self) -> None:
        torch.manual_seed(1)
        self.last = [name for name, parameter in self.module.named_parameters() if parameter.ndim > 1][-1]
        dtype = next(self.module.parameters()).dtype
        self.judge: PatchDiscriminator = DiscriminatorConfig(width=4, layers=1).build().to(dtype)

    @property
    def parts(self) -> dict[str, Part]:
        adaptive = AdaptiveWeight("adversarial", self.adversarial, self.last)
        adversary = Part(self.judge, {"discriminator": 1.0}, rate=self.rate, betas=(0.5, 0.9), averaged=False)
        return {"model": Part(self.module, self.weights, adaptive), "discriminator": adversary}

    def terms(self, batch: Batch, draws: Draws, iteration: int) -> Iterator[PartTerms]:
        terms = self.losses(batch, draws, iteration)
        yield PartTerms("model", {name: term for name, term in terms.items() if name != "discriminator"})
        if "discriminator" in terms:
            yield PartTerms("discriminator", {"discriminator": terms["discriminator"]})

    def losses(self, batch: Batch, draws: Draws, iteration: int) -> dict[str, Tensor]:
        images = batch.images
        clean = self.module(images + 0.3 * draws.normal(images))
        losses = ImageLosses(discriminator=self.judge if iteration >= self.start else None)
        return {
            "clean": F.mse_loss(clean, images),
            "faint": clean.square().mean(),
            "unused": clean.abs().mean(),
            **image_terms(losses, clean, images),
        }


class RunningNorm(nn.Module):
    """Batch norm by the running statistics of before the iteration, in training too: they are means over images, which
    is what lets it train alike however a batch is cut."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(1, channels, 1, 1))
        self.register_buffer("square", torch.ones(1, channels, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        mean, square = self.mean.clone(), self.square.clone()
        if self.training:
            with torch.no_grad():
                self.mean.lerp_(x.mean((0, 2, 3), keepdim=True), 0.1)
                self.square.lerp_(x.square().mean((0, 2, 3), keepdim=True), 0.1)
        return (x - mean) / (square - mean.square() + 1e-4).sqrt()


@dataclass
class ThreeParts:
    """As REPA-E trains: a coder that a generator's features align, a discriminator, and the generator on the coder's
    latents, with a batch norm, an average of its weights and buffers, and gradients of its own alone."""

    dtype: torch.dtype = torch.float64
    shared: bool = False
    """Leave it to the step that the generator's loss does not reach the coder, instead of detaching its latents."""
    frozen: tuple[nn.Module, ...] = ()
    encoder: None = None

    def __post_init__(self) -> None:
        torch.manual_seed(0)
        self.coder = nn.Conv2d(3, 3, 3, padding=1).to(self.dtype)
        self.generator = nn.Sequential(RunningNorm(3), nn.Conv2d(3, 3, 3, padding=1)).to(self.dtype)
        self.judge = DiscriminatorConfig(width=4, layers=1).build().to(self.dtype)
        self.seen: list[bool] = []
        """Whether the generator's statistics stood still while the coder's terms were computed."""

    @property
    def parts(self) -> dict[str, Part]:
        adaptive = AdaptiveWeight("adversarial", 0.5, "weight")
        return {
            "coder": Part(self.coder, {"clean": 1.0, "align": 0.5}, adaptive, averaged=False, rate=0.5, clip=0.05),
            "discriminator": Part(self.judge, {"discriminator": 1.0}, averaged=False, shard=False, betas=(0.5, 0.9)),
            "generator": Part(self.generator, {"flow": 1.0}, ema=0.5, average_buffers=True, weight_decay=0.1),
        }

    def prepare(self, batch: Batch) -> Batch:
        return batch

    def terms(self, batch: Batch, draws: Draws, iteration: int) -> Iterator[PartTerms]:
        images = batch.images
        noise = draws.normal(images)
        latent = self.coder(images + 0.3 * noise)
        self.generator.eval()
        before = self.generator[0].mean.clone()
        align = F.mse_loss(self.generator(latent), images)
        self.seen.append(torch.equal(before, self.generator[0].mean))
        self.generator.train()
        judged = image_terms(ImageLosses(discriminator=self.judge), latent, images)
        coder = {"clean": F.mse_loss(latent, images), "align": align, "adversarial": judged["adversarial"]}
        yield PartTerms("coder", coder, keep_graph=self.shared)
        yield PartTerms("discriminator", {"discriminator": judged["discriminator"]})
        flow = self.generator(latent if self.shared else latent.detach())
        yield PartTerms("generator", {"flow": F.mse_loss(flow, noise)})

    def gallery(self, modules: Mapping[str, nn.Module], images: Tensor) -> tuple[Tensor, dict[str, float]]:
        assert not any(module.training for module in modules.values())
        made = modules["generator"](modules["coder"](images.to(self.dtype)))
        return made[:1].float(), {"error": float(F.mse_loss(made, images))}

    def save(self, modules: Mapping[str, nn.Module], stream: Stream, directory: Path) -> None:
        tensors = {f"{name}.{key}": value for name in modules for key, value in modules[name].state_dict().items()}
        write_tensors(directory / "model.safetensors", tensors)


def contents(run: Path) -> dict[str, bytes]:
    """The newest checkpoint and the coder of a run, as bytes."""
    newest = max((run / "checkpoints").iterdir())
    files = [*newest.glob("*.safetensors"), run / "coder" / "model.safetensors"]
    return {f"{file.parent.name}/{file.name}": file.read_bytes() for file in files}


SLOW = TrainConfig(
    iterations=200, batch=4, accumulate=2, checkpoint_minutes=0.002, device="cpu", threads=1, tensorboard=False
)
"""Long enough to be killed in the middle: a checkpoint about every tenth of a second."""


PARTS = TrainConfig(iterations=4, batch=6, device="cpu", threads=1, log_every=1, gallery_every=2, tensorboard=False)
"""For `ThreeParts`."""


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
    # The run's folder, how many minutes it waits for others, and iterations at which an image is not finite; or
    # "parts", for a few iterations of several parts.
    run, minutes, *further = sys.argv[1:]
    if further == ["parts"]:
        fit(ThreeParts(), ToyStream(dtype=torch.float64), replace(PARTS, patience_minutes=float(minutes)), Path(run))
    else:
        stream = PoisonedStream(pause=0.03, poisoned=tuple(map(int, further)))
        fit(ToyTask(), stream, replace(SLOW, patience_minutes=float(minutes)), Path(run))
    leave()
