"""Station 1: files and uint8 pixels <-> image.

An image is a float32 tensor B 3 H W in [-1, 1]; pixels are uint8, H W 3. Only this module knows 255.
"""

from __future__ import annotations

import io
import math
import os
import warnings
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import ExifTags, Image, ImageFile, ImageOps, UnidentifiedImageError
from torch import Tensor

from .errors import ImageError, RacError
from .files import write_bytes

PICTURE_SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp")
"""Names that `image_files` takes for pictures."""

MAX_PIXELS = 2**26
"""The largest picture read unless the caller allows more: 67 megapixels, 0.8 GB as an image."""

_WRITERS: dict[str, tuple[str, dict[str, object]]] = {
    ".png": ("PNG", {}),
    ".jpg": ("JPEG", {"quality": 95, "subsampling": 0}),
    ".jpeg": ("JPEG", {"quality": 95, "subsampling": 0}),
    ".webp": ("WEBP", {"lossless": True}),
}

# What `convert` does with a mode that is not 8-bit RGB, in the words of the error that offers it.
_CONVERSIONS = {
    "1": ("black and white", "repeats it in the three channels"),
    "L": ("grey", "repeats it in the three channels"),
    "LA": ("grey with alpha", "lays it on white and repeats it in the three channels"),
    "P": ("a palette picture", "looks its colours up, transparent ones on white"),
    "PA": ("a palette picture with alpha", "looks its colours up, transparent ones on white"),
    "RGBA": ("RGB with alpha", "lays it on white"),
    "CMYK": ("CMYK", "turns it into RGB by the plain formula, without its colour profile"),
    "YCbCr": ("YCbCr", "turns it into RGB"),
    "LAB": ("L*a*b*", "turns it into RGB"),
    "HSV": ("HSV", "turns it into RGB"),
    "I": ("integer grey of 16 bits or more", "keeps the upper 8 of its 16 bits"),
}


# ------------------------------------------------------------------------------------------- files -> image


def read_image(
    path: str | os.PathLike[str] | BinaryIO,
    size: int | tuple[int, int] | None = None,
    *,
    convert: bool = False,
    max_pixels: int = MAX_PIXELS,
) -> Tensor:
    """Read a picture file, or an open binary one, as an image, 1 3 H W float32 in [-1, 1].

    The orientation noted by a camera is applied; colour profiles are not. With `size` (an int for a square,
    or (height, width)) the picture is scaled, antialiased, until it just covers that size, and the centre kept.

    Only 8-bit RGB is taken as it is. Other modes lose something on the way to RGB, so they are refused unless
    `convert`: grey is repeated, alpha laid on white, palettes looked up, CMYK computed without profile,
    16 bits cut to 8.

    Raises:
        ImageError: the file is missing, not a picture, damaged, animated, has more than `max_pixels` (told from
            its header, before anything is decoded) or is of a mode that needs `convert`.
    """
    picture = read_picture(path, convert=convert, max_pixels=max_pixels)
    if size is not None:
        picture = _cover(picture, (size, size) if isinstance(size, int) else size)
    return from_pixels(np.asarray(picture))


def read_picture(
    source: str | os.PathLike[str] | BinaryIO,
    *,
    convert: bool = False,
    max_pixels: int = MAX_PIXELS,
    name: str | None = None,
    shrink: int = 1,
) -> Image.Image:
    """Like `read_image`, but gives the upright 8-bit RGB `PIL.Image` and also takes an open binary file.

    `name` stands for the source in errors. With `shrink` 2, 4 or 8 a JPEG is decoded at that fraction of its size
    (rounded up), much faster; other formats are not. Raises `ImageError`.
    """
    name = name or (os.fspath(source) if isinstance(source, (str, os.PathLike)) else "the picture")
    with _opened(source, name, max_pixels) as picture:
        _refuse_animation(picture, name)
        if not convert:
            _refuse_other_modes(picture, name)
        try:
            if shrink > 1 and picture.format == "JPEG":
                picture.draft(None, (picture.width // shrink, picture.height // shrink))
            picture.load()
            upright = ImageOps.exif_transpose(picture)
        except MemoryError:
            raise
        except Exception as error:  # Pillow's decoders raise errors of any kind on damaged files
            raise ImageError(f"{name} is damaged or cut short ({error}); fetch or export it again") from error
        return _to_rgb(upright, name)


def upright_size(source: BinaryIO, name: str, max_pixels: int = MAX_PIXELS) -> tuple[int, int]:
    """Width and height of what `read_picture` would give, from the header alone. Raises `ImageError`."""
    with _opened(source, name, max_pixels) as picture:
        try:
            turned = picture.getexif().get(ExifTags.Base.Orientation, 1) >= 5
        except Exception:  # a damaged EXIF block is the decoder's to refuse, or to overlook
            turned = False
        return picture.size[::-1] if turned else picture.size


def image_files(path: str | os.PathLike[str]) -> list[Path]:
    """The picture files (by suffix) in the folder `path`, sorted, hidden ones left out; a file gives itself.

    Raises `ImageError` if there is nothing at `path`, or no picture in it.
    """
    path = Path(path)
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise ImageError(f"{path} does not exist; give a picture file or a folder of them")
    found = path.iterdir()
    files = sorted(
        file
        for file in found
        if file.suffix.lower() in PICTURE_SUFFIXES and not file.name.startswith(".") and file.is_file()
    )
    if not files:
        raise ImageError(f"{path} holds no pictures; looked for {' '.join(PICTURE_SUFFIXES)}")
    return files


def _opened(source: str | os.PathLike[str] | BinaryIO, name: str, max_pixels: int) -> Image.Image:
    """Open a picture and check its header; nothing is decoded yet."""
    try:
        with warnings.catch_warnings():
            # Our own limit decides; Pillow's warning would be a second line for the same thing.
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            picture = Image.open(source)
    except FileNotFoundError:
        raise ImageError(f"{name} does not exist; check the path") from None
    except IsADirectoryError:
        raise ImageError(f"{name} is a folder; give one picture file") from None
    except PermissionError:
        raise ImageError(f"{name} may not be read; change its permissions") from None
    except UnidentifiedImageError:
        raise ImageError(
            f"{name} is not a picture, or its header is damaged; give a PNG, JPEG, WebP, BMP or TIFF file"
        ) from None
    except Image.DecompressionBombError as error:
        raise ImageError(f"{name} is too large ({error}); scale it down first") from None
    except (OSError, SyntaxError, ValueError) as error:
        raise ImageError(f"{name} cannot be opened ({error}); fetch or export it again") from error
    width, height = picture.size
    if width * height > max_pixels:
        picture.close()
        raise ImageError(
            f"{name} has {width} x {height} = {width * height:,} pixels, more than the limit of "
            f"{max_pixels:,}; scale it down first, or raise max_pixels"
        )
    return picture


def _refuse_animation(picture: Image.Image, name: str) -> None:
    # Camera JPEGs of the MPO kind hold previews as further frames; the first is the photograph.
    frames = 1 if picture.format == "MPO" else getattr(picture, "n_frames", 1)
    if frames > 1:
        raise ImageError(f"{name} has {frames} frames; save the one you want as a PNG")


def _refuse_other_modes(picture: Image.Image, name: str) -> None:
    if picture.mode != "RGB":
        what, conversion = _describe(picture.mode)
    elif picture.has_transparency_data:
        what, conversion = "RGB with a transparent colour", "lays it on white"
    elif isinstance(picture, ImageFile.ImageFile) and any(";16" in str(tile.args) for tile in picture.tile):
        # Pillow would hand 16-bit RGB over as 8-bit without a word; only the raw mode of its tiles tells.
        what, conversion = "RGB of 16 bits", "keeps the upper 8 bits"
    else:
        return
    mend = f"--convert (convert=True) {conversion}" if conversion else "save it as 8-bit RGB"
    raise ImageError(f"{name} is {what} (mode {picture.mode}), expected 8-bit RGB; {mend}")


def _describe(mode: str) -> tuple[str, str]:
    return _CONVERSIONS.get(mode.split(";")[0], ("of an unusual kind", ""))


def _to_rgb(picture: Image.Image, name: str) -> Image.Image:
    """8-bit RGB out of any mode; a no-op for 8-bit RGB, so strict and converted reading agree on it."""
    if picture.mode.startswith("I"):
        values = np.asarray(picture)
        if values.min() < 0 or values.max() > 0xFFFF:
            raise ImageError(f"{name} has integers outside 0 to 65535 ({picture.mode}); save it as 8-bit RGB")
        picture = Image.fromarray((values >> 8).astype(np.uint8))
    elif not _describe(picture.mode)[1] and picture.mode != "RGB":
        raise ImageError(f"{name} is of mode {picture.mode}, whose range is not known; save it as 8-bit RGB")
    if picture.has_transparency_data:
        picture = picture.convert("RGBA")
        white = Image.new("RGBA", picture.size, (255, 255, 255, 255))
        picture = Image.alpha_composite(white, picture)
    return picture.convert("RGB")


def _cover(picture: Image.Image, size: tuple[int, int]) -> Image.Image:
    """Scale until the picture just covers `size` (height, width), keep the centre; one resampling."""
    height, width = size
    if height < 1 or width < 1:
        raise ImageError(f"size {height} x {width} of an image must be at least 1 x 1")
    scale = max(height / picture.height, width / picture.width)
    box_width, box_height = min(width / scale, picture.width), min(height / scale, picture.height)
    # Whole offsets: a crop without scaling then copies pixels instead of blending neighbours.
    left = math.floor((picture.width - box_width) / 2)
    top = math.floor((picture.height - box_height) / 2)
    box = (left, top, left + box_width, top + box_height)
    return picture.resize((width, height), Image.Resampling.BICUBIC, box=box)


# ----------------------------------------------------------------------------------------- image <-> pixels


def from_pixels(pixels: NDArray[np.uint8]) -> Tensor:
    """uint8 pixels, H W 3 or B H W 3 -> image, B 3 H W float32 in [-1, 1] (B = 1 for a single picture)."""
    if pixels.dtype != np.uint8 or pixels.ndim not in (3, 4) or pixels.shape[-1] != 3:
        raise ImageError(f"pixels are uint8 of H W 3 or B H W 3, not {pixels.dtype} of {pixels.shape}")
    batch = torch.from_numpy(np.array(pixels if pixels.ndim == 4 else pixels[None]))
    return batch.permute(0, 3, 1, 2).contiguous().float().div_(127.5).sub_(1.0)


def to_pixels(image: Tensor) -> NDArray[np.uint8]:
    """Image, 1 3 H W or 3 H W in [-1, 1] -> uint8 pixels H W 3: clamped, then rounded to the nearest level.

    `to_pixels(from_pixels(pixels))` gives `pixels` back. Raises `ImageError` for another shape or NaN.
    """
    single = image[0] if image.ndim == 4 and image.shape[0] == 1 else image
    if single.ndim != 3 or single.shape[0] != 3:
        raise ImageError(f"one image is 1 3 H W or 3 H W, not {tuple(image.shape)}; write a batch one by one")
    single = single.detach().float().cpu()
    if not torch.isfinite(single).all():
        bad = int((~torch.isfinite(single)).sum())
        raise ImageError(f"the image holds {bad} NaN or infinite values; the latent or the weights are damaged")
    levels = single.clamp(-1, 1).add(1).mul(127.5).round().to(torch.uint8)
    return levels.permute(1, 2, 0).contiguous().numpy()


# ------------------------------------------------------------------------------------------- image -> files


def write_image(image: Tensor, path: str | os.PathLike[str]) -> None:
    """Write an image, 1 3 H W or 3 H W in [-1, 1] (clamped), as 8-bit RGB. The suffix chooses the format.

    PNG and WebP are lossless, JPEG has quality 95. The file appears complete or not at all.

    Raises:
        ImageError: another suffix, another shape, NaN in the image, no permission, no folder, a full disk.
    """
    write_picture(Image.fromarray(to_pixels(image)), path)


def write_picture(picture: Image.Image, path: str | os.PathLike[str]) -> None:
    """Like `write_image`, for an RGB `PIL.Image` (strips, galleries). Raises `ImageError`."""
    path = Path(path)
    if path.suffix.lower() not in _WRITERS:
        raise ImageError(f"{path} cannot be written: its suffix must be one of {' '.join(_WRITERS)}")
    kind, options = _WRITERS[path.suffix.lower()]
    buffer = io.BytesIO()
    try:
        picture.save(buffer, kind, **options)
    except (OSError, ValueError) as error:  # WebP ends at 16,383 pixels a side, JPEG at 65,535
        raise ImageError(f"cannot write {path}: {error}; write a .png instead") from error
    write_bytes(path, buffer.getvalue(), ImageError)


# ----------------------------------------------------------------------------------------------------- size


def pad_to_multiple(image: Tensor, factor: int) -> tuple[Tensor, tuple[int, int]]:
    """Pad B C H W by reflection at the bottom and right until both sides are multiples of `factor`.

    Returns the padded image and (H, W) for `crop`. Raises `RacError` for a side too short to reflect.
    """
    height, width = image.shape[-2:]
    down, right = -height % factor, -width % factor
    if down >= max(height, 1) or right >= max(width, 1):
        least = factor // 2 + 1
        raise RacError(
            f"an image of {width} x {height} is too small to be padded to multiples of {factor}; "
            f"its sides must be at least {least}: enlarge it, or read it with a size"
        )
    padded = F.pad(image, (0, right, 0, down), mode="reflect") if down or right else image
    return padded, (height, width)


def crop(image: Tensor, size: tuple[int, int]) -> Tensor:
    """The upper left (height, width) of an image, B C height width: what `pad_to_multiple` was given."""
    return image[..., : size[0], : size[1]]
