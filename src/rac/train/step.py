"""What changes while training, and the one step that changes it."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from .. import runtime
from ..data import Batch
from ..draws import Draws
from ..errors import RacError
from ..objectives.image_terms import ADVERSARIAL
from .adversary import AdversarialState
from .config import TrainConfig, ema_decay, learning_rate
from .processes import Processes, shard, whole
from .task import Task

MOST_SKIPPED = 10
"""Iterations in a row that may be skipped; a run that meets more of them is not going to recover."""


class DivergedError(RacError):
    """A loss or a gradient is not finite. Weights and optimiser are as they were."""

    def __init__(self, iteration: int, values: dict[str, float], in_a_row: int = 0) -> None:
        found = ", ".join(f"{name} {value:.3g}" for name, value in values.items())
        times = f", for the {in_a_row}th time in a row" if in_a_row else ""
        super().__init__(
            f"training diverged at iteration {iteration}{times}: {found}; earlier checkpoints are sound: resume from "
            "them with on_divergence skip if the batch is at fault, or start anew with a lower lr, a longer warmup, "
            "a lower clip, or without bf16"
        )
        self.iteration = iteration
        self.values = values


@dataclass
class TrainState:
    """Everything a run carries from one iteration to the next; all else is a function of the iteration's number."""

    module: nn.Module
    ema: nn.Module
    optimizer: torch.optim.AdamW
    adversarial: AdversarialState | None = None
    """With the task's adversary, if it has one."""
    processes: Processes = field(default_factory=Processes)
    unsharded: nn.Module | None = None
    """Where weights are sharded: a whole module for the averaged ones, when they are asked for."""
    iteration: int = 0
    """Iterations done, skipped ones included."""
    skipped: int = 0
    """Iterations whose loss or gradient was not finite, and that changed no weight."""
    skipped_in_a_row: int = 0
    """The same, since the last one that changed them."""

    @classmethod
    def start(
        cls, task: Task, settings: TrainConfig, device: torch.device, processes: Processes | None = None
    ) -> TrainState:
        """The state before the first iteration, with the task's modules moved to `device`."""
        processes = processes or Processes()
        sharded = settings.shard == "fsdp" and processes.count > 1
        for part in task.frozen:
            runtime.place(part, device, settings.channels_last).eval().requires_grad_(False)
        # Weights can be cut only where they lie one after the other.
        module = runtime.place(task.module, device, settings.channels_last and not sharded)
        processes.spread(module)
        ema = copy.deepcopy(module).eval().requires_grad_(False)
        unsharded = copy.deepcopy(ema) if sharded else None
        if sharded:
            shard(module)
            shard(ema)
        trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(
            trained,
            lr=settings.lr,
            betas=settings.betas,
            weight_decay=settings.weight_decay,
            fused=device.type in ("cpu", "cuda"),
        )
        adversarial = None
        if task.adversary is not None:
            processes.spread(runtime.place(task.adversary.module, device, settings.channels_last).train())
            adversarial = AdversarialState.start(task.adversary, trained, settings)
        return cls(module, ema, optimizer, adversarial, processes, unsharded)

    def averaged(self) -> nn.Module:
        """The averaged module, whole; to be called by all processes together."""
        if self.unsharded is None:
            return self.ema
        self.unsharded.load_state_dict({name: whole(value) for name, value in self.ema.state_dict().items()})
        return self.unsharded


def train_step(task: Task, state: TrainState, batch: Batch, settings: TrainConfig) -> dict[str, float]:
    """One iteration on `batch`: gradients over all its parts, clip, optimiser, average; the same for an adversary.

    On several processes `batch` holds this one's rows, and all values are those of the whole iteration's batch.

    Returns the mean unweighted terms, their weighted sum "loss" (the adversarial term apart, whose weight is "balance"
    times its own) and the norm of the gradient "gradient". If these are not all finite, weights, buffers, average and
    optimisers stay as they were, and with `settings.on_divergence` "skip" the iteration counts as skipped. Raises
    `DivergedError` with "stop", and before `MOST_SKIPPED` in a row.
    """
    device = next(state.module.parameters()).device
    batch = batch.to(device, runtime.memory_format(settings.channels_last))
    processes = state.processes
    # For modules that draw on their own, such as dropout.
    beside = () if processes.first else (processes.rank,)
    torch.manual_seed(runtime.derived_seed(settings.rng_seed, "global", state.iteration, *beside))
    # Sharded gradients come as means over the processes, and are wanted as sums.
    scale = 1 if state.unsharded is None else processes.count
    state.module.train()
    state.optimizer.zero_grad()
    buffers = [buffer.clone() for buffer in state.module.buffers()]
    adversarial: AdversarialState | None = None
    totals: dict[str, Tensor] = {}
    for rows, share, draws in _parts(processes, state.iteration, settings, device):
        with runtime.autocast(device, settings.bf16):
            terms = task.terms(batch.rows(rows), draws, state.iteration)
            loss = torch.stack([weight * terms[name].float() for name, weight in task.weights.items() if weight]).sum()
        adversarial = state.adversarial if ADVERSARIAL in terms else None
        (scale * share * loss).backward(retain_graph=adversarial is not None)
        if adversarial:
            adversarial.add_part(terms, share, scale)
        for name, term in {**terms, "loss": loss}.items():
            totals[name] = totals.get(name, 0) + share * term.detach().float()
    parameters = [parameter for group in state.optimizer.param_groups for parameter in group["params"]]
    processes.add_up([*totals.values(), *(one.grad for one in parameters if one.grad is not None)])
    if adversarial:
        processes.add_up(adversarial.gradients())
        totals |= adversarial.add_balanced(settings.clip)
    totals["gradient"] = whole(nn.utils.clip_grad_norm_(parameters, settings.clip or float("inf"))).float()
    # One transfer, and the only time the processor waits for the device.
    values = dict(zip(totals, torch.stack(list(totals.values())).tolist(), strict=True))
    if not all(map(math.isfinite, values.values())):
        for buffer, before in zip(state.module.buffers(), buffers, strict=True):
            buffer.copy_(before)
        if adversarial:
            adversarial.forget()
        _skip(state, values, settings)
        return values
    state.skipped_in_a_row = 0
    for group in state.optimizer.param_groups:
        group["lr"] = learning_rate(settings, state.iteration)
    state.optimizer.step()
    if adversarial:
        adversarial.step(settings, state.iteration)
    _average(state.ema, state.module, 1 - ema_decay(settings, state.iteration))
    state.iteration += 1
    return values


def _parts(
    processes: Processes, iteration: int, settings: TrainConfig, device: torch.device
) -> Iterator[tuple[slice, float, Draws]]:
    """The parts of this process's rows of a batch: where in these rows, their share of the batch, and their draws."""
    own, size = processes.rows(settings.batch), settings.batch
    count = own.stop - own.start
    for part in range(settings.accumulate):
        rows = slice(count * part // settings.accumulate, count * (part + 1) // settings.accumulate)
        draws = Draws(
            shared=runtime.generator(settings.rng_seed, "shared", iteration),
            own=runtime.generator(settings.rng_seed, "own", iteration, device=device),
            total=size,
            first=own.start + rows.start,
            count=rows.stop - rows.start,
        )
        yield rows, (rows.stop - rows.start) / size, draws


@torch.no_grad()
def _average(ema: nn.Module, module: nn.Module, weight: float) -> None:
    # One call for all: small networks have many parameters, and none of them is large.
    torch._foreach_lerp_(list(ema.parameters()), list(module.parameters()), weight)
    for kept, buffer in zip(ema.buffers(), module.buffers(), strict=True):
        kept.copy_(buffer)


def _skip(state: TrainState, values: dict[str, float], settings: TrainConfig) -> None:
    if settings.on_divergence == "stop":
        raise DivergedError(state.iteration + 1, values)
    if state.skipped_in_a_row + 1 >= MOST_SKIPPED:
        raise DivergedError(state.iteration + 1, values, MOST_SKIPPED)
    state.iteration += 1
    state.skipped += 1
    state.skipped_in_a_row += 1
