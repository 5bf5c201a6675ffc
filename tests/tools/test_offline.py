"""Packing a training for a machine without internet: its parts. `tools/offline/rehearse.py` goes through the whole."""

from __future__ import annotations

import argparse
import importlib.util
import json
import lzma
import sys
import tarfile
import zipfile
from pathlib import Path
from types import ModuleType

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import rac
from rac.commands.cache import Command
from rac.data import DataConfig
from rac.data.files import find_pictures
from rac.errors import RacError
from rac.recipes import RECIPES

TOOLS = Path(__file__).parents[2] / "tools" / "offline"


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"offline_{name}", TOOLS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look there
    spec.loader.exec_module(module)
    return module


pack, run = load("pack"), load("run")


def test_eight_bits_come_back_to_half_a_level_on_the_other_side(tmp_path: Path) -> None:
    torch.manual_seed(0)
    # Channels of very different sizes, one of them zero, which one scale for all would lose.
    weight = torch.randn(3, 5, 3, 3) * torch.tensor([1e-3, 1.0, 0.0]).view(3, 1, 1, 1)
    tensors = {
        "conv0.weight": weight.half(),
        "conv0.bias": torch.randn(3).half(),
        "lin0.weight": torch.rand(1, 3, 1, 1),
    }
    narrow = pack.narrowed(tensors)
    assert narrow["conv0.weight"].dtype == torch.int8
    save_file(narrow, tmp_path / "lpips_vgg16_int8.safetensors")
    run.widen(tmp_path)
    there, here = load_file(tmp_path / run.LPIPS_FILE), pack.widened(narrow)
    assert there.keys() == here.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert torch.equal(there[name], here[name])
        assert there[name].dtype == tensor.dtype
        if name != "conv0.weight":
            assert torch.equal(there[name], tensor)
    level = weight.abs().amax(dim=(1, 2, 3), keepdim=True) / 127
    error = (there["conv0.weight"].float() - weight).abs()
    assert (error <= 0.51 * level + 1e-3 * weight.abs()).all()
    assert error.max() > 0


def test_what_the_target_has_and_only_that_is_left_out() -> None:
    bare = pack.closure(pack.Target())
    assert {"diffusers", "tyro", "safetensors", "matplotlib", "contourpy"} <= bare.keys()
    assert not bare.keys() & {"torch", "numpy", "sympy", "pytest", "scikit-image"}  # torch's own, and extras
    less = pack.closure(pack.Target(there=frozenset({"torch", "numpy", "matplotlib"})))
    # What it alone needs goes with it, what others need as well stays.
    assert "contourpy" not in less
    assert {"pillow", "packaging"} <= less.keys()


def test_a_wheel_that_unzipping_does_not_install_is_refused(tmp_path: Path) -> None:
    for name, inside in (("plain", "plain/__init__.py"), ("odd", "odd-1.data/purelib/odd.py")):
        with zipfile.ZipFile(tmp_path / f"{name}.whl", "w") as file:
            file.writestr(inside, "x = 1")
    pack.unzip(tmp_path / "plain.whl", tmp_path / "site")
    assert (tmp_path / "site" / "plain" / "__init__.py").read_text() == "x = 1"
    with pytest.raises(RacError, match=r"odd-1\.data"):
        pack.unzip(tmp_path / "odd.whl", tmp_path / "site")


def test_pictures_are_brought_to_their_side_and_fill_the_room(tmp_path: Path) -> None:
    noise = torch.Generator().manual_seed(0)
    (tmp_path / "photos").mkdir()
    for index in range(6):
        pixels = torch.randint(0, 256, (60, 90, 3), generator=noise, dtype=torch.uint8).numpy()
        folder = tmp_path / "photos" / ("cat", "dog")[index % 2]
        folder.mkdir(exist_ok=True)
        Image.fromarray(pixels).save(folder / f"{index}.png")
    (tmp_path / "photos" / "damaged.png").write_bytes(b"no picture")
    options = argparse.Namespace(data=[tmp_path / "photos"], side=40, quality=85, pictures=0)
    whole = pack.pack_pictures(tmp_path / "whole.tar.xz", options, 10**6)
    assert whole == 6
    room = 8 * 1024
    count = pack.pack_pictures(tmp_path / "some.tar.xz", options, room)
    assert 0 < count < 6
    assert (tmp_path / "some.tar.xz").stat().st_size <= room
    with tarfile.open(tmp_path / "some.tar.xz") as tar:
        assert len(tar.getnames()) == count
        assert {Path(name).parent.name for name in tar.getnames()} <= {"cat", "dog"}
        assert Image.open(tar.extractfile(tar.getnames()[0])).size == (60, 40)
    # The classes are there on the other side.
    with lzma.open(tmp_path / "whole.tar.xz") as packed:
        (tmp_path / "pictures.tar").write_bytes(packed.read())
    found = find_pictures((tmp_path / "pictures.tar",))
    assert sorted(str(one.class_name) for one in found) == ["cat"] * 3 + ["dog"] * 3
    with pytest.raises(RacError, match="no picture fits"):
        pack.pack_pictures(tmp_path / "none.tar.xz", options, 100)


def test_the_speed_is_that_of_the_later_half() -> None:
    # Two slow iterations, in which kernels are chosen, then two images a second.
    seconds = [10.0, 20.0, 21.0, 22.0, 23.0]
    lines = [{"images": 2 * k, "seconds": s, "images_per_second": 0.2} for k, s in enumerate(seconds, 1)]
    assert run.settled_speed(lines) == 2.0
    assert run.settled_speed(lines[:2]) == 0.2


@pytest.mark.parametrize("stage", run.STAGES)
@pytest.mark.parametrize("iterations", [1, 300, 20_000])
def test_a_stage_of_another_length_keeps_its_shape(stage: str, iterations: int) -> None:
    recipe = RECIPES[run.STAGES[stage].recipe][1]
    other = run.lasting(recipe, iterations)
    assert other.train.iterations == iterations
    assert other.train.warmup <= iterations / 10
    assert run.has_discriminator(recipe) == (recipe.product == "coder")
    if run.has_discriminator(recipe):
        share = recipe.discriminator.start / recipe.train.iterations
        assert abs(other.discriminator.start / iterations - share) <= 0.5 / iterations
    assert other.data == recipe.data
    assert other.train.batch == recipe.train.batch


def test_what_is_kept_back_is_less_than_the_time() -> None:
    assert run.reserve(9) == 30
    assert all(0 < run.reserve(minutes) < 60 * minutes for minutes in (0.1, 1, 3, 9))


@pytest.fixture
def prepared(tmp_path: Path, images) -> Path:  # type: ignore[no-untyped-def]
    """Moments of 64 crops of two classes, as `rac cache` writes them, without pixels."""
    for k in range(40):
        path = tmp_path / "pets" / ("cat", "dog")[k % 2] / f"{k}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        rac.write_image(images(1, 40, 48, k), path)
    data = DataConfig(paths=(tmp_path / "pets",), size=32, smallest_crop=32, held_out=32)
    out = tmp_path / "prepared"
    made = Command(
        "klvae-f8d4", data=data, out=out, crops=64, pixels=False, moments=True, dtype="bfloat16", shard_size=32
    )
    assert made.run() == 0
    return out


def test_prepared_crops_are_packed_whole_or_not_at_all(tmp_path: Path, prepared: Path) -> None:
    assert pack.pack_latents(tmp_path / "latents.tar.xz", prepared, 10**6) == 64
    with tarfile.open(tmp_path / "latents.tar.xz") as tar:
        tar.extractall(tmp_path / "there", filter="data")
    names = {path.name for path in (tmp_path / "there").iterdir()}
    assert names == {"crops.json", "held-out.safetensors", "00000.safetensors", "00001.safetensors"}
    for name in names:
        assert (tmp_path / "there" / name).read_bytes() == (prepared / name).read_bytes()
    with pytest.raises(RacError, match="raise --limit-mib, prepare fewer crops, or pack pictures"):
        pack.pack_latents(tmp_path / "none.tar.xz", prepared, 100)
    with pytest.raises(RacError, match=r"holds no prepared crops \(no crops.json\)"):
        pack.crops_in(tmp_path)
    (prepared / "00001.safetensors").unlink()
    with pytest.raises(RacError, match="not all crops are prepared"):
        pack.crops_in(prepared)
    data = DataConfig(paths=(tmp_path / "pets",), size=32, smallest_crop=32)
    assert Command(data=data, out=tmp_path / "bare", crops=32, shard_size=32).run() == 0
    with pytest.raises(RacError, match="holds crops without latents; make them with rac cache --teacher"):
        pack.crops_in(tmp_path / "bare")


def test_coders_go_along_by_folder_or_name(tmp_path: Path) -> None:
    pack.pack_coder("taef2", tmp_path)
    assert (tmp_path / "src" / "rac" / "weights" / "taef2" / "config.json").is_file()
    pack.pack_coder(str(tmp_path / "src" / "rac" / "weights" / "taef2"), tmp_path)
    assert (tmp_path / "coders" / "taef2" / "config.json").is_file()
    with pytest.raises(RacError, match="none-such is neither a folder nor a shipped coder: klvae-f8d4"):
        pack.pack_coder("none-such", tmp_path)


def stage(tmp_path: Path, **changes: object) -> argparse.Namespace:
    """Options of the stage "generator", tiny, in the folder `work`."""
    given = {
        "stage": "generator",
        "minutes": 5.0,
        "out": tmp_path / "results",
        "work": tmp_path / "work",
        "teacher": None,
        "start": None,
        "recipe": "sit-64",
        "set": ["field.classes=2", "data.size=32", "data.smallest_crop=32", "train.device=cpu"],
        "iterations": 2,
        "tiny": True,
    }
    return argparse.Namespace(**{**given, **changes})


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["latents", "pictures"])
def test_a_generator_is_trained_on_what_is_packed(tmp_path: Path, prepared: Path, kind: str) -> None:
    program = tmp_path / "work" / "program"
    program.mkdir(parents=True)
    if kind == "latents":
        prepared.rename(program / "latents")
    else:
        options = argparse.Namespace(data=[tmp_path / "pets"], side=40, quality=85, pictures=0)
        pack.pack_pictures(tmp_path / "pictures.tar.xz", options, 10**6)
        with lzma.open(tmp_path / "pictures.tar.xz") as packed:
            (program / "pictures.tar").write_bytes(packed.read())
    assert run.train(stage(tmp_path, set=[*stage(tmp_path).set, "data.held_out=2"])) == 0
    generator = rac.load_generator(tmp_path / "results" / "generator")
    assert generator.classes == ("cat", "dog")
    assert generator.sample([0], [1]).latent.isfinite().all()
    assert (tmp_path / "results" / "generator" / "gallery.png").is_file()
    # The time is planned on the same crops, prepared once.
    assert (tmp_path / "work" / "crops" / "generator").exists() == (kind == "pictures")
    assert json.loads((tmp_path / "results" / "generator" / "recipe.json").read_text())["coder"] == "klvae-f8d4"


def test_other_recipes_and_coders_of_a_stage(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for changes, words in (
        ({"recipe": "rac-128"}, "the stage generator trains a generator; recipes are sit-64"),
        ({"start": tmp_path}, "the stage generator has no start; leave out --start"),
        ({"teacher": tmp_path / "none"}, "none is no coder's folder"),
    ):
        assert run.train(stage(tmp_path, **changes)) == 1
        assert words in capsys.readouterr().err
    assert run.chosen(stage(tmp_path, teacher=tmp_path)).coder == str(tmp_path.resolve())
    assert run.chosen(stage(tmp_path, recipe=None, tiny=False, set=[])).channels == 32
