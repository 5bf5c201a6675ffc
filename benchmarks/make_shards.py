"""Make tar shards of synthetic JPEGs in webdataset's layout: label/key.jpg, and key.cls beside it with --webdataset.

Pictures are sums of a gradient, a wave and noise, each a function of its number: about 3 kB at 96 pixels.
"""

from __future__ import annotations

import argparse
import io
import tarfile
import time
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image


def picture(number: int, side: int, noise: NDArray[np.float32]) -> bytes:
    """The JPEG of picture `number`: its sides differ a little, its colours and its slant a lot."""
    rng = np.random.default_rng(number)
    width, height = (side + rng.integers(-side // 8, side // 8 + 1, 2)).tolist()
    y, x = np.mgrid[0:height, 0:width].astype(np.float32) / side
    colours, slopes = rng.uniform(60, 200, 3), rng.uniform(-60, 60, (2, 3))
    wave = 30 * np.sin(rng.uniform(5, 40) * x + rng.uniform(5, 40) * y + rng.uniform(0, 6))
    pixels = colours + y[..., None] * slopes[0] + x[..., None] * slopes[1] + wave[..., None]
    top, left = rng.integers(0, noise.shape[0] - max(height, width), 2)
    pixels = pixels + noise[top : top + height, left : left + width]
    buffer = io.BytesIO()
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(buffer, "JPEG", quality=85)
    return buffer.getvalue()


def make_shards(folder: Path, images: int, per_shard: int, side: int, webdataset: bool = False) -> list[Path]:
    """Write the shards; those that are there already stay. Returns their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(0).normal(0, 6, (4 * side, 4 * side, 3)).astype(np.float32)
    paths, begun = [], time.monotonic()
    for shard, first in enumerate(range(0, images, per_shard)):
        path = folder / f"shard-{shard:05d}.tar"
        paths.append(path)
        if path.exists():
            continue
        unfinished = path.with_suffix(".unfinished")
        with tarfile.open(unfinished, "w", format=tarfile.GNU_FORMAT) as tar:
            for number in range(first, min(first + per_shard, images)):
                name = f"{number:08d}" if webdataset else f"label{number % 100:02d}/{number:08d}"
                _add(tar, f"{name}.jpg", picture(number, side, noise))
                if webdataset:
                    _add(tar, f"{name}.cls", str(number % 100).encode())
        unfinished.rename(path)
        print(f"{path}: {path.stat().st_size / 2**20:.0f} MiB, {time.monotonic() - begun:.0f} s", flush=True)
    return paths


def _add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(data)
    tar.addfile(member, io.BytesIO(data))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--images", type=int, default=100_000)
    parser.add_argument("--per-shard", type=int, default=10_000)
    parser.add_argument("--side", type=int, default=96, help="of the pictures, in pixels, give or take an eighth")
    parser.add_argument("--webdataset", action="store_true", help="key.jpg and key.cls instead of label/key.jpg")
    options = parser.parse_args()
    make_shards(options.folder, options.images, options.per_shard, options.side, options.webdataset)


if __name__ == "__main__":
    main()
