"""DGAE: an encoder that takes one pass, and a decoder that is a flow from noise to the image, given the latent.

DGAE: Diffusion-Guided Autoencoder for Efficient Latent Representation Learning (arXiv 2506.09644), section 3. The
encoder is a KL-VAE's, layer for layer; the decoder is ADM's U-Net.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..config import differences, from_json, to_json
from ..errors import RacError
from ..fields import UNet, UNetConfig
from ..flow import Conditioned, Walk, integrate
from ..flow.grid import check_steps
from ..latents import LatentSpec, Statistics
from ..states import RGB
from ..storage import as_weights_error, fit_tensors
from .klvae import KLVAE, KLVAEConfig
from .native import NativeFiles, read_drop_in, read_native, write_native
from .posterior import gaussian, scale_and_shift
from .protocol import Coder, Decoded, Keep, Network, Way

FORMAT = "dgae"
"""Value of `format` in the config.json of a DGAE."""

VERSION = 1
"""Version of the file format."""

DROP_IN = "AutoencoderDGAE"
"""Value of `_class_name` in the config.json of a DGAE saved by diffusers (`rac.integrations.diffusers`)."""


@dataclass(frozen=True)
class DGAEConfig:
    """Configuration of a DGAE: everything but its weights. Raises `RacError` for steps below 1."""

    encoder: KLVAEConfig = field(
        default_factory=lambda: KLVAEConfig((128, 256, 512, 512), 2, 4, norm_groups=32, middle_attention=True)
    )
    """The KL-VAE whose encoder it has; the default is the SD-VAE's (f8, 4 channels)."""
    decoder: UNetConfig = field(default_factory=UNetConfig)
    """Shape of the U-Net; the default is DGAE-B's."""
    steps: int = 50
    """Default number of steps of decoding."""
    teacher: str | None = None
    """Name or directory of the coder whose frozen encoder this is, so that latents are the same; None: its own."""

    def __post_init__(self) -> None:
        check_steps(self.steps)

    @property
    def spec(self) -> LatentSpec:
        """Shape of the latents."""
        return LatentSpec(2 ** (len(self.encoder.widths) - 1), self.encoder.latent_channels)

    def build(self) -> DGAE:
        """Returns a coder with random weights whose statistics are still scale 1, shift 0."""
        return DGAE(self)


class DGAE(Coder):
    """DGAE, a coder that encodes in one pass and decodes by a flow from noise.

    Its latent is the posterior's mean. Decoding starts from standard normal noise of the image's shape, t = 0, and
    integrates v(x, t, z) to the image, t = 1; the field is given the raw latent z, enlarged by nearest neighbour to
    the image's size, beside x.
    """

    has_posterior = True

    def __init__(self, config: DGAEConfig, statistics: Statistics | None = None) -> None:
        super().__init__(config.spec, statistics)
        self.config = config
        self.teacher = config.teacher
        self.encoder, self.quant_conv = _encoder(config.encoder)
        self.field: nn.Module = UNet(config.decoder, RGB + config.spec.channels, RGB)

    @classmethod
    def of(cls, coder: Coder) -> DGAE:
        """Returns `coder` itself, typed as a DGAE. Raises `RacError` for a coder of another family."""
        if not isinstance(coder, DGAE):
            raise RacError(f"expected a DGAE, such as one that dgae-64-f8d4 trains, not a {type(coder).__name__}")
        return coder

    def default_steps(self, way: Way) -> int | None:
        """Returns the default number of steps of decoding; None for encoding, which takes one pass."""
        return self.config.steps if way == "decode" else None

    # ------------------------------------------------------------------------------------- image -> latent

    def _moments(self, image: Tensor) -> Tensor:
        # Out of autocast's half precision, in which the posterior's exponentials overflow.
        features = self.encoder(image).to(next(self.quant_conv.parameters()).dtype)
        return self.quant_conv(features).to(image.dtype)

    def posterior(self, image: Tensor) -> Any:
        """Returns diffusers' DiagonalGaussianDistribution over raw latents for an image B 3 H W in [-1, 1].

        It has `.mean`, `.std`, `.sample(generator)` and `.kl()`, the divergence from N(0, 1) summed per image.
        """
        return gaussian(self.moments(image))

    def freeze_encoder(self) -> None:
        """Freezes all modules that produce latents, so that training changes only the decoder."""
        self.encoder.requires_grad_(False)
        self.quant_conv.requires_grad_(False)

    def take_encoder(self, coder: Coder) -> None:
        """Copies encoder and statistics from a KL-VAE or another DGAE, of which the decoder is copied as well.

        Raises `RacError` for a coder of another family, and for an encoder or a decoder of another shape.
        """
        if isinstance(coder, DGAE):
            self._check_shape(to_json(self.config.encoder), to_json(coder.config.encoder))
            self._check_shape(to_json(self.config.decoder), to_json(coder.config.decoder))
            self.load_state_dict(coder.whole.state_dict())
        else:
            theirs = KLVAE.of(coder)
            self._check_shape(self.config.encoder.shape(), theirs.shape())
            self.encoder.load_state_dict(theirs.network.encoder.state_dict())
            self.quant_conv.load_state_dict(theirs.network.quant_conv.state_dict())
        self.set_statistics(coder.statistics)

    def _check_shape(self, ours: dict[str, Any], theirs: dict[str, Any]) -> None:
        if ours != theirs:
            raise RacError(f"the coder to start from has another network: {'; '.join(differences(ours, theirs))}")

    @torch.no_grad()
    def fit_statistics(self, images: Iterable[Tensor]) -> None:
        """Sets scale and shift so that the latents of `images` (batches B 3 H W) have mean 0 and variance 1 over all.

        Raises `RacError` if there are no images, or if their latents are all one value.
        """
        scale, shift = scale_and_shift(self.posterior(image).mean for image in images)
        self.set_statistics(Statistics.scaled(scale, shift))

    # ------------------------------------------------------------------------------------- latent -> image

    def noise_shape(self, latent: Tensor) -> tuple[int, ...] | None:
        """Returns the shape of the image, B 3 h*f w*f."""
        height, width = (side * self.spec.factor for side in latent.shape[-2:])
        return latent.shape[0], RGB, height, width

    def _decode(self, latent: Tensor, walk: Walk | None, noise: Tensor | None, keep: Keep) -> Decoded:
        assert walk is not None
        assert noise is not None
        flow = integrate(self.conditioned(latent), noise, walk.grid, walk.solver, keep=keep)
        return Decoded(flow.end, flow.evaluations, flow)

    def conditioned(self, latent: Tensor) -> Conditioned:
        """Returns the field that decodes a latent B c h w: (state B 3 h*f w*f, time B) -> velocity of that shape."""
        raw_latent = self.statistics.denormalise(latent)
        return Conditioned(self._velocity, F.interpolate(raw_latent, scale_factor=float(self.spec.factor)))

    def _velocity(self, state: Tensor, time: Tensor, condition: Tensor) -> Tensor:
        """Returns the velocity B 3 H W, given the enlarged latent B c H W."""
        return self.field(torch.cat([state, condition.to(state.dtype)], dim=1), time).to(state.dtype)

    # ------------------------------------------------------------------------------------- networks, files

    def networks(self) -> dict[str, Network]:
        """Returns the encoder and the field; the field's first argument is the state with the enlarged latent."""
        channels = RGB + self.spec.channels
        return {
            "encoder": Network(self.encoder, lambda height, width: ((1, RGB, height, width),), "encode"),
            "field": Network(self.field, lambda height, width: ((1, channels, height, width), (1,)), "decode"),
        }

    def _save(self, directory: Path, dtype: torch.dtype | None) -> None:
        write_native(self, self.config, FORMAT, VERSION, directory, dtype)

    @classmethod
    def load(cls, directory: str | Path) -> DGAE:
        """Reads a directory written by `save`: float32, in evaluation mode, parameters frozen.

        Raises `WeightsError` for a directory that does not hold a DGAE, and for weights missing, cut, or of another
        shape.
        """
        return cls._built(read_native(Path(directory), FORMAT, (VERSION,)))

    @classmethod
    def load_drop_in(cls, directory: str | Path) -> DGAE:
        """Reads a directory written by `AutoencoderDGAE.save_pretrained`. Raises `WeightsError` as `load`."""
        return cls._built(read_drop_in(Path(directory), "dgae"))

    @classmethod
    def _built(cls, files: NativeFiles) -> DGAE:
        with as_weights_error(files.said_by):
            coder = cls(from_json(DGAEConfig, files.config, files.said_by), files.statistics)
        fit_tensors(coder, files.tensors, files.source)
        return coder.eval().requires_grad_(False)


def _encoder(config: KLVAEConfig) -> tuple[nn.Module, nn.Module]:
    """Returns the encoder of diffusers' AutoencoderKL, and the convolution that makes moments of its result."""
    from diffusers.models.autoencoders.vae import Encoder

    encoder = Encoder(
        in_channels=RGB,
        out_channels=config.latent_channels,
        down_block_types=("DownEncoderBlock2D",) * len(config.widths),
        block_out_channels=config.widths,
        layers_per_block=config.layers_per_block,
        norm_num_groups=config.norm_groups,
        mid_block_add_attention=config.middle_attention,
        double_z=True,
    )
    return encoder, nn.Conv2d(2 * config.latent_channels, 2 * config.latent_channels, 1)
