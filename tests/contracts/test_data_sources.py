"""What every kind of data source promises to those who train on it."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from rac.data import CachedStream, DataConfig, Latents, Stream, batches, check_pictures, open_stream
from rac.data.cache import Layout, fresh_stream, plan_of, prepare
from rac.data.stream import Want
from rac.errors import RacError
from rac.latents import LatentSpec

COUNT, SIZE, BATCH = 14, 8, 6


class Pooling(torch.nn.Module):
    """A coder at f = 4 with a variance."""

    def __init__(self) -> None:
        super().__init__()
        self.spec = LatentSpec(4, 3)
        self.weight = torch.nn.Parameter(torch.ones(()))

    def encode(self, image: Tensor) -> Tensor:
        return self.finish(self.moments(image))

    def moments(self, image: Tensor) -> Tensor:
        mean = self.weight * torch.nn.functional.avg_pool2d(image, 4)
        return torch.cat([mean, mean - 2], 1)

    def finish(self, moments: Tensor, noise: Tensor | None = None) -> Tensor:
        mean, log_variance = moments.chunk(2, 1)
        return mean if noise is None else mean + (0.5 * log_variance).exp() * noise


def pictures() -> list[tuple[str, bytes]]:
    """Names and bytes of pictures of two classes, told apart by any pixel; the last of each class is damaged."""
    found = []
    for k in range(COUNT):
        buffer = io.BytesIO()
        pixels = np.random.default_rng(k).integers(0, 256, (14, 17, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(buffer, "PNG")
        found.append((f"{'ab'[k % 2]}/{k:02d}.png", buffer.getvalue()[: 60 if k >= COUNT - 2 else None]))
    return found


@dataclass(frozen=True)
class Kind:
    """A kind of source, and what of it to open."""

    config: Callable[[Path], DataConfig]
    wants: frozenset[Want] = frozenset({"images", "labels"})
    latents: Latents | None = None

    def open(self, root: Path) -> Stream:
        return open_stream(self.config(root), 3, wants=self.wants, latents=self.latents, cache=root / "crops")


def config(*paths: Path, **changes: Any) -> DataConfig:
    return DataConfig(paths=paths, **{"size": SIZE, "held_out": 2, **changes})


def folder(root: Path) -> DataConfig:
    for name, data in pictures():
        (root / "photos" / name).parent.mkdir(parents=True, exist_ok=True)
        (root / "photos" / name).write_bytes(data)
    return config(root / "photos")


def tar(root: Path) -> DataConfig:
    with tarfile.open(root / "photos.tar", "w") as file:
        for name, data in pictures():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            file.addfile(member, io.BytesIO(data))
    return config(root / "photos.tar")


def rows(root: Path) -> DataConfig:
    return config(Path(f"hf:{_set(root)}"))


def streamed(root: Path) -> DataConfig:
    return config(Path(f"hf-stream:{_set(root)}"))


def _set(root: Path) -> Path:
    datasets = pytest.importorskip("datasets", reason="needs Hugging Face's datasets")
    if not (root / "set").exists():
        found = pictures()
        columns = {"image": [{"bytes": d, "path": None} for _, d in found], "label": [name[0] for name, _ in found]}
        features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["b", "a"])})
        datasets.Dataset.from_dict(columns, features=features).save_to_disk(root / "set")
    return root / "set"


def crops(**layout: Any) -> Callable[[Path], DataConfig]:
    def make(root: Path) -> DataConfig:
        asked, latents = folder(root), Latents(Pooling(), "pooling")
        plan = plan_of(config(*asked.paths, cached_crops=40), 3, latents, Layout(**{"shard_size": 32, **layout}))
        prepare(root / "prepared", plan, fresh_stream(asked, 3), latents)
        return config(root / "prepared")

    return make


def of_the_run(root: Path) -> DataConfig:
    return config(*folder(root).paths, cached_crops=40)


def photographs(root: Path) -> DataConfig:
    pytest.importorskip("skimage")
    return config()


IMAGES: frozenset[Want] = frozenset({"images"})
ALL: frozenset[Want] = frozenset({"images", "latents", "labels"})
LATENTS: frozenset[Want] = frozenset({"latents", "labels"})
MEAN, SAMPLE = Latents(Pooling(), "pooling"), Latents(Pooling(), "pooling", posterior="sample")
KINDS = {
    "folder": Kind(folder),
    "tar": Kind(tar),
    "hf": Kind(rows),
    "hf-stream": Kind(streamed),
    "photographs": Kind(photographs, IMAGES),
    "crops": Kind(crops(), ALL, MEAN),
    "crops without pixels": Kind(crops(pixels=False), ALL, MEAN),
    "crops without pixels, latents alone": Kind(crops(pixels=False), LATENTS, MEAN),
    "moments": Kind(crops(moments=True), ALL, SAMPLE),
    "moments without pixels": Kind(crops(moments=True, pixels=False), LATENTS, SAMPLE),
    "crops of the run": Kind(of_the_run, ALL, MEAN),
    "moments of the run": Kind(of_the_run, LATENTS, SAMPLE),
}

pytestmark = pytest.mark.filterwarnings("ignore:skipped from training")


@pytest.fixture(scope="module", params=KINDS.values(), ids=KINDS.keys())
def opened(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Callable[[], Stream]:
    """Opens one kind of stream, each time anew."""
    root = tmp_path_factory.mktemp("source")
    return lambda: request.param.open(root)


@pytest.fixture
def kind(request: pytest.FixtureRequest) -> Kind:
    return KINDS[request.node.callspec.id]


def same(one: Any, two: Any) -> bool:
    """Whether two batches are equal, bit for bit, in all that they hold."""
    return all(
        (a is None and b is None) or (a is not None and b is not None and torch.equal(a, b))
        for a, b in zip(one, two, strict=True)
    )


def test_a_batch_holds_what_the_stream_was_opened_for(opened: Callable[[], Stream], kind: Kind) -> None:
    batch = opened().batch(5, BATCH)
    assert batch.size == BATCH
    assert {name for name, tensor in batch._asdict().items() if tensor is not None} == kind.wants
    if batch.images is not None:
        assert (batch.images.shape, batch.images.dtype) == ((BATCH, 3, SIZE, SIZE), torch.float32)
        assert batch.images.min() >= -1
        assert batch.images.max() <= 1
    if batch.latents is not None:
        assert (batch.latents.shape, batch.latents.dtype) == ((BATCH, 3, 2, 2), torch.float32)
        assert not batch.latents.requires_grad
    if batch.labels is not None:
        assert (batch.labels.shape, batch.labels.dtype) == ((BATCH,), torch.int64)


def test_the_same_call_gives_the_same_batch(opened: Callable[[], Stream]) -> None:
    one, two = opened(), opened()
    first = one.batch(7, BATCH)
    one.batch(100, BATCH)
    assert same(one.batch(7, BATCH), first)
    assert same(two.batch(7, BATCH), first)
    assert not same(one.batch(7 + BATCH, BATCH), first)


def test_any_thread_may_ask(opened: Callable[[], Stream]) -> None:
    stream, other = opened(), opened()
    expected = [stream.batch(BATCH * k, BATCH) for k in range(12)]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda k: other.batch(BATCH * k, BATCH), reversed(range(12))))[::-1]
    assert all(map(same, found, expected))
    assert all(map(same, batches(opened(), BATCH, 0, 12, workers=3), expected))


@pytest.mark.parametrize("ranks", [2, 3])
def test_the_rows_of_all_ranks_are_the_whole_batch(opened: Callable[[], Stream], ranks: int) -> None:
    whole, share = opened().batch(4 * BATCH, BATCH), BATCH // ranks
    for rank in range(ranks):
        rows = slice(rank * share, (rank + 1) * share)
        assert same(opened().batch(4 * BATCH + rank * share, share), whole.rows(rows))
        assert same(next(batches(opened(), BATCH, 4, 5, 0, rows=rows)), whole.rows(rows))


def test_held_out_images_are_always_the_same(opened: Callable[[], Stream]) -> None:
    stream = opened()
    held_out = stream.held_out()
    stream.batch(0, BATCH)
    assert held_out.shape == (2, 3, SIZE, SIZE)
    assert torch.equal(opened().held_out(), held_out)
    assert torch.equal(stream.held_out(), held_out)


def test_classes_and_fingerprint_do_not_change(opened: Callable[[], Stream], kind: Kind, tmp_path: Path) -> None:
    stream = opened()
    assert stream.classes == (("a", "b") if "labels" in kind.wants else stream.classes)
    assert opened().fingerprint == stream.fingerprint
    check_pictures(stream.fingerprint, tmp_path)
    check_pictures(opened().fingerprint, tmp_path)


@pytest.mark.parametrize(
    "name", ["folder", "tar", "hf", "hf-stream", "crops of the run", "crops", "crops without pixels"]
)
def test_held_out_pictures_are_never_trained_on_and_damaged_ones_skipped(name: str, tmp_path: Path) -> None:
    """Whole pictures, unmirrored, so that an image tells its picture."""
    kind = KINDS[name]
    plain = {"size": 14, "flip": False, "smallest_crop": 14, "largest_crop": 14, "held_out": 3}
    asked = kind.config(tmp_path)
    if name.startswith("crops") and name != "crops of the run":
        source = config(tmp_path / "photos", **plain, cached_crops=40)
        prepare(tmp_path / "plain", plan_of(source, 3), fresh_stream(source, 3))
        asked = config(tmp_path / "plain")
    stream = open_stream(
        config(*asked.paths, **plain, cached_crops=40 if name == "crops of the run" else 0), 3, cache=tmp_path / "c"
    )

    originals = {
        k: torch.from_numpy(np.array(Image.open(io.BytesIO(data)))).permute(2, 0, 1).float().div(127.5).sub(1)
        for k, (_, data) in enumerate(pictures()[:-2])
    }

    def number(image: Tensor) -> int:
        for k, whole in originals.items():
            for left in range(4):
                if torch.allclose(whole[:, :, left : left + 14], image, atol=1e-5):
                    return k
        raise AssertionError("an image of no picture")

    held_out = {number(image) for image in stream.held_out()}
    trained = {number(image) for image in stream.batch(0, 80).need("images")}
    assert len(held_out) == 3
    assert not held_out & trained
    assert held_out | trained == set(originals)


def test_a_cache_says_when_its_pictures_are_others(tmp_path: Path) -> None:
    asked = of_the_run(tmp_path)
    open_stream(asked, 3, cache=tmp_path / "crops")
    next((tmp_path / "photos").rglob("*.png")).unlink()
    with pytest.raises(
        RacError, match=r"crops was prepared with other settings: pictures\.count 13, was 14; .*delete it"
    ):
        open_stream(asked, 3, cache=tmp_path / "crops")
    assert len(CachedStream(tmp_path / "crops")) == 40
