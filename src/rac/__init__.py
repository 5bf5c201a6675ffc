"""rac: flow-based image autoencoders.

coder = rac.load("rac-64")
image = rac.read_image("photo.png")           # 1 3 H W in [-1, 1]
latent = coder.encode(image, steps=4)         # the field, walked backwards
rac.write_image(coder.decode(latent, steps=4), "again.png")
"""

from . import flow, states
from .errors import ConvergenceWarning, ImageError, RacError, WeightsError
from .hub import available, load, save
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
    "read_image",
    "save",
    "states",
    "write_image",
]
