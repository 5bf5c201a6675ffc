"""The tab of `rac serve` that generates: its answers, and the tab through gradio's client."""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import rac
from rac import hub
from rac.coders.klvae import KLVAEConfig
from rac.coders.protocol import Coder
from rac.coders.rac import RAC
from rac.commands.serve import Shelf, makers_of
from rac.errors import RacError
from rac.evaluate.one_image import Loaded
from rac.fields import SiTFieldConfig
from rac.generators.flow import FlowGenerator, FlowGeneratorConfig
from rac.generators.sample import Source, Wanted
from rac.generators.sampling import Sampling
from rac.images import to_pixels
from rac.latents import LatentSpec
from rac.serve.generate import Generation, Maker
from rac.serve.guard import Limits
from rac.serve.page import build, serving

FIELD = SiTFieldConfig(depth=1, width=16, heads=2, patch=2, classes=2)


def generator_of(coder: Coder, classes: tuple[str, ...] = ("cat", "golf ball"), coder_name: str | None = None):  # type: ignore[no-untyped-def]
    torch.manual_seed(0)
    field = replace(FIELD, classes=len(classes))
    sampling = Sampling(steps=3, guidance=2.0 if classes else 1.0)
    generator = FlowGenerator(FlowGeneratorConfig(coder.spec, 4, field, classes, coder_name, sampling))
    with torch.no_grad():
        for parameter in generator.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return generator.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def coder(make_rac: Callable[..., RAC]) -> RAC:
    return make_rac(lively=0.05).eval()


@pytest.fixture(scope="module")
def makers(coder: RAC) -> dict[str, Maker]:
    torch.manual_seed(0)
    teacher = KLVAEConfig(widths=(8, 8, 8), latent_channels=4, norm_groups=4).build().eval()
    coders = {"rac": coder, "teacher": teacher}
    return {
        "sit": Maker("sit", generator_of(coder), coders),
        "bare": Maker("bare", generator_of(coder, ()), {"rac": coder}),
    }


@pytest.fixture
def generation(makers: dict[str, Maker]) -> Generation:
    return Generation(makers)


def pixels_of(answer: str) -> list[np.ndarray]:
    found = re.findall(r"src='data:image/png;base64,([^']+)'", answer)
    return [np.asarray(Image.open(io.BytesIO(base64.b64decode(one)))) for one in found]


GIVEN = ("sit", "golf ball", 5, 1.5, 2, "rac", 4)


def changed(place: int, value: object) -> tuple[object, ...]:
    return (*GIVEN[:place], value, *GIVEN[place + 1 :])


def test_images_are_those_of_rac_generate(generation: Generation, makers: dict[str, Maker], coder: RAC) -> None:
    answer = generation(*GIVEN) or ""
    sampling = replace(makers["sit"].generator.sampling, steps=2, guidance=1.5)
    source = Source(makers["sit"].generator, coder, sampling, rng_seed=5)
    walks = [coder.walk("decode", steps) for steps in (1, 2, 4)]
    (samples,) = source.samples([Wanted(0, 1), Wanted(1, 1)], 2, walks)
    expected = [to_pixels(images[number]) for number in range(2) for images in samples.images]
    shown = pixels_of(answer)
    assert len(shown) == len(expected) == 6
    assert all(np.array_equal(one, other) for one, other in zip(shown, expected, strict=True))
    for words in ("1 step<", "2 steps<", "4 steps<", "image 0", "image 1", "rac, 4 steps"):
        assert words in answer
    # Guided steps cost two evaluations, decoding one for each step.
    assert re.findall(r"<tr><td>([^<]*)</td><td>(\d+)</td>", answer) == [
        ("sit", "4"),
        ("rac, 1 step", "1"),
        ("rac, 2 steps", "2"),
        ("rac, 4 steps", "4"),
    ]


def test_the_last_column_is_what_was_asked_for(generation: Generation) -> None:
    assert len(pixels_of(generation(*changed(6, 1)) or "")) == 2
    answer = generation(*changed(6, 6.0)) or ""
    assert len(pixels_of(answer)) == 8
    assert "rac, 6 steps" in answer


def test_without_a_class_there_is_no_guidance(generation: Generation) -> None:
    for given in (changed(1, ""), changed(1, None), ("bare", "", *GIVEN[2:])):
        answer = generation(*given) or ""
        assert "the guidance is not used" in answer
        assert "<td>2</td>" in answer
    assert "not used" not in (generation(*GIVEN) or "")


def test_a_coder_without_a_flow_decodes_once(generation: Generation) -> None:
    answer = generation(*changed(5, "teacher")) or ""
    assert len(pixels_of(answer)) == 2
    assert "teacher decodes in one pass" in answer


def test_seeds_and_classes_make_other_images(generation: Generation) -> None:
    first = pixels_of(generation(*GIVEN) or "")
    assert all(np.array_equal(one, two) for one, two in zip(first, pixels_of(generation(*GIVEN) or ""), strict=True))
    for other in (changed(1, "cat"), changed(2, 6), changed(3, 3.0), changed(4, 3)):
        assert not np.array_equal(pixels_of(generation(*other) or "")[0], first[0])


@pytest.mark.parametrize("place", [2, 3, 4, 6])
def test_an_emptied_box_changes_nothing(generation: Generation, place: int) -> None:
    assert generation(*changed(place, None)) is None


@pytest.mark.parametrize(
    ("place", "value", "words"),
    [
        (0, "large", "there is no generator 'large' here; choose one of sit, bare"),
        (1, "zebra", "no class 'zebra'; classes are cat, golf ball"),
        (5, "taef2", "sit is not decoded by 'taef2' here; choose one of rac, teacher"),
        *((2, value, "is no seed; give a whole number from 0") for value in (2.5, -1, 2**31, 10**400, "1", [1])),
        *((3, value, "give a number from 0 to 10") for value in (-0.1, 10.5, float("nan"), float("inf"), "2")),
        *((4, value, "steps cannot be taken; give a whole number from 1 to 100") for value in (0, 2.5, 101, "3")),
        *((6, value, "give a whole number from 1 to 16") for value in (0, 1.5, 17, float("nan"), "3")),
    ],
)
def test_what_cannot_be_generated_is_refused(generation: Generation, place: int, value: object, words: str) -> None:
    with pytest.raises(RacError, match=re.escape(words)):
        generation(*changed(place, value))


def test_what_scrolls_or_moves_is_reached_by_the_keyboard(generation: Generation) -> None:
    answer = generation(*GIVEN) or ""
    for part in ("rac-pictures", "rac-table"):
        tags = re.findall(rf"<div class='{part}'[^>]*>", answer)
        assert tags, part
        assert all("tabindex='0'" in tag and "aria-label=" in tag for tag in tags), part


# ------------------------------------------------------------------------------------------ which generators


def test_generators_come_with_the_coders_that_fit(
    coder: RAC, make_rac: Callable[..., RAC], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.setattr(hub, "SHIPPED", tmp_path / "weights")
    torch.manual_seed(0)
    rac.save(KLVAEConfig(widths=(8, 8, 8), latent_channels=4, norm_groups=4).build(), tmp_path / "weights" / "at-once")
    rac.save(make_rac(spec=LatentSpec(4, 3)), tmp_path / "weights" / "other")
    rac.save(make_rac(ways=("encode",)), tmp_path / "weights" / "encoder")
    rac.save(coder, tmp_path / "own")
    generator_of(coder, coder_name=str(tmp_path / "own")).save(tmp_path / "weights" / "shipped")
    generator_of(coder, coder_name="gone").save(tmp_path / "mine")
    found = makers_of(str(tmp_path / "mine"), Shelf(None, "cpu"), "cpu")
    assert list(found) == ["mine", "shipped"]
    assert list(found["mine"].coders) == ["at-once"]
    assert "mine is shown without its own coder: there is no coder 'gone'" in capsys.readouterr().err
    # Those with a flow come first.
    assert list(found["shipped"].coders) == ["own", "at-once"]
    generator_of(make_rac(spec=LatentSpec(4, 5), state_channels=5)).save(tmp_path / "five")
    with pytest.raises(RacError, match="no coder here decodes the latents of the generator five; give one with --mod"):
        makers_of(str(tmp_path / "five"), Shelf(None, "cpu"), "cpu")
    with pytest.raises(RacError, match="holds no generator"):
        makers_of(str(tmp_path / "own"), Shelf(None, "cpu"), "cpu")


# ------------------------------------------------------------------------------------------ through gradio


@pytest.fixture(scope="module")
def page(makers: dict[str, Maker], coder: RAC):  # type: ignore[no-untyped-def]
    pytest.importorskip("gradio", reason="gradio, which makes the page, is not installed")
    return build(lambda _: Loaded("tiny", coder), ["tiny"], Limits(), makers=makers)


def test_there_is_a_tab_only_for_generators(page, coder: RAC) -> None:  # type: ignore[no-untyped-def]
    def tabs(blocks) -> list[str]:  # type: ignore[no-untyped-def]
        return [block.label for block in blocks.blocks.values() if block.get_block_name() == "tabitem"]

    assert tabs(page.blocks) == ["Steps", "Noisy latent", "Generate"]
    without = build(lambda _: Loaded("tiny", coder), ["tiny"], Limits())
    assert tabs(without.blocks) == ["Steps", "Noisy latent"]


def test_numbers_answer_the_keyboard(page) -> None:  # type: ignore[no-untyped-def]
    """gradio's `release` comes for the mouse alone, `change` for every way of setting a value."""
    kinds = {key: block.get_block_name() for key, block in page.blocks.blocks.items()}
    numbers = {key for key, kind in kinds.items() if kind in ("slider", "number")}
    events = {target for function in page.blocks.fns.values() for target in function.targets if target[0] in numbers}
    assert events == {(one, "change") for one in numbers}
    assert len(numbers) == 6


def test_another_generator_brings_its_own_classes_and_coders(page) -> None:  # type: ignore[no-untyped-def]
    choose = next(one.fn for one in page.blocks.fns.values() if one.fn is not None and one.fn.__name__ == "choose")
    classes, coders = choose("bare")
    assert [value for _, value in classes.choices] == [""]
    assert (classes.value, coders.value) == ("", "rac")
    classes, coders = choose("sit")
    assert [value for _, value in classes.choices] == ["", "cat", "golf ball"]
    assert [value for _, value in coders.choices] == ["rac", "teacher"]


def test_the_tab_answers_and_refuses(page, capfd) -> None:  # type: ignore[no-untyped-def]
    from gradio_client import Client

    with serving(page, "127.0.0.1", 0, Limits()) as url:
        client = Client(url, verbose=False, analytics_enabled=False)
        answer = str(client.predict(*GIVEN, api_name="/generate"))
        assert len(pixels_of(answer)) == 6
        assert "http" not in answer
        for given, words in (
            (changed(2, 2.5), "is no seed"),
            (changed(4, 0), "steps cannot be taken"),
            (changed(1, "zebra"), "no class 'zebra'"),
            (changed(5, "taef2"), "is not decoded by"),
        ):
            with pytest.raises(Exception, match=words):
                client.predict(*given, api_name="/generate")
        client.predict(*changed(3, None), api_name="/generate")
    assert "Traceback" not in capfd.readouterr().err
