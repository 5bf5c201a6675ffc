"""Training images: folders, tar shards, data sets, scikit-image's photographs; random crops; prepared crops.

To read it in order: `pictures` says what a picture and its class are; `files`, `tars` and `datasets` find them;
`stream` cuts numbered crops and gives each batch its images and labels; `cache` prepares crops and their latents once;
`record` notices that a run's pictures changed.
"""

from .cache import CachedStream, Features, Latents, held_out_images, open_stream
from .config import DataConfig
from .record import check_pictures
from .stream import Batch, ImageStream, InTurn, Stream, batches

__all__ = [
    "Batch",
    "CachedStream",
    "DataConfig",
    "Features",
    "ImageStream",
    "InTurn",
    "Latents",
    "Stream",
    "batches",
    "check_pictures",
    "held_out_images",
    "open_stream",
]
