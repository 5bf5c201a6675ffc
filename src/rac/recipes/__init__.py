"""Recipes: frozen dataclasses that hold all that shapes a training run.

`RECIPES` names them for `rac train`; every field of one can be changed on the command line.
"""

from __future__ import annotations

from .klvae import KLVAERecipe
from .rac import RACRecipe
from .shelf import RECIPES, Recipe

__all__ = ["RECIPES", "KLVAERecipe", "RACRecipe", "Recipe"]
