"""Time and peak bytes of one training step: the original's loss written naively, against ours.

    python benchmarks/training_memory.py [--size 32] [--batch 1] [--steps 1 4 16] [--threads 2]

Both sides see the same network (the nano preset's field, projector and a TAESD-shaped teacher, all with random
weights), batch, grids and step noise, and must give the same loss. How bytes are counted is told in README.md.
"""

from __future__ import annotations

import argparse
import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rac.coders.adapter import TinyCoder
from rac.coders.rac import RAC, RACConfig
from rac.draws import Draws
from rac.flow import TimeGrid
from rac.objectives.rac import Coding, Memory, RACObjective, RACWeights, rac_terms
from rac.recipes import RECIPES
from rac.states import expand, image_state

NANO = RECIPES["nano"][1]
MIB = 2**20


# ----------------------------------------------------------------------------------------------- counting


class SavedBytes:
    """Bytes of the tensors that autograd keeps for the backward pass: now, and at most so far.

    Every storage counts once, whole, for as long as any part of the graph holds it. Parameters are left out.
    """

    def __init__(self, *modules: nn.Module) -> None:
        self.now = self.peak = 0
        self._holders: dict[int, int] = {}
        self._own = {_address(parameter) for module in modules for parameter in module.parameters()}

    @contextlib.contextmanager
    def watch(self) -> Iterator[SavedBytes]:
        with torch.autograd.graph.saved_tensors_hooks(lambda tensor: _Held(tensor, self), lambda held: held.tensor):
            yield self

    def besides(self, extra: int) -> None:
        """Note that `extra` bytes are needed now, beside those counted."""
        self.peak = max(self.peak, self.now + extra)

    def hold(self, tensor: Tensor) -> None:
        address = _address(tensor)
        if address in self._own:
            return
        if self._holders.get(address, 0) == 0:
            self.now += tensor.untyped_storage().nbytes()
            self.peak = max(self.peak, self.now)
        self._holders[address] = self._holders.get(address, 0) + 1

    def release(self, tensor: Tensor) -> None:
        address = _address(tensor)
        if address in self._own:
            return
        self._holders[address] -= 1
        if self._holders[address] == 0:
            # Its address may be given to another tensor from now on.
            del self._holders[address]
            self.now -= tensor.untyped_storage().nbytes()


class _Held:
    """What autograd keeps in a tensor's place; it goes when that node of the graph is freed."""

    def __init__(self, tensor: Tensor, counter: SavedBytes) -> None:
        self.tensor, self._counter = tensor, counter
        counter.hold(tensor)

    def __del__(self) -> None:
        self._counter.release(self.tensor)


def _address(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


# ----------------------------------------------------------------------------------------------- the two losses


@dataclass(frozen=True)
class Setting:
    coder: RAC
    teacher: TinyCoder
    image: Tensor
    latent: Tensor
    steps: int

    def draws(self) -> Draws:
        return Draws.whole(torch.Generator().manual_seed(0), self.image.shape[0])

    @property
    def objective(self) -> RACObjective:
        return replace(NANO.objective, steps=(self.steps, self.steps))


def naive_loss(setting: Setting, field: Callable[..., Tensor]) -> Tensor:
    """The original's loss as one would write it down: all activations of all evaluations wait for the backward pass."""
    coder, draws, image = setting.coder, setting.draws(), setting.image

    def flow(state: Tensor, backwards: bool = False) -> tuple[list[Tensor], list[float]]:
        nodes = list(TimeGrid.random(steps, draws.shared).nodes)
        nodes = nodes[::-1] if backwards else nodes
        states = [state]
        for start, end in pairwise(nodes):
            deviation = state.flatten(1).std(dim=1).view(-1, 1, 1, 1)
            state = state + draws.normal(state, draws.rng_seed()) * (0.05 * deviation)
            state = state + field(state, state.new_full((len(state),), start)) * (end - start)
            states.append(state)
        return states, nodes

    def path(states: list[Tensor], nodes: list[float]) -> Tensor:
        if len(states) < 3:
            return image.new_zeros(())
        times = image.new_tensor(nodes[1:-1]).view(-1, 1, 1, 1, 1)
        return F.mse_loss(torch.stack(states[1:-1]), seed + (target - seed) * times)

    steps = draws.integer(setting.steps, setting.steps)
    seed, target = expand(setting.latent, coder.states), image_state(image, 4)
    decoded, decoding = flow(seed)
    encoded, encoding = flow(target, backwards=True)
    latent = coder.contract(encoded[-1])
    again, again_state = flow(expand(latent, coder.states))[0][-1], flow(encoded[-1])[0][-1]
    return (
        F.mse_loss(decoded[-1], target)
        + 0.1 * path(decoded, decoding)
        + 0.1 * path(encoded, encoding)
        + F.mse_loss(latent, setting.latent)
        + 0.5 * F.mse_loss(encoded[-1], seed)
        + F.mse_loss(setting.teacher.decode(latent), image)
        + F.mse_loss(again, target)
        + F.mse_loss(again_state, target)
    )


def our_loss(memory: Memory, weights: RACWeights | None = None) -> Callable[..., Tensor]:
    """`rac_terms` with the nano preset, or other weights, weighted and added up."""

    def loss(setting: Setting, field: Callable[..., Tensor]) -> Tensor:
        # Walking back takes no noise; its flows are those of another solver, so its loss is another as well.
        noise = 0.0 if memory == "reverse" else NANO.objective.step_noise
        objective = replace(setting.objective, memory=memory, step_noise=noise)
        objective = objective if weights is None else replace(objective, weights=weights)
        coding = Coding(field, setting.coder.states, setting.coder.contract, setting.teacher.decode)
        terms = rac_terms(coding, setting.image, setting.latent, objective, setting.draws())
        return sum((weight * terms[name] for name, weight in objective.weights.chosen().items()), torch.zeros(()))

    return loss


# ----------------------------------------------------------------------------------------------- measuring


@dataclass(frozen=True)
class Measured:
    loss: float
    peak: int
    seconds: float
    slope: float
    """Sum of the absolute gradient, to see that both sides do the same work."""


def one_evaluation(setting: Setting) -> int:
    """Bytes that one plain evaluation of the field keeps, its input apart."""
    state = image_state(setting.image, 4).requires_grad_()
    with SavedBytes(setting.coder).watch() as saved:
        velocity = setting.coder.field(state, state.new_zeros(len(state)))
    kept = saved.now
    del velocity
    return kept


class Watched(nn.Module):
    """The field, which tells that it is asked."""

    def __init__(self, field: nn.Module, tell: Callable[[], None]) -> None:
        super().__init__()
        self.field, self._tell = field, tell

    def forward(self, *args: Tensor) -> Tensor:
        self._tell()
        return self.field(*args)


def measure(setting: Setting, loss_of: Callable[..., Tensor], evaluation: int) -> Measured:
    """One step of training, optimiser apart. Counting adds a few microseconds per saved tensor to its time."""
    saved, in_backward = SavedBytes(setting.coder, setting.teacher), False

    def asked() -> None:
        # A checkpointed evaluation is made again in the backward pass, unseen by the hooks: its activations come on top
        # of what still waits. Of a flow that is walked back the hooks may see them; when the field is asked, those of
        # the evaluation before are gone, so that nothing counts twice.
        if in_backward:
            saved.besides(evaluation)

    field = Watched(setting.coder.field, asked)
    start = time.perf_counter()
    with saved.watch():
        loss = loss_of(setting, field)
        in_backward = True
        loss.backward()
    seconds = time.perf_counter() - start
    value = loss.item()
    del loss
    assert saved.now == 0, "something of the graph outlives the step; the count would be wrong"
    slope = float(sum(parameter.grad.abs().sum() for parameter in setting.coder.parameters()))
    setting.coder.zero_grad()
    return Measured(value, saved.peak, seconds, slope)


def bytes_of(setting: Setting, loss_of: Callable[..., Tensor], evaluation: int) -> int:
    """The peak of the bytes that one step saves."""
    return measure(setting, loss_of, evaluation).peak


def nano(size: int, batch: int) -> dict[str, Any]:
    """The preset's networks, untrained, and images of noise: values do not matter here."""
    from diffusers import AutoencoderTiny

    torch.manual_seed(0)
    teacher = TinyCoder(AutoencoderTiny()).eval().requires_grad_(False)
    coder = RAC(RACConfig(teacher.spec, NANO.field, NANO.state_channels, NANO.spread, NANO.contraction))
    image = 2 * torch.rand(batch, 3, size, size) - 1
    return {"coder": coder, "teacher": teacher, "image": image, "latent": teacher.encode(image)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", type=int, default=32, help="side of the images, a multiple of 8")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument(
        "--steps", type=int, nargs="+", default=[1, 4, 16], help="K, the steps of each of the four flows"
    )
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)

    parts = nano(options.size, options.batch)
    evaluation = one_evaluation(Setting(**parts, steps=1))
    ways = {"naive": naive_loss, **{memory: our_loss(memory) for memory in get_args(Memory)}}
    ends = RACWeights(reconstruction=1.0, latent=1.0, round_trip=1.0)
    ways["no path"] = our_loss("reverse", ends)
    measure(Setting(**parts, steps=1), ways["recompute"], evaluation)  # the first convolutions of a process are slow
    print(f"nano preset, {options.size} x {options.size}, batch {options.batch}, float32, CPU")
    print(f"one evaluation of the field keeps {evaluation / MIB:.1f} MiB; a step of training makes 4 K\n")
    print("MiB, and seconds, by what waits for the backward pass; no path: reverse, without the path terms\n")
    print(f"{'K':>3} " + " ".join(f"{name:>15}" for name in ways) + f" {'recompute/naive':>16}")
    found: dict[int, dict[str, Measured]] = {}
    for steps in options.steps:
        setting = Setting(**parts, steps=steps)
        found[steps] = here = {name: measure(setting, loss_of, evaluation) for name, loss_of in ways.items()}
        for ours in ("store", "recompute"):
            for one, two in ((here["naive"].loss, here[ours].loss), (here["naive"].slope, here[ours].slope)):
                assert abs(one - two) < 1e-4 * abs(one), f"not the same step: {one} and {two}"
        cells = [f"{one.peak / MIB:>8.1f} {one.seconds:>5.2f}s" for one in here.values()]
        ratio = here["recompute"].peak / here["naive"].peak
        print(f"{steps:>3} " + " ".join(f"{cell:>15}" for cell in cells) + f" {ratio:>16.3f}", flush=True)
    print()
    if 4 in found:
        report("bytes at K = 4, recompute to naive", found[4]["recompute"].peak / found[4]["naive"].peak, 0.25)
    if 1 in found and 16 in found:
        for name in ("recompute", "reverse", "no path"):
            report(f"bytes at K = 16 to K = 1, {name}", found[16][name].peak / found[1][name].peak, 1.5)


def report(what: str, ratio: float, aim: float) -> None:
    print(f"{what}: {ratio:.3f}, aim at most {aim}: {'met' if ratio <= aim else 'MISSED'}")


if __name__ == "__main__":
    main()
