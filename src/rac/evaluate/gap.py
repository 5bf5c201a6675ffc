"""The gap between reconstruction and generation, by decoder.

The latents of one coder come in three kinds: encoded from images, encoded and perturbed by noise, and generated. Each
decoder decodes all of them, and its images are compared with others that none of them was made from. How much worse
generated latents come out than encoded ones is the gap of a decoder; RAC's claim is that its gap is smaller than that
of the teacher's decoder, and shrinks with steps.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any, NamedTuple

import safetensors.torch
import torch
from torch import Tensor

from ..coders.protocol import Coder
from ..config import differences, json_safe, read_json, to_json
from ..errors import RacError
from ..files import MARKER, make_folder, make_output, write_bytes
from ..flow import Walk
from ..flow.grid import steps_in_words
from ..generators.protocol import LatentGenerator
from ..generators.sample import Source, Wanted
from ..generators.sampling import Sampling
from ..images import from_pixels, to_pixels
from ..representations import Extractor, metric_name
from ..runtime import reproducible
from ..storage import read_tensors, weights_hash
from .image_sets import Batch
from .matched_sets import MatchedSets
from .resampling import Estimate, FrechetDistances, KernelDistances, centred, resamples
from .result import command_line, versions
from .robustness import noised_latents

SETTINGS = "settings.json"
"""Name of the file that says what the features in a folder were made by."""

AXES = 64
"""Number of principal axes of Frechet distances; with so few, some hundred images are enough."""

SHOWN = 6
"""Most images of each set that are kept as pictures."""

RECONSTRUCTED, GENERATED = "reconstructed", "generated"


@dataclass(frozen=True, eq=False)
class Decoder:
    """A coder that decodes, in one number of steps."""

    title: str
    """Name of the coder in tables."""
    coder: Coder
    walk: Walk | None = None
    """The way to decode, as `Coder.walk` gives it; None: the coder's own."""
    steps: int | None = None
    """Number of steps; None: the coder's own, or one pass."""

    @property
    def label(self) -> str:
        """Title and steps, such as "rac-256, 4 steps"."""
        return self.title if self.steps is None else f"{self.title}, {steps_in_words(self.steps)}"

    @cached_property
    def key(self) -> str:
        """Name that files of this decoder have: other weights or steps, another name."""
        name = re.sub(r"[^\w.]+", "-", self.title)[-40:]
        return f"{name}-{weights_hash(self.coder.state_dict())[:12]}-{self.steps or 'own'}"


class _Piece(NamedTuple):
    """A stretch of the images: those of one number in all sets."""

    number: int
    first: int
    source: Batch
    reference: Batch


@dataclass(frozen=True, kw_only=True)
class GapExperiment:
    """What is decoded, by which decoders, and by which features it is compared.

    Generated latents and the features of all images are kept in `folder`, so that work that was broken off goes on, and
    decoders, sigmas and images can be added.
    """

    generator: LatentGenerator
    sampling: Sampling
    encoder: Coder
    """The coder of the latents."""
    decoders: tuple[Decoder, ...]
    """The decoders; the first is the teacher's, with which the others are compared."""
    sets: MatchedSets
    judges: Mapping[str, Extractor]
    """Networks whose features are compared, by name."""
    sigmas: tuple[float, ...]
    """Deviations of the noise on perturbed latents; latents have a deviation of about 1."""
    folder: Path
    rng_seed: int = 0
    batch: int = 10
    """Images that are made and kept together."""
    names: Mapping[str, str] = field(default_factory=dict)
    """Names of the generator and of the coder of its latents, for the record."""

    @property
    def kinds(self) -> tuple[str, ...]:
        """Names of the kinds of latents that every decoder decodes."""
        return (RECONSTRUCTED, *(f"sigma {sigma:g}" for sigma in self.sigmas), GENERATED)

    @property
    def device(self) -> torch.device:
        """The device that everything is computed on."""
        return next(self.encoder.parameters()).device

    def settings(self) -> dict[str, Any]:
        """Returns, as JSON, all that kept latents and features depend on and that their names do not say."""
        return {
            "generator": weights_hash(self.generator.state_dict()),
            "encoder": weights_hash(self.encoder.state_dict()),
            "sampling": to_json(self.sampling),
            "classes": list(self.sets.labels),
            "pictures": [print_.hash for print_ in self.sets.fingerprints],
            "judges": {name: _file_hash(judge.path) for name, judge in self.judges.items()},
            "rng_seed": self.rng_seed,
            "batch": self.batch,
        }

    def enter(self, resume: bool) -> None:
        """Makes the folder, or checks that it was begun alike. Raises `RacError`."""
        path, asked = self.folder / SETTINGS, json_safe(self.settings())
        if path.exists():
            if not resume:
                raise RacError(f"{self.folder} holds a measurement; --resume goes on with it, or choose another --out")
            if changed := differences(asked, read_json(path)):
                raise RacError(f"{self.folder} was begun otherwise: {'; '.join(changed)}; choose another --out")
        elif self.folder.exists() and (
            not self.folder.is_dir() or any(one.name != MARKER for one in self.folder.iterdir())
        ):
            raise RacError(f"{self.folder} is not empty; choose another --out")
        elif resume:
            raise RacError(f"{self.folder} holds nothing to go on with (no {SETTINGS}); leave out --resume")
        make_output(self.folder)
        if not path.exists():
            write_bytes(path, (json.dumps(asked, indent=2) + "\n").encode())

    def work(self, progress: Callable[[int, int], None] | None = None) -> int:
        """Makes what is not kept yet: latents, images and their features. Returns the number of images made anew.

        `progress` is called with the number of images that are done and in all. What was made before an interruption
        is kept, up to the piece in hand.
        """
        total = len(self.sets) * (2 + len(self.decoders) * len(self.kinds))
        done = new = 0
        with reproducible():
            for piece in self._pieces():
                for made in self._piece(piece):
                    done += len(piece.source.names)
                    new += made
                    if progress is not None:
                        progress(done, total)
        return new

    def _pieces(self) -> Iterator[_Piece]:
        first = 0
        both = zip(self.sets.source.batches(self.batch), self.sets.reference.batches(self.batch), strict=True)
        for number, (source, reference) in enumerate(both):
            yield _Piece(number, first, source, reference)
            first += len(source.names)

    def _piece(self, piece: _Piece) -> Iterator[int]:
        """Makes what a piece lacks, and yields for each set the number of images made, 0 where they were kept."""
        yield self._made("source", piece, partial(piece.source.images.to, self.device))
        yield self._made("reference", piece, partial(piece.reference.images.to, self.device))
        latents: dict[str, Tensor] = {}
        for kind in self.kinds:
            for decoder in self.decoders:
                yield self._made(_key(kind, decoder), piece, partial(self._decoded, kind, decoder, piece, latents))

    def _decoded(self, kind: str, decoder: Decoder, piece: _Piece, latents: dict[str, Tensor]) -> Tensor:
        """Decodes the latents of a piece; `latents` keeps those that were made already, by kind."""
        if kind not in latents:
            latents.update(self._latents(kind, piece))
        # Of each image's own, the same for all kinds of latents.
        noise = decoder.coder.noise_of(latents[kind], piece.source.names, self.rng_seed)
        return _as_files(decoder.coder.decoded(latents[kind], decoder.walk, noise).image, decoder.label)

    def _latents(self, kind: str, piece: _Piece) -> dict[str, Tensor]:
        """Returns latents of a piece by kind: the generated ones, or all that are encoded."""
        if kind == GENERATED:
            return {GENERATED: self._generated(piece).to(self.device)}
        part = piece.source._replace(images=piece.source.images.to(self.device))
        sigmas = (0.0, *self.sigmas)
        return dict(zip(self.kinds[:-1], noised_latents(self.encoder, part, sigmas, self.rng_seed), strict=True))

    def _generated(self, piece: _Piece) -> Tensor:
        path, count = self._file("latents", piece.number), len(piece.source.names)
        kept = _read(path)
        if "latent" in kept and len(kept["latent"]) >= count:
            return kept["latent"][:count]
        labels = self.sets.generated_classes
        wanted = [
            Wanted(number, None if labels is None else labels[number])
            for number in range(piece.first, piece.first + count)
        ]
        source = Source(self.generator, self.encoder, self.sampling, self.rng_seed)
        latent = torch.cat([made.latents for made in source.samples(wanted, count, ())]).float().cpu()
        _write(path, {"latent": latent})
        return latent

    def _made(self, key: str, piece: _Piece, make: Callable[[], Tensor]) -> int:
        """Makes the features of a piece of the set `key` unless they are kept; returns the number made."""
        path, count = self._file(key, piece.number), len(piece.source.names)
        kept = _read(path)
        if all(name in kept and len(kept[name]) >= count for name in self.judges):
            return 0
        images = make()
        tensors: dict[str, Tensor] = {}
        for name, judge in self.judges.items():
            features = judge(images)
            tensors[name] = features.pooled.float().cpu()
            if features.logits is not None and self._told:
                tensors[f"{name} logits"] = features.logits[:, list(self.sets.imagenet.values())].float().cpu()
        if piece.number == 0:
            tensors["pictures"] = torch.stack([torch.from_numpy(to_pixels(one)) for one in images[:SHOWN]])
        _write(path, tensors)
        return count

    @property
    def _told(self) -> bool:
        """Whether a classifier of ImageNet can tell two classes or more."""
        return len(self.sets.imagenet) > 1

    def _file(self, key: str, number: int) -> Path:
        return self.folder / "kept" / key / f"{number:05d}.safetensors"

    # ------------------------------------------------------------------------------------------ what is kept

    def kept(self, key: str, name: str) -> Tensor | None:
        """Returns one tensor of all pieces of the set `key`, joined; None where they hold none of that name."""
        pieces = range(-(-len(self.sets) // self.batch))
        found = [_read(self._file(key, number)).get(name) for number in pieces]
        there = [one for one in found if one is not None]
        # The last piece may be of a time when more images were asked for.
        return torch.cat(there)[: len(self.sets)] if len(there) == len(found) else None

    def features(self, key: str, judge: str) -> Tensor:
        """Returns the features of all images of a set, N D. Raises `RacError` where the work is not done."""
        found = self.kept(key, judge)
        if found is None:
            raise RacError(f"the features of {key} in {self.folder} are not complete; finish the measurement first")
        return found

    def originals(self) -> Tensor:
        """Returns the first images that were encoded, B 3 H W in [-1, 1]."""
        return from_pixels(_read(self._file("source", 0))["pictures"])

    def pictures(self, kind: str, decoder: Decoder) -> Tensor:
        """Returns the first images that a decoder made of one kind of latents, B 3 H W in [-1, 1]."""
        return from_pixels(_read(self._file(_key(kind, decoder), 0))["pictures"])

    # ------------------------------------------------------------------------------------------ judging

    def result(self, number: int = 1000) -> GapResult:
        """Compares all sets, by every judge, with intervals from `number` resamples that all decoders share.

        Raises `RacError` where the work is not done.
        """
        rows: list[GapRow] = []
        count = len(self.sets)
        drawn = {name: resamples(count, number, self.rng_seed, name) for name in ("source", "reference", GENERATED)}
        for name, judge in self.judges.items():
            reference = self.features("reference", name)
            axes = min(AXES, reference.shape[1])
            kernel = KernelDistances(reference, drawn["reference"])
            rows += self._rows(metric_name("KID", judge.label), name, kernel, drawn)
            if count > axes:
                frechet = FrechetDistances(reference, drawn["reference"], axes)
                title = metric_name("FID", judge.label)
                if axes < reference.shape[1]:
                    title += f" on {axes} axes"
                rows += self._rows(title, name, frechet, drawn)
            if self._told and self.kept("source", f"{name} logits") is not None:
                rows += self._accuracy(f"accuracy by {name}", name, drawn)
        return GapResult(
            generator=self.names.get("generator", ""),
            encoder=self.names.get("encoder", ""),
            count=count,
            source=self.sets.source.name,
            reference=self.sets.reference.name,
            size=self.generator.kind.side * self.generator.kind.spec.factor,
            sampling=to_json(self.sampling),
            rng_seed=self.rng_seed,
            resamples=number,
            classes=[self.generator.classes[label] for label in self.sets.labels],
            settings=self.settings(),
            versions=versions(),
            command=command_line(),
            rows=tuple(rows),
        )

    def _rows(
        self, title: str, judge: str, distance: Callable[[Tensor, Tensor], Tensor], drawn: Mapping[str, Tensor]
    ) -> list[GapRow]:
        """Returns a row for each decoder, of a distance to the reference."""

        def values(key: str, weights: Tensor) -> Tensor:
            return centred(distance(self.features(key, judge), weights))

        real = Estimate.of(values("source", drawn["source"]))
        found = {
            decoder: {kind: values(_key(kind, decoder), _weights(kind, drawn)) for kind in self.kinds}
            for decoder in self.decoders
        }
        return self._paired(title, real, found, 1.0)

    def _accuracy(self, title: str, judge: str, drawn: Mapping[str, Tensor]) -> list[GapRow]:
        """Returns a row for each decoder, of the share of images whose class a classifier tells among the others."""
        places = {label: place for place, label in enumerate(self.sets.imagenet)}
        own, asked = self.sets.source_classes, self.sets.generated_classes
        assert own is not None
        assert asked is not None

        def values(key: str, classes: Sequence[int], weights: Tensor) -> Tensor:
            logits = self.kept(key, f"{judge} logits")
            assert logits is not None
            told = torch.tensor([places.get(label, -1) for label in classes])
            right, judged = (logits.argmax(dim=1) == told).double(), (told >= 0).double()
            return (weights @ right) / (weights @ judged)

        real = Estimate.of(values("source", own, drawn["source"]))
        found = {
            decoder: {
                kind: values(_key(kind, decoder), asked if kind == GENERATED else own, _weights(kind, drawn))
                for kind in self.kinds
            }
            for decoder in self.decoders
        }
        return self._paired(title, real, found, -1.0)

    def _paired(
        self, title: str, real: Estimate, found: Mapping[Decoder, Mapping[str, Tensor]], sign: float
    ) -> list[GapRow]:
        """Returns the rows of one metric; `sign` is -1 where more is better, so that a gap is always a loss."""
        gaps = {decoder: sign * (values[GENERATED] - values[RECONSTRUCTED]) for decoder, values in found.items()}
        teachers = gaps[self.decoders[0]]
        return [
            GapRow(
                metric=title,
                decoder=decoder.label,
                coder=decoder.title,
                steps=decoder.steps,
                real=real,
                values={kind: Estimate.of(values[kind]) for kind in self.kinds},
                gap=Estimate.of(gaps[decoder]),
                ratio=Estimate.of(gaps[decoder] / teachers),
            )
            for decoder, values in found.items()
        ]


@dataclass(frozen=True)
class GapRow:
    """One metric of one decoder."""

    metric: str
    decoder: str
    coder: str
    steps: int | None
    real: Estimate
    """The metric of the images themselves: the floor, or for an accuracy the ceiling."""
    values: dict[str, Estimate]
    """The metric of the decoded images, by kind of latents."""
    gap: Estimate
    """How much worse images of generated latents are than those of encoded ones."""
    ratio: Estimate
    """The gap over that of the teacher's decoder, resampled together with it."""


@dataclass(frozen=True)
class GapResult:
    """Result of the experiment, with all that it depends on."""

    generator: str
    encoder: str
    count: int
    """Number of images of each set."""
    source: str
    reference: str
    size: int
    """Side of the images in pixels."""
    sampling: dict[str, Any]
    rng_seed: int
    resamples: int
    classes: list[str]
    settings: dict[str, Any]
    """Hashes of weights and pictures, and whatever else the numbers depend on."""
    versions: dict[str, str]
    command: str
    rows: tuple[GapRow, ...]

    @property
    def metrics(self) -> list[str]:
        """Names of the metrics, in order."""
        return list(dict.fromkeys(row.metric for row in self.rows))

    def of(self, metric: str) -> list[GapRow]:
        """Returns the rows of a metric, one for each decoder."""
        return [row for row in self.rows if row.metric == metric]

    def save(self, path: Path) -> None:
        """Writes the result as JSON, completely or not at all; infinite and undefined values as strings."""
        text = json.dumps(json_safe(to_json(self)), indent=2, allow_nan=False)
        write_bytes(path, (text + "\n").encode())


def _key(kind: str, decoder: Decoder) -> str:
    return f"{kind.replace(' ', '-')}-{decoder.key}"


def _weights(kind: str, drawn: Mapping[str, Tensor]) -> Tensor:
    """Returns the resamples of a kind: what comes from the same images is drawn together."""
    return drawn[GENERATED if kind == GENERATED else "source"]


def _as_files(image: Tensor, label: str) -> Tensor:
    """Returns images clamped and rounded to 8 bits, as files hold them. Raises `RacError` for NaN."""
    if not torch.isfinite(image).all():
        raise RacError(f"{label} gives NaN or infinite values; its weights are damaged")
    return torch.cat([from_pixels(to_pixels(one)) for one in image.float()]).to(image.device)


def _read(path: Path) -> dict[str, Tensor]:
    """Returns the tensors of a file; none if it is missing or damaged, so that it is made again."""
    try:
        return read_tensors(path)[0]
    except RacError:
        return {}


def _write(path: Path, tensors: Mapping[str, Tensor]) -> None:
    make_folder(path.parent)
    write_bytes(path, safetensors.torch.save({name: one.contiguous() for name, one in tensors.items()}))


def _file_hash(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16]
