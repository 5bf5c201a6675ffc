"""Names, orders and tables of comparisons, and that costs are counted as networks run."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from rac.evaluate.comparison import (
    Candidate,
    candidates,
    coding_cost,
    extremes,
    file_name,
    lower_is_better,
    metric_text,
    pick,
    short_name,
)
from rac.evaluate.cost import count, parameters
from rac.evaluate.image_sets import ImageSet, Preprocessing
from rac.evaluate.protocol import Protocol
from rac.evaluate.reconstruction import evaluate
from rac.report.document import Table

PROTOCOL = Protocol("tiny", Preprocessing(16, "centre"), metrics=("psnr",), steps=3)


@pytest.mark.parametrize(
    ("name", "short"),
    [
        ("rac-64", "rac-64"),
        ("runs/mine/coder", "mine"),
        ("weights/taef2_decoder.pth", "taef2"),
        ("stabilityai/sd-vae-ft-ema", "sd-vae-ft-ema"),
    ],
)
def test_short_names(name: str, short: str) -> None:
    assert short_name(name) == short


def test_names_of_files_and_figures() -> None:
    assert file_name("rac-64, 4 steps, teacher's latents") == "rac-64-4-steps-teacher-s-latents"
    assert [name for name in ("psnr", "lpips-alex", "rFID-768", "KID", "recall-768") if lower_is_better(name)] == [
        "lpips-alex",
        "rFID-768",
        "KID",
    ]
    assert metric_text("psnr", 30.126) == "30.13"
    assert metric_text("KID-768", -0.000123) == "-1.23e-04"
    assert metric_text("ssim", math.nan) == "-"


def test_costs_are_of_evaluations(make_rac, images) -> None:  # type: ignore[no-untyped-def]
    """A field's evaluation times steps times two ways, at the size after padding; midpoint takes two each."""
    coder = make_rac()
    one = count(coder.field, (1, 4, 20, 16), (1,)).macs
    candidate = Candidate(coder=coder, protocol=PROTOCOL, name="coder", title="coder")
    cost = coding_cost(candidate, images(1, 18, 16))
    assert (cost.macs_per_step, cost.decoding_macs, cost.macs) == (one, 3 * one, 6 * one)
    assert cost.parameters == parameters(coder)
    midpoint = coding_cost(replace(candidate, protocol=replace(PROTOCOL, solver="midpoint")), images(1, 18, 16))
    assert midpoint.macs == 2 * cost.macs


def test_entrants_reconstruct_as_they_are_judged(make_rac, images) -> None:  # type: ignore[no-untyped-def]
    """The pictures of a report show the images that its metrics are about."""
    coder = make_rac(lively=0.05).eval()
    references = ImageSet.of(images(4, 16, 16), "waves")
    (candidate,) = candidates({"a": coder}, PROTOCOL, steps=(2,))
    assert candidate.label == "a, 2 steps"
    exact = replace(candidate.protocol, rounded=False)
    result = evaluate(coder, references, exact, name="a")
    worst, best = extremes(result, 2)
    assert sorted([*worst, *best]) == [0, 1, 2, 3]
    image = pick(references, worst[:1])[worst[0]]
    from rac.evaluate.image_metrics import psnr

    lowest = min(result.per_image["psnr"])
    assert float(psnr(candidate.reconstruct(image, (result.images[worst[0]],)), image)) == pytest.approx(
        lowest, abs=1e-4
    )


def test_a_coder_without_a_flow_enters_once() -> None:
    from rac.coders.klvae import KLVAEConfig

    torch.manual_seed(0)
    teacher = KLVAEConfig(widths=(8, 8), latent_channels=4, norm_groups=4).build()
    (candidate,) = candidates({"t": teacher}, PROTOCOL, steps=(1, 2))
    assert (candidate.label, candidate.steps) == ("t", None)


def test_markdown_is_aligned_and_escaped() -> None:
    table = Table(("coder", "dB"), (("a|b", "1.00"), ("long name", "12.00")))
    assert table.to_markdown().splitlines() == [
        "| coder     |    dB |",
        "| --------- | ----: |",
        "| a\\|b      |  1.00 |",
        "| long name | 12.00 |",
    ]
