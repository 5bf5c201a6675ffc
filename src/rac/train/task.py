"""What the loop asks of the thing that is trained."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from torch import Tensor, nn

from ..data import Batch
from ..draws import Draws


@dataclass(frozen=True)
class Adversary:
    """A discriminator to be trained against the task's module, and what its judgement weighs."""

    module: nn.Module
    last_layer: nn.Parameter
    """Of the task's module: where the adversarial gradient is brought to the length of that of all other terms."""
    weight: float
    """Of the adversarial term, in units of the others."""
    rate: float = 1.0
    """Its learning rate, as a multiple of the module's."""
    betas: tuple[float, float] = (0.5, 0.9)


class Task(Protocol):
    """A module, the terms that train it, and how to look at it and keep it.

    The loop moves `module` and `frozen` to its device, keeps an averaged copy of `module`, and hands that copy to
    `gallery` and `save`.
    """

    @property
    def module(self) -> nn.Module:
        """What is trained; saved in checkpoints whole, so without the teacher."""
        ...

    @property
    def frozen(self) -> Sequence[nn.Module]:
        """What the terms need but do not train, such as the teacher; the loop freezes it."""
        ...

    @property
    def weights(self) -> Mapping[str, float]:
        """Weight of each term in the loss. A term that `terms` gives and this leaves out is only logged."""
        ...

    @property
    def adversary(self) -> Adversary | None:
        """A discriminator, if there is one. It is trained in the iterations whose `terms` hold "adversarial", the
        module's term against it, and "discriminator", its own; neither is among `weights`. Saved in checkpoints, and
        not averaged."""
        ...

    def terms(self, batch: Batch, draws: Draws, iteration: int) -> dict[str, Tensor]:
        """Named, unweighted terms of the loss, each a mean over the images of `batch`.

        All randomness comes from `draws`: `draws.normal(like)` for what belongs to an image, `draws.shared` for what
        the batch shares. `batch` may be a part of the iteration's batch; every part meets the same `shared`.
        """
        ...

    def gallery(self, module: nn.Module, images: Tensor) -> tuple[Tensor, dict[str, float]]:
        """A picture, 1 3 H W in [-1, 1], of what `module` makes of held-out `images`, and figures such as "psnr"."""
        ...

    def save(self, module: nn.Module, directory: Path) -> None:
        """Write `module` into `directory` for use; the loop sees to it that the directory appears whole."""
        ...
