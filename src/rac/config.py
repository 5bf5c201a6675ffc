"""Conversion of frozen dataclasses to JSON and back. Strict: an unknown or missing key is an error that names it."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path
from types import NoneType
from typing import Any, Literal, TypeVar, get_args, get_origin

import cattrs
from cattrs.v import format_exception

from .errors import RacError

T = TypeVar("T")

_converter = cattrs.Converter(forbid_extra_keys=True)
_converter.register_structure_hook(Path, lambda value, _: Path(value))
_converter.register_unstructure_hook(Path, str)


_KINDS = {bool: "true or false", int: "a whole number", float: "a number", str: "a text"}


def _exactly(*accepted: type) -> Callable[[Any, Any], Any]:
    """Returns a converter that accepts only these types: 2.7 is not a count, and "3" is not a number."""

    def structure(value: Any, cls: type) -> Any:
        if type(value) not in accepted:
            raise RacError(f"expected {_KINDS[cls]}, not {value!r}")
        return cls(value)

    return structure


_converter.register_structure_hook(bool, _exactly(bool))
_converter.register_structure_hook(int, _exactly(int))
_converter.register_structure_hook(float, _exactly(float, int))
_converter.register_structure_hook(str, _exactly(str))


def _is_tagged_union(cls: Any) -> bool:
    members = [member for member in get_args(cls) if member is not NoneType]
    return len(members) > 1 and all(is_dataclass(member) and "kind" in _defaults(member) for member in members)


def _defaults(cls: Any) -> dict[str, Any]:
    return {field.name: field.default for field in fields(cls)}


def _structure_tagged_union(cls: Any) -> Callable[[Any, Any], Any]:
    members = {_defaults(member)["kind"]: member for member in get_args(cls)}

    def structure(data: Any, _: Any) -> Any:
        kind = data.get("kind") if isinstance(data, dict) else None
        if kind not in members:
            raise RacError(f"kind {kind!r} is not known; expected one of {', '.join(members)}")
        return _converter.structure(data, members[kind])

    return structure


# Dataclasses that carry their name in `kind` (the fields' configurations) are told apart by it.
_converter.register_structure_hook_factory(_is_tagged_union, _structure_tagged_union)


def to_json(config: Any) -> dict[str, Any]:
    """Returns a dataclass as plain dicts, lists, strings and numbers; tuples become lists."""
    return json.loads(json.dumps(_converter.unstructure(config)))


def json_safe(data: Any) -> Any:
    """Returns the result of `to_json` with "inf" and "nan" for the numbers that JSON lacks; `from_json` reads them."""
    if isinstance(data, dict):
        return {key: json_safe(value) for key, value in data.items()}
    if isinstance(data, list):
        return [json_safe(value) for value in data]
    return str(data) if isinstance(data, float) and not math.isfinite(data) else data


def from_json(cls: type[T], data: Any, source: str = "config") -> T:
    """Builds a `cls` from the result of `to_json`.

    Raises `RacError` naming `source` and every key that does not fit.
    """
    if not isinstance(data, dict):
        raise RacError(f"{source} does not fit: expected the settings of a {cls.__name__}, not {data!r}")
    try:
        return _converter.structure(data, cls)
    except cattrs.BaseValidationError as error:
        reasons = cattrs.transform_error(error, format_exception=_reason)
        raise RacError(f"{source} does not fit: {'; '.join(map(_place_first, reasons))}") from None


def _reason(error: BaseException, cls: type | None) -> str:
    """Returns the reason of an error: the text of our own errors, plain words for those of cattrs."""
    if isinstance(error, RacError):
        return str(error)
    if isinstance(error, cattrs.ForbiddenExtraKeysError):
        return f"unknown keys, {', '.join(sorted(error.extra_fields))}"
    if isinstance(error, KeyError):
        return "is missing"
    if get_origin(cls) is Literal:
        return f"expected one of {', '.join(map(str, get_args(cls)))}"
    return format_exception(error, cls)


def _place_first(reason: str) -> str:
    """Returns a reason of cattrs, "REASON @ $.PLACE", as "PLACE: REASON"."""
    text, _, place = reason.rpartition(" @ $")
    place = place.lstrip(".")
    if text == "is missing":
        return f"{place} is missing"
    return f"{place}: {text}" if place else text


def read_json(path: Path) -> Any:
    """Parses a JSON file. Raises `RacError` naming the file if it is missing or not JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise RacError(f"{path} does not exist") from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise RacError(
            f"{path} is not readable JSON ({error}); restore it from a backup or save the coder again"
        ) from None


def free_on_resume(when: Callable[[Any], bool] = lambda config: True) -> dict[str, Any]:
    """Returns the metadata of a field that may change when a run is resumed.

    Such a field (a device) changes no result, or only by rounding. `when` says whether that holds for a given
    dataclass.
    """
    return {"free_on_resume": when}


def fixed(config: Any, data: Any) -> Any:
    """Returns the JSON `data` of a dataclass like `config`, without the fields that may change on resume."""
    if not is_dataclass(config) or not isinstance(data, dict):
        return data
    known = {field.name: field.metadata.get("free_on_resume", lambda config: False) for field in fields(config)}
    free = {name for name, is_free in known.items() if is_free(config)}
    # A run that was begun before a setting existed had its default, and goes on.
    since = {field.name: to_json(field.default) for field in fields(config) if field.default is not MISSING}
    kept = {name: value for name, value in {**since, **data}.items() if name not in free}
    return {name: fixed(getattr(config, name, None), value) for name, value in kept.items()}


def differences(ours: Any, theirs: Any, name: str = "") -> list[str]:
    """Returns the differences of two JSON values, such as "training.lr 0.001, was 0.0003"; dots join nested names."""
    if isinstance(ours, dict) and isinstance(theirs, dict):
        keys = [*ours, *(key for key in theirs if key not in ours)]
        return [d for k in keys for d in differences(ours.get(k), theirs.get(k), f"{name}.{k}" if name else k)]
    return [] if ours == theirs else [f"{name} {json.dumps(ours)}, was {json.dumps(theirs)}"]
