"""What goes wrong in a long training ends it with the reason, or costs what it must and no more."""

from __future__ import annotations

import json
import math
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import training_toy
from safetensors.torch import load_file
from torch import Tensor, nn
from training_toy import SLOW, AdversarialTask, PoisonedStream, ToyStream, ToyTask, contents

from rac.data import Batch, DataConfig, ImageStream, Stream
from rac.draws import Draws
from rac.errors import RacError
from rac.train import TrainConfig, fit, log, read_log
from rac.train.step import MOST_SKIPPED

PLAIN = TrainConfig(iterations=6, batch=4, device="cpu", log_every=1, tensorboard=False)
SKIPPING = replace(PLAIN, on_divergence="skip")


@pytest.fixture(autouse=True)
def _without_curves(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawing takes longer than the training here, and is no part of this."""
    monkeypatch.setattr(log, "draw_curves", lambda records: b"")


def normed() -> nn.Module:
    """A module whose buffers take up what it sees."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.Conv2d(4, 3, 1))


def trained(run: Path) -> dict[int, dict[str, float]]:
    return {record["iteration"]: record["train"] for record in read_log(run / "log.jsonl") if "train" in record}


# A loss that is not finite


def test_a_diverging_batch_is_kept_for_inspection_and_named(tmp_path: Path) -> None:
    stream, run = PoisonedStream(poisoned=(3,), with_latents=True), tmp_path / "run"
    with pytest.raises(RacError, match=r"diverged at iteration 4: .*clean nan.*diverged-00000004\.safetensors"):
        fit(ToyTask(), stream, replace(PLAIN, checkpoint_minutes=0), run)
    batch, kept = stream.batch(12, 4), load_file(run / "diverged-00000004.safetensors")
    torch.testing.assert_close(kept, {"images": batch.images, "latents": batch.latents}, equal_nan=True, rtol=0, atol=0)
    about = json.loads((run / "diverged-00000004.json").read_text(), parse_constant=pytest.fail)
    assert (about["iteration"], about["rng_seed"], about["terms"]["loss"]) == (4, 0, "nan")
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["00000002", "00000003"]
    # The advice of the error: without that batch it goes on from there.
    fit(ToyTask(), stream, SKIPPING, run, resume=True)
    assert sorted(trained(run)) == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize("kind", [ToyTask, AdversarialTask])
def test_a_skipped_batch_leaves_weights_buffers_average_and_optimisers_alone(
    tmp_path: Path, kind: type[ToyTask]
) -> None:
    run, stream = tmp_path / "run", PoisonedStream(poisoned=(2, 3))
    fit(kind(normed()), stream, SKIPPING, run, stop_at=2)
    before = contents(run)
    fit(kind(normed()), stream, SKIPPING, run, stop_at=4, resume=True)
    after = contents(run)
    changed = {name for name in before if after[name.replace("00000002", "00000004")] != before[name]}
    assert not changed
    fit(kind(normed()), stream, SKIPPING, run, resume=True)
    assert all(bytes_ != before.get(name.replace("00000006", "00000002")) for name, bytes_ in contents(run).items())


def test_skipped_batches_are_counted_in_the_log_and_are_in_no_mean(tmp_path: Path) -> None:
    run = tmp_path / "run"
    fit(ToyTask(), PoisonedStream(poisoned=(1, 4)), replace(SKIPPING, log_every=3), run, stop_at=3)
    fit(ToyTask(), PoisonedStream(poisoned=(1, 4)), replace(SKIPPING, log_every=3), run, resume=True)
    lines = [record for record in read_log(run / "log.jsonl") if "train" in record]
    assert [record["skipped"] for record in lines] == [1, 2]
    assert all(math.isfinite(value) for record in lines for value in record["train"].values())
    assert all(record["train"]["loss"] > 0 for record in lines)


def test_a_run_that_skips_again_and_again_stops(tmp_path: Path) -> None:
    """An interruption in between changes nothing: the ones in a row are counted over it."""
    settings = replace(SKIPPING, iterations=40)
    stream = PoisonedStream(poisoned=(0, *range(2, 40)))  # the first one is not in a row with the others
    run = tmp_path / "run"
    fit(ToyTask(), stream, settings, run, stop_at=5)
    with pytest.raises(RacError, match=f"iteration {2 + MOST_SKIPPED}, for the {MOST_SKIPPED}th time in a row"):
        fit(ToyTask(), stream, settings, run, resume=True)


def test_a_gradient_that_is_not_finite_is_skipped_though_the_loss_is(tmp_path: Path) -> None:
    class Steep(ToyTask):
        def losses(self, batch: Batch, draws: Draws, iteration: int) -> dict[str, Tensor]:
            terms = super().losses(batch, draws, iteration)
            if iteration == 1:
                terms["clean"] = (self.module.bias - self.module.bias.detach()).sum().sqrt()  # 0, slope infinite
            return terms

    with pytest.raises(RacError, match=r"iteration 2: clean 0, .*gradient (nan|inf)"):
        fit(Steep(), ToyStream(), PLAIN, tmp_path / "stopped")
    fitted = fit(Steep(), ToyStream(), SKIPPING, tmp_path / "skipped")
    assert all(parameter.isfinite().all() for parameter in fitted.module.parameters())
    assert sorted(trained(tmp_path / "skipped")) == [1, 2, 3, 4, 5, 6]


# Reading images


def test_a_damaged_picture_is_named_at_the_end_of_the_run(tmp_path: Path, images, capsys) -> None:  # type: ignore[no-untyped-def]
    from rac import write_image

    folder = tmp_path / "photos"
    folder.mkdir()
    for k in range(8):
        write_image(images(1, 20, 20, k), folder / f"{k}.png")
    (folder / "5.png").write_bytes((folder / "5.png").read_bytes()[:60])
    stream = ImageStream(DataConfig(paths=(folder,), size=8, held_out=2))
    with pytest.warns(UserWarning, match=r"5\.png"):
        fit(ToyTask(), stream, PLAIN, tmp_path / "run")
    assert "skipped 1 damaged picture(s): 5.png" in capsys.readouterr().err
    (record,) = (record for record in read_log(tmp_path / "run" / "log.jsonl") if "damaged" in record)
    assert record["iteration"] == 6
    assert record["damaged"].keys() == {"5.png"}


@pytest.mark.parametrize("workers", [1, 3])
def test_a_reading_thread_that_ends_ends_the_run_with_the_reason(tmp_path: Path, workers: int) -> None:
    class Leaving(ToyStream):
        def batch(self, first: int, count: int) -> Batch:
            if first == 2 * PLAIN.batch:
                raise SystemExit(0)  # as a success: the worst that it could be taken for
            return super().batch(first, count)

    settings = replace(PLAIN, workers=workers, checkpoint_minutes=0)
    with pytest.raises(RacError, match=r"thread that reads images ended with SystemExit\(0\)"):
        fit(ToyTask(), Leaving(), settings, tmp_path / "run")
    fit(ToyTask(), ToyStream(), settings, tmp_path / "run", resume=True)
    fit(ToyTask(), ToyStream(), settings, tmp_path / "whole")
    assert contents(tmp_path / "run") == contents(tmp_path / "whole")


@pytest.mark.slow
def test_a_reading_thread_that_hangs_ends_the_run_with_the_reason(tmp_path: Path) -> None:
    """And does not keep the process alive."""
    script = f"""
import sys, threading
sys.path.insert(0, {str(Path(training_toy.__file__).parent)!r})
from pathlib import Path
from training_toy import ToyStream, ToyTask
from rac.train import TrainConfig, fit

class Hanging(ToyStream):
    def batch(self, first, count):
        if first >= 8:
            threading.Event().wait()
        return super().batch(first, count)

settings = TrainConfig(iterations=9, batch=4, device="cpu", threads=1, patience_minutes=0.005, tensorboard=False)
fit(ToyTask(), Hanging(), settings, Path({str(tmp_path / "run")!r}))
"""
    ran = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert ran.returncode == 1
    assert "no images came for 0 seconds; the disk or the network" in ran.stderr.splitlines()[-1]


def test_no_reading_thread_is_left_behind(tmp_path: Path) -> None:
    fit(ToyTask(), ToyStream(), replace(PLAIN, workers=3), tmp_path / "run")
    assert not [thread.name for thread in threading.enumerate() if thread.name.startswith("rac-data")]


# The system


@pytest.mark.slow
def test_sigterm_exits_with_code_0_and_a_word_on_how_to_go_on(tmp_path: Path) -> None:
    run = tmp_path / "run"
    process = subprocess.Popen(
        [sys.executable, training_toy.__file__, str(run), "1"], stderr=subprocess.PIPE, text=True
    )
    until = time.monotonic() + 60
    while not list(run.glob("checkpoints/0*")) and process.poll() is None and time.monotonic() < until:
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 0
    assert f"of {SLOW.iterations}; --resume continues from there" in said


def test_a_recipe_that_was_cut_while_written_does_not_occupy_the_folder(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / ".recipe.json.123.tmp").write_text("{")
    assert fit(ToyTask(), ToyStream(), PLAIN, tmp_path / "run").iteration == 6


def test_the_time_of_galleries_and_checkpoints_is_not_the_trainings(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])

    class Timed(ToyTask):
        def losses(self, batch: Batch, draws: Draws, iteration: int) -> dict[str, Tensor]:
            clock[0] += 1
            return super().losses(batch, draws, iteration)

        def gallery(self, modules: Mapping[str, nn.Module], images: Tensor) -> tuple[Tensor, dict[str, float]]:
            clock[0] += 1000
            return super().gallery(modules, images)

        def save(self, modules: Mapping[str, nn.Module], stream: Stream, directory: Path) -> None:
            clock[0] += 1000
            super().save(modules, stream, directory)

    def draw(records: object) -> bytes:
        clock[0] += 1000
        return b""

    monkeypatch.setattr(log, "draw_curves", draw)
    # Galleries between the lines of the log, after 1, 2 and 3 of its 3 iterations.
    settings = replace(PLAIN, iterations=12, log_every=3, gallery_every=2, checkpoint_minutes=0, workers=0)
    fit(Timed(), ToyStream(), settings, tmp_path / "run")
    lines = [record for record in read_log(tmp_path / "run" / "log.jsonl") if "train" in record]
    assert [record["seconds"] for record in lines] == [3, 6, 9, 12]
    assert [record["images_per_second"] for record in lines] == [4] * 4
