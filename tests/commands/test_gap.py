"""`rac gap`: equal decoders have equal gaps, work goes on after an interruption, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import Colours, untrained_generator, untrained_rac

import rac
from rac.coders.klvae import KLVAEConfig
from rac.coders.rac import RAC
from rac.evaluate.gap import Decoder, GapExperiment
from rac.evaluate.gap_report import plot
from rac.evaluate.matched_sets import matched_sets
from rac.evaluate.resampling import Estimate
from rac.images import to_pixels
from rac.latents import Statistics

CLASSES = ("tench", "church", "golf ball")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, make_rac: Callable[..., RAC], images) -> Path:  # type: ignore[no-untyped-def]
    """Tiny generators, coders that fit them or do not, and pictures of two of their classes."""
    folder = tmp_path_factory.mktemp("gap")
    torch.manual_seed(0)
    teacher = KLVAEConfig(widths=(8, 8, 8), latent_channels=4, norm_groups=4).build()
    rac.save(teacher, folder / "teacher")
    rac.save(KLVAEConfig(widths=(8, 8, 8), latent_channels=4, norm_groups=4).build(), folder / "one-step")
    rac.save(make_rac(lively=0.05, spec=teacher.spec), folder / "rac")
    rac.save(make_rac(spec=teacher.spec, ways=("encode",)), folder / "encoder")
    rac.save(make_rac(spec=teacher.spec, ways=("decode",)), folder / "decoder")
    rac.save(make_rac(statistics=Statistics.of(0.0, 2.0)), folder / "scaled")
    rac.save(KLVAEConfig(widths=(8, 8), latent_channels=4, norm_groups=4).build(), folder / "other")
    untrained_generator(teacher.spec, CLASSES, str(folder / "teacher")).save(folder / "g")
    untrained_generator(teacher.spec, coder=str(folder / "teacher")).save(folder / "bare")
    untrained_generator(teacher.spec, CLASSES).save(folder / "alone")
    for k in range(20):
        path = folder / "data" / ("n01440764", "n03028079")[k % 2] / f"{k}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        rac.write_image(images(1, 20, 18, k), path)
    return folder


@pytest.fixture
def judge(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Colours:
    """Colours, in place of both networks."""
    (tmp_path / "weights").write_bytes(b"weights")
    judge = Colours(tmp_path / "weights")
    monkeypatch.setattr("rac.commands.gap.load_extractor", lambda name: judge)
    monkeypatch.setattr("rac.commands.gap.RESAMPLES", 20)
    return judge


ASKED = ("--classes", "tench", "church", "--judges", "inception-768", "--batch", 2, "--decode-steps", 1, 2)


def gap(run, folder: Path, out: Path, *options: object, model: str = "g"):  # type: ignore[no-untyped-def]
    return run("gap", folder / model, "--data", folder / "data", "--out", out, *ASKED, *options)


def told(out: Path) -> dict:  # type: ignore[type-arg]
    return json.loads((out / "gap.json").read_text())


def rows(out: Path, metric: str) -> dict:  # type: ignore[type-arg]
    return {row["decoder"]: row for row in told(out)["rows"] if row["metric"] == metric}


def test_every_decoder_decodes_every_kind(run, folder: Path, tmp_path: Path, judge: Colours) -> None:  # type: ignore[no-untyped-def]
    out = tmp_path / "out"
    ran = gap(run, folder, out, "--coders", folder / "rac", folder / "one-step", "--guidance", 2)
    assert ran.code == 0, ran
    found = told(out)
    metrics = list(dict.fromkeys(row["metric"] for row in found["rows"]))
    assert metrics == ["KID-colours", "FID-colours", "accuracy by inception-768"]
    decoders = ["teacher", "rac, 1 step", "rac, 2 steps", "one-step"]
    assert list(rows(out, "KID-colours")) == decoders
    assert (found["count"], found["size"], found["classes"]) == (10, 16, ["tench", "church"])
    for metric in ("KID-colours", "accuracy by inception-768"):
        for row in rows(out, metric).values():
            assert list(row["values"]) == ["reconstructed", "sigma 0.1", "sigma 0.3", "generated"]
            loss = row["values"]["generated"]["value"] - row["values"]["reconstructed"]["value"]
            assert row["gap"]["value"] == pytest.approx(-loss if "accuracy" in metric else loss)
            assert row["gap"]["low"] <= row["gap"]["value"] <= row["gap"]["high"]
    by_kernel = rows(out, "KID-colours")
    teachers = by_kernel["teacher"]["gap"]["value"]
    for row in by_kernel.values():
        assert row["ratio"]["value"] == pytest.approx(row["gap"]["value"] / teachers)
    assert by_kernel["one-step"]["ratio"]["value"] != pytest.approx(1.0, abs=0.01)
    # Four decoders of four kinds, originals and references.
    assert judge.seen == 10 * (4 * 4 + 2)
    assert {path.name for path in out.glob("gap.*")} == {"gap.json", "gap.md", "gap.png"}
    assert (out / "pictures.png").stat().st_size > 1000
    text = (out / "gap.md").read_text(encoding="utf-8")
    assert "KID-colours x 1000, rac, 2 steps" in text
    assert "guidance 2" in text


def test_the_teacher_named_twice_is_one_decoder(run, folder: Path, tmp_path: Path, judge: Colours) -> None:  # type: ignore[no-untyped-def]
    out = tmp_path / "out"
    ran = gap(run, folder, out, "--coders", folder / "rac", folder / "teacher", "--sigmas", 0)
    assert ran.code == 0, ran
    found = rows(out, "KID-colours")
    assert list(found) == ["teacher", "rac, 1 step", "rac, 2 steps"]
    assert found["teacher"]["ratio"] == {"value": 1.0, "low": 1.0, "high": 1.0}
    for row in found.values():
        assert row["values"]["sigma 0"] == row["values"]["reconstructed"]


def test_a_decoder_that_decodes_alike_has_the_same_gap(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "weights").write_bytes(b"weights")
    teacher, generator = rac.load(folder / "teacher"), rac.load_generator(folder / "g")
    sets = matched_sets([folder / "data"], [], generator, (0, 1), 8)
    # Under another name, the same weights are decoded and compared once more.
    decoders = (Decoder("teacher", teacher), Decoder("twin", rac.load(folder / "teacher")))
    experiment = GapExperiment(
        generator=generator,
        sampling=generator.sampling,
        encoder=teacher,
        decoders=decoders,
        sets=sets,
        judges={"colours": Colours(tmp_path / "weights")},
        sigmas=(),
        folder=tmp_path / "out",
    )
    experiment.enter(resume=False)
    assert experiment.work() == 8 * (2 + 2 * 2)
    result = experiment.result(10)
    for metric in result.metrics:
        one, other = result.of(metric)
        assert (one.values, one.gap) == (other.values, other.gap)
        if one.gap.value != 0:
            assert (other.ratio.value, other.ratio.low, other.ratio.high) == (1.0, 1.0, 1.0)
    assert result.of("KID-colours")[0].gap.value != 0
    assert plot(result) is not None
    unknown = Estimate(float("nan"), float("nan"), float("nan"))
    assert plot(replace(result, rows=tuple(replace(row, gap=unknown, ratio=unknown) for row in result.rows))) is None


def test_each_image_is_decoded_from_noise_of_its_own(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "weights").write_bytes(b"weights")
    teacher, generator = rac.load(folder / "teacher"), rac.load_generator(folder / "g")
    decoder = Decoder("noisy", untrained_rac(0.05, spec=teacher.spec, spread="beside", seed_noise=1.0))
    experiment = GapExperiment(
        generator=generator,
        sampling=generator.sampling,
        encoder=teacher,
        decoders=(decoder,),
        sets=matched_sets([folder / "data"], [], generator, (0, 1), 4),
        judges={"colours": Colours(tmp_path / "weights")},
        sigmas=(),
        folder=tmp_path / "out",
    )
    experiment.enter(resume=False)
    experiment.work()
    (part,) = experiment.sets.source.batches(4)
    with torch.no_grad():
        latent = teacher.encode(part.images)
        expected = decoder.coder.decode(latent, noise=decoder.coder.noise_of(latent, part.names, 0))
    shown = experiment.kept(f"reconstructed-{decoder.key}", "pictures")
    assert shown is not None
    assert np.array_equal(shown.numpy(), np.stack([to_pixels(image) for image in expected]))


def test_it_is_broken_off_and_goes_on(run, folder, tmp_path, judge, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    assert gap(run, folder, tmp_path / "whole", "--count", 6, "--coders", folder / "rac").code == 0
    whole = judge.seen
    forward, left = Colours.forward, 9

    def interrupted(self: Colours, image: torch.Tensor):  # type: ignore[no-untyped-def]
        nonlocal left
        left -= 1
        if left < 0:
            raise KeyboardInterrupt
        return forward(self, image)

    out = tmp_path / "out"
    monkeypatch.setattr(Colours, "forward", interrupted)
    ran = gap(run, folder, out, "--count", 6, "--coders", folder / "rac")
    assert ran.code == 130
    assert "the same command with --resume goes on" in ran.err
    monkeypatch.setattr(Colours, "forward", forward)
    judge.seen = 0
    again = gap(run, folder, out, "--count", 6, "--coders", folder / "rac")
    assert (again.code, again.err.count("\n")) == (2, 1)
    assert "holds a measurement; --resume goes on with it" in again.err
    assert gap(run, folder, out, "--count", 6, "--coders", folder / "rac", "--resume").code == 0
    assert judge.seen == whole - 9 * 2
    assert told(out)["rows"] == told(tmp_path / "whole")["rows"]
    other = gap(run, folder, out, "--count", 6, "--resume", "--guidance", 3)
    assert other.code == 2
    assert "was begun otherwise: sampling.guidance 3.0, was 1.0" in other.err
    turned = gap(run, folder, out, "--count", 6, "--resume", "--classes", "church", "tench")
    assert "was begun otherwise: classes" in turned.err
    judge.seen = 0
    assert gap(run, folder, out, "--count", 5, "--coders", folder / "rac", "--resume").code == 0
    assert judge.seen == 0
    assert told(out)["count"] == 5


def test_decoders_sigmas_and_images_are_added(run, folder, tmp_path, judge) -> None:  # type: ignore[no-untyped-def]
    out = tmp_path / "out"
    assert gap(run, folder, out, "--count", 4, "--coders", folder / "rac", "--sigmas", 0.1).code == 0
    latent = next((out / "kept" / "latents").iterdir())
    before, judge.seen = latent.stat().st_mtime_ns, 0
    asked = ("--count", 7, "--coders", folder / "rac", folder / "one-step", "--sigmas", 0.1, 0.2, "--resume")
    assert gap(run, folder, out, *asked).code == 0
    assert latent.stat().st_mtime_ns == before
    assert judge.seen == 7 * (2 + 4 * 4) - 4 * (2 + 3 * 3)
    assert gap(run, folder, tmp_path / "at-once", *asked[:-1]).code == 0
    assert told(out)["rows"] == told(tmp_path / "at-once")["rows"]


def test_a_generator_without_classes_and_other_references(run, folder, tmp_path, judge) -> None:  # type: ignore[no-untyped-def]
    options = ("--judges", "inception-768", "--sigmas", "0.5", "--count", 8, "--coders", folder / "one-step")
    data = ("--data", folder / "data" / "n01440764", "--reference", folder / "data" / "n03028079")
    ran = run("gap", folder / "bare", *data, *options, "--out", tmp_path / "out")
    assert ran.code == 0, ran
    assert "accuracy" not in str(told(tmp_path / "out")["rows"])
    assert told(tmp_path / "out")["reference"] == "n03028079"


# What is given beside the generator `g` and its data, and words of the one line. {} is the folder.
BAD: dict[str, tuple[tuple[object, ...], str]] = {
    "an unknown coder": (("--coders", "no-such"), "no coder 'no-such'"),
    "a coder of other latents": (("--coders", "{}/other"), "the generator's latents are not those of"),
    "statistics that do not fit": (("--coders", "{}/scaled"), "statistics"),
    "a coder that decodes nothing": (("--coders", "{}/encoder"), "trained to encode only"),
    "a teacher that encodes nothing": (("--teacher", "{}/decoder"), "trained to decode only"),
    "a generator as coder": (("--coders", "{}/g"), "a generator of latents, not a coder"),
    "a coder twice": (("--coders", "{}/rac", "{}/rac"), "is given twice"),
    "one image": (("--count", 1), "count 1 must be at least 2"),
    "more images than there are": (("--count", 11), "there are pictures for 2 to 10"),
    "noise below none": (("--sigmas", 0.1, -0.1), "sigma -0.1 must be a number from 0"),
    "noise that is no number": (("--sigmas", "nan"), "sigma nan"),
    "one sigma twice": (("--sigmas", 0.1, 0.1), "--sigmas names 0.1 twice"),
    "no decode steps": (("--decode-steps", 0), "steps 0 must be a whole number"),
    "nothing for a flow": (("--coders", "{}/rac", "--decode-steps"), "give at least one number of --decode-steps"),
    "no steps": (("--steps", 0), "steps 0"),
    "guidance that is no number": (("--guidance", "nan"), "guidance nan must be a finite number"),
    "an unknown class": (("--classes", "zebra"), "no class 'zebra'"),
    "one class twice": (("--classes", "church", "1"), "asked for twice"),
    "a class without pictures": (("--classes", "tench", "golf ball"), "has no pictures of the class golf ball"),
    "no judge": (("--judges",), "--judges needs at least one network"),
    "an empty batch": (("--batch", 0), "batch 0"),
    "an unknown device": (("--device", "gpu"), "device 'gpu' is unknown"),
    "no pictures": (("--data", "{}/nowhere"), "nowhere"),
    "references elsewhere": (("--reference", "{}/nowhere"), "nowhere"),
    "going on with nothing": (("--resume",), "holds nothing to go on with"),
    "results among the pictures": (("--out", "{}/data"), "choose"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_line_before_any_work(run, folder, tmp_path, judge, name: str) -> None:  # type: ignore[no-untyped-def]
    options, words = BAD[name]
    given = [str(one).replace("{}", str(folder)) for one in options]
    ran = gap(run, folder, tmp_path / "out", *given)
    assert ran.code == 2, ran
    assert ran.err.startswith("rac: error: "), ran.err
    assert ran.err.count("\n") == 1, ran.err
    assert words in ran.err
    assert judge.seen == 0
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("model", "options", "words"),
    [
        ("no-such", (), "no generator"),
        ("teacher", (), "holds no generator"),
        ("alone", (), "names no coder of its latents; give --teacher"),
        ("bare", ("--classes", "church"), "this generator knows no classes"),
    ],
)
def test_bad_generators_are_one_line(run, folder, tmp_path, judge, model, options, words) -> None:  # type: ignore[no-untyped-def]
    asked = ("--data", folder / "data", "--out", tmp_path / "out", *options)
    ran = run("gap", folder / model, *asked)
    assert (ran.code, ran.err.count("\n")) == (2, 1), ran
    assert words in ran.err


def test_a_coder_that_gives_nan_is_named(run, folder, tmp_path, judge, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    decoded = RAC.decoded

    def damaged(self: RAC, *given):  # type: ignore[no-untyped-def]
        found = decoded(self, *given)
        return found._replace(image=found.image * torch.nan)

    monkeypatch.setattr(RAC, "decoded", damaged)
    ran = gap(run, folder, tmp_path / "out", "--coders", folder / "rac")
    assert ran.code == 2
    assert "rac, 1 step gives NaN or infinite values" in ran.err
