"""RAC, the rectified flow auto coder: one velocity field that decodes forwards and encodes backwards.

RAC: Rectified Flow Auto Coder (arXiv 2603.05925).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..config import from_json, to_json
from ..errors import RacError
from ..fields import CarriersFieldConfig, FieldConfig, LocalFieldConfig, Projector
from ..flow import Euler, FixedPoint, MeanEuler, Solver, TimeGrid, Trajectory, Walk, integrate
from ..latents import LatentSpec, Statistics, read_spec
from ..states import PAD, Spread, StateSpec, contract, expand, image_of, image_state
from ..storage import as_weights_error, fit_tensors
from .native import NativeFiles, read_drop_in, read_native, write_native
from .protocol import Coded, Coder, Decoded, Keep, Network, Way

FORMAT = "rac"
"""Value of `format` in the config.json of a RAC."""

VERSION = 2
"""Version of the file format.

Version 1 had the latents' statistics as numbers in config.json; since 2 they are tensors.
"""

DROP_IN = "AutoencoderRAC"
"""Value of `_class_name` in the config.json of a RAC saved by diffusers (`rac.integrations.diffusers`)."""


@dataclass(frozen=True)
class RACConfig:
    """Configuration of a RAC: everything but its weights."""

    spec: LatentSpec
    """Shape and statistics of its latents, which are those of its teacher."""
    field: FieldConfig
    """Configuration of the velocity network; its factor must be that of `spec`."""
    state_channels: int = 4
    """Channels C of the states B C H W, the image's three among them."""
    spread: Spread = "shuffle"
    """Layout of a latent in the seed state, one of those of `rac.states.StateSpec`."""
    contraction: Literal["inverse", "projector"] = "inverse"
    """Way from a seed state to a latent: the spread's own inverse, or a learned projector."""
    teacher: str | None = None
    """Name or directory of the teacher it was trained on; not needed to use the coder."""
    steps: int = 4
    """Default number of steps."""
    seed_noise: float = 0.0
    """Standard deviation of Gaussian noise about `PAD` in the sites of the seed state that the latent leaves free.
    Decoding is then a flow from (latent, noise) to one of the images that the latent may mean; encoding reads the
    latent's sites alone.
    """
    ways: tuple[Way, ...] = ("encode", "decode")
    """The ways it was trained for."""

    def __post_init__(self) -> None:
        if not 0 <= self.seed_noise < math.inf:
            raise RacError(f"seed_noise {self.seed_noise} must be at least 0, and finite")

    def states(self) -> StateSpec:
        """Returns the layout of its states. Raises `RacError` if the latent does not fit."""
        return StateSpec(self.spec.factor, self.spec.channels, self.state_channels, self.spread)


class RAC(Coder):
    """RAC, a coder that encodes and decodes by one velocity field.

    It decodes by an explicit solver, and encodes by walking the grid backwards: reversed Euler misses the exact inverse
    of the decoder by O(1/steps); `solver=FixedPoint(Euler())` finds it, up to the contraction, and warns if it cannot.
    """

    def __init__(self, config: RACConfig, statistics: Statistics | None = None) -> None:
        super().__init__(config.spec, statistics)
        self.config = replace(config, spec=self.spec)
        self.teacher = config.teacher
        self.trained_ways = frozenset(config.ways)
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
        self.field: nn.Module = _field(config)
        self.projector: nn.Module | None = (
            Projector(config.state_channels, config.spec.channels, config.spec.factor)
            if config.contraction == "projector"
            else None
        )

    @classmethod
    def of(cls, coder: Coder) -> RAC:
        """Returns `coder` itself, typed as a RAC. Raises `RacError` for a coder of another family."""
        if not isinstance(coder, RAC):
            raise RacError(f"expected a RAC, such as rac-256, not a {type(coder).__name__}")
        return coder

    def walk(
        self, way: Way, steps: int | TimeGrid | None = None, solver: Solver | None = None, shift: float = 1.0
    ) -> Walk | None:
        """Returns the time grid and solver of a way; the arguments are those of `Coder.walk`.

        - `way`, `steps`, `solver`, `shift`: as for `Coder.walk`.

        A field that accepts the interval gets its step size: `MeanEuler` takes the place of `Euler`.
        """
        walk = super().walk(way, steps, solver, shift)
        if walk is None or not self.config.field.interval:
            return walk
        return replace(walk, solver=_telling_steps(walk.solver))

    def default_steps(self, way: Way) -> int:
        """Returns the default number of steps, the same for both ways."""
        return self.config.steps

    # ------------------------------------------------------------------------------------- latent -> image

    def _decode(self, latent: Tensor, walk: Walk | None, noise: Tensor | None, keep: Keep) -> Decoded:
        assert walk is not None
        flow = integrate(self.field, self.seed_state(latent, noise), walk.grid, walk.solver, keep=keep)
        return Decoded(image_of(flow.end), flow.evaluations, flow)

    def seed_state(self, latent: Tensor, noise: Tensor | None = None) -> Tensor:
        """Returns the seed state B C h*f w*f of a latent B c h w, its free sites filled with this coder's noise.

        `noise` has the shape of the state; None: always the same, for all images alike.
        """
        noise = self._noise(latent, noise)
        return expand(latent, self.states, None if noise is None else PAD + self.config.seed_noise * noise)

    def noise_shape(self, latent: Tensor) -> tuple[int, ...] | None:
        """Returns the shape of a state, or None for a coder without seed noise."""
        if not self.config.seed_noise:
            return None
        height, width = (side * self.spec.factor for side in latent.shape[-2:])
        return latent.shape[0], self.config.state_channels, height, width

    # ------------------------------------------------------------------------------------- image -> latent

    def _encode(self, image: Tensor, walk: Walk | None, keep: Keep) -> Coded:
        assert walk is not None
        start = image_state(image, self.config.state_channels)
        flow = integrate(self.field, start, walk.grid, walk.solver, keep=keep)
        return Coded(self.contract(flow.end), flow.evaluations, flow)

    def contract(self, state: Tensor) -> Tensor:
        """Contracts a seed state B C H W to a latent B c h w, by the spread's inverse or the learned projector."""
        return contract(state, self.states) if self.projector is None else self.projector(state).to(state.dtype)

    def state_round_trip(self, flow_back: Trajectory, walk_back: Walk) -> Tensor:
        """Retraces an encoding flow forward to the image B 3 H W, without a latent in between."""
        walk = walk_back.inverse()
        return image_of(integrate(self.field, flow_back.end, walk.grid, walk.solver).end)

    def networks(self) -> dict[str, Network]:
        """Returns the field, and the projector if it has one."""
        channels = self.config.state_channels
        found = {"field": Network(self.field, lambda height, width: ((1, channels, height, width), (1,)), "both")}
        if self.projector is not None:
            found["projector"] = Network(
                self.projector, lambda height, width: ((1, channels, height, width),), "encode"
            )
        return found

    # ------------------------------------------------------------------------------------- files

    def _save(self, directory: Path, dtype: torch.dtype | None) -> None:
        write_native(self, self.config, FORMAT, VERSION, directory, dtype)

    @classmethod
    def load(cls, directory: str | Path) -> RAC:
        """Reads a directory written by `save`: float32, in evaluation mode, parameters frozen.

        Both format versions are read. Raises `WeightsError` for a directory that does not hold a RAC, and for weights
        missing, cut, or of another shape.
        """
        return cls._built(read_native(Path(directory), FORMAT, (1, VERSION)))

    @classmethod
    def load_drop_in(cls, directory: str | Path) -> RAC:
        """Reads a directory written by `AutoencoderRAC.save_pretrained`. Raises `WeightsError` as `load`."""
        return cls._built(read_drop_in(Path(directory), "rac"))

    @classmethod
    def _built(cls, files: NativeFiles) -> RAC:
        """Returns a frozen RAC from the JSON of its configuration and its weights; errors name the files of both."""
        with as_weights_error(files.said_by):
            settings, numbers = read_rac_config(files.config, files.said_by)
            coder = cls(settings, numbers or files.statistics)
        fit_tensors(coder, files.tensors, files.source)
        return coder.eval().requires_grad_(False)


def _telling_steps(solver: Solver) -> Solver:
    """Returns the solver with `MeanEuler` in the place of `Euler`, alone or undone by a fixed point."""
    if isinstance(solver, FixedPoint):
        return replace(solver, solver=_telling_steps(solver.solver))
    return MeanEuler() if isinstance(solver, Euler) else solver


def _field(config: RACConfig) -> nn.Module:
    try:
        return config.field.build(config.state_channels, config.spec.factor)
    except RacError:
        raise
    except (RuntimeError, ValueError, ArithmeticError) as error:  # torch's own, such as for a negative width
        reason = str(error).splitlines()[0]
        raise RacError(f"no network can be built of {config.field} ({reason}); change its settings") from error


def read_rac_config(data: Any, source: str) -> tuple[RACConfig, Statistics | None]:
    """Reads the JSON of a `RACConfig`, of either format version, and the statistics that only the first one contains.

    Raises `RacError` naming `source` and what does not fit.
    """
    if not isinstance(data, dict):
        return from_json(RACConfig, data, source), None
    spec, statistics = read_spec(data.get("spec"), f"the spec of {source}")
    return from_json(RACConfig, {**data, "spec": to_json(spec)}, source), statistics
