"""Train from a pack, on a machine without internet: one command for each stage, each within its minutes.

    python run.py check
    python run.py teacher --minutes 8 --out results
    python run.py velocity --minutes 8 --out results
    python run.py rollout --minutes 8 --out results
    python run.py generator --recipe sit-256 --minutes 8 --out results

The same command again goes on where the first one stopped. Only the standard library is needed to start.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import lzma
import os
import shutil
import sys
import tarfile
import time
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

BEGAN = time.monotonic()
PACK = Path(__file__).resolve().parent
LPIPS_FILE = "lpips_vgg16_v0.1_fp16.safetensors"
HIDDEN = ("accelerate", "peft", "torchao", "torchvision", "transformers")
"""What diffusers would import if it were there: its version need not go with the packed ones."""
IMPORTED = (
    "PIL attrs cattrs diffusers docstring_parser huggingface_hub matplotlib numpy rich safetensors torch torchmetrics "
    "tyro"
)
FEWEST = 4
"""Iterations that a plan is made by."""
LARGEST = 16 * 2**20
"""Bytes of a file of weights, from which on a warning says so."""


@dataclass(frozen=True)
class Stage:
    """A recipe, and the earlier stages that it builds upon."""

    recipe: str
    teacher: str | None = None
    start: str | None = None


STAGES = {
    "teacher": Stage("klvae-128"),
    "velocity": Stage("rac-128", teacher="teacher"),
    "rollout": Stage("rac-128-rollout", teacher="teacher", start="velocity"),
    "generator": Stage("sit-256"),
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("stage", choices=["check", *STAGES])
    parser.add_argument("--minutes", type=float, default=9.0, help="for the whole command, unpacking included")
    parser.add_argument(
        "--out", type=Path, default=Path("results"), help="what is trained, in bfloat16, log and gallery: OUT/STAGE"
    )
    parser.add_argument("--work", type=Path, default=Path("work"), help="checkpoints, and what is unpacked")
    parser.add_argument(
        "--teacher", type=Path, help="a coder's folder, instead of the teacher stage's or the generator's own"
    )
    parser.add_argument("--start", type=Path, help="a coder's folder to start from, instead of an earlier stage's")
    parser.add_argument("--recipe", help="instead of the stage's own; one that trains the same, such as sit-64")
    parser.add_argument("--set", action="append", default=[], metavar="FIELD=VALUE", help="a field of the recipe")
    parser.add_argument("--iterations", type=int, help="instead of as many as the minutes hold")
    parser.add_argument(
        "--tiny", action="store_true", help="32-pixel crops in batches of 2, to rehearse on any machine"
    )
    options = parser.parse_args()
    options.work = options.work.resolve()
    unpack(options.work)
    if options.stage == "check":
        return check()
    return train(options)


def unpack(work: Path) -> None:
    """Lay the program out in `work`, once, and let Python find it. Ends the program where the pack does not fit."""
    manifest = json.loads((PACK / "manifest.json").read_text())
    ours = f"{sys.version_info.major}.{sys.version_info.minor}"
    if manifest["python"] != ours:
        sys.exit(f"error: packed for Python {manifest['python']}, this is {ours}; pack again with --python {ours}")
    program = work / "program"
    if not program.exists():
        coming = work / f"program.{os.getpid()}.tmp"
        with tarfile.open(PACK / "program.tar.xz") as tar:
            tar.extractall(coming, filter="data")
        if manifest["data"] == "latents.tar.xz":
            with tarfile.open(PACK / "latents.tar.xz") as tar:
                tar.extractall(coming / "latents", filter="data")
        else:
            with lzma.open(PACK / "pictures.tar.xz") as packed, open(coming / "pictures.tar", "wb") as whole:
                shutil.copyfileobj(packed, whole)
        coming.rename(program)
    sys.path[:0] = [str(program / "src"), str(program / "site")]
    for name in HIDDEN:
        sys.modules[name] = None  # type: ignore[assignment]  # what Python's own import takes for "not there"
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ["RAC_WEIGHTS_DIR"] = str(program / "weights")
    missing = [name for name in IMPORTED.split() if importlib.util.find_spec(name) is None]
    if missing:
        sys.exit(f"error: neither packed nor installed: {', '.join(missing)}; pack again without them in --there")
    if (program / "weights").is_dir() and not (program / "weights" / LPIPS_FILE).exists():
        widen(program / "weights")


def widen(weights: Path) -> None:
    """Write LPIPS's file from its packed 8 bits."""
    from safetensors.torch import load_file, save_file

    tensors = load_file(weights / "lpips_vgg16_int8.safetensors")
    scales = {name: tensors.pop(name) for name in list(tensors) if name.endswith(".scale")}
    whole = {
        name: (tensor.float() * scales[f"{name}.scale"]).half() if f"{name}.scale" in scales else tensor
        for name, tensor in tensors.items()
    }
    save_file(whole, weights / "coming.tmp")
    os.replace(weights / "coming.tmp", weights / LPIPS_FILE)


def check() -> int:
    """Say what this machine has."""
    import torch

    import rac

    cuda = torch.cuda.is_available()
    print(f"Python {sys.version.split()[0]}, torch {torch.__version__}, rac {rac.__version__}, {os.cpu_count()} cores")
    print(torch.cuda.get_device_name() if cuda else "no CUDA device")
    print(f"ready after {time.monotonic() - BEGAN:.1f} s")
    return 0


def train(options: argparse.Namespace) -> int:
    """Plan a stage, or find the plan it has; train within the time; put what it gives into OUT/STAGE."""
    from rac.config import from_json, read_json
    from rac.errors import RacError

    directory = options.work / "runs" / options.stage
    end = BEGAN + 60 * options.minutes
    try:
        going_on = (directory / "recipe.json").is_file()
        if going_on and (options.set or options.iterations or options.recipe):
            raise RacError(
                f"{directory} has its recipe already; leave out --recipe, --set and --iterations, or remove it"
            )
        recipe = chosen(options)
        if going_on:
            recipe = from_json(type(recipe), read_json(directory / "recipe.json"), str(directory / "recipe.json"))
        elif options.iterations:
            recipe = lasting(recipe, options.iterations)
        else:
            recipe = planned(recipe, options, end)
        minutes = max(0.01, (end - reserve(options.minutes) - time.monotonic()) / 60)
        recipe = replace(recipe, train=replace(recipe.train, minutes=minutes))
        fitted = recipe.run(directory, resume=going_on, crops=options.work / "crops" / options.stage)
    except RacError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        hand_over(options, directory)
        return 130
    hand_over(options, directory)
    done, whole = fitted.iteration, recipe.train.iterations
    print(f"{done} of {whole} iterations, {(time.monotonic() - BEGAN) / 60:.1f} minutes for this command")
    if done < whole:
        print("the same command goes on")
    return 0


def chosen(options: argparse.Namespace) -> Any:
    """The stage's recipe on what is packed. Raises `RacError` for a recipe of another product, and coders unused."""
    from rac.errors import RacError
    from rac.experiments.sweep import changed, read_setting
    from rac.recipes import RECIPES

    stage = STAGES[options.stage]
    recipe = RECIPES[stage.recipe][1]
    if options.recipe:
        product, others = recipe.product, {name: one for name, (_, one) in RECIPES.items()}
        fitting = [name for name, one in others.items() if one.product == product]
        if options.recipe not in fitting:
            raise RacError(f"the stage {options.stage} trains a {product}; recipes are {', '.join(fitting)}")
        recipe = others[options.recipe]
    latents = options.work / "program" / "latents"
    if options.tiny:
        data = recipe.data
        recipe = recipe.tiny()
        if latents.is_dir():  # their size is what it is
            recipe = replace(recipe, data=data)
    recipe = changed(recipe, dict(read_setting(choice, recipe) for choice in options.set))
    found: dict[str, str] = {}
    for what, earlier, given in (("teacher", stage.teacher, options.teacher), ("start", stage.start, options.start)):
        folder = given or (options.work / "coders" / earlier if earlier else None)
        if folder is not None and not folder.is_dir():
            raise RacError(f"{folder} is no coder's folder; run the stage {earlier} first, or give --{what}")
        if folder is not None:
            name = "coder" if (what, recipe.product) == ("teacher", "generator") else what
            if name not in {field.name for field in fields(recipe)}:
                raise RacError(f"the stage {options.stage} has no {what}; leave out --{what}")
            found[name] = str(folder.resolve())
    packed = latents if latents.is_dir() else options.work / "program" / "pictures.tar"
    data = replace(recipe.data, paths=(packed,))
    return replace(recipe, data=data, train=replace(recipe.train, tensorboard=False), **found)


def lasting(recipe: Any, iterations: int) -> Any:
    """The recipe at another length; what is told in iterations keeps its place."""
    share = iterations / recipe.train.iterations
    train = replace(
        recipe.train,
        iterations=iterations,
        warmup=min(recipe.train.warmup, iterations // 10),
        gallery_every=max(1, -(-iterations // 4)),
        log_every=max(1, min(recipe.train.log_every, iterations // 20)),
    )
    start = min(round(recipe.discriminator.start * share), iterations) if has_discriminator(recipe) else 0
    return discriminating_from(replace(recipe, train=train), start)


def has_discriminator(recipe: Any) -> bool:
    """Whether the recipe has settings of one."""
    return any(field.name == "discriminator" for field in fields(recipe))


def discriminating_from(recipe: Any, start: int) -> Any:
    """The recipe with its discriminator, if any, at work from iteration `start` on."""
    if not has_discriminator(recipe):
        return recipe
    return replace(recipe, discriminator=replace(recipe.discriminator, start=start))


def planned(recipe: Any, options: argparse.Namespace, end: float) -> Any:
    """The recipe at the length that fills the time until `end`, by the speed of its first seconds on this machine.

    Measured with the discriminator at work throughout, so rather too slow than too fast. Raises `RacError` where that
    gives nothing to plan by.
    """
    from rac.errors import RacError
    from rac.train import read_log

    folder = options.work / "probe"
    shutil.rmtree(folder, ignore_errors=True)
    seconds = min(30.0, 9.0 * options.minutes)
    trial = discriminating_from(recipe, 0)
    # Prepared crops are those of the training itself, held-out ones included: they are made once.
    prepared = recipe.data.cached_crops > 0
    trial = replace(
        trial,
        data=recipe.data if prepared else replace(recipe.data, held_out=2),
        train=replace(
            recipe.train,
            iterations=10**6,
            minutes=seconds / 60,
            log_every=1,
            gallery_every=10**6,
            checkpoint_minutes=60,
        ),
    )
    trial.run(folder, crops=options.work / "crops" / options.stage)
    lines = [record for record in read_log(folder / "log.jsonl") if "train" in record]
    shutil.rmtree(folder)
    left = end - reserve(options.minutes) - time.monotonic()
    if len(lines) < FEWEST or left <= 0:
        raise RacError(
            f"{len(lines)} iterations in the first {seconds:.0f} seconds, and {left:.0f} seconds left: too little to "
            "plan by; give more --minutes, or --iterations"
        )
    speed = settled_speed(lines)
    batch = recipe.train.batch
    iterations = max(1, int(0.95 * speed * left / batch))
    images = json.loads((PACK / "manifest.json").read_text())["images"]
    print(
        f"plan: {speed:.0f} img/s, so {iterations} iterations of {batch} images in {left / 60:.1f} minutes, "
        f"{iterations * batch / images:.1f} epochs of {images} packed images",
        flush=True,
    )
    return lasting(recipe, iterations)


def settled_speed(lines: list[dict[str, Any]]) -> float:
    """Images a second over the later half of a log's lines: by then kernels are chosen and the supply is steady."""
    first, last = lines[(len(lines) - 1) // 2], lines[-1]
    return (last["images"] - first["images"]) / max(last["seconds"] - first["seconds"], 1e-6)


def reserve(minutes: float) -> float:
    """Seconds kept for the last gallery, the saving, and handing over."""
    return min(30.0, 9.0 * minutes)


def hand_over(options: argparse.Namespace, directory: Path) -> None:
    """What was trained, averaged, in bfloat16, for the next stage and for OUT, with the log and the last gallery."""
    import torch

    from rac import hub

    product = hub.product(directory)
    if product == directory:
        return
    kept, out = options.work / "coders" / options.stage, options.out / options.stage
    shutil.rmtree(kept, ignore_errors=True)
    load = hub.load_generator if hub.is_generator(product) else hub.load
    load(product).save(kept, dtype=torch.bfloat16)
    shutil.copytree(kept, out, dirs_exist_ok=True)
    for file in (directory / "log.jsonl", directory / "recipe.json", *sorted(directory.glob("gallery-*.png"))[-1:]):
        shutil.copy(file, out / ("gallery.png" if file.suffix == ".png" else file.name))
    for file in sorted(out.iterdir()):
        size = file.stat().st_size
        print(f"{file}: {size} bytes" + (" - more than 16 MiB" if size > LARGEST else ""))


if __name__ == "__main__":
    sys.exit(main())
