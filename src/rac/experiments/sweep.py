"""Variants of a recipe: some of its fields, each at several values."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from difflib import get_close_matches
from itertools import product
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from ..errors import RacError
from ..recipes import Recipe

C = TypeVar("C")


@dataclass(frozen=True)
class Variant:
    """A recipe with some fields changed."""

    label: str
    """Changes as they were written, such as "spread=nearest, train.lr=1e-3"."""
    recipe: Recipe


@dataclass(frozen=True)
class Axis:
    """A field, by its dotted name, and the values it takes in turn, as texts and as values."""

    name: str
    values: Mapping[str, Any]


def read_axis(choice: str, recipe: Recipe) -> Axis:
    """Parses a choice such as "spread=nearest,shuffle" or "objective.steps=1:1,4:4", where colons join one tuple.

    Raises `RacError` for a field the recipe lacks, for values that are not of its type, and for fewer than two.
    """
    name, equals, listed = choice.partition("=")
    texts = listed.split(",")
    if not equals or len(texts) < 2:
        raise RacError(
            f"--vary {choice!r} is not a choice of values; write a field and its values, such as spread=nearest,shuffle"
        )
    kind = _kind(name, recipe)
    values: dict[str, Any] = {}
    for text in texts:
        value = _parsed(text, kind, name)
        if value in values.values():
            raise RacError(f"--vary {choice!r} has the value {text} twice; give each value once")
        values[text] = value
    return Axis(name, values)


def read_setting(choice: str, recipe: Recipe) -> tuple[str, Any]:
    """Parses a setting such as "train.lr=1e-3": a field's dotted name and its value.

    Raises `RacError` as `read_axis`.
    """
    name, equals, text = choice.partition("=")
    if not equals:
        raise RacError(f"{choice!r} sets nothing; write a field and its value, such as train.lr=1e-3")
    return name, _parsed(text, _kind(name, recipe), name)


def variants(recipe: Recipe, axes: Sequence[Axis]) -> list[Variant]:
    """Returns every combination of the axes' values; the last axis changes fastest.

    Raises `RacError` for a field that is varied twice and for combinations that a setting refuses, naming them.
    """
    names = [axis.name for axis in axes]
    if twice := [name for name in names if names.count(name) > 1]:
        raise RacError(f"{twice[0]} is varied twice; give all its values at once: --vary {twice[0]}=A,B,C")
    found = []
    for combination in product(*(axis.values.items() for axis in axes)):
        label = ", ".join(f"{name}={text}" for name, (text, _) in zip(names, combination, strict=True))
        settings = {name: value for name, (_, value) in zip(names, combination, strict=True)}
        try:
            found.append(Variant(label, changed(recipe, settings)))
        except RacError as error:
            raise RacError(f"{label}: {error}") from None
    return found


def changed(config: C, settings: Mapping[str, Any]) -> C:
    """Returns a dataclass with fields replaced, nested ones by dotted names.

    Each nested dataclass is rebuilt once, so that values which only fit together can change together.
    """
    own = {name: value for name, value in settings.items() if "." not in name}
    nested: dict[str, dict[str, Any]] = {}
    for name, value in settings.items():
        head, dot, rest = name.partition(".")
        if dot:
            nested.setdefault(head, {})[rest] = value
    inner = {head: changed(getattr(config, head), part) for head, part in nested.items()}
    return replace(config, **own, **inner)  # type: ignore[type-var]


def _kind(name: str, config: Any, path: str = "") -> Any:
    """Returns the type of the field `name`. Raises `RacError` if there is none, and for a group of fields."""
    head, dot, rest = name.partition(".")
    known = [field.name for field in fields(config)]
    if head not in known:
        near = get_close_matches(head, known, n=1)
        hint = f"did you mean {path}{near[0]}?" if near else f"there are {', '.join(path + name for name in known)}"
        raise RacError(f"the recipe has no field {path}{head}; {hint}")
    value = getattr(config, head)
    if is_dataclass(value):
        if not dot:
            inside = ", ".join(f"{path}{head}.{field.name}" for field in fields(value))
            raise RacError(f"{path}{head} is a group of fields; vary some of {inside}")
        return _kind(rest, value, f"{path}{head}.")
    if dot:
        raise RacError(f"{path}{head} is one value and has no field {rest}; vary {path}{head} itself")
    return get_type_hints(type(config))[head]


def _parsed(text: str, kind: Any, name: str) -> Any:
    """Returns `text` as a value of type `kind`. Raises `RacError` if it is none."""
    try:
        return _value(text.strip(), kind)
    except ValueError:
        raise RacError(f"{name} cannot be {text!r}; expected {_words(kind)}") from None


def _value(text: str, kind: Any) -> Any:
    """Returns `text` as a value of type `kind`. Raises `ValueError` if it is none."""
    origin, options = get_origin(kind), get_args(kind)
    if origin is Literal:
        return {str(option): option for option in options}[text] if text in map(str, options) else _refuse()
    if origin in (Union, UnionType):
        (inner,) = (option for option in options if option is not NoneType)
        return None if text.lower() == "none" else _value(text, inner)
    if origin is tuple:
        parts = text.split(":") if text else []
        kinds = [options[0]] * len(parts) if options[1:] == (...,) else list(options)
        return tuple(_value(part, inner) for part, inner in zip(parts, kinds, strict=True))
    if kind is bool:
        return {"true": True, "false": False}[text.lower()] if text.lower() in ("true", "false") else _refuse()
    if kind is float:
        return number if math.isfinite(number := float(text)) else _refuse()
    if not text or kind not in (int, str, Path):
        return _refuse()
    return kind(text)


def _refuse() -> Any:
    raise ValueError


def _words(kind: Any) -> str:
    """Returns the name of a type, for people."""
    origin, options = get_origin(kind), get_args(kind)
    if origin is Literal:
        return " or ".join(map(str, options))
    if origin in (Union, UnionType):
        return " or ".join("none" if option is NoneType else _words(option) for option in options)
    if origin is tuple:
        several = options[1:] == (...,)
        inner = f"{_words(options[0])}, and so on" if several else " and ".join(map(_words, options))
        return f"{inner}, joined by colons"
    names = {int: "a whole number", float: "a number", bool: "true or false", str: "a word", Path: "a path"}
    return names.get(kind, str(kind))
