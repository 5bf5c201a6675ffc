"""Which way the doors open: DESIGN's layout, read off the source, and how fast `import rac` is."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

import rac

ROOT = Path(rac.__file__).parent

# From the ground up.
ROOMS = [
    *("errors", "files", "notices", "tensors", "rgb", "config", "runtime", "draws", "progress", "storage"),
    *("images", "latents", "states", "flow", "fields", "representations", "coders", "generators"),
    *("objectives", "report", "hub", "data", "train", "evaluate", "recipes", "experiments"),
    *("integrations", "serve", "commands", "cli", "__main__"),
]
# What each room may import of the package, itself and its own modules apart.
BASE = {"errors", "files", "notices", "tensors"}
STATIONS = ["images", "latents", "states", "flow", "fields"]
PLUMBING = {"config", "storage", "runtime", "draws", "progress", "hub"}
CODERS = {*BASE, *STATIONS, *PLUMBING, "representations"} - {"hub", "draws"}
TRAINING = {*BASE, *STATIONS, *PLUMBING, "representations", "report", "coders", "generators", "objectives", "data"}
MAY_IMPORT = {
    "errors": set(),
    "files": {"errors"},
    "notices": {"errors"},
    "tensors": {"errors"},
    "rgb": {"errors"},
    "config": {"errors"},
    "runtime": {"errors"},
    "draws": {"errors"},
    "progress": {"errors"},
    "storage": {*BASE, "config"},
    # The stations see only those before them; a latent's spec is read from JSON.
    **{name: {*BASE, *STATIONS[:place]} for place, name in enumerate(STATIONS)},
    "latents": {*BASE, "images", "config"},
    # The parts of transformers are the fields'.
    "representations": {*BASE, "config", "runtime", "storage", "fields"},
    "images": {*BASE, "rgb"},
    "coders": CODERS,
    "generators": {*CODERS, "coders"},
    "report": {"errors", "images", "flow"},
    "hub": {*CODERS, "coders", "generators"},
    # Pure functions: states and flows of tensors, nothing that has weights.
    "objectives": {"errors", "draws", "images", "latents", "states", "flow"},
    "data": {*BASE, "config", "progress", "images", "latents", "runtime", "storage"},
    # Training needs no metrics: what scores a gallery is a task's own, beside its recipe.
    "train": TRAINING,
    "evaluate": TRAINING,
    "recipes": {*TRAINING, "train", "evaluate"},
    "experiments": {*TRAINING, "train", "evaluate", "recipes"},
    # Other people's formats, and the page: only the verbs know of them.
    "integrations": {*CODERS, "coders", "generators", "hub"},
    "serve": {*TRAINING, "evaluate"},
    # The verbs of the command line, and the line itself.
    "commands": {*TRAINING, "train", "evaluate", "recipes", "experiments", "integrations", "serve"},
    "cli": {*TRAINING, "train", "evaluate", "recipes", "commands"},
    "__main__": {"cli"},
}
# The package itself shows its public surface.
MAY_IMPORT["__init__"] = {"errors", "flow", "states", "latents", "images", "hub"}

SLOW = {
    "accelerate", "datasets", "diffusers", "gradio", "huggingface_hub", "matplotlib", "onnx", "onnxruntime",
    "onnxscript", "scipy", "skimage", "tensorboard", "torchmetrics", "torchvision", "transformers", "tqdm",
}  # fmt: skip
"""Never imported by a module on its way in; only by the function that needs it."""
NETWORKS = {"diffusers", "transformers"}
NETWORK_ROOMS = {"representations", "coders", "fields", "generators", "integrations"}
"""Where foreign networks may be used at all. evaluate/cost.py counts diffusers' own decoders for its table."""
DROP_INS = {ROOT / "integrations" / "diffusers.py", ROOT / "integrations" / "generation.py"}
"""Subclasses of diffusers' own, for users to import and for nobody else here."""


class Import(NamedTuple):
    file: Path
    line: int
    module: str
    lazy: bool
    typing: bool

    def __str__(self) -> str:
        return f"{self.file.relative_to(ROOT)}:{self.line} imports {self.module}"


def is_module(package: list[str], name: str) -> bool:
    """Whether `name`, imported from `package`, is a module of ours (or what `rac` itself gives, such as a version)."""
    place = ROOT.joinpath(*package[1:], name)
    return package == ["rac"] or (package[0] == "rac" and (place.is_dir() or place.with_suffix(".py").is_file()))


def imports_of(file: Path) -> Iterator[Import]:
    """Every import of a file, its module's name made absolute."""
    package = ["rac", *file.relative_to(ROOT).parts[:-1]]

    def names(node: ast.Import | ast.ImportFrom) -> list[str]:
        if isinstance(node, ast.Import):
            return [alias.name for alias in node.names]
        base = package[: len(package) - node.level + 1] if node.level else []
        full = [*base, *(node.module.split(".") if node.module else [])]
        # `from . import flow` and `from rac import flow` name modules after the import.
        return list(
            dict.fromkeys(
                ".".join([*full, alias.name] if is_module(full, alias.name) else full) for alias in node.names
            )
        )

    def walk(node: ast.AST, lazy: bool, typing: bool) -> Iterator[Import]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.Import | ast.ImportFrom):
                for name in names(child):
                    yield Import(file, child.lineno, name, lazy, typing)
            elif isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
                for inner in child.body:
                    yield from walk(ast.Module([inner], []), lazy, True)
                for inner in child.orelse:
                    yield from walk(ast.Module([inner], []), lazy, typing)
            else:
                function = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
                yield from walk(child, lazy or function, typing)

    yield from walk(ast.parse(file.read_text(encoding="utf-8")), False, False)


def room(file: Path) -> str:
    return file.relative_to(ROOT).with_suffix("").parts[0]


FILES = sorted(ROOT.rglob("*.py"))
IMPORTS = [found for file in FILES for found in imports_of(file) if not found.typing]


def test_the_parser_sees_what_there_is_to_see():
    seen = {(found.file.relative_to(ROOT).as_posix(), found.module, found.lazy) for found in IMPORTS}
    assert ("coders/rac.py", "rac.states", False) in seen
    assert ("flow/integrate.py", "rac.flow.grid", False) in seen
    assert ("fields/conv.py", "diffusers.models.autoencoders.vae", True) in seen
    assert ("hub.py", "rac.coders.adapter", False) in seen


def test_every_room_is_in_the_plan():
    rooms = {room(file) for file in FILES}
    assert not rooms - MAY_IMPORT.keys(), "say in MAY_IMPORT what the new room may import"


def test_doors_open_one_way():
    wrong = []
    for found in IMPORTS:
        parts = found.module.split(".")
        if parts[0] == "rac" and len(parts) > 1 and parts[1] != room(found.file):
            # A name of the package itself, such as `from . import __version__`, is no door.
            is_room = (ROOT / parts[1]).is_dir() or (ROOT / f"{parts[1]}.py").is_file()
            if is_room and parts[1] not in MAY_IMPORT[room(found.file)]:
                wrong.append(str(found))
    assert not wrong, "\n".join(wrong)


def test_doors_open_downwards():
    """What a room may import lies below it, so the plan itself has no circle."""
    place = {name: number for number, name in enumerate(ROOMS)}
    wrong = [
        f"{name} may import {other}"
        for name, others in MAY_IMPORT.items()
        for other in others
        if name != "__init__" and place[other] >= place[name]
    ]
    assert not wrong, "\n".join(wrong)


def module_of(file: Path) -> str:
    parts = ["rac", *file.relative_to(ROOT).with_suffix("").parts]
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def circle(below: dict[str, set[str]]) -> list[str]:
    """A path that comes back to where it began, or nothing."""
    done: set[str] = set()

    def walk(module: str, path: list[str]) -> list[str]:
        if module in path:
            return [*path[path.index(module) :], module]
        if module in done:
            return []
        for other in sorted(below.get(module, ())):
            if found := walk(other, [*path, module]):
                return found
        done.add(module)
        return []

    return next((found for module in sorted(below) if (found := walk(module, []))), [])


def test_no_files_import_each_other():
    """Neither at once nor later, inside a function; only the package itself, which is its version, may be asked."""
    modules = {module_of(file) for file in FILES}
    below: dict[str, set[str]] = {module: set() for module in modules}
    for found in IMPORTS:
        if found.module in modules - {"rac"}:
            below[module_of(found.file)].add(found.module)
    assert "rac.flow.grid" in below["rac.flow.integrate"]
    assert "rac.flow.times" in below["rac.flow.grid"]
    assert circle({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c", "b"]
    around = circle(below)
    assert not around, " -> ".join(around)


def test_nothing_slow_is_imported_on_the_way_in():
    wrong = [
        str(found)
        for found in IMPORTS
        if not found.lazy and found.module.split(".")[0] in SLOW and found.file not in DROP_INS
    ]
    assert not wrong, "\n".join(wrong)


def test_only_users_import_the_classes_that_are_diffusers_own():
    """Their bases are diffusers', so they cannot be lazy; whoever imported them would not be either."""
    assert {found.file for found in IMPORTS if not found.lazy and found.module == "diffusers"} >= DROP_INS
    theirs = {module_of(file) for file in DROP_INS}
    wrong = [str(found) for found in IMPORTS if found.module in theirs and found.file not in DROP_INS]
    assert not wrong, "\n".join(wrong)


def test_foreign_networks_are_used_only_where_they_live():
    counted = ROOT / "evaluate" / "cost.py"
    wrong = [
        str(found)
        for found in IMPORTS
        if found.module.split(".")[0] in NETWORKS and room(found.file) not in NETWORK_ROOMS and found.file != counted
    ]
    assert not wrong, "\n".join(wrong)


def test_stations_need_nothing_but_torch():
    """images reads files, so it needs Pillow and numpy as well."""
    allowed = {"__future__", "rac", "torch", *sys.stdlib_module_names}
    extra = {"images": {"PIL", "numpy"}, "fields": {"diffusers"}}
    wrong = [
        str(found)
        for found in IMPORTS
        if room(found.file) in STATIONS
        and found.module.split(".")[0] not in allowed | extra.get(room(found.file), set())
    ]
    assert not wrong, "\n".join(wrong)


MEASURE = """
import sys, time
import torch
before = set(sys.modules)
start = time.process_time()
{what}
print(time.process_time() - start)
print(*sorted({{name.split(".")[0] for name in set(sys.modules) - before}}))
"""
TOUCH = {
    "import rac": "import rac",
    "rac --help": "import contextlib, io, rac.cli\nwith contextlib.suppress(SystemExit), "
    "contextlib.redirect_stdout(io.StringIO()):\n    rac.cli.main(['--help'])",
}


@pytest.mark.parametrize("what", TOUCH)
def test_import_is_quick_beyond_torch(what):
    if what == "rac --help" and not (ROOT / "cli.py").is_file():
        pytest.skip("the command line is not there yet")
    script = MEASURE.format(what=TOUCH[what])
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    seconds, modules = run.stdout.strip().splitlines()[-2:]
    assert not set(modules.split()) & SLOW
    # Processor time, so that a busy machine does not fail it.
    assert float(seconds) < 1
