"""`rac generate`: files, classes, interruptions, shares, and what is refused before any work."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import rac
from rac.coders.klvae import KLVAEConfig
from rac.coders.rac import RAC
from rac.fields import SiTFieldConfig
from rac.generators.flow import FlowGenerator, FlowGeneratorConfig
from rac.generators.sample import Source
from rac.generators.sampling import Sampling
from rac.latents import Statistics
from rac.report.pictures import Panel, strip

CLASSES = ("tench", "golf ball", "church", "gas/pump")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, make_rac: Callable[..., RAC]) -> Path:
    """Tiny generators, and coders that fit them or do not."""
    folder = tmp_path_factory.mktemp("generators")
    coder = make_rac(lively=0.05)
    rac.save(coder, folder / "coder")
    rac.save(make_rac(statistics=Statistics.of(0.0, 2.0)), folder / "scaled")
    rac.save(make_rac(ways=("encode",)), folder / "encoder")
    torch.manual_seed(0)
    rac.save(KLVAEConfig(widths=(8, 8, 8), latent_channels=4, norm_groups=4).build(), folder / "at-once")
    rac.save(KLVAEConfig(widths=(8, 8), latent_channels=4, norm_groups=4).build(), folder / "other")
    field = SiTFieldConfig(depth=1, width=16, heads=2, patch=2, classes=4)
    config = FlowGeneratorConfig(coder.spec, 4, field, CLASSES, str(folder / "coder"), Sampling(steps=2))
    makes = {
        "g": config,
        "bare": replace(config, field=replace(field, classes=0), classes=()),
        "alone": replace(config, coder=None),
        "others": replace(config, classes=("a", "b", "c", "d")),
    }
    for name, made in makes.items():
        torch.manual_seed(1)
        generator = FlowGenerator(made)
        with torch.no_grad():
            for parameter in generator.parameters():
                parameter.add_(0.3 * torch.randn_like(parameter))
        generator.save(folder / name)
    return folder


def pictures(out: Path) -> dict[str, np.ndarray]:
    return {
        path.relative_to(out).as_posix(): np.asarray(Image.open(path)).astype(int)
        for path in sorted(out.rglob("*.png"))
        if path.name != "grid.png"
    }


def same(one: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> bool:
    """Whether files and pixels are equal; another batch may round a pixel otherwise."""
    return one.keys() == other.keys() and all(abs(one[name] - other[name]).max() <= 1 for name in one)


def test_images_lie_in_folders_of_their_classes(run, folder: Path, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    out = tmp_path / "out"
    ran = run("generate", folder / "g", "--classes", "Golf-Ball", "3", "--count", 3, "--out", out)
    assert ran.code == 0, ran
    assert list(pictures(out)) == [
        "images/gas-pump/000001.png",
        "images/golf ball/000000.png",
        "images/golf ball/000002.png",
    ]
    assert next(iter(pictures(out).values())).shape == (16, 16, 3)
    assert Image.open(out / "grid.png").size[0] > 300
    record = json.loads((out / "generate.json").read_text())
    assert record["classes"] == ["golf ball", "gas/pump"]
    assert record["evaluations"] == 2
    assert f"{out}: 3 images" in ran.out


def test_each_latent_is_decoded_with_each_number_of_steps(  # type: ignore[no-untyped-def]
    run, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    drawn: list[Panel] = []
    monkeypatch.setattr("rac.commands.generate.strip", lambda panels: drawn.extend(panels) or strip(panels))
    asked = ("--classes", "church", "--count", 2, "--decode-steps", 1, 3, "--latents", "--guidance", 2, "--steps", 3)
    ran = run("generate", folder / "g", *asked, "--out", out)
    assert ran.code == 0, ran
    assert {name.split("/")[0] for name in pictures(out)} == {"images-1", "images-3"}
    assert [panel.note for panel in drawn] == ["1 step", "3 steps"] * 2
    assert json.loads((out / "generate.json").read_text())["evaluations"] == 6
    # The latents are what `rac decode` reads.
    decoded = run("decode", out / "latents", "--steps", 3, "--out", tmp_path / "decoded")
    assert decoded.code == 0, decoded
    again = np.asarray(Image.open(tmp_path / "decoded" / "000001.png")).astype(int)
    assert abs(again - pictures(out)["images-3/church/000001.png"]).max() <= 1


def test_an_image_is_the_same_alone_and_among_others(run, folder: Path, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    model = folder / "g"
    assert run("generate", model, "--count", 9, "--batch", 4, "--out", tmp_path / "whole").code == 0
    assert run("generate", model, "--count", 9, "--batch", 9, "--out", tmp_path / "at-once").code == 0
    assert same(pictures(tmp_path / "whole"), pictures(tmp_path / "at-once"))
    for part in ("0/2", "1/2"):
        ran = run("generate", model, "--count", 9, "--part", part, "--out", tmp_path / "shared")
        assert ran.code == 0, ran
    assert same(pictures(tmp_path / "whole"), pictures(tmp_path / "shared"))
    assert run("generate", model, "--count", 9, "--rng-seed", 1, "--out", tmp_path / "seed").code == 0
    assert not same(pictures(tmp_path / "whole"), pictures(tmp_path / "seed"))


def test_under_torchrun_each_process_makes_its_share(run, folder: Path, tmp_path: Path, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank, made in ((0, 2), (1, 3)):
        monkeypatch.setenv("RANK", str(rank))
        assert run("generate", folder / "bare", "--count", 3, "--out", tmp_path / "out").code == 0
        assert len(pictures(tmp_path / "out")) == made


def test_it_is_broken_off_and_goes_on(run, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # type: ignore[no-untyped-def]
    model, out = folder / "g", tmp_path / "out"
    assert run("generate", model, "--count", 8, "--batch", 2, "--out", tmp_path / "whole").code == 0
    samples, left = Source.samples, 3

    def interrupted(self: Source, *given):  # type: ignore[no-untyped-def]
        for number, piece in enumerate(samples(self, *given)):
            if number == left:
                raise KeyboardInterrupt
            yield piece

    monkeypatch.setattr(Source, "samples", interrupted)
    ran = run("generate", model, "--count", 8, "--batch", 2, "--out", out)
    assert ran.code == 130
    assert "stopped after 6 of 8 images; the same command with --resume goes on" in ran.err
    monkeypatch.undo()
    assert len(pictures(out)) == 6
    again = run("generate", model, "--count", 8, "--out", out)
    assert again.code == 2
    assert "holds 6 of these images; --resume makes the others" in again.err
    before = (out / "images" / "tench" / "000000.png").stat().st_mtime_ns
    ran = run("generate", model, "--count", 8, "--out", out, "--resume")
    assert ran.code == 0, ran
    assert "8 images, 2 of them new" in ran.out
    assert (out / "images" / "tench" / "000000.png").stat().st_mtime_ns == before
    assert same(pictures(out), pictures(tmp_path / "whole"))
    # More may be asked for later, and nothing is done where nothing lacks.
    assert "9 images, 1 of them new" in run("generate", model, "--count", 9, "--out", out, "--resume").out
    assert "9 images, 0 of them new" in run("generate", model, "--count", 9, "--out", out, "--resume").out
    other = run("generate", model, "--count", 9, "--out", out, "--resume", "--guidance", 3)
    assert other.code == 2
    assert "generated otherwise: sampling.guidance 3.0, was 1.0" in other.err


def test_classes_take_turns_or_are_drawn(run, folder: Path, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    assert run("generate", folder / "g", "--count", 8, "--steps", 1, "--out", tmp_path / "turns").code == 0
    found = [name.split("/")[1] for name in pictures(tmp_path / "turns")]
    assert {name: found.count(name) for name in found} == {"tench": 2, "golf ball": 2, "church": 2, "gas-pump": 2}
    asked = ("--count", 40, "--steps", 1, "--labels", "random", "--batch", 40)
    assert run("generate", folder / "g", *asked, "--out", tmp_path / "random").code == 0
    drawn = [name.split("/")[1] for name in pictures(tmp_path / "random")]
    counts = [drawn.count(name) for name in set(drawn)]
    assert len(counts) == 4
    assert len(set(counts)) > 1


def test_without_classes_images_lie_together(run, folder: Path, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    ran = run("generate", folder / "bare", "--count", 2, "--size", 24, "--out", tmp_path / "out")
    assert ran.code == 0, ran
    assert {name: one.shape for name, one in pictures(tmp_path / "out").items()} == {
        "images/000000.png": (24, 24, 3),
        "images/000001.png": (24, 24, 3),
    }


def test_every_sampler_and_guidance_by_another_generator(run, folder: Path, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    for place, options in enumerate(
        [
            ("--method", "heun", "--shift", 2),
            ("--method", "sde", "--diffusion", "constant", "--last", "tweedie", "--last-step", 0.1),
            ("--guidance", 1.5, "--weaker", folder / "alone", "--interval", 0.2, 0.8),
            ("--guidance", 1.5, "--channels", 3, "--bf16"),
        ]
    ):
        out = tmp_path / str(place)
        ran = run("generate", folder / "g", *options, "--steps", 3, "--count", 1, "--out", out)
        assert ran.code == 0, ran
        assert len(pictures(out)) == 1


# What is given beside the generator `g`, and words of the one line. {} is the folder of generators and coders.
BAD: dict[str, tuple[tuple[object, ...], str]] = {
    "unknown class": (("--classes", "church", "zebra"), "no class 'zebra'; classes are tench, golf ball"),
    "a class nearly known": (("--classes", "chruch"), "did you mean church?"),
    "a number too large": (("--classes", "4"), "or their numbers, 0 to 3"),
    "one class twice": (("--classes", "church", "2"), "class '2' is asked for twice"),
    "no images": (("--count", 0), "count 0 must be at least 1"),
    "fewer than none": (("--count", -3), "count -3"),
    "more than any disk holds": (("--count", 10**12), "at most 10,000,000"),
    "guidance that is no number": (("--guidance", "nan"), "guidance nan must be a finite number"),
    "infinite guidance": (("--guidance", "inf"), "guidance inf"),
    "no steps": (("--steps", 0), "steps 0 must be a whole number of at least 1"),
    "no decode steps": (("--decode-steps", 1, 0), "steps 0 must be a whole number"),
    "an interval upside down": (("--interval", 0.9, 0.1), "interval 0.9 0.1"),
    "an interval beyond time": (("--interval", 0.0, 2.0), "must lie in [0, 1]"),
    "no channels": (("--channels", 0, "--guidance", 2), "channels 0"),
    "more channels than there are": (("--channels", 5, "--guidance", 2), "more than the latents have, 4"),
    "no shift": (("--shift", 0), "shift 0.0 must be above 0"),
    "an SDE of one step": (("--method", "sde", "--steps", 1), "at least 2 steps"),
    "a last step of the whole": (("--method", "sde", "--last-step", 1), "last step of the SDE 1.0"),
    "an empty batch": (("--batch", 0), "batch 0"),
    "a share that is none": (("--part", "2/2"), "part '2/2' must be k/n"),
    "an unknown device": (("--device", "gpu"), "device 'gpu' is unknown"),
    "threads by the thousand": (("--threads", 10**6), "threads"),
    "an unknown coder": (("--coder", "no-such"), "no coder 'no-such'"),
    "a coder of other latents": (("--coder", "{}/other"), "the generator's latents are not those of"),
    "statistics that do not fit": (("--coder", "{}/scaled"), "statistics"),
    "a coder that decodes nothing": (("--coder", "{}/encoder"), "trained to encode only"),
    "steps of a coder without": (
        ("--coder", "{}/at-once", "--decode-steps", 2),
        "decodes in one pass and has no steps",
    ),
    "a generator as coder": (("--coder", "{}/g"), "a generator of latents, not a coder"),
    "a coder as weaker one": (("--weaker", "{}/coder", "--guidance", 2), "holds no generator"),
    "a weaker one of other classes": (
        ("--weaker", "{}/others", "--guidance", 2),
        "weaker generator is of another kind",
    ),
    "a weaker one without guidance": (("--weaker", "{}/alone"), "--weaker has no use without --guidance"),
    "an interval of no guidance": (("--interval", 0.1, 0.9), "--interval has no use without --guidance"),
    "an SDE's last step of another method": (("--last-step", 0.1), "--last-step has no use without --method sde"),
    "a size between": (("--size", 18), "size 18 must be a multiple"),
    "a size of half a patch": (("--size", 12), "no multiples of 2"),
    "a size that no memory holds": (("--size", 10**6), "cannot be generated"),
    "going on with nothing": (("--resume",), "holds nothing to go on with"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_line_before_any_work(run, folder: Path, tmp_path: Path, name: str) -> None:  # type: ignore[no-untyped-def]
    options, words = BAD[name]
    given = [str(one).replace("{}", str(folder)) for one in options]
    ran = run("generate", folder / "g", "--out", tmp_path / "out", *given)
    assert ran.code == 2, ran
    assert ran.err.startswith("rac: error: ")
    assert ran.err.count("\n") == 1
    assert words in ran.err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("model", "options", "words"),
    [
        ("no-such", (), "no generator 'no-such'"),
        ("{}/coder", (), "holds no generator"),
        ("{}/bare", ("--classes", "church"), "this generator knows no classes"),
        ("{}/bare", ("--guidance", 2), "guidance without labels"),
        ("{}/alone", (), "names no coder of its latents; give --coder"),
    ],
)
def test_bad_generators_are_one_line(run, folder: Path, tmp_path: Path, model: str, options, words: str) -> None:  # type: ignore[no-untyped-def]
    ran = run("generate", model.replace("{}", str(folder)), "--out", tmp_path / "out", *options)
    assert (ran.code, ran.err.count("\n")) == (2, 1)
    assert words in ran.err
    assert not (tmp_path / "out").exists()


def test_a_folder_of_other_things_is_left_alone(run, folder: Path, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("mine")
    ran = run("generate", folder / "g", "--out", tmp_path / "out")
    assert ran.code == 2
    assert "is not empty; choose another --out" in ran.err
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["thesis.txt"]
