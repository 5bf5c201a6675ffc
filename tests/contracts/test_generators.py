"""The promises that every generator of latents keeps; a new one adds a line to `GENERATORS`."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny import untrained_dgae

import rac
from rac.coders.rac import RAC
from rac.errors import RacError, WeightsError
from rac.fields import DDTFieldConfig, SiTFieldConfig
from rac.generators.flow import FlowGenerator, FlowGeneratorConfig
from rac.generators.protocol import LatentGenerator
from rac.generators.sample import Source, Wanted
from rac.generators.sampling import Sampling
from rac.hub import GENERATORS as FORMATS
from rac.latents import LatentSpec, Statistics
from rac.runtime import derived_seed

CLASSES = ("cat", "Dog fish", "n01440764")
SPEC = LatentSpec(4, 4, statistics=Statistics.identity().hash())
FIELD = SiTFieldConfig(depth=2, width=16, heads=2, patch=2, classes=3)
WIDE = DDTFieldConfig(depth=2, width=16, heads=2, head_depth=1, head_width=24, head_heads=2, classes=3)
CONFIG = FlowGeneratorConfig(SPEC, 4, FIELD, CLASSES, "a-coder", Sampling(steps=3))


def flow_generator(config: FlowGeneratorConfig = CONFIG, rng_seed: int = 0) -> FlowGenerator:
    torch.manual_seed(rng_seed)
    generator = FlowGenerator(config)
    with torch.no_grad():
        for parameter in generator.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return generator.eval().requires_grad_(False)


GENERATORS: dict[str, Callable[[], LatentGenerator]] = {
    "sit": flow_generator,
    "sit, without classes": lambda: flow_generator(replace(CONFIG, field=replace(FIELD, classes=0), classes=())),
    "sit, rms": lambda: flow_generator(replace(CONFIG, field=replace(FIELD, style="rms", patch=1))),
    "ddt": lambda: flow_generator(replace(CONFIG, field=replace(WIDE, patch=2))),
}

METHODS = [
    Sampling(steps=4),
    Sampling(steps=4, method="heun", shift=2.0),
    Sampling(steps=4, method="sde"),
    Sampling(steps=4, guidance=2.0, interval=(0.0, 0.5)),
    Sampling(steps=3, method="sde", guidance=1.5, channels=3),
]


@pytest.fixture(params=GENERATORS.values(), ids=GENERATORS.keys())
def generator(request) -> LatentGenerator:
    return request.param()


def labels_of(generator: LatentGenerator, count: int) -> list[int] | None:
    return [k % len(generator.classes) for k in range(count)] if generator.classes else None


def possible(generator: LatentGenerator, sampling: Sampling) -> Sampling:
    """The settings, without guidance where there are no classes to be guided by."""
    return sampling if generator.classes else replace(sampling, guidance=1.0)


def test_latents_are_of_the_kind_it_names(generator):
    made = generator.sample([1, 2, 3], labels_of(generator, 3))
    assert made.latent.shape == (3, 4, 4, 4)
    generator.kind.spec.check(made.latent)
    assert made.evaluations == generator.sampling.steps
    assert made.latent.std() > 0.1
    assert generator.sample([1], labels_of(generator, 1), size=(6, 10)).latent.shape == (1, 4, 6, 10)


@pytest.mark.parametrize("sampling", METHODS)
def test_a_sample_does_not_know_its_batch(generator, sampling):
    sampling, seeds, labels = possible(generator, sampling), [5, 6, 7, 8], labels_of(generator, 4)
    together = generator.sample(seeds, labels, sampling).latent
    for k in range(4):
        alone = generator.sample(seeds[k : k + 1], labels and labels[k : k + 1], sampling).latent
        torch.testing.assert_close(alone, together[k : k + 1], rtol=1e-4, atol=5e-5)
    assert torch.equal(generator.sample(seeds, labels, sampling).latent, together)
    assert not torch.allclose(generator.sample([9, 6, 7, 8], labels, sampling).latent[0], together[0])


def test_evaluations_are_counted_at_the_network(generator):
    labels = labels_of(generator, 1)
    calls: list[int] = []
    counted = next(module for module in generator.children())
    counted.register_forward_hook(lambda *_: calls.append(1))
    for sampling in METHODS:
        calls.clear()
        made = generator.sample([1], labels, possible(generator, sampling))
        assert made.evaluations == len(calls)
    # Outside the interval a guided step costs one: times 0, .25 and .5 lie within.
    if labels:
        assert generator.sample([1], labels, METHODS[3]).evaluations == 4 + 3


def test_states_are_kept_where_they_are_asked_for(generator):
    made = generator.sample([1, 2], labels_of(generator, 2), keep_states=True)
    assert made.flow is not None
    assert len(made.flow.states) == generator.sampling.steps + 1
    assert torch.equal(made.flow.states[-1], made.latent)
    assert generator.sample([1, 2], labels_of(generator, 2)).flow.states == ()


def test_it_is_saved_and_loaded_bit_for_bit(generator, tmp_path):
    generator.save(tmp_path / "g")
    loaded = rac.load_generator(tmp_path / "g")
    assert type(loaded) is type(generator)
    assert (loaded.kind, loaded.sampling) == (generator.kind, generator.sampling)
    labels = labels_of(generator, 2)
    assert torch.equal(loaded.sample([1, 2], labels).latent, generator.sample([1, 2], labels).latent)
    assert not any(parameter.requires_grad for parameter in loaded.parameters())
    assert json.loads((tmp_path / "g" / "config.json").read_text())["format"] in FORMATS
    with pytest.raises(WeightsError, match="generator of latents, not a coder"):
        rac.load(tmp_path / "g")


def test_its_latents_fit_their_own_coder_alone(generator, make_rac: Callable[..., RAC]):
    generator.check_coder(make_rac(), "one")
    with pytest.raises(RacError, match="not those of other: channels 4, not 3"):
        generator.check_coder(make_rac(spec=LatentSpec(4, 3)), "other")
    scaled = make_rac(statistics=Statistics.of(0.0, 2.0))
    with pytest.raises(RacError, match=r"statistics .*, not .*; give a coder of its latents, such as a-coder"):
        generator.check_coder(scaled, "scaled")


@pytest.mark.parametrize(
    ("name", "label"),
    [("cat", 0), ("CAT", 0), ("dog fish", 1), ("dog-fish", 1), ("Dog_Fish", 1), ("1", 1), ("2", 2), ("n01440764", 2)],
)
def test_classes_are_found_by_name_and_number(name, label):
    assert flow_generator().label(name) == label


@pytest.mark.parametrize(
    ("name", "words"),
    [("dogfish", "did you mean Dog fish"), ("zebra", "classes are cat, Dog fish"), ("3", "0 to 2"), ("-1", "0 to 2")],
)
def test_unknown_classes_are_refused(name, words):
    with pytest.raises(RacError, match=words):
        flow_generator().label(name)


def test_what_cannot_be_sampled_is_refused():
    generator, bare = flow_generator(), GENERATORS["sit, without classes"]()
    other = flow_generator(replace(CONFIG, classes=("a", "b", "c")))
    for given, words in [
        ((generator, [], None), "no seeds"),
        ((generator, [1], [0, 1]), "2 labels do not fit 1 seeds"),
        ((generator, [1], [3]), "label 3 is none of 0 to 2"),
        ((generator, [1], [-1]), "label -1"),
        ((bare, [1], [0]), "knows no classes"),
        ((generator, [1], None, Sampling(guidance=2)), "without labels"),
    ]:
        with pytest.raises(RacError, match=words):
            given[0].sample(*given[1:])
    with pytest.raises(RacError, match="another kind: 3 classes"):
        generator.sample([1], [0], Sampling(guidance=2), weaker=other)
    with pytest.raises(RacError, match="0 x 4"):
        generator.sample([1], [0], size=(0, 4))
    with pytest.raises(RacError, match="multiples"):
        generator.sample([1], [0], size=(3, 4))


def test_guidance_goes_away_from_the_field_without_label_or_from_a_weaker_one():
    generator, weaker = flow_generator(), flow_generator(rng_seed=1)
    field, state, time = generator.field, torch.randn(1, 4, 4, 4), torch.zeros(1)
    torch.manual_seed(0)
    label, null = torch.tensor([1]), torch.tensor([3])
    start = generator.sample([4], [1], Sampling(steps=1), keep_states=True).flow.states[0]
    strong = field(start, time, condition=label)
    for other, weak in (
        (None, field(start, time, condition=null)),
        (weaker, weaker.field(start, time, condition=label)),
    ):
        made = generator.sample([4], [1], Sampling(steps=1, guidance=1.5), weaker=other).latent
        torch.testing.assert_close(made, start + weak + 1.5 * (strong - weak))
    three = generator.sample([4], [1], Sampling(steps=1, guidance=1.5, channels=3)).latent
    torch.testing.assert_close(three[:, 3:], (start + strong)[:, 3:])
    assert state.shape == start.shape


def test_classes_can_be_given_other_names():
    generator = flow_generator()
    twin = generator.renamed(("one", "two", "three"))
    assert twin.label("two") == 1
    assert generator.classes == CLASSES
    assert torch.equal(twin.sample([1], [1]).latent, generator.sample([1], [1]).latent)
    with pytest.raises(RacError, match="2 names do not fit"):
        generator.renamed(("one", "two"))


def test_images_are_those_of_the_latents_in_any_batch(make_rac: Callable[..., RAC]):
    generator, coder = flow_generator(), make_rac(lively=0.1).eval()
    source = Source(generator, coder, Sampling(steps=2, guidance=1.5), rng_seed=3)
    wanted = [Wanted(number, number % 3) for number in (0, 1, 2, 7, 8)]
    walks = [coder.walk("decode", steps) for steps in (1, 3)]
    whole = list(source.samples(wanted, 5, walks))
    cut = list(source.samples(wanted, 2, walks))
    assert [len(piece.wanted) for piece in cut] == [2, 2, 1]
    assert whole[0].evaluations == 4
    for k in range(2):
        together = torch.cat([piece.images[k] for piece in cut])
        assert together.shape == (5, 3, 16, 16)
        torch.testing.assert_close(together, whole[0].images[k], rtol=1e-4, atol=1e-5)
    latent = generator.sample([derived_seed(3, "sample", 7)], [1], source.sampling).latent
    torch.testing.assert_close(whole[0].latents[3:4], latent, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(whole[0].images[0][3:4], coder.decode(latent, 1), rtol=1e-4, atol=1e-4)


def test_each_image_is_decoded_from_noise_of_its_own() -> None:
    generator, coder = flow_generator(), untrained_dgae(0.05).eval()
    source = Source(generator, coder, Sampling(steps=1), rng_seed=3)
    wanted = [Wanted(number, number) for number in (0, 1, 2)]
    (whole,) = source.samples(wanted, 3)
    noise = coder.noise_of(whole.latents, (0, 1, 2), 3)
    assert noise is not None
    assert not torch.equal(noise[0], noise[1])
    torch.testing.assert_close(whole.images[0], coder.decode(whole.latents, noise=noise), rtol=1e-4, atol=1e-5)
    *_, last = source.samples(wanted, 2)
    torch.testing.assert_close(last.images[0], whole.images[0][2:], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"classes": ("a",)}, "1 names do not fit a field of 3 classes"),
        ({"classes": ("a", "b", "a")}, "'a' is there twice"),
        ({"side": 0}, "side 0"),
        ({"side": 5}, "multiple of the patch"),
    ],
)
def test_configurations_that_do_not_fit_are_refused(changes, words):
    with pytest.raises(RacError, match=words):
        replace(CONFIG, **changes)


def test_damaged_folders_are_refused(tmp_path: Path):
    flow_generator().save(tmp_path / "g")
    config = json.loads((tmp_path / "g" / "config.json").read_text())
    for change, words in [
        ({"version": 9}, "version 9"),
        ({"format": "other"}, "holds no generator"),
        ({"config": {**config["config"], "classes": ["a"]}}, "1 names"),
        ({"config": {**config["config"], "field": {**config["config"]["field"], "width": 20}}}, "shape"),
    ]:
        (tmp_path / "g" / "config.json").write_text(json.dumps({**config, **change}))
        with pytest.raises(WeightsError, match=words):
            rac.load_generator(tmp_path / "g")
    with pytest.raises(WeightsError, match="no generator 'none-such'"):
        rac.load_generator("none-such")
    with pytest.raises(WeightsError, match="holds no generator"):
        rac.load_generator("")
