"""Settings of the training images: where they are, and how crops are drawn."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path

from ..config import free_on_resume
from ..errors import RacError
from ..images import check_size


@dataclass(frozen=True)
class DataConfig:
    """Settings of the training images: where they come from, and how crops are drawn from them."""

    paths: tuple[Path, ...] = ()
    """Where the images are: folders, which are searched with all folders below them, tar shards (also folders of them,
    and patterns such as shards-{000..099}.tar), single images, Hugging Face data sets (hf:PATH_OR_NAME:split:column;
    hf-stream:... reads one in its own order), or, without other paths, a folder that `rac cache` made. None:
    scikit-image's photographs."""
    classes: tuple[str, ...] = ()
    """Use only the pictures of these classes. The class of a picture is the name of the folder that it is directly in,
    below the given path, also within a tar file; in a data set, it is the value of the class column. None: all
    pictures."""
    without_classes: tuple[str, ...] = ()
    """Leave out the pictures of these classes."""
    size: int = 64
    """Side of the square training crops, in pixels."""
    further_sizes: tuple[int, ...] = ()
    """Further sides of crops, for coders that must work at several sizes: `size` and these take turns, one iteration
    each. Held-out images keep `size`."""
    smallest_crop: int | None = None
    """Smallest side of the region that is cropped and scaled to `size`, in the file's pixels. None: `size`."""
    largest_crop: int | None = None
    """Largest side of the region that is cropped. None: the picture's short side. Sides are drawn log-uniformly between
    `smallest_crop` and this.
    """
    flip: bool = True
    """Mirror crops left to right at random, about half of them."""
    held_out: int = 8
    """Number of images for the gallery and its metrics. Their pictures are never trained on."""
    cached_crops: int = 0
    """Number of crops to prepare once, with their latents if there is a teacher, and to train on. 0: train on new crops
    throughout."""
    draft: bool = False
    """Decode JPEGs at 1/2, 1/4 or 1/8 of their size where a crop is scaled down by at least twice as much. This is two
    to four times as fast for large regions of camera photographs; pixels differ a little."""
    keep_mb: int = field(default=256, metadata=free_on_resume())
    """Memory for decoded pictures, in megabytes, so that small collections are not decoded again and again."""

    def __post_init__(self) -> None:
        for name, least in (("size", 1), ("held_out", 1), ("cached_crops", 0), ("keep_mb", 0)):
            if getattr(self, name) < least:
                raise RacError(f"{name} {getattr(self, name)} must be at least {least}")
        check_size(self.size)
        for side in self.further_sizes:
            replace(self, size=side, further_sizes=())  # which checks it
        smallest = self.size if self.smallest_crop is None else self.smallest_crop
        if smallest < 1 or (self.largest_crop is not None and self.largest_crop < smallest):
            raise RacError(
                f"crops cannot have sides from {smallest} to {self.largest_crop} pixels; "
                "smallest_crop must be at least 1 and at most largest_crop"
            )

    @property
    def sizes(self) -> tuple[int, ...]:
        """The sides of all crops, in the order in which they take turns."""
        return (self.size, *self.further_sizes)
