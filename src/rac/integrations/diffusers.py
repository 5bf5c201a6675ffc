"""A RAC or a DGAE as a diffusers model: `vae=AutoencoderRAC...` in any pipeline that takes an AutoencoderKL.

Outside it has raw latents, in and out, under its own scaling factor, shift and statistics, which for a RAC are its
teacher's; inside they are normalised as the coder needs them. A directory that it saves is a diffusers model, and
`rac.load` takes it too.

A saved pipeline names this module beside the class. diffusers (0.42) does not import what a pipeline names, so import
`rac.integrations.diffusers` before `from_pretrained`, or hand the coder over as `vae=`; no `trust_remote_code` is
needed, since no code is saved. From the hub itself diffusers takes pipelines only if all their classes are its own or
ship as code: fetch one with `huggingface_hub.snapshot_download` and load the folder. A lone model loads from
anywhere. That pipelines log "expected types for vae" is a remark on the class, nothing more.
"""

from __future__ import annotations

import logging
import os
import tempfile
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.models.autoencoders.vae import DecoderOutput, DiagonalGaussianDistribution
from diffusers.utils import BaseOutput
from diffusers.utils.accelerate_utils import apply_forward_hook
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor, nn

from .. import hub
from ..coders.adapter import statistics_of
from ..coders.dgae import DGAE, DGAEConfig
from ..coders.protocol import Coder
from ..coders.rac import RAC, read_rac_config
from ..coders.tiling import TILE, sliced, tiled
from ..config import from_json, to_json
from ..errors import RacError
from ..fields.tiling import Function, Pieces
from ..files import write_bytes
from ..flow.grid import check_steps
from ..latents import LatentSpec
from ..tensors import check_device

if TYPE_CHECKING:
    from typing_extensions import Self


@dataclass
class AutoencoderOutput(BaseOutput):
    """Result of encoding."""

    latent_dist: DiagonalGaussianDistribution
    """The posterior of the raw latent. For a coder without one `mode()`, `mean` and every `sample()` are the latent."""

    @property
    def latents(self) -> Tensor:
        """The raw latent, B c h w; the mean of a posterior."""
        return self.latent_dist.mean


class CoderModel(ModelMixin, ConfigMixin):
    """Base of the models: a coder in the form of an autoencoder of diffusers, for its pipelines.

    `config` has what pipelines ask for: `scaling_factor`, `shift_factor`, `latents_mean`, `latents_std`,
    `latent_channels`, `block_out_channels` (2^(its length - 1) is the factor) and `force_upcast`, which is False: in
    half precision the networks work in it, while images, latents and states stay float32.
    """

    _supports_gradient_checkpointing = False
    coder: Coder

    def _hold(self, coder: Coder) -> None:
        """Makes `coder` the model's own."""
        self.coder = coder
        self._tiling: tuple[int, int | None] | None = None
        self._slicing = False
        self._prepare()

    # ------------------------------------------------------------------------------------- there and back

    @property
    def num_inference_steps(self) -> int:
        """Default number of steps of each way that is walked; set it to change it. Saved with the model."""
        return self.config.num_inference_steps

    @num_inference_steps.setter
    def num_inference_steps(self, steps: int) -> None:
        self.register_to_config(num_inference_steps=check_steps(steps))

    @property
    def spec(self) -> LatentSpec:
        """Shape and statistics of the latents."""
        return self.coder.spec

    @apply_forward_hook
    def encode(
        self, x: Tensor, return_dict: bool = True, num_inference_steps: int | None = None
    ) -> AutoencoderOutput | tuple[DiagonalGaussianDistribution]:
        """Encodes an image B 3 H W in [-1, 1] to the posterior of its raw latent, without spread if there is none.

        `num_inference_steps` is the number of steps of a coder that encodes by a flow; None: the model's own. Without
        `return_dict` the result is a tuple.
        """
        working = self._working[0]
        if working.has_posterior:
            distribution = DiagonalGaussianDistribution(working.moments(x).to(x.dtype))
        else:
            latent = working.encode(x, walk=working.walk("encode", self._steps(num_inference_steps)))
            raw_latent = self.coder.statistics.denormalise(latent).to(x.dtype)
            # A log variance of -30 is diffusers' smallest; `deterministic` then makes the deviation zero.
            moments = torch.cat([raw_latent, torch.full_like(raw_latent, -30.0)], dim=1)
            distribution = DiagonalGaussianDistribution(moments, deterministic=True)
        return AutoencoderOutput(latent_dist=distribution) if return_dict else (distribution,)

    @apply_forward_hook
    def decode(
        self,
        z: Tensor,
        return_dict: bool = True,
        generator: torch.Generator | list[torch.Generator] | None = None,
        num_inference_steps: int | None = None,
    ) -> DecoderOutput | tuple[Tensor]:
        """Decodes a raw latent B c h w to an image B 3 h*f w*f, about [-1, 1], not clamped.

        - `z`: the raw latent.
        - `return_dict`: without it the result is a tuple.
        - `generator`: draws the noise of a coder that decodes from noise, one for all images or one for each; None:
          always the same noise. Other coders draw nothing.
        - `num_inference_steps`: the number of steps; None: the model's own.
        """
        self.spec.check(z)
        check_device(z, self.coder, "the latent", "the model")
        latent = self.coder.statistics.normalise(z.float())
        shape, noise = self.coder.noise_shape(latent), None
        if shape is not None and generator is not None:
            noise = randn_tensor(shape, generator, latent.device, latent.dtype)
        working = self._working[0]
        walk = working.walk("decode", self._steps(num_inference_steps))
        image = working.decode(latent, walk=walk, noise=noise).to(z.dtype)
        return DecoderOutput(sample=image) if return_dict else (image,)

    def forward(
        self,
        sample: Tensor,
        sample_posterior: bool = False,
        return_dict: bool = True,
        generator: torch.Generator | None = None,
    ) -> DecoderOutput | tuple[Tensor]:
        """Encodes and decodes an image, by the mean of the posterior or by a sample; `generator` draws all noise."""
        posterior = self.encode(sample).latent_dist
        latent = posterior.sample(generator) if sample_posterior else posterior.mode()
        return self.decode(latent, return_dict=return_dict, generator=generator)

    def _steps(self, asked: int | None) -> int:
        return self.num_inference_steps if asked is None else asked

    def _prepare(self) -> None:
        """Sets up the coder that works: in tiles and slices where wished, its states in float32 at any precision."""
        coder = self.coder if self._tiling is None else tiled(self.coder, *self._tiling)
        if self._slicing:
            coder = sliced(coder)
        mixed = coder.with_networks(lambda network: Pieces(network.module, in_own_precision), torch.float32)
        self._working = [mixed]  # in a list, so that its weights are not counted twice

    def to(self, *args: Any, **options: Any) -> Self:
        """Moves and casts like every module, without diffusers' warning about a list of modules that is empty."""
        logger = logging.getLogger("diffusers.models.modeling_utils")
        logger.addFilter(_names_modules)
        try:
            return super().to(*args, **options)
        finally:
            logger.removeFilter(_names_modules)

    # ------------------------------------------------------------------------------------- memory

    def enable_tiling(self, tile: int | bool = TILE, overlap: int | None = None, *, use_tiling: bool = True) -> None:
        """Makes the model work in tiles of at most `tile` x `tile` pixels, as `rac.coders.tiling.tiled` describes.

        As with AutoencoderKL, whose first argument is `use_tiling`, True stands for tiles of the usual size, and False
        for none. Raises `RacError` for a tile that is not a multiple of the factor.
        """
        if tile is False or not use_tiling:
            return self.disable_tiling()
        side = TILE if tile is True else tile
        tiled(self.coder, side, overlap)  # which refuses what does not fit
        self._tiling = (side, overlap)
        self._prepare()

    def disable_tiling(self) -> None:
        """Makes the model work on the whole image again."""
        self._tiling = None
        self._prepare()

    @property
    def use_tiling(self) -> bool:
        """Whether the model works in tiles."""
        return self._tiling is not None

    def enable_slicing(self) -> None:
        """Makes the model work on one image of the batch at a time."""
        self._slicing = True
        self._prepare()

    def disable_slicing(self) -> None:
        """Makes the model work on the whole batch again."""
        self._slicing = False
        self._prepare()

    @property
    def use_slicing(self) -> bool:
        """Whether the model works on one image of the batch at a time."""
        return self._slicing

    # ------------------------------------------------------------------------------------- files

    def save_pretrained(
        self,
        save_directory: str | os.PathLike[str],
        is_main_process: bool = True,
        save_function: Callable[..., None] | None = None,
        safe_serialization: bool = True,
        variant: str | None = None,
        max_shard_size: int | str = "10GB",
        push_to_hub: bool = False,
        **options: Any,
    ) -> None:
        """Saves the model like every diffusers model, and a model card beside it where there is no README.md yet.

        The arguments are those of diffusers' `ModelMixin.save_pretrained`.
        """
        hub_options = {name: options.pop(name) for name in _HUB_OPTIONS if name in options}
        super().save_pretrained(
            save_directory,
            is_main_process=is_main_process,
            save_function=save_function,
            safe_serialization=safe_serialization,
            variant=variant,
            max_shard_size=max_shard_size,
            **options,
        )
        card = Path(save_directory) / "README.md"
        if is_main_process and not card.exists():
            write_bytes(card, self.model_card().encode())
        if push_to_hub:
            _upload(save_directory, hub_options.pop("repo_id", Path(save_directory).name), hub_options)

    def push_to_hub(
        self,
        repo_id: str,
        commit_message: str | None = None,
        private: bool | None = None,
        token: str | None = None,
        create_pr: bool = False,
        safe_serialization: bool = True,
        variant: str | None = None,
        subfolder: str | None = None,
    ) -> str:
        """Uploads model and card to the Hugging Face hub; the card of a repository that has one stays.

        The arguments are those of diffusers' `PushToHubMixin.push_to_hub`.
        """
        options = {"commit_message": commit_message, "private": private, "token": token, "create_pr": create_pr}
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder, safe_serialization=safe_serialization, variant=variant)
            return _upload(folder, repo_id, {**options, "subfolder": subfolder})

    @abstractmethod
    def model_card(self) -> str:
        """Returns a description of the model and its use, as Markdown for the hub."""


class AutoencoderRAC(CoderModel):
    """A RAC in the form of an autoencoder of diffusers.

    Make one with `from_rac`, or read a saved one with `from_pretrained`. Its latents and their statistics are those of
    its teacher, so it can take the teacher's place.
    """

    coder: RAC
    _no_split_modules = ("ConvField", "LocalField", "UNetField", "Projector")

    @register_to_config
    def __init__(
        self,
        rac: Mapping[str, Any],
        num_inference_steps: int = 4,
        in_channels: int = 3,
        out_channels: int = 3,
        latent_channels: int = 4,
        block_out_channels: Sequence[int] = (4, 16, 64, 256),
        scaling_factor: float = 1.0,
        shift_factor: float | None = None,
        latents_mean: Sequence[float] | None = None,
        latents_std: Sequence[float] | None = None,
        force_upcast: bool = False,
    ) -> None:
        super().__init__()
        check_steps(num_inference_steps)
        config, numbers = read_rac_config(dict(rac), "the rac of the configuration")
        statistics = numbers or statistics_of(
            {
                "scaling_factor": scaling_factor,
                "shift_factor": shift_factor,
                "latents_mean": latents_mean,
                "latents_std": latents_std,
            }
        )
        self._hold(RAC(config, statistics))

    @classmethod
    def from_rac(cls, coder: Coder | str | Path) -> AutoencoderRAC:
        """Makes a diffusers model of a RAC, or of one that `rac.load` finds by name or directory.

        The weights are copied, and frozen. Raises `RacError` for another kind of coder, and for a factor that is no
        power of two.
        """
        if not isinstance(coder, Coder):
            coder = hub.load(coder)
        coder = RAC.of(coder)
        levels = coder.spec.factor.bit_length()
        # Pipelines read the factor off the length. The numbers: channels of the state, folded to each stride.
        widths = [coder.config.state_channels * 4**level for level in range(levels)]
        dressed = cls(rac=to_json(coder.config), num_inference_steps=coder.config.steps, **_as_diffusers(coder, widths))
        return _with_weights(dressed, coder)

    def model_card(self) -> str:
        """Returns a description of the model and its use, as Markdown for the hub."""
        coder, spec = self.coder, self.spec
        return _CARD.format(
            teacher=coder.teacher or "an unnamed teacher",
            factor=spec.factor,
            channels=spec.channels,
            parameters=_count(coder),
            field=type(coder.config.field).__name__.removesuffix("Config"),
            spread=coder.config.spread,
            state_channels=coder.config.state_channels,
            steps=self.num_inference_steps,
            statistics=coder.statistics.extra_repr(),
        )


class AutoencoderDGAE(CoderModel):
    """A DGAE in the form of an autoencoder of diffusers.

    Make one with `from_dgae`, or read a saved one with `from_pretrained`. Encoding gives a posterior, as an
    AutoencoderKL does; decoding starts from noise, which the `generator` draws that pipelines pass.
    """

    coder: DGAE
    _no_split_modules = ("UNet", "Encoder")

    @register_to_config
    def __init__(
        self,
        dgae: Mapping[str, Any],
        num_inference_steps: int = 50,
        in_channels: int = 3,
        out_channels: int = 3,
        latent_channels: int = 4,
        block_out_channels: Sequence[int] = (128, 256, 512, 512),
        scaling_factor: float = 1.0,
        shift_factor: float | None = None,
        latents_mean: Sequence[float] | None = None,
        latents_std: Sequence[float] | None = None,
        force_upcast: bool = False,
    ) -> None:
        super().__init__()
        check_steps(num_inference_steps)
        config = from_json(DGAEConfig, dict(dgae), "the dgae of the configuration")
        statistics = statistics_of(
            {
                "scaling_factor": scaling_factor,
                "shift_factor": shift_factor,
                "latents_mean": latents_mean,
                "latents_std": latents_std,
            }
        )
        self._hold(DGAE(config, statistics))

    @classmethod
    def from_dgae(cls, coder: Coder | str | Path) -> AutoencoderDGAE:
        """Makes a diffusers model of a DGAE, or of one that `rac.load` finds by name or directory.

        The weights are copied, and frozen. Raises `RacError` for another kind of coder.
        """
        if not isinstance(coder, Coder):
            coder = hub.load(coder)
        coder, config = DGAE.of(coder), DGAE.of(coder).config
        numbers = _as_diffusers(coder, list(config.encoder.widths))
        return _with_weights(cls(dgae=to_json(config), num_inference_steps=config.steps, **numbers), coder)

    def model_card(self) -> str:
        """Returns a description of the model and its use, as Markdown for the hub."""
        coder, spec = self.coder, self.spec
        return _DGAE_CARD.format(
            factor=spec.factor,
            channels=spec.channels,
            encoder=_count(coder.encoder),
            field=_count(coder.field),
            width=coder.config.decoder.width,
            steps=self.num_inference_steps,
            statistics=coder.statistics.extra_repr(),
        )


def _count(module: nn.Module) -> str:
    return f"{sum(parameter.numel() for parameter in module.parameters()):,}"


M = TypeVar("M", bound=CoderModel)


def _with_weights(model: M, coder: Coder) -> M:
    """Returns the model with the weights of `coder`, on its device, frozen."""
    model.coder.load_state_dict(coder.whole.state_dict())
    return model.to(next(coder.parameters()).device).eval().requires_grad_(False)


_HUB_OPTIONS = ("repo_id", "commit_message", "private", "token", "create_pr", "subfolder")

_CARD = """---
library_name: diffusers
tags:
- rac
- autoencoder
- rectified-flow
---

# A rectified flow auto coder (RAC)

One network, a velocity field, that decodes latents in any number of steps and, run backwards, encodes images
([arXiv 2603.05925](https://arxiv.org/abs/2603.05925)). It codes the latents of **{teacher}**, so it can take that
autoencoder's place in a pipeline.

| | |
|---|---|
| latents | {channels} channels at 1/{factor} of the image's sides, raw as the teacher's |
| their statistics | {statistics} |
| network | {field}, {parameters} parameters for both directions; {state_channels} state channels, spread `{spread}` |
| steps | {steps}, each way; any number works |

```python
from rac.integrations.diffusers import AutoencoderRAC  # pip install rectified-auto-coder

vae = AutoencoderRAC.from_pretrained("...")  # this repository, or a folder
vae.num_inference_steps = {steps}
pipeline = DiffusionPipeline.from_pretrained("...", vae=vae)
```

Training data, licence and metrics: add them here.
"""


_DGAE_CARD = """---
library_name: diffusers
tags:
- rac
- dgae
- autoencoder
---

# A diffusion-guided autoencoder (DGAE)

An encoder trained together with a decoder that is a flow from noise to the image, given the latent
([arXiv 2506.09644](https://arxiv.org/abs/2506.09644)).

| | |
|---|---|
| latents | {channels} channels at 1/{factor} of the image's sides |
| their statistics | {statistics} |
| encoder | a KL-VAE's, {encoder} parameters |
| decoder | ADM's U-Net of base width {width}, {field} parameters |
| steps | {steps} to decode; any number works |

```python
from rac.integrations.diffusers import AutoencoderDGAE  # pip install rectified-auto-coder

vae = AutoencoderDGAE.from_pretrained("...")  # this repository, or a folder
image = vae.decode(latent, generator=torch.Generator().manual_seed(0)).sample
```

Training data, licence and metrics: add them here.
"""


def _as_diffusers(coder: Coder, widths: Sequence[int]) -> dict[str, Any]:
    """Returns the config values that pipelines need for the coder's latents; inverse of `adapter.statistics_of`.

    Pipelines read the factor off the number of `widths`.
    """
    spec, shift, scale = coder.spec, coder.statistics.shift.double(), coder.statistics.scale.double()
    if spec.factor != 2 ** (len(widths) - 1):
        raise RacError(f"diffusers' pipelines support only factors that are powers of two, not {spec.factor}")
    if shift.ndim > 1:
        raise RacError("diffusers' pipelines support only statistics per channel, and this coder's are per position")
    return {
        "latent_channels": spec.channels,
        "block_out_channels": widths,
        # Numbers of full length, so that reading them gives the very statistics back.
        "scaling_factor": 1.0 if shift.ndim else float(scale),
        "shift_factor": None if shift.ndim else float(shift) or None,
        "latents_mean": shift.tolist() if shift.ndim else None,
        "latents_std": (1 / scale).tolist() if shift.ndim else None,
    }


def _names_modules(record: logging.LogRecord) -> bool:
    return "kept in float32: []" not in record.getMessage()


def in_own_precision(network: nn.Module) -> Function:
    """Returns the network called in its own precision; its result has the precision of the state it is given."""

    def call(state: Tensor, *others: Tensor, **conditions: Tensor) -> Tensor:
        # The first argument is the state; times keep their precision, which matters for thirds and the like.
        return network(state.to(next(network.parameters()).dtype), *others, **conditions).to(state.dtype)

    return call


def _upload(folder: str | os.PathLike[str], repo_id: str, options: Mapping[str, Any]) -> str:
    from huggingface_hub import HfApi

    api = HfApi(token=options.get("token"))
    repo_id = api.create_repo(repo_id, private=options.get("private"), exist_ok=True).repo_id
    subfolder = options.get("subfolder")
    card = f"{subfolder}/README.md" if subfolder else "README.md"
    return api.upload_folder(
        repo_id=repo_id,
        folder_path=str(folder),
        path_in_repo=subfolder,
        commit_message=options.get("commit_message") or "Upload a model",
        create_pr=options.get("create_pr", False),
        ignore_patterns=["README.md"] if api.file_exists(repo_id, card) else None,
    )
