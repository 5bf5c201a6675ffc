"""Inception-v3 as the FID knows it: the TensorFlow graph of 2015-12-05, its batch norms folded into the convolutions.

It differs from later Inceptions: average pools leave out the padding, the pool of the last block is a maximum, and
there are 1008 classes. Graph: Szegedy et al., Rethinking the Inception Architecture (arXiv 1512.00567); its use for
comparing sets of images: Heusel et al. (arXiv 1706.08500).

A weight file is safetensors in one of two layouts, in any float type:

- TensorFlow's names with `_` for `/`: `conv.weight`, `conv.bias`, ..., `mixed_10_tower_2_conv.bias`, and
  `logits.weight`, 1008 x 2048. Convolutions are out, in, height, width. It may end at mixed_8, and then makes no FID.
- pytorch-fid's, with batch norms of their own: `Conv2d_1a_3x3.conv.weight`, `Conv2d_1a_3x3.bn.running_var`, ...,
  `Mixed_7c.branch_pool.bn.bias`, `fc.weight`, `fc.bias`. They are folded on loading.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..storage import fit_tensors, read_tensors
from .extractor import Features
from .weight_files import Published, WeightFile

SIDE = 299
"""Side of the images that the network sees."""

CLASSES = 1008

# All convolutions have stride 1 and keep the size, but for these.
_STRIDE_2 = {"conv", "mixed_3_conv", "mixed_3_tower_conv_2", "mixed_8_tower_conv_1", "mixed_8_tower_1_conv_3"}
_NO_PADDING = {*_STRIDE_2, "conv_1", "conv_4"}


class _Layer(NamedTuple):
    name: str
    inputs: int
    outputs: int
    height: int
    width: int


class InceptionV3(nn.ModuleDict):
    """Inception-v3, its convolutions named as in the graph; ends after mixed_8, or, if `full`, with the logits."""

    def __init__(self, full: bool) -> None:
        convolutions = {layer.name: _convolution(layer) for layer in layers(full)}
        # The published scores leave the bias of the classes out, so it is not kept.
        head = {"logits": nn.Linear(2048, CLASSES, bias=False)} if full else {}
        super().__init__({**convolutions, **head})
        self.full = full

    @classmethod
    def load(cls, path: Path, full: bool | None = None) -> InceptionV3:
        """Reads a weight file in either layout; `full` demands a full one. Raises `WeightsError` if it does not fit."""
        tensors, _ = read_tensors(path)
        if "Conv2d_1a_3x3.conv.weight" in tensors:
            tensors = fold_batch_norms(tensors)
        tensors.pop("logits.bias", None)
        network = cls("logits.weight" in tensors if full is None else full)
        fit_tensors(network, tensors, str(path))
        return network.eval().requires_grad_(False)

    def to_mixed_7(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """Returns mixed_7, B 768 17 17, and mixed_6's first branch, B 192 17 17, of images B 3 H W in [-1, 1]."""
        # Not antialiased, and half-pixel centres: as pytorch-fid resizes, whose metrics are the common ones.
        x = F.interpolate(image, (SIDE, SIDE), mode="bilinear", align_corners=False)
        x = F.max_pool2d(self._run(x, "conv", "conv_1", "conv_2"), 3, 2)
        x = F.max_pool2d(self._run(x, "conv_3", "conv_4"), 3, 2)
        for block in ("mixed", "mixed_1", "mixed_2"):
            x = torch.cat(self._pooled_towers(x, block, 1, 2, 3), 1)
        x = torch.cat([*self._towers(x, "mixed_3", 1, 3), F.max_pool2d(x, 3, 2)], 1)
        for block in ("mixed_4", "mixed_5"):
            x = torch.cat(self._pooled_towers(x, block, 1, 3, 5), 1)
        mixed_6 = self._pooled_towers(x, "mixed_6", 1, 3, 5)
        mixed_7 = self._pooled_towers(torch.cat(mixed_6, 1), "mixed_7", 1, 3, 5)
        return torch.cat(mixed_7, 1), mixed_6[0]

    def to_mixed_10(self, mixed_7: Tensor) -> Tensor:
        """Returns mixed_10, B 2048 8 8, from mixed_7; only a full network can."""
        towers = self._towers(mixed_7, "mixed_8", 0, 2, 4)
        x = torch.cat([*towers, F.max_pool2d(mixed_7, 3, 2)], 1)
        x = self._fork(x, "mixed_9", _average(x))
        return self._fork(x, "mixed_10", F.max_pool2d(x, 3, 1, 1))

    def _run(self, x: Tensor, *names: str) -> Tensor:
        for name in names:
            x = F.relu(self[name](x))
        return x

    def _towers(self, x: Tensor, block: str, *lengths: int) -> list[Tensor]:
        """Returns the outputs of the branches "", "tower" and "tower_1".

        `lengths` are their numbers of convolutions; 0: the block lacks the branch.
        """
        names = (block, f"{block}_tower", f"{block}_tower_1")
        return [
            self._run(x, *_chain(name, length))
            for name, length in zip(names[: len(lengths)], lengths, strict=True)
            if length
        ]

    def _pooled_towers(self, x: Tensor, block: str, *lengths: int) -> list[Tensor]:
        """Returns the outputs of `_towers`, and of "tower_2", which sees the average of its neighbourhood."""
        return [*self._towers(x, block, *lengths), self._run(_average(x), f"{block}_tower_2_conv")]

    def _fork(self, x: Tensor, block: str, pooled: Tensor) -> Tensor:
        """Computes mixed_9 and mixed_10, whose towers end in a 1 x 3 and a 3 x 1 convolution side by side."""
        tower = self._run(x, f"{block}_tower_conv")
        tower_1 = self._run(x, f"{block}_tower_1_conv", f"{block}_tower_1_conv_1")
        return torch.cat(
            [
                self._run(x, f"{block}_conv"),
                self._run(tower, f"{block}_tower_mixed_conv"),
                self._run(tower, f"{block}_tower_mixed_conv_1"),
                self._run(tower_1, f"{block}_tower_1_mixed_conv"),
                self._run(tower_1, f"{block}_tower_1_mixed_conv_1"),
                self._run(pooled, f"{block}_tower_2_conv"),
            ],
            1,
        )


class _Inception(nn.Module):
    """Base class of both Inception extractors."""

    spatial_width = 7 * 17 * 17

    def __init__(self, path: Path, full: bool | None) -> None:
        super().__init__()
        self.path = path
        self.network = InceptionV3.load(path, full)


class Inception768(_Inception):
    """Extractor of the mean of mixed_7, B 768. Makes FID-768, which is not comparable with FID.

    Its spatial features are those of `Inception2048`.
    """

    width = 768
    label = "768"
    has_logits = False

    def __init__(self, path: Path) -> None:
        super().__init__(path, full=None)

    def forward(self, image: Tensor) -> Features:
        """Returns the features of images B 3 H W in [-1, 1], of any size."""
        mixed_7, first = self.network.to_mixed_7(image)
        return Features(_mean(mixed_7), _spatial(first))


class Inception2048(_Inception):
    """Extractor of the mean of mixed_10, B 2048: the features of the FID. Its logits, B 1008, are without bias.

    Spatial features: the first 7 channels of mixed_6's first branch, 7 x 17 x 17 = 2023 (Nash et al., arXiv
    2103.03841, as public evaluation code takes them); so sFID-2023.
    """

    width = 2048
    label = ""
    has_logits = True

    def __init__(self, path: Path) -> None:
        super().__init__(path, full=True)

    def forward(self, image: Tensor) -> Features:
        """Returns the features of images B 3 H W in [-1, 1], of any size."""
        mixed_7, first = self.network.to_mixed_7(image)
        pooled = _mean(self.network.to_mixed_10(mixed_7))
        return Features(pooled, _spatial(first), self.network["logits"](pooled))


# ------------------------------------------------------------------------------------------------- the graph


def layers(full: bool) -> Iterator[_Layer]:
    """Yields the convolutions in their order, up to mixed_8 or, if `full`, to mixed_10."""
    yield from _convolutions("", 3, (32, 3, 3), (32, 3, 3), (64, 3, 3), (80, 1, 1), (192, 3, 3))
    for block, inputs, pooled in (("mixed", 192, 32), ("mixed_1", 256, 64), ("mixed_2", 288, 64)):
        yield from _convolutions(block, inputs, (64, 1, 1))
        yield from _convolutions(f"{block}_tower", inputs, (48, 1, 1), (64, 5, 5))
        yield from _convolutions(f"{block}_tower_1", inputs, (64, 1, 1), (96, 3, 3), (96, 3, 3))
        yield from _convolutions(f"{block}_tower_2", inputs, (pooled, 1, 1))
    yield from _convolutions("mixed_3", 288, (384, 3, 3))
    yield from _convolutions("mixed_3_tower", 288, (64, 1, 1), (96, 3, 3), (96, 3, 3))
    for block, n in (("mixed_4", 128), ("mixed_5", 160), ("mixed_6", 160), ("mixed_7", 192)):
        yield from _convolutions(block, 768, (192, 1, 1))
        yield from _convolutions(f"{block}_tower", 768, (n, 1, 1), (n, 1, 7), (192, 7, 1))
        yield from _convolutions(f"{block}_tower_1", 768, (n, 1, 1), (n, 7, 1), (n, 1, 7), (n, 7, 1), (192, 1, 7))
        yield from _convolutions(f"{block}_tower_2", 768, (192, 1, 1))
    yield from _convolutions("mixed_8_tower", 768, (192, 1, 1), (320, 3, 3))
    yield from _convolutions("mixed_8_tower_1", 768, (192, 1, 1), (192, 1, 7), (192, 7, 1), (192, 3, 3))
    for block, inputs in (("mixed_9", 1280), ("mixed_10", 2048)) if full else ():
        yield from _convolutions(block, inputs, (320, 1, 1))
        yield from _convolutions(f"{block}_tower", inputs, (384, 1, 1))
        yield from _convolutions(f"{block}_tower_mixed", 384, (384, 1, 3), (384, 3, 1))
        yield from _convolutions(f"{block}_tower_1", inputs, (448, 1, 1), (384, 3, 3))
        yield from _convolutions(f"{block}_tower_1_mixed", 384, (384, 1, 3), (384, 3, 1))
        yield from _convolutions(f"{block}_tower_2", inputs, (192, 1, 1))


def _convolutions(branch: str, inputs: int, *sizes: tuple[int, int, int]) -> Iterator[_Layer]:
    """Yields a branch's convolutions of (outputs, height, width), each reading the one before."""
    for name, (outputs, height, width) in zip(_chain(branch, len(sizes)), sizes, strict=True):
        yield _Layer(name, inputs, outputs, height, width)
        inputs = outputs


def _chain(branch: str, length: int) -> list[str]:
    """Returns the names of a branch's convolutions, numbered from the second on: conv, conv_1, conv_2."""
    start = f"{branch}_conv" if branch else "conv"
    return [start, *(f"{start}_{index}" for index in range(1, length))]


def _convolution(layer: _Layer) -> nn.Conv2d:
    return nn.Conv2d(
        layer.inputs,
        layer.outputs,
        (layer.height, layer.width),
        stride=2 if layer.name in _STRIDE_2 else 1,
        padding=0 if layer.name in _NO_PADDING else (layer.height // 2, layer.width // 2),
    )


def _average(x: Tensor) -> Tensor:
    return F.avg_pool2d(x, 3, 1, 1, count_include_pad=False)


def _mean(x: Tensor) -> Tensor:
    return x.mean(dim=(2, 3))


def _spatial(first_branch: Tensor) -> Tensor:
    return first_branch[:, :7].flatten(1)


# ------------------------------------------------------------------------------------- pytorch-fid's layout

_A = ("1x1", "5x5_1", "5x5_2", "3x3dbl_1", "3x3dbl_2", "3x3dbl_3", "_pool")
_B = ("3x3", "3x3dbl_1", "3x3dbl_2", "3x3dbl_3")
_C = ("1x1", *(f"7x7_{i}" for i in range(1, 4)), *(f"7x7dbl_{i}" for i in range(1, 6)), "_pool")
_D = ("3x3_1", "3x3_2", *(f"7x7x3_{i}" for i in range(1, 5)))
_E = ("1x1", "3x3_1", "3x3_2a", "3x3_2b", "3x3dbl_1", "3x3dbl_2", "3x3dbl_3a", "3x3dbl_3b", "_pool")
_BLOCKS = {"5b": _A, "5c": _A, "5d": _A, "6a": _B, "6b": _C, "6c": _C, "6d": _C, "6e": _C, "7a": _D, "7b": _E, "7c": _E}
_STEM = ("1a_3x3", "2a_3x3", "2b_3x3", "3b_1x1", "4a_3x3")

BATCH_NORM_EPSILON = 1e-3


def pytorch_fid_names() -> list[str]:
    """Returns the names of the same convolutions in pytorch-fid's file, in the order of `layers(full=True)`."""
    stem = [f"Conv2d_{name}" for name in _STEM]
    return [*stem, *(f"Mixed_{block}.branch{name}" for block, names in _BLOCKS.items() for name in names)]


def fold_batch_norms(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Converts pytorch-fid's tensors to this module's. Missing ones stay missing, for the strict loading to name."""
    folded = {"logits.weight": tensors["fc.weight"]} if "fc.weight" in tensors else {}
    for name, layer in zip(pytorch_fid_names(), layers(full=True), strict=True):
        parts = ("conv.weight", "bn.weight", "bn.bias", "bn.running_mean", "bn.running_var")
        if any(f"{name}.{part}" not in tensors for part in parts):
            continue
        weight, scale, shift, mean, variance = (tensors[f"{name}.{part}"].double() for part in parts)
        gain = scale / (variance + BATCH_NORM_EPSILON).sqrt()
        folded[f"{layer.name}.weight"] = (weight * gain.view(-1, 1, 1, 1)).float()
        folded[f"{layer.name}.bias"] = (shift - mean * gain).float()
    return folded


def _converted(published: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Converts pytorch-fid's tensors to this module's. Raises `KeyError` for one that is missing."""
    folded = fold_batch_norms(published)
    for layer in layers(full=True):
        if f"{layer.name}.weight" not in folded:
            raise KeyError(layer.name)
    return {**folded, "logits.weight": published["fc.weight"]}


_PUBLISHED = Published(
    ("pt_inception-2015-12-05-6726825d.pth", "weights-inception-2015-12-05-6726825d.pth"),
    "pytorch-fid and torch-fidelity, the Inception of 2015-12-05",
)
INCEPTION = WeightFile(
    ("inception_v3_2015-12-05.safetensors",), "inception-2048 (FID, sFID, Inception Score)", (_PUBLISHED,), _converted
)
INCEPTION_TO_MIXED_8 = WeightFile(
    ("inception_v3_2015-12-05.safetensors", "inception_v3_2015-12-05_to_mixed_8_fp16.safetensors"),
    "inception-768 (FID-768, KID-768)",
    (_PUBLISHED,),
    _converted,
)
