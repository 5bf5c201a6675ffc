"""Generators that integrate a velocity field from noise to latents: SiT and DiT^DH, and what is built like them."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..coders.protocol import Coder
from ..config import from_json, to_json
from ..errors import RacError
from ..fields import LatentFieldConfig
from ..flow import Conditioned, Field, Guided, integrate
from ..latents import LatentSpec
from ..storage import (
    CONFIG,
    DIFFUSERS,
    as_weights_error,
    fit_tensors,
    read_format,
    read_settings,
    read_weights,
    write_directory,
)
from .protocol import Generated, LatentGenerator, LatentKind
from .sampling import SampleNoise, Sampling

DROP_IN = "FlowGeneratorModel"
"""Value of `_class_name` in the config.json of `rac.integrations.generation.FlowGeneratorModel`, a diffusers model."""

FORMAT = "rac flow generator"
"""Value of `format` in the config.json of a flow generator."""

VERSION = 1
"""Version of the file format."""

OWN_CODER = "coder"
"""Name of the folder, within a generator's, of a coder that was trained together with it."""


@dataclass(frozen=True)
class FlowGeneratorConfig:
    """Configuration of a flow generator: everything but its weights.

    Raises `RacError` for a field of another number of classes, and for sides that its patches do not divide.
    """

    spec: LatentSpec
    """Shape of the latents, and the hash of the coder's statistics."""
    side: int
    """Height and width of the latents it was trained on."""
    field: LatentFieldConfig
    """Configuration of the velocity network."""
    classes: tuple[str, ...] = ()
    """Names of the classes, in the order of their labels; empty: it knows no classes."""
    coder: str | None = None
    """Name or directory of the coder of the latents; not needed to generate them."""
    sampling: Sampling = dataclasses.field(default_factory=Sampling)
    """The settings that it samples with where no others are given."""

    def __post_init__(self) -> None:
        if len(self.classes) != self.field.classes:
            raise RacError(
                f"{len(self.classes)} names do not fit a field of {self.field.classes} classes; give as many"
            )
        if self.side % self.field.patch:
            raise RacError(f"side {self.side} of the latents must be a multiple of the patch, {self.field.patch}")
        self.kind()

    def kind(self) -> LatentKind:
        """Returns what the generator makes."""
        return LatentKind(self.spec, self.side, self.classes, self.coder)


class FlowGenerator(LatentGenerator):
    """A generator that integrates a velocity field from noise at t = 0 to latents at t = 1."""

    def __init__(self, config: FlowGeneratorConfig) -> None:
        super().__init__()
        self.config = config
        self.kind = config.kind()
        self.sampling = config.sampling
        self.field = config.field.build(config.spec.channels)

    @classmethod
    def of(cls, generator: LatentGenerator) -> FlowGenerator:
        """Returns `generator` if it is a flow generator. Raises `RacError` for another kind."""
        if not isinstance(generator, FlowGenerator):
            raise RacError(f"a flow generator is needed, such as SiT, and this is a {type(generator).__name__}")
        return generator

    def renamed(self, classes: tuple[str, ...]) -> FlowGenerator:
        """Returns a generator of the same weights whose classes have these names."""
        return self._with(replace(self.config, classes=classes))

    def of_coder(self, coder: Coder) -> FlowGenerator:
        """Returns a generator of the same weights, whose latents are those of `coder`."""
        return self._with(replace(self.config, spec=coder.spec))

    def _with(self, config: FlowGeneratorConfig) -> FlowGenerator:
        twin = copy.copy(self)
        twin.config, twin.kind = config, config.kind()
        return twin

    @property
    def network(self) -> nn.Module:
        """The velocity network."""
        return self.field

    @property
    def multiple(self) -> int:
        """The number that the sides of latents must be multiples of: the side of a patch."""
        return self.config.field.patch

    def velocity_field(self, labels: Tensor | None, count: int) -> Conditioned:
        """Returns the velocity field (state, time) -> velocity for the labels of `count` samples; None: no label."""
        if labels is None:
            labels = torch.full((count,), self.config.field.classes, device=self.device)
        return Conditioned(self.field, labels)

    def _sample(
        self,
        start: Tensor,
        labels: Tensor | None,
        sampling: Sampling,
        noise: SampleNoise,
        weaker: LatentGenerator | None,
        keep_states: bool,
    ) -> Generated:
        field: Field = self.velocity_field(labels, len(start))
        if sampling.guides:
            away = (
                self.velocity_field(None, len(start)) if weaker is None else weaker.velocity_field(labels, len(start))
            )
            field = Guided(field, away, sampling.guidance, sampling.interval, sampling.channels)
        walk = sampling.walk(noise)
        flow = integrate(field, start, walk.grid, walk.solver, keep="nodes" if keep_states else "end")
        return Generated(flow.end, flow.evaluations, flow)

    def save(self, directory: str | Path, dtype: torch.dtype | None = None) -> None:
        """Writes config.json and safetensors (floats as `dtype`, if given) to `directory`, completely or not at all.

        Raises `WeightsError` if the files cannot be written.
        """
        config = {"format": FORMAT, "version": VERSION, "config": to_json(self.config)}
        write_directory(directory, config, self.state_dict(), dtype=dtype)

    @classmethod
    def load(cls, directory: str | Path) -> FlowGenerator:
        """Reads a directory written by `save`: float32, in evaluation mode, parameters frozen.

        A folder `coder` in it holds the coder of its latents, whatever its configuration names.

        Raises `WeightsError` for a directory that does not hold a flow generator, and for weights missing, cut, or of
        another shape.
        """
        directory = Path(directory)
        config = read_format(directory, FORMAT, (VERSION,))
        tensors, source = read_weights(directory)
        own_coder = directory / OWN_CODER
        return cls._built(
            config, tensors, str(directory / CONFIG), source, own_coder if (own_coder / CONFIG).is_file() else None
        )

    @classmethod
    def load_drop_in(cls, directory: str | Path) -> FlowGenerator:
        """Reads a directory written by `FlowGeneratorModel.save_pretrained`. Raises `WeightsError` as `load`."""
        directory = Path(directory)
        data, (found, source) = read_settings(directory), read_weights(directory, DIFFUSERS)
        tensors = {name.removeprefix("generator."): tensor for name, tensor in found.items()}
        return cls._built(data.get("rac"), tensors, str(directory / CONFIG), source)

    @classmethod
    def _built(
        cls, config: Any, tensors: Mapping[str, Tensor], said_by: str, source: str, own_coder: Path | None = None
    ) -> FlowGenerator:
        """Returns a frozen generator from the JSON of its configuration and its weights; errors name both files.

        `own_coder` is the directory of a coder that was trained with it.
        """
        with as_weights_error():
            built = from_json(FlowGeneratorConfig, config, said_by)
            generator = cls(built if own_coder is None else replace(built, coder=str(own_coder)))
        fit_tensors(generator, tensors, source)
        return generator.eval().requires_grad_(False)
