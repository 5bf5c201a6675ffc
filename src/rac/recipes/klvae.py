"""Training a KL-VAE, the teacher and the baseline."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from .. import hub, runtime
from ..coders.klvae import KLVAE, KLVAEConfig
from ..config import differences
from ..data import DataConfig, open_stream
from ..errors import RacError
from ..objectives.klvae import KLVAEWeights
from ..train import Fitted, TrainConfig, fit
from ..train.adversary import Jury
from ..train.discriminator import DiscriminatorConfig
from ..train.processes import Processes
from ..train.tasks import KLVAETask


@dataclass(frozen=True)
class KLVAERecipe:
    """A KL-VAE on images."""

    network: KLVAEConfig = field(default_factory=KLVAEConfig)
    start: str | None = None
    """A KL-VAE to start from (same network), instead of random weights: a shipped name, a directory or a hub name."""
    train_encoder: bool = True
    """Without it only the decoder is trained, and the latents of `start` stay as they are, bit for bit: whatever was
    trained on them fits the new coder too. It then learns to decode the posterior's mean, which is what `encode` gives,
    without noise."""
    weights: KLVAEWeights = field(default_factory=KLVAEWeights)
    discriminator: DiscriminatorConfig = field(default_factory=DiscriminatorConfig)
    data: DataConfig = field(default_factory=DataConfig)
    train: TrainConfig = field(default_factory=TrainConfig)

    def run(self, directory: Path, *, resume: bool = False, crops: Path | None = None) -> Fitted:
        """Train in `directory`; its coder/ holds the result, a plain diffusers AutoencoderKL. See `rac.train.fit`.

        Prepared crops, if any, are kept in the folder `crops`; `directory`.crops where none is named. With a frozen
        encoder their latents are kept as well.

        Raises `RacError` for a start of another shape and for a frozen encoder without a start, and `WeightsError`
        where LPIPS is wanted and its weights are not found.
        """
        jury = Jury.called(self.weights.perceptual, self.weights.adversarial, self.discriminator, self.train.rng_seed)
        torch.manual_seed(runtime.derived_seed(self.train.rng_seed, "weights"))
        coder = self._coder()
        device = runtime.pick_device(self.train.device)
        cache = crops or directory.parent / f"{directory.name}.crops"
        with Processes.join(self.train.device, 60 * self.train.patience_minutes).in_turn():
            if self.train_encoder:
                stream = open_stream(self.data, self.train.rng_seed, batch=self.train.batch, cache=cache)
            else:
                stream = open_stream(
                    self.data,
                    self.train.rng_seed,
                    batch=self.train.batch,
                    cache=cache,
                    teacher=coder.to(device),
                    teacher_name=self.start,
                    device=device,
                )
        task = KLVAETask(coder, self.weights, stream, self.train.batch, jury, self.train_encoder)
        return fit(task, stream, self.train, directory, recipe=self, resume=resume)

    def _coder(self) -> KLVAE:
        coder = self.network.build()
        if self.start is None:
            if not self.train_encoder:
                raise RacError("without a start there is no encoder to keep; give start, or train the encoder too")
            return coder
        start = hub.load(self.start)
        if not isinstance(start, KLVAE):
            raise RacError(f"start {self.start} is no KL-VAE; give one that an earlier stage trained")
        ours, theirs = (shape_of(one) for one in (coder, start))
        if ours != theirs:
            raise RacError(f"start {self.start} has another network: {'; '.join(differences(ours, theirs))}")
        return start.requires_grad_(True)


def shape_of(coder: KLVAE) -> dict[str, Any]:
    """A KL-VAE's configuration without its statistics and without what leaves no trace in the weights."""
    shaping = (
        "block_out_channels",
        "layers_per_block",
        "latent_channels",
        "norm_num_groups",
        "mid_block_add_attention",
    )
    return {name: coder.config[name] for name in shaping}
