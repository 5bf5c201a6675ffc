"""Training a RAC on a frozen teacher."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch

from .. import hub, runtime
from ..coders.protocol import Coder
from ..coders.rac import RAC, RACConfig
from ..coders.warm_start import start_from
from ..data import DataConfig, open_stream
from ..errors import RacError
from ..fields import FieldConfig, TinyFieldConfig
from ..objectives.rac import RACObjective
from ..states import Spread
from ..train import Fitted, TrainConfig, fit
from ..train.discriminator import DiscriminatorConfig
from ..train.jury import Jury
from ..train.processes import Processes
from ..train.tasks import RACTask


@dataclass(frozen=True)
class RACRecipe:
    """A RAC on images and a teacher."""

    teacher: str
    """A shipped name, a directory, a TAESD-family .pth file, or a name on the hub."""
    field: FieldConfig = dataclasses.field(default_factory=TinyFieldConfig)
    state_channels: int = 4
    """C of the states B C H W, the image's three among them."""
    spread: Spread = "shuffle"
    """How a latent is laid out in the seed state; see `rac.states.StateSpec`."""
    contraction: Literal["inverse", "projector"] = "inverse"
    """How a seed state becomes a latent: by the spread's own inverse, or by a learned projector."""
    steps: int = 4
    """Steps the finished coder takes where none are asked for."""
    seed_noise: float = 0.0
    """Noise in the sites of the seed state that the latent leaves free; see `RACConfig`."""
    start: str | None = None
    """A RAC to start from (same field and states), instead of random weights: a second stage of training."""
    start_from_teacher: bool = False
    """Start from the weights of the teacher, as far as the field has layers of that kind: TAESD-family teachers, spread
    `beside`; `carriers` fields take both halves, `local` ones the decoder's."""
    objective: RACObjective = dataclasses.field(default_factory=RACObjective)
    discriminator: DiscriminatorConfig = dataclasses.field(default_factory=DiscriminatorConfig)
    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    train: TrainConfig = dataclasses.field(default_factory=TrainConfig)

    def run(self, directory: Path, *, resume: bool = False, crops: Path | None = None) -> Fitted:
        """Train in `directory`; `directory`/coder holds the result. See `rac.train.fit`.

        Prepared crops, if any, are kept in the folder `crops`; `directory`.crops where none is named.

        Raises `RacError` for sizes that do not fit the teacher's factor, and for a start of another shape, and
        `WeightsError` where LPIPS is wanted and its weights are not found.
        """
        weights = self.objective.weights
        jury = Jury.called(weights.perceptual, weights.adversarial, self.discriminator, self.train.rng_seed)
        teacher = hub.load(self.teacher)
        factor = teacher.spec.factor
        for size in self.data.sizes:
            if size % factor:
                raise RacError(f"size {size} must be a multiple of the teacher's factor {factor}")
        device = runtime.pick_device(self.train.device)
        with Processes.join(self.train.device, 60 * self.train.patience_minutes).in_turn():
            stream = open_stream(
                self.data,
                self.train.rng_seed,
                batch=self.train.batch,
                cache=crops or directory.parent / f"{directory.name}.crops",
                teacher=teacher.to(device),
                teacher_name=self.teacher,
                device=device,
            )
        torch.manual_seed(runtime.derived_seed(self.train.rng_seed, "weights"))
        coder = self._coder(teacher)
        if self.train.compile:
            coder.field.compile()  # in place; the averaged copy and what is saved stay plain
        task = RACTask(coder, teacher, self.objective, jury)
        return fit(task, stream, self.train, directory, recipe=self, resume=resume)

    def _coder(self, teacher: Coder) -> RAC:
        config = RACConfig(
            spec=replace(teacher.spec, range=(-1.0, 1.0)),
            field=self.field,
            state_channels=self.state_channels,
            spread=self.spread,
            contraction=self.contraction,
            teacher=self.teacher,
            steps=self.steps,
            seed_noise=self.seed_noise,
        )
        if self.start is None:
            coder = RAC(config)
            if self.start_from_teacher:
                start_from(teacher, coder)
            return coder
        start = hub.load(self.start)
        if not isinstance(start, RAC):
            raise RacError(f"start {self.start} is no RAC; give one that an earlier stage trained")
        if replace(start.config, teacher=config.teacher, steps=config.steps) != config:
            raise RacError(f"start {self.start} has another field, other states or other latents; give the ones it has")
        return start.requires_grad_(True)
