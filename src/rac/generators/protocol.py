"""The base class of all generators of latents: seed, label -> latent, for the coder whose latents they learnt."""

from __future__ import annotations

import difflib
import re
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..coders.protocol import Coder
from ..errors import RacError
from ..flow import Trajectory
from ..latents import LatentSpec
from .sampling import SampleNoise, Sampling

MOST_SIDE = 4096
"""Greatest side of a latent that is generated: more than any memory holds the attention of."""


class Generated(NamedTuple):
    """Result of sampling: the latents, their cost, and the flow."""

    latent: Tensor
    """The latents, B c h w, as the coder decodes them."""
    evaluations: int
    """Network evaluations that each latent took, those of guidance included."""
    flow: Trajectory | None = None
    """The flow from the noise; its states only where they were asked for."""


@dataclass(frozen=True)
class LatentKind:
    """What a generator makes: latents of a coder, of some size and of some classes."""

    spec: LatentSpec
    """Shape of the latents, and the hash of the coder's statistics."""
    side: int
    """Height and width of the latents it was trained on."""
    classes: tuple[str, ...] = ()
    """Names of the classes, in the order of their labels; empty: it knows no classes."""
    coder: str | None = None
    """Name or directory of the coder of the latents; not needed to generate them."""

    def __post_init__(self) -> None:
        if not 1 <= self.side <= MOST_SIDE:
            raise RacError(f"side {self.side} of the latents must be at least 1, and at most {MOST_SIDE}")
        if len(set(self.classes)) < len(self.classes):
            twice = next(name for name in self.classes if self.classes.count(name) > 1)
            raise RacError(f"class {twice!r} is there twice; each class needs a name of its own")

    def differences(self, other: LatentKind) -> list[str]:
        """Returns in words how the latents and classes differ from those of `other`; empty if they do not."""
        found = self.spec.differences(other.spec)
        if self.classes != other.classes:
            found.append(f"{len(self.classes)} classes, not the same {len(other.classes)}")
        return found


class LatentGenerator(nn.Module, ABC):
    """A generator of latents, for a coder to decode: (seeds, labels) -> latents B c h w.

    A sample depends on its seed, its label and the settings, and not on its batch (up to rounding).
    """

    kind: LatentKind
    """What it makes."""
    sampling: Sampling
    """The settings that it samples with where no others are given."""

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the classes, in the order of their labels; empty if it knows no classes."""
        return self.kind.classes

    @property
    def dtype(self) -> torch.dtype:
        """The floating-point type of the parameters, and of the latents."""
        return next(parameter.dtype for parameter in self.parameters())

    @property
    def device(self) -> torch.device:
        """The device of the parameters."""
        return next(self.parameters()).device

    def label(self, name: str) -> int:
        """Returns the label of a class, called by its name or by its number.

        Upper and lower case count alike, and so do spaces, hyphens and underscores. Raises `RacError` for an unknown
        class, naming those that are near.
        """
        if not self.classes:
            raise RacError(f"class {name!r} cannot be asked for: this generator knows no classes; leave classes out")
        if (found := self.find_label(name)) is not None:
            return found
        names = {_plain(one): label for label, one in enumerate(self.classes)}
        near = difflib.get_close_matches(_plain(name), names, n=3, cutoff=0.5)
        hint = (
            f"did you mean {' or '.join(self.classes[names[one]] for one in near)}?" if near else self._some_classes()
        )
        raise RacError(f"no class {name!r}; {hint}")

    def find_label(self, name: str) -> int | None:
        """Returns the label of a class as `label` does, or None for an unknown class."""
        names = {_plain(one): label for label, one in enumerate(self.classes)}
        if (found := names.get(_plain(name))) is not None:
            return found
        return int(name) if re.fullmatch(r"\d{1,9}", name) and int(name) < len(self.classes) else None

    def _some_classes(self) -> str:
        shown = ", ".join(self.classes[:10])
        more = f" and {len(self.classes) - 10} more" if len(self.classes) > 10 else ""
        return f"classes are {shown}{more}, or their numbers, 0 to {len(self.classes) - 1}"

    def check_coder(self, coder: Coder, name: str) -> None:
        """Raises `RacError` unless the coder called `name` decodes the latents that this generator makes."""
        self.check_spec(coder.spec, name)

    def check_spec(self, spec: LatentSpec, name: str) -> None:
        """Raises `RacError` unless `spec`, of the coder called `name`, is that of the latents of this generator."""
        if differ := self.kind.spec.differences(spec):
            own = f", such as {self.kind.coder}" if self.kind.coder else ""
            raise RacError(
                f"the generator's latents are not those of {name}: {'; '.join(differ)}; "
                f"give a coder of its latents{own}"
            )

    def sample(
        self,
        rng_seeds: Sequence[int | torch.Generator],
        labels: Sequence[int] | None = None,
        sampling: Sampling | None = None,
        *,
        weaker: LatentGenerator | None = None,
        size: tuple[int, int] | None = None,
        keep_states: bool = False,
    ) -> Generated:
        """Generates one latent for each seed.

        - `rng_seeds`: the seeds of the samples; equal seeds give equal noise, whatever else is in the batch. Generators
          of torch may stand in their place, and are drawn from.
        - `labels`: the labels of the samples; None: none, whatever classes there are.
        - `sampling`: the settings; None: the generator's own.
        - `weaker`: a weaker generator of the same latents and classes, to be guided away from, in place of the
          velocity without label (autoguidance, arXiv 2406.02507).
        - `size`: height and width of the latents; None: those that were trained on.
        - `keep_states`: keep the states of the flow.

        Raises `RacError` for labels of another number or out of range, for guidance without labels or without a weaker
        generator, and for a weaker generator of another kind of latents.
        """
        sampling = sampling or self.sampling
        height, width = size or (self.kind.side, self.kind.side)
        if not rng_seeds:
            raise RacError("no seeds are given; give one for each sample")
        if labels is not None and len(labels) != len(rng_seeds):
            raise RacError(f"{len(labels)} labels do not fit {len(rng_seeds)} seeds; give one for each sample")
        self.check_request(labels, sampling, weaker, (height, width))
        noise = SampleNoise(rng_seeds)
        start = noise.draw((self.kind.spec.channels, height, width)).to(self.device, self.dtype)
        given = None if labels is None else torch.tensor(list(labels), dtype=torch.int64, device=self.device)
        return self._sample(start, given, sampling, noise, weaker, keep_states)

    def check_request(
        self,
        labels: Sequence[int] | None,
        sampling: Sampling,
        weaker: LatentGenerator | None = None,
        size: tuple[int, int] | None = None,
    ) -> None:
        """Raises `RacError` for what `sample` would refuse, before any work; the arguments are those of `sample`."""
        height, width = size or (self.kind.side, self.kind.side)
        if not (1 <= height <= MOST_SIDE and 1 <= width <= MOST_SIDE):
            raise RacError(f"latents of {height} x {width} cannot be generated; give sides of 1 to {MOST_SIDE}")
        if height % self.multiple or width % self.multiple:
            raise RacError(f"latents of {height} x {width} have sides that are no multiples of {self.multiple}")
        if labels is not None and not self.classes:
            raise RacError("this generator knows no classes; leave the labels out")
        for label in labels or ():
            if not 0 <= label < len(self.classes):
                raise RacError(f"label {label} is none of 0 to {len(self.classes) - 1}")
        if sampling.guides and weaker is None and labels is None:
            raise RacError(
                "guidance without labels has nothing to go away from; give labels, a weaker generator, or guidance 1"
            )
        if weaker is not None and (differ := weaker.kind.differences(self.kind)):
            raise RacError(f"the weaker generator is of another kind: {'; '.join(differ)}; give one of the same")

    @property
    @abstractmethod
    def network(self) -> nn.Module:
        """The network, which maps states B c h w and times B to velocities."""

    @property
    @abstractmethod
    def multiple(self) -> int:
        """The number that the sides of latents must be multiples of."""

    @abstractmethod
    def _sample(
        self,
        start: Tensor,
        labels: Tensor | None,
        sampling: Sampling,
        noise: SampleNoise,
        weaker: LatentGenerator | None,
        keep_states: bool,
    ) -> Generated:
        """Generates latents from the noise `start`, B c h w, for labels B. Nothing is checked."""

    @abstractmethod
    def velocity_field(self, labels: Tensor | None, count: int) -> Any:
        """Returns the velocity field (state, time) -> velocity for the labels of `count` samples; None: no label."""

    @abstractmethod
    def save(self, directory: str | Path, dtype: torch.dtype | None = None) -> None:
        """Writes config.json and safetensors (floats as `dtype`, if given) to `directory`, completely or not at all.

        Raises `WeightsError` if the files cannot be written.
        """


def _plain(name: str) -> str:
    return re.sub(r"[\s_-]+", " ", name).strip().casefold()
