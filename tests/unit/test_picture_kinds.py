"""Pictures of every kind: converted as people expect, told once, and refused only where nothing can be meant."""

from __future__ import annotations

import io
import logging
import struct
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, features
from PIL.TiffImagePlugin import TiffImageFile

from rac import notices, read_image, write_image
from rac.data import tars
from rac.data.files import find_pictures
from rac.data.tars import Tar
from rac.errors import ImageError, RacError
from rac.flow import TimeGrid
from rac.flow.grid import check_steps
from rac.images import (
    PICTURE_FORMATS,
    PICTURE_SUFFIXES,
    check_size,
    from_pixels,
    image_files,
    read_picture,
    read_rgb,
    to_pixels,
    upright_size,
)

RNG = np.random.default_rng(0)
PHOTO = RNG.integers(0, 256, (20, 30, 3), dtype=np.uint8)
DEEP = RNG.integers(0, 65_536, (20, 30, 3), dtype=np.uint16)


def saved(path: Path, picture: Image.Image, **options: object) -> Path:
    picture.save(path, **options)
    return path


def tiff(order: str, data: bytes, tags: dict[int, tuple[int, ...]], size: tuple[int, int] = (30, 20)) -> bytes:
    """An uncompressed TIFF with one strip for each plane, of 16-bit tags as given, byte order "<" or ">"."""
    planes = 3 if tags.get(284) == (2,) else 1
    each = len(data) // planes
    head = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(f"{order}I", 8 + len(data))
    fields = {256: size[:1], 257: size[1:], 259: (1,), 278: size[1:], **tags}
    longs = {273: tuple(8 + each * k for k in range(planes)), 279: (each,) * planes}
    entries, extra = [], b""
    after = 8 + len(data) + 2 + 12 * (len(fields) + len(longs)) + 4
    for tag in sorted((*fields, *longs)):
        values, code, kind = (longs[tag], "I", 4) if tag in longs else (fields[tag], "H", 3)
        packed = struct.pack(f"{order}{len(values)}{code}", *values)
        if len(packed) > 4:
            packed, extra = struct.pack(f"{order}I", after + len(extra)), extra + packed
        entries.append(struct.pack(f"{order}HHI", tag, kind, len(values)) + packed.ljust(4, b"\0"))
    return head + data + struct.pack(f"{order}H", len(entries)) + b"".join(entries) + bytes(4) + extra


def ppm(kind: str, greatest: int, values: np.ndarray) -> bytes:
    header = f"{kind} {values.shape[1]} {values.shape[0]} {greatest}\n".encode()
    return header + values.astype(">u2" if greatest > 255 else "u1").tobytes()


# ------------------------------------------------------------------------------------------ depth


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("planar", [1, 2])
def test_16_bit_rgb_of_a_tiff_keeps_its_upper_bits(tmp_path: Path, order: str, planar: int) -> None:
    values = DEEP if planar == 1 else DEEP.transpose(2, 0, 1)
    tags = {258: (16, 16, 16), 262: (2,), 277: (3,), 284: (planar,)}
    path = tmp_path / "deep.tif"
    path.write_bytes(tiff(order, values.astype(f"{order}u2").tobytes(), tags))
    found = read_rgb(path)
    assert (found.was, found.done) == ("16-bit RGB", "scaled to 8 bits")
    assert np.array_equal(np.asarray(found.picture), DEEP >> 8)


def test_8_bit_planes_of_a_tiff_are_left_alone(tmp_path: Path) -> None:
    tags = {258: (8, 8, 8), 262: (2,), 277: (3,), 284: (2,)}
    path = tmp_path / "planes.tif"
    path.write_bytes(tiff("<", PHOTO.transpose(2, 0, 1).tobytes(), tags))
    found = read_rgb(path)
    assert found.was == ""
    assert np.array_equal(np.asarray(found.picture), PHOTO)


@pytest.mark.parametrize("inverted", [False, True])
def test_16_bit_grey_is_rounded_to_8_bits(tmp_path: Path, inverted: bool) -> None:
    grey = DEEP[..., 0]
    path = tmp_path / "deep.tif"
    path.write_bytes(tiff("<", grey.astype("<u2").tobytes(), {258: (16,), 262: (0 if inverted else 1,), 277: (1,)}))
    found = read_rgb(path)
    assert found.was == "16-bit grey"
    white = 65_535 - grey.astype(np.int64) if inverted else grey
    assert np.array_equal(np.asarray(found.picture)[..., 1], np.round(white / 257).astype(np.uint8))


def test_white_of_12_bit_grey_is_white(tmp_path: Path) -> None:
    path = tmp_path / "scan.tif"
    path.write_bytes(tiff("<", b"\xff" * 45 * 20, {258: (12,), 262: (1,), 277: (1,)}))
    assert read_rgb(path).was == "12-bit grey"
    assert torch.equal(read_image(path), torch.ones(1, 3, 20, 30))


@pytest.mark.parametrize(("kind", "channels"), [("P5", 1), ("P6", 3)])
@pytest.mark.parametrize("greatest", [1023, 65_535])
def test_deep_portable_maps(tmp_path: Path, kind: str, channels: int, greatest: int) -> None:
    values = np.minimum(DEEP[..., :channels], greatest)
    path = tmp_path / "deep.pnm"
    path.write_bytes(ppm(kind, greatest, values))
    found = read_rgb(path)
    assert found.was.endswith("-bit grey" if channels == 1 else "-bit RGB")
    assert "scaled to 8 bits" in found.done
    assert np.abs(np.asarray(found.picture)[..., :channels] - values / greatest * 255).max() <= 1


def test_a_bitmap_of_16_bits_a_pixel_is_no_deep_picture(tmp_path: Path) -> None:
    head = struct.pack("<IiiHHIIiiII", 40, 2, 1, 1, 16, 3, 4, 0, 0, 0, 0) + struct.pack("<III", 0xF800, 0x7E0, 0x1F)
    path = tmp_path / "small.bmp"
    path.write_bytes(b"BM" + struct.pack("<IHHI", 14 + len(head) + 4, 0, 0, 14 + len(head)) + head + b"\xff\xff\0\0")
    assert read_rgb(path).was == ""
    assert to_pixels(read_image(path)).tolist() == [[[255] * 3, [0] * 3]]


@pytest.mark.parametrize("values", [np.zeros((4, 4), np.float32), np.full((4, 4), 200, np.int32)])
def test_values_of_unknown_range_are_refused(tmp_path: Path, values: np.ndarray) -> None:
    path = saved(tmp_path / "depth.tiff", Image.fromarray(values))
    for convert in (False, True):
        with pytest.raises(ImageError, match=r"depth\.tiff is of mode [FI], whose range is not known"):
            read_image(path, convert=convert)


# ------------------------------------------------------------------------------------------ transparency


def test_transparent_parts_are_white_and_half_transparent_ones_half(tmp_path: Path) -> None:
    half = Image.new("RGBA", (1, 2), (0, 0, 0, 128))
    half.putpixel((0, 1), (9, 9, 9, 0))
    found = read_rgb(saved(tmp_path / "half.png", half))
    assert (found.was, found.done) == ("RGB with transparency", "laid on white")
    assert np.asarray(found.picture)[:, 0, 0].tolist() == [127, 255]


def test_a_transparent_value_of_16_bit_grey_is_white(tmp_path: Path) -> None:
    values = np.array([[0, 300, 65_535]], np.uint16)
    path = saved(tmp_path / "keyed.png", Image.fromarray(values), transparency=300)
    assert read_rgb(path).was == "16-bit grey with transparency"
    assert to_pixels(read_image(path))[0, :, 0].tolist() == [0, 255, 255]


def test_a_transparent_palette_entry_is_white(tmp_path: Path) -> None:
    picture = Image.new("P", (2, 1))
    picture.putpalette([10, 20, 30, 40, 50, 60])
    picture.putpixel((1, 0), 1)
    path = saved(tmp_path / "keyed.gif", picture, transparency=1)
    assert to_pixels(read_image(path)).tolist() == [[[10, 20, 30], [255, 255, 255]]]


# ------------------------------------------------------------------------------------------ what is said


@pytest.fixture
def said(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> Callable[[], list[str]]:
    monkeypatch.setattr(notices, "_said", set())
    caplog.set_level(logging.WARNING, "rac")
    return lambda: [record.getMessage() for record in caplog.records if record.name == "rac"]


def test_each_kind_is_said_once(tmp_path: Path, said: Callable[[], list[str]]) -> None:
    plain = saved(tmp_path / "plain.png", Image.fromarray(PHOTO))
    paths = [saved(tmp_path / f"{k}.png", Image.fromarray(PHOTO).convert(mode)) for k, mode in enumerate("LLPL")]
    for path in (plain, *paths):
        read_image(path)
    assert len(said()) == 2
    assert said()[0].startswith(f"{paths[0]} is grey")
    assert said()[1].startswith(f"{paths[2]} is palette")


def test_nothing_is_said_of_what_the_caller_knows(tmp_path: Path, said: Callable[[], list[str]]) -> None:
    path = saved(tmp_path / "grey.png", Image.fromarray(PHOTO).convert("L"))
    read_image(path, convert=True)
    assert not said()
    read_image(path)
    assert len(said()) == 1


def test_a_library_prints_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    notices._said.clear()
    path = saved(tmp_path / "grey.png", Image.fromarray(PHOTO).convert("L"))
    with notices.spoken():
        read_image(path)
    assert capsys.readouterr().err.startswith(f"rac: {path} is grey")
    notices._said.clear()
    read_image(path)
    assert capsys.readouterr().err == ""


# ------------------------------------------------------------------------------------------ damaged files


def refuse(*_: object) -> None:
    """Fails as Pillow does on damaged files."""
    raise TypeError("Missing dimensions")


@pytest.mark.filterwarnings("ignore::UserWarning")  # Pillow's, which name no file
@pytest.mark.parametrize("part", [0.4, 0.5, 0.75])
def test_pages_cut_off(tmp_path: Path, part: float) -> None:
    pages = [Image.fromarray(RNG.integers(0, 256, (60, 60, 3), dtype=np.uint8)) for _ in range(3)]
    path = saved(tmp_path / "p.tif", pages[0], save_all=True, append_images=pages[1:], compression="tiff_lzw")
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * part)])
    with pytest.raises(ImageError, match=r"p\.tif is damaged or cut short \(.+\)"):
        read_image(path)


@pytest.mark.parametrize(
    ("kind", "asked"), [(TiffImageFile, "n_frames"), (Image.Image, "has_transparency_data"), (Image.Image, "getexif")]
)
def test_whatever_pillow_raises_names_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: type, asked: str
) -> None:
    path = saved(tmp_path / "photo.tif", Image.fromarray(PHOTO))
    monkeypatch.setattr(kind, asked, property(refuse))
    with pytest.raises(ImageError, match=r"photo\.tif is damaged or cut short \(Missing dimensions\)"):
        read_picture(path)


def test_a_header_that_fails_in_an_unforeseen_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = saved(tmp_path / "photo.png", Image.fromarray(PHOTO))
    monkeypatch.setattr(Image, "open", refuse)
    with pytest.raises(ImageError, match=r"photo\.png .*Missing dimensions"):
        read_image(path)
    with pytest.raises(ImageError, match=r"it .*Missing dimensions"):
        upright_size(io.BytesIO(path.read_bytes()), "it")


def member(name: bytes, size: bytes) -> bytes:
    """A tar header of which only name and size can be wrong."""
    head = bytearray(512)
    head[: len(name)] = name
    head[100:108], head[124:136], head[136:148] = b"0000644\0", size, b"00000000000\0"
    head[156:157], head[257:265], head[148:156] = b"0", b"ustar\x0000", b" " * 8
    head[148:156] = b"%06o\0 " % sum(head)
    return bytes(head)


SIZES = {
    "more than a file can have": b"\x80" + b"\xff" * 11,
    "below zero": b"\xff" * 10 + b"\xfe\x00",
    "no number": b"z" * 12,
}


@pytest.mark.parametrize("place", [0, 1])
@pytest.mark.parametrize("size", SIZES)
def test_tar_headers_that_lie(tmp_path: Path, size: str, place: int) -> None:
    good = member(b"a.png", b"%011o\0" % 5) + b"hello".ljust(512, b"\0")
    path = tmp_path / "lying.tar"
    path.write_bytes(good * place + member(b"b.png", SIZES[size]) + bytes(2048))
    with pytest.raises(RacError, match=r"lying\.tar cannot be read as a tar file \(.+\); give"):
        Tar.open(path)


def test_a_name_with_a_zero_in_it_does_not_shift_the_others(tmp_path: Path) -> None:
    path = tmp_path / "names.tar"
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as tar:
        for name, data in (("a\0b.png", b"first"), ("c.png", b"second")):
            info = tarfile.TarInfo(name)
            info.pax_headers = {"path": name}
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    found = Tar.open(path)
    assert [(found.names[k], found.read(k)) for k in range(2)] == [("a?b.png", b"first"), ("c.png", b"second")]


def test_tars_are_read_without_a_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def homeless(_: Path) -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(tars, "WORTH_KEEPING", 0)
    monkeypatch.delenv("RAC_CACHE_DIR", raising=False)
    monkeypatch.setattr(Path, "expanduser", homeless)
    path = tmp_path / "x.tar"
    path.write_bytes(member(b"a.png", b"%011o\0" % 5) + b"hello".ljust(2048, b"\0"))
    assert Tar.open(path).names[:] == ["a.png"]


# ------------------------------------------------------------------------------------------ one list of suffixes


def test_the_suffixes_are_pillows(tmp_path: Path) -> None:
    Image.init()
    registered = Image.registered_extensions()
    for kind, suffixes in PICTURE_FORMATS.items():
        if kind == "AVIF" and not ("avif" in features.modules and features.check("avif")):
            continue
        assert kind in Image.OPEN
        assert {registered[suffix] for suffix in suffixes} == {kind}


def test_what_is_searched_can_be_read_and_the_page_takes_it(tmp_path: Path) -> None:
    from rac.serve.guard import Limits, admit, formats

    assert set(PICTURE_FORMATS) - set(formats()) <= {"AVIF"}
    for kind, suffixes in PICTURE_FORMATS.items():
        for suffix in suffixes:
            if kind in Image.SAVE:
                picture = Image.fromarray(PHOTO).convert("1" if suffix == ".pbm" else "RGB")
                path = saved(tmp_path / f"{suffix[1:]}{suffix.upper()}", picture, format=kind)
                assert read_image(path).shape == admit(path, Limits()).image.shape == (1, 3, 20, 30)
    found = image_files(tmp_path)
    assert {path.suffix.lower() for path in found} >= {".jfif", ".jpe", ".jp2", ".pgm", ".ppm", ".tif"}
    assert {picture.name for picture in find_pictures([tmp_path])} == {path.name for path in found}
    assert {path.suffix.lower() for path in found} <= set(PICTURE_SUFFIXES)


def test_tar_files_in_capitals_are_found(tmp_path: Path) -> None:
    (tmp_path / "X.TAR").write_bytes(member(b"a.png", b"%011o\0" % 5) + b"hello".ljust(2048, b"\0"))
    assert [picture.name for picture in find_pictures([tmp_path])] == ["a.png"]


def test_the_page_needs_no_format_that_pillow_was_built_without(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from rac.serve.guard import Limits, admit

    Image.init()
    monkeypatch.delitem(Image.OPEN, "AVIF", raising=False)
    assert admit(saved(tmp_path / "photo.png", Image.fromarray(PHOTO)), Limits()).note == ""


def test_the_page_says_what_it_converted(tmp_path: Path) -> None:
    from rac.serve.guard import Limits, admit

    path = saved(tmp_path / "clear.png", Image.new("RGBA", (40, 20)))
    assert admit(path, Limits()).note == "Converted from RGB with transparency to 8-bit RGB (laid on white)."
    assert admit(path, Limits(side=20)).note.endswith("Scaled down from 40 x 20 to 20 x 10 pixels for this page.")


def test_an_unreadable_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def denied(_: Path) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "iterdir", denied)
    with pytest.raises(ImageError, match="cannot be searched"):
        image_files(tmp_path)


# ------------------------------------------------------------------------------------------ tensors


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (torch.zeros(1, 3, 4, 4, dtype=torch.uint8), "floats in .*not uint8; .*rac.images.from_pixels"),
        (torch.zeros(3, 4, 4, dtype=torch.int64), "not int64"),
        (torch.zeros(1, 3, 4, 4, dtype=torch.bool), "not bool"),
        (torch.zeros(1, 3, 4, 4, dtype=torch.complex64), "not complex64"),
        (np.zeros((4, 4, 3), np.float32), "not a ndarray"),
        (torch.full((1, 3, 4, 4), torch.inf), "NaN or infinite"),
        (torch.linspace(0, 255, 48).view(1, 3, 4, 4), "from 0 to 255, where .* divide by 127.5"),
    ],
)
def test_no_image_is_no_white_picture(tmp_path: Path, image: torch.Tensor, message: str) -> None:
    with pytest.raises(ImageError, match=message):
        write_image(image, tmp_path / "o.png")
    assert not list(tmp_path.iterdir())


def test_a_decoded_image_may_overshoot(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    for image in (torch.full((1, 3, 4, 4), 3.0), torch.linspace(-9, 9, 48).view(1, 3, 4, 4).bfloat16()):
        write_image(image.requires_grad_(), tmp_path / "o.png")
    assert not recwarn.list
    with pytest.warns(UserWarning, match="from -40 to 40, where .* clamped"):
        write_image(torch.linspace(-40, 40, 48).view(1, 3, 4, 4), tmp_path / "o.png")


def test_pixels_in_a_tensor() -> None:
    pixels = torch.from_numpy(PHOTO)
    assert torch.equal(from_pixels(pixels), from_pixels(PHOTO))
    assert torch.equal(from_pixels(pixels[None]), from_pixels(PHOTO[None]))
    for wrong in (pixels.permute(2, 0, 1), pixels.float()):
        with pytest.raises(ImageError, match="movedim"):
            from_pixels(wrong)


# ------------------------------------------------------------------------------------------ whole numbers


def test_whole_numbers_of_any_kind(tmp_path: Path) -> None:
    path = saved(tmp_path / "photo.png", Image.fromarray(PHOTO))
    assert read_image(path, np.int64(8)).shape == (1, 3, 8, 8)  # type: ignore[arg-type]
    assert read_image(path, (np.int32(8), np.uint8(9))).shape == (1, 3, 8, 9)  # type: ignore[arg-type]
    assert TimeGrid.uniform(np.int64(2)) == TimeGrid.uniform(2)  # type: ignore[arg-type]
    assert type(check_steps(np.int64(2))) is int  # type: ignore[arg-type]


@pytest.mark.parametrize("steps", [0, -1, True, 2.0, "2", np.float64(2), None])
def test_steps_that_are_no_whole_number(steps: object) -> None:
    with pytest.raises(RacError, match="must be a whole number of at least 1"):
        check_steps(steps)  # type: ignore[arg-type]


def test_steps_have_an_upper_bound() -> None:
    with pytest.raises(RacError, match="1,000,000,000 are more than 100,000"):
        check_steps(10**9)


@pytest.mark.parametrize("size", [64.0, "64", True, (64, 64, 64), (64,), (8, 9.5), None])
def test_sizes_that_are_none(size: object) -> None:
    with pytest.raises(ImageError, match="must be a whole number"):
        check_size(size)  # type: ignore[arg-type]


def test_sizes_have_an_upper_bound(tmp_path: Path) -> None:
    path = saved(tmp_path / "photo.png", Image.fromarray(PHOTO))
    assert check_size(8192) == (8192, 8192)
    for size in (8193, (1, 2**26 + 1)):
        with pytest.raises(ImageError, match=r"more than the limit of 67,108,864; choose a square of at most 8,192"):
            read_image(path, size)
    assert read_image(path, (5, 6), max_pixels=600).shape == (1, 3, 5, 6)
