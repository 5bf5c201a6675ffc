"""rac: flow-based image autoencoders.

coder = rac.load("rac-256")
image = rac.read_image("photo.png")           # 1 3 H W in [-1, 1]
latent = coder.encode(image, steps=2)         # the field, walked backwards
rac.write_image(coder.decode(latent, steps=2), "again.png")
"""

from __future__ import annotations

import importlib
import importlib.util
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from . import flow, states
    from .errors import ConvergenceWarning, ImageError, RacError, WeightsError
    from .hub import available, load, load_generator, save
    from .images import read_image, write_image
    from .latents import LatentSpec

__version__ = "0.1.0"

__all__ = [
    "ConvergenceWarning",
    "ImageError",
    "LatentSpec",
    "RacError",
    "WeightsError",
    "available",
    "flow",
    "load",
    "load_generator",
    "read_image",
    "save",
    "states",
    "write_image",
]

_HOMES = {
    **dict.fromkeys(("ConvergenceWarning", "ImageError", "RacError", "WeightsError"), "errors"),
    **dict.fromkeys(("available", "load", "load_generator", "save"), "hub"),
    **dict.fromkeys(("read_image", "write_image"), "images"),
    "LatentSpec": "latents",
}
"""The module that defines each of the public names."""


def __getattr__(name: str) -> Any:
    """Imports a public name or a module on first use, so that `rac --help` need not wait for torch (PEP 562)."""
    if name in _HOMES:
        globals()[name] = getattr(importlib.import_module(f".{_HOMES[name]}", __name__), name)
        return globals()[name]
    if not name.startswith("_") and importlib.util.find_spec(f".{name}", __name__) is not None:
        return importlib.import_module(f".{name}", __name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
