"""What every foreign autoencoder needs to become a coder: its size, its pixel range and its statistics hidden.

A subclass says how its network encodes pixels to raw latents and back; `Adapter` does the rest.
"""

from __future__ import annotations

import json
from abc import abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from ..errors import RacError, WeightsError
from ..flow import Solver, TimeGrid
from ..images import pad_to_multiple
from ..latents import LatentSpec, denormalise, normalise
from ..storage import write_directory
from .protocol import Coder

if TYPE_CHECKING:
    from typing_extensions import Self

WEIGHTS = "diffusion_pytorch_model.safetensors"


class Adapter(Coder):
    """A coder around a network with habits of its own: images B 3 H W in [-1, 1], latents normalised."""

    network: Any

    def __init__(self, network: nn.Module, spec: LatentSpec) -> None:
        super().__init__()
        self.network = network
        self.spec = spec

    @classmethod
    @abstractmethod
    def from_config(cls, config: Mapping[str, Any]) -> Self:
        """Build the coder with random weights from what `config` gave. Raises `WeightsError`."""

    @property
    @abstractmethod
    def config(self) -> dict[str, Any]:
        """All that `from_config` needs, as plain JSON; `_class_name` names the kind of coder."""

    @abstractmethod
    def _encode(self, pixels: Tensor) -> Tensor:
        """Pixels in the network's range, sides divisible by the factor -> raw latent."""

    @abstractmethod
    def _decode(self, raw_latent: Tensor) -> Tensor:
        """Raw latent -> pixels in the network's range."""

    def encode(self, image: Tensor, steps: int | TimeGrid | None = None, solver: Solver | None = None) -> Tensor:
        """Image B 3 H W in [-1, 1] -> latent B c ceil(H/f) ceil(W/f); other sizes are padded by reflection."""
        self._refuse_flow(steps, solver)
        return normalise(self._encode(self._pixels(image)).to(image.dtype), self.spec)

    def decode(self, latent: Tensor, steps: int | TimeGrid | None = None, solver: Solver | None = None) -> Tensor:
        """Latent B c h w -> image B 3 h*f w*f in about [-1, 1], unclamped. Raises `RacError` as `LatentSpec.check`."""
        self._refuse_flow(steps, solver)
        self.spec.check(latent)
        half, middle = _affine(self.spec.range)
        return (self._decode(denormalise(latent, self.spec)).to(latent.dtype) - middle) / half

    def save(self, directory: str | Path, dtype: torch.dtype | None = None) -> None:
        """Write config.json and the weights (as `dtype`, if given); `load_adapter` reads them back, to float32.

        Both files are complete before either takes its name. Raises `RacError` if the directory cannot be written.
        """
        write_directory(directory, self.config, self.network.state_dict(), WEIGHTS, dtype)

    def _refuse_flow(self, steps: int | TimeGrid | None, solver: Solver | None) -> None:
        if steps is not None or solver is not None:
            raise RacError(f"a {type(self).__name__} codes at once; leave out steps and solver, or load a RAC")

    def _pixels(self, image: Tensor) -> Tensor:
        if image.ndim != 4 or image.shape[1] != 3:
            raise RacError(f"an image has shape B 3 H W, not {tuple(image.shape)}; rac.read_image gives one")
        padded, _ = pad_to_multiple(image, self.spec.factor)
        half, middle = _affine(self.spec.range)
        return padded * half + middle


class DiffusersCoder(Adapter):
    """A coder around one of diffusers' autoencoders, which work in [-1, 1] and keep statistics in their config."""

    network_class: ClassVar[str]

    def __init__(self, network: Any) -> None:
        super().__init__(network, spec_of(network.config))

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Self:
        """Build the network from a diffusers config. Raises `WeightsError` if it does not fit the class."""
        import diffusers

        try:
            return cls(getattr(diffusers, cls.network_class).from_config(dict(config)))
        except Exception as error:  # the network's constructor does not say how it fails
            reason = f"{type(error).__name__}: {error}".splitlines()[0]
            raise WeightsError(f"diffusers cannot build {cls.network_class} from this config ({reason})") from error

    @property
    def config(self) -> dict[str, Any]:
        """The network's own configuration, as diffusers writes it."""
        return json.loads(self.network.to_json_string())

    def _decode(self, raw_latent: Tensor) -> Tensor:
        return self.network.decode(raw_latent).sample


def spec_of(config: Mapping[str, Any]) -> LatentSpec:
    """Read a diffusers autoencoder's statistics.

    Its pipelines normalise by (raw - shift) * scale or, where per-channel statistics are given, by
    (raw - mean) * scale / std; in the terms of `LatentSpec`, that mean is (mean - shift) * scale.
    """
    widths = config.get("encoder_block_out_channels") or config["block_out_channels"]
    scale, shift = float(config.get("scaling_factor") or 1.0), float(config.get("shift_factor") or 0.0)
    mean, std = config.get("latents_mean"), config.get("latents_std")
    return LatentSpec(
        factor=2 ** (len(widths) - 1),
        channels=config["latent_channels"],
        scale=scale,
        shift=shift,
        mean=None if mean is None else tuple((value - shift) * scale for value in mean),
        std=None if std is None else tuple(std),
    )


def _affine(pixel_range: tuple[float, float]) -> tuple[float, float]:
    """Half-width and middle of a range: pixels = image * half + middle."""
    low, high = pixel_range
    return (high - low) / 2, (high + low) / 2


class TinyCoder(DiffusersCoder):
    """A coder around diffusers' AutoencoderTiny, the TAESD family in diffusers' clothes ([-1, 1] outside)."""

    network_class = "AutoencoderTiny"

    def _encode(self, pixels: Tensor) -> Tensor:
        return self.network.encode(pixels).latents


class DeepCompressionCoder(DiffusersCoder):
    """A coder around diffusers' AutoencoderDC (Chen et al. 2025): factors of 32 to 128, no posterior."""

    network_class = "AutoencoderDC"

    def _encode(self, pixels: Tensor) -> Tensor:
        return self.network.encode(pixels).latent
