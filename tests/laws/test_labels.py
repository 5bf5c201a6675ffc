"""Labels stay with their images: through shuffling, damaged pictures, prepared crops, threads and ranks.

Every picture is one grey, and its class says which greys are its own, so an image alone tells what its label has to be.
"""

from __future__ import annotations

import io
import tarfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from rac.data import CachedStream, DataConfig, Stream, open_stream
from rac.data.cache import Latents, Layout, fresh_stream, plan_of, prepare
from rac.data.pictures import class_order
from rac.errors import RacError
from rac.latents import LatentSpec

CLASSES = ("ant", "bee", "cat")
EACH = 7
BATCH = 6


def encoded(level: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (12, 10), (level, level, level)).save(buffer, "PNG")
    return buffer.getvalue()


def collection() -> list[tuple[str, str, bytes]]:
    """Class, name and bytes of every picture: greys 0 to 6 are ants, 40 to 46 bees, 80 to 86 cats; one is damaged."""
    found = [(name, f"{k}.png", encoded(40 * label + k)) for label, name in enumerate(CLASSES) for k in range(EACH)]
    return [(name, file, b"no picture" if (name, file) == ("bee", "3.png") else data) for name, file, data in found]


def labels_of(images: Tensor) -> list[int]:
    """What the labels of these images have to be, by their grey."""
    return [int(level) // 40 for level in ((images[:, 0, 0, 0] + 1) * 127.5).round().tolist()]


class MeanCoder(torch.nn.Module):
    """A coder at f = 4 whose latent is the image's mean colour, with a posterior of deviation 1 / 2."""

    def __init__(self) -> None:
        super().__init__()
        self.spec = LatentSpec(4, 3)
        self.weight = torch.nn.Parameter(torch.ones(()))

    def encode(self, image: Tensor) -> Tensor:
        return self.finish(self.moments(image))

    def moments(self, image: Tensor) -> Tensor:
        mean = self.weight * torch.nn.functional.avg_pool2d(image, 4)
        return torch.cat([mean, torch.full_like(mean, 2 * torch.log(torch.tensor(0.5)).item())], 1)

    def finish(self, moments: Tensor, noise: Tensor | None = None) -> Tensor:
        mean, log_variance = moments.chunk(2, 1)
        return mean if noise is None else mean + (0.5 * log_variance).exp() * noise


# ---------------------------------------------------------------------------------------------------------- the kinds

Opened = Callable[..., Stream]


def folders(root: Path) -> Path:
    for name, file, data in collection():
        (root / "photos" / "deep" / name).mkdir(parents=True, exist_ok=True)
        (root / "photos" / "deep" / name / file).write_bytes(data)
    return root / "photos"


def from_folders(root: Path, **wanted: Any) -> Stream:
    return open_stream(DataConfig(paths=(folders(root),), size=8, held_out=3), 5, **wanted)


def from_tars(root: Path, **wanted: Any) -> Stream:
    for shard in range(2):
        with tarfile.open(root / f"{shard}.tar", "w") as tar:
            for name, file, data in collection()[shard::2]:
                member = tarfile.TarInfo(f"./train/{name}/{file}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    return open_stream(DataConfig(paths=(root / "0.tar", root / "1.tar"), size=8, held_out=3), 5, **wanted)


def saved(root: Path, names: bool) -> Path:
    datasets = pytest.importorskip("datasets", reason="needs Hugging Face's datasets")
    # The classes' numbers are in another order than their names.
    kind = datasets.ClassLabel(names=["cat", "bee", "ant"]) if names else datasets.Value("string")
    columns = {
        "image": [{"bytes": data, "path": None} for *_, data in collection()],
        "label": [name for name, *_ in collection()],
    }
    features = datasets.Features({"image": datasets.Image(), "label": kind})
    datasets.Dataset.from_dict(columns, features=features).save_to_disk(root / "set")
    return root / "set"


def from_rows(root: Path, **wanted: Any) -> Stream:
    return open_stream(DataConfig(paths=(Path(f"hf:{saved(root, True)}"),), size=8, held_out=3), 5, **wanted)


def from_words(root: Path, **wanted: Any) -> Stream:
    return open_stream(DataConfig(paths=(Path(f"hf:{saved(root, False)}"),), size=8, held_out=3), 5, **wanted)


def from_streamed(root: Path, **wanted: Any) -> Stream:
    return open_stream(DataConfig(paths=(Path(f"hf-stream:{saved(root, True)}"),), size=8, held_out=3), 5, **wanted)


def prepared(root: Path, **layout: Any) -> Path:
    config = DataConfig(paths=(folders(root),), size=8, held_out=3, cached_crops=50)
    latents = Latents(MeanCoder(), "mean")
    plan = plan_of(config, 5, latents, Layout(**{"shard_size": 32, **layout}))
    prepare(root / "crops", plan, fresh_stream(config, 5), latents)
    return root / "crops"


def from_crops(root: Path, **wanted: Any) -> Stream:
    return open_stream(DataConfig(paths=(prepared(root),), size=8, held_out=3), 5, **wanted)


def from_crops_without_pixels(root: Path, **wanted: Any) -> Stream:
    return open_stream(DataConfig(paths=(prepared(root, pixels=False),), size=8, held_out=3), 5, **wanted)


def from_crops_of_the_run(root: Path, **wanted: Any) -> Stream:
    config = DataConfig(paths=(folders(root),), size=8, held_out=3, cached_crops=40)
    return open_stream(config, 5, cache=root / "crops", **wanted)


def from_sizes(root: Path, **wanted: Any) -> Stream:
    config = DataConfig(paths=(folders(root),), size=8, further_sizes=(4,), held_out=3)
    return open_stream(config, 5, batch=BATCH, **wanted)


KINDS = [
    *(from_folders, from_tars, from_rows, from_words, from_streamed),
    *(from_crops, from_crops_without_pixels, from_crops_of_the_run, from_sizes),
]

pytestmark = pytest.mark.filterwarnings("ignore:skipped from training")


@pytest.fixture(params=KINDS, ids=lambda opened: opened.__name__)
def opened(request: pytest.FixtureRequest) -> Opened:
    return request.param


# ------------------------------------------------------------------------------------------------------------ the laws


def test_labels_follow_their_images_in_every_order_thread_and_rank(opened: Opened, tmp_path: Path) -> None:
    stream = opened(tmp_path, wants={"images", "labels"})
    assert stream.classes == CLASSES
    whole = [stream.batch(BATCH * k, BATCH) for k in range(10)]
    for batch in whole:
        assert batch.labels is not None
        assert batch.labels.dtype == torch.int64
        assert batch.labels.tolist() == labels_of(batch.need("images"))
    assert {int(label) for batch in whole for label in batch.need("labels")} == {0, 1, 2}

    other = opened(tmp_path, wants={"images", "labels"})  # as another process opens it
    with ThreadPoolExecutor(4) as pool:
        ranks = list(pool.map(lambda k: other.batch(3 * k, 3), reversed(range(20))))[::-1]
    for k, batch in enumerate(whole):
        for rank in range(2):
            half, rows = ranks[2 * k + rank], batch.rows(slice(3 * rank, 3 * rank + 3))
            assert torch.equal(half.need("labels"), rows.need("labels"))
            assert torch.equal(half.need("images"), rows.need("images"))


def test_only_what_was_asked_for_comes(opened: Opened, tmp_path: Path) -> None:
    both = opened(tmp_path, wants={"images", "labels"}).batch(3, 3)
    alone = opened(tmp_path, wants={"labels"}).batch(3, 3)
    assert alone.images is None
    assert alone.size == 3
    assert torch.equal(alone.need("labels"), both.need("labels"))
    assert opened(tmp_path).batch(3, 3).labels is None
    with pytest.raises(RacError, match="the batch holds no images; include 'images' in the stream's wants"):
        alone.need("images")


def test_labels_and_latents_come_without_a_pixel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pictures may even be gone. A cache read for latents decoded 16 pictures for a batch of 16."""
    from rac.data import stream as module

    folder = prepared(tmp_path, pixels=False)
    expected = CachedStream(folder, 5).batch(0, 16)
    read: list[Any] = []
    picture = module.read_picture
    monkeypatch.setattr(module, "read_picture", lambda *a, **k: (read.append(a), picture(*a, **k))[1])
    batch = CachedStream(folder, 5, wants={"latents", "labels"}).batch(0, 16)
    assert len(read) == 0
    assert batch.images is None
    assert torch.equal(batch.need("latents"), expected.need("latents"))
    assert torch.equal(batch.need("labels"), expected.need("labels"))
    for file in (tmp_path / "photos").rglob("*.png"):
        file.unlink()
    assert torch.equal(CachedStream(folder, 5, wants={"labels"}).batch(0, 16).need("labels"), batch.need("labels"))


# ----------------------------------------------------------------------------------------------------------- posterior


def sampling(folder: Path, rng_seed: int = 5, posterior: Any = "sample") -> CachedStream:
    latents = Latents(MeanCoder(), "mean", posterior=posterior)
    return CachedStream(folder, rng_seed, wants={"latents"}, latents=latents)


def test_samples_of_the_posterior_depend_on_seed_and_draw_alone(tmp_path: Path) -> None:
    folder = prepared(tmp_path, moments=True)
    whole = sampling(folder).batch(0, 120).need("latents")
    one_by_one = [sampling(folder).batch(draw, 1).need("latents") for draw in range(119, -1, -1)][::-1]
    assert torch.equal(torch.cat(one_by_one), whole)
    assert not torch.equal(sampling(folder, 6).batch(0, 120).need("latents"), whole)
    mean = sampling(folder, posterior="mean").batch(0, 120).need("latents")
    noise = (whole - mean) / 0.5
    assert abs(float(noise.mean())) < 0.1
    assert float(noise.std()) == pytest.approx(1, abs=0.1)
    epochs = noise[:50].mean((1, 2, 3)), noise[50:100].mean((1, 2, 3))
    assert not set(epochs[0].tolist()) & set(epochs[1].tolist()), "new samples in each epoch"


def test_means_of_moments_are_the_latents_that_encoding_gives(tmp_path: Path) -> None:
    folder = prepared(tmp_path, moments=True)
    latents = Latents(MeanCoder(), "mean")
    batch = CachedStream(folder, 5, wants={"images", "latents"}, latents=latents).batch(0, 50)
    torch.testing.assert_close(batch.need("latents"), MeanCoder().encode(batch.need("images")).detach())


def test_a_run_that_samples_prepares_moments(tmp_path: Path) -> None:
    config = DataConfig(paths=(folders(tmp_path),), size=8, held_out=3, cached_crops=40)
    latents = Latents(MeanCoder(), "mean", posterior="sample")
    stream = open_stream(config, 5, wants={"latents", "labels"}, cache=tmp_path / "crops", latents=latents)
    one, two = stream.batch(0, 40), stream.batch(40, 40)
    assert one.images is None
    assert not {row.numpy().tobytes() for row in one.need("latents")} & {
        row.numpy().tobytes() for row in two.need("latents")
    }


def test_what_a_folder_lacks_is_said(tmp_path: Path) -> None:
    folder = prepared(tmp_path)
    with pytest.raises(RacError, match=r"only the means of the posterior, which cannot be sampled; .* --moments"):
        sampling(folder)
    (tmp_path / "other").mkdir()
    moments = prepared(tmp_path / "other", moments=True)
    with pytest.raises(RacError, match="holds raw moments, of which only their coder can make latents"):
        CachedStream(moments, 5)
    config = DataConfig(paths=(tmp_path / "photos",), size=8, cached_crops=5)
    assert open_stream(config, cache=tmp_path / "plain").batch(0, 2).latents is None
    with pytest.raises(RacError, match=r"latents are needed, but .*plain holds none; .*rac cache --teacher"):
        CachedStream(tmp_path / "plain", wants={"latents"})
    with pytest.raises(RacError, match="latents are needed, but none are prepared"):
        open_stream(replace(config, cached_crops=0), wants={"latents"})


# ------------------------------------------------------------------------------------------------------------- choices


@pytest.mark.parametrize("opened", [from_folders, from_tars, from_rows, from_streamed], ids=lambda o: o.__name__)
@pytest.mark.parametrize(
    ("choice", "left"),
    [
        ({"classes": ("cat", "ant")}, ("ant", "cat")),
        ({"without_classes": ("ant",)}, ("bee", "cat")),
        ({"classes": ("ant", "bee"), "without_classes": ("bee",)}, ("ant",)),
    ],
)
def test_classes_are_chosen_and_left_out(opened: Opened, choice: Any, left: Any, tmp_path: Path) -> None:
    config = replace(opened(tmp_path).config, **choice)  # type: ignore[attr-defined]
    stream = open_stream(config, 5, wants={"images", "labels"})
    assert stream.classes == left
    batch = stream.batch(0, 60)
    seen = {CLASSES[label] for label in labels_of(batch.need("images"))}
    held_out = {CLASSES[label] for label in labels_of(stream.held_out())}
    assert seen == set(left)
    assert held_out <= set(left)
    assert [CLASSES.index(left[label]) for label in batch.need("labels")] == labels_of(batch.need("images"))


@pytest.mark.parametrize("opened", [from_folders, from_rows, from_streamed], ids=lambda o: o.__name__)
def test_an_unknown_class_is_refused_with_the_near_ones(opened: Opened, tmp_path: Path) -> None:
    config = opened(tmp_path).config  # type: ignore[attr-defined]
    with pytest.raises(RacError, match=r"there is no class 'cut'; did you mean cat\?"):
        open_stream(replace(config, classes=("cut",)))
    with pytest.raises(RacError, match="there is no class 'zebra'; there are ant, bee, cat"):
        open_stream(replace(config, without_classes=("zebra",)))


def test_pictures_without_a_class_are_refused_where_labels_are_asked_for(tmp_path: Path) -> None:
    root = folders(tmp_path) / "deep"
    (root / "top.png").write_bytes(encoded(200))
    config = DataConfig(paths=(root,), size=8, held_out=3)
    with pytest.raises(RacError, match=r"but 1 of the 22 pictures of deep belong to no class, such as top\.png"):
        open_stream(config, wants={"labels"})
    assert open_stream(config).batch(0, 4).labels is None
    assert open_stream(replace(config, classes=("ant", "bee")), wants={"labels"}).classes == ("ant", "bee")
    with pytest.raises(RacError, match=r"no picture of ant belongs to a class; .* give a folder of folders"):
        open_stream(DataConfig(paths=(root / "ant",), size=8), wants={"labels"})
    crops = replace(config, cached_crops=30)
    assert open_stream(crops, cache=tmp_path / "crops").batch(0, 4).labels is None
    with pytest.raises(RacError, match=r"but top\.png and perhaps others in .*crops belong to no class"):
        open_stream(crops, cache=tmp_path / "crops", wants={"labels"})


def test_classes_that_are_numbers_are_in_the_order_of_their_values() -> None:
    assert class_order(["10", "9", "b", "a", "002"]) == ("002", "9", "10", "a", "b")
