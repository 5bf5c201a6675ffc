"""The interface of the training loop: parts that are trained together, and the task that they belong to."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Protocol

from torch import Tensor, nn

from ..coders.protocol import Coder
from ..data import Batch, Stream
from ..draws import Draws
from .adversary import AdaptiveWeight


@dataclass(frozen=True)
class Part:
    """One module of a training, with an optimiser (AdamW), a clip and an average of its own.

    A part learns from its own terms alone: these may pass through the modules of other parts, whose parameters get no
    gradient from them. Settings that are None are those of the run's `TrainConfig`.
    """

    module: nn.Module
    """The module. Its parameters with `requires_grad` are trained; checkpoints hold all of it."""
    weights: Mapping[str, float]
    """Weight of each term in the part's loss. A term that is given and not listed here is only logged."""
    adaptive: AdaptiveWeight | None = None
    """A further term, whose weight follows from the gradients; None: no such term."""
    rate: float = 1.0
    """Learning rate, as a multiple of the run's."""
    betas: tuple[float, float] | None = None
    """Decays of AdamW's two moments."""
    weight_decay: float | None = None
    clip: float | None = None
    """Largest norm of the part's gradient; 0: unlimited."""
    averaged: bool = True
    """Keep an average of the weights, which galleries and `Task.save` then get."""
    ema: float | None = None
    """Decay of the average of the weights."""
    average_buffers: bool = False
    """Average floating-point buffers as well, such as running statistics; otherwise the average has the newest ones."""
    shard: bool = True
    """Spread the module over the processes if the run shards. Small modules are better kept whole."""
    fused_on_cpu: bool = True
    """Use AdamW's fused kernel on the CPU. Without it, updates are rounded otherwise in the last bit."""


class PartTerms(NamedTuple):
    """The terms of one part in one iteration."""

    part: str
    terms: Mapping[str, Tensor]
    """Named, unweighted scalars, each a mean over the images of the batch; no two parts share a name."""
    keep_graph: bool = False
    """Whether later terms of the iteration are computed from the same tensors, so that their graph must be kept."""


class Task(Protocol):
    """A training task: its parts, the terms that train them, and how to look at the result and save it.

    The loop moves all modules to its device, and passes `gallery` and `save` the finished modules by the names of their
    parts: the average, or a copy of the module itself where there is none; whole, frozen, in eval mode.
    """

    @property
    def parts(self) -> Mapping[str, Part]:
        """The trained parts by name, in the order of their optimiser steps. Curves and logs put the first one first.

        All terms of an iteration are computed before the first step.
        """
        ...

    @property
    def frozen(self) -> Sequence[nn.Module]:
        """Modules that the terms need but do not train, such as a teacher; the loop freezes them."""
        ...

    @property
    def encoder(self) -> Coder | None:
        """The coder whose latents come with the batches; None if only images are needed."""
        ...

    def prepare(self, batch: Batch) -> Batch:
        """Completes a batch, on its device, with results of frozen networks, such as latents not yet encoded."""
        ...

    def terms(self, batch: Batch, draws: Draws, iteration: int) -> Iterator[PartTerms]:
        """Yields the terms of each part that learns in this iteration, one part after the other.

        The gradient of one part is taken before the next one is asked for, so their graphs need not live together; one
        evaluation may still serve several parts (`PartTerms.keep_graph`). All parts are in train mode; a task that uses
        a module otherwise within another part's terms puts it back.

        All randomness comes from `draws`: `draws.normal(like)` for what belongs to an image, `draws.shared` for what
        the batch shares. `batch` may be a piece of the iteration's batch; every piece meets the same `shared`, and
        buffers as they were before the iteration.
        """
        ...

    def gallery(self, modules: Mapping[str, nn.Module], images: Tensor) -> tuple[Tensor, dict[str, float]]:
        """Returns a picture, 1 3 H W in [-1, 1], of the results of `modules` on held-out `images`, and metrics.

        Metrics are by name, such as "psnr".
        """
        ...

    def save(self, modules: Mapping[str, nn.Module], stream: Stream, directory: Path) -> None:
        """Writes the product into `directory`; the loop makes the directory appear whole or not at all.

        `stream` gives training images, for statistics that are fitted at the end.
        """
        ...
