"""Recipes: frozen dataclasses that hold all that shapes a training run, each beside its task and its presets.

`RECIPES` names the presets for `rac train`; every field of one can be changed on the command line. A new family
is entered here, in `rac.hub.LOADERS` or `rac.hub.GENERATORS` (what reads its folder) and, where it has a field of its
own, in `rac.fields.FieldConfig`; nothing else lists families.
"""

from __future__ import annotations

from collections.abc import Callable

from . import ddt, dgae, klvae, rac, rae, repae, sit
from .dgae import DGAERecipe
from .klvae import KLVAERecipe
from .rac import RACRecipe
from .rae import RAERecipe
from .recipe import Recipe
from .repae import RepaERecipe
from .sit import SiTRecipe

__all__ = ["RECIPES", "DGAERecipe", "KLVAERecipe", "RACRecipe", "RAERecipe", "Recipe", "RepaERecipe", "SiTRecipe"]


def _preset(make: Callable[[], Recipe]) -> tuple[str, Recipe]:
    return make.__doc__ or "", make()


RECIPES: dict[str, tuple[str, Recipe]] = {
    "klvae-f8d4": _preset(klvae.klvae_f8d4),
    "klvae-f8d4-sharp": _preset(klvae.klvae_f8d4_sharp),
    "rac-64": _preset(rac.rac_64),
    "rac-64-rollout": _preset(rac.rac_64_rollout),
    "rac-64-sizes": _preset(rac.rac_64_sizes),
    "rac-taef2": _preset(rac.rac_taef2),
    "rac-taef2-sharp": _preset(rac.rac_taef2_sharp),
    "rac-taef2-detail": _preset(rac.rac_taef2_detail),
    "rac-256": _preset(rac.rac_256),
    "rac-256-sharp": _preset(rac.rac_256_sharp),
    "rac-256-long": _preset(rac.rac_256_long),
    "klvae-128": _preset(klvae.klvae_128),
    "rac-128": _preset(rac.rac_128),
    "rac-128-rollout": _preset(rac.rac_128_rollout),
    **klvae.COUNTERPARTS,
    **dgae.PRESETS,
    "decoder-plain": _preset(rac.decoder_plain),
    "decoder-rac": _preset(rac.decoder_rac),
    "decoder-rac-noise": _preset(rac.decoder_rac_noise),
    "tiny": _preset(rac.tiny),
    "paper": _preset(rac.paper),
    "nano": _preset(rac.nano),
    "sit-64": _preset(sit.sit_64),
    "sit-128": _preset(sit.sit_128),
    "sit-128-repa": _preset(sit.sit_128_repa),
    "sit-256": _preset(sit.sit_256),
    "repae-64": _preset(repae.repae_64),
    "sit-s-2": _preset(sit.sit_s_2),
    "sit-b-2": _preset(sit.sit_b_2),
    "sit-b-2-repa": _preset(sit.sit_b_2_repa),
    "sit-l-2": _preset(sit.sit_l_2),
    "sit-xl-2": _preset(sit.sit_xl_2),
    "sit-xl-2-repa": _preset(sit.sit_xl_2_repa),
    "rae-128": _preset(rae.rae_128),
    "rac-rae-128": _preset(rac.rac_rae_128),
    "rac-rae-128-rollout": _preset(rac.rac_rae_128_rollout),
    "rae-b": _preset(rae.rae_b),
    "rae-l": _preset(rae.rae_l),
    "rae-xl": _preset(rae.rae_xl),
    "rae-xl-512": _preset(rae.rae_xl_512),
    "dit-dh-128": _preset(ddt.dit_dh_128),
    "dit-dh-s": _preset(ddt.dit_dh_s),
    "dit-dh-b": _preset(ddt.dit_dh_b),
    "dit-dh-l": _preset(ddt.dit_dh_l),
    "dit-dh-xl": _preset(ddt.dit_dh_xl),
}
"""Presets by name: a sentence on the purpose, and the recipe."""
