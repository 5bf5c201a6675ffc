"""Hugging Face data sets: on the disk in any order, and streamed."""

from __future__ import annotations

import io
import shutil
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from rac.data import DataConfig, ImageStream, batches, open_stream
from rac.data import stream as module
from rac.data.datasets import HFPath
from rac.data.files import find_pictures
from rac.data.stream import StreamedImages
from rac.errors import RacError

datasets = pytest.importorskip("datasets", reason="needs Hugging Face's datasets")

COUNT = 30


def encoded(level: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (12, 10), (level, level, level)).save(buffer, "PNG")
    return buffer.getvalue()


def rows(count: int = COUNT) -> Any:
    """A data set of flat pictures whose grey is eight times their number."""
    columns = {"label": list(range(count)), "image": [{"bytes": encoded(8 * k), "path": None} for k in range(count)]}
    features = datasets.Features({"label": datasets.Value("int64"), "image": datasets.Image()})
    return datasets.Dataset.from_dict(columns, features=features)


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    datasets.disable_progress_bars()
    yield
    datasets.enable_progress_bars()


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A data set saved to disk, alone and as a split of two."""
    rows().save_to_disk(tmp_path / "alone")
    datasets.DatasetDict({"train": rows(), "test": rows(5)}).save_to_disk(tmp_path / "splits")
    return tmp_path


@pytest.fixture
def small_window(monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(module, "WINDOW", 8)
    return 8


def config(spelled: str, **changes: Any) -> DataConfig:
    return DataConfig(paths=(Path(spelled),), **{"size": 8, "held_out": 3, **changes})


def levels(images: torch.Tensor) -> list[int]:
    return ((images[:, 0, 0, 0] + 1) * 127.5).round().int().tolist()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("hf:a/b", ("a/b", "train", None)),
        ("hf:/data/x:test", ("/data/x", "test", None)),
        ("hf-stream:a/b:train[10:2000]:jpg", ("a/b", "train[10:2000]", "jpg")),
        ("hf:a:b:c", ("a", "b", "c")),
    ],
)
def test_spellings(text: str, expected: tuple[str, str, str | None]) -> None:
    assert tuple(HFPath.read(text)) == expected
    assert str(Path(text)) == text, "paths are configured as Path"


@pytest.mark.parametrize("text", ["hf:", "hf:a:b:c:d", "hf::train"])
def test_spellings_that_say_nothing(text: str) -> None:
    with pytest.raises(RacError, match="is not hf:PATH_OR_NAME"):
        HFPath.read(text)


# ------------------------------------------------------------------------------------------------------- in any order


@pytest.mark.parametrize("spelled", ["hf:{}/alone", "hf:{}/splits", "hf:{}/splits:train:image"])
def test_each_row_comes_once_an_epoch(saved: Path, spelled: str) -> None:
    stream = ImageStream(config(spelled.format(saved)), 1)
    held_out = levels(stream.held_out())
    assert len(stream) == COUNT - 3
    for epoch in range(2):
        drawn = levels(stream.batch(epoch * len(stream), len(stream)).images)
        assert sorted(drawn + held_out) == [8 * k for k in range(COUNT)]
    assert torch.equal(stream.batch(5, 9).images, ImageStream(config(spelled.format(saved)), 1).batch(5, 9).images)


def test_the_fingerprint_of_a_set_is_that_of_its_rows(saved: Path) -> None:
    def fingerprint() -> str:
        return find_pictures([Path(f"hf:{saved}/alone")]).fingerprint()

    before = fingerprint()
    assert fingerprint() == before
    shutil.rmtree(saved / "alone")
    rows(COUNT).map(lambda row: {"label": 0}).save_to_disk(saved / "alone")
    assert fingerprint() != before


def test_a_folder_that_datasets_loads_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for k in range(6):
        (tmp_path / "set" / "train").mkdir(parents=True, exist_ok=True)
        (tmp_path / "set" / "train" / f"{k}.png").write_bytes(encoded(40 * k))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    found = find_pictures([Path(f"hf:{tmp_path / 'set'}")])
    assert sorted(picture.read() for picture in found) == sorted(encoded(40 * k) for k in range(6))
    streamed = open_stream(config(f"hf-stream:{tmp_path / 'set'}", held_out=1))
    assert set(levels(streamed.batch(0, 20).images) + levels(streamed.held_out())) == {40 * k for k in range(6)}


@pytest.mark.filterwarnings("ignore:skipped from training")
def test_a_column_of_bytes_and_rows_without_a_picture(tmp_path: Path) -> None:
    values = [encoded(8 * k) if k % 3 else None for k in range(COUNT)]
    datasets.Dataset.from_dict({"raw": values, "other": values}).save_to_disk(tmp_path / "set")
    with pytest.raises(RacError, match=r"which column is the image\? It has raw, other"):
        ImageStream(config(f"hf:{tmp_path / 'set'}"))
    stream = ImageStream(config(f"hf:{tmp_path / 'set'}:train:raw"))
    drawn = levels(stream.batch(0, 2 * len(stream)).images)
    assert set(drawn) | set(levels(stream.held_out())) == {8 * k for k in range(COUNT) if k % 3}
    assert len(stream.skipped) == COUNT // 3
    assert f"row 9 of hf:{tmp_path / 'set'}:train:raw holds nothing, no encoded picture" in stream.skipped.values()


@pytest.mark.parametrize("kind", ["hf", "hf-stream"])
@pytest.mark.parametrize(
    ("rest", "message"),
    [
        ("splits:validation", "has no split validation; it has train, test"),
        ("splits:train:picture", "has no column picture; it has label, image"),
        ("nothing", "nothing cannot be read"),
    ],
)
def test_what_is_not_there_is_named(saved: Path, kind: str, rest: str, message: str) -> None:
    with pytest.raises(RacError, match=message) as caught:
        open_stream(config(f"{kind}:{saved}/{rest}"))
    assert "\n" not in str(caught.value)


def test_without_datasets_the_extra_is_named(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(RacError, match=r"pip install '\.\[datasets\]'"):
        find_pictures([Path(f"hf:{saved}/alone")])


# ------------------------------------------------------------------------------------------------------------ streamed


def test_every_epoch_of_a_streamed_set_has_every_row_once(saved: Path, small_window: int) -> None:
    stream = open_stream(config(f"hf-stream:{saved}/alone"), 1)
    assert levels(stream.held_out()) == [0, 8, 16]
    epoch = COUNT - 3
    drawn = levels(stream.batch(0, 8 * epoch).images)  # windows and epochs end together after 8 epochs
    assert sorted(drawn) == sorted(8 * list(range(24, 8 * COUNT, 8)))
    assert sorted(drawn[:8]) == list(range(24, 88, 8)), "the first window"
    assert drawn[:8] != sorted(drawn[:8])
    assert [sorted(drawn[k : k + 8]) == drawn[k : k + 8] for k in range(0, 64, 8)] != [True] * 8
    other = open_stream(config(f"hf-stream:{saved}/alone"), 2)
    assert levels(other.batch(0, 8).images) != drawn[:8]


def test_a_streamed_draw_is_a_function_of_its_number(saved: Path, small_window: int) -> None:
    """Whatever was asked before: in order, back, far ahead, by ranks, by threads, and resumed."""
    asked = config(f"hf-stream:{saved}/alone")
    whole = StreamedImages(asked, 1).batch(0, 240).images
    back = StreamedImages(asked, 1)
    for draw in (230, 3, 119, 118, 0, 57, 200, 239, 12):
        assert torch.equal(back.batch(draw, 1).images, whole[draw : draw + 1])
    assert torch.equal(StreamedImages(asked, 1).batch(177, 20).images, whole[177:197])
    for workers in (0, 3):
        found = list(batches(StreamedImages(asked, 1), 6, 3, 40, workers))
        assert torch.equal(torch.cat([batch.images for batch in found]), whole[18:240])
    shared = StreamedImages(asked, 1)
    with ThreadPoolExecutor(4) as pool:
        parts = list(pool.map(lambda k: shared.batch(10 * k, 10).images, reversed(range(24))))
    assert torch.equal(torch.cat(parts[::-1]), whole)


def test_a_streamed_set_is_read_in_windows_and_only_once(
    saved: Path, small_window: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    stream = StreamedImages(config(f"hf-stream:{saved}/alone"), 1)
    read: list[int] = []
    row = module._Row

    def counted(label: str, value: Any) -> Any:
        read.append(int(label.split()[1]))
        return row(label, value)

    monkeypatch.setattr(module, "_Row", counted)
    stream.batch(8, 16)
    assert read == list(range(3 + 8, 3 + 24))
    stream.batch(0, 8)
    assert len(read) == 16, "the first window stays"
    assert len(stream._windows) <= 4


@pytest.mark.filterwarnings("ignore:skipped from training")
def test_damaged_rows_of_a_streamed_set_are_skipped(tmp_path: Path, small_window: int) -> None:
    values = [encoded(8 * k) if k % 3 else b"no picture" for k in range(COUNT)]
    datasets.Dataset.from_dict({"jpg": values}).save_to_disk(tmp_path / "set")
    stream = StreamedImages(config(f"hf-stream:{tmp_path / 'set'}", held_out=2))
    drawn = levels(stream.batch(0, 8 * (COUNT - 3)).images)
    assert set(stream.skipped) == {f"row {k} of hf-stream:{tmp_path / 'set'}" for k in range(0, COUNT, 3)}
    assert levels(stream.held_out()) == [8, 16]
    assert set(drawn) == {8 * k for k in range(4, COUNT) if k % 3}


def test_a_streamed_set_that_is_too_small(tmp_path: Path) -> None:
    rows(3).save_to_disk(tmp_path / "set")
    with pytest.raises(RacError, match="has only 3 rows, which are held out"):
        open_stream(config(f"hf-stream:{tmp_path / 'set'}"))


def test_prepared_crops_of_a_streamed_set(saved: Path, small_window: int, tmp_path: Path) -> None:
    asked = config(f"hf-stream:{saved}/alone", cached_crops=40)
    stream = open_stream(asked, 1, cache=tmp_path / "crops")
    fresh = StreamedImages(asked, 1)
    found = {image.numpy().tobytes() for image in stream.batch(0, 40).images}
    assert found == {image.numpy().tobytes() for image in fresh.batch(0, 40).images}
    assert np.array_equal(stream.held_out(), fresh.held_out())
