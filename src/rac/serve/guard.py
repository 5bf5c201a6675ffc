"""Checks of uploaded pictures and of requests, made before the page acts on them."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Awaitable, Callable, Iterator, MutableMapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from ..errors import ImageError, RacError
from ..images import PICTURE_FORMATS, from_pixels, read_rgb

MESSAGE_BYTES = 2**16
"""Size of the largest message in bytes, uploads apart: a page's own are below a thousand bytes."""


@dataclass(frozen=True)
class Limits:
    """Limits on what a visitor may ask of the machine."""

    upload_bytes: int = 16 * 2**20
    pixels: int = 24_000_000
    """Most pixels of an upload, read from its header before anything is decoded."""
    side: int = 256
    """Longest side in pixels; larger pictures are scaled down to it."""
    waiting: int = 32
    """Most requests that wait; one is processed at a time."""

    def __post_init__(self) -> None:
        for name in ("upload_bytes", "pixels", "waiting"):
            if getattr(self, name) < 1:
                raise RacError(f"{name} {getattr(self, name)} must be at least 1")
        if self.side < 16:
            raise RacError(f"side {self.side} must be at least 16 pixels")


class Admitted(NamedTuple):
    """A picture that passed the checks."""

    image: Tensor
    """The image, 1 3 H W in [-1, 1], neither side above the limit."""
    note: str
    """Conversions of the picture, for its owner; empty if there were none."""


def admit(path: str | os.PathLike[str], limits: Limits) -> Admitted:
    """Reads an uploaded picture: its bytes, format and pixels are checked before anything is decoded.

    Grey, palette and transparent pictures are converted to RGB, which the note says.

    Raises:
        ImageError: The file is missing, above a limit, of another format, animated or damaged. The message names the
            file but not its folder.
    """
    path = Path(path)
    try:
        picture, was, done = _read(path, limits)
    except (RacError, MemoryError):
        raise
    except FileNotFoundError:
        raise ImageError(f"{path.name} is no longer on the server; upload it again") from None
    except Exception as error:  # Pillow raises errors of any kind on damaged files, for a count of frames too
        raise ImageError(f"{path.name} is damaged or cut short ({error}); export it again") from error
    notes = [f"Converted from {was} to 8-bit RGB ({done})."] if was else []
    before = picture.size
    if max(before) > limits.side:
        picture.thumbnail((limits.side, limits.side), Image.Resampling.LANCZOS)
        after = f"{picture.width} x {picture.height}"
        notes.append(f"Scaled down from {before[0]} x {before[1]} to {after} pixels for this page.")
    return Admitted(from_pixels(np.asarray(picture)), " ".join(notes))


def _read(path: Path, limits: Limits) -> tuple[Image.Image, str, str]:
    """Reads a picture, its original form if not 8-bit RGB, and how it was converted, as `read_rgb`."""
    size = path.stat().st_size
    if size > limits.upload_bytes:
        raise ImageError(
            f"{path.name} has {size:,} bytes, more than the limit of {limits.upload_bytes:,}; save it smaller"
        )
    _check_header(path, limits.pixels)
    return read_rgb(path, max_pixels=limits.pixels, name=path.name)


def formats() -> tuple[str, ...]:
    """Returns Pillow's names of the accepted formats, those of `PICTURE_FORMATS` that this Pillow was built with.

    The decoders of others, such as EPS, run foreign programs or have seen little hostile input.
    """
    Image.init()
    return tuple(kind for kind in PICTURE_FORMATS if kind in Image.OPEN)


def _check_header(path: Path, pixels: int) -> None:
    name = path.name
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with Image.open(path, formats=formats()) as picture:
                width, height = picture.size
    except (UnidentifiedImageError, TypeError):
        raise ImageError(
            f"{name} is not a picture of a supported kind; give a PNG, JPEG, WebP, TIFF or BMP file"
        ) from None
    except Image.DecompressionBombError as error:
        raise ImageError(f"{name} is too large ({error}); scale it down first") from None
    except MemoryError:
        raise
    except Exception as error:  # on a damaged header Pillow may raise anything
        raise ImageError(f"{name} cannot be opened ({str(error) or type(error).__name__}); export it again") from error
    if width * height > pixels:
        raise ImageError(
            f"{name} has {width} x {height} pixels, {width * height / 1e6:.4g} million; "
            f"the limit is {pixels / 1e6:.4g} million: scale it down first"
        )


# ------------------------------------------------------------------------------------------- requests

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Message, Receive, Send], Awaitable[None]]

_API = "/gradio_api/"
PATHS = frozenset(
    {"/", "/config", "/config/", "/theme.css", "/manifest.json", "/favicon.ico", "/robots.txt"}
    | {_API + path for path in ("info", "config", "theme.css", "app_id", "startup-events", "upload", "upload_progress")}
    | {_API + path for path in ("queue/join", "queue/data", "cancel", "reset")}
)
PREFIXES = ("/assets/", "/static/", _API + "heartbeat/")

HEADERS = (
    # A browser then asks nobody but this server, whatever the page is made of.
    (
        b"content-security-policy",
        b"default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; style-src 'self' 'unsafe-inline'; "
        b"img-src 'self' data: blob:; font-src 'self' data:; connect-src 'self'; frame-ancestors 'none'; "
        b"form-action 'none'; object-src 'none'",
    ),
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
)


class Gate:
    """ASGI middleware that lets through only what the page needs.

    gradio can hand out files, fetch addresses that a request names, and save links. The page needs none of this, so it
    is closed here. A message that names an address in place of an uploaded file is refused.
    """

    def __init__(self, app: App, upload_bytes: int) -> None:
        self.app = app
        self.upload_bytes = upload_bytes

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """Passes an ASGI request on to the app, or refuses it."""
        if scope["type"] != "http":
            if scope["type"] == "lifespan":
                await self.app(scope, receive, send)
            return
        path = scope["path"]
        if path not in PATHS and not path.startswith(PREFIXES):
            await _refuse(send, 404, "there is nothing here")
            return
        if scope["method"] == "POST":
            length = _content_length(scope)
            upload = path == _API + "upload"
            limit = self.upload_bytes + MESSAGE_BYTES if upload else MESSAGE_BYTES
            if length is None or length > limit:
                await _refuse(send, 413, f"more than the limit of {limit:,} bytes; save the picture smaller")
                return
            if not upload:
                body = await _body(receive)
                if len(body) > limit or _names_an_address(body):
                    await _refuse(send, 400, "upload the picture itself, not its address")
                    return
                receive = _again(body, receive)

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message.get("headers", ()), *HEADERS]
            await send(message)

        await self.app(scope, receive, send_with_headers)


def _content_length(scope: Message) -> int | None:
    for key, value in scope["headers"]:
        if key == b"content-length" and value.isdigit():
            return int(value)
    return None


async def _body(receive: Receive) -> bytes:
    body = b""
    while len(body) <= MESSAGE_BYTES:
        message = await receive()
        body += message.get("body", b"")
        if not message.get("more_body"):
            break
    return body


def _again(body: bytes, receive: Receive) -> Receive:
    """Returns a `receive` that hands out `body`, and then whatever comes, such as a disconnection."""
    given = False

    async def first_the_body() -> Message:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return first_the_body


def _names_an_address(body: bytes) -> bool:
    """Returns whether this message would have a file fetched from elsewhere; a message that is not JSON counts too."""
    try:
        message = json.loads(body or b"null")
    except (ValueError, RecursionError):
        return True
    return any(isinstance(path, str) and "://" in path for path in _values(message, "path"))


def _values(data: Any, key: str) -> Iterator[Any]:
    todo = [data]
    while todo:
        one = todo.pop()
        if isinstance(one, dict):
            if key in one:
                yield one[key]
            todo.extend(one.values())
        elif isinstance(one, list):
            todo.extend(one)


async def _refuse(send: Send, status: int, words: str) -> None:
    body = json.dumps({"detail": words}).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode()), *HEADERS]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
