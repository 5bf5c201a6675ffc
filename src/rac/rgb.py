"""Conversion of pictures of any mode to 8-bit RGB, with a description of what it took.

Pillow hands over what a file holds in some twenty modes. Some of them hide how many bits a value has, and some
hold values whose range no file states; those are refused.
"""

from __future__ import annotations

import re
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, TiffImagePlugin

from .errors import ImageError

_INTEGERS = ("I;16", "I;16L", "I;16B", "I;16N", "I")

# What a picture of each mode is called, and what becomes of its colours.
_REPEATED = "its values used for all three channels"
_MODES = {
    "1": ("black and white", _REPEATED),
    **dict.fromkeys(("L", "LA", *_INTEGERS), ("grey", _REPEATED)),
    **dict.fromkeys(("P", "PA"), ("palette", "its colours looked up")),
    **dict.fromkeys(("RGB", "RGBA", "RGBa"), ("RGB", "")),
    "RGBX": ("RGB with a fourth channel", "the fourth channel left out"),
    "CMYK": ("CMYK", "computed by the plain formula, without its colour profile"),
    "YCbCr": ("YCbCr", "its colours computed"),
    "LAB": ("L*a*b*", "its colours computed"),
    "HSV": ("HSV", "its colours computed"),
}


class Rgb(NamedTuple):
    """A picture in 8-bit RGB, and how it was converted."""

    picture: Image.Image
    was: str
    """Original form of the picture, such as "16-bit grey with transparency"; empty for 8-bit RGB."""
    done: str
    """Conversion of the picture, such as "scaled to 8 bits, laid on white"; empty for 8-bit RGB."""


class Stored(NamedTuple):
    """Storage of a file's values, as far as Pillow's mode does not tell."""

    bits: int
    """Number of bits of a value in the deepest channel; 8 where nothing says otherwise."""
    white: int | None = None
    """The value of white in grey of more than 8 bits; None where the format does not state it."""
    inverted: bool = False
    """Whether 0 stands for white, and the greatest value for black."""


def stored(picture: Image.Image) -> Stored:
    """Returns how the file of a picture stores its values. The picture is opened, but not loaded yet."""
    deep_grey = picture.mode in _INTEGERS
    if isinstance(picture, TiffImagePlugin.TiffImageFile):
        bits = max(picture.tag_v2.get(TiffImagePlugin.BITSPERSAMPLE, (1,)))
        inverted = picture.tag_v2.get(TiffImagePlugin.PHOTOMETRIC_INTERPRETATION) == 0
        # Mode "I" is what Pillow makes of signed values and of 32 bits.
        return Stored(bits, None if picture.mode == "I" else 2**bits - 1, inverted and deep_grey)
    bits = max([16 if deep_grey else 8, *(_bits(*tile) for tile in getattr(picture, "tile", ()))])
    # Pillow scales the grey of these to 16 bits, whatever they hold.
    return Stored(bits, 0xFFFF if picture.format in ("PNG", "PPM", "JPEG2000") else None)


def _bits(codec: str, extents: object, offset: int, arguments: Any) -> int:
    """Returns the bits of a value from Pillow's arguments for its decoder, the only place where they show."""
    if codec in ("ppm", "ppm_plain") and isinstance(arguments, tuple):
        return int(arguments[1]).bit_length()
    return 16 if re.search(r";16[BLN]", str(arguments)) else 8  # BGR;16 has 5 or 6 bits a value


def mend_planes(picture: Image.Image) -> None:
    """Lets Pillow read the planes of an uncompressed 16-bit TIFF, which is opened, but not loaded yet.

    By itself it reads such planes (R, G and B one after the other) as if they had 8 bits, which gives stripes.
    """
    if isinstance(picture, TiffImagePlugin.TiffImageFile) and stored(picture).bits == 16:
        order = "B" if picture.tag_v2.prefix == b"MM" else "L"
        picture.tile = [_deep_plane(tile, order) for tile in picture.tile]


def _deep_plane(tile: Any, order: str) -> Any:
    if tile.codec_name != "raw" or tile.args[0] not in tuple("RGBACMYK"):
        return tile
    return tile._replace(args=(f"{tile.args[0]};16{order}", *tile.args[1:]))


def to_rgb(picture: Image.Image, how: Stored, name: str) -> Rgb:
    """Converts a loaded picture of any mode to 8-bit RGB; 8-bit RGB itself comes back unchanged.

    Grey is repeated in three channels, palettes are looked up, more than 8 bits are scaled to 8, transparent parts are
    laid on white, CMYK is computed without its colour profile. `name` stands for the picture in errors.

    Raises:
        ImageError: The mode holds values whose range is not known: floats, integers of 32 bits, signed ones.
    """
    if picture.mode not in _MODES or (picture.mode in _INTEGERS and how.white is None):
        raise ImageError(f"{name} is of mode {picture.mode}, whose range is not known; save it as 8-bit RGB")
    was, colours = _MODES[picture.mode]
    done = [colours] if colours else []
    transparent = picture.has_transparency_data
    if transparent:
        was, done = f"{was} with transparency", ["laid on white", *done]
    if how.bits > 8:
        was, done = f"{how.bits}-bit {was}", ["scaled to 8 bits", *done]
    if picture.mode in _INTEGERS:
        picture = _grey_levels(picture, how)
    elif transparent:
        picture = _on_white(picture, how)
    return Rgb(picture.convert("RGB"), was if done else "", ", ".join(done))


def _grey_levels(picture: Image.Image, how: Stored) -> Image.Image:
    assert how.white is not None
    values = np.asarray(picture)
    levels = (np.arange(how.white + 1) * 255 + how.white // 2) // how.white
    grey = levels.astype(np.uint8)[:: -1 if how.inverted else 1][values]
    transparent = picture.info.get("transparency")
    return Image.fromarray(grey if transparent is None else np.where(values == transparent, np.uint8(255), grey))


def _on_white(picture: Image.Image, how: Stored) -> Image.Image:
    transparent = picture.info.get("transparency")
    if how.bits == 16 and isinstance(transparent, tuple):  # a colour of 16-bit RGB, which Pillow cuts to the upper 8
        picture = picture.copy()
        picture.info["transparency"] = tuple(value >> 8 for value in transparent)
    picture = picture.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", picture.size, (255, 255, 255, 255)), picture)
