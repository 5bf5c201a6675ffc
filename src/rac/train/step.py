"""The state of a training, and the one step that changes it."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from .. import runtime
from ..data import Batch
from ..draws import Draws
from ..errors import RacError
from .adversary import AdaptiveGradient, aside
from .config import TrainConfig, ema_decay, learning_rate
from .muon import Muon, matrices
from .processes import Processes, shard, whole
from .task import Part, PartTerms, Task

MOST_SKIPPED = 10
"""Number of skipped iterations in a row at which a run stops, since it is not going to recover."""


class DivergedError(RacError):
    """Error for a loss or a gradient that is not finite. Weights and optimiser are as they were."""

    def __init__(self, iteration: int, values: dict[str, float], in_a_row: int = 0) -> None:
        found = ", ".join(f"{name} {value:.3g}" for name, value in values.items())
        times = f", for the {in_a_row}th time in a row" if in_a_row else ""
        super().__init__(
            f"training diverged at iteration {iteration}{times}: {found}; earlier checkpoints are intact: resume with "
            "on_divergence skip if the batch is the cause, or start again with a lower lr, a longer warmup, a lower "
            "clip, or without bf16"
        )
        self.iteration = iteration
        self.values = values


@dataclass
class TrainedPart:
    """A part of the task with its average and its optimiser, and the sums of one iteration."""

    part: Part
    ema: nn.Module | None
    optimizer: torch.optim.Optimizer
    parameters: list[nn.Parameter]
    """Parameters that are trained."""
    adaptive: AdaptiveGradient | None = None
    unsharded: nn.Module | None = None
    """Unsharded copy that receives the finished weights for saving; None without sharding."""
    learns: bool = False
    """Whether the part has had terms in this iteration."""
    buffers: list[Tensor] = field(default_factory=list)
    """Buffers of the module as they were before this iteration."""
    changes: dict[int, Tensor] = field(default_factory=dict)
    """Changes of floating-point buffers by the pieces of the batch so far, by place, weighted by their shares."""
    counters: dict[int, Tensor] = field(default_factory=dict)
    """Values of the other buffers after the latest piece, by place."""

    @classmethod
    def start(cls, part: Part, settings: TrainConfig, device: torch.device, processes: Processes) -> TrainedPart:
        """Returns the part before the first iteration, its module moved to `device`.

        - `part`: the part of the task.
        - `settings`: settings of the training.
        - `device`: the device to train on.
        - `processes`: the processes that train.
        """
        sharded = part.shard and settings.shard == "fsdp" and processes.count > 1
        # Weights can be cut only where they lie one after the other.
        module = runtime.place(part.module, device, settings.channels_last and not sharded)
        processes.spread(module)
        ema = copy.deepcopy(module).eval().requires_grad_(False) if part.averaged else None
        unsharded = copy.deepcopy(module).eval().requires_grad_(False) if sharded else None
        if sharded:
            shard(module)
            if ema is not None:
                shard(ema)
        trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
        optimizer = _optimizer(part, module, trained, settings, device)
        adaptive = None if part.adaptive is None else part.adaptive.start(module, trained)
        return cls(part, ema, optimizer, trained, adaptive, unsharded)

    @property
    def module(self) -> nn.Module:
        """The module that is trained."""
        return self.part.module

    def finished(self) -> nn.Module:
        """Returns the module to look at and to save, whole, frozen, in eval mode.

        To be called by all processes together.
        """
        newest = self.module if self.ema is None else self.ema
        if self.unsharded is not None:
            self.unsharded.load_state_dict({name: whole(value) for name, value in newest.state_dict().items()})
            return self.unsharded
        return newest if self.ema is not None else copy.deepcopy(newest).eval().requires_grad_(False)

    def begin(self) -> None:
        """Clears the sums of the iteration before."""
        self.learns = False
        self.module.train()
        self.optimizer.zero_grad()
        self.buffers = [buffer.clone() for buffer in self.module.buffers()]
        self.changes, self.counters = {}, {}

    def add(self, terms: PartTerms, share: float, processes: Processes, others: Sequence[nn.Parameter]) -> Tensor:
        """Adds the gradient of a piece's terms, and returns their weighted sum.

        - `terms`: the terms of the piece.
        - `share`: the piece's share of the batch.
        - `processes`: the processes that train.
        - `others`: the parameters of all other parts, which get no gradient.
        """
        self.learns = True
        named, weights = terms.terms, self.part.weights
        loss = torch.stack([weight * named[name].float() for name, weight in weights.items() if weight]).sum()
        adaptive = self.adaptive if self.adaptive is not None and self.adaptive.config.term in named else None
        sharded = self.unsharded is not None
        # Sharded gradients come as means over the processes, and are wanted as sums.
        scale = share * processes.count if sharded else share
        # Sharded parameters are not the ones in the graph, so there the others' gradients are dropped afterwards.
        inputs = None if sharded else self.parameters
        with aside(others):
            (scale * loss).backward(retain_graph=adaptive is not None or terms.keep_graph, inputs=inputs)
            if adaptive is not None:
                adaptive.add(inputs, scale * named[adaptive.config.term], terms.keep_graph)
        return loss

    @torch.no_grad()
    def gather_buffers(self, share: float) -> None:
        """Notes the changes of the buffers by a piece, and restores the buffers for the next one."""
        for place, (buffer, before) in enumerate(zip(self.module.buffers(), self.buffers, strict=True)):
            if buffer.is_floating_point():
                change = share * (buffer - before)
                self.changes[place] = self.changes[place] + change if place in self.changes else change
            else:
                self.counters[place] = buffer.clone()
            buffer.copy_(before)

    @torch.no_grad()
    def change_buffers(self) -> None:
        """Applies the changes of all pieces together to the buffers."""
        for place, buffer in enumerate(self.module.buffers()):
            if place in self.changes:
                buffer.add_(self.changes[place])
            elif place in self.counters:
                buffer.copy_(self.counters[place])

    @torch.no_grad()
    def forget(self) -> None:
        """Restores the buffers as they were before this iteration."""
        for buffer, before in zip(self.module.buffers(), self.buffers, strict=True):
            buffer.copy_(before)

    def summed(self) -> list[Tensor]:
        """Returns the tensors to be summed over the processes: gradients, and changes of buffers."""
        apart = [] if self.adaptive is None else [*self.adaptive.sums.values()]
        return [*(one.grad for one in self.parameters if one.grad is not None), *apart, *self.changes.values()]

    def add_balanced(self, settings: TrainConfig) -> dict[str, Tensor]:
        """Weighs the adaptive term, clips, and returns "balance", if there is one, and the norm "gradient"."""
        values = {} if self.adaptive is None else self.adaptive.add_balanced()
        clip = settings.clip if self.part.clip is None else self.part.clip
        norm = nn.utils.clip_grad_norm_(self.parameters, clip or float("inf"))
        return {**values, "gradient": whole(norm).float()}

    def step(self, settings: TrainConfig, iteration: int) -> None:
        """Updates the weights by the gradient, and the average."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.part.rate * learning_rate(settings, iteration)
        self.optimizer.step()
        if self.ema is not None:
            decay = settings.ema if self.part.ema is None else self.part.ema
            _average(self.ema, self.module, 1 - ema_decay(decay, iteration), self.part.average_buffers)


@dataclass
class TrainState:
    """Everything a run carries from one iteration to the next; all else is a function of the iteration's number."""

    parts: dict[str, TrainedPart]
    device: torch.device
    processes: Processes = field(default_factory=Processes)
    iteration: int = 0
    """Number of iterations done, skipped ones included."""
    skipped: int = 0
    """Number of iterations whose loss or gradient was not finite, and that changed no weight."""
    skipped_in_a_row: int = 0
    """Number of iterations skipped since the last one that changed weights."""

    @classmethod
    def start(
        cls, task: Task, settings: TrainConfig, device: torch.device, processes: Processes | None = None
    ) -> TrainState:
        """Returns the state before the first iteration, with the task's modules moved to `device`.

        - `task`: the task.
        - `settings`: settings of the training.
        - `device`: the device to train on.
        - `processes`: the processes that train; None: this one alone.
        """
        processes = processes or Processes()
        for module in task.frozen:
            runtime.place(module, device, settings.channels_last).eval().requires_grad_(False)
        parts = {name: TrainedPart.start(part, settings, device, processes) for name, part in task.parts.items()}
        return cls(parts, device, processes)

    def finished(self) -> dict[str, nn.Module]:
        """Returns the modules to look at and to save by the names of their parts, whole, frozen, in eval mode.

        To be called by all processes together.
        """
        return {name: part.finished() for name, part in self.parts.items()}


def _optimizer(
    part: Part, module: nn.Module, trained: list[nn.Parameter], settings: TrainConfig, device: torch.device
) -> torch.optim.Optimizer:
    lr = settings.lr * part.rate
    betas = settings.betas if part.betas is None else part.betas
    weight_decay = settings.weight_decay if part.weight_decay is None else part.weight_decay
    if settings.optimizer == "muon":
        return Muon(trained, matrices(module), lr, betas, weight_decay)
    fused = device.type == "cuda" or (device.type == "cpu" and part.fused_on_cpu)
    return torch.optim.AdamW(trained, lr=lr, betas=betas, weight_decay=weight_decay, fused=fused)


def train_step(task: Task, state: TrainState, batch: Batch, settings: TrainConfig) -> dict[str, float]:
    """Runs one iteration on `batch`: gradients of all parts over all pieces of it; then clip, optimiser, average.

    On several processes `batch` holds this one's rows, and all values are those of the whole iteration's batch. So are
    buffers: each piece of the batch, on each process, meets those of before the iteration, and what the pieces change
    in them is averaged, weighted by their sizes. Statistics that are means over images, such as running means, thus
    become those of the whole batch; a module that computes with them, rather than with those of the piece in hand,
    trains alike however the batch is cut.

    - `task`: the task.
    - `state`: the state of the training, which is changed.
    - `batch`: the images of the iteration.
    - `settings`: settings of the training.

    Returns the mean unweighted terms, the weighted sum "loss" of the first part's, and the norms of the gradients:
    "gradient", and "gradient_" with its name for each further part. If these are not all finite, weights, buffers,
    averages and optimisers stay as they were, and with `settings.on_divergence` "skip" the iteration counts as skipped.
    Raises `DivergedError` with "stop", and before `MOST_SKIPPED` in a row.
    """
    batch = batch.to(state.device, runtime.memory_format(settings.channels_last))
    processes, parts = state.processes, list(state.parts.values())
    # For modules that draw on their own, such as dropout.
    beside = () if processes.first else (processes.rank,)
    torch.manual_seed(runtime.derived_seed(settings.rng_seed, "global", state.iteration, *beside))
    for part in parts:
        part.begin()
    totals: dict[str, Tensor] = {}
    for rows, share, draws in _pieces(processes, state.iteration, settings, state.device):
        for terms in _terms(task, batch.rows(rows), draws, state, settings):
            loss = state.parts[terms.part].add(terms, share, processes, _others(state, terms.part))
            named = {**terms.terms, "loss": loss} if terms.part == next(iter(state.parts)) else terms.terms
            for name, term in named.items():
                totals[name] = totals.get(name, 0) + share * term.detach().float()
        if share < 1:
            for part in parts:
                part.gather_buffers(share)
    processes.add_up([*totals.values(), *(tensor for part in parts for tensor in part.summed())])
    for place, (name, part) in enumerate(state.parts.items()):
        part.change_buffers()
        if part.learns:
            ending = f"_{name}" if place else ""
            totals |= {f"{value}{ending}": number for value, number in part.add_balanced(settings).items()}
    # One transfer, and the only time the processor waits for the device.
    values = dict(zip(totals, torch.stack(list(totals.values())).tolist(), strict=True))
    if not all(map(math.isfinite, values.values())):
        for part in parts:
            part.forget()
        _skip(state, values, settings)
        return values
    state.skipped_in_a_row = 0
    for part in parts:
        if part.learns:
            part.step(settings, state.iteration)
    state.iteration += 1
    return values


def _terms(task: Task, batch: Batch, draws: Draws, state: TrainState, settings: TrainConfig) -> Iterator[PartTerms]:
    """Yields the task's terms, each computed in the precision asked for; code between them runs in its own."""
    with runtime.autocast(state.device, settings.bf16):
        supply = task.terms(task.prepare(batch), draws, state.iteration)
    while True:
        with runtime.autocast(state.device, settings.bf16):
            terms = next(supply, None)
        if terms is None:
            return
        yield terms


def _others(state: TrainState, name: str) -> list[nn.Parameter]:
    return [parameter for other, part in state.parts.items() if other != name for parameter in part.parameters]


def _pieces(
    processes: Processes, iteration: int, settings: TrainConfig, device: torch.device
) -> Iterator[tuple[slice, float, Draws]]:
    """Yields the pieces of this process's rows of a batch: their rows, their share of the batch, and their draws."""
    own, size = processes.rows(settings.batch), settings.batch
    count = own.stop - own.start
    for piece in range(settings.accumulate):
        rows = slice(count * piece // settings.accumulate, count * (piece + 1) // settings.accumulate)
        draws = Draws(
            shared=runtime.generator(settings.rng_seed, "shared", iteration),
            own=runtime.generator(settings.rng_seed, "own", iteration, device=device),
            total=size,
            first=own.start + rows.start,
            count=rows.stop - rows.start,
        )
        yield rows, (rows.stop - rows.start) / size, draws


@torch.no_grad()
def _average(ema: nn.Module, module: nn.Module, weight: float, buffers: bool = False) -> None:
    # One call for all: small networks have many parameters, and none of them is large.
    torch._foreach_lerp_(list(ema.parameters()), list(module.parameters()), weight)
    for kept, buffer in zip(ema.buffers(), module.buffers(), strict=True):
        if buffers and kept.is_floating_point():
            kept.lerp_(buffer, weight)
        else:
            kept.copy_(buffer)


def _skip(state: TrainState, values: dict[str, float], settings: TrainConfig) -> None:
    if settings.on_divergence == "stop":
        raise DivergedError(state.iteration + 1, values)
    if state.skipped_in_a_row + 1 >= MOST_SKIPPED:
        raise DivergedError(state.iteration + 1, values, MOST_SKIPPED)
    state.iteration += 1
    state.skipped += 1
    state.skipped_in_a_row += 1
