"""Training terms of a flow from noise to latents, pure and unweighted (SiT, arXiv 2401.08740)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ..draws import Draws
from ..errors import RacError
from ..flow import straight
from ..flow.times import TimeDistribution, shift, times_of


@dataclass(frozen=True)
class FlowObjective:
    """Settings of the terms: which times are trained on, and how often labels are left out.

    Raises `RacError` for values out of their range.
    """

    times: TimeDistribution = "uniform"
    """Distribution of the times, one of those of `rac.flow.times.times_of`."""
    time_mean: float = 0.0
    """Mean of the logit of the times, for `logit_normal`."""
    time_std: float = 1.0
    """Standard deviation of the logit of the times, for `logit_normal`."""
    shift: float = 1.0
    """Shift of the times that were drawn: above 1 towards the noise, for latents of many numbers."""
    label_dropout: float = 0.1
    """Share of the labels that are left out, so that the field learns to do without as well, for guidance."""

    def __post_init__(self) -> None:
        if not math.isfinite(self.time_mean) or not 0 < self.time_std < math.inf:
            raise RacError(f"time_mean {self.time_mean} and time_std {self.time_std} must be finite, and std above 0")
        if not 0 < self.shift < math.inf:
            raise RacError(f"shift {self.shift} must be above 0, and finite; 1 leaves times as they are")
        if not 0 <= self.label_dropout <= 1:
            raise RacError(f"label_dropout {self.label_dropout} must be a share, from 0 to 1")


class FlowSample(NamedTuple):
    """A point of the path from noise to latents, and all that a field is asked and told there."""

    state: Tensor
    """The point (1 - t) noise + t latent, B c h w."""
    time: Tensor
    """Its time t, B: 0 is noise, 1 the latent."""
    velocity: Tensor
    """The velocity latent - noise, B c h w."""
    labels: Tensor | None
    """The labels B, some of them replaced by the null label; None: there are none."""


class FlowDraw(NamedTuple):
    """The randomness of a `FlowSample`, drawn once for everything that is computed of a batch."""

    time: Tensor
    """The time t, B."""
    noise: Tensor
    """The noise, B c h w."""
    labels: Tensor | None
    """The labels B, some of them replaced by the null label; None: there are none."""

    def sample(self, latents: Tensor) -> FlowSample:
        """Returns the point between the noise and latents B c h w. Gradients flow to them."""
        state, velocity = straight(self.noise, latents, self.time)
        return FlowSample(state, self.time, velocity, self.labels)


def flow_draw(like: Tensor, labels: Tensor | None, null: int, objective: FlowObjective, draws: Draws) -> FlowDraw:
    """Draws times, noise and dropped labels.

    - `like`: latents, or anything of their shape B c h w, type and device.
    - `labels`: their labels, B; None: none.
    - `null`: the label that stands for none.
    - `objective`: the distribution of the times, and the share of dropped labels.
    - `draws`: the random numbers.
    """
    time = times_of(draws.uniform(like), objective.times, objective.time_mean, objective.time_std)
    time, noise = shift(time, objective.shift), draws.normal(like)
    if labels is not None:
        dropped = draws.uniform(like) < objective.label_dropout
        labels = torch.where(dropped, torch.full_like(labels, null), labels)
    return FlowDraw(time, noise, labels)


def flow_sample(
    latents: Tensor, labels: Tensor | None, null: int, objective: FlowObjective, draws: Draws
) -> FlowSample:
    """Returns the point of `latents` B c h w at a `flow_draw` of the same arguments."""
    return flow_draw(latents, labels, null, objective, draws).sample(latents)


def velocity_error(predicted: Tensor, sample: FlowSample) -> Tensor:
    """Returns the mean squared error of a predicted velocity B c h w, a scalar (SiT, equation 5), in float32."""
    return (predicted.float() - sample.velocity.float()).square().mean()
