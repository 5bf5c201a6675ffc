"""Dataclasses to JSON and back, strictly."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import pytest

from rac.coders.rac import RACConfig
from rac.config import from_json, read_json, to_json
from rac.errors import RacError
from rac.fields import LdmFieldConfig, TinyFieldConfig
from rac.latents import LatentSpec


@dataclass(frozen=True)
class Inner:
    pair: tuple[int, int] = (1, 2)
    name: str | None = None


@dataclass(frozen=True)
class Outer:
    inner: Inner = field(default_factory=Inner)
    where: Path = Path("a/b")
    kind: Literal["x", "y"] = "x"
    rate: float = 3e-4
    many: tuple[float, ...] = ()


@pytest.mark.parametrize(
    "config",
    [
        Outer(),
        Outer(Inner((3, 4), "n"), Path("/tmp/c"), "y", 0.1 + 0.2, (1.5, 2.0)),
        RACConfig(LatentSpec(8, 4, 16), LdmFieldConfig.scaled(0.1), spread="nearest"),
        RACConfig(
            LatentSpec(2, 3, statistics="0123456789abcdef"),
            TinyFieldConfig(widths=(4, 4), blocks=(0, 1), taesd_range=True),
            contraction="projector",
            teacher="a/b",
        ),
    ],
    ids=["defaults", "changed", "ldm", "tiny"],
)
def test_round_trip_through_text(config):
    data = json.loads(json.dumps(to_json(config)))
    assert from_json(type(config), data) == config


def test_fields_are_told_apart_by_their_kind():
    data = to_json(RACConfig(LatentSpec(8, 4), TinyFieldConfig()))
    data["field"] = {"kind": "ldm", "widths": [8, 8, 8, 8], "groups": 8}
    assert from_json(RACConfig, data).field == LdmFieldConfig(widths=(8, 8, 8, 8), groups=8)


def edited(**changes: object) -> dict:
    return {**to_json(RACConfig(LatentSpec(8, 4), TinyFieldConfig())), **changes}


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (edited(colour="red"), "colour"),
        (edited(field={"kind": "wavelet"}), "kind 'wavelet' is not known; expected one of tiny, ldm"),
        (edited(field={"kind": "tiny", "wdths": [1]}), "wdths"),
        (edited(field=None), "kind None"),
        (edited(spread="wide"), "spread"),
        (edited(spec={"factor": 8}), "channels"),
        (edited(spec={"factor": 8, "channels": 4, "side": 0}), "side 0"),
        (edited(steps="many"), "steps"),
        ({}, "spec"),
        (None, "settings"),
        ([1], "settings"),
        ("text", "settings"),
    ],
)
def test_what_does_not_fit_is_named(data, said):
    with pytest.raises(RacError, match="settings does not fit") as caught:
        from_json(RACConfig, data, "settings")
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_reading_json(tmp_path):
    good, bad, binary = tmp_path / "good.json", tmp_path / "bad.json", tmp_path / "binary.json"
    good.write_text('{"a": 1}')
    bad.write_text('{"a": ')
    binary.write_bytes(b"\xff\xfe\x00\x01")
    assert read_json(good) == {"a": 1}
    for path, said in ((bad, "not readable JSON"), (binary, "not readable JSON"), (tmp_path / "no.json", "not exist")):
        with pytest.raises(RacError, match=said):
            read_json(path)
    with pytest.raises(RacError):
        read_json(tmp_path)


def test_what_does_not_fit_is_said_in_plain_words():
    data = edited(colour="red", steps="many", spread="wide", spec={"factor": 8})
    with pytest.raises(RacError) as caught:
        from_json(RACConfig, data, "config.json")
    assert str(caught.value) == (
        "config.json does not fit: spec.channels is missing; spread: expected one of nearest, centre, shuffle, beside; "
        "steps: expected a whole number, not 'many'; unknown keys, colour"
    )
