"""Training against a discriminator: its networks, both sides' gradients, and their balance (arXiv 2012.09841)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from .. import runtime
from ..errors import RacError
from ..objectives.image_terms import ADVERSARIAL, DISCRIMINATOR, ImageLosses
from ..representations.lpips import LPIPS
from .config import TrainConfig, learning_rate
from .discriminator import DiscriminatorConfig, PatchDiscriminator
from .processes import whole
from .task import Adversary

EPSILON = 1e-4
LARGEST = 1e4
"""Bounds of the balance, as in the authors' code."""


@dataclass
class AdversarialState:
    """What changes while an adversary is trained: its optimiser, and the gradient against it.

    The adversarial term's gradient is kept apart from that of the other terms until the whole batch has been seen, and
    is then added to it with the weight

        weight * balance,  balance = |gradient of the other terms| / (|adversarial gradient| + 1e-4), at most 1e4

    (equation 7 there), both norms taken at the module's last layer. Because both are gradients of the whole batch, the
    balance is the same however the batch is cut. The price is a second backward pass through the module.
    """

    adversary: Adversary
    parameters: Sequence[nn.Parameter]
    """Those of the module that is trained, its last layer among them."""
    optimizer: torch.optim.AdamW
    adversarial: dict[int, Tensor] = field(default_factory=dict)
    """The adversarial term's gradient so far in this iteration, by the parameter's place; empty between iterations."""

    @classmethod
    def start(cls, adversary: Adversary, parameters: Sequence[nn.Parameter], settings: TrainConfig) -> AdversarialState:
        """Before the first iteration; the adversary lies on its device already."""
        optimizer = torch.optim.AdamW(
            adversary.module.parameters(),
            lr=settings.lr * adversary.rate,
            betas=adversary.betas,
            weight_decay=settings.weight_decay,
            fused=parameters[0].is_cuda,
        )
        return cls(adversary, parameters, optimizer)

    def add_part(self, terms: Mapping[str, Tensor], share: float, scale: float = 1) -> None:
        """Take in both sides' gradients of one part of the batch, `share` of the whole; the module's times `scale`."""
        theirs = list(self.adversary.module.parameters())
        # Not torch.autograd.grad, which does not know sharded weights. The adversary gets none of the module's
        # gradient and the module none of the opponent's.
        with _set_aside(theirs), _set_aside(self.parameters):
            (scale * share * terms[ADVERSARIAL]).backward()
            for place, parameter in enumerate(self.parameters):
                if parameter.grad is not None:
                    before = self.adversarial.get(place)
                    self.adversarial[place] = parameter.grad if before is None else before + parameter.grad
        (share * terms[DISCRIMINATOR]).backward(inputs=theirs)

    def gradients(self) -> list[Tensor]:
        """Those of both sides so far."""
        theirs = (parameter.grad for parameter in self.adversary.module.parameters())
        return [*self.adversarial.values(), *(gradient for gradient in theirs if gradient is not None)]

    @torch.no_grad()
    def add_balanced(self, clip: float) -> dict[str, Tensor]:
        """Add the balanced adversarial gradient to the module's, and clip the opponent's own.

        Gives the balance and the norm of the opponent's gradient.
        """
        last = next(place for place, one in enumerate(self.parameters) if one is self.adversary.last_layer)
        others, adversarial = self.adversary.last_layer.grad, self.adversarial[last]
        balance = whole(adversarial.new_zeros(())) if others is None else balanced(others, adversarial)
        for place, gradient in self.adversarial.items():
            parameter, scaled = self.parameters[place], self.adversary.weight * balance * gradient
            parameter.grad = scaled if parameter.grad is None else parameter.grad.add_(scaled)
        self.adversarial.clear()
        norm = nn.utils.clip_grad_norm_(list(self.adversary.module.parameters()), clip or float("inf"))
        return {"balance": balance.float(), "gradient_discriminator": norm.float()}

    def step(self, settings: TrainConfig, iteration: int) -> None:
        """Let the adversary learn from its gradient, and forget that."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.adversary.rate * learning_rate(settings, iteration)
        self.optimizer.step()
        self.forget()

    def forget(self) -> None:
        """Drop the opponent's gradient."""
        self.optimizer.zero_grad()


@contextmanager
def _set_aside(parameters: Sequence[nn.Parameter]) -> Iterator[None]:
    """Keep the gradients so far out of the block, and whatever gradients the block leaves out of them."""
    before = [parameter.grad for parameter in parameters]
    for parameter in parameters:
        parameter.grad = None
    try:
        yield
    finally:
        for parameter, gradient in zip(parameters, before, strict=True):
            parameter.grad = gradient


def balanced(others: Tensor, adversarial: Tensor) -> Tensor:
    """How many times as long the gradient `others` is as `adversarial`: a scalar in [0, 1e4]."""
    return (whole(others.norm()) / (whole(adversarial.norm()) + EPSILON)).clamp(0, LARGEST)


@dataclass(frozen=True)
class LossNetworks:
    """The networks behind the perceptual and the adversarial terms: frozen LPIPS, a discriminator in training."""

    lpips: LPIPS | None = None
    discriminator: PatchDiscriminator | None = None
    config: DiscriminatorConfig = field(default_factory=DiscriminatorConfig)

    @classmethod
    def build(cls, perceptual: float, adversarial: float, config: DiscriminatorConfig, rng_seed: int) -> LossNetworks:
        """Those that terms of these weights need. Raises `WeightsError` where LPIPS's weights are not found."""
        torch.manual_seed(runtime.derived_seed(rng_seed, "discriminator"))
        return cls(LPIPS.load("vgg16") if perceptual else None, config.build() if adversarial else None, config)

    @property
    def frozen(self) -> Sequence[nn.Module]:
        """What is never trained."""
        return () if self.lpips is None else (self.lpips,)

    def losses(self, iteration: int) -> ImageLosses:
        """The losses at work in `iteration`: no discriminator before its start."""
        return ImageLosses(self.lpips, self.discriminator if iteration >= self.config.start else None)

    def adversary(self, last_layer: nn.Parameter, weight: float) -> Adversary | None:
        """The discriminator, as the loop takes it."""
        if self.discriminator is None:
            return None
        return Adversary(self.discriminator, last_layer, weight, self.config.rate, self.config.betas)

    def metrics(self, decoded: Tensor, images: Tensor) -> dict[str, float]:
        """The mean distance of held-out images, where LPIPS is among the terms: PSNR alone would mislead there."""
        return {} if self.lpips is None else {"lpips_vgg16": float(self.lpips(decoded, images).mean())}


def last_layer(module: nn.Module) -> nn.Parameter:
    """The weight of the layer that a decoder or a field registers last, which is the one that makes its output.

    Raises `RacError` where that one is not trained.
    """
    weight = [parameter for parameter in module.parameters() if parameter.ndim > 1][-1]
    if not weight.requires_grad:
        raise RacError("the last layer of the decoder is frozen, so adversarial gradients cannot be balanced at it")
    return weight
