"""The base class of all coders: image <-> latent, in each direction in one pass or by a flow.

A family writes the unchecked core: `_moments` or `_encode`, `_decode`, `networks` and `_save`, `default_steps` where
it walks a flow, and `noise_shape` where it decodes from noise. Checks, padding and dtypes live here, once.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from ..errors import RacError
from ..flow import Euler, Solver, TimeGrid, Trajectory, Walk
from ..flow.grid import check_steps
from ..images import crop, pad_to_multiple
from ..latents import LatentSpec, Statistics
from ..runtime import generator
from ..tensors import check_dense, check_device, may_read

if TYPE_CHECKING:
    from typing_extensions import Self

Way = Literal["encode", "decode"]
Keep = Literal["end", "nodes"]

WAYS: frozenset[Way] = frozenset(("encode", "decode"))

LARGEST_VALUE = 16.0
"""Largest absolute value accepted in an image; images beyond it hold pixels of 0 ... 255, not numbers in [-1, 1]."""


class Coded(NamedTuple):
    """Result of encoding: the latent, its cost, and the flow if there was one."""

    latent: Tensor
    """The latent, B c h w."""
    evaluations: int
    """Network evaluations that encoding took; 1 for a coder that does so in one pass."""
    flow: Trajectory | None = None
    """The flow from the image state to the seed state; None for a coder that does so in one pass."""


class Decoded(NamedTuple):
    """Result of decoding: the image, its cost, and the flow if there was one."""

    image: Tensor
    """The image, B 3 h*f w*f, about [-1, 1], not clamped."""
    evaluations: int
    """Network evaluations that decoding took; 1 for a coder that does so in one pass."""
    flow: Trajectory | None = None
    """The flow from the seed state to the image state; None for a coder that does so in one pass."""


class Network(NamedTuple):
    """One of a coder's networks, with the shapes of its arguments."""

    module: nn.Module
    shapes: Callable[[int, int], tuple[tuple[int, ...], ...]]
    """Returns the shapes of the arguments for one image, from its height and width (multiples of the factor)."""
    way: Literal["encode", "decode", "both"]
    """The way that uses the network."""


class Coder(nn.Module, ABC):
    """An image autoencoder: image <-> latent.

    Images are B 3 H W in [-1, 1], latents B c h w with h = ceil(H/f). Tensors of another floating-point type than the
    coder's are converted to it, and results have it. Nothing is detached: gradients flow through `encode` and `decode`,
    to a frozen coder's inputs too.
    """

    spec: LatentSpec
    """Shape of the coder's latents, and the hash of its statistics."""
    statistics: Statistics
    """Shift and scale between the coder's raw latents and its latents."""
    teacher: str | None = None
    """Name or directory of the coder that this one was trained to imitate, if any."""
    trained_ways: frozenset[Way] = WAYS
    """The ways that the coder was trained for; the other one runs, but its results are of no use."""
    has_posterior: bool = False
    """Whether `moments` are mean and log-variance, so that latents can be sampled."""

    def __init__(self, spec: LatentSpec, statistics: Statistics | None = None) -> None:
        super().__init__()
        self._whole: Coder | None = None
        self._outer_dtype: torch.dtype | None = None
        self.set_statistics(statistics or Statistics.identity(), spec)

    def set_statistics(self, statistics: Statistics, spec: LatentSpec | None = None) -> None:
        """Replaces the statistics by a copy of `statistics`, and puts their hash into `spec` (None: the present one).

        Raises `RacError` if they have another number of channels, or another hash than `spec` names.
        """
        spec = spec or LatentSpec(self.spec.factor, self.spec.channels, self.spec.side)
        shape, found = tuple(statistics.shift.shape), statistics.hash()
        if shape and shape[0] != spec.channels:
            raise RacError(
                f"statistics of {shape[0]} channels do not fit {spec.channels} latent channels; give {spec.channels}"
            )
        if spec.statistics not in (None, found):
            raise RacError(
                f"the statistics have hash {found}, the spec names {spec.statistics}; give both of the same coder"
            )
        self.statistics = statistics.copy()
        self.spec = LatentSpec(spec.factor, spec.channels, spec.side, found)

    @property
    def whole(self) -> Coder:
        """The coder that `with_networks` was called on to make this one; otherwise the coder itself."""
        return self._whole or self

    @property
    def dtype(self) -> torch.dtype:
        """The floating-point type of the coder's images and latents: that of its parameters."""
        if self._outer_dtype is not None:
            return self._outer_dtype
        return next((parameter.dtype for parameter in self.parameters()), torch.float32)

    # ------------------------------------------------------------------------------------- how a way is walked

    def default_steps(self, way: Way) -> int | None:
        """Returns the default number of steps of a way, or None for a way that takes one pass."""
        return None

    def walk(
        self, way: Way, steps: int | TimeGrid | None = None, solver: Solver | None = None, shift: float = 1.0
    ) -> Walk | None:
        """Returns the time grid and solver of a way, or None where it takes one pass.

        - `way`: "encode" or "decode".
        - `steps`: a number of steps, or a rising grid (encoding walks it backwards); None: the coder's own number.
        - `solver`: any solver of `rac.flow`; None: Euler's.
        - `shift`: the `alpha` of `TimeGrid.shifted`: above 1 puts more nodes near the seed state; 1: equal steps. A
          grid stays as it is.

        Raises `RacError` for steps below 1, and for a falling grid.
        """
        if steps is not None and not isinstance(steps, TimeGrid):
            check_steps(steps)
        own = self.default_steps(way)
        if own is None:
            return None
        if isinstance(steps, TimeGrid):
            grid = steps
            if grid.nodes[0] > grid.nodes[-1]:
                raise RacError("give the rising grid; encoding walks it backwards by itself")
        else:
            number = own if steps is None else steps
            grid = TimeGrid.uniform(number) if shift == 1 else TimeGrid.shifted(number, shift)
        return Walk(grid.reversed() if way == "encode" else grid, solver or Euler())

    def _chosen(self, way: Way, steps: int | TimeGrid | None, solver: Solver | None, walk: Walk | None) -> Walk | None:
        """Returns the walk that the arguments of `encode` or `decode` ask for."""
        own = self.walk(way, steps, solver)
        if own is None and (walk is not None or steps is not None or solver is not None):
            raise RacError(
                f"a {type(self).__name__} {way}s in one pass and has no steps; leave out steps, solver and walk, or "
                "load a coder with a flow, such as a RAC"
            )
        if walk is not None and walk.backwards != (way == "encode"):
            raise RacError(f"the walk goes in the other direction; `coder.walk({way!r})` gives one to {way}")
        return walk or own

    # ------------------------------------------------------------------------------------- image -> latent

    def encode(
        self,
        image: Tensor,
        steps: int | TimeGrid | None = None,
        solver: Solver | None = None,
        *,
        walk: Walk | None = None,
    ) -> Tensor:
        """Encodes an image B 3 H W in [-1, 1] to a latent B c ceil(H/f) ceil(W/f).

        Sides that are not multiples of the factor are padded by reflection at the bottom and the right.

        - `image`: the images.
        - `steps`: a number of steps, or a rising `TimeGrid`, for coders that encode by a flow; None: the coder's own.
        - `solver`: any solver of `rac.flow`; None: Euler's.
        - `walk`: the result of `Coder.walk`, in place of `steps` and `solver`.

        Raises `RacError` for a tensor that is not an image (8-bit pixels, another shape, values far outside [-1, 1],
        NaN), an image too small to pad or of another size than the coder's only one, steps below 1, and steps where the
        coder encodes in one pass.
        """
        return self.coded(image, self._chosen("encode", steps, solver, walk)).latent

    def encode_trajectory(
        self,
        image: Tensor,
        steps: int | TimeGrid | None = None,
        solver: Solver | None = None,
        *,
        walk: Walk | None = None,
    ) -> Trajectory:
        """Returns the states B C H W on the way from the image state back to the seed state.

        - `image`: the images, B 3 H W in [-1, 1].
        - `steps`, `solver`, `walk`: as for `encode`.

        Raises `RacError` as `encode`, and for a coder that encodes in one pass.
        """
        flow = self.coded(image, self._chosen("encode", steps, solver, walk), keep="nodes").flow
        if flow is None:
            raise RacError(f"a {type(self).__name__} encodes in one pass and has no trajectory; load a RAC for one")
        return flow

    def coded(self, image: Tensor, walk: Walk | None = None, keep: Keep = "end") -> Coded:
        """Encodes an image, and returns the latent together with its cost and the flow.

        - `image`: B 3 H W in [-1, 1].
        - `walk`: the result of `Coder.walk`; None: the coder's own.
        - `keep`: "end" keeps only the end state of the flow, "nodes" all of its states.

        Raises `RacError` as `encode`.
        """
        image = self._padded(image)
        walk = self._chosen("encode", None, None, walk)
        if len(image):
            return self._encode(image, walk, keep)
        one = self._encode(image.new_zeros(1, *image.shape[1:]), walk, keep)
        return Coded(one.latent[:0], 0, _emptied(one.flow))

    def moments(self, image: Tensor) -> Tensor:
        """Returns the raw moments B m h w of an image B 3 H W.

        They are the raw latent (m = c) or, where `has_posterior`, mean and log-variance of the raw posterior (m = 2c).
        `finish` makes latents of them. Raises `RacError` as `encode`.
        """
        image = self._padded(image)
        return self._moments(image) if len(image) else self._moments(image.new_zeros(1, *image.shape[1:]))[:0]

    def finish(self, moments: Tensor, noise: Tensor | None = None) -> Tensor:
        """Returns latents B c h w from raw moments: of the mean, or of the sample mean + std * `noise` (B c h w).

        `finish(moments(image))` equals `encode(image)`. Raises `RacError` for moments of another number of channels,
        and for noise where there is no posterior.
        """
        channels = self.spec.channels
        check_dense(moments, "moments")
        if moments.ndim != 4 or moments.shape[1] != (2 if self.has_posterior else 1) * channels:
            raise RacError(f"moments of shape {tuple(moments.shape)} do not fit this coder of {channels} channels")
        if not self.has_posterior:
            if noise is not None:
                raise RacError(f"a {type(self).__name__} has no posterior to sample from; leave out the noise")
            return self.statistics.normalise(moments)
        mean, log_variance = moments.chunk(2, dim=1)
        if noise is None:
            return self.statistics.normalise(mean)
        std = torch.exp(0.5 * log_variance.clamp(-30.0, 20.0))  # the bounds of diffusers' posterior
        return self.statistics.normalise(mean + std * noise)

    def _padded(self, image: Tensor) -> Tensor:
        """Returns the image in the coder's dtype, its sides padded to multiples of the factor. Raises `RacError`."""
        check_image(image)
        check_device(image, self, "the image", "the coder")
        padded, _ = pad_to_multiple(image.to(self.dtype), self.spec.factor)
        side = None if self.spec.side is None else self.spec.side * self.spec.factor
        if side is not None and tuple(padded.shape[-2:]) != (side, side):
            raise RacError(f"this coder takes images of {side} x {side}, not {image.shape[-1]} x {image.shape[-2]}")
        return padded

    # ------------------------------------------------------------------------------------- latent -> image

    def decode(
        self,
        latent: Tensor,
        steps: int | TimeGrid | None = None,
        solver: Solver | None = None,
        *,
        walk: Walk | None = None,
        noise: Tensor | None = None,
    ) -> Tensor:
        """Decodes a latent B c h w to an image B 3 h*f w*f, about [-1, 1], not clamped.

        - `latent`: the latents.
        - `steps`: a number of steps, or a rising `TimeGrid`, for coders that decode by a flow; None: the coder's own.
        - `solver`: any solver of `rac.flow`; None: Euler's.
        - `walk`: the result of `Coder.walk`, in place of `steps` and `solver`.
        - `noise`: the start of coders that decode from noise, of the shape that `noise_shape` gives, or with 1 in
          place of B, such as `noise_of` draws; None: always the same, for all images alike.

        Raises `RacError` for a latent that is not a finite floating-point tensor of this coder's shape, for steps below
        1, for steps where the coder decodes in one pass, and for noise of another shape or where the coder takes none.
        """
        return self.decoded(latent, self._chosen("decode", steps, solver, walk), noise).image

    def trajectory(
        self,
        latent: Tensor,
        steps: int | TimeGrid | None = None,
        solver: Solver | None = None,
        *,
        walk: Walk | None = None,
        noise: Tensor | None = None,
    ) -> Trajectory:
        """Returns the states B C h*f w*f on the way from the latent to the image.

        - `latent`: the latents, B c h w.
        - `steps`, `solver`, `walk`, `noise`: as for `decode`.

        Raises `RacError` as `decode`, and for a coder that decodes in one pass.
        """
        flow = self.decoded(latent, self._chosen("decode", steps, solver, walk), noise, keep="nodes").flow
        if flow is None:
            raise RacError(f"a {type(self).__name__} decodes in one pass and has no trajectory; load a RAC for one")
        return flow

    def decoded(
        self, latent: Tensor, walk: Walk | None = None, noise: Tensor | None = None, keep: Keep = "end"
    ) -> Decoded:
        """Decodes a latent, and returns the image together with its cost and the flow.

        - `latent`: B c h w.
        - `walk`: the result of `Coder.walk`; None: the coder's own.
        - `noise`: the start of coders that decode from noise; None: always the same.
        - `keep`: "end" keeps only the end state of the flow, "nodes" all of its states.

        Raises `RacError` as `decode`.
        """
        self.spec.check(latent)
        check_device(latent, self, "the latent", "the coder")
        latent = latent.to(self.dtype)
        walk = self._chosen("decode", None, None, walk)
        if len(latent):
            return self._decode(latent, walk, self._noise(latent, noise), keep)
        one = latent.new_zeros(1, *latent.shape[1:])
        decoded = self._decode(one, walk, self._noise(one, None), keep)
        return Decoded(decoded.image[:0], 0, _emptied(decoded.flow))

    def noise_shape(self, latent: Tensor) -> tuple[int, ...] | None:
        """Returns the shape of the noise that `latent` is decoded from; None for coders that decode without noise."""
        return None

    def noise_of(self, latent: Tensor, names: Sequence[str | int], rng_seed: int = 0) -> Tensor | None:
        """Returns noise to decode latents B c h w from, for each one noise of its own; None for coders without noise.

        An image's noise depends on `rng_seed`, on its name and on its size alone, so neither on its batch nor on its
        place in it. `names` are as many names, or numbers, as there are latents.
        """
        shape = self.noise_shape(latent)
        if shape is None:
            return None
        noise = torch.empty(shape, dtype=torch.float32, device="cpu")
        for row, name in zip(noise, names, strict=True):
            torch.randn(row.shape, generator=generator(rng_seed, "decoding", name), out=row)
        return noise.to(latent)

    def _noise(self, latent: Tensor, noise: Tensor | None) -> Tensor | None:
        shape = self.noise_shape(latent)
        if shape is None:
            if noise is not None:
                raise RacError(f"a {type(self).__name__} decodes from the latent alone; leave out the noise")
            return None
        if noise is None:  # one for all: without names, only so an image does not depend on its batch
            noise = torch.randn(1, *shape[1:], generator=torch.Generator().manual_seed(0), device="cpu")
        if noise.shape[0] not in (1, shape[0]) or noise.shape[1:] != shape[1:]:
            raise RacError(f"the noise has shape {tuple(noise.shape)}, this latent needs noise of shape {shape}")
        return noise.to(latent).expand(shape)

    # ------------------------------------------------------------------------------------- both

    def reconstruct(self, image: Tensor, steps: int | TimeGrid | None = None, solver: Solver | None = None) -> Tensor:
        """Encodes and decodes an image, and crops the result to the image's own size: B 3 H W, not clamped.

        `steps` and `solver` apply to each way that is walked. With `FixedPoint(solver)` the image is encoded by that
        and decoded by the solver that it undoes. Raises `RacError` as `encode`, and for steps where both ways
        take one pass.
        """
        back = self.walk("encode", steps, solver)
        there = self.walk("decode", steps, solver) if back is None else back.inverse()
        if back is None and there is None:
            self._chosen("encode", steps, solver, None)  # which refuses them
        latent = self.coded(image, back).latent
        return crop(self.decoded(latent, there).image, (image.shape[-2], image.shape[-1]))

    def state_round_trip(self, flow_back: Trajectory, walk_back: Walk) -> Tensor:
        """Retraces an encoding flow forward to the image B 3 H W, without a latent in between.

        `flow_back` is the flow that `coded` gave, along `walk_back`; retracing it costs as many evaluations again. The
        image has the padded size. Raises `RacError` unless both ways are walked.
        """
        raise RacError(f"a {type(self).__name__} has no flow whose states could make a round trip; give a RAC")

    # ------------------------------------------------------------------------------------- the core of a family

    def _encode(self, image: Tensor, walk: Walk | None, keep: Keep) -> Coded:
        """Encodes an image of the coder's dtype, its sides multiples of the factor. Nothing is checked."""
        return Coded(self.finish(self._moments(image)), 1)

    def _moments(self, image: Tensor) -> Tensor:
        """Returns the raw moments of an image of the coder's dtype, its sides multiples of the factor.

        Nothing is checked.
        """
        return self.statistics.denormalise(self._encode(image, self.walk("encode"), "end").latent)

    @abstractmethod
    def _decode(self, latent: Tensor, walk: Walk | None, noise: Tensor | None, keep: Keep) -> Decoded:
        """Decodes a latent of the coder's dtype; `noise` is given if `noise_shape` asks for it. Nothing is checked."""

    # ------------------------------------------------------------------------------------- networks

    @abstractmethod
    def networks(self) -> dict[str, Network]:
        """Returns the coder's networks by name, each a submodule, with the shapes of its arguments."""

    def with_networks(self, change: Callable[[Network], nn.Module], dtype: torch.dtype | None = None) -> Self:
        """Returns a coder of the same class that uses `change(network)` in the place of each network.

        Everything else, weights included, is shared with this coder, whose files `save` writes. `dtype` is the type of
        images and latents, if it differs from the parameters'.
        """
        changed = {id(network.module): change(network) for network in self.networks().values()}
        twin: Any = _rewired(self, changed)
        twin.__dict__.update(_whole=self.whole, _outer_dtype=dtype or self._outer_dtype)
        return twin

    # ------------------------------------------------------------------------------------- files

    def save(self, directory: str | Path, dtype: torch.dtype | None = None) -> None:
        """Writes config.json and safetensors (floats as `dtype`, if given) to `directory`, completely or not at all.

        Raises `RacError` if the files cannot be written.
        """
        self.whole._save(Path(directory), dtype)

    @abstractmethod
    def _save(self, directory: Path, dtype: torch.dtype | None) -> None:
        """Writes the files of `save` for a coder whose networks are its own."""


def check_image(image: Tensor) -> None:
    """Raises `RacError` unless `image` is a floating-point tensor B 3 H W of finite values about [-1, 1].

    Values are looked at only on the CPU, and not while a function is compiled or transformed.
    """
    if not isinstance(image, Tensor):
        raise RacError(f"an image is a tensor B 3 H W, not {type(image).__name__}; rac.read_image gives one")
    check_dense(image, "an image")
    if image.ndim != 4 or image.shape[1] != 3:
        raise RacError(f"an image has shape B 3 H W, not {tuple(image.shape)}; rac.read_image gives one")
    if 0 in image.shape[-2:]:
        raise RacError(f"an image of {image.shape[-1]} x {image.shape[-2]} is too small; it has no pixels")
    if not image.is_floating_point():
        raise RacError(
            f"an image holds floating-point numbers in [-1, 1], not {image.dtype}; rac.images.from_pixels makes one of "
            "8-bit pixels"
        )
    if image.numel() and may_read(image):
        largest = float(image.detach().abs().amax())
        if not largest <= LARGEST_VALUE:
            raise RacError(
                f"an image holds finite numbers in [-1, 1], not {largest:g}; rac.images.from_pixels makes one of "
                "pixels of 0 ... 255"
            )


def _emptied(flow: Trajectory | None) -> Trajectory | None:
    """Returns the flow of an empty batch."""
    if flow is None:
        return None
    return Trajectory(flow.end[:0], tuple(state[:0] for state in flow.states), flow.times, 0)


def _rewired(module: nn.Module, changed: Mapping[int, nn.Module]) -> nn.Module:
    """Returns `module` with the submodules of these ids replaced.

    Only the modules on the way to them are copied, shallowly.
    """
    if id(module) in changed:
        return changed[id(module)]
    children = {name: child and _rewired(child, changed) for name, child in module._modules.items()}
    if all(child is module._modules[name] for name, child in children.items()):
        return module
    twin = copy.copy(module)
    twin.__dict__.update(_modules=children, _compiled_call_impl=None)
    return twin
