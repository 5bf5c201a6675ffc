"""Fields made of other fields: a condition bound to a network, and guidance of one field by a weaker one.

Conditions are bound and guidance is chosen before an integration begins, so solvers, inversion and training see a
field of (state, time) like any other.
"""

from __future__ import annotations

from abc import abstractmethod

import torch
from torch import Tensor, nn

from ..errors import RacError
from .solvers import Field


class CompositeField(nn.Module):
    """A field that calls other fields, and counts the network evaluations that one call of it costs."""

    @abstractmethod
    def evaluations_at(self, time: Tensor) -> int:
        """Returns how many network evaluations a call at `time` (B) costs each image."""


def evaluations_of(field: Field, time: Tensor) -> int:
    """Returns how many network evaluations one call of `field` at `time` (B) costs each image: 1 for a plain field."""
    return field.evaluations_at(time) if isinstance(field, CompositeField) else 1


class Conditioned(CompositeField):
    """A conditional field with its condition bound: (state, time[, interval]) -> velocity.

    Args:
        field: called as field(state B C H W, time B[, interval B], condition=condition).
        condition: what the field is to generate, such as class indices (B), or latents to decode (B c h w). Gradients
            flow to it.
    """

    condition: Tensor

    def __init__(self, field: Field, condition: Tensor) -> None:
        super().__init__()
        self.field = field
        # A buffer, so that it moves with the module and memory-saving integration finds its gradient.
        self.register_buffer("condition", condition, persistent=False)

    def forward(self, state: Tensor, time: Tensor, *interval: Tensor) -> Tensor:
        """Returns the velocity B C H W at `state` B C H W and `time` B, under the condition."""
        return self.field(state, time, *interval, condition=self.condition)

    def evaluations_at(self, time: Tensor) -> int:
        """Returns the network evaluations that a call of the wrapped field costs."""
        return evaluations_of(self.field, time)


class Guided(CompositeField):
    """A field pushed away from a weaker one: weaker + scale * (field - weaker).

    If the weaker field is the same network without its label, this is classifier-free guidance (arXiv 2207.12598,
    equation 6, with scale = 1 + w); if it is a smaller or earlier network given the same label, autoguidance (arXiv
    2406.02507, equation 3). Since the two weights add up to 1, guiding velocities and guiding drifts is the same.

    Args:
        field: the field that is followed.
        weaker: the field it is pushed away from.
        scale: 1 leaves `field` as it is (and does not evaluate `weaker`), 0 gives `weaker`; above 1 exaggerates.
        interval: times [first, last], both included, at which guidance acts (arXiv 2404.07724). Elsewhere `field` is
            followed as it is, for one evaluation instead of two.
        channels: guide only the first so many channels. Public DiT and SiT samplers guide 3 of 4; None guides all.

    Raises:
        RacError: the scale is not finite, the interval is not within [0, 1] or empty, `channels` is below 1.
    """

    def __init__(
        self,
        field: Field,
        weaker: Field,
        scale: float,
        interval: tuple[float, float] = (0.0, 1.0),
        channels: int | None = None,
    ) -> None:
        super().__init__()
        first, last = interval
        if not -torch.inf < scale < torch.inf:
            raise RacError(f"guidance scale {scale} must be a finite number; 1 is no guidance, 1.5 to 4 are usual")
        if not 0 <= first <= last <= 1:
            raise RacError(f"guidance interval {interval} must be (first, last) with 0 <= first <= last <= 1")
        if channels is not None and channels < 1:
            raise RacError(f"guided channels {channels} must be at least 1; leave it out to guide all")
        self.field = field
        self.weaker = weaker
        self.scale = scale
        self.interval = interval
        self.channels = channels

    def forward(self, state: Tensor, time: Tensor, *interval: Tensor) -> Tensor:
        """Returns the guided velocity B C H W at `state` B C H W and `time` B."""
        velocity = self.field(state, time, *interval)
        if not self._acts(time):
            return velocity
        weaker = self.weaker(state, time, *interval)
        guided = weaker + self.scale * (velocity - weaker)
        if self.channels is not None:
            guided = torch.cat([guided[:, : self.channels], velocity[:, self.channels :]], dim=1)
        if self._acts_always:
            return guided
        return torch.where(self._inside(time).view(-1, *[1] * (state.ndim - 1)), guided, velocity)

    def evaluations_at(self, time: Tensor) -> int:
        """Returns the evaluations of `field`, plus those of `weaker` if guidance acts on any image at `time` (B)."""
        return evaluations_of(self.field, time) + (evaluations_of(self.weaker, time) if self._acts(time) else 0)

    @property
    def _acts_always(self) -> bool:
        return self.interval == (0.0, 1.0)

    def _inside(self, time: Tensor) -> Tensor:
        first, last = self.interval
        return (time >= first) & (time <= last)

    def _acts(self, time: Tensor) -> bool:
        return self.scale != 1 and (self._acts_always or bool(self._inside(time).any()))
