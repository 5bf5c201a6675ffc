"""Evaluation of reconstructions under a protocol: `evaluate` gives a result to keep, `measure` the numbers alone."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from ..coders.protocol import Coded, Coder, Decoded, Way
from ..errors import RacError
from ..flow import Walk
from ..flow.solvers import SOLVERS
from ..images import crop, from_pixels, to_pixels
from ..representations import Features, extract, join
from ..runtime import autocast, generator, reproducible
from ..storage import weights_hash
from .feature_cache import FeatureCache
from .image_metrics import psnr
from .image_sets import Batch, FeatureMoments, ImageSet, digest
from .latent_metrics import LatentAgreement
from .probe import LinearProbe, check_classes, check_labels
from .protocol import Protocol
from .result import Result, command_line, versions
from .suite import MetricSuite


@dataclass(frozen=True, kw_only=True)
class Reconstructor:
    """A coder that encodes and decodes as a protocol says."""

    coder: Coder
    protocol: Protocol
    teacher: Coder | None = None
    """The coder whose latents are decoded if the protocol says so."""

    def walk(self, way: Way) -> Walk | None:
        """Returns the time grid and solver of `way`, or None where the coder needs one pass."""
        if self.coder.walk(way) is None:
            return None
        return self.coder.walk(way, self.protocol.steps, SOLVERS[self.protocol.solver], self.protocol.shift)

    @property
    def steps(self) -> int | None:
        """Number of steps of each way that is walked; None for a coder without a flow."""
        walk = self.walk("decode") or self.walk("encode")
        return None if walk is None else walk.steps

    @property
    def encoder(self) -> Coder:
        """The coder whose latents are decoded: this one, or its teacher."""
        return self.coder if self.protocol.latents == "own" or self.teacher is None else self.teacher

    def of_teacher(self) -> Reconstructor:
        """Returns the teacher, which decodes its own latents in its own number of steps. Raises `RacError` for none."""
        if self.teacher is None:
            raise RacError("this coder has no teacher at hand; give one")
        return Reconstructor(coder=self.teacher, protocol=replace(self.protocol, steps=None, latents="own"))

    @property
    def device(self) -> torch.device:
        """The device of the coder's weights."""
        return next(self.coder.parameters()).device

    @torch.no_grad()
    def encode(self, image: Tensor) -> Tensor:
        """Encodes an image B 3 H W in [-1, 1] to the latent B c h w that is decoded, the posterior's mean."""
        return self.encoder.coded(image, self.walk("encode") if self.encoder is self.coder else None).latent

    @torch.no_grad()
    def decode(self, latent: Tensor, names: Sequence[str]) -> Tensor:
        """Decodes latents B c h w of the images called `names` to images, neither cropped nor clamped."""
        return self._decoded(latent, names).image

    def reconstruct(self, image: Tensor, names: Sequence[str]) -> Tensor:
        """Encodes and decodes images B 3 H W called `names`; the results have their size, and values in [-1, 1]."""
        return crop(self.decode(self.encode(image), names).float(), (image.shape[-2], image.shape[-1])).clamp(-1, 1)

    def _decoded(self, latent: Tensor, names: Sequence[str]) -> Decoded:
        """Decodes latents; a coder that decodes from noise gets noise of each image's own, the same for all coders."""
        noise = self.coder.noise_of(latent, names, self.protocol.rng_seed)
        return self.coder.decoded(latent, self.walk("decode"), noise)

    def one_pass(self, batch: Batch) -> Pass:
        """Encodes each image once and decodes it once; latent metrics use the same flows.

        `batch` lies on the coder's device. Raises `RacError` if the coder gives NaN.
        """
        image, metrics = batch.images, self.protocol.metrics
        size = (image.shape[-2], image.shape[-1])
        start = self._now()
        latent, coded, teacher_latent = self._source(batch)
        with self._arithmetic():
            decoded = self._decoded(latent, batch.names).image
        reconstruction = crop(decoded.float(), size)
        seconds = self._now() - start
        if not torch.isfinite(reconstruction).all():
            raise RacError(
                f"the coder gives NaN for {batch.names[0]} or another image of its batch; its weights are damaged"
            )
        state_round_trip = None
        with self._arithmetic():
            if coded is None and not {"explained-variance", "state-round-trip"}.isdisjoint(metrics):
                coded = self.coder.coded(image, self.walk("encode"))
            if teacher_latent is None and "explained-variance" in metrics and self.teacher is not None:
                teacher_latent = self.teacher.encode(image).float()
            walk = self.walk("encode")
            if "state-round-trip" in metrics and coded is not None and coded.flow is not None and walk is not None:
                state_round_trip = crop(self.coder.state_round_trip(coded.flow, walk).float(), size)
        own_latent = None if coded is None else coded.latent.float()
        return Pass(self._as_file(reconstruction), latent, own_latent, teacher_latent, state_round_trip, seconds)

    def _source(self, batch: Batch) -> tuple[Tensor, Coded | None, Tensor | None]:
        """Returns the latent to decode, and the results of the coder or the teacher on the way to it."""
        own, image = self.encoder is self.coder, batch.images
        if self.protocol.posterior == "sample":
            with self._arithmetic():
                moments = self.encoder.moments(image).float()
            mean = self.encoder.finish(moments)
            latent = self.encoder.finish(moments, self._noise(batch.names, mean))
            return latent, Coded(mean, 1) if own else None, None if own else mean
        with self._arithmetic():
            coded = self.encoder.coded(image, self.walk("encode") if own else None)
        latent = coded.latent.float()
        return latent, coded if own else None, None if own else latent

    def _noise(self, names: Sequence[str], like: Tensor) -> Tensor:
        """Returns noise for each image that depends on its name alone, so neither on order nor on batches."""
        streams = [generator(self.protocol.rng_seed, "posterior", name) for name in names]
        return torch.stack([torch.randn(like.shape[1:], generator=stream) for stream in streams]).to(like)

    def _as_file(self, image: Tensor) -> Tensor:
        if not self.protocol.rounded:
            return image.clamp(-1, 1)
        return torch.cat([from_pixels(to_pixels(one)) for one in image]).to(image.device)

    @contextmanager
    def _arithmetic(self) -> Iterator[None]:
        with reproducible(), autocast(self.device, self.protocol.dtype == "bfloat16"):
            yield

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()


class Pass(NamedTuple):
    """Reconstructions of one batch of images, and the latents that metrics need."""

    images: Tensor
    """The reconstructions, B 3 H W in [-1, 1], rounded to 8 bits if the protocol says so."""
    latent: Tensor
    """The latent that was decoded, B c h w."""
    own_latent: Tensor | None
    """The coder's own latent, B c h w; None if no metric needs it."""
    teacher_latent: Tensor | None
    """The teacher's latent, B c h w; None if no metric needs it."""
    state_round_trip: Tensor | None
    """The image encoded and decoded without contraction to a latent, B 3 H W; None if no metric needs it."""
    seconds: float
    """Time of the encoding and the decoding."""


@dataclass(frozen=True)
class Measurement:
    """The numbers of an evaluation, without their provenance."""

    metrics: dict[str, float]
    """Means over the images, and metrics of the whole set."""
    per_channel: dict[str, tuple[float, ...]]
    """Metrics of the latents, by channel."""
    per_image: dict[str, tuple[float, ...]]
    """Metrics of each image, in the order of the set."""
    seconds: float
    """Time of encoding and decoding all images."""


def evaluate(
    coder: Coder,
    images: ImageSet,
    protocol: Protocol,
    *,
    name: str = "coder",
    teacher: Coder | None = None,
    reference: ImageSet | FeatureMoments | None = None,
    suite: MetricSuite | None = None,
    batch: int = 16,
    command: str | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Result:
    """Evaluates `coder`, on the device where it is and in evaluation mode, by its reconstructions of `images`.

    - `coder`: the coder.
    - `images`: the images, read with the protocol's preprocessing and count.
    - `protocol`: the metrics, and all that they depend on.
    - `name`: the name of the coder in the result.
    - `teacher`: needed if the protocol decodes its latents.
    - `reference`: the set that metrics of sets compare the reconstructions with; None: `images` themselves.
    - `suite`: the loaded networks of the metrics; None: loads those that the protocol needs.
    - `batch`: images at a time. Neither it nor the order of the images changes a number.
    - `command`: the command that the result records; None: this process's command line.
    - `progress`: called with (images done, images in all).

    Raises `RacError` if the protocol cannot be kept: other images than it names, too few or too small ones, no teacher,
    no posterior to draw from, a reference that lacks what a metric needs; and if the coder gives NaN.
    """
    coder_hash = weights_hash(coder.state_dict())
    suite = suite or MetricSuite.load(protocol.metrics, protocol.extractor, next(coder.parameters()).device)
    found = measure(
        coder,
        images,
        protocol,
        teacher=teacher,
        reference=reference,
        suite=suite,
        batch=batch,
        progress=progress,
        coder_hash=coder_hash,
    )
    return Result(
        coder=name,
        coder_hash=coder_hash,
        protocol=protocol,
        steps=Reconstructor(coder=coder, protocol=protocol).steps,
        reference=images.record,
        metrics=found.metrics,
        images_per_second=len(images) / found.seconds,
        per_channel=found.per_channel,
        per_image=found.per_image,
        images=images.names,
        weight_files=dict(suite.files),
        versions=versions(),
        command=command_line() if command is None else command,
        compared_with=None if reference is None else reference.record,
    )


def measure(
    coder: Coder,
    images: ImageSet,
    protocol: Protocol,
    *,
    teacher: Coder | None = None,
    reference: ImageSet | FeatureMoments | None = None,
    suite: MetricSuite | None = None,
    batch: int = 16,
    progress: Callable[[int, int], None] | None = None,
    coder_hash: str | None = None,
) -> Measurement:
    """Measures the metrics of `evaluate` without hashing the coder's weights: for galleries during training.

    - `coder_hash`: lets features of the reconstructions be kept on disk; None: they are not.
    - `coder`, `images`, `protocol`, `teacher`, `reference`, `suite`, `batch`, `progress`: as for `evaluate`.

    Raises `RacError` as `evaluate`.
    """
    reconstructor = Reconstructor(coder=coder, protocol=protocol, teacher=teacher)
    device = reconstructor.device
    suite = suite or MetricSuite.load(protocol.metrics, protocol.extractor, device)
    _check(reconstructor, images, suite, reference)
    tally, seconds, done = _Tally(protocol, suite, _cache(suite, images, protocol, coder_hash)), 0.0, 0
    for part in images.batches(batch):
        part = part._replace(images=part.images.to(device))
        passed = reconstructor.one_pass(part)
        tally.add(part, passed)
        seconds, done = seconds + passed.seconds, done + len(part.names)
        if progress is not None:
            progress(done, len(images))
    metrics = tally.means()
    if suite.extractor is not None:
        compared = images if reference is None else reference
        if isinstance(compared, ImageSet):
            compared_features: Features | FeatureMoments = compared.features(suite.extractor, batch, device)
        else:
            compared_features = compared
        metrics |= suite.of_sets(tally.features(), compared_features)
    metrics |= tally.latent_means()
    return Measurement(metrics, tally.per_channel(), tally.per_image(), seconds)


def _check(
    reconstructor: Reconstructor, images: ImageSet, suite: MetricSuite, reference: ImageSet | FeatureMoments | None
) -> None:
    protocol, coder, teacher = reconstructor.protocol, reconstructor.coder, reconstructor.teacher
    if protocol.reference is not None and protocol.reference != images.hash:
        raise RacError(
            f"{images.name} has hash {images.hash[:12]}, protocol {protocol.name} is only for the images of hash "
            f"{protocol.reference[:12]}; give those, or a protocol without a reference"
        )
    if protocol.count is not None and protocol.count != len(images):
        raise RacError(
            f"protocol {protocol.name} is for {protocol.count} images, but {images.name} has {len(images)}; read the "
            "images with its count"
        )
    if teacher is None and (protocol.latents == "teacher" or "explained-variance" in protocol.metrics):
        raise RacError(f"protocol {protocol.name} needs the teacher's latents; give the teacher")
    if protocol.posterior == "sample" and not reconstructor.encoder.has_posterior:
        raise RacError(
            f"a {type(reconstructor.encoder).__name__} has no posterior to sample from; use a protocol with posterior "
            "'mean'"
        )
    both_walked = coder.walk("encode") is not None and coder.walk("decode") is not None
    if "state-round-trip" in protocol.metrics and not both_walked:
        raise RacError(
            f"a {type(coder).__name__} has no flow whose states could make a round trip; leave state-round-trip out"
        )
    if "probe" in protocol.metrics:
        check_labels(images.labels)
        check_classes(images.labels or ())
    if suite.metrics != protocol.metrics:
        raise RacError(
            f"the suite has the metrics {suite.metrics}, but the protocol asks for {protocol.metrics}; load the suite "
            "of the protocol"
        )
    suite.check(images, reference)


def _cache(suite: MetricSuite, images: ImageSet, protocol: Protocol, coder_hash: str | None) -> FeatureCache | None:
    """Returns a cache for the features of these reconstructions, on disk if `coder_hash` says whose they are."""
    if suite.extractor is None:
        return None
    # Features are found again by each image's own hash, so the key only has to lead to the right file.
    key = None if coder_hash is None or not protocol.rounded else f"{images.hash} {coder_hash} {protocol!r}"
    return FeatureCache(suite.extractor, key)


class _Tally:
    """Collects values batch by batch, and computes the metrics of all of them."""

    def __init__(self, protocol: Protocol, suite: MetricSuite, cache: FeatureCache | None) -> None:
        self._protocol, self._suite, self._cache = protocol, suite, cache
        self._per_image: dict[str, list[Tensor]] = {}
        self._features: list[Features] = []
        self._agreement = LatentAgreement()
        self._probe = LinearProbe()

    def add(self, part: Batch, passed: Pass) -> None:
        image = part.images
        values = self._suite.of_images(passed.images, image)
        if passed.state_round_trip is not None:
            values["psnr, state round trip"] = psnr(passed.state_round_trip, image).cpu()
        for metric, value in values.items():
            self._per_image.setdefault(metric, []).append(value)
        if self._cache is not None:
            if self._protocol.rounded:
                digests = [digest(to_pixels(one)) for one in passed.images]
                self._features.append(self._cache.features(digests, passed.images))
            else:
                self._features.append(extract(self._cache.extractor, [passed.images]))
        if "explained-variance" in self._protocol.metrics:
            assert passed.own_latent is not None
            assert passed.teacher_latent is not None
            self._agreement.update(passed.own_latent, passed.teacher_latent)
        if "probe" in self._protocol.metrics:
            self._probe.update(passed.latent, image, part.labels)

    def features(self) -> Features:
        assert self._cache is not None
        self._cache.save()
        return join(self._features)

    def means(self) -> dict[str, float]:
        return {metric: float(torch.cat(values).double().mean()) for metric, values in self._per_image.items()}

    def latent_means(self) -> dict[str, float]:
        metrics, found = self._protocol.metrics, {}
        if "explained-variance" in metrics:
            found["explained variance"] = float(self._agreement.explained_variance().mean())
        return {**found, **self._probe.accuracies()} if "probe" in metrics else found

    def per_image(self) -> dict[str, tuple[float, ...]]:
        return {metric: tuple(torch.cat(values).double().tolist()) for metric, values in self._per_image.items()}

    def per_channel(self) -> dict[str, tuple[float, ...]]:
        if "explained-variance" not in self._protocol.metrics:
            return {}
        found = {"explained variance": self._agreement.explained_variance(), "offset": self._agreement.offset()}
        return {metric: tuple(values.tolist()) for metric, values in found.items()}
