"""LPIPS, the learned perceptual distance: how different two images look to a network that recognises things.

Zhang et al., The Unreasonable Effectiveness of Deep Features as a Perceptual Metric (arXiv 1801.03924), version 0.1,
with its linear weights. Report with AlexNet; train with VGG16.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import RacError
from ..storage import fit_tensors, read_tensors
from ..tensors import check_pair
from .weight_files import Published, Tensors, WeightFile, find_weights

Backbone = Literal["alex", "vgg16"]


def _converted(backbone: Tensors, linear: Tensors) -> dict[str, Tensor]:
    """Converts torchvision's classifier and the linear layers of the lpips package to this module's tensors."""
    places = sorted({int(name.split(".")[1]) for name in backbone if name.startswith("features.")})
    parts = [(index, place, part) for index, place in enumerate(places) for part in ("weight", "bias")]
    return {
        **{f"conv{index}.{part}": backbone[f"features.{place}.{part}"] for index, place, part in parts},
        **{f"lin{index}.weight": linear[f"lin{index}.model.1.weight"] for index in range(5)},
    }


FILES: dict[Backbone, WeightFile] = {
    "alex": WeightFile(
        ("lpips_alex_v0.1.safetensors",),
        "LPIPS with AlexNet (metric lpips-alex)",
        (
            Published(("alexnet-owt-7be5be79.pth", "alexnet-owt-4df8aa71.pth"), "torchvision, AlexNet, IMAGENET1K_V1"),
            Published(("alex.pth", "lpips_alex.pth"), "the lpips package, lpips/weights/v0.1/alex.pth"),
        ),
        _converted,
    ),
    "vgg16": WeightFile(
        ("lpips_vgg16_v0.1.safetensors", "lpips_vgg16_v0.1_fp16.safetensors"),
        "LPIPS with VGG16 (metric lpips-vgg16, and the perceptual term of training)",
        (
            Published(("vgg16-397923af.pth",), "torchvision, VGG16, IMAGENET1K_V1"),
            Published(("vgg.pth", "lpips_vgg.pth"), "the lpips package, lpips/weights/v0.1/vgg.pth"),
        ),
        _converted,
    ),
}
"""Weight files: `conv{i}.weight`, `conv{i}.bias` of the backbone, and `lin{i}.weight`, 1 C 1 1, of its five layers."""

EPSILON = 1e-10


@dataclass(frozen=True)
class _Convolution:
    outputs: int
    kernel: int = 3
    stride: int = 1
    padding: int = 1


@dataclass(frozen=True)
class _Trunk:
    """A backbone as five stages; each ends in a layer that is compared."""

    stages: tuple[tuple[_Convolution, ...], ...]
    pooled: tuple[int, ...]
    """The stages that begin with a max-pool."""
    pool: int
    """Side of the max-pool's window, whose stride is 2."""
    least: int
    """The shortest side of an image that reaches the last stage."""

    def convolutions(self) -> Iterator[nn.Conv2d]:
        inputs = 3
        for one in (one for stage in self.stages for one in stage):
            yield nn.Conv2d(inputs, one.outputs, one.kernel, one.stride, one.padding)
            inputs = one.outputs


_TRUNKS: dict[Backbone, _Trunk] = {
    "alex": _Trunk(
        stages=(
            (_Convolution(64, 11, 4, 2),),
            (_Convolution(192, 5, 1, 2),),
            (_Convolution(384),),
            (_Convolution(256),),
            (_Convolution(256),),
        ),
        pooled=(1, 2),
        pool=3,
        least=31,
    ),
    "vgg16": _Trunk(
        stages=tuple((_Convolution(n),) * count for n, count in ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3))),
        pooled=(1, 2, 3, 4),
        pool=2,
        least=16,
    ),
}


class LPIPS(nn.Module):
    """The LPIPS distance of image pairs B 3 H W in [-1, 1]: B, 0 for equal images. Gradients flow to the images.

    `LPIPS("alex")` has random weights; `LPIPS.load("alex")` the real ones.
    """

    shift: Tensor
    scale: Tensor

    def __init__(self, backbone: Backbone = "alex") -> None:
        super().__init__()
        if backbone not in _TRUNKS:
            raise RacError(f"LPIPS backbone {backbone!r} is not known; expected alex or vgg16")
        self.backbone = backbone
        self.trunk = _TRUNKS[backbone]
        # Flat names, which are those of the weight files.
        for index, convolution in enumerate(self.trunk.convolutions()):
            self.add_module(f"conv{index}", convolution)
        for index, stage in enumerate(self.trunk.stages):
            self.add_module(f"lin{index}", nn.Conv2d(stage[-1].outputs, 1, 1, bias=False))
        # ImageNet's statistics, brought from [0, 1] to [-1, 1].
        self.register_buffer("shift", torch.tensor([-0.030, -0.088, -0.188]).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("scale", torch.tensor([0.458, 0.448, 0.450]).view(1, 3, 1, 1), persistent=False)

    @classmethod
    def load(cls, backbone: Backbone = "alex", weights: str | Path | None = None) -> LPIPS:
        """Loads the weights of a file, or of the weights folder (`weight_files.find_weights`); evaluation mode, frozen.

        Raises `WeightsError` if there is no such file, or it does not fit.
        """
        distance = cls(backbone)
        path = find_weights(weights, FILES[backbone])
        tensors, _ = read_tensors(path)
        fit_tensors(distance, tensors, str(path))
        return distance.eval().requires_grad_(False)

    def forward(self, image: Tensor, reference: Tensor) -> Tensor:
        """Returns the distances, equation 1 of the paper.

        Raises `RacError` if the shapes differ, or a side is too short for the backbone.
        """
        check_pair(image, reference)
        if image.shape != reference.shape or image.ndim != 4 or image.shape[1] != 3:
            raise RacError(
                f"LPIPS compares images of one shape B 3 H W, not {tuple(image.shape)} and {tuple(reference.shape)}"
            )
        if min(image.shape[-2:]) < self.trunk.least:
            raise RacError(
                f"LPIPS ({self.backbone}) needs sides of at least {self.trunk.least} pixels, not "
                f"{image.shape[-2]} x {image.shape[-1]}; leave it out, or compare larger images"
            )
        total = image.new_zeros(image.shape[0])
        pairs = zip(self._layers(image), self._layers(reference), strict=True)
        for index, (one, other) in enumerate(pairs):
            difference = (_unit(one) - _unit(other)).square()
            total = total + self.get_submodule(f"lin{index}")(difference).mean(dim=(1, 2, 3))
        return total

    def _layers(self, image: Tensor) -> Iterator[Tensor]:
        x = (image - self.shift) / self.scale
        index = 0
        for number, stage in enumerate(self.trunk.stages):
            if number in self.trunk.pooled:
                x = F.max_pool2d(x, self.trunk.pool, 2)
            for _ in stage:
                x = F.relu(self.get_submodule(f"conv{index}")(x))
                index += 1
            yield x


def _unit(x: Tensor) -> Tensor:
    """Scales channels to length 1 at every place."""
    # Not sqrt(sum of squares): its gradient is NaN where all channels are 0.
    return x / (torch.linalg.vector_norm(x, dim=1, keepdim=True) + EPSILON)
