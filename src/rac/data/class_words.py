"""Words for classes that data sets name by numbers of WordNet."""

from __future__ import annotations

from collections.abc import Sequence

IMAGENETTE = {
    "n01440764": "tench",
    "n02102040": "English springer",
    "n02979186": "cassette player",
    "n03000684": "chain saw",
    "n03028079": "church",
    "n03394916": "French horn",
    "n03417042": "garbage truck",
    "n03425413": "gas pump",
    "n03445777": "golf ball",
    "n03888257": "parachute",
}
"""The ten classes of Imagenette, a part of ImageNet that is used for trying things out."""

IMAGENET_LABELS = {
    "n01440764": 0,
    "n02102040": 217,
    "n02979186": 482,
    "n03000684": 491,
    "n03028079": 497,
    "n03394916": 566,
    "n03417042": 569,
    "n03425413": 571,
    "n03445777": 574,
    "n03888257": 701,
}
"""Labels of Imagenette's classes among the 1,000 of ImageNet, as classifiers know them."""


def imagenet_label(name: str) -> int | None:
    """Returns the label among ImageNet's 1,000 of a class, called by its number of WordNet or by its name in words.

    None if it is not known here. Upper and lower case count alike, and so do spaces, hyphens and underscores.
    """
    plain = _plain(name)
    for number, word in IMAGENETTE.items():
        if plain in (number, _plain(word)):
            return IMAGENET_LABELS[number]
    return None


def _plain(name: str) -> str:
    return name.replace("_", " ").replace("-", " ").strip().casefold()


def in_words(classes: Sequence[str]) -> tuple[str, ...]:
    """Returns the names of classes, in words where they are known here, unless two would then be called alike."""
    words = tuple(IMAGENETTE.get(name, name) for name in classes)
    return words if len(set(words)) == len(words) else tuple(classes)
