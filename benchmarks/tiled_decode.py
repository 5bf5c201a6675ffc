"""A large image decoded in tiles and whole: peak memory, seconds, and how far the two are apart.

    python benchmarks/tiled_decode.py [CODER] [--side 4096] [--tile 512] [--steps 4] [--threads 0]

Each way runs in a process of its own, so that its peak is its own. How to read the result is told in README.md.
"""

from __future__ import annotations

import argparse
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

import rac
from rac import runtime
from rac.coders.tiling import tiled
from rac.storage import read_tensors, write_tensors

MOST_GIB = 4.0
MOST_APART = 1e-5


def peak() -> float:
    """The most memory this process has held so far, GiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def decode(options: argparse.Namespace, out: Path) -> None:
    """Decode random latents, print peaks and seconds, keep the image."""
    runtime.set_threads(options.threads)
    coder = rac.load(options.coder)
    side = options.side // coder.spec.factor
    latent = torch.randn(1, coder.spec.channels, side, side, generator=torch.Generator().manual_seed(0))
    before, start = peak(), time.perf_counter()
    image = (tiled(coder, options.tile) if options.tile else coder).decode(latent, options.steps)
    seconds, after = time.perf_counter() - start, peak()
    name = f"tiles of {options.tile}" if options.tile else "whole"
    print(f"{name:>14} {before:>10.2f} {after:>10.2f} {seconds:>8.1f}", flush=True)
    write_tensors(out, {"image": image, "peak": torch.tensor(after)})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("coder", nargs="?", default="rac-64", help="a RAC of plain convolutions")
    parser.add_argument("--side", type=int, default=4096, help="side of the image, a multiple of the coder's factor")
    parser.add_argument("--tile", type=int, default=512, help="0: whole")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--threads", type=int, default=runtime.MEASURED, help="-1: measured")
    parser.add_argument("--only", type=Path, help="decode one way, and keep the image in this file")
    options = parser.parse_args()
    if options.only:
        decode(options, options.only)
        return

    print(f"{options.coder}, {options.side} x {options.side}, {options.steps} steps, float32, CPU\n")
    print(f"{'':>14} {'GiB before':>10} {'GiB peak':>10} {'s':>8}", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        images, peaks = [], []
        for tile in (options.tile, 0):
            out = Path(folder) / f"{tile}.safetensors"
            subprocess.run([sys.executable, *sys.argv, "--tile", str(tile), "--only", str(out)], check=True)
            tensors, _ = read_tensors(out)
            images.append(tensors["image"])
            peaks.append(float(tensors["peak"]))
    apart = float((images[0] - images[1]).abs().max())
    print(f"\npeak in tiles {peaks[0]:.2f} GiB, aim {MOST_GIB}: {'met' if peaks[0] <= MOST_GIB else 'MISSED'}")
    print(f"largest difference {apart:.2g}, aim {MOST_APART}: {'met' if apart <= MOST_APART else 'MISSED'}")


if __name__ == "__main__":
    main()
