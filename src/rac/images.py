"""Station 1: files and uint8 pixels <-> image.

An image is a float32 tensor B 3 H W in [-1, 1]; pixels are uint8, H W 3. Only this module knows 255.
"""

from __future__ import annotations

import io
import math
import os
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from operator import index
from pathlib import Path, PurePath
from typing import BinaryIO

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from .errors import ImageError, RacError, check_path
from .files import write_bytes
from .notices import warn_once
from .rgb import Rgb, mend_planes, stored, to_rgb
from .tensors import check_dense

PICTURE_FORMATS: dict[str, tuple[str, ...]] = {
    "AVIF": (".avif",),
    "BMP": (".bmp",),
    "GIF": (".gif",),
    "JPEG": (".jfif", ".jpe", ".jpeg", ".jpg"),
    "JPEG2000": (".j2k", ".jp2"),
    "PNG": (".png",),
    "PPM": (".pbm", ".pgm", ".pnm", ".ppm"),
    "TIFF": (".tif", ".tiff"),
    "WEBP": (".webp",),
}
"""Picture formats that searches look for, by Pillow's names, with their suffixes in lower case."""

PICTURE_SUFFIXES = tuple(sorted(suffix for suffixes in PICTURE_FORMATS.values() for suffix in suffixes))
"""Suffixes, in lower case, of the files that count as pictures when a folder or an archive is searched."""

MAX_PIXELS = 2**26
"""Default limit on the size of a picture: 67 megapixels, 0.8 GB as an image."""

_WRITERS: dict[str, tuple[str, dict[str, object]]] = {
    ".png": ("PNG", {}),
    ".jpg": ("JPEG", {"quality": 95, "subsampling": 0}),
    ".jpeg": ("JPEG", {"quality": 95, "subsampling": 0}),
    ".webp": ("WEBP", {"lossless": True}),
}

_FAR = 16.0
"""Largest absolute value that `write_image` clamps without a warning; decoded images reach 2 or 3."""


# ------------------------------------------------------------------------------------------- files -> image


def read_image(
    path: str | os.PathLike[str] | BinaryIO,
    size: int | tuple[int, int] | None = None,
    *,
    convert: bool = False,
    max_pixels: int = MAX_PIXELS,
) -> Tensor:
    """Reads a picture file, or an open binary file, as an image, 1 3 H W float32 in [-1, 1].

    The orientation noted by a camera is applied; colour profiles are not. Whatever is not 8-bit RGB is converted:
    grey is repeated in three channels, palettes are looked up, more than 8 bits are scaled to 8, transparent parts
    are laid on white, CMYK is computed without its colour profile.

    Args:
        path: The file.
        size: A side for a square, or (height, width). The picture is scaled, antialiased, until it just covers that
            size, and its centre is kept. None: the picture's own size.
        convert: Convert without a message. Otherwise the logger `rac` warns of the first picture of each kind.
        max_pixels: The most pixels that the picture, and `size`, may have.

    Raises:
        ImageError: The file is missing, not a picture, damaged, animated, has more than `max_pixels` (its header tells,
            before anything is decoded) or holds values of unknown range, such as floats.
    """
    wanted = None if size is None else check_size(size, max_pixels)
    picture = read_picture(path, convert=convert, max_pixels=max_pixels)
    if wanted is not None:
        picture = _cover(picture, wanted)
    return from_pixels(np.asarray(picture))


def read_picture(
    source: str | os.PathLike[str] | BinaryIO,
    *,
    convert: bool = False,
    max_pixels: int = MAX_PIXELS,
    name: str | None = None,
    shrink: int = 1,
) -> Image.Image:
    """Reads a picture like `read_image`, but returns it as an upright 8-bit RGB `PIL.Image`.

    Args:
        source: The file, or an open binary file.
        convert: Convert without a message, as in `read_image`.
        max_pixels: The most pixels that the picture may have.
        name: Stands for the source in messages; None: its path.
        shrink: 2, 4 or 8 decodes a JPEG at that fraction of its size (rounded up), much faster. Other formats keep
            their size.

    Raises `ImageError` as `read_image`.
    """
    name = _name(source, name)
    picture, was, done = read_rgb(source, max_pixels=max_pixels, name=name, shrink=shrink)
    if was and not convert:
        warn_once(
            f"picture: {was}",
            f"{name} is {was}: converted to 8-bit RGB ({done}). "
            "Further pictures of this kind are converted without a message",
        )
    return picture


def read_rgb(
    source: str | os.PathLike[str] | BinaryIO,
    *,
    max_pixels: int = MAX_PIXELS,
    name: str | None = None,
    shrink: int = 1,
) -> Rgb:
    """Reads a picture like `read_picture`, and returns it with a description of the conversion; logs nothing.

    - `source`, `max_pixels`, `name`, `shrink`: as for `read_picture`.

    Raises `ImageError` as `read_image`.
    """
    name = _name(source, name)
    with _decoding(name), _opened(source, name, max_pixels) as picture:
        _refuse_animation(picture, name)
        mend_planes(picture)
        how = stored(picture)
        if shrink > 1 and picture.format == "JPEG":
            picture.draft(None, (picture.width // shrink, picture.height // shrink))
        picture.load()
        return to_rgb(ImageOps.exif_transpose(picture), how, name)


def upright_size(source: BinaryIO, name: str, max_pixels: int = MAX_PIXELS) -> tuple[int, int]:
    """Returns the width and height that `read_picture` would give, from the header alone. Raises `ImageError`."""
    with _decoding(name), _opened(source, name, max_pixels) as picture:
        try:
            turned = picture.getexif().get(ExifTags.Base.Orientation, 1) >= 5
        except Exception:  # a damaged EXIF block is the decoder's to refuse, or to overlook
            turned = False
        return picture.size[::-1] if turned else picture.size


def check_size(size: int | tuple[int, int], max_pixels: int = MAX_PIXELS) -> tuple[int, int]:
    """Returns `size`, the side of a square or (height, width), as (height, width).

    Raises `ImageError` unless they are whole numbers of at least 1, with at most `max_pixels` pixels.
    """
    try:
        height, width = map(index, size if isinstance(size, Sequence) else (size, size))
        if isinstance(size, bool):
            raise TypeError
    except (TypeError, ValueError):
        raise ImageError(
            f"size {size!r} must be a whole number, or (height, width) of them; 256 is a good start"
        ) from None
    if height < 1 or width < 1:
        raise ImageError(f"size {height} x {width} of an image must be at least 1 x 1")
    if height * width > max_pixels:
        raise ImageError(
            f"size {height} x {width} has {height * width:,} pixels, more than the limit of {max_pixels:,}; choose a "
            f"square of at most {math.isqrt(max_pixels):,}"
        )
    return height, width


def is_picture(name: str) -> bool:
    """Returns whether a file of this name or path counts as a picture: by its suffix, in any case, and not hidden."""
    pure = PurePath(name)
    return pure.suffix.lower() in PICTURE_SUFFIXES and not pure.name.startswith(".")


def image_files(path: str | os.PathLike[str]) -> list[Path]:
    """Returns the picture files (by suffix) in the folder `path`, sorted, without hidden ones; a file returns itself.

    Raises `ImageError` if there is nothing at `path`, or no picture in it.
    """
    check_path(path, ImageError)
    path = Path(path)
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise ImageError(f"{path} does not exist; give a picture file or a folder of them")
    try:
        found = sorted(path.iterdir())
    except OSError as error:
        raise ImageError(f"{path} cannot be searched ({error.strerror or error}); change its permissions") from None
    files = [file for file in found if is_picture(file.name) and file.is_file()]
    if not files:
        raise ImageError(f"{path} holds no pictures; looked for {' '.join(PICTURE_SUFFIXES)}")
    return files


def _name(source: str | os.PathLike[str] | BinaryIO, name: str | None) -> str:
    return name or (os.fspath(source) if isinstance(source, (str, os.PathLike)) else "the picture")


@contextmanager
def _decoding(name: str) -> Iterator[None]:
    """Turns whatever Pillow raises in the block into an `ImageError`: damaged files may raise any exception."""
    try:
        yield
    except (ImageError, MemoryError):
        raise
    except Exception as error:
        reason = str(error) or type(error).__name__
        raise ImageError(f"{name} is damaged or cut short ({reason}); fetch or export it again") from error


def _opened(source: str | os.PathLike[str] | BinaryIO, name: str, max_pixels: int) -> Image.Image:
    """Opens a picture and checks its header; nothing is decoded yet."""
    if getattr(source, "read", None) is None:
        check_path(source, ImageError)
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
        raise ImageError(f"{name} cannot be read: no permission; change its permissions") from None
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


def _cover(picture: Image.Image, size: tuple[int, int]) -> Image.Image:
    """Scales a picture until it just covers `size` (height, width), and keeps the centre; one resampling."""
    height, width = size
    scale = max(height / picture.height, width / picture.width)
    box_width, box_height = min(width / scale, picture.width), min(height / scale, picture.height)
    # Whole offsets: a crop without scaling then copies pixels instead of blending neighbours.
    left = math.floor((picture.width - box_width) / 2)
    top = math.floor((picture.height - box_height) / 2)
    box = (left, top, left + box_width, top + box_height)
    return picture.resize((width, height), Image.Resampling.BICUBIC, box=box)


# ----------------------------------------------------------------------------------------- image <-> pixels


def from_pixels(pixels: NDArray[np.uint8] | Tensor) -> Tensor:
    """Converts uint8 pixels, H W 3 or B H W 3, to an image, B 3 H W float32 in [-1, 1] (B = 1 for a single picture).

    Raises `ImageError` for another shape or type; `.movedim(-3, -1)` brings a tensor 3 H W into shape.
    """
    given = pixels if isinstance(pixels, Tensor) else np.array(pixels)
    if str(given.dtype) not in ("uint8", "torch.uint8") or given.ndim not in (3, 4) or given.shape[-1] != 3:
        raise ImageError(
            f"pixels must be uint8 of shape H W 3 or B H W 3, not {given.dtype} of shape {tuple(given.shape)}; move "
            "channels from first to last with .movedim(-3, -1)"
        )
    if isinstance(given, Tensor):
        check_dense(given, "the pixels", ImageError)
    batch = given if isinstance(given, Tensor) else torch.from_numpy(given)
    return (batch if batch.ndim == 4 else batch[None]).permute(0, 3, 1, 2).contiguous().float().div_(127.5).sub_(1.0)


def check_image(image: Tensor) -> None:
    """Raises `ImageError` unless `image` is a tensor B 3 H W of floats. Its values are not looked at."""
    if not isinstance(image, Tensor):
        raise ImageError(f"an image is a tensor 1 3 H W in [-1, 1], not a {type(image).__name__}; {_MAKE_ONE}")
    check_dense(image, "an image", ImageError)
    if not image.is_floating_point():
        raise ImageError(f"an image holds floats in [-1, 1], not {str(image.dtype).split('.')[-1]}; {_MAKE_ONE}")
    if image.ndim != 4 or image.shape[1] != 3:
        raise ImageError(f"an image has shape B 3 H W, not {tuple(image.shape)}; {_MAKE_ONE}")


_MAKE_ONE = "rac.read_image reads one from a file, rac.images.from_pixels converts uint8 pixels H W 3"


def to_pixels(image: Tensor) -> NDArray[np.uint8]:
    """Converts an image, 1 3 H W or 3 H W in [-1, 1], to uint8 pixels H W 3: clamped, rounded to the nearest level.

    `to_pixels(from_pixels(pixels))` returns `pixels`. Raises `ImageError` for another shape, a type that is not
    floating-point, and NaN.
    """
    check_image(image[None] if isinstance(image, Tensor) and image.ndim == 3 else image)
    single = image[0] if image.ndim == 4 and image.shape[0] == 1 else image
    if single.ndim != 3:
        raise ImageError(
            f"expected one image, 1 3 H W or 3 H W, not {tuple(image.shape)}; write the images of a batch one by one"
        )
    if single.is_meta:
        raise ImageError('the image is on the device "meta", where tensors have no values; make it on another device')
    single = single.detach().float().cpu()
    if not torch.isfinite(single).all():
        bad = int((~torch.isfinite(single)).sum())
        raise ImageError(f"the image holds {bad} NaN or infinite values; the latent or the weights are damaged")
    levels = single.clamp(-1, 1).add(1).mul(127.5).round().to(torch.uint8)
    return levels.permute(1, 2, 0).contiguous().numpy()


# ------------------------------------------------------------------------------------------- image -> files


def write_image(image: Tensor, path: str | os.PathLike[str]) -> None:
    """Writes an image, 1 3 H W or 3 H W in [-1, 1] (clamped), as 8-bit RGB. The suffix chooses the format.

    PNG and WebP are lossless, JPEG has quality 95. The file appears complete or not at all. Warns of values far
    outside [-1, 1].

    Raises:
        ImageError: Another suffix, another shape, a type that is not floating-point, NaN in the image, values of pixels
            (from 0 up to 255), no permission, no folder, a full disk.
    """
    pixels = to_pixels(image)
    _check_range(image)
    write_picture(Image.fromarray(pixels), path)


def _check_range(image: Tensor) -> None:
    low, high = (float(value) for value in torch.aminmax(image.detach())) if image.numel() else (0.0, 0.0)
    if max(-low, high) <= _FAR:
        return
    found = f"the image has values from {low:.4g} to {high:.4g}, where [-1, 1] was expected"
    if low >= 0:
        raise ImageError(f"{found}; if they are pixels from 0 to 255, divide by 127.5 and subtract 1")
    warnings.warn(f"{found}; they were clamped", stacklevel=3)


def write_picture(picture: Image.Image, path: str | os.PathLike[str]) -> None:
    """Writes an RGB `PIL.Image` (strips, galleries) like `write_image`. Raises `ImageError`."""
    check_path(path, ImageError)
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
    """Pads B C H W by reflection at the bottom and right until both sides are multiples of `factor`.

    Returns the padded image and the original (H, W), for `crop`. Raises `RacError` for a side too short to reflect.
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
    """Returns the upper left (height, width) of an image, B C height width; undoes `pad_to_multiple`."""
    return image[..., : size[0], : size[1]]
