"""Crops and latents prepared once: made, broken off, shared, refused, trained from."""

from __future__ import annotations

import json
import os
import shutil
import tracemalloc
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from torch import Tensor, nn

from rac.data import CachedStream, DataConfig, ImageStream, held_out_images, open_stream
from rac.data.cache import PLAN, Latents, Layout, plan_of, prepare
from rac.errors import RacError
from rac.latents import LatentSpec

COUNT = 12


class Halving(nn.Module):
    """A teacher at f = 4 whose latent is the image, smaller and weighted."""

    def __init__(self, weight: float = 0.5) -> None:
        super().__init__()
        self.spec = LatentSpec(4, 3)
        self.weight = nn.Parameter(torch.tensor(weight))
        self.calls = 0

    def encode(self, image: Tensor) -> Tensor:
        self.calls += 1
        return self.weight * nn.functional.avg_pool2d(image, 4)


@pytest.fixture
def config(tmp_path: Path) -> DataConfig:
    """Twelve pictures of noise, told apart by any pixel."""
    (tmp_path / "pictures").mkdir()
    for k in range(COUNT):
        pixels = np.random.default_rng(k).integers(0, 256, (16, 20, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "pictures" / f"{k}.png")
    return DataConfig(paths=(tmp_path / "pictures",), size=8, held_out=3)


def make(
    folder: Path,
    config: DataConfig,
    crops: int = 80,
    teacher: Halving | None = None,
    part: tuple[int, int] = (0, 1),
    workers: int = 1,
    **layout: Any,
) -> list[Path]:
    """Prepare in shards of 32, by default with latents of `Halving()`."""
    latents, stream = Latents(teacher or Halving(), "halving"), ImageStream(config, 4)
    count = len(stream) if layout.get("centre_crops") else crops
    plan = plan_of(replace(config, cached_crops=count), 4, latents, Layout(**{"shard_size": 32, **layout}))
    return prepare(folder, plan, stream, latents, part=part, workers=workers)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def as_bytes(images: Tensor) -> Counter[bytes]:
    return Counter(image.numpy().tobytes() for image in images)


# ------------------------------------------------------------------------------------------------------ cached_crops


def test_prepared_crops_carry_the_teachers_latents(config: DataConfig, tmp_path: Path) -> None:
    config, cache, teacher = replace(config, cached_crops=20), tmp_path / "sub" / "crops", Halving()
    stream = open_stream(config, 4, cache=cache, latents=Latents(teacher, "halving"))
    assert isinstance(stream, CachedStream)
    calls = teacher.calls
    batch = stream.batch(0, 20)
    assert batch.latents is not None
    torch.testing.assert_close(batch.latents, teacher.encode(batch.images).detach())
    assert not batch.latents.requires_grad
    fresh = ImageStream(config, 4)
    assert as_bytes(batch.images) == as_bytes(fresh.batch(0, 20).images)
    assert torch.equal(stream.held_out(), fresh.held_out())
    assert not torch.equal(batch.images, stream.batch(20, 20).images)
    assert as_bytes(stream.batch(20, 20).images) == as_bytes(batch.images)

    again = open_stream(config, 4, cache=cache, latents=Latents(teacher, "halving"))
    assert teacher.calls == calls + 1, "prepared once, and the one call of this test"
    assert torch.equal(again.batch(7, 5).images, stream.batch(7, 5).images)
    assert [path.name for path in cache.parent.iterdir()] == ["crops"]


def test_the_order_of_prepared_crops_is_a_permutation_of_the_first_crops(config: DataConfig, tmp_path: Path) -> None:
    """Written out once more, from the crops and the permutation alone: what shards they lie in changes nothing."""
    from rac.runtime import generator

    stream = open_stream(replace(config, cached_crops=50), 4, cache=tmp_path / "crops")
    crops = ImageStream(config, 4).batch(0, 50).images
    for epoch in range(2):
        order = torch.randperm(50, generator=generator(4, "epoch", epoch))
        assert torch.equal(stream.batch(50 * epoch, 50).images, crops[order])


def test_prepared_crops_of_several_sizes_lie_side_by_side(config: DataConfig, tmp_path: Path) -> None:
    config, cache = replace(config, cached_crops=8, further_sizes=(16,)), tmp_path / "crops"
    stream = open_stream(config, 4, batch=4, cache=cache, latents=Latents(Halving(), "halving"))
    for first, size in ((0, config.size), (4, 16), (8, config.size)):
        batch = stream.batch(first, 4)
        assert batch.latents is not None
        assert (batch.images.shape[-1], batch.latents.shape[-1]) == (size, size // 4)
    assert sorted(path.name for path in cache.iterdir()) == sorted([str(config.size), "16"])
    with pytest.raises(RacError, match="one size"):
        plan_of(config, 4)


def test_prepared_crops_without_a_teacher(config: DataConfig, tmp_path: Path) -> None:
    stream = open_stream(replace(config, cached_crops=5), cache=tmp_path / "crops")
    assert stream.batch(0, 5).latents is None


def test_crops_prepared_otherwise_are_refused(config: DataConfig, tmp_path: Path) -> None:
    config, cache = replace(config, cached_crops=5), tmp_path / "crops"
    open_stream(config, cache=cache, latents=Latents(Halving(), "halving"))
    with pytest.raises(RacError, match=r"teacher\.weights .* delete it"):
        open_stream(config, cache=cache, latents=Latents(Halving(0.4), "halving"))
    with pytest.raises(RacError, match="teacher null, was"):
        open_stream(config, cache=cache)
    with pytest.raises(RacError, match=r"data\.flip false, was true; rng_seed 1, was 0"):
        open_stream(replace(config, flip=False), 1, cache=cache, latents=Latents(Halving(), "halving"))
    open_stream(replace(config, keep_mb=1), cache=cache, latents=Latents(Halving(), "halving"))


def test_prepared_crops_need_a_folder_that_is_theirs(config: DataConfig, tmp_path: Path) -> None:
    config = replace(config, cached_crops=5)
    with pytest.raises(RacError, match="no folder was named"):
        open_stream(config)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("")
    (tmp_path / "file").write_text("")
    for name in ("full", "file"):
        with pytest.raises(RacError, match=f"{name} is damaged or holds no prepared crops; delete it"):
            open_stream(config, cache=tmp_path / name)
    teacher = Halving()
    teacher.spec = LatentSpec(3, 3)
    with pytest.raises(RacError, match="size 8 must be a multiple of the teacher's factor 3"):
        open_stream(config, cache=tmp_path / "new", latents=Latents(teacher, "odd"))


def test_preparing_that_broke_off_goes_on(config: DataConfig, tmp_path: Path) -> None:
    class Failing(Halving):
        def encode(self, image: Tensor) -> Tensor:
            if self.calls == 2:
                raise KeyboardInterrupt
            return super().encode(image)

    config, broken = replace(config, cached_crops=1024 + 64), tmp_path / "broken"
    with pytest.raises(KeyboardInterrupt):
        open_stream(config, cache=broken, latents=Latents(Failing(), "halving"))
    assert sorted(contents(broken)) == [PLAN, "held-out.safetensors"], "nothing that could be taken for whole"
    teacher = Failing()
    teacher.calls = 3
    for cache in (broken, tmp_path / "whole"):
        open_stream(config, cache=cache, latents=Latents(teacher, "halving"))
    assert contents(broken) == contents(tmp_path / "whole")


# -------------------------------------------------------------------------------------------------- broken off, shared


@pytest.mark.parametrize("parts", [2, 3, 5])
def test_parts_make_what_one_process_makes(config: DataConfig, tmp_path: Path, parts: int) -> None:
    make(tmp_path / "whole", config, crops=130)  # five shards, the last of two crops
    missing = {}
    for part in reversed(range(parts)):
        missing[part] = len(make(tmp_path / "parts", config, crops=130, part=(part, parts), workers=part))
    assert missing[0] == 0
    assert all(missing[part] > missing[part - 1] for part in range(1, parts))
    assert contents(tmp_path / "parts") == contents(tmp_path / "whole")


def test_only_missing_shards_are_made(config: DataConfig, tmp_path: Path) -> None:
    make(tmp_path / "crops", config)
    before = contents(tmp_path / "crops")
    (tmp_path / "crops" / "00001.safetensors").unlink()
    with pytest.raises(RacError, match=r"00001\.safetensors is missing: .* run the same rac cache command again"):
        CachedStream(tmp_path / "crops")
    teacher = Halving()
    make(tmp_path / "crops", config, teacher=teacher)
    assert teacher.calls == 1
    assert contents(tmp_path / "crops") == before


def test_what_a_killed_process_left_is_swept_once_it_is_old(config: DataConfig, tmp_path: Path) -> None:
    make(tmp_path / "crops", config)
    shard = tmp_path / "crops" / "00001.safetensors"
    shard.unlink()
    old, young = (tmp_path / "crops" / f".{shard.name}.{pid}.tmp" for pid in (1, 2))
    for left in (old, young):
        left.write_bytes(b"half")
    os.utime(old, (0, 0))
    make(tmp_path / "crops", config)
    assert not old.exists()
    assert young.exists(), "another process may be writing it"


def test_going_on_with_other_pictures_is_refused(config: DataConfig, tmp_path: Path) -> None:
    make(tmp_path / "crops", config, part=(0, 2))
    shutil.copy(tmp_path / "pictures" / "1.png", tmp_path / "pictures" / "new.png")
    with pytest.raises(RacError, match=r"pictures\.count 13, was 12; pictures\.hash"):
        make(tmp_path / "crops", config, part=(1, 2))


# ------------------------------------------------------------------------------------------------------------- formats


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_latents_are_kept_as_asked_and_come_back_as_float32(config: DataConfig, tmp_path: Path, dtype: str) -> None:
    make(tmp_path / "crops", config, dtype=dtype)
    with safe_open(tmp_path / "crops" / "00001.safetensors", "pt") as file:
        stored = file.get_tensor("latents")
        plan = json.loads(file.metadata()["made_from"])
    assert stored.dtype == getattr(torch, dtype)
    assert (plan["format"], plan["version"], plan["teacher"]["name"]) == ("rac crops", 2, "halving")
    assert plan["data"]["paths"] == [str(tmp_path / "pictures")]
    batch = CachedStream(tmp_path / "crops", 4).batch(0, 80)
    assert batch.latents is not None
    assert batch.latents.dtype == torch.float32
    expected = Halving().encode(batch.images).detach().to(getattr(torch, dtype)).float()
    torch.testing.assert_close(batch.latents, expected, rtol=0, atol=0.01 if dtype == "bfloat16" else 1e-3)


def test_latents_beyond_a_type_are_refused(config: DataConfig, tmp_path: Path) -> None:
    with pytest.raises(RacError, match="too large for float16; choose float32 or bfloat16"):
        make(tmp_path / "crops", config, teacher=Halving(1e6), dtype="float16")
    assert sorted(contents(tmp_path / "crops")) == [PLAN, "held-out.safetensors"]


def test_without_pixels_crops_are_cut_again(config: DataConfig, tmp_path: Path) -> None:
    make(tmp_path / "full", config)
    make(tmp_path / "latents", config, pixels=False)
    full, latents = (CachedStream(tmp_path / name, 7) for name in ("full", "latents"))
    one, two = full.batch(5, 90), latents.batch(5, 90)
    assert torch.equal(one.images, two.images)
    assert torch.equal(one.latents, two.latents)
    sizes = [sum(map(len, contents(tmp_path / name).values())) for name in ("full", "latents")]
    assert sizes[1] < sizes[0] - 80 * 8 * 8 * 3
    (tmp_path / "pictures" / "3.png").unlink()
    with pytest.raises(RacError, match="holds latents without pixels, and the pictures in"):
        CachedStream(tmp_path / "latents")
    assert torch.equal(CachedStream(tmp_path / "latents", 7, wants={"latents"}).batch(5, 90).latents, two.latents)


def test_whole_pictures_once_each(config: DataConfig, tmp_path: Path) -> None:
    make(tmp_path / "crops", config, centre_crops=True)
    stream = CachedStream(tmp_path / "crops")
    assert len(stream) == COUNT - 3
    centres = []
    for k in range(COUNT):
        picture = Image.open(tmp_path / "pictures" / f"{k}.png")
        centres.append(np.asarray(picture.resize((8, 8), Image.Resampling.BICUBIC, box=(2, 0, 18, 16))))
    found = as_bytes(torch.cat([stream.batch(0, len(stream)).images, stream.held_out()]).mul(127.5).add(127.5).round())
    expected = as_bytes(torch.from_numpy(np.stack(centres)).permute(0, 3, 1, 2).float())
    assert found == expected


@pytest.mark.parametrize("size", [0, 31, 100])
def test_shards_of_odd_sizes_are_refused(size: int) -> None:
    with pytest.raises(RacError, match=f"shard_size {size} must be a multiple of 32"):
        Layout(shard_size=size)


# ------------------------------------------------------------------------------------------------------ as a data set


def test_a_folder_of_prepared_crops_is_trained_on_as_it_is(config: DataConfig, tmp_path: Path) -> None:
    make(tmp_path / "crops", config)
    shutil.rmtree(tmp_path / "pictures")
    asked = DataConfig(paths=(tmp_path / "crops",), size=8, held_out=2, cached_crops=30_000)
    stream = open_stream(asked, 4, latents=Latents(Halving(), "the same by another name"))
    batch = stream.batch(0, 80)
    assert batch.latents is not None
    torch.testing.assert_close(batch.latents, Halving().encode(batch.images).detach())
    assert torch.equal(held_out_images(asked), stream.held_out())
    assert len(stream.held_out()) == 2
    assert open_stream(asked, 4).batch(0, 4).latents is None, "who has no teacher asks for no latents"


def test_a_foreign_teacher_is_refused_and_both_are_named(config: DataConfig, tmp_path: Path) -> None:
    make(tmp_path / "crops", config)
    asked = DataConfig(paths=(tmp_path / "crops",), size=8)
    with pytest.raises(RacError, match=r"latents of the teacher halving \(weights \w+\), not of other \(weights \w+\)"):
        open_stream(asked, latents=Latents(Halving(0.4), "other"))
    other = Halving()
    other.spec = LatentSpec(4, 3, statistics="0123456789abcdef")
    with pytest.raises(RacError, match="not of other"):
        open_stream(asked, latents=Latents(other, "other"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"size": 16}, "prepared with size 8, not 16; give 8"),
        ({"size": 64}, "prepared with size 8, not 64"),
        ({"flip": False}, "prepared with flip True, not False"),
        ({"held_out": 9}, "prepared with held_out 3, not 9"),
        ({"largest_crop": 12}, "prepared with largest_crop None, not 12"),
    ],
)
def test_settings_that_prepared_crops_do_not_have_are_refused(
    config: DataConfig, tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    make(tmp_path / "crops", config)
    with pytest.raises(RacError, match=message):
        open_stream(replace(DataConfig(paths=(tmp_path / "crops",), size=8), **change))


def test_prepared_crops_go_alone(config: DataConfig, tmp_path: Path) -> None:
    make(tmp_path / "crops", config)
    with pytest.raises(RacError, match="holds prepared crops, which cannot be combined"):
        open_stream(DataConfig(paths=(tmp_path / "crops", tmp_path / "pictures"), size=8))


# -------------------------------------------------------------------------------------------------------------- damage


def cut_short(folder: Path) -> None:
    path = folder / "00001.safetensors"
    path.write_bytes(path.read_bytes()[:-10])


def another_file(folder: Path) -> None:
    (folder / "00001.safetensors").write_text("hello")


def no_plan(folder: Path) -> None:
    (folder / PLAN).write_text("[]")


def next_version(folder: Path) -> None:
    (folder / PLAN).write_text((folder / PLAN).read_text().replace('"version": 2', '"version": 3'))


def of_other_crops(folder: Path) -> None:
    plan = json.loads((folder / PLAN).read_text())
    (folder / PLAN).write_text(json.dumps({**plan, "rng_seed": 5}))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (cut_short, r"00001\.safetensors is damaged or holds no prepared crops; delete it"),
        (another_file, r"00001\.safetensors is damaged or holds no prepared crops"),
        (no_plan, "damaged or holds no prepared crops of this version"),
        (next_version, "no prepared crops of this version"),
        (of_other_crops, r"safetensors belongs to other crops: rng_seed 5, was 4"),
    ],
)
def test_damaged_folders_are_refused(
    config: DataConfig, tmp_path: Path, damage: Callable[[Path], None], message: str
) -> None:
    make(tmp_path / "crops", config)
    damage(tmp_path / "crops")
    with pytest.raises(RacError, match=message):
        open_stream(DataConfig(paths=(tmp_path / "crops",), size=8))


def test_a_damaged_shard_is_not_gone_on_with(config: DataConfig, tmp_path: Path) -> None:
    make(tmp_path / "crops", config)
    cut_short(tmp_path / "crops")
    with pytest.raises(RacError, match=r"00001\.safetensors is damaged"):
        make(tmp_path / "crops", config)
    (tmp_path / "crops" / "00001.safetensors").unlink()
    make(tmp_path / "crops", config)
    assert len(CachedStream(tmp_path / "crops").batch(0, 80).images) == 80


# -------------------------------------------------------------------------------------------------------------- memory


def test_many_threads_read_the_same(config: DataConfig, tmp_path: Path) -> None:
    make(tmp_path / "crops", config)
    stream = CachedStream(tmp_path / "crops", 1)
    expected = [stream.batch(8 * k, 8) for k in range(40)]
    with ThreadPoolExecutor(4) as pool:
        for one, two in zip(expected, pool.map(lambda k: stream.batch(8 * k, 8), range(40)), strict=True):
            assert torch.equal(one.images, two.images)
            assert torch.equal(one.latents, two.latents)


def test_reading_holds_batches_and_making_holds_a_shard(config: DataConfig, tmp_path: Path) -> None:
    """Of 512 crops of 64 x 64, 6 MiB in all; tracemalloc sees numpy and bytearrays, the pixels' way through memory."""
    config, all_pixels = replace(config, size=64), 512 * 64 * 64 * 3
    tracemalloc.start()
    make(tmp_path / "crops", config, crops=512, workers=0)
    making = tracemalloc.get_traced_memory()[1]
    tracemalloc.reset_peak()
    stream = CachedStream(tmp_path / "crops")
    for k in range(128):
        stream.batch(8 * k, 8)
    reading = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert making < all_pixels / 2
    assert reading < all_pixels / 4
