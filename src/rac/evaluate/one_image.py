"""Reconstructions of one image by several coders: the images, their quality and cost.

Used by `rac reconstruct`, `rac demo` and the page of `rac serve`.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from PIL import Image
from torch import Tensor

from ..coders.protocol import Coder, Decoded
from ..flow import Solver, Trajectory
from ..flow.grid import steps_in_words
from ..images import crop
from ..report.document import Table
from ..report.pictures import Panel, strip
from ..runtime import reproducible
from .cost import MacCounter
from .image_metrics import psnr, ssim
from .image_sets import Batch
from .robustness import noised_latents

STEPS = (1, 2, 4)
"""Numbers of steps at which one latent is decoded."""


@dataclass(frozen=True)
class Reconstruction:
    """A reconstruction of one image by one coder, with its quality and cost."""

    name: str
    """Name of the coder and its setting, such as "rac-256, 4 steps"."""
    image: Tensor
    """The reconstruction, 1 3 H W, of the original's size."""
    psnr: float
    """PSNR in dB."""
    ssim: float
    """SSIM; NaN for sides below 11 pixels."""
    seconds: float
    """Time of all that was computed for the reconstruction, counting included."""
    evaluations: int
    """Network evaluations, encoding and decoding together."""
    macs: int
    """Multiply-accumulates of all evaluations together, at this size."""
    from_teacher: bool = False
    """Whether the teacher's latent was decoded, and not the coder's own."""
    encoding: Trajectory | None = None
    """The flow from the image to the seed state; None if it was not kept, or there is none."""
    decoding: Trajectory | None = None
    """The flow from the seed state to the image; None if it was not kept, or there is none."""

    def without_flows(self) -> Reconstruction:
        """Returns the reconstruction without the states of its flows, which take much memory."""
        return replace(self, encoding=None, decoding=None)


@dataclass(frozen=True)
class Seeded:
    """Choice of the noise that a coder decodes an image from: it depends on the seed and the image's name."""

    rng_seed: int = 0
    name: str = "picture"

    def noise(self, coder: Coder, latent: Tensor) -> Tensor | None:
        """Returns the noise for a latent 1 c h w; None for a coder that takes none."""
        return coder.noise_of(latent, (self.name,), self.rng_seed)


def reconstructions(
    coder: Coder,
    image: Tensor,
    steps: Sequence[int],
    solver: Solver | None = None,
    teacher: Coder | None = None,
    name: str = "coder",
    seeded: Seeded = Seeded(),
) -> list[Reconstruction]:
    """Encodes and decodes an image 1 3 H W, once at each number of steps if the coder takes any.

    With a teacher, its own reconstruction comes first, and last the one that `coder` decodes from the teacher's latent.
    The reconstruction of most steps keeps its flows. Where `coder` was trained to decode only and has a teacher, it
    decodes only the teacher's latents.

    - `coder`: the coder.
    - `image`: the image, 1 3 H W in [-1, 1].
    - `steps`: the numbers of steps.
    - `solver`: the rule of each step; None: Euler's.
    - `teacher`: the coder's teacher, if it is at hand.
    - `name`: the name of the coder in the results.
    - `seeded`: the noise that coders decode from, where they take any.

    Raises `RacError` for steps below 1 and for images too small to pad.
    """
    found = [] if teacher is None else [_measured("teacher", image, partial(_coded, teacher, image, seeded=seeded))]
    numbers: Sequence[int | None] = steps if _walked(coder) else (None,)
    own = teacher is None or "encode" in coder.trained_ways
    for number in numbers if own else ():
        keep = number == max(steps, default=None)
        run = partial(_coded, coder, image, number, solver, keep=keep, seeded=seeded)
        found.append(_measured(_named(name, number), image, run))
    for number in numbers if teacher is not None else ():
        keep = not own and number == max(steps, default=None)
        run = partial(_coded, coder, image, number, solver, keep=keep, encoder=teacher, seeded=seeded)
        made = _measured(f"{_named(name, number)}, from the teacher's latent", image, run)
        found.append(replace(made, from_teacher=True))
    return found


# ------------------------------------------------------------------------------------------- for the page


@dataclass(frozen=True)
class Loaded:
    """A coder to show, and its teacher if that could be loaded."""

    name: str
    coder: Coder
    teacher: Coder | None = None
    teacher_name: str = ""


@dataclass(frozen=True)
class Reconstructed:
    """An image with its reconstructions and the coder's flows."""

    versions: tuple[Reconstruction, ...]
    """The teacher's reconstruction, if there is one, then the coder's."""
    encoding: Trajectory | None
    """The coder's flow from the image to the seed state; None for a coder that encodes in one pass."""
    decoding: Trajectory | None
    """The coder's flow from the seed state to the image; None for a coder that decodes in one pass."""


def reconstruct(loaded: Loaded, image: Tensor, steps: int) -> Reconstructed:
    """Encodes and decodes an image 1 3 H W by the teacher and the coder; the numbers are those of `reconstructions`.

    A coder that was trained to decode only decodes the teacher's latent.

    Raises `RacError` for steps below 1 and for an image too small to pad.
    """
    versions = []
    if loaded.teacher is not None:
        run = partial(_coded, loaded.teacher, image)
        versions.append(_measured(f"teacher, {loaded.teacher_name}", image, run))
    number = steps if _walked(loaded.coder) else None
    encoder = None if "encode" in loaded.coder.trained_ways else loaded.teacher
    run = partial(_coded, loaded.coder, image, number, keep=True, encoder=encoder)
    name = _named(loaded.name, number) + ("" if encoder is None else ", from the teacher's latent")
    versions.append(_measured(name, image, run))
    return Reconstructed(tuple(versions), versions[-1].encoding, versions[-1].decoding)


def decode_noised(loaded: Loaded, image: Tensor, sigma: float, rng_seed: int = 0) -> tuple[Reconstruction, ...]:
    """Decodes the latent of an image 1 3 H W plus `sigma` times normal noise, by the teacher and by the coder.

    The latent is the teacher's, or the coder's own where there is none; latents have a deviation of about 1. The noise
    is that of `robustness` for an image called "picture". The numbers are those of `decodings`.

    - `loaded`: the coder and its teacher.
    - `image`: the image, 1 3 H W in [-1, 1].
    - `sigma`: standard deviation of the noise.
    - `rng_seed`: seed of the noise.
    """
    source = loaded.coder if loaded.teacher is None else loaded.teacher
    seeded = Seeded(rng_seed)
    (latent,) = noised_latents(source, Batch((seeded.name,), image), [sigma], rng_seed)
    return tuple(one.without_flows() for one in decodings(loaded, image, latent, seeded))


def decodings(loaded: Loaded, image: Tensor, latent: Tensor, seeded: Seeded = Seeded()) -> tuple[Reconstruction, ...]:
    """Decodes a latent 1 c h w by the teacher, if there is one, and by the coder.

    A coder that decodes in steps does so at each of `STEPS`, and the last of them keeps its flow; `seeded` chooses the
    noise of coders that decode from noise. Seconds, evaluations and MACs are of decoding alone; PSNR and SSIM compare
    with `image`, 1 3 H W in [-1, 1].
    """
    versions = []
    if loaded.teacher is not None:
        run = partial(_decoded, loaded.teacher, latent, seeded)
        versions.append(_measured(f"teacher, {loaded.teacher_name}", image, run))
    for number in STEPS if loaded.coder.walk("decode") is not None else (None,):
        run = partial(_decoded, loaded.coder, latent, seeded, number, keep=number == STEPS[-1])
        versions.append(_measured(_named(loaded.name, number), image, run))
    return tuple(versions)


def round_trip(loaded: Loaded, image: Tensor, steps: int, seeded: Seeded = Seeded()) -> Reconstruction:
    """Encodes and decodes an image 1 3 H W by the coder alone, with as many steps each way, and keeps its flows."""
    name = f"{_named(loaded.name, steps)} each way"
    return _measured(name, image, partial(_coded, loaded.coder, image, steps, keep=True, seeded=seeded))


# ------------------------------------------------------------------------------------------- how it is measured

_Made = tuple[Decoded, Trajectory | None]
"""Result of decoding, with the evaluations of encoding counted in, and the flow of encoding."""


def _coded(
    coder: Coder,
    image: Tensor,
    steps: int | None = None,
    solver: Solver | None = None,
    keep: bool = False,
    encoder: Coder | None = None,
    seeded: Seeded = Seeded(),
) -> _Made:
    """Encodes an image, by `encoder` if one is given, and decodes it."""
    back = coder.walk("encode", steps, solver)
    there = coder.walk("decode", steps, solver)
    coded = coder.coded(image, back, keep="nodes" if keep else "end") if encoder is None else encoder.coded(image)
    decoded = coder.decoded(coded.latent, there, seeded.noise(coder, coded.latent), "nodes" if keep else "end")
    return decoded._replace(evaluations=coded.evaluations + decoded.evaluations), coded.flow


def _decoded(coder: Coder, latent: Tensor, seeded: Seeded, steps: int | None = None, keep: bool = False) -> _Made:
    walk, noise = coder.walk("decode", steps), seeded.noise(coder, latent)
    return coder.decoded(latent, walk, noise, "nodes" if keep else "end"), None


def _measured(name: str, image: Tensor, run: Callable[[], _Made]) -> Reconstruction:
    began = time.perf_counter()
    with MacCounter() as counter, reproducible():
        decoded, encoding = run()
        if decoded.image.is_cuda:
            torch.cuda.synchronize()
    seconds = time.perf_counter() - began
    made = crop(decoded.image.float(), (image.shape[-2], image.shape[-1]))
    return Reconstruction(
        name,
        made,
        float(psnr(made, image)),
        float(ssim(made, image)),
        seconds,
        decoded.evaluations,
        counter.macs,
        encoding=encoding if encoding is not None and encoding.states else None,
        decoding=decoded.flow if decoded.flow is not None and decoded.flow.states else None,
    )


def _walked(coder: Coder) -> bool:
    return coder.walk("decode") is not None or coder.walk("encode") is not None


def _named(name: str, steps: int | None) -> str:
    return name if steps is None else f"{name}, {steps_in_words(steps)}"


# ------------------------------------------------------------------------------------------- strips and tables

COLUMNS = ("coder", "PSNR dB", "SSIM", "evaluations", "GMACs")

Results = Mapping[str, Sequence[Reconstruction]]
"""Reconstructions of each image, by the image's name."""


def comparison(image: Tensor, made: Sequence[Reconstruction], title: str) -> Image.Image:
    """Draws a strip of the original and its reconstructions, PSNR and SSIM below.

    It shows reconstructions from their coders' own latents; all of them if the coder has none of its own.
    """
    own = [one for one in made if not one.from_teacher]
    shown = made if len(own) == 1 else own
    panels = [Panel(one.image, one.name, f"{one.psnr:.2f} dB · SSIM {_three(one.ssim)}") for one in shown]
    return strip([Panel(image, "original"), *panels], title)


def per_image(results: Results) -> Table:
    """Returns a table for programs: every number, unrounded, one row per image and coder."""
    rows = [
        (name, one.name, repr(one.psnr), repr(one.ssim), str(one.evaluations), str(one.macs))
        for name, made in results.items()
        for one in made
    ]
    return Table(("image", "coder", "psnr", "ssim", "evaluations", "macs"), tuple(rows))


def means(results: Results) -> Table:
    """Returns a table for people: the means over images, one row per coder."""
    rows = []
    for same in zip(*results.values(), strict=True):
        psnr, ssim = _mean([one.psnr for one in same]), _mean([one.ssim for one in same])
        gmacs = _mean([one.macs / 1e9 for one in same])
        rows.append((same[0].name, f"{psnr:.2f}", _three(ssim), str(same[0].evaluations), f"{gmacs:.3g}"))
    return Table(COLUMNS, tuple(rows))


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _three(ssim: float) -> str:
    return "-" if math.isnan(ssim) else f"{ssim:.3f}"
