"""Reconstructing reference images under a protocol: `evaluate` is the one function, during training and afterwards."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from ..coders.klvae import KLVAE
from ..coders.protocol import Coder
from ..coders.rac import RAC
from ..errors import RacError
from ..flow.solvers import SOLVERS
from ..images import crop, from_pixels, to_pixels
from ..representations import Extractor, Features, extract, join
from ..runtime import autocast, generator, reproducible
from ..storage import weights_hash
from .image_metrics import psnr
from .image_sets import Batch, ImageSet
from .latent_metrics import LatentAgreement, state_round_trip
from .protocol import Protocol
from .result import ReferenceRecord, Result, command_line, versions
from .suite import MetricSuite


def evaluate(
    coder: Coder,
    references: ImageSet,
    protocol: Protocol,
    *,
    name: str,
    teacher: Coder | None = None,
    suite: MetricSuite | None = None,
    batch: int = 16,
    command: str | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Result:
    """Judge `coder`, where it stands and in evaluation mode, by what it makes of `references`.

    `references` are read with the protocol's framing and count, or, during training, made of held-out images. Metrics
    do not depend on `batch` or on the order of the images. `suite` spares loading their networks again; features
    of the references are kept with them. `teacher` is needed for its latents. `progress` is told (images done, of all).

    Raises `RacError` if the protocol cannot be kept: other references than it names, too few or too small images, no
    teacher, no posterior to draw from; and where the coder gives NaN.
    """
    device = next(coder.parameters()).device
    suite = suite or MetricSuite.load(protocol.metrics, protocol.extractor, device)
    _check(coder, references, protocol, teacher, suite)
    run = _Run(coder, protocol, teacher, device)
    tally = _Tally(protocol, suite)
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
        metrics=tally.metrics(lambda extractor: references.features(extractor, batch, device)),
        images_per_second=len(references) / run.seconds,
        per_channel={key: tuple(value.tolist()) for key, value in tally.per_channel().items()},
        per_image={key: tuple(value.tolist()) for key, value in tally.per_image().items()},
        images=references.names,
        metric_files=dict(suite.files),
        versions=versions(),
        command=command_line() if command is None else command,
    )


def _check(coder: Coder, references: ImageSet, protocol: Protocol, teacher: Coder | None, suite: MetricSuite) -> None:
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
    if teacher is None and (protocol.latents == "teacher" or "explained-variance" in protocol.metrics):
        raise RacError(f"protocol {protocol.name} needs the teacher's latents; give the teacher")
    encoder = coder if protocol.latents == "own" else teacher
    if protocol.posterior == "sample" and not isinstance(encoder, KLVAE):
        raise RacError(
            f"a {type(encoder).__name__} has no posterior to draw from; use a protocol with posterior 'mean'"
        )
    if "state-round-trip" in protocol.metrics and not isinstance(coder, RAC):
        raise RacError(
            f"a {type(coder).__name__} has no states to go back and forth between; leave state-round-trip out"
        )
    if suite.metrics != protocol.metrics:
        raise RacError(f"the suite is for {suite.metrics}, the protocol asks for {protocol.metrics}; load its own")
    suite.check(references)


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
        """See `latent_metrics.state_round_trip`."""
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
        return encoder.statistics.normalise((posterior.mean + posterior.std * noise).float())

    @contextmanager
    def _arithmetic(self) -> Iterator[None]:
        with reproducible(), autocast(self.device, self.protocol.dtype == "bfloat16"):
            yield

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()


class _Tally:
    """What is collected batch by batch, and the metrics of all of it."""

    def __init__(self, protocol: Protocol, suite: MetricSuite) -> None:
        self.protocol, self.suite = protocol, suite
        self.images = 0
        self._per_image: dict[str, list[Tensor]] = {}
        self._features: list[Features] = []
        self._agreement = LatentAgreement()

    def add(self, run: _Run, part: Batch) -> None:
        """Take one batch of references, on the coder's device, there and back."""
        made = run.reconstruct(part)
        values = self.suite.of_images(made, part.images)
        if "state-round-trip" in self.protocol.metrics:
            values["psnr, state round trip"] = psnr(run.state_round_trip(part.images), part.images).cpu()
        for metric, value in values.items():
            self._per_image.setdefault(metric, []).append(value)
        if self.suite.extractor is not None:
            self._features.append(extract(self.suite.extractor, [made]))
        if "explained-variance" in self.protocol.metrics:
            self._agreement.update(run.encode(part.images), run.teacher_latent(part.images))
        self.images += len(part.images)

    def per_image(self) -> dict[str, Tensor]:
        return {metric: torch.cat(values).double() for metric, values in self._per_image.items()}

    def per_channel(self) -> dict[str, Tensor]:
        if "explained-variance" not in self.protocol.metrics:
            return {}
        return {"explained variance": self._agreement.explained_variance(), "offset": self._agreement.offset()}

    def metrics(self, references: Callable[[Extractor], Features]) -> dict[str, float]:
        found = {metric: float(values.mean()) for metric, values in self.per_image().items()}
        if self.suite.extractor is not None:
            found |= self.suite.of_sets(join(self._features), references(self.suite.extractor))
        if "explained-variance" in self.protocol.metrics:
            found["explained variance"] = float(self.per_channel()["explained variance"].mean())
        return found
