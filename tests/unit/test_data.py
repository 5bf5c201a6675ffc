"""Training images: found, drawn, held out, prepared."""

from __future__ import annotations

import importlib.util
import io
import tarfile
import warnings
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from rac.data import DataConfig, ImageStream, batches, open_stream
from rac.data.files import find_pictures
from rac.data.stream import centre_crop, random_crop
from rac.errors import RacError
from rac.images import from_pixels
from rac.runtime import generator

COUNT = 12


def save_flat(path: Path, level: int, size: tuple[int, int] = (20, 16)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (level, level, level)).save(path)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Twelve one-coloured pictures with labels; the level of grey tells them apart."""
    for k in range(COUNT):
        save_flat(tmp_path / "pictures" / f"label{k % 2}" / f"{k}.png", 10 * k)
    return tmp_path / "pictures"


@pytest.fixture
def config(folder: Path) -> DataConfig:
    return DataConfig(paths=(folder,), size=8, held_out=3)


def levels(images: Tensor) -> list[int]:
    """The level of grey of each image."""
    return ((images[:, 0, 0, 0] + 1) * 127.5).round().int().tolist()


def as_tar(folder: Path, path: Path, mode: str = "w") -> Path:
    with tarfile.open(path, mode) as tar:
        for file in sorted(folder.rglob("*.*"), reverse=True):
            tar.add(file, file.relative_to(folder).as_posix())
    return path


# ------------------------------------------------------------------------------------------------------------ drawing


def test_sizes_take_turns_and_an_epoch_still_shows_each_picture_once(config: DataConfig) -> None:
    stream = open_stream(replace(config, further_sizes=(16, 4)), 5, batch=3)
    shown = [stream.batch(first, 3).images for first in range(0, 9, 3)]
    assert [images.shape[-1] for images in shown] == [8, 16, 4]
    assert stream.batch(9, 3).images.shape[-1] == 8
    assert sorted(level for images in shown for level in levels(images)) == sorted(
        set(range(0, 10 * COUNT, 10)) - set(levels(stream.held_out()))
    )
    assert torch.equal(stream.batch(4, 2).images, shown[1][1:]), "a process's rows are of its batch's size"
    assert stream.held_out().shape[-1] == 8


@pytest.mark.parametrize("wrong", [(16, 0), (-8,)])
def test_further_sizes_are_sizes(config: DataConfig, wrong: tuple[int, ...]) -> None:
    with pytest.raises(RacError, match=f"size {wrong[-1]} must be at least 1"):
        replace(config, further_sizes=wrong)


def test_each_picture_comes_once_an_epoch_and_held_out_ones_never(config: DataConfig) -> None:
    stream = ImageStream(config, rng_seed=1)
    held_out = levels(stream.held_out())
    assert len(stream) == COUNT - 3
    epochs = [levels(stream.batch(epoch * len(stream), len(stream)).images) for epoch in range(3)]
    for epoch in epochs:
        assert sorted(epoch + held_out) == [10 * k for k in range(COUNT)]
    assert epochs[0] != epochs[1] != epochs[2]


def test_a_draw_is_a_function_of_its_number_and_of_the_seed(tmp_path: Path) -> None:
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (30, 40, 3), dtype=np.uint8))
    for k in range(6):  # one picture six times: only the place and the scale of a crop tell draws apart
        noise.save(tmp_path / f"{k}.png")
    config = DataConfig(paths=(tmp_path,), size=8)
    whole = ImageStream(config, 5).batch(0, 24).images
    assert len({image.numpy().tobytes() for image in whole}) == 24
    other = ImageStream(replace(config, keep_mb=0), 5)
    assert torch.equal(other.batch(7, 3).images, whole[7:10])
    assert torch.equal(torch.cat([other.batch(draw, 1).images for draw in range(24)]), whole)
    assert not torch.equal(ImageStream(config, 6).batch(0, 24).images, whole)


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_batches_come_in_order_from_any_number_of_threads(config: DataConfig, workers: int) -> None:
    stream = ImageStream(config)
    found = list(batches(stream, 4, first=2, last=9, workers=workers))
    assert len(found) == 7
    for iteration, batch in enumerate(found, 2):
        assert torch.equal(batch.images, stream.batch(4 * iteration, 4).images)
        assert batch.latents is None


def test_an_error_in_a_reading_thread_arrives(config: DataConfig, folder: Path) -> None:
    stream = ImageStream(replace(config, keep_mb=0))
    for file in folder.rglob("*.png"):
        file.write_bytes(b"gone")
    with pytest.warns(UserWarning, match="skipped"), pytest.raises(RacError, match="none of the 9 pictures"):
        list(batches(stream, 4, 0, 2, workers=2))


def test_crops_have_sides_from_the_size_to_the_short_side() -> None:
    # Columns number themselves, so a crop tells where it was cut and how far apart its columns were.
    ramp = np.broadcast_to(np.arange(200, dtype=np.uint8)[None, :, None], (100, 200, 3))
    config = DataConfig(size=10, flip=False)
    spans = []
    for k in range(400):
        crop = random_crop(Image.fromarray(ramp), config, generator(0, k)).astype(int)
        assert crop.shape == (10, 10, 3)
        spans.append((crop[5, -2, 0] - crop[5, 1, 0]) / 7)  # source pixels per pixel, away from the border
    assert 0.9 < min(spans) < 1.2
    assert 9 < max(spans) <= 10.2
    assert 2.5 < float(np.median(spans)) < 4  # log-uniform on [1, 10]: the median is 10 ** 0.5


def test_crop_limits_and_small_pictures() -> None:
    ramp = Image.fromarray(np.broadcast_to(np.arange(200, dtype=np.uint8)[None, :, None], (100, 200, 3)))
    exact = DataConfig(size=10, smallest_crop=20, largest_crop=20, flip=False)
    for k in range(20):
        crop = random_crop(ramp, exact, generator(0, k)).astype(int)
        assert crop[5, -2, 0] - crop[5, 1, 0] == pytest.approx(14, abs=1)
    assert random_crop(Image.new("RGB", (3, 1)), DataConfig(size=10), generator(0)).shape == (10, 10, 3)


def test_a_crop_of_its_own_size_copies_pixels() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    picture = Image.fromarray(pixels)
    assert np.array_equal(centre_crop(picture, 8), pixels)
    assert np.array_equal(random_crop(picture, DataConfig(size=8, flip=False), generator(0)), pixels)


def test_half_of_the_crops_are_mirrored() -> None:
    picture = Image.fromarray(np.broadcast_to(np.arange(8, dtype=np.uint8)[None, :, None], (8, 8, 3)))
    mirrored = [random_crop(picture, DataConfig(size=8), generator(0, k))[0, 0, 0] == 7 for k in range(200)]
    assert 70 < sum(mirrored) < 130


# ----------------------------------------------------------------------------------------------------------- held out


def test_held_out_images_are_the_centres_and_do_not_hang_on_the_seed(config: DataConfig) -> None:
    held_out = ImageStream(config, 1).held_out()
    assert held_out.shape == (3, 3, 8, 8)
    assert torch.equal(held_out, ImageStream(config, 2).held_out())


def test_few_pictures_give_more_held_out_crops_of_a_quarter_of_them(config: DataConfig) -> None:
    stream = ImageStream(replace(config, held_out=10))
    assert Counter(levels(stream.held_out())).most_common(1)[0][1] == 4  # ten crops of three pictures
    assert len(stream) == COUNT - 3


def test_adding_pictures_leaves_most_of_the_others_on_their_side(config: DataConfig, folder: Path) -> None:
    order = [picture.name for picture in find_pictures(config.paths)]
    save_flat(folder / "new.png", 255)
    assert [picture.name for picture in find_pictures(config.paths) if picture.name != "new.png"] == order


# ------------------------------------------------------------------------------------------------- kinds of collections


def test_a_tar_file_is_the_folder_it_was_made_of(config: DataConfig, folder: Path, tmp_path: Path) -> None:
    from_tar = ImageStream(replace(config, paths=(as_tar(folder, tmp_path / "p.tar"),)), 3)
    from_folder = ImageStream(config, 3)
    assert torch.equal(from_tar.held_out(), from_folder.held_out())
    assert torch.equal(from_tar.batch(0, 20).images, from_folder.batch(0, 20).images)


def test_several_paths_and_single_pictures(folder: Path, tmp_path: Path) -> None:
    save_flat(tmp_path / "one.png", 200)
    paths = (folder / "label0", as_tar(folder / "label1", tmp_path / "p.tar"), tmp_path / "one.png")
    assert len(find_pictures(paths)) == COUNT + 1


def test_photographs_come_with_scikit_image(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("skimage")
    names = [picture.name for picture in find_pictures(())]
    assert {"astronaut.png", "chelsea.png", "coffee.png"} <= set(names)
    assert "motorcycle_right.png" not in names, "the twin of a held-out picture"
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(RacError, match=r"pip install '\.\[photos\]'"):
        find_pictures(())


def test_collections_that_cannot_be(tmp_path: Path, folder: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.txt").write_text("hello")
    for path, message in (
        (tmp_path / "missing", "does not exist"),
        (tmp_path / "empty", "holds no pictures"),
        (tmp_path / "text.txt", "cannot be read as a tar file"),
        (as_tar(folder, tmp_path / "p.tar.gz", "w:gz"), "give an uncompressed, complete .tar"),
    ):
        with pytest.raises(RacError, match=message):
            ImageStream(DataConfig(paths=(path,)))


def test_damaged_pictures_are_skipped_named_once_and_counted(config: DataConfig, folder: Path) -> None:
    picture = io.BytesIO()
    Image.new("RGB", (64, 64), (250, 250, 250)).save(picture, "JPEG")
    for name in ("a.jpg", "b.jpg"):
        (folder / name).write_bytes(picture.getvalue()[: len(picture.getvalue()) // 2])
    (folder / "c.png").write_text("no picture")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        stream = ImageStream(config)
        drawn = [levels(stream.batch(epoch * len(stream), len(stream)).images) for epoch in range(3)]
    assert set(stream.skipped) == {"a.jpg", "b.jpg", "c.png"}
    assert sorted(str(w.message).split()[3] for w in caught) == ["a.jpg", "b.jpg", "c.png"]
    held_out = levels(stream.held_out())
    for epoch in drawn:
        assert set(epoch) | set(held_out) == {10 * k for k in range(COUNT)}
        assert not set(epoch) & set(held_out)
    again = ImageStream(replace(config, keep_mb=0))
    with pytest.warns(UserWarning, match="skipped"):
        assert levels(again.batch(len(stream), len(stream)).images) == drawn[1]


def test_only_damaged_pictures_and_a_single_one(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_text("no picture")
    (tmp_path / "b.png").write_text("no picture")
    with (
        pytest.warns(UserWarning, match="skipped"),
        pytest.raises(RacError, match="none of the 2 pictures can be read"),
    ):
        ImageStream(DataConfig(paths=(tmp_path,)))
    save_flat(tmp_path / "one" / "c.png", 0)
    with pytest.raises(RacError, match="too few"):
        ImageStream(DataConfig(paths=(tmp_path / "one",)))


@pytest.mark.parametrize("mode", ["L", "LA", "P", "RGBA", "CMYK", "I;16"])
def test_pictures_of_odd_modes_become_rgb(tmp_path: Path, mode: str) -> None:
    values = np.full((16, 16), 200 if mode != "I;16" else 200 * 256, np.uint16 if mode == "I;16" else np.uint8)
    for k in range(4):
        picture = Image.fromarray(values) if mode == "I;16" else Image.fromarray(values).convert(mode)
        picture.save(tmp_path / f"{k}.tif")
    images = ImageStream(DataConfig(paths=(tmp_path,), size=8)).batch(0, 3).images
    assert images.shape == (3, 3, 8, 8)
    torch.testing.assert_close(images, torch.full_like(images, 200 / 127.5 - 1), rtol=0, atol=0.02)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"size": 0}, "size 0 must be at least 1"),
        ({"held_out": 0}, "held_out 0"),
        ({"cached_crops": -1}, "cached_crops -1"),
        ({"smallest_crop": 100, "largest_crop": 80}, "from 100 to 80"),
        ({"largest_crop": 32}, "from 64 to 32"),
        ({"smallest_crop": 0}, "from 0 to"),
    ],
)
def test_settings_that_cannot_be(changes: dict[str, int], message: str) -> None:
    with pytest.raises(RacError, match=message):
        DataConfig(**changes)


# ---------------------------------------------------------------------------------------------------------- real data


def test_real_tar(data_dir: Path) -> None:
    path = data_dir / "data" / "imagenette-dev-224.tar"
    if not path.is_file():
        pytest.skip(f"{path} does not exist")
    stream = ImageStream(DataConfig(paths=(path,), size=64))
    assert len(stream) == 492
    images = stream.batch(0, 16).images
    assert images.shape == (16, 3, 64, 64)
    assert images.min() >= -1
    assert images.max() <= 1
    assert images.std() > 0.3
    assert torch.equal(images[:1], from_pixels(stream.crop(0).pixels))
