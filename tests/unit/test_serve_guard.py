"""What the page of `rac serve` lets in; needs no gradio."""

from __future__ import annotations

import asyncio
import io
import json
import struct
import zlib
from pathlib import Path

import pytest
import torch
from PIL import Image, PngImagePlugin

import rac
from rac.errors import ImageError, RacError
from rac.images import PICTURE_SUFFIXES
from rac.serve.guard import MESSAGE_BYTES, Gate, Limits, admit


def png_of(width: int, height: int, data: bytes = b"") -> bytes:
    """A PNG whose header claims a size that its few bytes of data need not fill."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(data, 9)) + chunk(b"IEND", b"")


def text_bomb() -> bytes:
    """A small picture with 100 MB of compressed text in it."""
    whole = png_of(8, 8, b"\0" * 200)
    body = b"Comment\0\0" + zlib.compress(b"x" * 100_000_000, 9)
    chunk = struct.pack(">I", len(body)) + b"zTXt" + body + struct.pack(">I", zlib.crc32(b"zTXt" + body))
    return whole[:33] + chunk + whole[33:]


REFUSED = {
    "large.png": (png_of(10_000, 10_000), "10000 x 10000 pixels, 100 million; the limit is 24 million"),
    "bomb.png": (png_of(60_000, 60_000, b"\0" * 10_000), "too large"),
    "text-bomb.png": (text_bomb(), "cannot be opened"),
    "notes.txt": (b"no picture at all", "not a picture"),
    "notes.png": (b"no picture at all", "not a picture"),
    "script.eps": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n", "not a picture"),
    "empty.png": (b"", "not a picture"),
    "cut.png": (png_of(50, 50), "damaged or cut short"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    data, words = REFUSED[name]
    (tmp_path / name).write_bytes(data)
    if name != "cut.png":  # refused by its header: nothing is decoded
        monkeypatch.setattr(PngImagePlugin.PngImageFile, "load", lambda *_: pytest.fail("decoded"))
    with pytest.raises(ImageError, match=words) as refusal:
        admit(tmp_path / name, Limits())
    assert name in str(refusal.value)
    assert str(tmp_path) not in str(refusal.value)


def test_bytes_are_counted_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "x.png").write_bytes(png_of(8, 8))
    monkeypatch.setattr(Image, "open", lambda *_, **__: pytest.fail("opened"))
    with pytest.raises(ImageError, match="more than the limit of 20"):
        admit(tmp_path / "x.png", Limits(upload_bytes=20))


def test_within_limits_it_is_the_picture_itself(tmp_path: Path, images) -> None:  # type: ignore[no-untyped-def]
    rac.write_image(images(1, 30, 64), tmp_path / "x.png")
    admitted = admit(tmp_path / "x.png", Limits(side=64, pixels=30 * 64))
    assert torch.equal(admitted.image, rac.read_image(tmp_path / "x.png"))
    assert admitted.note == ""
    with pytest.raises(ImageError, match="limit"):
        admit(tmp_path / "x.png", Limits(side=64, pixels=30 * 64 - 1))


def test_larger_ones_are_scaled_with_a_note(tmp_path: Path, images) -> None:  # type: ignore[no-untyped-def]
    rac.write_image(images(1, 50, 100), tmp_path / "x.png")
    admitted = admit(tmp_path / "x.png", Limits(side=40))
    assert admitted.image.shape == (1, 3, 20, 40)
    assert "100 x 50 to 40 x 20" in admitted.note


def test_grey_and_transparent_ones_are_taken(tmp_path: Path) -> None:
    for mode in ("L", "RGBA", "P"):
        Image.new(mode, (20, 20)).save(tmp_path / "x.png")
        assert admit(tmp_path / "x.png", Limits()).image.shape == (1, 3, 20, 20)


@pytest.mark.parametrize("suffix", PICTURE_SUFFIXES)
def test_every_suffix_that_is_offered_is_taken(tmp_path: Path, suffix: str) -> None:
    kind = Image.registered_extensions()[suffix]
    if kind not in Image.SAVE:
        pytest.skip(f"this Pillow was built without {kind}")
    Image.new("RGB", (20, 16), "red").save(tmp_path / f"x{suffix}")
    assert admit(tmp_path / f"x{suffix}", Limits()).image.shape == (1, 3, 16, 20)


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data", "ignore:Truncated File Read")
def test_damaged_files_of_several_frames_are_named(tmp_path: Path) -> None:
    """Pillow's error depends on where the file is cut; a `TypeError` for the count of frames is among them."""
    whole = io.BytesIO()
    pages = [Image.effect_noise((24, 24), sigma).convert("RGB") for sigma in (20, 60, 90)]
    pages[0].save(whole, "TIFF", save_all=True, append_images=pages[1:])
    for kept in range(0, len(whole.getvalue()), 100):
        (tmp_path / "scan.tif").write_bytes(whole.getvalue()[:kept])
        with pytest.raises(ImageError, match=r"^scan\.tif .*$"):
            admit(tmp_path / "scan.tif", Limits())


def test_an_upload_that_was_deleted_is_named(tmp_path: Path) -> None:
    with pytest.raises(ImageError, match=r"gone\.png is no longer on the server; upload it again"):
        admit(tmp_path / "gone.png", Limits())


@pytest.mark.parametrize("wrong", [{"upload_bytes": 0}, {"pixels": 0}, {"waiting": 0}, {"side": 8}])
def test_wrong_limits(wrong) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(RacError, match=next(iter(wrong))):
        Limits(**wrong)


# ------------------------------------------------------------------------------------------ requests


def through_the_gate(method: str, path: str, body: bytes = b"", length: int | None = -1) -> tuple[int, bytes, dict]:
    """Status, what the app behind the gate was given, and the headers of the answer."""
    given, sent = [], []

    async def app(scope, receive, send) -> None:  # type: ignore[no-untyped-def]
        given.append((await receive())["body"])
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b""})

    async def receive() -> dict:
        return {"type": "http.request", "body": body, "more_body": False}

    async def send(message) -> None:  # type: ignore[no-untyped-def]
        sent.append(message)

    length = len(body) if length == -1 else length
    headers = [] if length is None else [(b"content-length", str(length).encode())]
    scope = {"type": "http", "method": method, "path": path, "headers": headers}
    asyncio.run(Gate(app, 1_000)(scope, receive, send))
    return sent[0]["status"], b"".join(given), dict(sent[0]["headers"])


JOIN = "/gradio_api/queue/join"


@pytest.mark.parametrize(
    "path",
    [
        "/gradio_api/file=/etc/passwd", "/gradio_api/file/etc/passwd", "/file=/etc/passwd", "/gradio_api/proxy=http://x",
        "/gradio_api/deep_link", "/monitoring", "/gradio_api/run/predict", "/gradio_api/call/reconstruct", "/login",
        "/gradio_api/stream/a/b", "/docs", "/openapi.json", "/gradio_api/vibe-edit", "/gradio_api/process_recording",
    ],
)  # fmt: skip
def test_only_what_the_page_needs(path: str) -> None:
    status, given, headers = through_the_gate("GET", path)
    assert (status, given) == (404, b"")
    assert b"default-src 'self'" in headers[b"content-security-policy"]


def test_messages_pass_whole_and_answers_bind_the_browser() -> None:
    body = json.dumps({"data": [{"path": "/tmp/x.png", "url": "http://127.0.0.1/x.png"}, 4]}).encode()
    status, given, headers = through_the_gate("POST", JOIN, body)
    assert (status, given) == (200, body)
    assert b"default-src 'self'" in headers[b"content-security-policy"]
    assert through_the_gate("GET", "/")[0] == 200


@pytest.mark.parametrize("address", ["http://10.0.0.1/x.png", "https://x.org/x.png", "file:///etc/passwd"])
def test_addresses_are_not_fetched(address: str) -> None:
    body = json.dumps({"data": [1, [{"deep": {"path": address}}]]}).encode()
    assert through_the_gate("POST", JOIN, body)[:2] == (400, b"")


def test_long_and_endless_messages_are_refused() -> None:
    assert through_the_gate("POST", JOIN, b"x", MESSAGE_BYTES + 1)[0] == 413
    assert through_the_gate("POST", JOIN, b"x", None)[0] == 413
    assert through_the_gate("POST", JOIN, b"[" * MESSAGE_BYTES)[0] == 400
    assert through_the_gate("POST", "/gradio_api/upload", b"x", 1_001 + MESSAGE_BYTES)[0] == 413
    assert through_the_gate("POST", "/gradio_api/upload", b"x" * 900)[:2] == (200, b"x" * 900)
