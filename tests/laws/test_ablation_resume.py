"""An ablation that is broken off and resumed ends as if it had not been: bit for bit."""

from __future__ import annotations

import json
import shutil
import signal
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from training_toy import contents

import rac
from rac.coders.klvae import KLVAEConfig
from rac.commands import ablate as verb
from rac.commands.ablate import Options, ablate
from rac.data import Batch, CachedStream
from rac.errors import RacError
from rac.experiments import ablation, ablation_report
from rac.experiments.ablation import Ablation
from rac.fields import TinyFieldConfig
from rac.recipes import RECIPES, KLVAERecipe, RACRecipe
from rac.train import log

VARY = ("spread=nearest,shuffle", "steps=1,2")


@pytest.fixture(autouse=True, scope="module")
def _brief() -> Iterator[None]:
    """Drawing and measuring take longer than the training here, and are no part of this law."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(log, "draw_curves", lambda records: b"")
        patch.setattr(ablation, "TRIAL", 2)
        patch.setattr(ablation_report, "line_panels", lambda panels, label: Image.new("RGB", (8, 8)))
        yield


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory, images) -> RACRecipe:  # type: ignore[no-untyped-def]
    """A few hundred weights on a random teacher and synthetic pictures."""
    folder = tmp_path_factory.mktemp("material")
    torch.manual_seed(0)
    rac.save(KLVAEConfig(widths=(4, 4, 4), latent_channels=4, norm_groups=4).build(), folder / "teacher")
    for number, image in enumerate(images(12, 40, 40)):
        rac.write_image(image[None], folder / f"{number}.png")
    nano = RECIPES["nano"][1].tiny()
    return replace(
        nano,
        teacher=str(folder / "teacher"),
        field=TinyFieldConfig(widths=(4, 4, 4), blocks=(1, 1, 1)),
        contraction="inverse",
        objective=replace(nano.objective, steps=(1, 2)),
        data=replace(nano.data, paths=(folder,), size=16, cached_crops=8),
        train=replace(nano.train, workers=0, threads=1, device="cpu", tensorboard=False),
    )


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, recipe: RACRecipe) -> Path:
    """An ablation from beginning to end."""
    out = tmp_path_factory.mktemp("whole") / "out"
    assert ablate("tiny", recipe, Options(out, VARY, budget="3")) == 0
    return out


@pytest.mark.slow
def test_broken_off_in_a_training_and_while_judging(
    tmp_path: Path, recipe: RACRecipe, whole: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    options = Options(out, VARY, budget="3")
    interrupted_in_second_training(monkeypatch, recipe, options)
    assert (out / "runs" / "02-spread=shuffle" / "checkpoints" / "00000002").exists()
    measured = json.loads((out / "ablation.json").read_text())

    evaluated = []
    evaluate = verb.evaluate_candidate

    def evaluate_one(*arguments: Any) -> Any:
        if evaluated:
            raise KeyboardInterrupt
        evaluated.append(arguments)
        return evaluate(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(verb, "evaluate_candidate", evaluate_one)
        with pytest.raises(KeyboardInterrupt):
            ablate("tiny", recipe, replace(options, resume=True))
    assert len(list((out / "results").iterdir())) == 1

    assert ablate("tiny", recipe, replace(options, resume=True)) == 0
    assert json.loads((out / "ablation.json").read_text()) == measured
    assert outcome(out) == outcome(whole)


def test_a_time_becomes_a_number_of_images_once(
    tmp_path: Path, recipe: RACRecipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By speeds that are kept: an ablation resumed from them trains as long, however fast the machine is by then."""
    broken, other = tmp_path / "broken", tmp_path / "other"
    options = Options(broken, ("spread=nearest,shuffle",), budget="0.1s")
    Ablation(recipe, options.vary, options.budget, broken).enter(resume=False)
    plan = json.loads((broken / "ablation.json").read_text())
    speeds = {"spread=nearest": 0.006, "spread=shuffle": 0.014}
    (broken / "ablation.json").write_text(json.dumps({**plan, "seconds_per_image": speeds}))
    shutil.copytree(broken, other)

    interrupted_in_second_training(monkeypatch, recipe, replace(options, resume=True))
    assert ablate("tiny", recipe, replace(options, resume=True)) == 0
    assert ablate("tiny", recipe, replace(options, out=other, resume=True)) == 0
    assert outcome(broken) == outcome(other)
    report = json.loads((broken / "report.json").read_text())
    assert [training["images"] for training in report["trainings"]] == [10, 10]  # 0.1 s at 0.01 s, the mean

    timed = Ablation(recipe, options.vary, options.budget, broken, equal="time")
    assert [training.recipe.train.iterations for training in timed.trainings(speeds)] == [8, 4]


def test_a_variant_trains_as_it_would_alone(tmp_path: Path, recipe: RACRecipe, whole: Path) -> None:
    shuffle = json.loads((whole / "runs" / "02-spread=shuffle" / "recipe.json").read_text())
    alone = replace(recipe, spread="shuffle", train=replace(recipe.train, **{
        name: shuffle["train"][name] for name in ("iterations", "gallery_every", "log_every")
    }))  # fmt: skip
    alone.run(tmp_path / "alone")
    assert contents(tmp_path / "alone") == contents(whole / "runs" / "02-spread=shuffle")


def test_prepared_crops_are_shared_and_two_numbers_of_steps_take_one_training(whole: Path) -> None:
    assert len(list((whole / "crops").iterdir())) == 1
    assert sorted(path.name for path in (whole / "runs").iterdir()) == ["01-spread=nearest", "02-spread=shuffle"]
    report = json.loads((whole / "report.json").read_text())
    assert [row["label"] for row in report["comparison"]["rows"]] == [
        *("spread=nearest, 1 step", "spread=nearest, 2 steps"),
        *("spread=shuffle, 1 step", "spread=shuffle, 2 steps"),
    ]


def test_variants_whose_latents_come_from_other_coders_prepare_their_own_crops(
    tmp_path: Path, recipe: RACRecipe
) -> None:
    """With a frozen encoder the latents are those of `start`."""
    network = KLVAEConfig(widths=(4, 4, 4), latent_channels=4, norm_groups=4)
    for number, name in enumerate("ab"):
        torch.manual_seed(number)
        rac.save(network.build(), tmp_path / name)
    sharp = KLVAERecipe(network=network, start="", train_encoder=False, data=recipe.data, train=recipe.train)
    starts = f"start={tmp_path / 'a'},{tmp_path / 'b'}"
    assert ablate("klvae-f8d4-sharp", sharp, Options(tmp_path / "out", (starts,), budget="2")) == 0
    assert len(list((tmp_path / "out" / "crops").iterdir())) == 2
    sharp = replace(sharp, start=str(tmp_path / "a"))
    assert ablate("klvae-f8d4-sharp", sharp, Options(tmp_path / "one", ("train.lr=1e-3,1e-4",), budget="2")) == 0
    assert len(list((tmp_path / "one" / "crops").iterdir())) == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"budget": "4"}, 'budget "4", was "3"'),
        ({"vary": VARY[:1]}, "vary"),
        ({"equal": "time", "budget": "9s"}, "equal"),
    ],
)
def test_another_ablation_is_refused(recipe: RACRecipe, whole: Path, change: dict[str, Any], message: str) -> None:
    options = replace(Options(whole, VARY, budget="3", resume=True), **change)
    with pytest.raises(RacError, match=message):
        ablate("tiny", recipe, options)


def test_another_recipe_is_refused_and_a_directory_in_use(tmp_path: Path, recipe: RACRecipe, whole: Path) -> None:
    options = Options(whole, VARY, budget="3", resume=True)
    other = replace(recipe, train=replace(recipe.train, lr=0.1, checkpoint_minutes=1.0))
    with pytest.raises(RacError, match=r"started with other settings: recipe\.train\.lr 0\.1, was 0\.0003; resume"):
        ablate("tiny", other, options)
    with pytest.raises(RacError, match="is not empty; --resume"):
        ablate("tiny", recipe, replace(options, resume=False))
    with pytest.raises(RacError, match="holds no ablation to resume"):
        ablate("tiny", recipe, replace(options, out=tmp_path))


def interrupted_in_second_training(monkeypatch: pytest.MonkeyPatch, recipe: RACRecipe, options: Options) -> None:
    """Run it until Ctrl-C, which comes while the second batch of the second training is read."""
    batch = CachedStream.batch

    def interrupted(self: CachedStream, first: int, count: int) -> Batch:
        if first == count and (options.out / "runs" / "02-spread=shuffle").exists():
            signal.raise_signal(signal.SIGINT)
        return batch(self, first, count)

    with monkeypatch.context() as patch:
        patch.setattr(CachedStream, "batch", interrupted)
        with pytest.raises(KeyboardInterrupt):
            ablate("tiny", recipe, options)


def outcome(out: Path) -> dict[str, Any]:
    """All that the law is about: weights, optimiser, log and figures; not how long it took."""
    report = json.loads((out / "report.json").read_text())
    for row in report["comparison"]["rows"]:
        for name in ("images_per_second", "command", "coder"):
            del row["result"][name]
    for training in report["trainings"]:
        del training["seconds"]
    runs = {run.name: contents(run) for run in (out / "runs").iterdir()}
    return {"report": report, "runs": runs, "strips": (out / "strips.png").read_bytes()}
