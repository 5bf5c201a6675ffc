"""What the page shows of a picture: reconstructions with their figures, and latents that were moved."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from ..coders.protocol import Coder
from ..coders.rac import RAC
from ..evaluate.cost import MacCounter
from ..evaluate.image_metrics import psnr, ssim
from ..evaluate.image_sets import Batch
from ..evaluate.robustness import noised_latents
from ..flow import Trajectory
from ..images import crop
from ..runtime import reproducible
from ..states import image_of

NOISED_STEPS = (1, 2, 4, 8)
"""Numbers of steps that decode a moved latent."""


@dataclass(frozen=True)
class Loaded:
    """A coder to show, and its teacher if there is one to be had."""

    name: str
    coder: Coder
    teacher: Coder | None = None
    teacher_name: str = ""


@dataclass(frozen=True)
class Version:
    """What one coder made of the picture."""

    name: str
    image: Tensor
    """1 3 H W, of the original's size."""
    psnr: float
    """dB."""
    ssim: float
    """NaN for sides below 11 pixels."""
    seconds: float
    """Of everything that was computed for it, counting included."""
    evaluations: int
    macs: int


@dataclass(frozen=True)
class Reconstructed:
    """A picture there and back."""

    versions: tuple[Version, ...]
    """The teacher's, if there is one, then the coder's."""
    encoding: Trajectory | None
    """The coder's way back to the seed state, and..."""
    decoding: Trajectory | None
    """...from there to the image; None for coders without a flow."""


def reconstruct(loaded: Loaded, image: Tensor, steps: int) -> Reconstructed:
    """Image 1 3 H W through the teacher and the coder; the figures are those of `rac reconstruct`.

    Raises `RacError` for steps below 1 and for an image too small to pad.
    """
    versions = []
    if loaded.teacher is not None:
        versions.append(_measured(f"teacher, {loaded.teacher_name}", image, partial(_at_once, loaded.teacher, image)))
    if not isinstance(loaded.coder, RAC):
        versions.append(_measured(loaded.name, image, partial(_at_once, loaded.coder, image)))
        return Reconstructed(tuple(versions), None, None)
    flows: list[Trajectory] = []
    versions.append(_measured(f"RAC, {_steps(steps)}", image, partial(_both_ways, loaded.coder, image, steps, flows)))
    return Reconstructed(tuple(versions), *flows)


def decode_noised(loaded: Loaded, image: Tensor, sigma: float, rng_seed: int = 0) -> tuple[Version, ...]:
    """Image 1 3 H W -> its latent, moved by `sigma` times normal noise, decoded by teacher and RAC at 1 to 8 steps.

    The latent is the teacher's, or the coder's own where there is none; latents have a deviation of about 1. The noise
    is that of `evaluate.robustness` for an image called "picture". Seconds, evaluations and MACs are of decoding alone.
    """
    source = loaded.coder if loaded.teacher is None else loaded.teacher
    (latent,) = noised_latents(source, Batch(("picture",), image), [sigma], rng_seed)
    made = []
    if loaded.teacher is not None:
        run = partial(_decode, loaded.teacher, latent)
        made.append(_measured(f"teacher, {loaded.teacher_name}", image, run))
    if not isinstance(loaded.coder, RAC):
        return (*made, _measured(loaded.name, image, partial(_decode, loaded.coder, latent)))
    for number in NOISED_STEPS:
        made.append(_measured(f"RAC, {_steps(number)}", image, partial(_flow, loaded.coder, latent, number)))
    return tuple(made)


def _at_once(coder: Coder, image: Tensor) -> tuple[Tensor, int]:
    return coder.decode(coder.encode(image)), 2


def _both_ways(coder: RAC, image: Tensor, steps: int, flows: list[Trajectory]) -> tuple[Tensor, int]:
    back = coder.encode_trajectory(image, steps)
    there = coder.trajectory(coder.contract(back.end), steps)
    flows += [back, there]
    return image_of(there.end), back.evaluations + there.evaluations


def _decode(coder: Coder, latent: Tensor) -> tuple[Tensor, int]:
    return coder.decode(latent), 1


def _flow(coder: RAC, latent: Tensor, steps: int) -> tuple[Tensor, int]:
    there = coder.trajectory(latent, steps)
    return image_of(there.end), there.evaluations


def _measured(name: str, image: Tensor, run: Callable[[], tuple[Tensor, int]]) -> Version:
    began = time.perf_counter()
    with MacCounter() as counter, reproducible():
        padded, evaluations = run()
        if padded.is_cuda:
            torch.cuda.synchronize()
    seconds = time.perf_counter() - began
    made = crop(padded.float(), (image.shape[-2], image.shape[-1]))
    return Version(name, made, float(psnr(made, image)), float(ssim(made, image)), seconds, evaluations, counter.macs)


def _steps(number: int) -> str:
    return "1 step" if number == 1 else f"{number} steps"
