"""Generators in the verbs that were made for coders: listed, counted, measured, or refused in one line."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

import rac
from rac import hub
from rac.commands import bench
from rac.commands.models import generator_table
from rac.evaluate.cost import count
from rac.recipes import RECIPES


@pytest.fixture
def shipped(generator_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The generator as if it shipped with the package, under the name "tiny-sit"."""
    shutil.copytree(generator_dir, tmp_path / "weights" / "tiny-sit")
    monkeypatch.setattr(hub, "SHIPPED", tmp_path / "weights")
    return tmp_path / "weights" / "tiny-sit"


def test_models_lists_generators(run, shipped: Path, generator_dir: Path) -> None:  # type: ignore[no-untyped-def]
    parameters = sum(one.numel() for one in rac.load_generator(generator_dir).parameters())
    cells = dict(zip(generator_table().columns, generator_table().rows[0], strict=True))
    assert cells["name"] == "tiny-sit"
    assert (cells["latent"], cells["images"], cells["classes"]) == ("f4d4", "16 x 16", "3")
    assert cells["parameters"] == f"{parameters:,}"
    assert cells["sampling"] == "2 euler steps, guidance 1.5"
    assert "tiny-sit" in run("models").out


def test_no_heading_where_no_generator_ships(run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.setattr(hub, "SHIPPED", tmp_path)
    assert "generators" not in run("models").out


def test_a_shipped_generator_is_no_coder(run, shipped: Path, photo: Path, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    ran = run("reconstruct", photo, "--model", "tiny-sit", "--out", tmp_path / "out")
    assert (ran.code, ran.err.count("\n")) == (2, 1)
    assert "holds a generator of latents, not a coder" in ran.err


def test_cost_of_generators_coders_and_recipes(run, generator_dir: Path, coder_dir: Path) -> None:  # type: ignore[no-untyped-def]
    ran = run("cost", generator_dir, coder_dir, "sit-64", "--side", 64, "--format", "json")
    assert ran.code == 0, ran
    rows = {row["network"]: row for section in json.loads(ran.out).values() for row in section}
    generator = rac.load_generator(generator_dir)
    found = rows[f"{generator_dir} field"]
    # 64 pixels are 16 x 16 latents of factor 4.
    assert found["macs"] == count(generator.field, (1, 4, 16, 16), (1,)).macs
    assert found["note"] == "latents 4 x 16 x 16; per evaluation; 2 euler steps, guidance 1.5"
    recipe = RECIPES["sit-64"][1].costs("sit-64", 64)[0]
    assert (rows["sit-64 field"]["parameters"], rows["sit-64 field"]["macs"]) == (recipe.parameters, recipe.cost.macs)
    assert f"{coder_dir} field" in rows
    ran = run("cost", "none-such")
    assert ran.code == 2
    assert "there is no model 'none-such'" in ran.err


def test_bench_of_a_generator(run, generator_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.setattr(bench, "best_convolution", lambda setting: 100.0)
    quick = ("--size", 16, "--batch", 2, "--seconds", 0, "--device", "cpu", "--threads", 1)
    ran = run("bench", generator_dir, *quick, "--precision", "fp32", "--steps", 3, "--format", "json")
    assert ran.code == 0, ran
    (speed,) = json.loads(ran.out)["speeds"]
    assert speed["job"] == "generate"
    # Three steps, each of two evaluations.
    assert speed["flops"] == 6 * 2 * count(rac.load_generator(generator_dir).field, (2, 4, 4, 4), (2,)).macs
    assert speed["images_per_second"] == pytest.approx(2 / speed["seconds"])
    ran = run("bench", generator_dir, *quick, "--size", 20)
    assert ran.code == 2
    assert "--size 20 must be a multiple of the generator's 8" in ran.err
    ran = run("bench", generator_dir, *quick, "--recipe", "sit-64")
    assert (ran.code, ran.err.count("\n")) == (2, 1)
    assert "--recipe sit-64 trains a generator" in ran.err


def test_threads_are_chosen_by_a_generator_too(run, generator_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.setattr(bench, "best_convolution", lambda setting: 100.0)
    monkeypatch.setattr(bench.runtime, "_cores", lambda: 1)
    quick = ("--size", 16, "--batch", 1, "--seconds", 0, "--device", "cpu", "--precision", "fp32")
    ran = run("bench", generator_dir, *quick)
    assert ran.code == 0, ran
    assert "ms with 1 thread" in ran.out


def test_the_list_of_recipes_keeps_coders_and_generators_apart(run) -> None:  # type: ignore[no-untyped-def]
    coders, generators = run("train").out.split("generators:")
    for name, (_, recipe) in RECIPES.items():
        part, other = (coders, generators) if recipe.product == "coder" else (generators, coders)
        assert f"\n  {name} " in part
        assert f"\n  {name} " not in other
