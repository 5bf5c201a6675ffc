"""A training step, optimiser and average included: the original's loss written plainly, against ours, taking turns.

    python benchmarks/training_step.py [--size 64] [--batch 2] [--steps 4] [--rounds 5] [--threads -1]

Same networks, batch, K, grids, step noise and machine. How to read the result is told in README.md.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from statistics import median

import torch
from torch import Tensor, nn
from training_memory import MIB, Setting, bytes_of, naive_loss, nano, one_evaluation, our_loss, report

from rac import runtime
from rac.objectives.rac import RACWeights
from rac.train.step import _average

CPU = torch.device("cpu")
PLAIN = "original, float32"


@dataclass
class Side:
    """A loss, a precision, an optimiser."""

    name: str
    setting: Setting
    loss: Callable[..., Tensor]
    bf16: bool = False
    ours: bool = True
    seconds: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.setting = copy.deepcopy(self.setting)
        for module in (self.setting.coder, self.setting.teacher):
            runtime.place(module, CPU, self.bf16 and self.ours)
        layout = runtime.memory_format(self.bf16 and self.ours)
        self.setting = replace(self.setting, image=self.setting.image.to(memory_format=layout))
        parameters = list(self.setting.coder.parameters())
        self.optimiser = torch.optim.AdamW(parameters, lr=1e-5, betas=(0.9, 0.99), fused=self.ours or None)
        self.average = copy.deepcopy(self.setting.coder)

    def step(self) -> float:
        """One iteration; the loss."""
        coder = self.setting.coder
        with runtime.autocast(CPU, self.bf16):
            loss = self.loss(self.setting, coder.field)
        loss.backward()
        nn.utils.clip_grad_norm_(coder.parameters(), 1.0)
        self.optimiser.step()
        self.optimiser.zero_grad()
        if self.ours:
            _average(self.average, coder, 0.001)
        else:
            with torch.no_grad():
                for average, parameter in zip(self.average.parameters(), coder.parameters(), strict=True):
                    average.mul_(0.999).add_(parameter, alpha=0.001)
        return loss.item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", type=int, default=64, help="side of the images, a multiple of 8")
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--steps", type=int, default=4, help="K, the steps of each of the four flows")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=runtime.MEASURED, help="-1: measured")
    parser.add_argument("--return-memory", action="store_true", help="let freed memory go, as outside of `rac`")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    if not options.return_memory:
        runtime.keep_memory()
    runtime.set_threads(options.threads)

    setting = Setting(**nano(options.size, options.batch), steps=options.steps)
    velocity = our_loss("store", RACWeights(velocity=1.0))
    sides = [
        Side(PLAIN, setting, naive_loss, ours=False),
        Side("original, bf16 autocast", setting, naive_loss, bf16=True, ours=False),
        Side("ours, store, float32", setting, our_loss("store")),
        Side("ours, recompute, float32", setting, our_loss("recompute")),
        Side("ours, store, bf16", setting, our_loss("store"), bf16=True),
        Side("ours, recompute, bf16", setting, our_loss("recompute"), bf16=True),
        Side("velocity matching, bf16", setting, velocity, bf16=True),
    ]
    evaluation = one_evaluation(setting)
    saved = {side.name: bytes_of(setting, side.loss, evaluation) for side in sides if "bf16" not in side.name}
    first = {}
    # On one thread, the processor's time: other processes do not count.
    now = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    for turn in range(options.rounds + 1):
        for side in sides:
            start = now()
            value = side.step()
            if turn:
                side.seconds.append(now() - start)
            else:
                first[side.name] = value
        print(f"round {turn} of {options.rounds}" if turn else "warmed up", file=sys.stderr, flush=True)
    for side in sides[:-1]:  # the same loss, up to bfloat16
        tolerance = 0.05 if side.bf16 else 1e-4
        assert abs(first[side.name] - first[PLAIN]) < tolerance * first[PLAIN], (side.name, first)

    if options.json:
        rows = [{"name": side.name, "seconds": side.seconds, "bytes": saved.get(side.name)} for side in sides]
        print(json.dumps({"command": sys.argv, "threads": torch.get_num_threads(), "sides": rows}, indent=2))
        return
    base = median(sides[0].seconds)
    narrow = median(sides[1].seconds)
    print(f"nano preset, {options.size} x {options.size}, batch {options.batch}, K = {options.steps}, CPU, ", end="")
    print(f"{torch.get_num_threads()} threads, medians of {options.rounds} rounds\n")
    print(f"{'':>26} {'s':>8} {'img/s':>8} {'over original':>14} {'over its bf16':>14} {'MiB saved':>10} {'ratio':>7}")
    for side in sides:
        seconds, kept = median(side.seconds), saved.get(side.name)
        told = "" if kept is None else f"{kept / MIB:>10.1f} {kept / saved[PLAIN]:>7.3f}"
        rate = options.batch / seconds
        print(f"{side.name:>26} {seconds:>8.3f} {rate:>8.3g} {base / seconds:>14.2f} {narrow / seconds:>14.2f} {told}")
    print()
    by_name = {side.name: median(side.seconds) for side in sides}
    for way in ("store", "recompute"):
        ratio = base / by_name[f"ours, {way}, bf16"]
        print(f"img/s, ours ({way}, bf16) over original: {ratio:.2f}, aim 2: {'met' if ratio >= 2 else 'MISSED'}")
    report("saved bytes, ours (recompute) to original", saved["ours, recompute, float32"] / saved[PLAIN], 0.25)


if __name__ == "__main__":
    main()
