"""Sets of images that can be compared fairly: of equal number and of the same classes in the same turns."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..data.class_words import imagenet_label, in_words
from ..data.files import collection_name, find_pictures
from ..data.pictures import Fingerprint, Picture, Pictures
from ..errors import RacError
from ..generators.protocol import LatentGenerator
from .image_sets import ImageSet, Preprocessing

Group = list[Picture]


@dataclass(frozen=True)
class MatchedSets:
    """Images to reconstruct, references to compare with, and the labels to generate by, N each.

    Classes take turns in all three. A smaller number gives the beginning of the same sets.
    """

    source: ImageSet
    reference: ImageSet
    labels: tuple[int, ...]
    """Labels of the classes to generate, in the order of their turns; empty for a generator without classes."""
    source_classes: tuple[int, ...] | None
    """Label of each image of `source` among the generator's classes; None where there are none."""
    generated_classes: tuple[int, ...] | None
    """Label to generate each sample by; None for a generator without classes."""
    imagenet: dict[int, int]
    """ImageNet's label of each class that an ImageNet classifier can tell, by the generator's label."""
    fingerprints: tuple[Fingerprint, ...]
    """Identities of the collections of pictures."""

    def __len__(self) -> int:
        return len(self.source)


def matched_sets(
    data: Sequence[Path],
    reference: Sequence[Path],
    generator: LatentGenerator,
    labels: Sequence[int],
    count: int | None,
    progress: Callable[[int], None] | None = None,
) -> MatchedSets:
    """Reads the images to reconstruct and to compare with, the centres of pictures at the generator's size.

    - `data`: pictures to reconstruct, in folders of their classes if the generator knows classes.
    - `reference`: pictures to compare with; empty: half of `data`, which is then not reconstructed.
    - `generator`: the generator.
    - `labels`: labels of the classes to generate, in the order of their turns; empty without classes.
    - `count`: number of images of each set; None: as many as there are, equally of each class.
    - `progress`: called with the number of images read.

    Raises `RacError` for pictures of none of these classes, for too few, and as `ImageSet.read`.
    """
    found = find_pictures(data)
    groups, known = _groups(found, generator, labels, collection_name(data))
    if reference:
        others = find_pictures(reference)
        compared, _ = _groups(others, generator, labels, collection_name(reference))
        if groups.keys() != compared.keys():
            raise RacError(
                f"{collection_name(data)} and {collection_name(reference)} hold pictures of different classes; give "
                "both of the same"
            )
        collections = [found, others]
    else:
        compared = {label: group[1::2] for label, group in groups.items()}
        groups = {label: group[::2] for label, group in groups.items()}
        collections = [found]
    most = len(groups) * min(len(group) for both in (groups, compared) for group in both.values())
    number = most if count is None else count
    if not 2 <= number <= most:
        halved = "" if reference else ", as half of the pictures are for comparison unless --reference names others"
        raise RacError(
            f"{number} images a set are asked for, and there are pictures for 2 to {most}, equally of each "
            f"class{halved}; give another count, or more pictures"
        )
    preprocessing = Preprocessing(generator.kind.side * generator.kind.spec.factor, "centre")
    done = 0

    def read(groups: dict[int, Group], paths: Sequence[Path]) -> ImageSet:
        nonlocal done
        before = done
        told = None if progress is None else lambda now: progress(before + now)
        done += number
        return ImageSet.of_pictures(_in_turns(groups, number), collection_name(paths), preprocessing, None, told)

    turns = tuple(label for label in groups)
    own = tuple(turns[place % len(turns)] for place in range(number))
    return MatchedSets(
        read(groups, data),
        read(compared, reference or data),
        tuple(labels),
        own if known else None,
        tuple(labels[place % len(labels)] for place in range(number)) if labels else None,
        _imagenet(generator, turns if known else ()),
        tuple(collection.fingerprint() for collection in collections),
    )


def _groups(
    pictures: Pictures, generator: LatentGenerator, labels: Sequence[int], name: str
) -> tuple[dict[int, Group], bool]:
    """Returns the pictures by label, in the order of `labels`, and whether the labels are known.

    All pictures are one group where the generator or the pictures have no classes.
    """
    if not labels or not pictures.classes:
        return {0: list(pictures)}, False
    words = dict(zip(pictures.classes, in_words(pictures.classes), strict=True))
    label_of = {one: generator.find_label(word) for one, word in words.items()}
    groups: dict[int, Group] = {label: [] for label in labels}
    for picture in pictures:
        label = None if picture.class_name is None else label_of[picture.class_name]
        if label in groups:
            groups[label].append(picture)
    if lacking := [generator.classes[label] for label, group in groups.items() if not group]:
        raise RacError(
            f"{name} has no pictures of the class {lacking[0]}; its classes are {', '.join(pictures.classes[:5])}"
            f"{', ...' if len(pictures.classes) > 5 else ''}: choose --classes that it has, or give other pictures"
        )
    return groups, True


def _in_turns(groups: dict[int, Group], count: int) -> Group:
    members = list(groups.values())
    return [members[place % len(members)][place // len(members)] for place in range(count)]


def _imagenet(generator: LatentGenerator, labels: Sequence[int]) -> dict[int, int]:
    found = {label: imagenet_label(generator.classes[label]) for label in labels}
    return {label: number for label, number in found.items() if number is not None}
