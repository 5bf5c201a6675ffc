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
from .feature_discriminator import FeatureDiscriminator, FeatureDiscriminatorConfig
from .processes import whole

EPSILON = 1e-4
LARGEST = 1e4
"""Upper bound of the adaptive weight, as in the authors' code."""


# The adaptive weight


@dataclass(frozen=True)
class AdaptiveWeight:
    """An adaptive weight, which scales a term's gradient to the length of the other terms' gradient.

    VQGAN (arXiv 2012.09841), equation 7. The gradient of `term` is added to that of a part's other terms with the
    weight

        weight * balance,  balance = |gradient of the other terms| / (|gradient of the term| + epsilon), at most 1e4

    both norms taken at the parameter `layer`.
    """

    term: str
    """Name of the term among the part's. In iterations without it the part learns from the others alone."""
    weight: float
    """Weight of the balanced gradient, relative to the other terms."""
    layer: str
    """Name of the parameter, within the part's module, at which gradients are compared; `last_layer` finds it."""
    epsilon: float = EPSILON
    """Number added to the length of the term's gradient."""

    def start(self, module: nn.Module, parameters: Sequence[nn.Parameter]) -> AdaptiveGradient:
        """Returns the term's gradient, still empty, for the trained `parameters` of `module`."""
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
    """Gradient so far in this iteration, by the parameter's place; empty between iterations."""

    def add(self, inputs: Sequence[nn.Parameter] | None, term: Tensor, keep_graph: bool) -> None:
        """Adds the gradient of `term` with respect to `inputs`, as `backward` does."""
        with aside(self.parameters):
            term.backward(retain_graph=keep_graph, inputs=inputs)
            for place, parameter in enumerate(self.parameters):
                if parameter.grad is not None:
                    before = self.sums.get(place)
                    self.sums[place] = parameter.grad if before is None else before + parameter.grad

    @torch.no_grad()
    def add_balanced(self) -> dict[str, Tensor]:
        """Adds the weighted gradient to the parameters' own, and returns the balance; does nothing without the term."""
        if not self.sums:
            return {}
        place = next(place for place, one in enumerate(self.parameters) if one is self.layer)
        others, own = self.layer.grad, self.sums[place]
        balance = whole(own.new_zeros(())) if others is None else balanced(others, own, self.config.epsilon)
        for place, gradient in self.sums.items():
            parameter, scaled = self.parameters[place], self.config.weight * balance * gradient
            parameter.grad = scaled if parameter.grad is None else parameter.grad.add_(scaled)
        self.sums.clear()
        return {"balance": balance.float()}


@contextmanager
def aside(parameters: Sequence[nn.Parameter]) -> Iterator[None]:
    """Runs the block with empty gradients, and restores the previous gradients afterwards."""
    before = [parameter.grad for parameter in parameters]
    for parameter in parameters:
        parameter.grad = None
    try:
        yield
    finally:
        for parameter, gradient in zip(parameters, before, strict=True):
            parameter.grad = gradient


def balanced(others: Tensor, own: Tensor, epsilon: float = EPSILON) -> Tensor:
    """Returns how many times as long the gradient `others` is as `own`: a scalar in [0, 1e4]."""
    return (whole(others.norm()) / (whole(own.norm()) + epsilon)).clamp(0, LARGEST)


def last_layer(module: nn.Module, within: str) -> str:
    """Returns the name, in `module`, of the last weight that its submodule `within` registers: the one of its output.

    Raises `RacError` if that one is not trained.
    """
    weights = {name: one for name, one in module.get_submodule(within).named_parameters() if one.ndim > 1}
    name, weight = list(weights.items())[-1]
    if not weight.requires_grad:
        raise RacError("the last layer of the decoder is frozen, so adversarial gradients cannot be balanced at it")
    return f"{within}.{name}"


# The networks


@dataclass(frozen=True)
class ImageNetworks:
    """Networks that look at decoded images: frozen LPIPS, and a discriminator to train.

    Each is there if its term has a weight.
    """

    lpips: LPIPS | None = None
    discriminator: PatchDiscriminator | FeatureDiscriminator | None = None
    config: DiscriminatorConfig | FeatureDiscriminatorConfig = field(default_factory=DiscriminatorConfig)

    @classmethod
    def build(
        cls,
        weights: Mapping[str, float],
        config: DiscriminatorConfig | FeatureDiscriminatorConfig,
        rng_seed: int,
        option: str,
        sizes: Sequence[int] = (),
    ) -> ImageNetworks:
        """Builds the networks that terms of these weights need.

        - `weights`: weights of the terms, by name.
        - `config`: the discriminator.
        - `rng_seed`: seed of the discriminator's weights.
        - `option`: name of the group of settings that the weights come from, for messages.
        - `sizes`: sides of the training images.

        Raises `WeightsError` if the weights of LPIPS or of the discriminator's features are not found, naming the
        setting that does without, and `RacError` for images too small for the discriminator.
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
        """Networks that are never trained."""
        return () if self.lpips is None else (self.lpips,)

    def losses(self, iteration: int) -> ImageLosses:
        """Returns the losses used in `iteration`: no discriminator before its start."""
        return ImageLosses(self.lpips, self.discriminator if iteration >= self.config.start else None)

    def metrics(self, decoded: Tensor, images: Tensor) -> dict[str, float]:
        """Returns the mean distance of held-out images if LPIPS is among the terms: PSNR alone would mislead there."""
        return {} if self.lpips is None else {"lpips_vgg16": float(self.lpips(decoded, images).mean())}
