"""Adapters that make coders of foreign autoencoders, hiding their size, pixel range and statistics.

A subclass says how its network encodes pixels to raw moments and decodes raw latents; `Adapter` does the rest.
"""

from __future__ import annotations

import json
import re
from abc import abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from inspect import signature
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from ..config import from_json
from ..errors import RacError, WeightsError
from ..flow import Walk
from ..latents import LatentSpec, Statistics
from ..storage import CONFIG, DIFFUSERS, as_weights_error, fit_tensors, read_settings, read_weights, write_directory
from .protocol import Coder, Decoded, Keep, Network

if TYPE_CHECKING:
    from typing_extensions import Self

WEIGHTS = f"{DIFFUSERS}.safetensors"


class Adapter(Coder):
    """A coder around a foreign network with an `encoder` and a `decoder`, which each take one pass."""

    network: Any
    pixel_range: tuple[float, float] = (-1.0, 1.0)
    """Range of the network's own pixels, for images in [-1, 1]."""

    def __init__(self, network: nn.Module, spec: LatentSpec, statistics: Statistics | None = None) -> None:
        super().__init__(spec, statistics)
        self.network = network

    @classmethod
    @abstractmethod
    def from_config(cls, config: Mapping[str, Any]) -> Self:
        """Builds the coder with random weights from the JSON of `config`. Raises `WeightsError`."""

    @classmethod
    def load(cls, directory: str | Path) -> Self:
        """Reads a directory written by `save` or by diffusers: float32, in evaluation mode, frozen.

        Raises `WeightsError`.
        """
        directory = Path(directory)
        config = read_settings(directory)
        tensors, source = read_weights(directory, DIFFUSERS)
        with as_weights_error(str(directory / CONFIG)):
            coder = cls.from_config(config)
        fit_tensors(coder.network, _modern_names(tensors), source)
        return coder.eval().requires_grad_(False)

    @property
    @abstractmethod
    def config(self) -> dict[str, Any]:
        """The arguments of `from_config` as plain JSON; `_class_name` names the kind of coder."""

    @abstractmethod
    def _encode_pixels(self, pixels: Tensor) -> Tensor:
        """Encodes pixels in the network's range, sides divisible by the factor, to raw moments."""

    @abstractmethod
    def _decode_pixels(self, raw_latent: Tensor) -> Tensor:
        """Decodes a raw latent to pixels in the network's range."""

    def _moments(self, image: Tensor) -> Tensor:
        half, middle = self.affine()
        # Out of autocast's half precision, in which the posterior's exponentials overflow.
        return self._encode_pixels(image * half + middle).to(image.dtype)

    def _decode(self, latent: Tensor, walk: Walk | None, noise: Tensor | None, keep: Keep) -> Decoded:
        half, middle = self.affine()
        pixels = self._decode_pixels(self.statistics.denormalise(latent)).to(latent.dtype)
        return Decoded((pixels - middle) / half, 1)

    def affine(self) -> tuple[float, float]:
        """Returns the half-width and the middle of the network's range: pixels = image * half + middle."""
        low, high = self.pixel_range
        return (high - low) / 2, (high + low) / 2

    def networks(self) -> dict[str, Network]:
        """Returns the encoder and the decoder."""
        factor, channels = self.spec.factor, self.spec.channels

        def latent_shape(height: int, width: int) -> tuple[tuple[int, ...], ...]:
            return ((1, channels, height // factor, width // factor),)

        return {
            "encoder": Network(self.network.encoder, lambda height, width: ((1, 3, height, width),), "encode"),
            "decoder": Network(self.network.decoder, latent_shape, "decode"),
        }

    def _save(self, directory: Path, dtype: torch.dtype | None) -> None:
        write_directory(directory, self.config, self.network.state_dict(), WEIGHTS, dtype)


class DiffusersCoder(Adapter):
    """A coder around an autoencoder of diffusers, which works in [-1, 1] and keeps statistics in its config."""

    network_class: ClassVar[str]

    def __init__(self, network: Any) -> None:
        config = network.config
        widths = config.get("encoder_block_out_channels") or config["block_out_channels"]
        spec = LatentSpec(2 ** (len(widths) - 1), config["latent_channels"])
        super().__init__(network, spec, statistics_of(config))

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Self:
        """Builds the network from a diffusers config.

        Raises `WeightsError` if it does not fit the class, or has a key that the class does not know.
        """
        import diffusers

        network_class = getattr(diffusers, cls.network_class)
        arguments = signature(network_class.__init__).parameters
        try:
            network = network_class.from_config({key: config[key] for key in config if key in arguments})
            check_keys(config, network.config)  # which has keys of its own beside the arguments
            return cls(network)
        except RacError as error:  # of keys or statistics
            raise WeightsError(str(error)) from error
        except Exception as error:  # the network's constructor does not say how it fails
            reason = f"{type(error).__name__}: {error}".splitlines()[0]
            raise WeightsError(f"diffusers cannot build {cls.network_class} from this config ({reason})") from error

    @property
    def config(self) -> dict[str, Any]:
        """The network's own configuration, as diffusers writes it."""
        return json.loads(self.network.to_json_string())

    def _decode_pixels(self, raw_latent: Tensor) -> Tensor:
        return self.network.decode(raw_latent).sample


def check_keys(config: Mapping[str, Any], known: Iterable[str]) -> None:
    """Raises `WeightsError` for keys of a diffusers config that are not `known`, which diffusers itself would ignore.

    Keys that begin with an underscore are diffusers' own, such as its version.
    """
    if unknown := {key for key in config if not key.startswith("_")}.difference(known):
        raise WeightsError(f"unknown keys, {', '.join(sorted(unknown))}; correct or remove them")


@dataclass(frozen=True)
class _Scaling:
    """The keys of a diffusers config that hold statistics."""

    scaling_factor: float | None = None
    shift_factor: float | None = None
    latents_mean: tuple[float, ...] | None = None
    latents_std: tuple[float, ...] | None = None


def statistics_of(config: Mapping[str, Any]) -> Statistics:
    """Returns the statistics in a diffusers autoencoder's config.

    Pipelines normalise by (raw - shift) * scale or, where per-channel statistics are given, by
    (raw - mean) * scale / std. Raises `RacError` for values that cannot be statistics.
    """
    given = {field.name: config[field.name] for field in fields(_Scaling) if config.get(field.name) is not None}
    found = from_json(_Scaling, given, "the configuration")
    # A missing factor is 1; one of 0 is a fault, which `Statistics` names.
    scale = 1.0 if found.scaling_factor is None else found.scaling_factor
    mean, std = found.latents_mean, found.latents_std
    shift = 0.0 if found.shift_factor is None or mean is not None else found.shift_factor
    return Statistics.scaled(scale, shift, None if mean is None else [value * scale for value in mean], std)


class TinyCoder(DiffusersCoder):
    """A coder around diffusers' AutoencoderTiny, diffusers' version of the TAESD family ([-1, 1] outside)."""

    network_class = "AutoencoderTiny"

    def _encode_pixels(self, pixels: Tensor) -> Tensor:
        return self.network.encode(pixels).latents


class DeepCompressionCoder(DiffusersCoder):
    """A coder around diffusers' AutoencoderDC (Chen et al. 2025): factors of 32 to 128, no posterior."""

    network_class = "AutoencoderDC"

    def _encode_pixels(self, pixels: Tensor) -> Tensor:
        return self.network.encode(pixels).latent


def _modern_names(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Renames attention tensors to today's names.

    Files from before diffusers 0.15, such as sd-vae-ft-mse, have others.
    """
    names = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
    pattern = re.compile(r"(?<=\.attentions\.0\.)(query|key|value|proj_attn)(?=\.)")
    return {pattern.sub(lambda match: names[match[0]], name): tensor for name, tensor in tensors.items()}
