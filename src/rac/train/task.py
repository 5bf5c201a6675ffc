"""What the loop asks of the things that are trained together."""

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
    """One module of a training, with its own AdamW, its own clip and its own average.

    A part learns from its own terms alone: these may pass through the modules of other parts, whose parameters get no
    gradient from them. Settings that are None are those of the run's `TrainConfig`.
    """

    module: nn.Module
    """Its parameters with `requires_grad` are trained. Checkpoints hold all of it."""
    weights: Mapping[str, float]
    """Weight of each of its terms in its loss. A term that is given and not listed here is only logged."""
    adaptive: AdaptiveWeight | None = None
    """One further term, whose weight follows from the gradients."""
    rate: float = 1.0
    """Learning rate, as a multiple of the run's."""
    betas: tuple[float, float] | None = None
    """Decays of AdamW's two moments."""
    weight_decay: float | None = None
    clip: float | None = None
    """Largest norm of the part's gradient; 0: unlimited."""
    averaged: bool = True
    """Keep an average of the weights, which is then what galleries and `Task.save` get."""
    ema: float | None = None
    """Decay of that average."""
    average_buffers: bool = False
    """Average floating-point buffers as well, such as running statistics; otherwise the average has the newest ones."""
    shard: bool = True
    """Spread over the processes where the run asks for it. Small modules are better kept whole."""
    fused_on_cpu: bool = True
    """Use AdamW's fused kernel on the CPU. Without it, updates are rounded otherwise in the last bit."""


class PartTerms(NamedTuple):
    """The terms of one part."""

    part: str
    terms: Mapping[str, Tensor]
    """Named, unweighted scalars, each a mean over the images of the batch; no two parts share a name."""
    keep_graph: bool = False
    """Whether terms that come later in the iteration are computed from tensors that these were computed from."""


class Task(Protocol):
    """Parts, the terms that train them, and how to look at the result and keep it.

    The loop moves all modules to its device, and hands `gallery` and `save` the finished modules by the names of their
    parts: the average, or a copy of the module itself where there is none; whole, frozen, in eval mode.
    """

    @property
    def parts(self) -> Mapping[str, Part]:
        """What is trained, by name, in the order of their steps. Curves and logs put the first one first.

        All terms of an iteration are computed before the first step.
        """
        ...

    @property
    def frozen(self) -> Sequence[nn.Module]:
        """What the terms need but do not train, such as a teacher; the loop freezes it."""
        ...

    @property
    def encoder(self) -> Coder | None:
        """The coder whose latents come with the batches; None where images are all that is needed."""
        ...

    def prepare(self, batch: Batch) -> Batch:
        """Complete a batch, on its device, with what frozen networks make of it, such as latents not yet encoded."""
        ...

    def terms(self, batch: Batch, draws: Draws, iteration: int) -> Iterator[PartTerms]:
        """Yield the terms of each part that learns in this iteration, one part after the other.

        The gradient of one part is taken before the next one is asked for, so their graphs need not live together; one
        evaluation may still serve several parts (`PartTerms.keep_graph`). All parts are in train mode; a task that uses
        a module otherwise within another part's terms puts it back.

        All randomness comes from `draws`: `draws.normal(like)` for what belongs to an image, `draws.shared` for what
        the batch shares. `batch` may be a piece of the iteration's batch; every piece meets the same `shared`, and
        buffers as they were before the iteration.
        """
        ...

    def gallery(self, modules: Mapping[str, nn.Module], images: Tensor) -> tuple[Tensor, dict[str, float]]:
        """A picture, 1 3 H W in [-1, 1], of what `modules` make of held-out `images`, and metrics such as "psnr"."""
        ...

    def save(self, modules: Mapping[str, nn.Module], stream: Stream, directory: Path) -> None:
        """Write the product into `directory`; the loop sees to it that the directory appears whole.

        `stream` gives training images, for statistics that are fitted at the end.
        """
        ...
