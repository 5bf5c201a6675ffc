"""A DGAE on the command line: every verb for coders takes one, and its noise is that of the seed and the name."""

from __future__ import annotations

import csv
import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from tiny import untrained_dgae

import rac
from rac.config import to_json
from rac.evaluate import Preprocessing, Protocol
from rac.integrations.export import read_description
from rac.latents import Statistics

Run = Callable[..., Any]


@pytest.fixture(scope="module")
def dgae_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dgae") / "noisy"
    rac.save(untrained_dgae(0.05, statistics=Statistics.of(0.1, 0.5)).eval(), folder)
    return folder


@pytest.fixture
def photos(tmp_path: Path, images) -> Path:  # type: ignore[no-untyped-def]
    """Two pictures of one size, equal pixel for pixel, and one of another size."""
    folder = tmp_path / "photos"
    folder.mkdir()
    for name in ("one", "twin"):
        rac.write_image(images(1, 18, 25), folder / f"{name}.png")
    rac.write_image(images(1, 32, 24, rng_seed=1), folder / "other.png")
    return folder


def test_the_seed_and_the_name_decide_the_noise(run: Run, dgae_dir: Path, photos: Path, tmp_path: Path) -> None:
    latents = tmp_path / "latents"
    assert run("encode", photos, "--model", dgae_dir, "--out", latents).code == 0
    assert len(load_file(latents / "one.safetensors")["latent"].shape) == 4

    def decoded(where: Path, *options: object) -> dict[str, bytes]:
        ran = run("decode", where, "--out", tmp_path / "out", *options)
        assert ran.code == 0, ran.err
        found = {path.name: path.read_bytes() for path in (tmp_path / "out").glob("*.png")}
        shutil.rmtree(tmp_path / "out")
        return found

    together = decoded(latents)
    assert len(together) == 3
    assert together["one.png"] != together["twin.png"]  # one latent, two names
    assert decoded(latents / "twin.safetensors") == {"twin.png": together["twin.png"]}
    assert decoded(latents, "--rng-seed", 0) == together
    other = decoded(latents, "--rng-seed", 5)
    assert all(other[name] != one for name, one in together.items())
    assert decoded(latents / "one.safetensors", "--rng-seed", 5, "--steps", 3) == {"one.png": other["one.png"]}
    assert decoded(latents / "one.safetensors", "--steps", 1) != {"one.png": together["one.png"]}


def test_reconstruct_gives_what_encode_and_decode_do(run: Run, dgae_dir: Path, photos: Path, tmp_path: Path) -> None:
    ran = run(
        "reconstruct", photos, "--model", dgae_dir, "--out", tmp_path / "strips", "--steps", 1, 3, "--rng-seed", 2
    )
    assert ran.code == 0, ran.err
    assert "3 steps" in ran.out
    assert run("encode", photos, "--model", dgae_dir, "--out", tmp_path / "latents").code == 0
    ran = run("decode", tmp_path / "latents", "--out", tmp_path / "decoded", "--rng-seed", 2, "--steps", 3)
    assert ran.code == 0, ran.err
    for name in ("one", "twin", "other"):
        whole = (tmp_path / "strips" / f"{name}-reconstruction.png").read_bytes()
        assert whole == (tmp_path / "decoded" / f"{name}.png").read_bytes()
        assert (tmp_path / "strips" / f"{name}-trajectory.png").is_file()
    rows = list(csv.DictReader((tmp_path / "strips" / "results.csv").open()))
    assert {row["evaluations"] for row in rows} == {"2", "4"}  # one to encode


def test_tiles_and_a_seed(run: Run, dgae_dir: Path, photos: Path, tmp_path: Path) -> None:
    assert run("encode", photos, "--model", dgae_dir, "--out", tmp_path / "latents", "--tile", 16).code == 0
    ran = run("decode", tmp_path / "latents", "--out", tmp_path / "decoded", "--tile", 16)
    assert ran.code == 0, ran.err
    assert "blended" in ran.err


@pytest.mark.slow
def test_evaluate_compare_cost_and_bench(run: Run, dgae_dir: Path, photos: Path, tmp_path: Path) -> None:
    protocol = tmp_path / "protocol.json"
    protocol.write_text(json.dumps(to_json(Protocol("tiny", Preprocessing(16, "centre"), metrics=("psnr",)))))
    common = ("--data", photos, "--protocol", protocol, "--steps", 1, 2, "--device", "cpu", "--no-pictures")
    ran = run("evaluate", "--model", dgae_dir, *common, "--out", tmp_path / "evaluated")
    assert ran.code == 0, ran.err
    assert "noisy, 2 steps" in ran.out
    other = tmp_path / "other"
    shutil.copytree(dgae_dir, other)
    ran = run("compare", dgae_dir, other, *common, "--out", tmp_path / "compared")
    assert ran.code == 0, ran.err
    rows = json.loads((tmp_path / "compared" / "comparison.json").read_text())["rows"]
    found = {row["label"]: row["result"]["per_image"]["psnr"] for row in rows}
    assert found["noisy, 2 steps"] == found["other, 2 steps"]  # the same noise for all coders
    ran = run("cost", dgae_dir, "--side", 64, "--format", "csv")
    rows = list(csv.DictReader(io.StringIO(ran.out)))
    assert [row["network"].split()[-1] for row in rows] == ["encoder", "field", "whole"]
    assert "at 3 steps" in rows[1]["note"]
    options = ("--size", 16, "--batch", 2, "--seconds", 0, "--jobs", "encode", "decode", "--precision", "fp32")
    ran = run("bench", dgae_dir, *options, "--threads", 1, "--format", "csv")
    assert ran.code == 0, ran.err
    assert "decode" in ran.out


@pytest.mark.slow
def test_export_takes_the_steps_of_decoding_and_noise_as_an_input(run: Run, dgae_dir: Path, tmp_path: Path) -> None:
    common = ("--format", "torch-export", "--out", tmp_path / "coder.pt2", "--size", 32)
    ran = run("export", dgae_dir, *common, "--steps", 2)
    assert ran.code == 0, ran.err
    assert "image -> latent" in ran.out
    assert "latent, noise -> image" in ran.out
    said = {part: read_description(tmp_path / f"coder-{part}.pt2") for part in ("encode", "decode")}
    assert {part: (one["steps"], one["noise"]) for part, one in said.items()} == {
        "encode": (None, None),
        "decode": (2, 3),
    }
    ran = run("export", dgae_dir, *common, "--part", "encode", "--steps", 2)
    assert ran.code == 2
    assert "encodes in one pass" in ran.err


def test_models_and_page_take_it(dgae_dir: Path, images) -> None:  # type: ignore[no-untyped-def]
    from rac.evaluate.one_image import Loaded, decode_noised, reconstruct

    shown = reconstruct(Loaded("dgae", rac.load(dgae_dir)), images(1, 18, 25), 2)
    assert shown.encoding is None
    assert shown.decoding is not None
    assert [one.evaluations for one in decode_noised(Loaded("dgae", rac.load(dgae_dir)), images(1, 16, 16), 0.3)] == [
        1,
        2,
        4,
    ]


@pytest.mark.parametrize("arguments", [("--steps", 0), ("--steps", "x"), ("--rng-seed", "x"), ("--solver", "sideways")])
def test_what_decode_refuses(
    run: Run, dgae_dir: Path, photos: Path, tmp_path: Path, arguments: tuple[object, ...]
) -> None:
    assert run("encode", photos / "one.png", "--model", dgae_dir, "--out", tmp_path).code == 0
    ran = run("decode", tmp_path / "one.safetensors", "--out", tmp_path / "out", *arguments)
    assert ran.code == 2
    assert not (tmp_path / "out").exists()
