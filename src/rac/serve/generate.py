"""The tab of `rac serve` that generates images: what its controls ask for, and the HTML of its answer."""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from ..coders.protocol import Coder
from ..errors import RacError
from ..flow import Walk
from ..flow.grid import steps_in_words
from ..generators.protocol import LatentGenerator
from ..generators.sampling import Sampling, sample_seeds
from ..report.document import Table
from .html import Cell, notes_html, pictures_html, table_html
from .numbers import GREATEST_STEPS, number_in, whole_number

GREATEST_STEPS_THERE = 100
"""Most steps of a generator."""
GREATEST_GUIDANCE = 10
GREATEST_SEED = 2**31 - 1
SHOWN = 2
"""Number of images of an answer: the first ones of their seed."""
DECODE_STEPS = (1, 2, 4, 8, 16)
"""Numbers of steps that a latent is decoded with, up to the chosen one, which is the last."""


@dataclass(frozen=True)
class Maker:
    """A generator that can be chosen on the page, and the coders of its latents."""

    name: str
    generator: LatentGenerator
    coders: Mapping[str, Coder]
    """Coders that decode its latents, by name; the first is chosen at first."""


@dataclass(frozen=True)
class Generation:
    """Computes the contents of the tab from the values of its controls. Needs no gradio."""

    makers: Mapping[str, Maker]
    busy: threading.Lock = field(default_factory=threading.Lock)

    def __call__(
        self, name: str, class_name: str | None, seed: object, guidance: object, steps: object, coder: str, last: object
    ) -> str | None:
        """Computes the HTML. None stands for no change: a number is missing while its box is edited.

        - `name`: name of the generator.
        - `class_name`: name of the class; none if it is empty.
        - `seed`: seed of the images.
        - `guidance`: scale of guidance, 1: none.
        - `steps`: number of steps of the generator.
        - `coder`: name of the coder.
        - `last`: greatest number of steps to decode with.

        Raises:
            RacError: Generator, class or coder is unknown, or a number lies outside its range.
        """
        if None in (seed, guidance, steps, last):
            return None
        if (maker := self.makers.get(name)) is None:
            raise RacError(f"there is no generator {name!r} here; choose one of {', '.join(self.makers)}")
        if (decoder := maker.coders.get(coder)) is None:
            raise RacError(f"{name} is not decoded by {coder!r} here; choose one of {', '.join(maker.coders)}")
        label = maker.generator.label(str(class_name)) if class_name else None
        rng_seed = whole_number(seed, 0, GREATEST_SEED, "{} is no seed")
        scale = number_in(guidance, 0, GREATEST_GUIDANCE, "guidance {} cannot be used")
        count = whole_number(steps, 1, GREATEST_STEPS_THERE, "{} steps cannot be taken")
        greatest = whole_number(last, 1, GREATEST_STEPS, "{} steps of decoding cannot be taken")
        sampling = replace(maker.generator.sampling, steps=count, guidance=1.0 if label is None else scale)
        with self.busy:
            return _html(maker, coder, decoder, label, rng_seed, sampling, greatest)


def _html(
    maker: Maker, name: str, coder: Coder, label: int | None, rng_seed: int, sampling: Sampling, greatest: int
) -> str:
    """Returns pictures, a row for each sample, a column for each way of decoding, and a table of times."""
    labels = None if label is None else [label] * SHOWN
    begun = time.perf_counter()
    with torch.no_grad():
        made = maker.generator.sample(sample_seeds(rng_seed, range(SHOWN)), labels, sampling)
    rows = [(maker.name, f"{made.evaluations}", _milliseconds(begun))]
    columns: list[tuple[str, Tensor]] = []
    noise = coder.noise_of(made.latent, range(SHOWN), rng_seed)
    for title, walk in _walks(coder, greatest).items():
        begun = time.perf_counter()
        with torch.no_grad():
            decoded = coder.decoded(made.latent, walk, noise)
        columns.append((title, decoded.image))
        rows.append((f"{name}, {title}", f"{decoded.evaluations}", _milliseconds(begun)))
    cells = [
        Cell(title, f"image {number}", images[number].float().cpu())
        for number in range(SHOWN)
        for title, images in columns
    ]
    one_pass = coder.walk("decode") is None
    once = f"{name} decodes in one pass; the number of steps changes nothing." if one_pass else ""
    free = "Without a class there is nothing to guide by, so the guidance is not used." if label is None else ""
    note = f"Each row is one latent. Times are of {SHOWN} images together."
    table = Table(("network", "evaluations per image", "time"), tuple(rows))
    return notes_html(note, free, once) + pictures_html(cells, len(columns)) + table_html(table)


def _walks(coder: Coder, greatest: int) -> dict[str, Walk | None]:
    """Returns the ways to decode, by their names: with growing numbers of steps, or in one pass."""
    if coder.walk("decode") is None:
        return {"in one pass": None}
    numbers: Sequence[int] = [*(steps for steps in DECODE_STEPS if steps < greatest), greatest]
    return {steps_in_words(steps): coder.walk("decode", steps) for steps in numbers}


def _milliseconds(since: float) -> str:
    return f"{1000 * (time.perf_counter() - since):,.0f} ms"
