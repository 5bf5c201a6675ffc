"""What reading training images costs at scale: time to start, images a second and memory, on 100,000 JPEGs in tars."""

from __future__ import annotations

import argparse
import io
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from make_shards import make_shards, picture
from PIL import Image
from torch import Tensor, nn

from rac.data import CachedStream, DataConfig, ImageStream, Stream, batches
from rac.data.cache import Latents, Layout, plan_of, prepare
from rac.latents import LatentSpec

MIB = 2**20
BATCH = 32
AIM = 200.0
"""Images a second that a small field trains on one core."""

T = TypeVar("T")


def resident() -> float:
    """Memory of this process in MiB; on Linux alone."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / MIB


def timed(work: Callable[[], T]) -> tuple[T, float]:
    start = time.perf_counter()
    result = work()
    return result, time.perf_counter() - start


def start_up(config: DataConfig) -> None:
    before = resident()
    stream, seconds = timed(lambda: ImageStream(config))
    grown = resident() - before
    print(f"  without an index: {seconds:.1f} s to the first crop's turn, {len(stream):,} pictures, {grown:.0f} MiB")
    _, seconds = timed(lambda: ImageStream(config))
    print(f"  with the index of the first time: {seconds:.1f} s")


def throughput(stream: Stream, images: int, workers: int, marks: tuple[int, ...]) -> float:
    """Images a second; prints resident memory on the way."""
    first, seen, shown = 0, 0, [f"at the start {resident():.0f}"]
    start = time.perf_counter()
    for batch in batches(stream, BATCH, first, images // BATCH, workers):
        seen += len(batch.images)
        if any(seen - BATCH < mark <= seen for mark in marks):
            shown.append(f"after {seen:,} {resident():.0f}")
    rate = seen / (time.perf_counter() - start)
    print(f"  {workers} worker(s): {rate:,.0f} images/s; MiB resident: {', '.join(shown)}", flush=True)
    return rate


def drafts(folder: Path, side: int) -> None:
    noise = np.random.default_rng(0).normal(0, 6, (4 * side, 4 * side, 3)).astype(np.float32)
    for number in range(12):
        folder.mkdir(exist_ok=True)
        (folder / f"{number}.jpg").write_bytes(picture(number, side, noise))
    width, height = Image.open(io.BytesIO((folder / "0.jpg").read_bytes())).size
    found = {}
    for draft in (False, True):
        stream = ImageStream(DataConfig(paths=(folder,), size=64, held_out=1, keep_mb=0, draft=draft))
        images, seconds = timed(lambda stream=stream: stream.batch(0, 64).images)
        found[draft] = images, len(images) / seconds
    differ = float((found[True][0] - found[False][0]).abs().mean()) * 127.5
    print(
        f"  crops of 64 from pictures of about {width} x {height}: {found[False][1]:.0f} images/s, with draft "
        f"{found[True][1]:.0f}; they differ by {differ:.2f} of 255 levels in the mean"
    )


class Pooling(nn.Module):
    """A teacher that costs nothing, so that the cache itself is measured."""

    def __init__(self) -> None:
        super().__init__()
        self.spec = LatentSpec(8, 3)

    def encode(self, image: Tensor) -> Tensor:
        return nn.functional.avg_pool2d(image, 8)


def caches(folder: Path, config: DataConfig, count: int) -> None:
    config = DataConfig(**{**vars(config), "cached_crops": count})
    latents = Latents(Pooling(), "pooling")
    plan = plan_of(config, 0, latents, Layout(dtype="bfloat16"))
    stream = ImageStream(config)
    before = resident()
    _, seconds = timed(lambda: prepare(folder, plan, stream, latents))
    size = sum(file.stat().st_size for file in folder.iterdir()) / MIB
    print(f"  {count:,} crops made at {count / seconds:,.0f} a second, {size:.0f} MiB on the disk")
    print(f"  MiB resident: {before:.0f} before, {resident():.0f} after")
    throughput(CachedStream(folder), 2 * count, 1, (count // 2, count, 2 * count // BATCH * BATCH))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="for the shards; some 330 MB, kept for the next time")
    parser.add_argument("--images", type=int, default=100_000, help="in the shards")
    parser.add_argument("--draws", type=int, default=50_000, help="of the longest run")
    parser.add_argument("--workers", type=int, nargs="+", default=[2, 1, 0])
    parser.add_argument("--keep-mb", type=int, default=64, help="see DataConfig.keep_mb")
    parser.add_argument("--crops", type=int, default=20_000, help="prepared ones")
    options = parser.parse_args()
    torch.set_num_threads(1)
    paths = make_shards(options.folder, options.images, min(10_000, options.images), 96)
    config = DataConfig(paths=(options.folder,), size=64, keep_mb=options.keep_mb)
    scratch = Path(tempfile.mkdtemp(prefix="rac-benchmark-"))
    os.environ["RAC_CACHE_DIR"] = str(scratch / "index")
    try:
        print(f"{len(paths)} shards, {sum(path.stat().st_size for path in paths) / MIB:.0f} MiB; starting up")
        start_up(config)
        index = sum(file.stat().st_size for file in (scratch / "index").rglob("*") if file.is_file())
        print(f"  the index takes {index / options.images:.0f} bytes a picture")
        print(f"crops of 64 x 64, batches of {BATCH}, up to {options.keep_mb} MiB of decoded pictures kept")
        marks = (10_000, options.draws // BATCH * BATCH)
        rates = [
            throughput(ImageStream(config), options.draws if first else options.draws // 5, workers, marks)
            for first, workers in ((place == 0, workers) for place, workers in enumerate(options.workers))
        ]
        print(f"  slowest {min(rates):,.0f}, aim {AIM:.0f}: {'met' if min(rates) >= AIM else 'MISSED'}")
        print("large JPEGs")
        drafts(scratch / "large", 1200)
        print("prepared crops")
        caches(scratch / "crops", config, options.crops)
    finally:
        shutil.rmtree(scratch)


if __name__ == "__main__":
    main()
