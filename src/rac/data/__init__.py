"""Training images: folders, tar files, scikit-image's photographs; random crops; prepared crops with latents."""

from .cache import CachedStream, open_stream
from .config import DataConfig
from .stream import Batch, ImageStream, Stream, batches

__all__ = ["Batch", "CachedStream", "DataConfig", "ImageStream", "Stream", "batches", "open_stream"]
