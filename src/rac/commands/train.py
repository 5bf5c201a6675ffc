"""`rac train RECIPE`: the recipes of `rac.recipes`, every field of them an option."""

from __future__ import annotations

import dataclasses
import difflib
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import tyro

from .. import runtime
from ..errors import RacError
from ..hub import PRODUCTS
from ..recipes import RECIPES, Recipe
from ..report.terminal import listing
from ..train.processes import leave
from .options import read_options
from .shared import say

NEXT = {"coder": "rac reconstruct PICTURE --model {}", "generator": "rac generate {}"}
"""The command to try next, by what was trained."""


def run(arguments: Sequence[str]) -> int:
    """`rac train` with these arguments; the exit code. Raises `RacError` for an unknown recipe and from the run."""
    if not arguments or arguments[0] in ("-h", "--help"):
        return _overview()
    name, *options = arguments
    description, recipe = find_recipe(name)
    chosen = read_options(_options(recipe), f"rac train {name}", options, description)
    chosen.recipe.run(chosen.out, resume=chosen.resume)
    leave()
    if runtime.is_first_process():
        product = chosen.out / recipe.product
        say(f"The {recipe.product} is in {product}; try: {NEXT[recipe.product].format(product)}")
    return 0


def find_recipe(name: str) -> tuple[str, Recipe]:
    """What the recipe called `name` is for, and itself. Raises `RacError` naming the near ones."""
    if name not in RECIPES:
        near = difflib.get_close_matches(name, RECIPES, n=2, cutoff=0.4)
        hint = f"did you mean {' or '.join(near)}?" if near else f"recipes are {', '.join(RECIPES)}"
        raise RacError(f"no recipe {name!r}; {hint}")
    return RECIPES[name]


def _options(recipe: Recipe) -> Any:
    """A dataclass of the recipe, whose fields keep their own names as options, and of what the run itself needs."""
    own: Any = Annotated[type(recipe), tyro.conf.arg(name="")]
    out = Annotated[Path, tyro.conf.arg(help="Folder of the run: checkpoints, galleries, curves, and what is trained.")]
    resume = Annotated[bool, tyro.conf.arg(help="Continue the run in --out with the recipe that it was started with.")]
    return dataclasses.make_dataclass(
        "Options",
        [
            ("out", out),
            ("resume", resume, dataclasses.field(default=False)),
            ("recipe", own, dataclasses.field(default=recipe)),
        ],
        frozen=True,
    )


def _overview() -> int:
    print("usage: rac train RECIPE --out FOLDER [--resume] [--options]\n")
    width = shutil.get_terminal_size().columns
    for product in PRODUCTS:
        print(f"{product}s:")
        print(listing({name: told for name, (told, recipe) in RECIPES.items() if recipe.product == product}, width))
    print("rac train RECIPE --help lists a recipe's options.")
    return 0
