"""`rac evaluate --generated`: folders of `rac generate`, other folders, latents, and what is refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny import Colours, untrained_generator

import rac
from rac.coders.klvae import KLVAEConfig
from rac.config import to_json
from rac.evaluate.image_sets import Preprocessing
from rac.evaluate.protocol import Protocol
from rac.evaluate.suite import MetricSuite

SETS = Protocol("sets", Preprocessing(16, "centre"), metrics=("frechet", "kernel"), extractor="inception-768")


@pytest.fixture
def place(tmp_path: Path, run, images, make_rac, monkeypatch: pytest.MonkeyPatch) -> Path:  # type: ignore[no-untyped-def]
    """A generator's images decoded in one and two steps with their latents, real pictures, a cache, protocols."""
    torch.manual_seed(0)
    teacher = KLVAEConfig(widths=(8, 8, 8), latent_channels=4, norm_groups=4).build()
    rac.save(teacher, tmp_path / "teacher")
    rac.save(make_rac(lively=0.05, spec=teacher.spec), tmp_path / "rac")
    untrained_generator(teacher.spec, ("cat", "dog"), str(tmp_path / "teacher")).save(tmp_path / "g")
    for k in range(24):
        path = tmp_path / "real" / f"{k}.png"
        path.parent.mkdir(exist_ok=True)
        rac.write_image(images(1, 40, 42, k), path)
    for protocol in (SETS, replace(SETS, name="pixels", metrics=("psnr",))):
        (tmp_path / f"{protocol.name}.json").write_text(json.dumps(to_json(protocol)))
    monkeypatch.setenv("RAC_CACHE_DIR", str(tmp_path / "features"))
    (tmp_path / "weights").write_bytes(b"weights")
    judge = Colours(tmp_path / "weights")
    monkeypatch.setattr(MetricSuite, "load", lambda metrics, extractor, device: MetricSuite(metrics, extractor=judge))
    return tmp_path


@pytest.fixture
def made(place: Path, run) -> Path:  # type: ignore[no-untyped-def]
    asked = ("--coder", place / "rac", "--count", 10, "--decode-steps", 1, 2, "--guidance", 2, "--latents")
    assert run("generate", place / "g", *asked, "--out", place / "made").code == 0
    return place / "made"


def evaluate(run, place: Path, *options: object):  # type: ignore[no-untyped-def]
    asked = ("--reference", place / "real", "--protocol", place / "sets.json", "--out", place / "out")
    return run("evaluate", *asked, *options)


def test_a_folder_of_rac_generate(run, place: Path, made: Path) -> None:  # type: ignore[no-untyped-def]
    cached = ("--data.paths", place / "real", "--data.size", 16, "--data.held-out", 2, "--crops", 32, "--moments")
    assert run("cache", "--teacher", place / "teacher", *cached, "--out", place / "cache").code == 0
    ran = evaluate(run, place, "--generated", made, "--latent-reference", place / "cache")
    assert ran.code == 0, ran
    table = (place / "out" / "table.md").read_text(encoding="utf-8").splitlines()
    assert "gFID-colours" in table[0]
    assert "latent FD, 4 x 1 x 1" in table[0]
    assert [line.split("|")[1].strip().split("/")[-1] for line in table[2:]] == [
        "images-1",
        "images-2",
        "real beside real",
    ]
    results = [json.loads(path.read_text()) for path in sorted((place / "out" / "results").iterdir())]
    assert [one["made_by"]["evaluations"] for one in results] == [4, 4]
    assert results[0]["made_by"]["sampling"]["guidance"] == 2
    assert results[0]["latents"]["count"] == 10
    assert results[0]["metrics"] != results[1]["metrics"]


def test_any_folder_of_pictures_and_moments(run, place: Path, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    import numpy as np

    frechet = replace(SETS, name="frechet", metrics=("frechet",))
    (place / "frechet.json").write_text(json.dumps(to_json(frechet)))
    np.savez(place / "moments.npz", mu=np.zeros(6), sigma=np.eye(6))
    options = ("--protocol", place / "frechet.json", "--reference", place / "moments.npz")
    ran = evaluate(run, place, "--generated", place / "real", *options)
    assert ran.code == 0, ran
    (line,) = (place / "out" / "table.md").read_text(encoding="utf-8").splitlines()[2:]
    assert line.split("|")[-3].strip() == "24"


BAD: dict[str, tuple[tuple[object, ...], str]] = {
    "no reference": (("--generated", "{}/real"), "give --reference"),
    "a folder that is not there": (("--generated", "{}/none", "--reference", "{}/real"), "none"),
    "a folder twice": (("--generated", "{}/real", "{}/real", "--reference", "{}/real"), "is given twice"),
    "a reference that is not there": (("--generated", "{}/real", "--reference", "{}/none.npz"), "none.npz"),
    "steps of coders": (("--generated", "{}/real", "--reference", "{}/real", "--steps", 3), "--steps concerns coders"),
    "a coder": (("--generated", "{}/real", "--reference", "{}/real", "--model", "taef2"), "--model concerns coders"),
    "data": (("--generated", "{}/real", "--reference", "{}/real", "--data", "{}/real"), "--data concerns coders"),
    "pixels alone": (
        ("--generated", "{}/real", "--reference", "{}/real", "--protocol", "{}/pixels.json"),
        "has no metrics of sets",
    ),
    "more images than there are": (
        ("--generated", "{}/real", "--reference", "{}/real", "--count", 99),
        "asks for 99",
    ),
    "too few for the features": (("--generated", "{}/real", "--reference", "{}/real", "--count", 5), "more than 6"),
    "latents that were not kept": (
        ("--generated", "{}/real", "--reference", "{}/real", "--latent-reference", "{}/real"),
        "has no latents beside it",
    ),
    "latents of nothing": (("--latent-reference", "{}/real"), "has no use without --generated"),
    "an empty batch": (("--generated", "{}/real", "--reference", "{}/real", "--batch", 0), "--batch 0"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_line(run, place: Path, name: str) -> None:  # type: ignore[no-untyped-def]
    options, words = BAD[name]
    given = [str(one).replace("{}", str(place)) for one in options]
    protocol = () if "--protocol" in given else ("--protocol", place / "sets.json")
    ran = run("evaluate", *given, *protocol, "--out", place / "out")
    assert (ran.code, ran.err.count("\n")) == (2, 1), ran
    assert words in ran.err
    assert not (place / "out").exists()
