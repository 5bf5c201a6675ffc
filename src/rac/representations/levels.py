"""Features of several depths of a frozen network, by which a discriminator judges images (RAE, arXiv 2510.11690)."""

from __future__ import annotations

from abc import ABC, abstractmethod
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import RacError
from ..fields.transformer import PlainBlock
from ..storage import fit_tensors, read_tensors
from .efficientnet import pretrained
from .representation import IMAGENET
from .weight_files import Published, Tensors, WeightFile, find_weights

if TYPE_CHECKING:
    from typing_extensions import Self

LevelsName = Literal["dino-vits8", "efficientnet-lite0"]
"""Names of the networks that `load_levels` loads."""

SIDE = 224
"""Side of the images that the networks see."""


class Levels(nn.Module, ABC):
    """A frozen network that maps images to features of several depths, always in evaluation mode.

    - `channels`: number of channels of each depth.
    - `statistics`: mean and deviation, of each channel, by which pixels in [0, 1] are normalised.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, channels: tuple[int, ...], statistics: tuple[tuple[float, ...], tuple[float, ...]]) -> None:
        super().__init__()
        self.channels = channels
        for name, values in zip(("mean", "std"), statistics, strict=True):
            self.register_buffer(name, torch.tensor(values).view(1, 3, 1, 1), persistent=False)

    def forward(self, image: Tensor) -> list[Tensor]:
        """Returns the features, each B C N for N places, of images B 3 H W in [-1, 1], resized to 224 pixels.

        Gradients flow to the images.
        """
        image = F.interpolate(image, (SIDE, SIDE), mode="bilinear", align_corners=False)
        return self._features(((image + 1) / 2 - self.mean) / self.std)

    @abstractmethod
    def _features(self, pixels: Tensor) -> list[Tensor]:
        """Returns the features of normalised pixels of `SIDE` x `SIDE`."""

    def train(self, mode: bool = True) -> Self:
        """Leaves the network in evaluation mode."""
        return super().train(False)


class EfficientNetLevels(Levels):
    """Features of EfficientNet-Lite0 at strides 8, 16, 16, 32 and 32, whose weights the extra `metrics` brings."""

    last = (4, 7, 10, 14, 15)
    """Places of the blocks whose results are taken, each the last of its width."""

    def __init__(self) -> None:
        super().__init__((40, 80, 112, 192, 320), ((127 / 255,) * 3, (128 / 255,) * 3))
        self.network, _ = pretrained()
        self.eval().requires_grad_(False)

    def _features(self, pixels: Tensor) -> list[Tensor]:
        network, found = self.network, []
        x = network._swish(network._bn0(network._conv_stem(pixels)))
        for place, block in enumerate(network._blocks):
            x = block(x)
            if place in self.last:
                found.append(x.flatten(2))
        return found


def _converted(published: Tensors) -> dict[str, Tensor]:
    """Converts the published tensors of DINO, under the names of timm, to those of `DINOLevels`."""
    names = {
        ".norm1.": ".before_attention.",
        ".norm2.": ".before_mlp.",
        ".attn.qkv.": ".attention.qkv.",
        ".attn.proj.": ".attention.out.",
        ".mlp.fc1.": ".mlp.0.",
        ".mlp.fc2.": ".mlp.2.",
        "patch_embed.proj.": "patches.",
    }
    found = {name: published[name] for name in ("pos_embed", "cls_token")}  # which a file of another kind lacks
    for name, tensor in published.items():
        for theirs, ours in names.items():
            name = name.replace(theirs, ours)
        if not name.startswith("norm."):
            found[name] = tensor
    return found


DINO = WeightFile(
    ("dino_vits8.safetensors",),
    "the discriminator of RAE with DINO's features (discriminator.features dino-vits8)",
    (Published(("dino_deitsmall8_pretrain.pth", "dino_vit_small_patch8_224.pth"), "facebookresearch/dino, ViT-S/8"),),
    _converted,
)
"""The weight file of DINO ViT-S/8 (arXiv 2104.14294)."""


class DINOLevels(Levels):
    """Tokens of DINO ViT-S/8 after blocks 2, 5, 8 and 11, counted from 0, and its output once more.

    The bias of the keys is zero, and GELU has its tanh form, as in the discriminator of the paper's code.
    """

    width, patch, depth, heads = 384, 8, 12, 6
    taken = (2, 5, 8, 11)

    def __init__(self) -> None:
        super().__init__((self.width,) * (len(self.taken) + 1), IMAGENET)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, self.width))
        self.pos_embed = nn.Parameter(torch.zeros(1, (SIDE // self.patch) ** 2 + 1, self.width))
        self.patches = nn.Conv2d(3, self.width, self.patch, stride=self.patch)
        self.blocks = nn.ModuleList(
            PlainBlock(self.width, self.heads, 4 * self.width, 1e-6, "tanh") for _ in range(self.depth)
        )
        self.eval().requires_grad_(False)

    @classmethod
    def load(cls, path: Path) -> DINOLevels:
        """Reads a weight file. Raises `WeightsError` if it does not fit."""
        levels = cls()
        fit_tensors(levels, read_tensors(path)[0], str(path))
        for name, parameter in levels.named_parameters():
            if name.endswith("attention.qkv.bias"):
                parameter.data[cls.width : 2 * cls.width] = 0
        return levels

    def _features(self, pixels: Tensor) -> list[Tensor]:
        tokens = self.patches(pixels).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls_token.expand(len(pixels), -1, -1), tokens], dim=1) + self.pos_embed
        found = []
        for place, block in enumerate(self.blocks):
            x = block(x)
            if place in self.taken:
                found.append(x[:, 1:].transpose(1, 2))
        return [found[-1], *found]


def load_levels(name: LevelsName, weights: str | Path | None = None) -> Levels:
    """Loads a network by its name, on the CPU, in evaluation mode, frozen.

    - `dino-vits8`: that of the paper. Needs its weight file: `weights`, or dino_vits8.safetensors in the weights
      folder.
    - `efficientnet-lite0`: needs no file of weights; the extra `metrics` brings them.

    Raises `WeightsError` if there is no such file, or it does not fit, and `RacError` for another name.
    """
    if name == "efficientnet-lite0":
        return EfficientNetLevels()
    if name == "dino-vits8":
        return DINOLevels.load(find_weights(weights, DINO))
    raise RacError(f"features {name!r} are not known; expected dino-vits8 or efficientnet-lite0")
