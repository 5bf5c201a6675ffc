"""Reading references, keeping protocols, and results as files."""

from __future__ import annotations

import io
import json
import math
import tarfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from rac import RacError
from rac.coders.klvae import KLVAEConfig
from rac.evaluate.image_metrics import psnr
from rac.evaluate.image_sets import ImageSet, Preprocessing
from rac.evaluate.protocol import PROTOCOLS, Protocol, protocol_named
from rac.evaluate.reconstruction import evaluate
from rac.evaluate.result import Result
from rac.evaluate.suite import MetricSuite
from rac.images import from_pixels, to_pixels, write_image
from rac.representations import Features

PIXELS = Protocol("test", Preprocessing(24, "centre"))


class MeanColours(torch.nn.Module):
    """An extractor whose features one can compute by hand: the means of channels and of their squares."""

    width = 6
    label = "colours"
    spatial_width = None
    has_logits = False
    path = Path("none")

    def __call__(self, image: Tensor) -> Features:
        return Features(torch.cat([image.mean(dim=(2, 3)), image.square().mean(dim=(2, 3))], dim=1))


@pytest.fixture
def folder(tmp_path: Path, images: Callable[..., Tensor]) -> Path:
    """Twelve pictures of unequal sizes, some of them deeper."""
    (tmp_path / "pictures" / "deeper").mkdir(parents=True)
    for index in range(12):
        picture = images(1, 24 + index, 30, rng_seed=index)
        write_image(picture, tmp_path / "pictures" / ("deeper" if index % 3 else ".") / f"{index}.png")
    return tmp_path / "pictures"


def judged_by_colours(*metrics: str) -> tuple[Protocol, MetricSuite]:
    """A protocol of these metrics and "psnr", and a suite whose extractor stands in for the one it names."""
    protocol = replace(PIXELS, metrics=("psnr", *metrics), extractor="inception-768")
    return protocol, MetricSuite(protocol.metrics, extractor=MeanColours())


def evaluate_by_colours(coder, references: ImageSet, *metrics: str, **options) -> Result:
    protocol, suite = judged_by_colours(*metrics)
    return evaluate(coder, references, protocol, name="it", suite=suite, **options)


# ---------------------------------------------------------------------------------------------- references


def test_a_folder_and_a_tar_file_of_it_are_one_set(folder: Path, tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "pictures.tar", "w") as tar:
        for file in sorted(folder.rglob("*.png"), reverse=True):
            tar.add(file, file.relative_to(folder).as_posix())
    one = ImageSet.read([folder], PIXELS.preprocessing)
    other = ImageSet.read([tmp_path / "pictures.tar"], PIXELS.preprocessing)
    assert (one.names, one.hash, one.sizes) == (other.names, other.hash, {(24, 24)})
    assert one.name == "pictures"
    fewer = ImageSet.read([folder], PIXELS.preprocessing, count=5)
    assert fewer.names == one.names[:5]
    assert fewer.hash != one.hash


def test_the_hash_is_of_pixels_not_of_names_or_order(images) -> None:
    image = images(4, 8, 8)
    one, other = ImageSet.of(image, "one"), ImageSet.of(image.flip(0), "other")
    assert one.hash == other.hash
    assert ImageSet.of(image[:3], "fewer").hash != one.hash
    nearly = image.clone()
    nearly[0, 0, 0, 0] += 1 / 127.5
    assert ImageSet.of(nearly, "nearly").hash != one.hash


def test_batches_keep_order_and_never_mix_sizes(folder: Path) -> None:
    references = ImageSet.read([folder], Preprocessing())
    batches = list(references.batches(5))
    assert [name for batch in batches for name in batch.names] == list(references.names)
    assert all(len(batch.images) == 1 for batch in batches)
    assert len(references.sizes) == 12
    assert [len(batch.images) for batch in ImageSet.read([folder], PIXELS.preprocessing).batches(5)] == [5, 5, 2]


def test_large_sets_are_read_again(folder: Path, monkeypatch) -> None:
    kept = ImageSet.read([folder], PIXELS.preprocessing)
    monkeypatch.setattr("rac.evaluate.image_sets.KEEP_MB", 0)
    again = ImageSet.read([folder], PIXELS.preprocessing)
    assert again.hash == kept.hash
    for one, other in zip(kept.batches(7), again.batches(7), strict=True):
        assert torch.equal(one.images, other.images)


def test_preprocessing() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (50, 71, 3), dtype=np.uint8)
    picture = Image.fromarray(pixels)
    (whole,) = Preprocessing().cut(picture, "it")
    assert np.array_equal(whole, pixels)
    (centre,) = Preprocessing(50, "centre").cut(picture, "it")
    assert np.array_equal(centre, pixels[:, 10:60])
    tiles = Preprocessing(20, "tiles").cut(picture, "it")
    assert len(tiles) == 6
    assert np.array_equal(tiles[4], pixels[25:45, 25:45])
    small = [np.asarray(Preprocessing(16, "centre", resize).cut(picture, "it")[0]) for resize in ("bicubic", "box")]
    assert small[0].shape == (16, 16, 3)
    assert not np.array_equal(*small)


@pytest.mark.parametrize("size", [16, 20, 50])
def test_adm_crop_is_that_of_the_public_code(size: int) -> None:
    """The function of guided-diffusion's image_datasets.py, word for word but for names."""
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (50, 71, 3), dtype=np.uint8))
    theirs = picture
    while min(*theirs.size) >= 2 * size:
        theirs = theirs.resize(tuple(x // 2 for x in theirs.size), resample=Image.BOX)
    scale = size / min(*theirs.size)
    theirs = theirs.resize(tuple(round(x * scale) for x in theirs.size), resample=Image.BICUBIC)
    array = np.array(theirs)
    y, x = (array.shape[0] - size) // 2, (array.shape[1] - size) // 2
    (ours,) = Preprocessing(size, "adm").cut(picture, "it")
    assert np.array_equal(ours, array[y : y + size, x : x + size])


def test_bad_sets_are_refused(folder: Path, tmp_path: Path) -> None:
    empty, single = tmp_path / "empty", tmp_path / "single"
    empty.mkdir()
    single.mkdir()
    Image.new("L", (40, 40)).save(single / "one.png")
    for paths, framing, count, words in (
        ([tmp_path / "nowhere"], Preprocessing(), None, "nowhere does not exist"),
        ([empty], Preprocessing(), None, "empty holds no pictures"),
        ([single], Preprocessing(), None, "single has 1 image.*at least 2"),
        ([folder], Preprocessing(24, "none"), None, "24 x 24 and does not crop"),
        ([folder], Preprocessing(28, "centre"), None, "too small for images of 28 x 28"),
        ([folder], Preprocessing(24, "centre"), 13, "has 12 images, but the protocol asks for 13"),
    ):
        with pytest.raises(RacError, match=words):
            ImageSet.read(paths, framing, count)
    whole = (folder / "3.png").read_bytes()
    (folder / "3.png").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(RacError, match=r"3\.png is damaged"):
        ImageSet.read([folder], PIXELS.preprocessing)


def test_bad_preprocessings_are_refused() -> None:
    for words, arguments in {
        "crop 'left' is not known": (64, "left"),
        "crop centre needs a size": (None, "centre"),
        "size 0": (0, "centre"),
        "resize 'nearest' is not known": (64, "centre", "nearest"),
    }.items():
        with pytest.raises(RacError, match=words):
            Preprocessing(*arguments)  # type: ignore[arg-type]


# ----------------------------------------------------------------------------------------------- protocols


def test_named_protocols_are_themselves() -> None:
    assert {"pixels-64", "dev-64", "dev-128", "native", "imagenet-256"} <= PROTOCOLS.keys()
    assert all(protocol.name == name for name, protocol in PROTOCOLS.items())


@pytest.mark.parametrize(
    ("words", "changes"),
    [
        ("metric 'fid' is not known", {"metrics": ("fid",)}),
        ("names no extractor", {"metrics": ("kernel",)}),
        ("ms-ssim needs sides of at least 176", {"metrics": ("ms-ssim",)}),
        ("asks for no metrics", {"metrics": ()}),
        ("count 1", {"count": 1}),
        ("solver 'newton'", {"solver": "newton"}),
    ],
)
def test_bad_protocols_are_refused(words: str, changes: dict) -> None:
    with pytest.raises(RacError, match=words):
        replace(PIXELS, **changes)


def test_protocols_that_cannot_be_kept(one_layer_coder, images) -> None:
    references = ImageSet.of(images(5, 24, 24), "some")
    evaluate(one_layer_coder, references, replace(PIXELS, count=5, reference=references.hash), name="it")
    for words, changes in {
        "some has hash": {"reference": "0" * 64},
        "is for 6 images, but some has 5": {"count": 6},
        "needs the teacher's latents": {"latents": "teacher"},
        "teacher's latents": {"metrics": ("explained-variance",)},
        "RAC has no posterior": {"posterior": "sample"},
    }.items():
        with pytest.raises(RacError, match=words):
            evaluate(one_layer_coder, references, replace(PIXELS, **changes), name="it")
    vae = KLVAEConfig(widths=(4, 4), latent_channels=2).build().eval()
    with pytest.raises(RacError, match="no flow whose states"):
        evaluate(vae, references, replace(PIXELS, metrics=("state-round-trip",)), name="it")


def test_too_few_or_unlike_images_never_make_a_silent_number(one_layer_coder, images, folder) -> None:
    some = ImageSet.of(images(6, 24, 24), "some")
    with pytest.raises(RacError, match="6 features needs more than 6 images, not 6"):
        evaluate_by_colours(one_layer_coder, some, "frechet")
    with pytest.raises(RacError, match="no spatial features"):
        evaluate_by_colours(one_layer_coder, some, "spatial-frechet")
    with pytest.raises(RacError, match="no Inception Score"):
        evaluate_by_colours(one_layer_coder, some, "score")
    native = ImageSet.read([folder], Preprocessing())
    with pytest.raises(RacError, match="24 x 30 and of 25 x 30"):
        evaluate_by_colours(one_layer_coder, native, "kernel")
    tiny = ImageSet.of(images(3, 8, 24), "tiny")
    with pytest.raises(RacError, match="ssim needs sides of at least 11 pixels, tiny has images of 8"):
        evaluate(one_layer_coder, tiny, replace(PIXELS, preprocessing=Preprocessing()), name="it")


# ------------------------------------------------------------------------------------------------- results


def test_a_coder_that_loses_nothing(one_layer_coder, folder, tmp_path) -> None:
    references = ImageSet.read([folder], PIXELS.preprocessing)
    metrics = ("ssim", "frechet", "kernel", "precision-recall")
    result = evaluate_by_colours(one_layer_coder, references, *metrics, command="rac evaluate")
    assert result.metrics["psnr"] == math.inf
    assert result.metrics["ssim"] == pytest.approx(1)
    assert result.metrics["rFID-colours"] == pytest.approx(0, abs=1e-12)
    assert result.metrics["precision-colours"] == result.metrics["recall-colours"] == 1
    assert not {"FID", "rFID", "KID"} & result.metrics.keys()
    assert (result.reference.count, result.reference.hash) == (12, references.hash)
    assert result.images == references.names
    result.save(tmp_path / "result.json")
    assert Result.load(tmp_path / "result.json") == result
    data = json.loads((tmp_path / "result.json").read_text(), parse_constant=lambda name: pytest.fail(name))
    assert data["protocol"]["preprocessing"] == {"size": 24, "crop": "centre", "resize": "bicubic"}
    assert data["metrics"]["psnr"] == "inf"
    assert data["command"] == "rac evaluate"
    assert {"rac", "torch", "python"} <= data["versions"].keys()


def test_batches_and_order_do_not_matter(make_rac, images) -> None:
    coder, image = make_rac(lively=0.05).eval(), images(7, 24, 24)
    results = [
        evaluate_by_colours(coder, ImageSet.of(some, "some"), "ssim", "frechet", "kernel", batch=batch)
        for some, batch in ((image, 7), (image, 1), (image.flip(0), 3))
    ]
    for other in results[1:]:
        assert other.reference.hash == results[0].reference.hash
        assert other.metrics == pytest.approx(results[0].metrics, rel=1e-5, abs=1e-6)
    assert results[1].per_image["psnr"] == pytest.approx(results[0].per_image["psnr"])


def test_figures_are_those_of_the_written_files(make_rac, images) -> None:
    coder, image = make_rac(lively=0.05).eval(), from_pixels(to_pixels(images(1, 24, 24)))
    references = ImageSet.of(torch.cat([image, image]), "two")
    protocol = replace(PIXELS, metrics=("psnr",), steps=2)
    result = evaluate(coder, references, protocol, name="it")
    with torch.no_grad():
        made = coder.reconstruct(image, 2)
    assert result.metrics["psnr"] == pytest.approx(float(psnr(from_pixels(to_pixels(made)), image)), abs=1e-4)
    assert result.steps == 2
    exact = evaluate(coder, references, replace(protocol, rounded=False), name="it")
    assert exact.metrics["psnr"] == pytest.approx(float(psnr(made, image)), abs=1e-4)
    assert exact.metrics != result.metrics
    assert evaluate(coder, references, replace(protocol, steps=None), name="it").steps == 4


def test_solver_grid_and_dtype_are_obeyed(make_rac, images) -> None:
    coder, references = make_rac(lively=0.05).eval(), ImageSet.of(images(2, 24, 24), "some")
    found = {
        evaluate(coder, references, replace(PIXELS, metrics=("psnr",), rounded=False, **change), name="it").metrics[
            "psnr"
        ]
        for change in ({}, {"solver": "heun"}, {"shift": 3.0}, {"steps": 8}, {"dtype": "bfloat16"})
    }
    assert len(found) == 5
    with torch.autocast("cpu", dtype=torch.bfloat16):
        outside = evaluate(coder, references, replace(PIXELS, metrics=("psnr",), rounded=False), name="it")
    assert outside.metrics["psnr"] in found


def test_a_teacher_and_its_latents(make_rac, images) -> None:
    torch.manual_seed(0)
    teacher = KLVAEConfig(widths=(4, 4, 4), latent_channels=4).build().eval()
    coder, references = make_rac(lively=0.05).eval(), ImageSet.of(images(3, 24, 24), "some")
    protocol = replace(PIXELS, metrics=("psnr", "explained-variance", "state-round-trip"))
    own = evaluate(coder, references, protocol, name="it", teacher=teacher)
    assert len(own.per_channel["explained variance"]) == 4
    assert own.metrics["explained variance"] == pytest.approx(np.mean(own.per_channel["explained variance"]))
    assert own.metrics["psnr, state round trip"] > own.metrics["psnr"]
    theirs = evaluate(coder, references, replace(protocol, latents="teacher"), name="it", teacher=teacher)
    assert theirs.metrics["psnr"] != own.metrics["psnr"]
    assert evaluate(teacher, references, PIXELS, name="teacher").steps is None


def test_posterior_samples_belong_to_images(images) -> None:
    torch.manual_seed(0)
    vae = KLVAEConfig(widths=(4, 4), latent_channels=2).build().eval()
    references = ImageSet.of(images(4, 24, 24), "some")
    sampled = replace(PIXELS, posterior="sample", metrics=("psnr",))
    one, other = (evaluate(vae, references, sampled, name="it", batch=size) for size in (4, 1))
    assert one.per_image["psnr"] == pytest.approx(other.per_image["psnr"], abs=1e-4)
    again = evaluate(vae, references, replace(sampled, rng_seed=1), name="it")
    mean = evaluate(vae, references, replace(sampled, posterior="mean"), name="it")
    assert len({one.metrics["psnr"], again.metrics["psnr"], mean.metrics["psnr"]}) == 3


def test_nan_is_told(make_rac, images) -> None:
    coder = make_rac()
    torch.nn.init.constant_(next(coder.field.parameters()), math.nan)
    with pytest.raises(RacError, match="NaN"):
        evaluate(coder, ImageSet.of(images(2, 24, 24), "some"), PIXELS, name="it")


def test_progress_and_reference_features_are_kept(one_layer_coder, images) -> None:
    class Counted(MeanColours):
        seen = 0

        def __call__(self, image: Tensor) -> Features:
            self.seen += len(image)
            return super().__call__(image)

    protocol, suite = judged_by_colours("kernel")
    suite, references = replace(suite, extractor=Counted()), ImageSet.of(images(8, 24, 24), "some")
    told = []
    for _ in range(2):
        options = {"suite": suite, "batch": 3, "progress": lambda *done_of_all: told.append(done_of_all)}
        evaluate(one_layer_coder, references, protocol, name="it", **options)
    assert told[:3] == [(3, 8), (6, 8), (8, 8)]
    assert suite.extractor.seen == 3 * 8
    with pytest.raises(RacError, match="suite has the metrics"):
        evaluate(one_layer_coder, references, PIXELS, name="it", suite=suite)


def test_pictures_of_other_modes_are_converted(tmp_path: Path) -> None:
    for index, mode in enumerate(("L", "RGBA", "CMYK")):
        buffer = io.BytesIO()
        Image.new(mode, (30, 30)).save(buffer, "TIFF")
        (tmp_path / f"{index}.tiff").write_bytes(buffer.getvalue())
    assert len(ImageSet.read([tmp_path], PIXELS.preprocessing)) == 3


def test_results_and_protocols_of_earlier_versions_are_read(one_layer_coder, images, tmp_path) -> None:
    result = evaluate(one_layer_coder, ImageSet.of(images(2, 24, 24), "two"), PIXELS, name="it")
    result.save(tmp_path / "new.json")
    data = json.loads((tmp_path / "new.json").read_text())
    del data["compared_with"]
    former = {"metrics": "figures", "weight_files": "judges", "preprocessing": "framing"}
    data["protocol"] = {former.get(key, key): value for key, value in data["protocol"].items()}
    data = {former.get(key, key): value for key, value in data.items()}
    assert {"figures", "judges"} <= data.keys()
    (tmp_path / "old.json").write_text(json.dumps(data))
    (tmp_path / "protocol.json").write_text(json.dumps(data["protocol"]))
    assert Result.load(tmp_path / "old.json") == result
    assert protocol_named(str(tmp_path / "protocol.json")) == PIXELS
    repeated = replace(PIXELS, reference=result.reference.hash)
    assert protocol_named(str(tmp_path / "old.json")) == repeated
