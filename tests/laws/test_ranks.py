"""Streams are pure functions of the draw's number, so any number of processes can share an epoch."""

from __future__ import annotations

import io
import tarfile
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from rac.data import DataConfig, ImageStream, Stream, open_stream
from rac.data.pictures import Picture

COUNT = 23
"""Pictures to train on: no multiple of any batch."""


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> DataConfig:
    """Three shards of pictures, one of them damaged."""
    folder = tmp_path_factory.mktemp("shards")
    for shard in range(3):
        with tarfile.open(folder / f"{shard}.tar", "w") as tar:
            for number in range(9):
                buffer = io.BytesIO()
                pixels = np.random.default_rng(9 * shard + number).integers(0, 256, (20, 24, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(buffer, "JPEG", quality=95)
                data = buffer.getvalue()[: 300 if (shard, number) == (1, 4) else None]
                member = tarfile.TarInfo(f"{shard}{number}.jpg")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    return DataConfig(paths=(folder,), size=8, held_out=4)


def from_shards(config: DataConfig, folder: Path) -> Stream:
    return ImageStream(config, 3)


def from_prepared(config: DataConfig, folder: Path) -> Stream:
    return open_stream(replace(config, cached_crops=40), 3, cache=folder / "crops")


def from_streamed(config: DataConfig, folder: Path) -> Stream:
    datasets = pytest.importorskip("datasets", reason="needs Hugging Face's datasets")
    if not (folder / "set").exists():
        values = [picture.read() for picture in ImageStream(config).files]
        datasets.Dataset.from_dict({"jpg": values}).save_to_disk(folder / "set")
    return open_stream(replace(config, paths=(Path(f"hf-stream:{folder / 'set'}"),)), 3)


Opened = Callable[[DataConfig, Path], Stream]


@pytest.fixture(scope="module", params=[from_shards, from_prepared, from_streamed], ids=lambda opened: opened.__name__)
def opened(request: pytest.FixtureRequest) -> Opened:
    return request.param


@pytest.mark.filterwarnings("ignore:skipped from training")
@pytest.mark.parametrize("ranks", [1, 2, 3, 8])
def test_the_rows_of_all_ranks_are_the_whole_batch(
    config: DataConfig, opened: Opened, ranks: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.getbasetemp() / opened.__name__
    folder.mkdir(exist_ok=True)
    batch, whole = 8, opened(config, folder)
    own = [opened(config, folder) for _ in range(ranks)]  # as each process would open it
    share = batch // ranks
    for iteration in (0, 1, 7, 20):
        expected = whole.batch(iteration * batch, ranks * share).images
        rows = [stream.batch(iteration * batch + rank * share, share).images for rank, stream in enumerate(own)]
        assert torch.equal(torch.cat(rows), expected)


@pytest.mark.filterwarnings("ignore:skipped from training")
@given(first=st.integers(0, 500), count=st.integers(1, 12), at=st.integers(0, 11))
def test_a_batch_is_its_draws_one_by_one(config: DataConfig, first: int, count: int, at: int) -> None:
    whole = ImageStream(config, 3).batch(first, count).images
    other = ImageStream(replace(config, keep_mb=0), 3)
    assert torch.equal(other.batch(first + at % count, 1).images[0], whole[at % count])


@pytest.mark.filterwarnings("ignore:skipped from training")
@pytest.mark.parametrize("ranks", [1, 4])
def test_ranks_together_see_each_picture_once_an_epoch(
    config: DataConfig, ranks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[str] = []
    read = Picture.read
    monkeypatch.setattr(Picture, "read", lambda picture: (opened.append(picture.name), read(picture))[1])
    streams = [ImageStream(replace(config, keep_mb=0), 5) for _ in range(ranks)]
    count = len(streams[0])
    assert count == COUNT
    for epoch in range(3):
        seen: Counter[str] = Counter()
        for draw in range(count * epoch, count * (epoch + 1)):
            opened.clear()
            streams[draw % ranks].crop(draw)
            seen[opened[-1]] += 1
        assert len(seen) >= count - 1, "the damaged picture's turn is the next one's"
        assert sum(seen.values()) == count
        assert max(seen.values()) <= 2
        assert sum(times == 2 for times in seen.values()) == count - len(seen)
