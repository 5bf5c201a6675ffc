"""Training a KL-VAE, the teacher and the baseline."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import torch

from .. import runtime
from ..coders.klvae import KLVAEConfig
from ..data import DataConfig, open_stream
from ..objectives.klvae import KLVAEWeights
from ..train import Fitted, TrainConfig, fit
from ..train.tasks import KLVAETask


@dataclass(frozen=True)
class KLVAERecipe:
    """A KL-VAE on images."""

    network: KLVAEConfig = field(default_factory=KLVAEConfig)
    weights: KLVAEWeights = field(default_factory=KLVAEWeights)
    data: DataConfig = field(default_factory=DataConfig)
    train: TrainConfig = field(default_factory=TrainConfig)

    def run(self, directory: Path, *, resume: bool = False, crops: Path | None = None) -> Fitted:
        """Train in `directory`; its coder/ holds the result, a plain diffusers AutoencoderKL. See `rac.train.fit`.

        Prepared crops, if any, are kept in the folder `crops`; `directory`.crops where none is named.
        """
        cache = crops or directory.parent / f"{directory.name}.crops"
        stream = open_stream(self.data, self.train.rng_seed, cache=cache)
        torch.manual_seed(runtime.derived_seed(self.train.rng_seed, "weights"))
        task = KLVAETask(self.network.build(), self.weights, stream, self.train.batch)
        return fit(task, stream, self.train, directory, recipe=self, resume=resume)
