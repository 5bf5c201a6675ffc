"""Generators of latents in diffusers' form: a model, and a pipeline of generator and decoder.

A pipeline is saved as diffusers saves them: model_index.json, a generator in `transformer`, an autoencoder in `vae`.
diffusers (0.42) looks for pipelines among its own classes, so load one with `FlowGeneratorPipeline.from_pretrained` and
not with `DiffusionPipeline`; no `trust_remote_code` is needed, since no code is saved. Nothing here has a scheduler:
the steps are those of `rac.generators.sampling.Sampling`.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from diffusers import ConfigMixin, DiffusionPipeline, ImagePipelineOutput, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.utils.accelerate_utils import apply_forward_hook
from PIL import Image
from torch import Tensor

from .. import hub
from ..coders.adapter import DiffusersCoder, statistics_of
from ..coders.protocol import Coder
from ..config import from_json, to_json
from ..errors import RacError
from ..flow import Conditioned, Field
from ..flow.grid import check_steps
from ..generators.flow import FlowGenerator, FlowGeneratorConfig
from ..generators.protocol import Generated, LatentGenerator
from ..generators.sampling import Sampling
from ..images import to_pixels
from ..latents import LatentSpec
from .diffusers import AutoencoderRAC, in_own_precision

OUTPUTS = ("pil", "np", "pt", "latent")
"""Kinds of output of `FlowGeneratorPipeline`."""


class FlowGeneratorModel(ModelMixin, ConfigMixin):
    """A flow generator of latents, such as SiT, in the form of a model of diffusers.

    Make one with `from_rac`, or read a saved one with `from_pretrained`; `rac.load_generator` reads its directory too.
    `config.rac` is the generator's configuration as JSON. In half precision the network works in it, while the
    states of the flow stay float32.
    """

    _supports_gradient_checkpointing = False
    _no_split_modules = ("Block",)

    @register_to_config
    def __init__(self, rac: Mapping[str, Any]) -> None:
        super().__init__()
        config = from_json(FlowGeneratorConfig, dict(rac), "the rac of the configuration")
        self.generator = _WholeStates(config)

    @classmethod
    def from_rac(cls, generator: LatentGenerator | str | Path) -> FlowGeneratorModel:
        """Makes a diffusers model of a generator, or of one that `rac.load_generator` finds by name or directory.

        The weights are copied, and frozen. Raises `RacError` for a generator of another kind.
        """
        if not isinstance(generator, LatentGenerator):
            generator = hub.load_generator(generator)
        generator = FlowGenerator.of(generator)
        dressed = cls(rac=to_json(generator.config))
        dressed.generator.load_state_dict(generator.state_dict())
        return dressed.to(generator.device).eval().requires_grad_(False)

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the classes, in the order of their labels; empty if it knows no classes."""
        return self.generator.classes

    @property
    def sampling(self) -> Sampling:
        """The settings that it samples with where no others are given."""
        return self.generator.sampling

    def forward(self, state: Tensor, time: Tensor, class_labels: Tensor | None = None) -> Tensor:
        """Returns the velocity B c h w at states B c h w and times B, for labels B; None: no label."""
        return self.generator.velocity_field(class_labels, len(state))(state, time)

    @apply_forward_hook
    def sample(
        self,
        rng_seeds: Sequence[int | torch.Generator],
        labels: Sequence[int] | None = None,
        sampling: Sampling | None = None,
    ) -> Generated:
        """Generates one latent B c h w for each seed; the arguments are those of `LatentGenerator.sample`."""
        return self.generator.sample(rng_seeds, labels, sampling)


class FlowGeneratorPipeline(DiffusionPipeline):
    """A pipeline of diffusers: class labels -> images, by a generator of latents and an autoencoder that decodes them.

    Args:
        transformer: the generator, a `FlowGeneratorModel`.
        vae: the decoder: an `AutoencoderRAC`, whose number of steps can be chosen, or an autoencoder of diffusers that
            the generator was trained on, such as AutoencoderKL.

    Raises `RacError` if the generator's latents are not those of the autoencoder.
    """

    model_cpu_offload_seq = "transformer->vae"

    def __init__(self, transformer: FlowGeneratorModel, vae: AutoencoderRAC | ModelMixin) -> None:
        super().__init__()
        self.register_modules(transformer=transformer, vae=vae)
        self._check_latents()

    @classmethod
    def from_rac(
        cls, generator: LatentGenerator | str | Path, coder: Coder | str | Path | None = None
    ) -> FlowGeneratorPipeline:
        """Makes a pipeline of a generator and a coder, given by name or directory or in memory. Weights are copied.

        - `generator`: the generator of latents.
        - `coder`: a RAC, or a coder that is an autoencoder of diffusers; None: the coder that the generator names.

        Raises `RacError` for coders that diffusers has no class for, and for a coder of other latents.
        """
        transformer = FlowGeneratorModel.from_rac(generator)
        coder = coder or transformer.generator.kind.coder
        if coder is None:
            raise RacError("the generator names no coder of its latents; give one as `coder`")
        if not isinstance(coder, Coder):
            coder = hub.load(coder)
        vae = copy.deepcopy(coder.network) if isinstance(coder, DiffusersCoder) else AutoencoderRAC.from_rac(coder)
        return cls(transformer, vae)

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the classes, in the order of their labels; empty if the generator knows no classes."""
        return self.transformer.classes

    def get_label_ids(self, names: str | Sequence[str]) -> list[int]:
        """Returns the labels of classes, given by name or number as text. Raises `RacError` for an unknown one."""
        return [self.transformer.generator.label(name) for name in ([names] if isinstance(names, str) else names)]

    @torch.no_grad()
    def __call__(
        self,
        class_labels: int | str | Sequence[int | str] | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        output_type: str = "pil",
        decode_steps: int | None = None,
        *,
        batch_size: int = 1,
        sampling: Sampling | None = None,
        return_dict: bool = True,
    ) -> ImagePipelineOutput | tuple[Any]:
        """Generates an image of each class label.

        Given generators seeded with `rac.generators.sampling.sample_seeds(rng_seed, numbers)`, one for each image, the
        images are those of `rac generate --rng-seed` with these numbers.

        - `class_labels`: numbers or names of classes; None: no class.
        - `num_inference_steps`: steps of the generator; None: its own.
        - `guidance_scale`: scale of guidance, 1: none; None: the generator's own.
        - `generator`: one torch generator for each image, or one for all of them; None: torch's global one.
        - `output_type`: "pil", "np" (B H W 3 in [0, 1]), "pt" (B 3 H W in [0, 1]) or "latent" (B c h w, normalised).
        - `decode_steps`: steps of the decoder, if it is an `AutoencoderRAC`; None: its own.
        - `batch_size`: number of images where no labels are given.
        - `sampling`: all settings of sampling; None: the generator's own. Steps and scale, if given, replace its.
        - `return_dict`: without it the result is a tuple.

        Raises `RacError` for values out of range, and for labels or latents that do not fit.
        """
        if output_type not in OUTPUTS:
            raise RacError(f"output_type {output_type!r} is not known; choose {', '.join(OUTPUTS)}")
        self._check_latents()
        self._check_decode_steps(decode_steps)
        labels = self._labels(class_labels)
        changes = {"steps": num_inference_steps, "guidance": guidance_scale}
        settings = replace(
            sampling or self.transformer.sampling,
            **{name: value for name, value in changes.items() if value is not None},
        )
        noise = _generators(generator, batch_size if labels is None else len(labels))
        latents = self.transformer.sample(noise, labels, settings).latent
        made = latents if output_type == "latent" else _as_asked(self._decoded(latents, decode_steps), output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=made) if return_dict else (made,)

    def _decoded(self, latents: Tensor, steps: int | None) -> Tensor:
        """Returns the images B 3 H W, float32, about [-1, 1], of latents B c h w."""
        raw_latents = statistics_of(self.vae.config).to(latents.device).denormalise(latents)
        if isinstance(self.vae, AutoencoderRAC):  # which narrows nothing but its network's own work
            return self.vae.decode(raw_latents, num_inference_steps=steps).sample
        return self.vae.decode(raw_latents.to(self.vae.dtype)).sample.float()

    def _labels(self, given: int | str | Sequence[int | str] | None) -> list[int] | None:
        if given is None:
            return None
        several = [given] if isinstance(given, (int, str)) else list(given)
        return [self.transformer.generator.label(one) if isinstance(one, str) else int(one) for one in several]

    def _check_latents(self) -> None:
        """Raises `RacError` unless the autoencoder decodes the latents that the generator makes."""
        if isinstance(self.vae, AutoencoderRAC):
            self.transformer.generator.check_spec(self.vae.spec, "the vae")
            return
        config = self.vae.config
        widths = config.get("encoder_block_out_channels") or config["block_out_channels"]
        spec = LatentSpec(2 ** (len(widths) - 1), config["latent_channels"], statistics=statistics_of(config).hash())
        self.transformer.generator.check_spec(spec, "the vae")

    def _check_decode_steps(self, steps: int | None) -> None:
        if steps is None:
            return
        check_steps(steps)
        if not isinstance(self.vae, AutoencoderRAC):
            raise RacError(f"an {type(self.vae).__name__} decodes at once and has no steps; leave out decode_steps")


class _WholeStates(FlowGenerator):
    """A flow generator whose states and latents are float32, whatever the type of its weights."""

    @property
    def dtype(self) -> torch.dtype:
        """The type of the latents."""
        return torch.float32

    def velocity_field(self, labels: Tensor | None, count: int) -> Field:
        """Returns the velocity field, whose network works in its own precision; the arguments are `FlowGenerator`'s."""
        field = super().velocity_field(labels, count)
        return Conditioned(in_own_precision(self.field), field.condition)


def _generators(given: torch.Generator | Sequence[torch.Generator] | None, count: int) -> list[torch.Generator]:
    """Returns a generator for each of `count` samples. Raises `RacError` for another number of them."""
    if count < 1:
        raise RacError(f"{count} images cannot be generated; give a class label for each, or a batch_size")
    if given is None:
        given = torch.Generator().manual_seed(int(torch.randint(2**62, ())))
    if isinstance(given, torch.Generator):
        return [given] * count
    if len(given) != count:
        raise RacError(f"{len(given)} generators do not fit {count} images; give one for each, or one for all")
    return list(given)


def _as_asked(images: Tensor, output_type: str) -> Any:
    """Returns images B 3 H W, about [-1, 1], as one of `OUTPUTS`."""
    if output_type == "pil":
        return [Image.fromarray(to_pixels(image)) for image in images]
    whole = (images / 2 + 0.5).clamp(0, 1)
    return whole if output_type == "pt" else whole.permute(0, 2, 3, 1).cpu().numpy()
