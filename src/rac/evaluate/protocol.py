"""Evaluation under a named protocol: `evaluate` is the one function, during training and afterwards.

A figure means nothing without the images, their crop, the sample of the posterior, the features, the steps. All of it
is one value here, a `Protocol`, and travels with every `Result`.
"""

from __future__ import annotations

import json
import platform
import shlex
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from ..coders.klvae import KLVAE
from ..coders.protocol import Coder
from ..coders.rac import RAC
from ..config import from_json, read_json, spelled, to_json
from ..errors import RacError
from ..files import write_bytes
from ..flow import TimeGrid
from ..flow.solvers import SOLVERS, SolverName
from ..images import crop, from_pixels, to_pixels
from ..latents import normalise
from ..representations import Extractor, ExtractorName, Features, extract, join
from ..runtime import autocast, generator, reproducible
from ..storage import weights_hash
from .judges import IMAGE_FIGURES, LATENT_FIGURES, SET_FIGURES, SHORTEST_SIDE, Judges
from .latents import LatentAgreement, state_round_trip
from .metrics import psnr
from .references import Batch, Framing, References


@dataclass(frozen=True)
class Protocol:
    """All that a figure depends on, the coder's weights apart. Raises `RacError` for what does not go together."""

    name: str
    framing: Framing
    """Size, crop and resize filter of the reference images."""
    count: int | None = None
    """Number of reference images; None: all there are."""
    reference: str | None = None
    """Hash of the one set of reference images it is meant for (`References.hash`); None: any."""
    figures: tuple[str, ...] = ("psnr", "ssim")
    """Out of `IMAGE_FIGURES`, `SET_FIGURES` and `LATENT_FIGURES`."""
    extractor: ExtractorName | None = None
    """Whose features the set figures are made of."""
    latents: Literal["own", "teacher"] = "own"
    """Whether the coder decodes the latents it encoded, or its teacher's."""
    posterior: Literal["mean", "sample"] = "mean"
    """What of a KL-VAE's posterior is decoded."""
    rng_seed: int = 0
    """For posterior samples."""
    steps: int | None = None
    """Of a RAC, for each way; None: its own. Coders without a flow pass over this and the next two."""
    solver: SolverName = "euler"
    shift: float = 1.0
    """Of the time grid, see `TimeGrid.shifted`; 1: uniform."""
    weights: Literal["ema", "raw"] = "ema"
    """Which of a training's weights the coder has, as whoever made it says; saved coders have the average."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of the coder's arithmetic; figures are always computed in float32, distances of sets in float64."""
    rounded: bool = True
    """Round reconstructions to 8 bits first, so that figures are those of the written files."""

    def __post_init__(self) -> None:
        known = (*IMAGE_FIGURES, *SET_FIGURES, *LATENT_FIGURES)
        for figure in self.figures:
            if figure not in known:
                raise RacError(f"figure {figure!r} is not known; expected some of {', '.join(known)}")
            if figure in SET_FIGURES and self.extractor is None:
                raise RacError(
                    f"figure {figure} compares features and protocol {self.name} names no extractor; add one"
                )
            if self.framing.size is not None and self.framing.size < SHORTEST_SIDE.get(figure, 0):
                raise RacError(
                    f"{figure} needs sides of at least {SHORTEST_SIDE[figure]} pixels, not {self.framing.size}"
                )
        if not self.figures:
            raise RacError(f"protocol {self.name} asks for no figures; expected some of {', '.join(known)}")
        if self.count is not None and self.count < 2:
            raise RacError(f"count {self.count} must be at least 2")
        if self.solver not in SOLVERS:
            raise RacError(f"solver {self.solver!r} is not known; expected {', '.join(SOLVERS)}")

    def grid(self, coder: RAC) -> TimeGrid:
        """The time grid that `coder` walks."""
        steps = coder.config.steps if self.steps is None else self.steps
        return TimeGrid.uniform(steps) if self.shift == 1 else TimeGrid.shifted(steps, self.shift)


_PIXELS = ("psnr", "ssim", "lpips-alex")

PROTOCOLS: dict[str, Protocol] = {
    protocol.name: protocol
    for protocol in (
        # Needs nothing but pixels, so it runs anywhere, and during training.
        Protocol("pixels-64", Framing(64, "centre"), figures=("psnr", "ssim")),
        # Sets of some hundred images: the kernel distance is fair at any number, the Frechet distance is not.
        Protocol("dev-64", Framing(64, "centre"), figures=(*_PIXELS, "kernel"), extractor="inception-768"),
        Protocol("dev-128", Framing(128, "centre"), figures=(*_PIXELS, "kernel"), extractor="inception-768"),
        # Every picture as it is, whatever its size; 176 pixels a side at least.
        Protocol("native", Framing(), figures=("psnr", "ssim", "ms-ssim", "lpips-alex")),
        # Enough images for a Frechet distance out of some hundred pictures.
        Protocol(
            "tiles-64",
            Framing(64, "tiles"),
            figures=(*_PIXELS, "frechet", "kernel", "precision-recall"),
            extractor="inception-768",
        ),
        # The same where no weight files are at hand.
        Protocol(
            "tiles-64-lite",
            Framing(64, "tiles"),
            figures=("psnr", "ssim", "frechet", "kernel", "precision-recall"),
            extractor="efficientnet-lite0",
        ),
        # The literature's rFID: the 50,000 validation images, the full Inception.
        Protocol(
            "imagenet-256",
            Framing(256, "adm"),
            count=50_000,
            figures=(*_PIXELS, "frechet", "spatial-frechet", "score"),
            extractor="inception-2048",
        ),
    )
}


@dataclass(frozen=True)
class ReferenceRecord:
    """Which images a result is about."""

    name: str
    count: int
    hash: str


@dataclass(frozen=True)
class Result:
    """What came out, and all one needs to get it again. Written and read as JSON."""

    coder: str
    """As it was named."""
    coder_hash: str
    """Of its weights."""
    protocol: Protocol
    steps: int | None
    """Of each way; None for a coder without a flow."""
    reference: ReferenceRecord
    figures: dict[str, float]
    """The name of a set figure says what features it is made of: only `rFID` is an FID."""
    images_per_second: float
    """Through the coder, there and back, in this run on this machine."""
    per_channel: dict[str, tuple[float, ...]]
    """Of the latents."""
    per_image: dict[str, tuple[float, ...]]
    """Image figures, in the order of `images`."""
    images: tuple[str, ...]
    judges: dict[str, str]
    """Weight files of the metrics, and the SHA-256 of each."""
    versions: dict[str, str]
    command: str

    def save(self, path: str | Path) -> None:
        """Write JSON, whole or not at all; infinite and undefined values as strings. Raises `RacError`."""
        text = json.dumps(spelled(to_json(self)), indent=2, allow_nan=False)
        write_bytes(path, (text + "\n").encode())

    @classmethod
    def load(cls, path: str | Path) -> Result:
        """Read what `save` wrote. Raises `RacError`."""
        data = read_json(Path(path))
        if isinstance(data, dict):
            data |= {key: _unspelled(data.get(key)) for key in ("figures", "per_channel", "per_image")}
        return from_json(cls, data, str(path))


def evaluate(
    coder: Coder,
    references: References,
    protocol: Protocol,
    *,
    name: str,
    teacher: Coder | None = None,
    judges: Judges | None = None,
    batch: int = 16,
    command: str | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Result:
    """Judge `coder`, where it stands and in evaluation mode, by what it makes of `references`.

    `references` are read with the protocol's framing and count, or, during training, made of held-out images. Figures
    do not depend on `batch` or on the order of the images. `judges` spares loading their networks again; features
    of the references are kept with them. `teacher` is needed for its latents. `progress` is told (images done, of all).

    Raises `RacError` if the protocol cannot be kept: other references than it names, too few or too small images, no
    teacher, no posterior to draw from; and where the coder gives NaN.
    """
    device = next(coder.parameters()).device
    judges = judges or Judges.load(protocol.figures, protocol.extractor, device)
    _check(coder, references, protocol, teacher, judges)
    run = _Run(coder, protocol, teacher, device)
    tally = _Tally(protocol, judges)
    for part in references.batches(batch):
        tally.add(run, part._replace(images=part.images.to(device)))
        if progress is not None:
            progress(tally.images, len(references))
    return Result(
        coder=name,
        coder_hash=weights_hash(coder.state_dict()),
        protocol=protocol,
        steps=protocol.grid(coder).steps if isinstance(coder, RAC) else None,
        reference=ReferenceRecord(references.name, len(references), references.hash),
        figures=tally.figures(lambda extractor: references.features(extractor, batch, device)),
        images_per_second=len(references) / run.seconds,
        per_channel={key: tuple(value.tolist()) for key, value in tally.per_channel().items()},
        per_image={key: tuple(value.tolist()) for key, value in tally.per_image().items()},
        images=references.names,
        judges=dict(judges.files),
        versions=versions(),
        command=command_line() if command is None else command,
    )


def versions() -> dict[str, str]:
    """Of what figures may depend on."""
    from .. import __version__

    packages = {package: metadata.version(package) for package in ("torch", "torchmetrics", "numpy", "pillow")}
    return {"rac": __version__, "python": platform.python_version(), **packages}


def command_line() -> str:
    """What was typed to start this program, without the folder it lies in."""
    return shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])


def _check(coder: Coder, references: References, protocol: Protocol, teacher: Coder | None, judges: Judges) -> None:
    if protocol.reference is not None and protocol.reference != references.hash:
        raise RacError(
            f"{references.name} has hash {references.hash[:12]}, protocol {protocol.name} is for the images of hash "
            f"{protocol.reference[:12]}; give those, or a protocol without a reference"
        )
    if protocol.count is not None and protocol.count != len(references):
        raise RacError(
            f"protocol {protocol.name} is about {protocol.count} images, {references.name} gives {len(references)}; "
            "read the references with its count"
        )
    if teacher is None and (protocol.latents == "teacher" or "explained-variance" in protocol.figures):
        raise RacError(f"protocol {protocol.name} needs the teacher's latents; give the teacher")
    encoder = coder if protocol.latents == "own" else teacher
    if protocol.posterior == "sample" and not isinstance(encoder, KLVAE):
        raise RacError(
            f"a {type(encoder).__name__} has no posterior to draw from; use a protocol with posterior 'mean'"
        )
    if "state-round-trip" in protocol.figures and not isinstance(coder, RAC):
        raise RacError(
            f"a {type(coder).__name__} has no states to go back and forth between; leave state-round-trip out"
        )
    if judges.figures != protocol.figures:
        raise RacError(f"the judges are for {judges.figures}, the protocol asks for {protocol.figures}; load its own")
    judges.check(references)


class _Run:
    """One coder under one protocol; counts the seconds its networks take."""

    def __init__(self, coder: Coder, protocol: Protocol, teacher: Coder | None, device: torch.device) -> None:
        self.protocol, self.device = protocol, device
        self.seconds = 0.0
        self._coder: Any = coder
        self._teacher: Any = teacher
        # What a RAC's methods take, and those of coders without a flow do not.
        self._flow = (protocol.grid(coder), SOLVERS[protocol.solver]) if isinstance(coder, RAC) else ()

    def reconstruct(self, part: Batch) -> Tensor:
        """References on the device -> images of the same size, in [-1, 1]."""
        image = part.images
        start = self._now()
        latent = self._posterior(part) if self.protocol.posterior == "sample" else self._source_latent(image)
        with self._arithmetic():
            decoded = self._coder.decode(latent, *self._flow)
        made = crop(decoded.float(), (image.shape[-2], image.shape[-1]))
        self.seconds += self._now() - start
        if not torch.isfinite(made).all():
            raise RacError(f"the coder makes NaN of {part.names[0]} or a neighbour; its weights are damaged")
        if not self.protocol.rounded:
            return made.clamp(-1, 1)
        return torch.cat([from_pixels(to_pixels(one)) for one in made]).to(self.device)

    def encode(self, image: Tensor) -> Tensor:
        """The coder's own latent."""
        with self._arithmetic():
            return self._coder.encode(image, *self._flow).float()

    def teacher_latent(self, image: Tensor) -> Tensor:
        """The teacher's."""
        with self._arithmetic():
            return self._teacher.encode(image).float()

    def state_round_trip(self, image: Tensor) -> Tensor:
        """See `latents.state_round_trip`."""
        with self._arithmetic():
            return state_round_trip(self._coder, image, *self._flow).float()

    def _source_latent(self, image: Tensor) -> Tensor:
        return self.encode(image) if self.protocol.latents == "own" else self.teacher_latent(image)

    def _posterior(self, part: Batch) -> Tensor:
        """A draw for each image that depends on its name alone, so neither on order nor on batches."""
        encoder = self._coder if self.protocol.latents == "own" else self._teacher
        with self._arithmetic():
            posterior = encoder.posterior(part.images)
        shape = posterior.mean.shape[1:]
        streams = [generator(self.protocol.rng_seed, "posterior", name) for name in part.names]
        noise = torch.stack([torch.randn(shape, generator=stream) for stream in streams]).to(self.device)
        return normalise((posterior.mean + posterior.std * noise).float(), encoder.spec)

    @contextmanager
    def _arithmetic(self) -> Iterator[None]:
        with reproducible(), autocast(self.device, self.protocol.dtype == "bfloat16"):
            yield

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()


class _Tally:
    """What is collected batch by batch, and the figures of all of it."""

    def __init__(self, protocol: Protocol, judges: Judges) -> None:
        self.protocol, self.judges = protocol, judges
        self.images = 0
        self._per_image: dict[str, list[Tensor]] = {}
        self._features: list[Features] = []
        self._agreement = LatentAgreement()

    def add(self, run: _Run, part: Batch) -> None:
        """Take one batch of references, on the coder's device, there and back."""
        made = run.reconstruct(part)
        values = self.judges.of_images(made, part.images)
        if "state-round-trip" in self.protocol.figures:
            values["psnr, state round trip"] = psnr(run.state_round_trip(part.images), part.images).cpu()
        for figure, value in values.items():
            self._per_image.setdefault(figure, []).append(value)
        if self.judges.extractor is not None:
            self._features.append(extract(self.judges.extractor, [made]))
        if "explained-variance" in self.protocol.figures:
            self._agreement.update(run.encode(part.images), run.teacher_latent(part.images))
        self.images += len(part.images)

    def per_image(self) -> dict[str, Tensor]:
        return {figure: torch.cat(values).double() for figure, values in self._per_image.items()}

    def per_channel(self) -> dict[str, Tensor]:
        if "explained-variance" not in self.protocol.figures:
            return {}
        return {"explained variance": self._agreement.explained_variance(), "offset": self._agreement.offset()}

    def figures(self, references: Callable[[Extractor], Features]) -> dict[str, float]:
        found = {figure: float(values.mean()) for figure, values in self.per_image().items()}
        if self.judges.extractor is not None:
            found |= self.judges.of_sets(join(self._features), references(self.judges.extractor))
        if "explained-variance" in self.protocol.figures:
            found["explained variance"] = float(self.per_channel()["explained variance"].mean())
        return found


def _unspelled(data: Any) -> Any:
    if isinstance(data, dict):
        return {key: _unspelled(value) for key, value in data.items()}
    if isinstance(data, list):
        return [_unspelled(value) for value in data]
    return float(data) if data in ("inf", "-inf", "nan") else data
