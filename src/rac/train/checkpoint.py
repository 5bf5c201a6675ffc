"""Checkpoints: folders that appear whole or not at all, and hold the whole state of a run."""

from __future__ import annotations

import json
import os
import shutil
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from ..config import read_json
from ..errors import RacError, WeightsError
from ..files import explained, make_folder
from .processes import alike, is_sharded, whole
from .step import TrainedPart, TrainState

_KEPT = 2
_KINDS = ("", "_ema", "_optimizer")
"""Endings of the names of a part's files."""
_FIRST_FORMAT = (
    {"": "module", "_ema": "ema", "_optimizer": "optimizer"},
    {"": "opponent", "_optimizer": "opponent_optimizer"},
)
"""Names of these files before parts had names, for the first part and for the second."""
_COUNTS = ("iteration", "skipped", "skipped_in_a_row")


def save(state: TrainState, folder: Path) -> Path:
    """Writes `state` to `folder`/<iteration>/ and keeps the last two such checkpoints.

    To be called by all processes together: the first one writes, and what it writes does not tell how many there were.
    Raises `RacError` if the system refuses.
    """
    target = folder / f"{state.iteration:08d}"
    files = {}
    for name, part in state.parts.items():
        for kind, module in _modules(part).items():
            files[f"{name}{kind}"] = _whole(module.state_dict(), state.processes.first)
        files[f"{name}_optimizer"] = _whole(_optimizer_tensors(part.optimizer), state.processes.first)
    if not state.processes.first:
        return target
    with whole_folder(target) as temporary:
        for name, group in files.items():
            (temporary / f"{name}.safetensors").write_bytes(safetensors.torch.save(group))
        counts = {name: getattr(state, name) for name in _COUNTS}
        (temporary / "state.json").write_text(json.dumps({**counts, "parts": list(state.parts)}))
    earlier = [path for path in listed(folder) if path.name < target.name]
    for path in set(listed(folder)) - {target, *earlier[-(_KEPT - 1) :]}:
        shutil.rmtree(path)
    return target


def _whole(tensors: Mapping[str, Tensor], keep: bool) -> dict[str, Tensor]:
    """Returns the tensors as files hold them; an empty dict unless they are to be kept."""
    found = {}
    for name, tensor in tensors.items():
        full = whole(tensor.detach())
        if keep:
            found[name] = full.cpu().contiguous()
    return found


def restore_newest(state: TrainState, folder: Path) -> None:
    """Reads the newest readable checkpoint of `folder` into `state`; leaves `state` alone if there is none at all.

    A damaged checkpoint is skipped with a warning. Raises `WeightsError` if all are damaged.
    """
    damage = ""
    for path in reversed(listed(folder)):
        try:
            return restore(state, path)
        except WeightsError as error:
            damage = str(error)
            warnings.warn(f"{damage}; trying the checkpoint before it", stacklevel=2)
    if damage:
        raise WeightsError(f"no checkpoint in {folder} can be read; the last one tried: {damage}; start a new run")


def restore(state: TrainState, path: Path) -> None:
    """Reads the checkpoint `path` into `state`. Raises `WeightsError`, and changes nothing, if it is cut or foreign."""
    try:
        # Older checkpoints have no word of skipped iterations: there were none.
        saved = {"skipped": 0, "skipped_in_a_row": 0, **read_json(path / "state.json")}
        counts = {name: int(saved[name]) for name in _COUNTS}
        modules, optimizers = [], []
        for place, (name, part) in enumerate(state.parts.items()):
            files = {kind: f"{name}{kind}" for kind in _KINDS} if "parts" in saved else _FIRST_FORMAT[place]
            for kind, module in _modules(part).items():
                weights = safetensors.torch.load_file(path / f"{files[kind]}.safetensors")
                _check_names(weights, module.state_dict())
                modules.append((module, weights))
            moments = safetensors.torch.load_file(path / f"{files['_optimizer']}.safetensors")
            optimizers.append((part.optimizer, _optimizer_state(part.optimizer, moments)))
    except (RacError, SafetensorError, OSError, KeyError, IndexError, TypeError, ValueError) as error:
        raise WeightsError(f"checkpoint {path} is damaged or of another recipe ({error})") from None
    for module, weights in modules:
        module.load_state_dict(_laid_out(weights, module))
    for optimizer, kept in optimizers:
        optimizer.load_state_dict({"state": kept, "param_groups": optimizer.state_dict()["param_groups"]})
    for name, count in counts.items():
        setattr(state, name, count)


def _modules(part: TrainedPart) -> dict[str, nn.Module]:
    """Returns the modules of a part that have weights, by the endings of their files' names."""
    return {"": part.module} if part.ema is None else {"": part.module, "_ema": part.ema}


def listed(folder: Path) -> list[Path]:
    """Returns the checkpoints in `folder`, oldest first."""
    return sorted(path for path in folder.glob("[0-9]*") if path.name.isdigit() and path.is_dir())


@contextmanager
def whole_folder(target: Path) -> Iterator[Path]:
    """Gives a temporary folder that becomes `target` when the block ends well, and vanishes otherwise.

    An older `target` is replaced. Raises `RacError` where the system refuses (a full disk, no permission).
    """
    make_folder(target.parent)
    # Fixed names: what a killed process left is cleared by the next one.
    coming, going = target.with_name(".coming"), target.with_name(".going")
    try:
        with explained(target):
            _settle(target, coming, going)
            coming.mkdir()
            yield coming
            for path in coming.rglob("*"):
                _sync(path)
            _sync(coming)
            if target.exists():
                os.replace(target, going)
            os.replace(coming, target)
            _sync(target.parent)
    finally:
        _settle(target, coming, going)


def _settle(target: Path, coming: Path, going: Path) -> None:
    """Clears what an interrupted replacement left; if it ended between the two renamings, the older folder returns."""
    if going.exists() and not target.exists():
        os.replace(going, target)
    for path in (coming, going):
        shutil.rmtree(path, ignore_errors=True)


def _sync(path: Path) -> None:
    """Waits until the disk holds `path`, so that a power cut cannot leave a name without its content."""
    if path.is_dir() and os.name == "nt":  # Windows does not open folders
        return
    handle = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    moments = optimizer.state_dict()["state"]
    return {f"{index}.{key}": value for index, values in moments.items() for key, value in values.items()}


def _optimizer_state(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> dict[int, dict[str, Tensor]]:
    parameters = optimizer.param_groups[0]["params"]
    moments: dict[int, dict[str, Tensor]] = {}
    for name, value in tensors.items():
        index, key = name.split(".")
        parameter = parameters[int(index)]
        if value.ndim and value.shape != parameter.shape:
            raise ValueError(f"optimizer.{name} has shape {tuple(value.shape)}, not {tuple(parameter.shape)}")
        # Laid out like the parameter: another layout could take another path through the arithmetic.
        if value.shape != parameter.shape:
            kept = value
        elif is_sharded(parameter):
            kept = alike(value, parameter)
        else:
            kept = torch.empty_like(parameter, dtype=value.dtype).copy_(value)
        moments.setdefault(int(index), {})[key] = kept.detach()
    return moments


def _laid_out(tensors: Mapping[str, Tensor], module: nn.Module) -> dict[str, Tensor]:
    """Returns whole tensors in the layout of those of `module`: spread over the processes, or not."""
    return {name: alike(tensors[name], own) for name, own in module.state_dict().items()}


def _check_names(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Raises an error for wrong names, ahead of `load_state_dict`, which would copy what fits before it complains."""
    wrong = [name for name in expected.keys() | found.keys() if _shape(found, name) != _shape(expected, name)]
    if wrong:
        raise ValueError(f"{len(wrong)} tensors do not fit, among them {min(wrong)}")


def _shape(tensors: dict[str, Tensor], name: str) -> tuple[int, ...] | None:
    return tuple(tensors[name].shape) if name in tensors else None
