"""The `Recipe` protocol, and code that recipes share: settings of machines, the run, discriminators, the gallery."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from .. import runtime
from ..coders.protocol import Coder
from ..config import to_json
from ..data import Batch, DataConfig, Features, Latents, Stream, open_stream
from ..data.stream import IMAGES, Want
from ..errors import RacError
from ..evaluate.cost import CostRow
from ..evaluate.image_metrics import psnr
from ..fields import UNetConfig
from ..images import from_pixels, to_pixels
from ..objectives.image_terms import ADVERSARIAL, DISCRIMINATOR
from ..report.pictures import Panel, sheet, strip
from ..representations import Targets
from ..train import Fitted, Part, PartTerms, Task, TrainConfig, check_run, fit
from ..train.adversary import EPSILON, AdaptiveWeight, ImageNetworks, last_layer
from ..train.discriminator import DiscriminatorConfig
from ..train.processes import Processes

if TYPE_CHECKING:
    from typing_extensions import Self

ONE_CORE = TrainConfig(lr=1e-3, warmup=100, schedule="cosine", final_lr=0.05, bf16=True, channels_last=True, threads=1)
"""Training settings of the recipes for small machines."""

ONE_GPU = TrainConfig(
    warmup=100,
    schedule="cosine",
    final_lr=0.02,
    bf16=True,
    channels_last=True,
    workers=12,
    threads=1,  # of each worker, which would otherwise all want every core
    checkpoint_minutes=4.0,
    gallery_every=1_000,
    log_every=50,
)
"""Training settings of the recipes for one large GPU; their iterations are guesses, `tools/offline` plans them anew."""

SMALL_UNET = UNetConfig(width=32, norm_groups=8)
"""DGAE-B's U-Net at a quarter of its widths, with 7.7 million parameters."""

STATISTICS_BATCHES = 16
"""Number of training batches whose latents give a coder with a posterior its scale and shift."""

SHOWN = 8
"""Number of held-out images in a gallery."""


class Recipe(Protocol):
    """Protocol of recipes: all that shapes a training run, in a frozen dataclass that the command line can set."""

    __dataclass_fields__: ClassVar[dict[str, Any]]

    product: ClassVar[str]
    """Folder, inside the run's, that holds the trained product; one of `rac.hub.PRODUCTS`."""

    steps_field: ClassVar[str | None]
    """Name of the field with the finished product's default number of steps; None for products without a flow.

    It affects no weight.
    """

    @property
    def data(self) -> DataConfig:
        """The images to train on."""
        ...

    @property
    def train(self) -> TrainConfig:
        """Settings of the training loop: length, learning rate, device."""
        ...

    @property
    def latents_of(self) -> str | None:
        """Name of the frozen coder whose latents are trained on; None if only images are needed."""
        ...

    def prepares(self) -> dict[str, Any]:
        """Returns everything that prepared crops depend on, as JSON: recipes that return the same can share them."""
        ...

    def task(self, coder: Coder | None = None) -> Task:
        """Builds the networks and the task that trains them; `coder` is trained in place of the recipe's own network.

        Reads no image. Raises `RacError` for settings that do not go together, and `WeightsError` where weights are
        wanted and not found.
        """
        ...

    def trains(self, coder: Coder) -> bool:
        """Returns whether `task` accepts this coder."""
        ...

    def costs(self, name: str, side: int) -> list[CostRow]:
        """Counts parameters and MACs of the networks, for `side` x `side` images; `name` is the recipe's."""
        ...

    def tiny(self) -> Self:
        """Returns the same recipe at a size that runs in seconds on a CPU, for trying it out and for tests."""
        ...

    def run(self, directory: Path, *, resume: bool = False, crops: Path | None = None) -> Fitted:
        """Trains in `directory`, whose folder `product` then holds the result.

        `resume` continues the run in `directory` from its newest checkpoint. Prepared crops, if any, are kept in the
        folder `crops`, by default `directory`.crops. Raises `RacError` for settings that do not go together, and
        `WeightsError` where weights are wanted and not found, both before any image is read; afterwards as
        `rac.train.fit`.
        """
        ...


def run_recipe(
    recipe: Recipe,
    directory: Path,
    *,
    resume: bool = False,
    crops: Path | None = None,
    look: Callable[[Task, Stream], None] | None = None,
    wants: Collection[Want] = IMAGES,
    sample_posterior: bool = False,
    targets: Callable[[Task], Targets | None] = lambda task: None,
) -> Fitted:
    """Implements `Recipe.run` for every recipe.

    - `recipe`, `directory`, `resume`, `crops`: as for `Recipe.run`.
    - `look`: called with the task and the stream when a new run begins, on the first process.
    - `wants`, `sample_posterior`, `targets`: as for `open_for`; `targets` gets the task.
    """
    settings = recipe.train
    processes = Processes.join(settings.device, 60 * settings.patience_minutes)
    # All that can be refused without work comes before images are read or prepared.
    check_run(directory, settings, recipe=recipe, resume=resume, processes=processes)
    task = recipe.task()
    cache = crops or directory.parent / f"{directory.name}.crops"
    with processes.in_turn():
        stream = open_for(recipe, task, cache, wants, sample_posterior, targets(task))
        if look is not None and processes.first and not resume:
            look(task, stream)
    return fit(task, stream, settings, directory, recipe=recipe, resume=resume, product=recipe.product)


def open_for(
    recipe: Recipe,
    task: Task,
    cache: Path | None = None,
    wants: Collection[Want] = IMAGES,
    sample_posterior: bool = False,
    targets: Targets | None = None,
) -> Stream:
    """Opens what a recipe trains on.

    - `recipe`: names the pictures and the coder of the latents.
    - `task`: has that coder, if any.
    - `cache`: the folder in which prepared crops are kept.
    - `wants`: what every batch must hold; latents come, where they are prepared, for every task with a coder.
    - `sample_posterior`: draw latents from the coder's posterior, if it has one, instead of taking its mean.
    - `targets`: gives the features of the images, which come where they are prepared; otherwise the images do.
    """
    device, settings, encoder = runtime.pick_device(recipe.train.device), recipe.train, task.encoder
    latents = features = None
    if targets is not None:
        features = Features(targets.to(device), device)
    if encoder is not None:
        posterior: Literal["mean", "sample"] = "sample" if sample_posterior and encoder.has_posterior else "mean"
        latents = Latents(encoder.to(device), recipe.latents_of, device, posterior)
    return open_stream(
        recipe.data,
        settings.rng_seed,
        wants=wants,
        batch=settings.batch,
        cache=cache,
        latents=latents,
        features=features,
    )


def prepared_from(recipe: Recipe) -> dict[str, Any]:
    """Implements `Recipe.prepares` for recipes that prepare images and the latents of `latents_of`."""
    return {"data": to_json(recipe.data), "rng_seed": recipe.train.rng_seed, "latents_of": recipe.latents_of}


# Discriminators


def coder_parts(
    coder: nn.Module, weights: Mapping[str, float], networks: ImageNetworks, last: str, epsilon: float = EPSILON
) -> dict[str, Part]:
    """Returns the parts of a training: the coder, "coder", and the discriminator if `networks` has one.

    - `coder`: the coder to train, or the part of it that is trained.
    - `weights`: the weights of all terms; the weight of `adversarial` is relative to the others.
    - `networks`: LPIPS and the discriminator.
    - `last`: name of the submodule of the coder that makes images.
    - `epsilon`: number added to the length of the adversarial gradient.

    Raises `RacError` if no term has a weight beside the adversarial one.
    """
    own = {name: weight for name, weight in weights.items() if name != ADVERSARIAL}
    if not any(own.values()):
        raise RacError(
            "no term but the adversarial one has a weight, so there is nothing to balance it against; give another, "
            "such as l1 or reconstruction"
        )
    if networks.discriminator is None:
        return {"coder": Part(coder, own)}
    adaptive = AdaptiveWeight(ADVERSARIAL, weights[ADVERSARIAL], last_layer(coder, last), epsilon)
    return {"coder": Part(coder, own, adaptive), **discriminator_parts(networks)}


def discriminator_parts(networks: ImageNetworks) -> dict[str, Part]:
    """Returns the part "discriminator", if `networks` has one."""
    if networks.discriminator is None:
        return {}
    return {
        "discriminator": Part(
            networks.discriminator,
            {DISCRIMINATOR: 1.0},
            rate=networks.config.rate,
            betas=networks.config.betas,
            averaged=False,
            shard=False,
            fused_on_cpu=False,  # runs begun before parts had this setting go on with the same numbers
        )
    }


def coder_terms(terms: Mapping[str, Tensor]) -> Iterator[PartTerms]:
    """Yields the terms of an objective, sorted into the parts that `coder_parts` gives."""
    yield PartTerms("coder", {name: term for name, term in terms.items() if name != DISCRIMINATOR})
    if DISCRIMINATOR in terms:
        yield PartTerms("discriminator", {DISCRIMINATOR: terms[DISCRIMINATOR]})


@torch.no_grad()
def with_latents(batch: Batch, encoder: Coder) -> Batch:
    """Returns the batch with latents, those that it came with or else those that `encoder` gives."""
    return batch if batch.latents is not None else batch._replace(latents=encoder.encode(batch.need("images")))


MOST_MEAN, LEAST_DEVIATION, MOST_DEVIATION = 0.5, 0.5, 2.0
"""Largest absolute mean, and least and largest deviation, of latents that are taken for correctly scaled."""

LEAST_CONTRAST = 0.02
"""Least mean deviation within images for which latents are judged; that of photographs is about 0.3."""


@torch.no_grad()
def check_latents(teacher: Coder, name: str, batch: Batch) -> None:
    """Warns if the teacher's latents of a batch are far from mean 0 and deviation 1, and suggests the scale that fits.

    The objective weighs noise, images and latents against each other on that assumption, so the wrong scale trains
    badly. Nothing is said of images of a single colour, whose latents are unlike those of photographs at any scale.
    """
    if batch.images is not None and batch.images.std(dim=(2, 3)).mean() < LEAST_CONTRAST:
        return
    latents = with_latents(batch.to(next(teacher.parameters()).device), teacher).latents
    assert latents is not None
    mean, deviation = float(latents.double().mean()), float(latents.double().std())
    if abs(mean) <= MOST_MEAN and LEAST_DEVIATION <= deviation <= MOST_DEVIATION:
        return
    raw_latents = teacher.statistics.denormalise(latents).double()
    scale, shift = 1 / max(float(raw_latents.std()), 1e-12), float(raw_latents.mean())
    warnings.warn(
        f"the latents of teacher {name} have mean {mean:.3g} and deviation {deviation:.3g} on the first batch, where "
        "training expects about 0 and 1; the statistics in its config.json are probably wrong: scaling_factor "
        f"{scale:.4g} with shift_factor {shift:.4g} would fit",
        stacklevel=2,
    )


# Galleries


def mean_psnr(images: Tensor, references: Tensor) -> float:
    """Returns the mean PSNR in dB of images B 3 H W, rounded to the 8 bits of a file, and references in [-1, 1]."""
    rounded = torch.cat([from_pixels(to_pixels(image)) for image in images.float()]).to(references.device)
    return float(psnr(rounded, references).double().mean())


def gallery(columns: Mapping[str, Tensor]) -> Tensor:
    """Draws labelled columns of images, each B 3 H W, one row per image, as one picture 1 3 H W in [-1, 1]."""
    rows = [
        strip([Panel(image.float().cpu(), name) for name, image in zip(columns, row, strict=True)])
        for row in zip(*columns.values(), strict=True)
    ]
    return from_pixels(np.asarray(sheet(rows[:SHOWN])))


# Small sizes


def tiny_data(data: DataConfig) -> DataConfig:
    """Returns the same data settings at a size for trying out."""
    return replace(
        data,
        size=32,
        further_sizes=(64,)[: len(data.further_sizes)],
        held_out=2,
        cached_crops=min(data.cached_crops, 8),
    )


def tiny_train(train: TrainConfig) -> TrainConfig:
    """Returns the same training settings for three iterations."""
    return replace(train, iterations=3, batch=2, warmup=0, gallery_every=3, log_every=1)


def tiny_discriminator(config: DiscriminatorConfig) -> DiscriminatorConfig:
    """Returns a small discriminator that starts early."""
    return replace(config, width=8, start=min(config.start, 1))
