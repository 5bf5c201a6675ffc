"""Both kinds of recipe with everything that can go wrong on several processes; run as a script, by any number of them.

    python tests/support/training_recipes.py FOLDER JOB ...                             on one process
    torchrun --standalone --nproc-per-node 2 tests/support/training_recipes.py FOLDER JOB ...

A job is RECIPE:SHARD:RUN:ITERATIONS, such as rac:fsdp:somewhere:20; it goes on with the run if there is one.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import torch

import rac
from rac.coders.klvae import KLVAEConfig
from rac.data import DataConfig
from rac.fields import TinyFieldConfig
from rac.objectives.klvae import KLVAEWeights
from rac.objectives.rac import RACObjective, RACWeights
from rac.recipes import KLVAERecipe, RACRecipe, Recipe
from rac.train import TrainConfig
from rac.train.discriminator import DiscriminatorConfig

NETWORK = KLVAEConfig(widths=(8, 16, 16), latent_channels=4, norm_groups=4, middle_attention=True)
DISCRIMINATOR = DiscriminatorConfig(width=8, layers=1, start=2)
TRAIN = TrainConfig(
    batch=5,  # in unequal shares
    accumulate=2,
    lr=1e-3,
    clip=0.3,
    ema=0.9,
    warmup=3,
    weight_decay=0.01,
    log_every=1,
    gallery_every=10,
    device="cpu",
    tensorboard=False,
)


def prepare(workplace: Path) -> None:
    """Photographs, and a teacher with random weights."""
    photos = workplace / "photos"
    photos.mkdir()
    generator = torch.Generator().manual_seed(0)
    for k in range(13):
        coarse = 2 * torch.rand(1, 3, 6, 6, generator=generator) - 1
        image = torch.nn.functional.interpolate(coarse, size=(24, 28), mode="bilinear")
        rac.write_image(image, photos / f"{k:02d}.png")
    torch.manual_seed(0)
    rac.save(NETWORK.build(), workplace / "teacher")


def recipes(workplace: Path) -> dict[str, Recipe]:
    """A RAC whose objective calls the field in every way there is, and a KL-VAE, both with a discriminator."""
    data = DataConfig(paths=(workplace / "photos",), size=16, held_out=2)
    return {
        "rac": RACRecipe(
            teacher=str(workplace / "teacher"),
            field=TinyFieldConfig(widths=(12, 10, 8), blocks=(1, 1, 1), interval=False),
            contraction="projector",
            objective=RACObjective(
                weights=RACWeights(
                    reconstruction=1.0,
                    path_decode=0.1,
                    latent=1.0,
                    state=0.5,
                    pixel=1.0,
                    round_trip=1.0,
                    velocity=1.0,
                    adversarial=0.3,
                ),
                steps=(1, 3),
            ),
            discriminator=DISCRIMINATOR,
            data=replace(data, cached_crops=24),
            train=TRAIN,
        ),
        "klvae": KLVAERecipe(
            network=NETWORK,
            weights=KLVAEWeights(l1=1.0, kl=1e-4, adversarial=0.3),
            discriminator=DISCRIMINATOR,
            data=data,
            train=replace(TRAIN, lr=1e-4),  # rounding grows quickly in a contest of two
        ),
    }


if __name__ == "__main__":
    workplace = Path(sys.argv[1])
    for job in sys.argv[2:]:
        name, shard, run, iterations = job.split(":")
        recipe = recipes(workplace)[name]
        train = replace(recipe.train, shard=shard, iterations=int(iterations))
        folder = workplace / run
        replace(recipe, train=train).run(folder, resume=(folder / "recipe.json").exists(), crops=workplace / "crops")
