"""`--tile`, and tiles unasked for large images."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import rac
from rac.commands import shared


@pytest.fixture
def large(tmp_path: Path, images) -> Path:  # type: ignore[no-untyped-def]
    path = tmp_path / "large.png"
    rac.write_image(images(1, 90, 133), path)
    return path


@pytest.fixture
def tiles_used(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The sizes of tiles that coders were cut into."""
    used: list[int] = []
    whole = shared.tiled
    monkeypatch.setattr(shared, "tiled", lambda coder, tile: used.append(tile) or whole(coder, tile))
    return used


@pytest.mark.slow
def test_tiles_change_no_file(large: Path, tmp_path: Path, run, coder_dir, tiles_used) -> None:  # type: ignore[no-untyped-def]
    options = ("--model", coder_dir, "--device", "cpu")
    for name, tile in (("whole", 0), ("tiles", 32)):
        assert run("encode", large, *options, "--tile", tile, "--out", tmp_path / name).code == 0
        assert run("decode", tmp_path / name, "--tile", tile, "--device", "cpu", "--out", tmp_path / name).code == 0
        assert run("reconstruct", large, *options, "--steps", 2, "--tile", tile, "--out", tmp_path / name).code == 0
    one, two = (rac.read_image(tmp_path / name / "large.png") for name in ("whole", "tiles"))
    assert (one - two).abs().max() <= 2.001 / 255  # one level, where a value lay on the edge between two
    assert (tmp_path / "tiles" / "large-trajectory.png").is_file()
    # For each verb once, and once for the teacher, which says that it is blended.
    assert tiles_used == [32, 32, 32, 32]
    told = run("reconstruct", large, *options, "--steps", 2, "--tile", 16, "--out", tmp_path / "again").err
    assert "KLVAE looks at the whole image" in told
    assert "RAC looks" not in told


def test_large_images_are_tiled_unasked(large, tmp_path, run, coder_dir, tiles_used, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.setattr(shared, "TILE", 62)
    for limit, expected in ((90 * 133, []), (90 * 133 - 1, [64])):
        monkeypatch.setattr(shared, "LARGE", limit)
        assert run("encode", large, "--model", coder_dir, "--out", tmp_path / "latents").code == 0
        assert tiles_used == expected
    assert run("encode", large, "--model", coder_dir, "--tile", 0, "--out", tmp_path / "latents").code == 0
    assert tiles_used == [64]


def test_a_tile_that_does_not_fit_is_refused(large: Path, tmp_path: Path, run, coder_dir: Path) -> None:  # type: ignore[no-untyped-def]
    for tile in (30, -4):
        ran = run("encode", large, "--model", coder_dir, f"--tile={tile}", "--out", tmp_path / "latents")
        assert ran.code == 2
        assert f"tile {tile} must be a positive multiple" in ran.err


@torch.no_grad()
def test_encoding_takes_the_coders_own_steps(photo: Path, tmp_path: Path, run, coder_dir: Path) -> None:  # type: ignore[no-untyped-def]
    from rac.commands.latent_files import LatentFile

    assert run("encode", photo, "--model", coder_dir, "--out", tmp_path).code == 0
    held = LatentFile.read(tmp_path / "photo.safetensors")
    coder = rac.load(coder_dir)
    assert held.steps == coder.config.steps == 4
    assert torch.equal(held.latent, coder.encode(rac.read_image(photo)))
