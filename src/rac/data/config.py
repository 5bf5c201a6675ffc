"""What to train on."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from ..errors import RacError


@dataclass(frozen=True)
class DataConfig:
    """Where images come from, and how crops are drawn from them."""

    paths: tuple[Path, ...] = ()
    """Folders of images (searched through), tar shards (also folders of them, and patterns such as
    shards-{000..099}.tar), single images, Hugging Face data sets (hf:PATH_OR_NAME:split:column; hf-stream:... reads
    one in its own order), or, alone, a folder that `rac cache` made. None: scikit-image's photographs."""
    exclude: tuple[str, ...] = ()
    """Folders, in paths or inside tar shards, whose pictures are left out: labels such as n02102040, to have some that
    were never trained on."""
    size: int = 64
    """Side of the square training crops, in pixels."""
    further_sizes: tuple[int, ...] = ()
    """Sides of the crops of further batches: `size` and these take turns, an iteration each. For coders that shall work
    at several sizes; held-out images keep `size`."""
    smallest_crop: int | None = None
    """Least side of the region that is cropped and scaled to `size`, in the file's pixels. None: `size`."""
    largest_crop: int | None = None
    """Greatest side of that region. None: the picture's short side. Sides are drawn log-uniformly between the two."""
    flip: bool = True
    """Mirror every other crop, at random."""
    held_out: int = 8
    """Images for the gallery and its PSNR. Their pictures are never trained on."""
    cached_crops: int = 0
    """Prepare this many crops (and their latents, given a teacher) once, and train on those. 0: always new ones."""
    draft: bool = False
    """Decode large JPEGs at a half, a quarter or an eighth of their size where a crop is scaled down at least twice as
    far as that: two to four times as fast for large regions of a camera's photographs; pixels differ a little."""
    keep_mb: int = 256
    """Memory for decoded pictures, in megabytes: spares decoding small collections again and again."""

    def __post_init__(self) -> None:
        for name, least in (("size", 1), ("held_out", 1), ("cached_crops", 0), ("keep_mb", 0)):
            if getattr(self, name) < least:
                raise RacError(f"{name} {getattr(self, name)} must be at least {least}")
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
        """The sides of all crops, in turn."""
        return (self.size, *self.further_sizes)
