"""RAE, the representation autoencoder: a frozen representation as the encoder, and a ViT that learns to decode it.

Diffusion Transformers with Representation Autoencoders (arXiv 2510.11690). A latent is the grid of tokens of a network
that was trained to understand images; it keeps what that network keeps of them.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..config import from_json
from ..errors import RacError, WeightsError
from ..fields.transformer import PlainBlock, positions, unpatchify
from ..flow import Walk
from ..latents import LatentSpec, Moments, Statistics
from ..representations import Representation, load_representation
from ..representations.representation import PIXELS
from ..storage import as_weights_error, fit_tensors
from .native import read_native, write_native
from .protocol import Coder, Decoded, Keep, Network

FORMAT = "rac rae"
"""Value of `format` in the config.json of an RAE."""

VERSION = 1
"""Version of the file format."""

DECODER = "decoder."
"""Prefix of the names of the decoder's tensors in model.safetensors, which holds no encoder."""

VARIANCE_EPSILON = 1e-5
"""Number added to the variance of latents, as in the paper's code."""

NORM_EPSILON = 1e-12
"""Number that the decoder's norms add to the variance."""


@dataclass(frozen=True)
class ViTDecoderConfig:
    """Configuration of the decoder. Raises `RacError` for sizes that cannot be built."""

    depth: int = 12
    """Number of blocks."""
    width: int = 768
    """Channels of the tokens; a multiple of 4 and of `heads`."""
    heads: int = 12
    """Heads of the attention."""
    hidden: int = 3072
    """Channels between the two layers of each block's network."""

    def __post_init__(self) -> None:
        for name in ("depth", "width", "heads", "hidden"):
            if getattr(self, name) < 1:
                raise RacError(f"{name} {getattr(self, name)} of a decoder must be at least 1")
        if self.width % 4 or self.width % self.heads:
            raise RacError(f"width {self.width} of a decoder must be a multiple of 4 and of its heads, {self.heads}")


class Size(NamedTuple):
    """Size of a decoder."""

    depth: int
    width: int
    heads: int
    hidden: int


SIZES: dict[str, Size] = {
    "XS": Size(6, 256, 4, 1024),
    "S": Size(12, 384, 6, 1536),
    "B": Size(12, 768, 12, 3072),
    "L": Size(24, 1024, 16, 4096),
    "XL": Size(28, 1152, 16, 4096),
}
"""Sizes of the decoder: those of the paper from B on, and two for CPUs."""


def vit_decoder(size: str) -> ViTDecoderConfig:
    """Returns the configuration of one of `SIZES`. Raises `RacError` for another size."""
    if size not in SIZES:
        raise RacError(f"no decoder of size {size!r}; sizes are {', '.join(SIZES)}")
    return ViTDecoderConfig(*SIZES[size])


class ViTDecoder(nn.Module):
    """A vision transformer from raw latents B c h w to normalised pixels B 3 16h 16w, as MAE's (arXiv 2111.06377).

    Positions are fixed, and made for the grid at hand, square or not. A trained token without position or pixels of
    its own goes along.
    """

    def __init__(self, config: ViTDecoderConfig, channels: int) -> None:
        super().__init__()
        self.config = config
        self.embed = nn.Linear(channels, config.width)
        self.class_token = nn.Parameter(torch.zeros(1, 1, config.width))
        self.blocks = nn.ModuleList(
            PlainBlock(config.width, config.heads, config.hidden, NORM_EPSILON) for _ in range(config.depth)
        )
        self.norm = nn.LayerNorm(config.width, NORM_EPSILON)
        self.out = nn.Linear(config.width, 3 * PIXELS**2)

    def forward(self, raw_latent: Tensor) -> Tensor:
        """Returns the pixels, in the scale of the representation's normalised ones."""
        batch, _, height, width = raw_latent.shape
        tokens = self.embed(raw_latent.flatten(2).transpose(1, 2))
        tokens = tokens + positions(height, width, self.config.width, tokens)
        tokens = torch.cat([self.class_token.to(tokens.dtype).expand(batch, -1, -1), tokens], dim=1)
        for block in self.blocks:
            tokens = block(tokens)
        return unpatchify(self.out(self.norm(tokens))[:, 1:], height, width, PIXELS)


@dataclass(frozen=True)
class RAEConfig:
    """Configuration of an RAE: everything but its weights."""

    representation: str = "efficientnet-lite0"
    """The representation that encodes: a name or directory that `rac.representations.load_representation` takes. Its
    weights are not part of an RAE's files; they are loaded from there again."""
    decoder: ViTDecoderConfig = field(default_factory=ViTDecoderConfig)
    """Configuration of the decoder."""

    def build(self) -> RAE:
        """Returns a coder with a random decoder and the statistics of scale 1, shift 0.

        Raises `WeightsError` if the representation is not found.
        """
        return RAE(self)


class RAE(Coder):
    """A coder whose latents are the tokens of a frozen representation, one for every 16 x 16 pixels.

    Final layer norms of the representation lose their scale and shift. Statistics are one mean and one variance for
    each channel and position of the grid that they were fitted on; for latents of other grids they are interpolated
    bilinearly, which is a guess. Both ways take one pass. The representation stays frozen and in evaluation mode.
    """

    encoder: nn.Module
    decoder: nn.Module
    pixel_mean: Tensor
    pixel_std: Tensor

    def __init__(
        self, config: RAEConfig, statistics: Statistics | None = None, encoder: Representation | None = None
    ) -> None:
        """Builds the coder; `encoder` is the representation that `config` names, where it is already at hand."""
        encoder = encoder or load_representation(config.representation, affine=False)
        super().__init__(LatentSpec(PIXELS, encoder.channels), statistics)
        self.config = config
        self.encoder = encoder
        self.decoder = ViTDecoder(config.decoder, encoder.channels)
        # Copies, as the representation itself may be exchanged for a network that only computes.
        self.register_buffer("pixel_mean", encoder.mean.clone(), persistent=False)
        self.register_buffer("pixel_std", encoder.std.clone(), persistent=False)

    def with_decoder(self, decoder: nn.Module) -> RAE:
        """Returns a coder of the same configuration that shares all but its decoder, and its statistics if changed."""
        twin = copy.copy(self)
        twin.__dict__["_modules"] = {**self._modules, "decoder": decoder}
        return twin

    @torch.no_grad()
    def fit_statistics(self, images: Iterable[Tensor]) -> None:
        """Sets the statistics to those of the raw latents of `images`, batches B 3 H W of one size.

        Every channel and position gets its mean and variance, exactly those of all images. Raises `RacError` if there
        are no images, or of different sizes.
        """
        moments = Moments()
        for image in images:
            moments.add(self.moments(image))
        if not moments.count:
            raise RacError("no images to fit the latents' statistics on; give at least one batch")
        device = self.pixel_mean.device
        scale = (moments.variance + VARIANCE_EPSILON).rsqrt()
        self.set_statistics(Statistics(moments.mean, scale))
        self.statistics.to(device)

    def _moments(self, image: Tensor) -> Tensor:
        return self.encoder(image).to(image.dtype)

    def _decode(self, latent: Tensor, walk: Walk | None, noise: Tensor | None, keep: Keep) -> Decoded:
        return Decoded(self.decode_raw(self.statistics.denormalise(latent)), 1)

    def decode_raw(self, raw_latent: Tensor) -> Tensor:
        """Returns the images B 3 16h 16w, about [-1, 1], of raw latents B c h w."""
        pixels = self.decoder(raw_latent).to(raw_latent.dtype)
        return 2 * (pixels * self.pixel_std + self.pixel_mean) - 1

    def networks(self) -> dict[str, Network]:
        """Returns the representation and the decoder."""
        channels = self.spec.channels

        def latent_shape(height: int, width: int) -> tuple[tuple[int, ...], ...]:
            return ((1, channels, height // PIXELS, width // PIXELS),)

        return {
            "encoder": Network(self.encoder, lambda height, width: ((1, 3, height, width),), "encode"),
            "decoder": Network(self.decoder, latent_shape, "decode"),
        }

    # ------------------------------------------------------------------------------------- files

    def _save(self, directory: Path, dtype: torch.dtype | None) -> None:
        tensors = {DECODER + name: tensor for name, tensor in self.decoder.state_dict().items()}
        write_native(self, self.config, FORMAT, VERSION, directory, dtype, tensors)

    @classmethod
    def load(cls, directory: str | Path) -> RAE:
        """Reads a directory written by `save`: float32, in evaluation mode, parameters frozen.

        Raises `WeightsError` for a directory that does not hold an RAE, for weights missing, cut, or of another shape,
        and if the representation is not found.
        """
        files = read_native(Path(directory), FORMAT, (VERSION,))
        if files.statistics is None:
            raise WeightsError(f"{files.source} lacks the statistics of its latents; save the coder again")
        with as_weights_error(files.said_by):
            coder = cls(from_json(RAEConfig, files.config, files.said_by), files.statistics)
        decoder = {name.removeprefix(DECODER): tensor for name, tensor in files.tensors.items()}
        fit_tensors(coder.decoder, decoder, files.source)
        return coder.eval().requires_grad_(False)
