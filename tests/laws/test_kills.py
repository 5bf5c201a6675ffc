"""Trainings killed at random moments, resumed, killed again, end bit for bit as the one that was left alone.

The slow test does two of them; as a script it does as many as it is told to, and prints what happened:

    python tests/laws/test_kills.py 20
"""

from __future__ import annotations

import os
import random
import shlex
import signal
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

import rac
from rac.cli import main
from rac.train import read_log
from rac.train.log import draw_curves

ITERATIONS = 20
TRAIN = shlex.split(
    f"train tiny --data.size 16 --data.held-out 2 --data.cached-crops 0 --train.iterations {ITERATIONS} "
    "--field.widths 24 16 12 --field.blocks 1 1 1 --train.batch 4 --train.warmup 5 --train.checkpoint-minutes 0 "
    "--train.log-every 1 --train.gallery-every 10 --train.no-tensorboard --train.device cpu"
)
"""A real recipe that saves after every iteration, so that many a kill meets a save."""


@dataclass(frozen=True)
class Ended:
    """What a training leaves to be compared."""

    files: dict[str, bytes]
    values: dict[int, dict[str, Any]]
    """Of every iteration: its losses, and the figures of the held-out images."""

    @classmethod
    def of(cls, run: Path) -> Ended:
        newest = max((run / "checkpoints").glob("0*"))
        files = {path.relative_to(run).as_posix(): path for path in [*newest.iterdir(), *(run / "coder").iterdir()]}
        values: dict[int, dict[str, Any]] = {}
        for record in read_log(run / "log.jsonl"):
            for kind in record.keys() & {"train", "held_out"}:
                assert kind not in values.setdefault(record["iteration"], {}), "an iteration is told twice"
                values[record["iteration"]][kind] = record[kind]
        return cls({name: path.read_bytes() for name, path in files.items()}, values)


def photographs(folder: Path) -> Path:
    """Twelve pictures to train on; the last is damaged."""
    folder.mkdir(parents=True)
    generator = torch.Generator().manual_seed(0)
    for k in range(12):
        coarse = 2 * torch.rand(1, 3, 6, 6, generator=generator) - 1
        rac.write_image(
            torch.nn.functional.interpolate(coarse, size=(48, 56), mode="bilinear"), folder / f"{k:02d}.png"
        )
    (folder / "11.png").write_bytes((folder / "11.png").read_bytes()[:100])
    return folder


@dataclass(frozen=True)
class Started:
    """A training in a process of its own, forked from this one, which spares it the imports."""

    pid: int
    errors: Path

    @classmethod
    def now(cls, run: Path, photos: Path) -> Started:
        """Begin the run, or go on with it."""
        resume = ["--resume"] if (run / "recipe.json").exists() else []
        errors = run.with_suffix(".errors")
        pid = os.fork()
        if pid == 0:
            code = 70
            try:
                with open(errors, "w") as sys.stderr, open(os.devnull, "w") as sys.stdout:
                    code = main([*TRAIN, "--data.paths", str(photos), "--out", str(run), *resume])
            finally:
                os._exit(code)
        return cls(pid, errors)

    def ended(self) -> bool:
        """Whether it has, without waiting and without taking note."""
        return os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None

    def code(self) -> int:
        """Wait for its end: the exit code, or minus the signal that killed it."""
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])

    def check(self) -> None:
        """Whatever was killed before, no checkpoint may be damaged."""
        assert "checkpoint" not in self.errors.read_text(), self.errors.read_text()


def finish(run: Path, photos: Path) -> None:
    """Go on with the run to its end."""
    training = Started.now(run, photos)
    assert training.code() == 0, training.errors.read_text()
    training.check()


def reached(run: Path) -> int:
    """The iteration of its newest checkpoint; 0 if there is none."""
    return max((int(path.name) for path in run.glob("checkpoints/0*")), default=0)


def kill(run: Path, photos: Path, rng: random.Random) -> str:
    """Begin or resume the run, and kill it at a random moment after one of the next iterations, or at once."""
    before = reached(run)
    wanted, delay = rng.randint(before, min(before + ITERATIONS // 2, ITERATIONS - 1)), rng.uniform(0, 0.4)
    training = Started.now(run, photos)
    while reached(run) < wanted and not training.ended():
        time.sleep(0.002)
    time.sleep(delay)
    os.kill(training.pid, signal.SIGKILL)
    code = training.code()
    assert code in (-signal.SIGKILL, 0), training.errors.read_text()
    training.check()
    return f"{before}-{reached(run)}{'' if code else ' (too late)'}"


def unbroken(workplace: Path) -> tuple[Path, Ended]:
    """Photographs, and how the training ends that is left alone."""
    # What the trainings import late, and would import anew after each fork.
    rac.load("klvae-f8d4")
    draw_curves([])
    photos = photographs(workplace / "photos")
    finish(workplace / "whole", photos)
    return photos, Ended.of(workplace / "whole")


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_runs_killed_at_random_end_as_the_unbroken_one(tmp_path: Path) -> None:
    photos, whole = unbroken(tmp_path)
    assert sorted(whole.values) == list(range(ITERATIONS + 1))
    rng = random.Random(0)
    for kills in (1, 2):
        run = tmp_path / str(kills)
        for _ in range(kills):
            kill(run, photos, rng)
        finish(run, photos)
        assert Ended.of(run) == whole


if __name__ == "__main__":
    torch.set_num_threads(1)
    count = int(sys.argv[1]) if len(sys.argv) > 1 else 20
    with tempfile.TemporaryDirectory() as folder:
        photos, whole = unbroken(Path(folder))
        rng, equal = random.Random(), 0
        for k in range(count):
            run = Path(folder, str(k))
            moments = [kill(run, photos, rng) for _ in range(rng.randint(1, 3))]
            finish(run, photos)
            same = Ended.of(run) == whole
            equal += same
            said = "equal" if same else "NOT EQUAL"
            print(f"run {k}: killed on the ways {', '.join(moments)}: {said}", flush=True)
        print(f"{equal} of {count} runs ended bit for bit as the unbroken one")
    sys.exit(equal != count)
