"""Training images: folders, tar shards, data sets, scikit-image's photographs; random crops; prepared crops."""

from .cache import CachedStream, held_out_images, open_stream
from .config import DataConfig
from .stream import Batch, ImageStream, InTurn, Stream, batches

__all__ = [
    "Batch",
    "CachedStream",
    "DataConfig",
    "ImageStream",
    "InTurn",
    "Stream",
    "batches",
    "held_out_images",
    "open_stream",
]
