"""Decoding against diffusers in one run: SD-VAE's decoder and AutoencoderTiny beside RAC at one and four steps.

    python benchmarks/decode_peers.py [--size 256] [--rounds 5] [--bf16] [--threads 0]

All networks have random weights and take turns. How to read the result is told in README.md.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from rac import runtime
from rac.coders.rac import RAC, RACConfig
from rac.evaluate.cost import MacCounter
from rac.fields import LdmFieldConfig, TinyFieldConfig
from rac.latents import LatentSpec

SPEC = LatentSpec(8, 4)
WITHIN = 0.2
"""How far a ratio of times may be from the ratio of MACs before it wants a reason."""


@dataclass
class Peer:
    """A decoder, its cost, and what was measured."""

    name: str
    network: nn.Module
    decode: Callable[[Tensor], Tensor]
    macs: int = 0
    seconds: list[float] | None = None
    by_kind: dict[str, float] | None = None
    """Seconds of one decode in each kind of layer."""

    @property
    def median(self) -> float:
        return median(self.seconds or [float("nan")])


def peers() -> list[Peer]:
    from diffusers import AutoencoderKL, AutoencoderTiny

    widths = (128, 256, 512, 512)
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
    sd: Any = AutoencoderKL(block_out_channels=widths, layers_per_block=2, latent_channels=4, **blocks)
    tiny: Any = AutoencoderTiny()
    found = [
        Peer("SD-VAE decoder (diffusers)", sd, lambda z: sd.decode(z).sample),
        Peer("AutoencoderTiny (diffusers)", tiny, lambda z: tiny.decode(z).sample),
    ]
    for name, field in (("ldm at 0.1", LdmFieldConfig.scaled(0.1)), ("tiny", TinyFieldConfig())):
        coder = RAC(RACConfig(SPEC, field, 4, "nearest"))
        nn.init.normal_(list(coder.field.parameters())[-2], std=0.01)  # not the zeros it starts with
        for steps in (1, 4):
            label = f"RAC {name}, {steps} step{'s' * (steps > 1)}"
            found.append(Peer(label, coder, lambda z, coder=coder, steps=steps: coder.decode(z, steps)))
    for peer in found:
        peer.network.eval().requires_grad_(False)
    return found


@contextmanager
def kinds_timed(network: nn.Module) -> Iterator[dict[str, float]]:
    """Seconds spent in each kind of layer while inside."""
    seconds: dict[str, float] = {}
    begun: dict[int, float] = {}
    handles = []
    for module in network.modules():
        if next(module.children(), None) is None:
            handles.append(module.register_forward_pre_hook(lambda m, _: begun.update({id(m): time.perf_counter()})))

            def after(m: nn.Module, *_: Any) -> None:
                kind = type(m).__name__
                seconds[kind] = seconds.get(kind, 0.0) + time.perf_counter() - begun[id(m)]

            handles.append(module.register_forward_hook(after))
    try:
        yield seconds
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def measure(found: list[Peer], latent: Tensor, rounds: int, bf16: bool) -> None:
    cpu = torch.device("cpu")
    # On one thread, the processor's time: other processes do not count.
    now = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    for peer in found:
        runtime.place(peer.network, cpu, bf16)
        with MacCounter() as counter:
            peer.decode(latent)
        peer.macs, peer.seconds = counter.macs, []
    with runtime.autocast(cpu, bf16):
        for turn in range(rounds + 1):
            for peer in found:
                start = now()
                peer.decode(latent)
                if turn:
                    peer.seconds.append(now() - start)
            print(f"round {turn} of {rounds}" if turn else "warmed up", file=sys.stderr, flush=True)
        for peer in found:
            with kinds_timed(peer.network) as seconds:
                start = time.perf_counter()
                peer.decode(latent)
                whole = time.perf_counter() - start
            peer.by_kind = {**seconds, "between layers": max(0.0, whole - sum(seconds.values()))}


def times(peer: Peer, base: Peer) -> float:
    """The ratio of times, the median over rounds: what else the machine does in a round slows both down."""
    rounds = zip(peer.seconds or [], base.seconds or [], strict=True)
    return median(one / other for one, other in rounds)


def over_macs(peer: Peer, base: Peer) -> float:
    """The ratio of times over the ratio of MACs."""
    return times(peer, base) / (peer.macs / base.macs)


def verdict(peer: Peer, base: Peer) -> str:
    over = over_macs(peer, base)
    return "within 20 %" if abs(over - 1) <= WITHIN else f"{over:.2f} times what its MACs say"


def print_aims(found: list[Peer]) -> None:
    """How fields of a peer's kind do against that peer."""
    print()
    for peer in found[2:]:
        base, most = (found[0], 1.1) if "ldm" in peer.name else (found[1], 1 / 0.95)
        over = over_macs(peer, base)
        met = "met" if over <= most else "MISSED"
        print(f"{peer.name}: time per MAC {over:.3f} of that of {base.name}, aim at most {most:.3f}: {met}")


def reason(peer: Peer) -> str:
    """Where the time goes, and the rate of the convolutions alone."""
    assert peer.by_kind
    whole = sum(peer.by_kind.values())
    shares = sorted(peer.by_kind.items(), key=lambda item: -item[1])
    told = ", ".join(f"{kind} {100 * seconds / whole:.0f} %" for kind, seconds in shares if seconds > 0.03 * whole)
    rate = 2 * peer.macs / peer.by_kind.get("Conv2d", whole) / 1e9
    return f"{told}; convolutions alone run at {rate:.3g} GFLOP/s"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", type=int, default=256, help="side of the image, a multiple of 8")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--bf16", action="store_true", help="bfloat16 autocast and channels-last, for all of them")
    parser.add_argument("--threads", type=int, default=runtime.MEASURED, help="-1: measured")
    parser.add_argument("--return-memory", action="store_true", help="let freed memory go, as outside of `rac`")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    if not options.return_memory:
        runtime.keep_memory()
    runtime.set_threads(options.threads)

    torch.manual_seed(0)
    latent = torch.randn(1, 4, options.size // 8, options.size // 8)
    found = peers()
    measure(found, latent, options.rounds, options.bf16)
    base = found[0]
    if options.json:
        rows = [{"name": p.name, "gmacs": p.macs / 1e9, "seconds": p.seconds, "by_kind": p.by_kind} for p in found]
        print(json.dumps({"command": sys.argv, "threads": torch.get_num_threads(), "peers": rows}, indent=2))
        return
    precision = "bf16 autocast, channels last" if options.bf16 else "float32"
    print(f"{options.size} x {options.size}, batch 1, {precision}, CPU, {torch.get_num_threads()} threads, medians\n")
    print(f"{'':>28} {'GMACs':>8} {'s':>8} {'img/s':>8} {'GFLOP/s':>8} {'MAC ratio':>10} {'time ratio':>10}")
    for peer in found:
        seconds = peer.median
        print(
            f"{peer.name:>28} {peer.macs / 1e9:>8.2f} {seconds:>8.3f} {1 / seconds:>8.3g} "
            f"{2 * peer.macs / seconds / 1e9:>8.3g} {peer.macs / base.macs:>10.4f} {times(peer, base):>10.4f}  "
            f"{'' if peer is base else verdict(peer, base)}"
        )
    print("\nwhere the time goes, in one more decode:")
    for peer in found:
        print(f"{peer.name:>28}: {reason(peer)}")
    print_aims(found)


if __name__ == "__main__":
    main()
