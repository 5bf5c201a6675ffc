"""Training against a discriminator: the networks that look at decoded images, and the weight that balances them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from .. import runtime
from ..errors import RacError, WeightsError
from ..objectives.image_terms import ImageLosses
from ..representations.lpips import LPIPS
from .discriminator import DiscriminatorConfig, PatchDiscriminator
from .processes import whole

EPSILON = 1e-4
LARGEST = 1e4
"""Bounds of the adaptive weight, as in the authors' code."""


# The adaptive weight


@dataclass(frozen=True)
class AdaptiveWeight:
    """A term whose gradient is brought to the length of the other terms' gradient (VQGAN, arXiv 2012.09841).

    The gradient of `term` is added to that of a part's other terms with the weight

        weight * balance,  balance = |gradient of the other terms| / (|gradient of the term| + 1e-4), at most 1e4

    (equation 7 there), both norms taken at the parameter `layer`.
    """

    term: str
    """Its name among the part's terms. In iterations without it the part learns from the others alone."""
    weight: float
    """Weight of the balanced gradient, in units of the other terms'."""
    layer: str
    """Name of the parameter, within the part's module, at which gradients are compared; see `last_layer`."""

    def start(self, module: nn.Module, parameters: Sequence[nn.Parameter]) -> AdaptiveGradient:
        """The term's gradient, still empty, for the trained `parameters` of `module`."""
        return AdaptiveGradient(self, parameters, module.get_parameter(self.layer))


@dataclass
class AdaptiveGradient:
    """The gradient of one adaptively weighted term, kept apart until the whole batch has been seen.

    Because both norms are those of the whole batch, the balance is the same however the batch is cut. The price is a
    second backward pass through the module.
    """

    config: AdaptiveWeight
    parameters: Sequence[nn.Parameter]
    layer: nn.Parameter
    sums: dict[int, Tensor] = field(default_factory=dict)
    """The gradient so far in this iteration, by the parameter's place; empty between iterations."""

    def add(self, inputs: Sequence[nn.Parameter] | None, term: Tensor, keep_graph: bool) -> None:
        """Add the gradient of `term`; as `backward`, whose `inputs` they are."""
        with aside(self.parameters):
            term.backward(retain_graph=keep_graph, inputs=inputs)
            for place, parameter in enumerate(self.parameters):
                if parameter.grad is not None:
                    before = self.sums.get(place)
                    self.sums[place] = parameter.grad if before is None else before + parameter.grad

    @torch.no_grad()
    def add_balanced(self) -> dict[str, Tensor]:
        """Add the weighted gradient to the parameters' own, and return the balance; nothing without the term."""
        if not self.sums:
            return {}
        place = next(place for place, one in enumerate(self.parameters) if one is self.layer)
        others, own = self.layer.grad, self.sums[place]
        balance = whole(own.new_zeros(())) if others is None else balanced(others, own)
        for place, gradient in self.sums.items():
            parameter, scaled = self.parameters[place], self.config.weight * balance * gradient
            parameter.grad = scaled if parameter.grad is None else parameter.grad.add_(scaled)
        self.sums.clear()
        return {"balance": balance.float()}


@contextmanager
def aside(parameters: Sequence[nn.Parameter]) -> Iterator[None]:
    """Run the block with empty gradients, and put the previous gradients back afterwards."""
    before = [parameter.grad for parameter in parameters]
    for parameter in parameters:
        parameter.grad = None
    try:
        yield
    finally:
        for parameter, gradient in zip(parameters, before, strict=True):
            parameter.grad = gradient


def balanced(others: Tensor, own: Tensor) -> Tensor:
    """How many times as long the gradient `others` is as `own`: a scalar in [0, 1e4]."""
    return (whole(others.norm()) / (whole(own.norm()) + EPSILON)).clamp(0, LARGEST)


def last_layer(module: nn.Module, within: str) -> str:
    """Name, in `module`, of the weight that its submodule `within` registers last: the one that makes its output.

    Raises `RacError` where that one is not trained.
    """
    weights = {name: one for name, one in module.get_submodule(within).named_parameters() if one.ndim > 1}
    name, weight = list(weights.items())[-1]
    if not weight.requires_grad:
        raise RacError("the last layer of the decoder is frozen, so adversarial gradients cannot be balanced at it")
    return f"{within}.{name}"


# The networks


@dataclass(frozen=True)
class ImageNetworks:
    """LPIPS, frozen, and a discriminator, trained along; each where its term has a weight."""

    lpips: LPIPS | None = None
    discriminator: PatchDiscriminator | None = None
    config: DiscriminatorConfig = field(default_factory=DiscriminatorConfig)

    @classmethod
    def build(
        cls,
        weights: Mapping[str, float],
        config: DiscriminatorConfig,
        rng_seed: int,
        option: str,
        sizes: Sequence[int] = (),
    ) -> ImageNetworks:
        """The networks that terms of these weights need, for training images of these `sizes`.

        `option` names the group of settings that the weights come from. Raises `WeightsError` where LPIPS's weights are
        not found, naming the setting that goes without, and `RacError` for images too small for the discriminator.
        """
        torch.manual_seed(runtime.derived_seed(rng_seed, "discriminator"))
        lpips = None
        if weights["perceptual"]:
            try:
                lpips = LPIPS.load("vgg16")
            except WeightsError as error:
                raise WeightsError(f"{error}; or train without the perceptual term: --{option}.perceptual 0") from None
        discriminator = config.build() if weights["adversarial"] else None
        if discriminator is not None and sizes:
            discriminator.check_side(min(sizes))
        return cls(lpips, discriminator, config)

    @property
    def frozen(self) -> Sequence[nn.Module]:
        """What is never trained."""
        return () if self.lpips is None else (self.lpips,)

    def losses(self, iteration: int) -> ImageLosses:
        """The losses at work in `iteration`: no discriminator before its start."""
        return ImageLosses(self.lpips, self.discriminator if iteration >= self.config.start else None)

    def metrics(self, decoded: Tensor, images: Tensor) -> dict[str, float]:
        """The mean distance of held-out images, where LPIPS is among the terms: PSNR alone would mislead there."""
        return {} if self.lpips is None else {"lpips_vgg16": float(self.lpips(decoded, images).mean())}
