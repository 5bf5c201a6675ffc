"""The TAESD family of tiny autoencoders (Ollin Boer Bohan): TAESD, TAESDXL, TAESD3, TAEF1 and TAEF2.

Fully convolutional, 8 times smaller latents, images in [0, 1]. The members differ in their latent channels only;
TAEF2 also pools context into the blocks at latent resolution. The layers stand in the order of the published state
dicts, so those load strictly. Source: https://github.com/madebyollin/taesd (MIT).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..config import from_json, to_json
from ..errors import WeightsError
from ..fields.conv import ResidualBlock, context
from ..latents import LatentSpec, Statistics
from ..storage import fit_tensors
from .adapter import Adapter

if TYPE_CHECKING:
    from typing_extensions import Self

FACTOR = 8
POOLED_LATENT_STD = 0.85
"""Standard deviation of TAEF2's raw latents, about N(0, 0.85^2); the others' are about unit variance as they are."""


@dataclass(frozen=True)
class TAESDConfig:
    """Configuration of a member of the TAESD family."""

    latent_channels: int = 4
    """Latent channels: 4 (TAESD, TAESDXL), 16 (TAESD3, TAEF1) or 32 (TAEF2)."""
    pooled: bool = False
    """Pooled blocks at latent resolution, as in TAEF2."""
    width: int = 64


class TAESD(Adapter):
    """A coder of the TAESD family."""

    pixel_range = (0.0, 1.0)

    def __init__(self, config: TAESDConfig) -> None:
        statistics = Statistics.of(0.0, 1 / POOLED_LATENT_STD if config.pooled else 1.0)
        super().__init__(TAESDNetwork(config), LatentSpec(FACTOR, config.latent_channels), statistics)
        self._config = config

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Self:
        """Builds a coder with random weights from the JSON of `config`. Raises `RacError` naming what does not fit."""
        fields = {key: value for key, value in config.items() if key != "_class_name"}
        return cls(from_json(TAESDConfig, fields, "the TAESD config"))

    @property
    def config(self) -> dict[str, Any]:
        """The fields of `TAESDConfig`."""
        return {"_class_name": "TAESD", **to_json(self._config)}

    @classmethod
    def from_files(cls, encoder: Path, decoder: Path) -> Self:
        """Reads a published pair of .pth state dicts; their shapes tell which member it is. Raises `WeightsError`."""
        tensors = _read_pth(encoder)
        coder = cls(_infer_config(tensors, encoder))
        fit_tensors(coder.network.encoder, tensors, str(encoder))
        fit_tensors(coder.network.decoder, _read_pth(decoder), str(decoder))
        return coder

    @classmethod
    def load_pth(cls, path: str | Path) -> Self:
        """Reads a published pair of .pth files: NAME_encoder.pth or NAME_decoder.pth, or a folder with one pair.

        Raises `WeightsError` for anything else.
        """
        path = Path(path)
        if path.is_dir():
            encoders = sorted(path.glob("*_encoder.pth"))
            if not encoders:
                raise WeightsError(
                    f"{path} holds no coder; expected config.json and safetensors, or NAME_encoder.pth and "
                    "NAME_decoder.pth"
                )
            if len(encoders) > 1:
                names = ", ".join(file.name for file in encoders)
                raise WeightsError(f"{path} holds several TAESD pairs; give the path of one file: {names}")
            path = encoders[0]
        name = re.fullmatch(r"(.*)_(?:encoder|decoder)\.pth", path.name)
        if name is None:
            raise WeightsError(
                f"{path} is not a coder; expected a directory, or a file NAME_encoder.pth or NAME_decoder.pth"
            )
        coder = cls.from_files(path.with_name(f"{name[1]}_encoder.pth"), path.with_name(f"{name[1]}_decoder.pth"))
        return coder.eval().requires_grad_(False)

    def _encode_pixels(self, pixels: Tensor) -> Tensor:
        return self.network.encoder(pixels)

    def _decode_pixels(self, raw_latent: Tensor) -> Tensor:
        return self.network.decoder(raw_latent)


class TAESDNetwork(nn.Module):
    """Network of the TAESD family: `encoder` (pixels in [0, 1] -> raw latent) and `decoder` (raw latent -> pixels)."""

    def __init__(self, config: TAESDConfig) -> None:
        super().__init__()
        width = config.width

        def blocks(pooled: bool = False) -> list[nn.Module]:
            return [PooledBlock(width) if pooled else ResidualBlock(width) for _ in range(3)]

        def down(pooled: bool = False) -> list[nn.Module]:
            return [nn.Conv2d(width, width, 3, stride=2, padding=1, bias=False), *blocks(pooled)]

        def up(pooled: bool = False) -> list[nn.Module]:
            return [*blocks(pooled), nn.Upsample(scale_factor=2), nn.Conv2d(width, width, 3, padding=1, bias=False)]

        self.encoder = nn.Sequential(
            nn.Conv2d(3, width, 3, padding=1),
            ResidualBlock(width),
            *down(),
            *down(),
            *down(config.pooled),
            nn.Conv2d(width, config.latent_channels, 3, padding=1),
        )
        self.decoder = nn.Sequential(
            SoftClamp(),
            nn.Conv2d(config.latent_channels, width, 3, padding=1),
            nn.ReLU(),
            *up(config.pooled),
            *up(),
            *up(),
            ResidualBlock(width),
            nn.Conv2d(width, 3, 3, padding=1),
        )


class PooledBlock(ResidualBlock):
    """A residual block that first adds normalised context to its input."""

    def __init__(self, width: int) -> None:
        super().__init__(width)
        self.pool = context(width)

    def forward(self, x: Tensor) -> Tensor:
        """Maps B width h w to the same shape."""
        return super().forward(x + self.pool(x))


class SoftClamp(nn.Module):
    """A layer that keeps raw latents within (-3, 3)."""

    def forward(self, x: Tensor) -> Tensor:
        """Maps a tensor of any shape to the same shape."""
        return torch.tanh(x / 3) * 3


def _read_pth(path: Path) -> dict[str, Tensor]:
    """Reads a .pth state dict without running code from it. Raises `WeightsError`."""
    try:
        tensors = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise WeightsError(f"{path} does not exist; a TAESD pair has both its files side by side") from None
    except Exception as error:  # the unpickler fails in many ways on what is no pickle
        raise WeightsError(
            f"{path} is cut short, or is not a state dict of plain tensors; download it again"
        ) from error
    if not isinstance(tensors, dict) or not all(isinstance(tensor, Tensor) for tensor in tensors.values()):
        raise WeightsError(f"{path} holds no state dict of tensors; expected a TAESD encoder or decoder")
    return tensors


def _infer_config(encoder: Mapping[str, Tensor], source: Path) -> TAESDConfig:
    try:
        width, latent_channels = encoder["0.weight"].shape[0], encoder["14.weight"].shape[0]
    except KeyError as error:
        raise WeightsError(f"{source} is not a TAESD encoder: it lacks tensor {error}") from None
    return TAESDConfig(latent_channels, pooled="11.pool.0.weight" in encoder, width=width)
