"""Several parts train side by side, each by its own terms: also resumed, in pieces, and on two processes."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import training_toy
from safetensors.torch import load_file
from test_processes import ends, start_two
from torch import Tensor, nn
from training_toy import PARTS, AdversarialTask, ThreeParts, ToyStream, contents

from rac import runtime
from rac.data import Batch
from rac.draws import Draws
from rac.errors import RacError
from rac.train import Part, PartTerms, TrainConfig, fit, log, read_log
from rac.train.config import ema_decay
from rac.train.step import TrainState, train_step

STREAM = ToyStream(dtype=torch.float64)
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _without_curves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(log, "draw_curves", lambda records: b"")


def tensors(task: ThreeParts) -> dict[str, Tensor]:
    modules = {"coder": task.coder, "generator": task.generator, "judge": task.judge}
    return {f"{name}.{key}": value for name in modules for key, value in modules[name].state_dict().items()}


def own_gradients(task: ThreeParts, batch: Batch) -> dict[str, list[Tensor]]:
    """Each part's gradient by autograd, its own terms alone, the adaptive term weighed by hand."""
    shared, own = (runtime.generator(PARTS.rng_seed, name, 0) for name in ("shared", "own"))
    draws = Draws(shared, own, len(batch.images), 0, len(batch.images))
    found: dict[str, list[Tensor]] = {}
    for part, terms, _ in task.terms(batch, draws, 0):
        parameters = list(task.parts[part].module.parameters())
        loss = sum(weight * terms[name] for name, weight in task.parts[part].weights.items())
        found[part] = list(torch.autograd.grad(loss, parameters, retain_graph=True))
        if part == "coder":
            adversarial = torch.autograd.grad(terms["adversarial"], parameters)
            balance = float(found[part][0].norm() / (adversarial[0].norm() + 1e-4))
            found[part] = [a + 0.5 * balance * b for a, b in zip(found[part], adversarial, strict=True)]
    return found


def test_each_part_gets_the_gradient_of_its_own_terms_and_its_own_clip() -> None:
    task, batch = ThreeParts(), STREAM.batch(0, 6)
    expected = own_gradients(ThreeParts(), batch)  # which changes its statistics
    state = TrainState.start(task, PARTS, CPU)
    values = train_step(task, state, batch, PARTS)
    assert list(state.parts) == ["coder", "discriminator", "generator"]
    clips = {"coder": 0.05, "discriminator": PARTS.clip, "generator": PARTS.clip}
    for name, gradients in expected.items():
        norm = float(nn.utils.get_total_norm(gradients))
        assert values["gradient" if name == "coder" else f"gradient_{name}"] == pytest.approx(norm, rel=1e-5)
        scale = min(1.0, clips[name] / norm)
        for parameter, gradient in zip(task.parts[name].module.parameters(), gradients, strict=True):
            torch.testing.assert_close(parameter.grad, scale * gradient, rtol=1e-4, atol=1e-9)
    assert values["gradient"] > 0.05, "the clip of the coder is meant to matter"
    rates = {name: part.optimizer.param_groups[0]["lr"] / PARTS.lr for name, part in state.parts.items()}
    assert rates == {"coder": 0.5, "discriminator": 1.0, "generator": 1.0}
    settings = {name: part.optimizer.param_groups[0] for name, part in state.parts.items()}
    assert settings["generator"]["weight_decay"] == 0.1
    assert settings["coder"]["weight_decay"] == PARTS.weight_decay
    assert (settings["discriminator"]["betas"], settings["coder"]["betas"]) == ((0.5, 0.9), PARTS.betas)
    assert task.seen == [True], "the coder's terms leave the generator's statistics alone"


@pytest.mark.parametrize("accumulate", [1, 3])
def test_one_evaluation_may_serve_several_parts(accumulate: int) -> None:
    """What reaches another part through it is stopped by the step, to the last bit as if it had been detached."""
    settings = replace(PARTS, accumulate=accumulate)
    tasks = ThreeParts(), ThreeParts(shared=True)
    for task in tasks:
        state = TrainState.start(task, settings, CPU)
        for k in range(3):
            train_step(task, state, STREAM.batch(6 * k, 6), settings)
    one, other = map(tensors, tasks)
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_four_iterations_equal_two_and_two_more(tmp_path: Path) -> None:
    settings = replace(PARTS, accumulate=3, schedule="cosine", warmup=2)
    fit(ThreeParts(), STREAM, settings, tmp_path / "whole")
    fit(ThreeParts(), STREAM, settings, tmp_path / "broken", stop_at=2)
    fit(ThreeParts(), STREAM, replace(settings, workers=0), tmp_path / "broken", resume=True)
    assert contents(tmp_path / "broken") == contents(tmp_path / "whole")
    names = {"coder", "discriminator", "generator", "generator_ema"}
    names |= {f"{name}_optimizer" for name in ("coder", "discriminator", "generator")}
    assert {path.stem for path in (tmp_path / "whole" / "checkpoints" / "00000004").glob("*.safetensors")} == names


@pytest.mark.parametrize("accumulate", [2, 4, 6])
def test_pieces_of_a_batch_train_as_the_whole_with_their_statistics(tmp_path: Path, accumulate: int) -> None:
    whole, split = ThreeParts(), ThreeParts()
    fit(whole, STREAM, PARTS, tmp_path / "whole")
    fit(split, STREAM, replace(PARTS, accumulate=accumulate), tmp_path / "split")
    expected, found = tensors(whole), tensors(split)
    assert not torch.equal(expected["generator.0.mean"], torch.zeros(1, 3, 1, 1, dtype=torch.float64))
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-7, atol=1e-9)


def test_constant_buffers_and_counters_are_no_means(tmp_path: Path) -> None:
    module = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.Conv2d(4, 3, 1))
    module.register_buffer("constant", torch.tensor([0.1, 1 / 3]))
    task = training_toy.ToyTask(module)
    fit(task, ToyStream(), TrainConfig(iterations=3, batch=6, accumulate=3, device="cpu"), tmp_path / "run")
    assert torch.equal(module.constant, torch.tensor([0.1, 1 / 3]))
    assert int(module[1].num_batches_tracked) == 2 * 3  # the task asks the module twice an iteration


def test_averages_are_kept_of_the_parts_that_ask_for_them(tmp_path: Path) -> None:
    task = ThreeParts()
    state = TrainState.start(task, PARTS, CPU)
    average = {name: value.clone() for name, value in task.generator.state_dict().items()}
    for k in range(3):
        train_step(task, state, STREAM.batch(6 * k, 6), PARTS)
        decay = ema_decay(0.5, k)
        average = {
            name: decay * average[name] + (1 - decay) * value for name, value in task.generator.state_dict().items()
        }
    finished = state.finished()
    for name, value in finished["generator"].state_dict().items():
        torch.testing.assert_close(value, average[name], rtol=1e-9, atol=1e-12)
    assert torch.equal(finished["coder"].weight, task.coder.weight)
    assert finished["coder"] is not task.coder, "what a task does to it in saving must not reach the training"
    assert not any(one.requires_grad for module in finished.values() for one in module.parameters())


def test_a_batch_that_diverges_in_one_part_changes_none() -> None:
    class Diverging(ThreeParts):
        def terms(self, batch, draws, iteration):  # type: ignore[no-untyped-def]
            for part, terms, keep_graph in super().terms(batch, draws, iteration):
                bad = iteration == 1 and part == "generator"
                yield PartTerms(part, {"flow": terms["flow"] * math.nan} if bad else terms, keep_graph)

    task, settings = Diverging(), replace(PARTS, on_divergence="skip")
    state = TrainState.start(task, settings, CPU)
    train_step(task, state, STREAM.batch(0, 6), settings)
    before = {name: value.clone() for name, value in tensors(task).items()}
    average = [value.clone() for value in state.finished()["generator"].state_dict().values()]
    train_step(task, state, STREAM.batch(6, 6), settings)
    assert state.skipped == 1
    assert all(torch.equal(value, before[name]) for name, value in tensors(task).items())
    after = state.finished()["generator"].state_dict().values()
    assert all(torch.equal(one, other) for one, other in zip(after, average, strict=True))
    train_step(task, state, STREAM.batch(12, 6), settings)
    assert not torch.equal(tensors(task)["generator.1.weight"], before["generator.1.weight"])


def test_a_run_begun_before_parts_had_names_goes_on(tmp_path: Path) -> None:
    settings = TrainConfig(iterations=4, batch=4, device="cpu", tensorboard=False)
    fit(AdversarialTask(), ToyStream(), settings, tmp_path / "whole")
    run = tmp_path / "run"
    fit(AdversarialTask(), ToyStream(), settings, run, stop_at=2)
    checkpoint = run / "checkpoints" / "00000002"
    names = {"model": "module", "model_ema": "ema", "model_optimizer": "optimizer"}
    names |= {"discriminator": "opponent", "discriminator_optimizer": "opponent_optimizer"}
    for now, then in names.items():
        (checkpoint / f"{now}.safetensors").rename(checkpoint / f"{then}.safetensors")
    state = json.loads((checkpoint / "state.json").read_text())
    del state["parts"]
    (checkpoint / "state.json").write_text(json.dumps(state))
    fit(AdversarialTask(), ToyStream(), settings, run, resume=True)
    assert contents(run) == contents(tmp_path / "whole")


def test_a_checkpoint_of_other_parts_is_refused(tmp_path: Path) -> None:
    class Further(AdversarialTask):
        @property
        def parts(self) -> dict[str, Part]:
            return {**super().parts, "third": Part(nn.Linear(1, 1), {})}

    settings = TrainConfig(iterations=4, batch=4, device="cpu", tensorboard=False)
    fit(AdversarialTask(), ToyStream(), settings, tmp_path / "run", stop_at=2)
    with (
        pytest.warns(UserWarning, match="of another recipe"),
        pytest.raises(RacError, match="no checkpoint in"),
    ):
        fit(Further(), ToyStream(), settings, tmp_path / "run", resume=True)


@pytest.mark.slow
def test_two_processes_train_as_one_with_their_statistics(tmp_path: Path) -> None:
    fit(ThreeParts(), STREAM, PARTS, tmp_path / "one")
    codes, said = ends(start_two(training_toy.__file__, tmp_path / "two", 5, "parts"))
    assert codes == [0, 0], "\n".join(said)
    one, two = (load_file(tmp_path / run / "coder" / "model.safetensors") for run in ("one", "two"))
    assert one.keys() == two.keys()
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, rtol=1e-6, atol=1e-8)
    ours, theirs = (
        [record["train"] for record in read_log(tmp_path / run / "log.jsonl") if "train" in record]
        for run in ("one", "two")
    )
    assert [list(values) for values in ours] == [list(values) for values in theirs]
