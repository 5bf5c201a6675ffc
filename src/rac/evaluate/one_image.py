"""One image through coders, there and back: what comes out, how good it is, what it cost."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from PIL import Image
from torch import Tensor

from ..coders.protocol import Coder
from ..coders.rac import RAC
from ..flow import Solver
from ..images import crop
from ..report.document import Table
from ..report.pictures import Panel, strip
from ..states import image_of
from .cost import MacCounter
from .image_metrics import psnr, ssim


@dataclass(frozen=True)
class Reconstruction:
    """One coder's version of one image."""

    name: str
    """What made it, such as "RAC, 4 steps"."""
    image: Tensor
    """1 3 H W, of the original's size."""
    psnr: float
    """dB."""
    ssim: float
    """NaN for sides below 11 pixels."""
    evaluations: int
    """How often a network was asked, encoding and decoding together."""
    macs: int
    """Multiply-accumulates of all of these together, at this size."""
    from_teacher: bool = False
    """Whether it was decoded from the teacher's latent, and not from the coder's own."""


COLUMNS = ("coder", "PSNR dB", "SSIM", "evaluations", "GMACs")

Results = dict[str, list[Reconstruction]]
"""For each image's name, what each coder made of it."""


def rac_reconstructions(
    coder: RAC, image: Tensor, steps: Sequence[int], solver: Solver | None = None, teacher: Coder | None = None
) -> list[Reconstruction]:
    """An image 1 3 H W through `coder` at each number of steps; the way back takes as many as the way there.

    With a teacher, its own reconstruction comes first, and then, for each number of steps, what `coder` decodes from
    the teacher's latent. Raises `RacError` for steps below 1 and for images too small to pad.
    """
    found = [] if teacher is None else [coder_reconstruction(teacher, image, "teacher")]
    for number in steps:
        found.append(_measured(f"RAC, {_steps(number)}", image, partial(_both_ways, coder, image, number, solver)))
    if teacher is None:
        return found
    for number in steps:
        run = partial(_from_teacher, coder, teacher, image, number, solver)
        made = _measured(f"RAC, {_steps(number)}, from the teacher's latent", image, run)
        found.append(replace(made, from_teacher=True))
    return found


def coder_reconstruction(coder: Coder, image: Tensor, name: str) -> Reconstruction:
    """An image 1 3 H W through a coder without steps. One evaluation is its encoder, one its decoder."""
    return _measured(name, image, lambda: (coder.decode(coder.encode(image)), 2))


def _both_ways(coder: RAC, image: Tensor, steps: int, solver: Solver | None) -> tuple[Tensor, int]:
    back = coder.encode_trajectory(image, steps, solver)
    there = coder.trajectory(coder.contract(back.end), steps, solver)
    return image_of(there.end), back.evaluations + there.evaluations


def _from_teacher(coder: RAC, teacher: Coder, image: Tensor, steps: int, solver: Solver | None) -> tuple[Tensor, int]:
    there = coder.trajectory(teacher.encode(image), steps, solver)
    return image_of(there.end), 1 + there.evaluations


def _measured(name: str, image: Tensor, run: Callable[[], tuple[Tensor, int]]) -> Reconstruction:
    with MacCounter() as counter, torch.no_grad():
        padded, evaluations = run()
    made = crop(padded, (image.shape[-2], image.shape[-1]))
    return Reconstruction(name, made, float(psnr(made, image)), float(ssim(made, image)), evaluations, counter.macs)


def _steps(number: int) -> str:
    return f"{number} step" if number == 1 else f"{number} steps"


def comparison(image: Tensor, made: Sequence[Reconstruction], title: str) -> Image.Image:
    """A strip of the original and what was made of it, PSNR and SSIM below; from its own latents only."""
    panels = [Panel(image, "original")]
    for one in made:
        if not one.from_teacher:
            panels.append(Panel(one.image, one.name, f"{one.psnr:.2f} dB · SSIM {_three(one.ssim)}"))
    return strip(panels, title)


def per_image(results: Results) -> Table:
    """Every metric, unrounded, one row per image and coder: for programs."""
    rows = [
        (name, one.name, repr(one.psnr), repr(one.ssim), str(one.evaluations), str(one.macs))
        for name, made in results.items()
        for one in made
    ]
    return Table(("image", "coder", "psnr", "ssim", "evaluations", "macs"), tuple(rows))


def means(results: Results) -> Table:
    """The mean over images, one row per coder: for people."""
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
