"""`rac ablate`: what it leaves behind, and what it refuses."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

import rac
from rac.errors import RacError
from rac.experiments import ablation
from rac.experiments.ablation import Ablation, Budget, Training
from rac.experiments.sweep import Axis, changed, read_axis, variants
from rac.fields import UNetConfig, UNetFieldConfig
from rac.objectives.rac import RACObjective
from rac.recipes import RECIPES, RACRecipe
from rac.train import log

NANO = RECIPES["nano"][1]
KLVAE = RECIPES["klvae-f8d4"][1]


@pytest.fixture(autouse=True)
def _without_curves(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each training's own are left out, the report's are drawn."""
    monkeypatch.setattr(log, "draw_curves", lambda records: b"")
    monkeypatch.setattr(ablation, "TRIAL", 2)


@pytest.fixture
def pictures(tmp_path: Path, images) -> Path:  # type: ignore[no-untyped-def]
    """Twelve pictures in a folder."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    for number, image in enumerate(images(12, 40, 40)):
        rac.write_image(image[None], folder / f"{number}.png")
    return folder


def options(teacher: Path, pictures: Path) -> list[object]:
    return [
        *("nano", "--teacher", teacher, "--contraction", "inverse", "--field.no-position"),
        *("--field.widths", 4, 4, 4, "--field.blocks", 1, 1, 1),
        *("--data.paths", pictures, "--data.size", 16, "--data.held-out", 2, "--data.cached-crops", 8),
        *("--train.batch", 2, "--train.device", "cpu", "--train.no-tensorboard"),
    ]


def test_ablate(tmp_path: Path, run, coder_dir: Path, pictures: Path) -> None:  # type: ignore[no-untyped-def]
    """One report of all variants, and nothing written over afterwards."""
    out = tmp_path / "out"
    arguments = [*options(coder_dir.parent / "teacher", pictures), "--out", out, "--budget", 2]
    arguments += ["--vary", "objective.step-noise=0,0.05", "--vary", "steps=1,2"]
    ran = run("ablate", *arguments)
    assert ran.code == 0, ran
    assert (out / "report.html").read_text().count("<figure>") == 2
    text = (out / "report.md").read_text()
    assert all(f"({name}.png)" in text and (out / f"{name}.png").exists() for name in ("curves", "strips"))
    report = json.loads((out / "report.json").read_text())
    labels = [row["label"] for row in report["comparison"]["rows"]]
    noises = ("objective.step_noise=0", "objective.step_noise=0.05")
    assert labels == [f"{noise}, {steps}" for noise in noises for steps in ("1 step", "2 steps")]
    assert all(label in ran.out and label in text for label in labels)
    assert [training["images"] for training in report["trainings"]] == [4, 4]
    assert rac.load(out / report["trainings"][0]["coder"]).spec.channels == 4

    again = run("ablate", *arguments)
    assert again.code == 2
    assert "is not empty; --resume continues the ablation in it" in again.err


def test_a_variant_that_fails_does_not_stop_the_others(
    tmp_path, run, coder_dir: Path, pictures: Path, monkeypatch
) -> None:  # type: ignore[no-untyped-def]
    train = Ablation.train

    def diverging(self: Ablation, training: Training) -> None:
        if training.label == "train.lr=1e-3":
            raise RacError("training diverged at iteration 2")
        train(self, training)

    monkeypatch.setattr(Ablation, "train", diverging)
    arguments = [*options(coder_dir.parent / "teacher", pictures), "--budget", 1, "--out", tmp_path / "out"]
    ran = run("ablate", *arguments, "--vary", "train.lr=1e-3,1e-4")
    assert ran.code == 1, ran
    assert "rac: continuing without train.lr=1e-3: training diverged at iteration 2" in ran.err
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert [training["failure"] for training in report["trainings"]] == ["training diverged at iteration 2", None]
    assert [row["label"] for row in report["comparison"]["rows"]] == ["train.lr=1e-4, 4 steps"]
    assert "Not trained to the end" in (tmp_path / "out" / "report.md").read_text()


def test_what_cannot_be_trained_stops_it_before_anything_is(tmp_path, run, coder_dir: Path, pictures: Path) -> None:  # type: ignore[no-untyped-def]
    arguments = [*options(coder_dir.parent / "teacher", pictures), "--state-channels", 3, "--out", tmp_path / "out"]
    ran = run("ablate", *arguments, "--vary", "spread=shuffle,nearest")
    assert ran.code == 2
    assert "error: spread=nearest: 4 latent channels do not fit 3 state channels" in ran.err
    assert not (tmp_path / "out" / "runs").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("nanoo",), "no recipe 'nanoo'; did you mean nano?"),
        (("nano",), "nothing is varied; give --vary, such as: --vary spread=nearest,shuffle"),
        (("nano", "--vary", "spread=nearest,shuffle", "--budget", "10 minutes"), "budget '10 minutes' is neither"),
        (("nano", "--vary", "steps=1,4", "--budget", "9", "--equal", "time"), "for equal time give a time"),
        (("nano", "--vary", "train.iterations=1,2"), "train.iterations is set by the budget"),
        (("nano", "--vary", "data.held-out=1,2"), "give --test with pictures that no variant trains on"),
        (("nano", "--vary", "steps=1,4", "--protocol", "pixel"), "no protocol 'pixel'; expected one of pixels-64"),
        (("nano", "--vary", "steps=1,4", "--test", "nowhere"), "nowhere does not exist"),
    ],
)
def test_bad_input(tmp_path: Path, run, arguments: tuple[str, ...], message: str) -> None:  # type: ignore[no-untyped-def]
    ran = run("ablate", *arguments, "--out", tmp_path / "out")
    assert ran.code == 2
    assert message in ran.err
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_recipes_of_several_families_beside_one_another(  # type: ignore[no-untyped-def]
    tmp_path: Path, run, pictures: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three decoders of one frozen encoder's latents, at one cost: same crops, same latents, one report."""
    small = UNetConfig(width=8, multiples=(1, 1, 1), blocks=1, norm_groups=4)
    for name in ("decoder-plain", "decoder-rac"):
        text, recipe = RECIPES[name]
        weights = replace(recipe.objective.weights, perceptual=0.0)
        objective = replace(recipe.objective, weights=weights)
        field = UNetFieldConfig(network=small)
        monkeypatch.setitem(RECIPES, name, (text, replace(recipe, field=field, objective=objective)))
    text, recipe = RECIPES["decoder-dgae"]
    recipe = replace(recipe, decoder=small, weights=replace(recipe.weights, perceptual=0.0), steps=2)
    monkeypatch.setitem(RECIPES, "decoder-dgae", (text, recipe))
    data = ("--data.paths", pictures, "--data.size", 32, "--data.held-out", 2, "--data.cached-crops", 8)
    training = ("--train.batch", 2, "--train.device", "cpu", "--train.no-tensorboard", "--budget", 2)
    out, beside = tmp_path / "out", ("--beside", "decoder-rac", "decoder-dgae")
    ran = run("ablate", "decoder-plain", *beside, *data, *training, "--latents", "teacher", "--out", out)
    assert ran.code == 0, ran
    report = json.loads((out / "report.json").read_text())
    rows = {row["label"]: row for row in report["comparison"]["rows"]}
    assert list(rows) == [
        "decoder-plain, 1 step, teacher's latents",
        "decoder-rac, 4 steps, teacher's latents",
        "decoder-dgae, 2 steps, teacher's latents",
    ]
    costs = [row["cost"] for row in rows.values()]
    assert max(one["macs_per_step"] for one in costs) < 1.05 * min(one["macs_per_step"] for one in costs)
    assert len(list((out / "crops").iterdir())) == 1
    assert [training["images"] for training in report["trainings"]] == [4, 4, 4]
    assert "decoder-plain beside decoder-rac beside decoder-dgae" in (out / "report.md").read_text()
    again = run("ablate", "decoder-plain", *beside, *data, *training, "--out", out, "--resume", "--judged-steps", 1, 3)
    assert again.code == 0, again
    assert "decoder-dgae, 3 steps" in again.out
    other = run("ablate", "decoder-plain", "--beside", "decoder-rac", *data, *training, "--out", out, "--resume")
    assert other.code == 2
    assert "was started with other settings" in other.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--beside", "decoder-plain"), "recipe decoder-plain is named twice"),
        (("--beside", "decoder-dgea"), "did you mean decoder-dgae"),
        (("--beside", "decoder-rac", "--judged-steps", "0"), "at least 1"),
    ],
)
def test_bad_companions(tmp_path: Path, run, arguments: tuple[str, ...], message: str) -> None:  # type: ignore[no-untyped-def]
    ran = run("ablate", "decoder-plain", *arguments, "--out", tmp_path / "out")
    assert ran.code == 2
    assert message in ran.err
    assert not (tmp_path / "out").exists()


# ------------------------------------------------------------------------------------------ fields and values


@pytest.mark.parametrize(
    ("choice", "values"),
    [
        ("spread=nearest,centre,shuffle", ["nearest", "centre", "shuffle"]),
        ("steps=1,4", [1, 4]),
        ("objective.step_noise=0,0.05", [0.0, 0.05]),
        ("objective.steps=1:1,2:4", [(1, 1), (2, 4)]),
        ("objective.random_grid=true,false", [True, False]),
        ("objective.weights.velocity=0,1e-1", [0.0, 0.1]),
        ("field.widths=64:64:64:64,32:32:32:32", [(64,) * 4, (32,) * 4]),
        ("start=none,rac-64", [None, "rac-64"]),
        ("data.largest_crop=none,128", [None, 128]),
        ("data.paths=,here:there", [(), (Path("here"), Path("there"))]),
    ],
)
def test_values_are_of_the_fields_type(choice: str, values: list[object]) -> None:
    axis = read_axis(choice, NANO)
    assert list(axis.values.values()) == values
    assert [type(value) for value in axis.values.values()] == [type(value) for value in values]


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        ("spread", "is not a choice of values; write a field and its values"),
        ("spread=nearest", "is not a choice"),
        ("spread=nearest,near", "spread cannot be 'near'; expected nearest or centre or shuffle"),
        ("spred=nearest,centre", r"the recipe has no field spred; did you mean spread\?"),
        ("objective.stepnoise=0,1", r"no field objective.stepnoise; did you mean objective.step_noise\?"),
        ("objective=1,2", "objective is a group of fields; vary some of objective.weights, objective.steps"),
        ("steps.more=1,2", "steps is one value and has no field more"),
        ("steps=1,4.5", "steps cannot be '4.5'; expected a whole number"),
        ("steps=1,", "steps cannot be ''"),
        ("steps=1,01", "has the value 01 twice"),
        ("train.lr=1e-3,nan", "train.lr cannot be 'nan'; expected a number"),
        ("train.bf16=yes,no", "train.bf16 cannot be 'yes'; expected true or false"),
        ("objective.steps=1,4", "cannot be '1'; expected a whole number and a whole number, joined by colons"),
        ("data.largest_crop=9,x", "expected a whole number or none"),
    ],
)
def test_what_is_no_choice(choice: str, message: str) -> None:
    with pytest.raises(RacError, match=message):
        read_axis(choice, NANO)


def test_every_combination_once_and_the_last_changes_fastest() -> None:
    found = variants(NANO, [read_axis(choice, NANO) for choice in ("spread=nearest,shuffle", "train.lr=1e-3,1e-4")])
    assert [variant.label for variant in found] == [
        *("spread=nearest, train.lr=1e-3", "spread=nearest, train.lr=1e-4"),
        *("spread=shuffle, train.lr=1e-3", "spread=shuffle, train.lr=1e-4"),
    ]
    assert isinstance(NANO, RACRecipe)
    assert found[1].recipe == replace(NANO, spread="nearest", train=replace(NANO.train, lr=1e-4))
    with pytest.raises(RacError, match="spread is varied twice"):
        variants(NANO, [Axis("spread", {"nearest": "nearest"})] * 2)
    with pytest.raises(RacError, match=r"objective\.steps=4:1: steps \(4, 1\) must be"):
        variants(NANO, [read_axis("objective.steps=1:1,4:1", NANO)])


def test_values_that_only_fit_together_change_together() -> None:
    assert isinstance(NANO, RACRecipe)
    low = replace(NANO, objective=RACObjective(steps=(1, 1)))
    settings = {"train.batch": 2, "train.accumulate": 2, "objective.weights.velocity": 1.0}
    found = changed(replace(low, train=replace(low.train, batch=1)), settings)
    assert (found.train.batch, found.train.accumulate, found.objective.weights.velocity) == (2, 2, 1.0)


def test_a_klvae_can_be_varied_too() -> None:
    (_, variant) = variants(KLVAE, [read_axis("weights.kl=1e-6,1e-4", KLVAE)])
    assert variant.recipe.weights.kl == 1e-4
    with pytest.raises(RacError, match="no field steps"):
        read_axis("steps=1,4", KLVAE)


@pytest.mark.parametrize(
    ("text", "budget"),
    [("500", Budget(iterations=500)), ("90s", Budget(seconds=90)), ("1.5h", Budget(seconds=5400))],
)
def test_budgets(text: str, budget: Budget) -> None:
    assert Budget.read(text) == budget


@pytest.mark.parametrize("text", ["0", "0m", "-5", "5d", "ten", "1.5", ""])
def test_what_is_no_budget(text: str) -> None:
    with pytest.raises(RacError, match="neither a number of iterations"):
        Budget.read(text)
