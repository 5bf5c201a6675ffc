"""RAC, the rectified flow auto coder: one velocity field that decodes forwards and encodes backwards.

RAC: Rectified Flow Auto Coder (arXiv 2603.05925).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from ..config import read_json, to_json
from ..errors import RacError
from ..fields import CarriersFieldConfig, FieldConfig, LocalFieldConfig, Projector
from ..flow import Euler, FixedPoint, MeanEuler, Solver, TimeGrid, Trajectory, integrate
from ..images import crop, pad_to_multiple
from ..latents import LatentSpec
from ..states import PAD, Spread, StateSpec, contract, expand, image_of, image_state
from ..storage import CONFIG, fit_tensors, load_tensors, read_config, read_tensors, write_directory
from .adapter import WEIGHTS as DROP_IN_WEIGHTS
from .protocol import Coder

HEADER = {"format": "rac", "version": 1}
"""What the config.json of a RAC begins with."""

DROP_IN = {"_class_name": "AutoencoderRAC"}
"""What marks that of a RAC in diffusers' clothes (`rac.integrations.diffusers`)."""


@dataclass(frozen=True)
class RACConfig:
    """All that makes a RAC, its weights apart."""

    spec: LatentSpec
    """That of the teacher whose latents it codes."""
    field: FieldConfig
    """The velocity network; its factor must be that of `spec`."""
    state_channels: int = 4
    """C of the states B C H W, the image's three among them."""
    spread: Spread = "shuffle"
    """How a latent is laid out in the seed state; see `rac.states.StateSpec`."""
    contraction: Literal["inverse", "projector"] = "inverse"
    """How a seed state becomes a latent: by the spread's own inverse, or by a learned projector."""
    teacher: str | None = None
    """Name or directory of the teacher it was trained on; not needed to use the coder."""
    steps: int = 4
    """Steps where none are asked for."""
    seed_noise: float = 0.0
    """Deviation of Gaussian noise about `PAD` in what the latent leaves free of the seed state. Decoding is then a flow
    from (latent, noise) to one of the images that the latent may mean; encoding reads the latent's sites alone."""

    def states(self) -> StateSpec:
        """The layout of its states. Raises `RacError` where the latent does not fit."""
        return StateSpec(self.spec.factor, self.spec.channels, self.state_channels, self.spread)


class RAC(Coder):
    """image <-> latent by one field.

    `steps` is a number of steps or a rising `TimeGrid` (encoding walks it the other way), `solver` any of `rac.flow`'s.
    """

    def __init__(self, config: RACConfig) -> None:
        super().__init__()
        self.config = config
        self.spec = config.spec
        self.teacher = config.teacher
        self.states = config.states()
        if isinstance(config.field, LocalFieldConfig) and config.field.carrier and config.spread != "beside":
            raise RacError(
                f"spread {config.spread!r} has no channels of the latent's own, from which a carrier could read it; "
                "give spread beside, or carrier False"
            )
        wanted = ("beside", config.spec.channels)
        if isinstance(config.field, CarriersFieldConfig) and (config.spread, config.field.latent_channels) != wanted:
            raise RacError(
                f"a carriers field of {config.field.latent_channels} latent channels does not fit spread "
                f"{config.spread} and {config.spec.channels} latent channels; give spread beside, and "
                f"latent_channels {config.spec.channels}"
            )
        self.field: nn.Module = config.field.build(config.state_channels, config.spec.factor)
        self.projector: nn.Module | None = (
            Projector(config.state_channels, config.spec.channels, config.spec.factor)
            if config.contraction == "projector"
            else None
        )

    # ------------------------------------------------------------------------------------- latent -> image

    def decode(self, latent: Tensor, steps: int | TimeGrid | None = None, solver: Solver | None = None) -> Tensor:
        """Latent B c h w -> image B 3 h*f w*f, about [-1, 1], not clamped, by an explicit solver.

        Raises `RacError` for a latent of other channels or with NaN, and for steps below 1.
        """
        self.spec.check(latent)
        flow = integrate(self.field, self.seed_state(latent), self._grid(steps), self.solver_for(solver))
        return image_of(flow.end)

    def trajectory(
        self, latent: Tensor, steps: int | TimeGrid | None = None, solver: Solver | None = None
    ) -> Trajectory:
        """The states on the way from the seed state to the image state, and what they cost. Raises as `decode`."""
        self.spec.check(latent)
        return integrate(self.field, self.seed_state(latent), self._grid(steps), self.solver_for(solver), keep="nodes")

    def seed_state(self, latent: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Latent B c h w -> seed state B C h*f w*f, with noise where this coder wants some.

        The noise is the same for all images; `generator`, on the CPU, draws another than the usual.
        """
        if not self.config.seed_noise:
            return expand(latent, self.states)
        height, width = (side * self.spec.factor for side in latent.shape[-2:])
        generator = torch.Generator().manual_seed(0) if generator is None else generator
        noise = torch.randn(1, self.config.state_channels, height, width, generator=generator).to(latent)
        return expand(latent, self.states, (PAD + self.config.seed_noise * noise).expand(len(latent), -1, -1, -1))

    # ------------------------------------------------------------------------------------- image -> latent

    def encode(self, image: Tensor, steps: int | TimeGrid | None = None, solver: Solver | None = None) -> Tensor:
        """Image B 3 H W in [-1, 1] -> latent B c h w, by walking the grid backwards.

        Sides that are no multiple of the factor are padded by reflection at the bottom and the right. Reversed Euler
        misses the exact inverse of the decoder by O(1/steps); `solver=FixedPoint(Euler())` finds it, up to the
        contraction, and warns where it cannot. Raises `RacError` for an image too small, and for steps below 1.
        """
        return self.contract(self._walk_back(image, steps, solver, "end").end)

    def encode_trajectory(
        self, image: Tensor, steps: int | TimeGrid | None = None, solver: Solver | None = None
    ) -> Trajectory:
        """The states on the way from the image state back to the seed state. Raises as `encode`."""
        return self._walk_back(image, steps, solver, "nodes")

    def _walk_back(
        self, image: Tensor, steps: int | TimeGrid | None, solver: Solver | None, keep: Literal["end", "nodes"]
    ) -> Trajectory:
        padded, _ = pad_to_multiple(image, self.spec.factor)
        start = image_state(padded, self.config.state_channels)
        return integrate(self.field, start, self._grid(steps).reversed(), self.solver_for(solver), keep=keep)

    def contract(self, state: Tensor) -> Tensor:
        """Seed state B C H W -> latent B c h w: by the spread's inverse, or by the projector if it has one."""
        return contract(state, self.states) if self.projector is None else self.projector(state).to(state.dtype)

    # ------------------------------------------------------------------------------------- there and back

    def reconstruct(self, image: Tensor, steps: int | TimeGrid | None = None, solver: Solver | None = None) -> Tensor:
        """decode(encode(image)), cropped to the image's own size: B 3 H W, not clamped.

        With `FixedPoint(solver)` the way back is by that and the way there by the solver that it undoes.
        """
        latent = self.encode(image, steps, solver)
        return crop(self.decode(latent, steps, decoding_solver(solver)), (image.shape[-2], image.shape[-1]))

    def solver_for(self, solver: Solver | None = None) -> Solver:
        """The solver that `solver` is for this coder's field; Euler where None is given.

        A field that knows its step size is told it by Euler's rule: `MeanEuler`, alone or undone by a `FixedPoint`.
        """
        solver = solver or Euler()
        if not self.config.field.interval:
            return solver
        if isinstance(solver, FixedPoint):
            return replace(solver, solver=self.solver_for(solver.solver))
        return MeanEuler() if isinstance(solver, Euler) else solver

    def _grid(self, steps: int | TimeGrid | None) -> TimeGrid:
        if isinstance(steps, TimeGrid):
            if steps.nodes[0] > steps.nodes[-1]:
                raise RacError("give the rising grid; encoding walks it backwards by itself")
            return steps
        return TimeGrid.uniform(self.config.steps if steps is None else steps)

    # ------------------------------------------------------------------------------------- files

    def save(self, directory: str | Path, dtype: torch.dtype | None = None) -> None:
        """Write config.json and model.safetensors, whole or not at all. `dtype` narrows the floats on disk."""
        write_directory(directory, {**HEADER, "config": to_json(self.config)}, self.state_dict(), dtype=dtype)

    @classmethod
    def load(cls, directory: str | Path) -> RAC:
        """Read what `save` wrote, or `AutoencoderRAC.save_pretrained`: float32, in evaluation mode, parameters frozen.

        Raises `WeightsError` for a directory that is not a RAC's, and for weights missing, cut, or of another shape.
        """
        directory = Path(directory)
        if is_drop_in(directory):
            steps = read_json(directory / CONFIG).get("num_inference_steps", RACConfig.steps)
            coder = cls(replace(read_config(directory, DROP_IN, RACConfig, "rac"), steps=steps))
            source = directory / DROP_IN_WEIGHTS
            tensors, _ = read_tensors(source)
            fit_tensors(coder, {name.removeprefix("coder."): tensor for name, tensor in tensors.items()}, str(source))
        else:
            coder = cls(read_config(directory, HEADER, RACConfig))
            load_tensors(coder, directory)
        return coder.eval().requires_grad_(False)


def decoding_solver(solver: Solver | None) -> Solver | None:
    """The solver of the way there that belongs to `solver` on the way back: what a `FixedPoint` undoes."""
    return solver.solver if isinstance(solver, FixedPoint) else solver


def is_drop_in(directory: Path) -> bool:
    """Whether `directory` holds a RAC in diffusers' clothes."""
    config = directory / CONFIG
    data = read_json(config) if config.is_file() else None
    return isinstance(data, dict) and DROP_IN.items() <= data.items()
