"""The report of `rac demo`, section by section."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from ..coders.protocol import Coder
from ..coders.rac import RAC
from ..report.document import Figure, Section, Table
from ..report.pictures import curves, trajectory_strip
from .one_image import Results, comparison, means
from .reversal import Reversal, euler_errors, reversals, slope

STEPS = (1, 2, 4, 8)
"""Numbers of steps at which the photographs are reconstructed."""
ERROR_STEPS = (2, 4, 8, 16)
"""Numbers of steps at which the error of reversed Euler is measured."""

INTRODUCTION = (
    "RAC replaces the decoder of an image autoencoder by a velocity field. Followed forwards, it carries a seed state, "
    "laid out from the latent, to the image; followed backwards, it is the encoder. Every picture and figure below was "
    "computed on this machine, just now."
)


def sections(coder: RAC, teacher: Coder | None, photographs: dict[str, Tensor], results: Results) -> list[Section]:
    """Returns the report's sections.

    - `coder`, `teacher`: the coder, and its teacher if it could be loaded.
    - `photographs`: images 1 3 H W by name. The flow of the first one is shown, from the teacher's latent if there is a
      teacher.
    - `results`: the results of `reconstructions` for each of them.
    """
    image = next(iter(photographs.values()))
    with torch.no_grad():
        latent = coder.encode(image) if teacher is None else teacher.encode(image)
    return [
        _there_and_back(photographs, results),
        Section("Quality and cost", _QUALITY, [means(results)]),
        _on_the_way(coder, image, latent),
        _back_to_the_latent(coder, latent),
    ]


def _there_and_back(photographs: dict[str, Tensor], results: Results) -> Section:
    figures = [
        Figure(comparison(image, results[name], name), f"strip-{Path(name).stem}")
        for name, image in photographs.items()
    ]
    return Section("There and back", _THERE_AND_BACK, figures)


def _on_the_way(coder: RAC, image: Tensor, latent: Tensor) -> Section:
    """Returns a section on the states while decoding and while encoding."""
    with torch.no_grad():
        decoding = coder.trajectory(latent, max(STEPS))
        encoding = coder.encode_trajectory(image, max(STEPS))
    figures = [
        Figure(trajectory_strip(decoding, title="decoding: from the seed state to the image"), "decoding"),
        Figure(trajectory_strip(encoding, title="encoding: from the image to the seed state"), "encoding"),
    ]
    return Section("On the way", _ON_THE_WAY, figures)


def _back_to_the_latent(coder: RAC, latent: Tensor) -> Section:
    """Returns a section on how far each way back ends from the latent that was decoded."""
    found = reversals(coder, latent, coder.config.steps)
    table = Table(
        ("way back", "starts from", "evaluations", "largest error in the latent", "residual"),
        tuple(_reversal_row(one) for one in found if one.converged),
    )
    contents: list[Table | Figure] = [table]
    errors = euler_errors(coder, latent, ERROR_STEPS)
    if min(errors) > 0:  # a field of zeros makes none, and has no order
        plot = curves({"reversed Euler": (ERROR_STEPS, errors)}, "steps", "distance from the seed state (RMS)")
        order = slope(ERROR_STEPS, errors)
        caption = (
            f"Reversed Euler misses the seed state it came from; the error falls with the steps at order {order:.2f}."
        )
        contents.append(Figure(plot, "reversal-error", caption))
    return Section("Back to the latent", _BACK, contents)


def _reversal_row(one: Reversal) -> tuple[str, ...]:
    residual = "" if one.residual is None else f"{one.residual:.1e}"
    return one.name, one.start, str(one.evaluations), f"{one.error:.1e}", residual


_THERE_AND_BACK = (
    "Each photograph is encoded by running the flow backwards and decoded by running it forwards, with as many steps "
    "each way. The teacher is the autoencoder whose latents this RAC learned to imitate. Small pictures are enlarged "
    "without smoothing."
)
_QUALITY = (
    "Means over the photographs. An evaluation is one pass through a network, encoding and decoding together; GMACs "
    "are the 10^9 multiply-accumulates of all of them."
)
_ON_THE_WAY = "The first three channels of the states at each time node, clamped to the range of an image."
_BACK = (
    "A latent is decoded, and sought again from the result. Reversed Euler is not the inverse of Euler. A fixed-point "
    "iteration inverts each of its steps, and a reversible solver retraces its own, if they may start from the whole "
    "final state. From the image alone, which is all an encoder has, the state's other channels are unknown, and the "
    "way back is as good as training made it. Fixed points are shown where the iteration finds them."
)
