"""Station 1: what is read is what was written, and what cannot be read says why."""

from __future__ import annotations

import errno
import io
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from rac import RacError, files
from rac.errors import ImageError
from rac.images import (
    crop,
    from_pixels,
    image_files,
    pad_to_multiple,
    read_image,
    read_picture,
    read_rgb,
    to_pixels,
    write_image,
    write_picture,
)

RNG = np.random.default_rng(0)
PHOTO = RNG.integers(0, 256, (20, 30, 3), dtype=np.uint8)


def saved(path: Path, picture: Image.Image, **options: object) -> Path:
    picture.save(path, **options)
    return path


def test_every_pixel_value_comes_back() -> None:
    pixels = np.arange(256, dtype=np.uint8).repeat(3).reshape(16, 16, 3)
    image = from_pixels(pixels)
    assert image.shape == (1, 3, 16, 16)
    assert image.dtype == torch.float32
    assert image.min() == -1
    assert image.max() == 1
    assert np.array_equal(to_pixels(image), pixels)


@pytest.mark.parametrize(("level", "value"), [(0, -1.0), (255, 1.0)])
def test_black_and_white(tmp_path: Path, level: int, value: float) -> None:
    path = saved(tmp_path / "square.png", Image.new("RGB", (8, 8), (level,) * 3))
    assert torch.equal(read_image(path), torch.full((1, 3, 8, 8), value))


@pytest.mark.parametrize("suffix", [".png", ".webp"])
def test_lossless_round_trip(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"photo{suffix}"
    write_image(from_pixels(PHOTO), path)
    assert np.array_equal(to_pixels(read_image(path)), PHOTO)
    assert os.listdir(tmp_path) == [path.name]


def test_out_of_range_is_clamped_and_rounded() -> None:
    image = torch.tensor([-3.0, 3.0, 0.0039]).view(1, 3, 1, 1)
    assert to_pixels(image).tolist() == [[[0, 255, 128]]]


@pytest.mark.parametrize("image", [torch.zeros(2, 3, 4, 4), torch.zeros(1, 4, 4, 4), torch.zeros(4, 4)])
def test_to_pixels_takes_one_image_only(image: torch.Tensor) -> None:
    with pytest.raises(ImageError, match="3 H W"):
        to_pixels(image)


def test_nan_is_refused_and_nothing_written(tmp_path: Path) -> None:
    with pytest.raises(ImageError, match="NaN"):
        write_image(torch.full((1, 3, 4, 4), torch.nan), tmp_path / "nan.png")
    assert not list(tmp_path.iterdir())


# ------------------------------------------------------------------------------------------ sizes


@pytest.mark.parametrize(("size", "shape"), [(16, (16, 16)), ((8, 24), (8, 24)), (40, (40, 40))])
def test_size(tmp_path: Path, size: int | tuple[int, int], shape: tuple[int, int]) -> None:
    path = saved(tmp_path / "photo.png", Image.fromarray(PHOTO))
    assert read_image(path, size).shape == (1, 3, *shape)


def test_cropping_without_scaling_copies_pixels(tmp_path: Path) -> None:
    path = saved(tmp_path / "photo.png", Image.fromarray(PHOTO))
    assert np.array_equal(to_pixels(read_image(path, 20)), PHOTO[:, 5:25])


def test_scaling_down_is_antialiased(tmp_path: Path) -> None:
    checks = np.indices((64, 64)).sum(0) % 2 * 255
    path = saved(tmp_path / "checks.png", Image.fromarray(checks.astype(np.uint8)).convert("RGB"))
    assert read_image(path, 16).abs().max() < 0.1


def test_size_zero(tmp_path: Path) -> None:
    path = saved(tmp_path / "photo.png", Image.fromarray(PHOTO))
    with pytest.raises(ImageError, match="at least 1 x 1"):
        read_image(path, 0)


def test_camera_orientation_is_applied(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # stored lying, to be turned by a quarter
    path = saved(tmp_path / "photo.png", Image.fromarray(PHOTO), exif=exif)
    assert np.array_equal(to_pixels(read_image(path)), np.rot90(PHOTO, -1))


@pytest.mark.parametrize(("height", "width"), [(5, 9), (8, 8), (13, 16), (17, 31)])
def test_pad_and_crop(height: int, width: int) -> None:
    image = torch.rand(2, 3, height, width)
    padded, size = pad_to_multiple(image, 8)
    assert padded.shape[-2] % 8 == padded.shape[-1] % 8 == 0
    assert torch.equal(crop(padded, size), image)
    if height % 8:
        assert torch.equal(padded[..., height, :width], image[..., height - 2, :])


@pytest.mark.parametrize("side", [1, 4])
def test_too_small_to_pad_names_the_least_side(side: int) -> None:
    with pytest.raises(RacError, match="at least 5"):
        pad_to_multiple(torch.zeros(1, 3, side, 16), 8)
    pad_to_multiple(torch.zeros(1, 3, 5, 16), 8)


# ------------------------------------------------------------------------------------------ modes


MODES = {
    "grey": Image.fromarray(PHOTO).convert("L"),
    "bilevel": Image.fromarray(PHOTO).convert("1"),
    "grey with alpha": Image.fromarray(PHOTO).convert("LA"),
    "palette": Image.fromarray(PHOTO).convert("P"),
    "alpha": Image.fromarray(PHOTO).convert("RGBA"),
    "16 bits": Image.fromarray(np.full((20, 30), 0x80FF, np.uint16)),
}


@pytest.mark.parametrize("kind", MODES)
def test_other_modes_are_converted(tmp_path: Path, kind: str) -> None:
    path = saved(tmp_path / "other.png", MODES[kind])
    assert read_image(path).shape == (1, 3, 20, 30)
    assert torch.equal(read_image(path), read_image(path, convert=True))


def test_cmyk(tmp_path: Path) -> None:
    path = saved(tmp_path / "print.jpg", Image.fromarray(PHOTO).convert("CMYK"))
    assert read_image(path).shape == (1, 3, 20, 30)


def test_rgb_with_a_transparent_colour(tmp_path: Path) -> None:
    path = saved(tmp_path / "keyed.png", Image.new("RGB", (4, 4), (1, 2, 3)), transparency=(1, 2, 3))
    assert torch.equal(read_image(path), torch.ones(1, 3, 4, 4))


def test_16_bit_rgb_is_not_taken_for_8_bit(tmp_path: Path) -> None:
    # Pillow cannot write this kind, which it reads as plain RGB: 2 x 1 pixels, colour type 2, depth 16.
    import struct
    import zlib

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 2, 1, 16, 2, 0, 0, 0)
    rows = zlib.compress(b"\0" + bytes(range(12)))
    path = tmp_path / "deep.png"
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b""))
    assert read_rgb(path).was == "16-bit RGB"
    assert to_pixels(read_image(path)).tolist() == [[[0, 2, 4], [6, 8, 10]]]


def test_what_conversion_does(tmp_path: Path) -> None:
    alpha = Image.new("RGBA", (2, 2), (255, 0, 0, 0))
    assert torch.equal(read_image(saved(tmp_path / "clear.png", alpha), convert=True), torch.ones(1, 3, 2, 2))
    deep = Image.fromarray(np.full((2, 2), 0x80FF, np.uint16))
    assert to_pixels(read_image(saved(tmp_path / "deep.png", deep), convert=True))[0, 0].tolist() == [0x80] * 3


def test_float_pictures_have_no_known_range(tmp_path: Path) -> None:
    path = saved(tmp_path / "depth.tiff", Image.fromarray(np.zeros((4, 4), np.float32)))
    with pytest.raises(ImageError, match="mode F"):
        read_image(path, convert=True)


# ------------------------------------------------------------------------------------------ bad files


def test_missing_folder_text_and_empty(tmp_path: Path) -> None:
    (tmp_path / "text.png").write_text("hello")
    (tmp_path / "empty.png").touch()
    for name, message in (
        ("missing.png", "does not exist"),
        (".", "is a folder"),
        ("text.png", "not a picture"),
        ("empty.png", "not a picture"),
    ):
        with pytest.raises(ImageError, match=message):
            read_image(tmp_path / name)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_truncated(tmp_path: Path, kind: str) -> None:
    buffer = io.BytesIO()
    Image.fromarray(RNG.integers(0, 256, (200, 200, 3), dtype=np.uint8)).save(buffer, kind)
    path = tmp_path / f"cut.{kind.lower()}"
    path.write_bytes(buffer.getvalue()[: len(buffer.getvalue()) // 2])
    with pytest.raises(ImageError, match=r"cut short|damaged|cannot be opened"):
        read_image(path)


def test_animation(tmp_path: Path) -> None:
    frames = [Image.new("RGB", (8, 8), (100 * n, 0, 0)) for n in range(3)]
    path = saved(tmp_path / "moving.gif", frames[0], save_all=True, append_images=frames[1:])
    for convert in (False, True):
        with pytest.raises(ImageError, match="3 frames"):
            read_image(path, convert=convert)


def test_too_many_pixels_are_told_from_the_header(tmp_path: Path) -> None:
    path = saved(tmp_path / "photo.png", Image.fromarray(PHOTO))
    with pytest.raises(ImageError, match=r"30 x 20 = 600 pixels, more than the limit of 599"):
        read_image(path, max_pixels=599)
    path.write_bytes(path.read_bytes()[:60])
    with pytest.raises(ImageError, match="more than the limit"):
        read_image(path, max_pixels=599)


@pytest.mark.parametrize("side", [10_000, 20_000])
def test_huge(tmp_path: Path, side: int) -> None:
    path = saved(tmp_path / "huge.png", Image.new("1", (side, side)))
    with pytest.raises(ImageError, match=r"too large|more than the limit"):
        read_image(path)


def test_read_picture_takes_an_open_file() -> None:
    buffer = io.BytesIO()
    Image.fromarray(PHOTO).save(buffer, "PNG")
    assert np.array_equal(np.asarray(read_picture(buffer)), PHOTO)
    with pytest.raises(ImageError, match=r"^tar/member"):
        read_picture(io.BytesIO(b"no"), name="tar/member")


# ------------------------------------------------------------------------------------------ writing, listing


def test_unknown_suffix(tmp_path: Path) -> None:
    for write, content in ((write_image, torch.zeros(1, 3, 2, 2)), (write_picture, Image.new("RGB", (2, 2)))):
        with pytest.raises(ImageError, match="suffix must be one of"):
            write(content, tmp_path / "image.xyz")  # type: ignore[operator]


@pytest.mark.parametrize(
    ("number", "message"),
    [(errno.ENOSPC, "disk is full"), (errno.EACCES, "no permission"), (errno.EROFS, "no permission")],
)
def test_a_refusal_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, message: str
) -> None:
    path = tmp_path / "photo.png"
    write_image(from_pixels(PHOTO), path)

    def refuse(_: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(files.os, "fsync", refuse)
    with pytest.raises(ImageError, match=message):
        write_image(torch.zeros(1, 3, 2, 2), path)
    assert np.array_equal(to_pixels(read_image(path)), PHOTO)
    assert os.listdir(tmp_path) == ["photo.png"]


def test_no_such_folder(tmp_path: Path) -> None:
    with pytest.raises(ImageError, match="create it first"):
        write_image(torch.zeros(1, 3, 2, 2), tmp_path / "missing" / "image.png")


def test_image_files(tmp_path: Path) -> None:
    for name in ("b.png", "a.JPG", ".hidden.png", "notes.txt", "sub/c.webp"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert [file.name for file in image_files(tmp_path)] == ["a.JPG", "b.png"]
    assert image_files(tmp_path / "notes.txt") == [tmp_path / "notes.txt"]
    (tmp_path / "none").mkdir()
    for name in ("none", "missing"):
        with pytest.raises(ImageError):
            image_files(tmp_path / name)
