"""rac evaluate, rac compare and rac cost: tables, results and pictures of tiny coders; bad data is named."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

import rac
from rac import progress
from rac.config import to_json
from rac.evaluate.image_sets import ImageSet, Preprocessing
from rac.evaluate.protocol import Protocol
from rac.evaluate.reconstruction import evaluate
from rac.evaluate.result import Result

TINY = Protocol("tiny", Preprocessing(24, "centre"), metrics=("psnr", "ssim"))


@pytest.fixture
def pictures(tmp_path: Path, images) -> Path:  # type: ignore[no-untyped-def]
    """A folder of five pictures of several sizes, all at least 24 pixels a side."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    for index, (height, width) in enumerate(((24, 24), (40, 32), (32, 40), (36, 36), (24, 50))):
        rac.write_image(images(1, height, width, rng_seed=index), folder / f"{index}.png")
    return folder


@pytest.fixture
def protocol(tmp_path: Path) -> Path:
    """A protocol file for pictures that small."""
    path = tmp_path / "tiny.json"
    path.write_text(json.dumps(to_json(TINY)))
    return path


def fast(*more: object) -> tuple[object, ...]:
    """Options that leave the pictures out."""
    return (*more, "--no-pictures", "--robustness", 0, "--device", "cpu")


# ------------------------------------------------------------------------------------------ evaluate


def test_evaluate(tmp_path: Path, run, coder_dir: Path, pictures: Path, protocol: Path, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    """One result for each number of steps, the same as the library's, and a report; no word on stderr."""
    monkeypatch.setattr(progress, "SECONDS", float("inf"))  # on a slow machine it would say how far it is
    out = tmp_path / "out"
    options = ("--model", coder_dir, "--data", pictures, "--protocol", protocol, "--steps", 1, 3, "--device", "cpu")
    ran = run("evaluate", *options, "--out", out)
    assert ran.code == 0, ran
    assert not ran.err
    references = ImageSet.read([pictures], TINY.preprocessing)
    for steps, name in ((1, "1-step"), (3, "3-steps")):
        (path,) = (out / "results").glob(f"*-{name}.json")
        result = Result.load(path)
        again = evaluate(rac.load(coder_dir), references, replace(TINY, steps=steps), name="again", batch=2)
        assert result.steps == steps
        assert result.reference == again.reference
        assert result.metrics["psnr"] == pytest.approx(again.metrics["psnr"], abs=1e-4)
        assert len(result.per_channel["explained variance"]) == 4
        assert f"{result.metrics['psnr']:.2f}" in ran.out
    for name in ("quality-against-steps", "quality-against-macs", "best", "worst", "step-by-step", "latents"):
        with Image.open(out / f"{name}.png") as picture:
            assert min(picture.size) > 100, name
    page = (out / "report.html").read_text(encoding="utf-8")
    assert "http" not in page
    for words in (
        "Quality and cost",
        "Robustness to latent noise",
        "Best and worst",
        "Trajectories",
        references.hash[:16],
    ):
        assert words in page


def test_a_result_can_be_repeated_from_its_own_file(tmp_path, run, coder_dir, pictures, protocol) -> None:  # type: ignore[no-untyped-def]
    """A result's JSON is a protocol file, too."""
    options = ("--model", coder_dir.parent / "teacher", "--data", pictures)
    assert run("evaluate", *fast(*options, "--protocol", protocol, "--out", tmp_path / "a")).code == 0
    (first,) = (tmp_path / "a" / "results").iterdir()
    assert run("evaluate", *fast(*options, "--protocol", first, "--out", tmp_path / "b")).code == 0
    (second,) = (tmp_path / "b" / "results").iterdir()
    assert Result.load(first).per_image == Result.load(second).per_image
    (pictures / "0.png").unlink()
    other = run("evaluate", *fast(*options, "--protocol", first, "--out", tmp_path / "c"))
    refused(other, "has hash", "give those")


# ------------------------------------------------------------------------------------------ compare


def test_compare(tmp_path: Path, run, coder_dir: Path, pictures: Path, protocol: Path) -> None:  # type: ignore[no-untyped-def]
    out, teacher = tmp_path / "out", coder_dir.parent / "teacher"
    options = ("--data", pictures, "--protocol", protocol, "--steps", 1, 2, "--latents", "own", "teacher")
    ran = run("compare", coder_dir, teacher, *options, "--robustness", 2, "--out", out, "--device", "cpu")
    assert ran.code == 0, ran
    told = json.loads((out / "comparison.json").read_text())
    rows = {row["label"].split(", ", 1)[-1]: row for row in told["rows"]}
    assert list(rows) == ["1 step", "2 steps", "1 step, teacher's latents", "2 steps, teacher's latents", "teacher"]
    cost = rows["2 steps"]["cost"]
    assert cost["decoding_macs"] == 2 * cost["macs_per_step"]
    assert cost["macs"] == 2 * cost["decoding_macs"]
    assert rows["1 step"]["cost"]["macs_per_step"] == cost["macs_per_step"]
    assert all(row["result"]["images_per_second"] > 0 for row in told["rows"])
    table = (out / "table.md").read_text(encoding="utf-8").splitlines()
    assert len(table) == 2 + len(rows)
    assert len({len(line) for line in table}) == 1
    (curve,) = told["robustness"]
    assert [name.split(", ")[-1] for name in curve["metrics"]["psnr"]] == ["teacher", "1 step", "2 steps"]
    assert len(list(out.glob("robustness-*.png"))) == 2


def test_compare_needs_coders(run) -> None:  # type: ignore[no-untyped-def]
    refused(run("compare"), "name the coders")


# ------------------------------------------------------------------------------------------ bad data and options


def refused(ran, *words: object) -> None:  # type: ignore[no-untyped-def]
    """Code 2, one line on stderr with `words`, and no figure anywhere."""
    assert ran.code == 2, ran
    assert ran.err.startswith("rac: error: "), ran.err
    assert ran.err.count("\n") == 1, ran.err
    for word in words:
        assert str(word) in ran.err, ran.err
    assert not ran.out


def empty(folder: Path) -> None:
    pass


def one_image(folder: Path) -> None:
    Image.new("RGB", (64, 64)).save(folder / "only.png")


def mixed_sizes(folder: Path) -> None:
    Image.new("RGB", (24, 24)).save(folder / "a.png")
    Image.new("RGB", (24, 32)).save(folder / "b.png")


def corrupt(folder: Path) -> None:
    mixed_sizes(folder)
    (folder / "broken.png").write_bytes((folder / "a.png").read_bytes()[:40])


def too_small(folder: Path) -> None:
    mixed_sizes(folder)
    Image.new("RGB", (12, 12)).save(folder / "small.png")


UNCROPPED = Protocol("uncropped", Preprocessing(24, "none"))
BAD_DATA: dict[str, tuple[Callable[[Path], None], Protocol, str]] = {
    "empty": (empty, TINY, "holds no pictures"),
    "one image": (one_image, TINY, "too few"),
    "mixed sizes": (mixed_sizes, UNCROPPED, "b.png is 24 x 32"),
    "corrupt": (corrupt, TINY, "broken.png"),
    "too small": (too_small, TINY, "small.png is 12 x 12"),
}


@pytest.mark.parametrize("kind", BAD_DATA)
def test_bad_data(tmp_path: Path, run, coder_dir: Path, kind: str) -> None:  # type: ignore[no-untyped-def]
    make, asked, words = BAD_DATA[kind]
    folder, file = tmp_path / "data", tmp_path / "protocol.json"
    folder.mkdir()
    make(folder)
    file.write_text(json.dumps(to_json(asked)))
    out = tmp_path / "out"
    refused(run("evaluate", "--model", coder_dir, "--data", folder, "--protocol", file, "--out", out), words)
    assert not out.exists()


def test_fewer_images_than_features(tmp_path: Path, run, coder_dir: Path, images) -> None:  # type: ignore[no-untyped-def]
    pytest.importorskip("efficientnet_lite_pytorch", reason="the extractor's packages are not installed")
    for index in range(2):
        rac.write_image(images(1, 64, 64, rng_seed=index), tmp_path / f"{index}.png")
    ran = run(
        "evaluate", "--model", coder_dir, "--data", tmp_path, "--protocol", "tiles-64-lite", "--out", tmp_path / "o"
    )
    refused(ran, "1280 features", "not 2")


def test_bad_options(tmp_path: Path, run, coder_dir: Path, pictures: Path, protocol: Path) -> None:  # type: ignore[no-untyped-def]
    options = ("--data", pictures, "--protocol", protocol)
    refused(run("evaluate", "--model", coder_dir, "--data", pictures, "--protocol", "dev"), "dev", "pixels-64")
    refused(run("evaluate", "--model", coder_dir, *options, "--count", 99), "99")
    refused(run("evaluate", "--model", coder_dir, *options, "--steps", 0), "steps 0")
    refused(run("evaluate", "--model", coder_dir, *options, "--batch", 0), "--batch 0")
    refused(run("evaluate", "--model", coder_dir, "--data", tmp_path / "none"), "does not exist")
    refused(run("compare", coder_dir, coder_dir, *options), "given twice")
    refused(run("evaluate", "--model", coder_dir.parent / "teacher", *options, "--latents", "teacher"), "teacher")
    (tmp_path / "half.json").write_text('{"name": "half", "preprocessing": {"size": 24}, "colour": 1}')
    refused(run("evaluate", "--model", coder_dir, "--data", pictures, "--protocol", tmp_path / "half.json"), "colour")


# ------------------------------------------------------------------------------------------ cost


@pytest.mark.slow
def test_cost_of_everything(run) -> None:  # type: ignore[no-untyped-def]
    """The figures of the papers and of the recipes, as JSON."""
    ran = run("cost", "--format", "json")
    assert ran.code == 0
    rows = {row["network"]: row for section in json.loads(ran.out).values() for row in section}
    assert rows["SD-VAE f8d4 decoder"]["parameters"] == 49_490_179
    assert rows["nano field"]["parameters"] == 1_369_988
    assert rows["nano field"]["macs"] / 1e9 == pytest.approx(17.86, abs=0.005)
    assert {"klvae-f8d4 whole", "paper field", "ldm field at 0.1"} <= rows.keys()


@pytest.mark.parametrize("kind", ["table", "markdown", "csv"])
def test_cost_of_named_coders(run, coder_dir: Path, kind: str) -> None:  # type: ignore[no-untyped-def]
    ran = run("cost", coder_dir, coder_dir.parent / "teacher", "--side", 64, "--format", kind)
    assert ran.code == 0
    for network in ("field", "encoder", "decoder", "whole"):
        assert network in ran.out
    assert "4 steps" in ran.out


def test_cost_of_an_odd_side(run) -> None:  # type: ignore[no-untyped-def]
    refused(run("cost", "--side", 100), "100")
