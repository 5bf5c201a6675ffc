"""Exported files: what they say of themselves, what they compute at sizes they were not made at, what is refused."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tiny import untrained_dgae
from torch import Tensor

import rac
from rac.coders.klvae import KLVAEConfig
from rac.coders.protocol import Coder
from rac.errors import RacError
from rac.fields import LdmFieldConfig, LocalFieldConfig, TinyFieldConfig
from rac.integrations.export import SUFFIX, check, export, load, part_of, read_description
from rac.latents import Statistics

EXTRA = ("onnx", "onnxruntime", "onnxscript")
MISSING = [module for module in EXTRA if importlib.util.find_spec(module) is None]
needs_onnx = pytest.mark.skipif(bool(MISSING), reason=f"the extra `export` is not installed: no {', '.join(MISSING)}")

SHAPES = ((1, 1, 2), (3, 5, 3), (2, 4, 4))
"""Batch and blocks down and across; not those that the exporter is shown, and one of a single block."""
STATISTICS = Statistics.scaled(0.5, 0.3, (0.1, -0.2, 0.3, 0.0), (1.5, 0.5, 1.0, 2.0))
TINY = TinyFieldConfig(widths=(8, 8, 8), blocks=(1, 1, 1))
LOCAL = LocalFieldConfig(widths=(8, 8), blocks=(1, 1), down=(8,), down_blocks=(1,), patch=2, embedding=8)
LDM = LdmFieldConfig(widths=(8, 8, 8), layers_per_block=1, groups=4)

CODERS: dict[str, Callable[..., Coder]] = {
    "tiny, nearest": lambda make_rac: make_rac(lively=0.05, statistics=STATISTICS, field=TINY),
    "tiny, shuffle, projector": lambda make_rac: make_rac(
        lively=0.05, statistics=STATISTICS, field=TINY, spread="shuffle", contraction="projector"
    ),
    "local, beside": lambda make_rac: make_rac(lively=0.05, statistics=STATISTICS, field=LOCAL, spread="beside"),
    "ldm with position": lambda make_rac: make_rac(lively=0.05, statistics=STATISTICS, field=LDM),
    "seed noise": lambda make_rac: make_rac(
        lively=0.05, statistics=STATISTICS, field=LOCAL, spread="beside", seed_noise=0.5
    ),
    "DGAE": lambda make_rac: untrained_dgae(0.05, STATISTICS),
    "KL-VAE": lambda make_rac: KLVAEConfig(widths=(8, 8, 8), latent_channels=4, norm_groups=4).build().eval(),
}


def frozen(coder: Coder) -> Coder:
    return coder.eval().requires_grad_(False)


def inputs(coder: Coder, part: str) -> list[tuple[Tensor, ...]]:
    """An image each, or a latent with noise if the coder takes any."""
    generator = torch.Generator().manual_seed(0)
    channels, block = (3, 4) if part == "encode" else (4, 1)
    found = [torch.rand(b, channels, h * block, w * block, generator=generator) * 2 - 1 for b, h, w in SHAPES]
    noises = [coder.noise_of(x, range(len(x))) if part == "decode" else None for x in found]
    return [(x,) if noise is None else (x, noise) for x, noise in zip(found, noises, strict=True)]


def walked(coder: Coder, part: str, steps: int) -> int | None:
    return None if coder.walk(part) is None else steps


@needs_onnx
@pytest.mark.slow
@pytest.mark.parametrize("part", ["encode", "decode"])
@pytest.mark.parametrize("kind", CODERS)
def test_onnx_agrees_with_torch_at_sizes_it_was_not_made_at(kind, part, make_rac, tmp_path) -> None:
    coder = frozen(CODERS[kind](make_rac))
    module = part_of(coder, part, walked(coder, part, 2), "raw")
    export(module, tmp_path / "coder.onnx")
    found = check(module, tmp_path / "coder.onnx", inputs(coder, part), runs=1)
    assert max(found.largest) < 1e-5
    assert [path.name for path in tmp_path.iterdir()] == ["coder.onnx"]  # weights and all


@pytest.mark.slow
@pytest.mark.parametrize("part", ["encode", "decode"])
@pytest.mark.parametrize("kind", ["tiny, nearest", "seed noise", "DGAE"])
def test_programs_agree_with_the_coder(kind, part, make_rac, tmp_path) -> None:
    coder = frozen(CODERS[kind](make_rac))
    steps = walked(coder, part, 2)
    export(part_of(coder, part, steps, "normalised"), tmp_path / "coder.pt2", "torch-export", "mine")
    program = load(tmp_path / "coder.pt2")
    for x, *noise in inputs(coder, part)[1:]:  # a program takes no side of a single block, a DGAE's none of two
        # The coder's own public way, so that what is exported is held against it and not against itself.
        given = {"noise": noise[0]} if noise else {}
        expected = coder.encode(x, steps) if part == "encode" else coder.decode(x, steps, **given)
        torch.testing.assert_close(program(x, *noise), expected, atol=1e-5, rtol=0)
    said = read_description(tmp_path / "coder.pt2")
    assert (said["part"], said["steps"], said["coder"], said["latents"]) == (part, steps, "mine", "normalised")
    channels = {"seed noise": 4, "DGAE": 3}.get(kind)
    assert said["noise"] == (channels if part == "decode" else None)


@pytest.mark.parametrize("kind", CODERS)
def test_raw_and_normalised_parts_are_the_coder(kind, make_rac) -> None:
    coder = frozen(CODERS[kind](make_rac))
    back, there = walked(coder, "encode", 3), walked(coder, "decode", 3)
    ((image,), (latent, *noise)) = inputs(coder, "encode")[1], inputs(coder, "decode")[1]
    raw_latent = coder.statistics.denormalise(latent)
    with torch.no_grad():
        encoded = coder.encode(image, back)
        decoded = coder.decode(latent, there, noise=noise[0] if noise else None)
        torch.testing.assert_close(part_of(coder, "encode", back)(image), encoded)
        torch.testing.assert_close(part_of(coder, "encode", back, "raw")(image), coder.statistics.denormalise(encoded))
        torch.testing.assert_close(part_of(coder, "decode", there)(latent, *noise), decoded)
        by_raw = part_of(coder, "decode", there, "raw")(raw_latent, *noise)
        torch.testing.assert_close(by_raw, decoded, atol=1e-5, rtol=1e-5)


@needs_onnx
@pytest.mark.slow
@pytest.mark.parametrize("name", ["rac-64", "klvae-f8d4"])
def test_shipped_coders_on_photographs(name, run, tmp_path) -> None:
    pytest.importorskip("skimage", reason="scikit-image's photographs are not installed")
    steps = ("--steps", "1") if name.startswith("rac") else ()
    ran = run("export", name, "--out", tmp_path / "coder.onnx", "--latents", "raw", *steps)
    assert ran.code == 0, ran.err
    differences = [float(line.split()[2]) for line in ran.out.splitlines() if line.startswith("largest difference")]
    assert len(differences) == 2
    assert max(differences) < 1e-4
    said = read_description(tmp_path / "coder-decode.onnx")
    statistics = rac.load(name).statistics
    assert (said["factor"], said["channels"], said["statistics"]) == (8, 4, statistics.hash())
    assert (said["scale"], said["shift"]) == (float(statistics.scale), float(statistics.shift))
    assert (said["part"], said["latents"], said["steps"]) == ("decode", "raw", 1 if steps else None)
    assert said["image_range"] == [-1, 1]


def test_verb_writes_and_checks_a_program(coder_dir: Path, run, tmp_path) -> None:
    out = tmp_path / "new" / "coder.pt2"
    ran = run("export", coder_dir, "--format", "torch-export", "--part", "decode", "--steps", 1, "--out", out)
    assert ran.code == 0, ran.err
    assert out.is_file()
    assert "largest difference" in ran.out


@pytest.mark.slow
@pytest.mark.parametrize("format", ["torch-export", pytest.param("onnx", marks=needs_onnx)])
def test_nothing_is_left_where_writing_is_refused(coder_dir: Path, run, tmp_path, format: str) -> None:
    out = tmp_path / f"coder{SUFFIX[format]}"
    out.mkdir()
    ran = run("export", coder_dir, "--format", format, "--part", "decode", "--steps", 1, "--out", out)
    assert ran.code == 2
    assert "there is a folder of that name" in ran.err
    assert list(tmp_path.iterdir()) == [out]


@pytest.mark.slow
def test_verb_tells_of_a_file_that_is_wrong(coder_dir: Path, run, tmp_path, monkeypatch) -> None:
    from rac.commands import export as verb

    monkeypatch.setattr(verb, "TOLERANCE", -1.0)
    ran = run("export", coder_dir, "--format", "torch-export", "--part", "decode", "--out", tmp_path / "coder.pt2")
    assert ran.code == 2
    assert "differs from PyTorch" in ran.err


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["--size", "60"], "multiple of 16"),
        (["--out", "coder.pth"], "must end in .pt2"),
        (["--steps", "0"], "at least 1"),
    ],
)
def test_verb_refuses(arguments, word, coder_dir: Path, run, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    ran = run("export", coder_dir, "--format", "torch-export", "--part", "decode", *arguments)
    assert ran.code == 2
    assert word in ran.err
    assert ran.err.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_a_missing_extra_names_the_command(coder_dir: Path, run, monkeypatch) -> None:
    from rac.integrations import export as room

    monkeypatch.setattr(room, "find_spec", lambda name: None)
    ran = run("export", coder_dir)
    assert ran.code == 2
    assert ran.err.startswith("rac: error: this needs onnx and onnxscript; run pip install '.[export]'")
    assert ran.err.count("\n") == 1


def test_what_cannot_be_exported_says_why(make_rac) -> None:
    with pytest.raises(RacError, match="codes in one pass"):
        part_of(CODERS["KL-VAE"](make_rac), "decode", steps=4)
    with pytest.raises(RacError, match="encodes in one pass"):
        part_of(untrained_dgae(), "encode", steps=4)


def test_other_files_are_told_apart(tmp_path) -> None:
    path = tmp_path / f"foreign{SUFFIX['torch-export']}"
    torch.export.save(torch.export.export(torch.nn.ReLU(), (torch.zeros(2),)), path)
    with pytest.raises(RacError, match="not written by rac export"):
        read_description(path)
