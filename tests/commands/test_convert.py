"""`rac convert`: public checkpoints in and out, and what is refused in one line."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import rac
from rac.coders.rac import RAC
from rac.fields import SiTFieldConfig
from rac.generators.convert import read_public
from rac.generators.flow import FlowGenerator, FlowGeneratorConfig
from rac.generators.sampling import Sampling
from rac.latents import LatentSpec


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, make_rac: Callable[..., RAC]) -> Path:
    """A coder, a generator of its latents, and files that are no checkpoints."""
    folder = tmp_path_factory.mktemp("convert")
    coder = make_rac(lively=0.05)
    rac.save(coder, folder / "coder")
    rac.save(make_rac(spec=LatentSpec(4, 3)), folder / "three")
    field = SiTFieldConfig(depth=2, width=16, heads=2, patch=2, classes=2)
    torch.manual_seed(0)
    generator = FlowGenerator(FlowGeneratorConfig(coder.spec, 4, field, ("cat", "dog"), None, Sampling(steps=2)))
    with torch.no_grad():
        for parameter in generator.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    generator.save(folder / "g")
    (folder / "text.pt").write_text("no checkpoint")
    torch.save({"ema": {"weight": torch.zeros(1)}}, folder / "other.pt")
    torch.save({"ema": print}, folder / "code.pt")
    save_file({"weight": torch.zeros(1)}, folder / "other.safetensors")
    return folder


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
@pytest.mark.parametrize("options", [(), ("--time", "noise"), ("--learn-sigma",)], ids=" ".join)
def test_a_generator_goes_out_and_comes_back(run, folder: Path, tmp_path: Path, suffix: str, options) -> None:  # type: ignore[no-untyped-def]
    file = tmp_path / "new" / f"sit{suffix}"
    ran = run("convert", folder / "g", "--out", file, *options)
    assert (ran.code, ran.err) == (0, "")
    wide = read_public(file)["final_layer.linear.weight"].shape[0]
    assert wide == 4 * 4 * (2 if options == ("--learn-sigma",) else 1)
    back = options if options[:1] == ("--time",) else ()
    asked = ("--coder", folder / "coder", "--classes", "cat", "dog", "--heads", 2)
    ran = run("convert", file, "--out", tmp_path / "g", *asked, *back)
    assert (ran.code, ran.err) == (0, "")
    assert f"a generator of 2 classes at 16 pixels; try: rac generate {tmp_path / 'g'}" in ran.out
    before, after = rac.load_generator(folder / "g"), rac.load_generator(tmp_path / "g")
    assert (after.classes, after.kind.coder) == (("cat", "dog"), str(folder / "coder"))
    settings = Sampling(steps=3, guidance=2)
    torch.testing.assert_close(
        after.sample([1, 2], [0, 1], settings).latent, before.sample([1, 2], [0, 1], settings).latent
    )
    assert run("generate", tmp_path / "g", "--steps", 1, "--count", 2, "--out", tmp_path / "made").code == 0


BAD: dict[str, tuple[tuple[str, ...], str]] = {
    "nothing there": (("{}/none.pt", "--coder", "{}/coder"), "none.pt does not exist"),
    "no tensors there": (("{}/none.safetensors", "--coder", "{}/coder"), "none.safetensors does not exist"),
    "no checkpoint": (("{}/text.pt", "--coder", "{}/coder"), "cut short, or holds more than tensors"),
    "code": (("{}/code.pt", "--coder", "{}/coder"), "cut short, or holds more than tensors"),
    "another network": (("{}/other.pt", "--coder", "{}/coder"), "it is none of SiT, REPA or LightningDiT"),
    "other tensors": (("{}/other.safetensors", "--coder", "{}/coder"), "it is none of SiT, REPA or LightningDiT"),
    "no coder": (("{}/sit.pt",), "give --coder"),
    "an unknown coder": (("{}/sit.pt", "--coder", "none-such"), "no coder 'none-such'"),
    "a coder of other latents": (("{}/sit.pt", "--coder", "{}/three", "--heads", "2"), "latents of 4 channels"),
    "a width that nobody published": (("{}/sit.pt", "--coder", "{}/coder"), "say how many heads"),
    "heads that do not divide": (("{}/sit.pt", "--coder", "{}/coder", "--heads", "3"), "its heads, 3"),
    "no heads": (("{}/sit.pt", "--coder", "{}/coder", "--heads", "0"), "heads 0 must be at least 1"),
    "names of other classes": (("{}/sit.pt", "--coder", "{}/coder", "--heads", "2", "--classes", "cat"), "1 names"),
    "one name twice": (
        ("{}/sit.pt", "--coder", "{}/coder", "--heads", "2", "--classes", "cat", "cat"),
        "class 'cat' is there twice",
    ),
    "a variance to read": (("{}/sit.pt", "--coder", "{}/coder", "--learn-sigma"), "--learn-sigma is for writing"),
    "an unknown generator": (("none-such", "--out", "{}/x.pt"), "no generator 'none-such'"),
    "a coder": (("{}/coder", "--out", "{}/x.pt"), "holds no generator"),
    "a folder for a file": (("{}/g",), "must be a file that ends in .pt"),
    "a coder to write with": (("{}/g", "--coder", "{}/coder", "--out", "{}/x.pt"), "--coder is for reading"),
    "classes to write with": (("{}/g", "--classes", "a", "--out", "{}/x.pt"), "--classes is for reading"),
    "a file that is there": (("{}/g", "--out", "{}/other.pt"), "exists; choose another --out"),
    "a folder of other things": (("{}/sit.pt", "--coder", "{}/coder", "--out", "{}"), "is no empty folder"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_line(run, folder: Path, tmp_path: Path, name: str) -> None:  # type: ignore[no-untyped-def]
    if not (folder / "sit.pt").exists():
        assert run("convert", folder / "g", "--out", folder / "sit.pt").code == 0
    arguments, words = BAD[name]
    given = [one.replace("{}", str(folder)) for one in arguments]
    ran = run("convert", *given, *([] if "--out" in given else ["--out", tmp_path / "out"]))
    assert (ran.code, ran.err.count("\n")) == (2, 1), ran
    assert words in ran.err
    assert not (tmp_path / "out").exists()
    assert not (folder / "x.pt").exists()
