"""What every coder promises, over a tiny one of each family. A new family adds one line to `FAMILIES`."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from sixth_family import FORMAT, AffineCoder
from tiny import smooth_images, untrained_dgae, untrained_rac
from torch import Tensor

import rac
from rac.coders.adapter import DeepCompressionCoder, TinyCoder
from rac.coders.klvae import KLVAE, KLVAEConfig
from rac.coders.protocol import WAYS, Coder, Way
from rac.coders.rae import RAE, RAEConfig, ViTDecoderConfig
from rac.coders.taesd import TAESD, TAESDConfig
from rac.coders.tiling import exact, sliced, tiled
from rac.errors import RacError
from rac.fields import LdmFieldConfig, LocalFieldConfig
from rac.flow import Euler, FixedPoint, Heun, TimeGrid, Walk
from rac.hub import LOADERS
from rac.latents import Statistics

PER_CHANNEL = Statistics.of([0.1, -0.2, 0.0, 0.3], [0.5, 1.0, 2.0, 1.5])
LDM = LdmFieldConfig(widths=(8, 8, 8), layers_per_block=1, groups=4)
LOCAL = LocalFieldConfig(widths=(8, 8), blocks=(1, 1), down=(8,), down_blocks=(0,), embedding=8)


def klvae() -> KLVAE:
    coder = KLVAEConfig(widths=(8, 8, 8), latent_channels=4, norm_groups=4).build()
    return KLVAE.from_config({**coder.config, "scaling_factor": 0.25, "shift_factor": 0.5})


def autoencoder_tiny() -> TinyCoder:
    widths = (8, 8, 8)
    config = {"encoder_block_out_channels": widths, "decoder_block_out_channels": widths}
    blocks = {"num_encoder_blocks": (1, 1, 1), "num_decoder_blocks": (1, 1, 1)}
    return TinyCoder.from_config({**config, **blocks, "latent_channels": 5, "scaling_factor": 2.0})


def deep_compression() -> DeepCompressionCoder:
    shared = {"latent_channels": 4, "attention_head_dim": 4, "scaling_factor": 0.5}
    encoder = {"encoder_block_out_channels": (8, 8), "encoder_layers_per_block": (1, 1)}
    decoder = {"decoder_block_out_channels": (8, 8), "decoder_layers_per_block": (1, 1)}
    blocks = {"encoder_block_types": ("ResBlock",) * 2, "decoder_block_types": ("ResBlock",) * 2}
    scales = {"encoder_qkv_multiscales": ((), ()), "decoder_qkv_multiscales": ((), ())}
    norms = {"decoder_norm_types": "rms_norm", "decoder_act_fns": "silu"}
    return DeepCompressionCoder.from_config({**shared, **encoder, **decoder, **blocks, **scales, **norms})


def rae() -> RAE:
    """Statistics for each position of a grid that no test uses alone, so that they are interpolated as well."""
    pytest.importorskip("efficientnet_lite_pytorch", reason="the metrics extra is not installed")
    coder = RAEConfig("efficientnet-lite0", ViTDecoderConfig(2, 16, 2, 32)).build()
    coder.fit_statistics([smooth_images(8, 32, 32, 1)])
    return coder


FAMILIES: dict[str, Callable[[], Coder]] = {
    "rac nearest": lambda: untrained_rac(0.05, statistics=PER_CHANNEL),
    "rac centre": lambda: untrained_rac(0.05, spread="centre", field=LDM),
    "rac shuffle": lambda: untrained_rac(0.05, spread="shuffle", steps=2),
    "rac beside": lambda: untrained_rac(0.05, spread="beside", field=LOCAL),
    "rac projector": lambda: untrained_rac(0.05, contraction="projector"),
    "rac seed noise": lambda: untrained_rac(0.05, spread="beside", seed_noise=0.3),
    "rac decode only": lambda: untrained_rac(0.05, ways=("decode",)),
    "dgae": lambda: untrained_dgae(0.05, statistics=PER_CHANNEL),
    "klvae": klvae,
    "taesd": lambda: TAESD(TAESDConfig(4, False, 8)),
    "taesd pooled": lambda: TAESD(TAESDConfig(4, True, 8)),
    "AutoencoderTiny": autoencoder_tiny,
    "AutoencoderDC": deep_compression,
    "rae": rae,
    "sixth": AffineCoder,
}
SIXTEEN = 16  # pixels: twice the largest factor
PIECES: dict[str, Callable[[], Coder]] = {
    "rac projector, tiled": lambda: tiled(FAMILIES["rac projector"](), SIXTEEN),
    "rac seed noise, tiled": lambda: tiled(FAMILIES["rac seed noise"](), SIXTEEN),
    "dgae, tiled": lambda: tiled(FAMILIES["dgae"](), SIXTEEN),
    "klvae, tiled": lambda: tiled(klvae(), SIXTEEN),
    "AutoencoderTiny, tiled": lambda: tiled(autoencoder_tiny(), SIXTEEN),
    "sixth, tiled": lambda: tiled(AffineCoder(), SIXTEEN),
    "sixth, tiled and sliced": lambda: sliced(tiled(AffineCoder(), SIXTEEN)),
}


def frozen(make: Callable[[], Coder]) -> Coder:
    torch.manual_seed(0)
    return make().eval().requires_grad_(False)


@pytest.fixture(scope="module", params=FAMILIES)
def family(request) -> Coder:
    return frozen(FAMILIES[request.param])


@pytest.fixture(scope="module", params=[*FAMILIES, *PIECES])
def coder(request) -> Coder:
    return frozen({**FAMILIES, **PIECES}[request.param])


def flows(coder: Coder) -> list[Way]:
    """The ways that are walked."""
    return [way for way in ("encode", "decode") if coder.walk(way) is not None]


def close(one: Tensor, two: Tensor) -> None:
    torch.testing.assert_close(one, two, rtol=0, atol=1e-5)


# ------------------------------------------------------------------------------------------------ sizes and batches


@pytest.mark.parametrize(("height", "width"), [(16, 16), (32, 48), (17, 30), (9, 11)])
def test_any_size_is_coded_and_comes_back(coder: Coder, height: int, width: int) -> None:
    image, factor = smooth_images(2, height, width), coder.spec.factor
    latent = coder.encode(image)
    assert latent.shape == (2, coder.spec.channels, -(-height // factor), -(-width // factor))
    decoded = coder.decode(latent)
    assert decoded.shape == (2, 3, latent.shape[-2] * factor, latent.shape[-1] * factor)
    again = coder.reconstruct(image)
    assert again.shape == image.shape
    close(again, decoded[..., :height, :width])
    assert {latent.dtype, decoded.dtype} == {torch.float32}


def test_an_image_does_not_depend_on_its_batch(coder: Coder) -> None:
    image = smooth_images(3, 24, 16)
    latent, decoded = coder.encode(image), coder.decode(coder.encode(image))
    for i in range(3):
        close(coder.encode(image[i : i + 1])[0], latent[i])
        close(coder.decode(latent[i : i + 1])[0], decoded[i])


def test_an_empty_batch_gives_an_empty_batch(coder: Coder) -> None:
    image = torch.zeros(0, 3, 17, 16)
    latent = coder.encode(image)
    assert latent.shape == (0, *coder.encode(torch.zeros(1, 3, 17, 16)).shape[1:])
    assert coder.reconstruct(image).shape == image.shape
    assert coder.coded(image).evaluations == coder.decoded(latent).evaluations == 0
    assert len(coder.moments(image)) == 0
    if "decode" in flows(coder):
        assert len(coder.trajectory(latent).end) == 0


@pytest.mark.parametrize("level", [-1.0, 1.0], ids=["black", "white"])
def test_a_black_and_a_white_square_come_back_in_range(coder: Coder, level: float) -> None:
    again = coder.reconstruct(torch.full((1, 3, 32, 32), level))
    assert torch.isfinite(again).all()
    assert float(again.abs().max()) < 8  # untrained, and yet in the range of images


# ------------------------------------------------------------------------------------------------ how ways are walked


def test_walks_are_answered_and_taken(coder: Coder) -> None:
    image = smooth_images(1, 16, 16)
    for way in ("encode", "decode"):
        own, number = coder.walk(way), coder.default_steps(way)
        assert (own is None) == (number is None)
        if own is None:
            assert coder.walk(way, 3, Heun()) is None
            continue
        assert own.steps == number
        assert own.solver == Euler()
        assert own.backwards == (way == "encode")
        three = coder.walk(way, 3, Heun(), shift=2.0)
        assert three is not None
        grid = TimeGrid.shifted(3, 2.0)
        assert three == Walk(grid.reversed() if way == "encode" else grid, Heun())
        assert coder.walk(way, TimeGrid.of((0, 0.2, 1))).grid.nodes in ((0, 0.2, 1), (1, 0.2, 0))  # type: ignore[union-attr]
        with pytest.raises(RacError, match="rising grid"):
            coder.walk(way, TimeGrid.of((1, 0.5, 0)))
    latent = coder.encode(image, walk=coder.walk("encode"))
    assert torch.equal(latent, coder.encode(image))
    assert torch.equal(coder.decode(latent, walk=coder.walk("decode")), coder.decode(latent))


def test_evaluations_are_counted_and_flows_returned(coder: Coder) -> None:
    image = smooth_images(2, 16, 16)
    back, there = coder.walk("encode", 2), coder.walk("decode", 3)
    coded = coder.coded(image, back)
    decoded = coder.decoded(coded.latent, there)
    assert torch.equal(coded.latent, coder.encode(image, walk=back))
    assert torch.equal(decoded.image, coder.decode(coded.latent, walk=there))
    for walk, evaluations, flow in ((back, *coded[1:]), (there, *decoded[1:])):
        assert evaluations == (1 if walk is None else walk.steps)
        assert (flow is None) == (walk is None)
        if flow is not None:
            assert (flow.evaluations, flow.states) == (evaluations, ())
    if back is not None:
        states = coder.encode_trajectory(image, walk=back)
        assert len(states.states) == 3
        assert torch.equal(states.states[0][:, :3], image)
    if there is not None:
        states = coder.trajectory(coded.latent, walk=there)
        assert len(states.states) == 4
        assert torch.equal(states.end[:, :3], decoded.image)


def test_steps_are_refused_where_there_are_none(coder: Coder) -> None:
    image = smooth_images(1, 16, 16)
    latent = coder.encode(image)
    calls = {
        "encode": (coder.encode, coder.encode_trajectory, image),
        "decode": (coder.decode, coder.trajectory, latent),
    }
    for way, (code, trajectory, given) in calls.items():
        if way in flows(coder):
            for wrong in (0, -1, 1.5):
                with pytest.raises(RacError, match="at least 1"):
                    code(given, wrong)
            with pytest.raises(RacError, match="the other direction"):
                code(given, walk=coder.walk(way).inverse())
        else:
            walk = Walk(TimeGrid.uniform(2))
            for wrong in ({"steps": 2}, {"solver": Heun()}, {"walk": walk}):
                with pytest.raises(RacError, match=f"{way}s in one pass"):
                    code(given, **wrong)
            with pytest.raises(RacError, match="no trajectory"):
                trajectory(given)
    if not flows(coder):
        with pytest.raises(RacError, match="in one pass"):
            coder.reconstruct(image, 2)


def test_a_fixed_point_is_undone_by_its_solver() -> None:
    walk = Walk(TimeGrid.uniform(3).reversed(), FixedPoint(Heun()))
    assert walk.inverse() == Walk(TimeGrid.uniform(3), Heun())
    assert (walk.steps, walk.backwards, walk.inverse().backwards) == (3, True, False)


def test_a_state_goes_back_and_forth_without_a_latent(coder: Coder) -> None:
    image, walk = smooth_images(1, 16, 16), coder.walk("encode", 64)
    if walk is None:
        with pytest.raises(RacError, match="no flow whose states"):
            coder.state_round_trip(None, Walk(TimeGrid.uniform(2).reversed()))  # type: ignore[arg-type]
        return
    flow = coder.coded(image, walk).flow
    assert flow is not None
    again = coder.state_round_trip(flow, walk)
    assert float((again - image).abs().max()) < 0.2
    assert float((again - image).abs().mean()) < 0.02


def test_noise_by_name_does_not_depend_on_the_batch(coder: Coder) -> None:
    latent = coder.encode(smooth_images(3, 16, 24))
    noise = coder.noise_of(latent, ("a", "b", 3), rng_seed=7)
    if coder.noise_shape(latent) is None:
        assert noise is None
        return
    assert noise is not None
    assert noise.shape == coder.noise_shape(latent)
    assert 0.9 < float(noise.std()) < 1.1
    assert not torch.equal(noise[0], noise[1])
    assert torch.equal(coder.noise_of(latent[1:2], ("b",), 7), noise[1:2])
    assert torch.equal(coder.noise_of(latent[:2], (3, "a"), 7), noise[[2, 0]])
    assert not torch.equal(coder.noise_of(latent[1:2], ("b",), 8), noise[1:2])
    together = coder.decode(latent, noise=noise)
    close(coder.decode(latent[1:2], noise=coder.noise_of(latent[1:2], ("b",), 7)), together[1:2])
    with pytest.raises(ValueError, match="zip"):
        coder.noise_of(latent, ("a",))


def test_noise_is_given_or_always_the_same(coder: Coder) -> None:
    latent = coder.encode(smooth_images(2, 16, 16))
    shape = coder.noise_shape(latent)
    if shape is None:
        with pytest.raises(RacError, match="leave out the noise"):
            coder.decode(latent, noise=torch.zeros(1))
        return
    assert shape[0] == 2
    assert torch.equal(coder.decode(latent), coder.decode(latent))
    one, two = (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in (1, 2))
    assert not torch.equal(coder.decode(latent, noise=one), coder.decode(latent, noise=two))
    close(coder.decode(latent, noise=one)[1:], coder.decode(latent[1:], noise=one[1:]))
    with pytest.raises(RacError, match="needs noise of shape"):
        coder.decode(latent, noise=one[..., :-1])


# ------------------------------------------------------------------------------------------------ moments


def test_moments_are_finished_to_latents(coder: Coder) -> None:
    image = smooth_images(2, 17, 16)
    moments, latent = coder.moments(image), coder.encode(image)
    assert moments.shape == (2, (2 if coder.has_posterior else 1) * coder.spec.channels, *latent.shape[-2:])
    if "encode" in flows(coder):
        close(coder.finish(moments), latent)
    else:
        assert torch.equal(coder.finish(moments), latent)
    noise = torch.randn(latent.shape, generator=torch.Generator().manual_seed(0))
    if coder.has_posterior:
        mean, log_variance = moments.chunk(2, dim=1)
        close(coder.finish(moments, noise), coder.statistics.normalise(mean + (0.5 * log_variance).exp() * noise))
    else:
        with pytest.raises(RacError, match="no posterior"):
            coder.finish(moments, noise)
    with pytest.raises(RacError, match="do not fit this coder"):
        coder.finish(moments[:, 1:])


def test_the_spec_carries_the_hash_of_the_statistics(coder: Coder) -> None:
    assert coder.spec.statistics == coder.statistics.hash()
    assert not [name for name in coder.state_dict() if name.startswith("statistics")]


# ------------------------------------------------------------------------------------------------ weights


def test_save_and_load_give_the_same_bits(coder: Coder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(LOADERS, FORMAT, AffineCoder.load)
    rac.save(coder, tmp_path)
    again, whole, image = rac.load(tmp_path), coder.whole, smooth_images(2, 16, 16)
    assert type(again) is type(coder)
    assert (again.spec, again.trained_ways, again.teacher) == (coder.spec, coder.trained_ways, coder.teacher)
    assert again.state_dict().keys() == whole.state_dict().keys()
    latent = whole.encode(image)
    assert torch.equal(again.encode(image), latent)
    assert torch.equal(again.decode(latent), whole.decode(latent))
    assert not again.training
    assert not any(parameter.requires_grad for parameter in again.parameters())


def test_narrowed_weights_keep_the_statistics(family: Coder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(LOADERS, FORMAT, AffineCoder.load)
    family.save(tmp_path, torch.bfloat16)
    assert rac.load(tmp_path).spec == family.spec
    assert copy.deepcopy(family).bfloat16().statistics.hash() == family.spec.statistics


def test_gradients_pass_through_a_frozen_coder(coder: Coder) -> None:
    image = smooth_images(1, 16, 16).requires_grad_()
    latent = coder.encode(image)
    latent.square().sum().backward()
    assert image.grad is not None
    assert float(image.grad.abs().sum()) > 0
    given = latent.detach().requires_grad_()
    coder.decode(given).square().sum().backward()
    assert given.grad is not None
    assert float(given.grad.abs().sum()) > 0
    assert all(parameter.grad is None for parameter in coder.parameters())


def test_networks_are_called_with_their_shapes(coder: Coder) -> None:
    networks = coder.networks()
    assert networks
    own = {id(module) for module in coder.modules()}
    for name, network in networks.items():
        assert id(network.module) in own, name
        assert network.way in (*WAYS, "both")
        abstract = copy.deepcopy(network.module).to("meta")
        shapes = network.shapes(32, 48)
        assert shapes[0][0] == 1
        assert abstract(*(torch.empty(shape, device="meta") for shape in shapes)).is_meta
    assert {way for network in networks.values() for way in (WAYS if network.way == "both" else {network.way})} == WAYS


def test_changed_networks_are_asked_and_weights_shared(family: Coder) -> None:
    asked: list[torch.nn.Module] = []

    class Spy(torch.nn.Module):
        def __init__(self, network: torch.nn.Module) -> None:
            super().__init__()
            self.network = network

        def forward(self, *args: Tensor) -> Tensor:
            asked.append(self.network)
            return self.network(*args)

    spied, image = family.with_networks(lambda network: Spy(network.module)), smooth_images(1, 16, 16)
    assert type(spied) is type(family)
    assert torch.equal(spied.reconstruct(image), family.reconstruct(image))
    assert set(asked) == {network.module for network in family.networks().values()}
    assert [p.data_ptr() for p in spied.parameters()] == [p.data_ptr() for p in family.parameters()]
    assert not any(isinstance(module, Spy) for module in family.modules())


def test_tiles_that_are_exact_make_the_whole(family: Coder) -> None:
    image, pieces = smooth_images(1, 70, 49), tiled(family, 16)
    latent = family.encode(image)
    if exact(pieces):
        close(pieces.encode(image), latent)
        close(pieces.decode(latent), family.decode(latent))
    close(sliced(family).decode(latent), family.decode(latent))


# ------------------------------------------------------------------------------------------------ what is refused


@pytest.mark.parametrize(
    ("image", "said"),
    [
        (torch.zeros(1, 3, 16, 16, dtype=torch.uint8), r"not torch.uint8; rac.images.from_pixels"),
        (torch.full((1, 3, 16, 16), 255.0), r"not 255; rac.images.from_pixels"),
        (torch.full((1, 3, 16, 16), math.nan), "not nan"),
        (torch.full((1, 3, 16, 16), math.inf), "not inf"),
        (torch.zeros(3, 16, 16), "B 3 H W"),
        (torch.zeros(1, 1, 16, 16), "B 3 H W"),
        (torch.zeros(1, 3, 1, 1), "too small"),
        (torch.zeros(1, 3, 0, 16), "too small"),
    ],
)
def test_what_is_no_image_is_refused(coder: Coder, image: Tensor, said: str) -> None:
    for call in (coder.encode, coder.moments, coder.coded, coder.reconstruct):
        with pytest.raises(RacError, match=said):
            call(image)


def test_what_is_no_latent_is_refused(coder: Coder) -> None:
    channels = coder.spec.channels
    for latent, said in (
        (torch.zeros(1, channels + 1, 2, 2), f"{channels + 1} channels"),
        (torch.zeros(channels, 2, 2), "4 dimensions"),
        (torch.zeros(1, channels, 2, 2, dtype=torch.int64), "floating-point"),
        (torch.full((1, channels, 2, 2), math.nan), "NaN"),
        (torch.zeros(1, channels, 0, 2), "0 x 2"),
    ):
        for call in (coder.decode, coder.decoded):
            with pytest.raises(RacError, match=said):
                call(latent)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_precisions_are_converted(coder: Coder, dtype: torch.dtype) -> None:
    image = smooth_images(1, 16, 16).to(dtype)
    latent = coder.encode(image)
    assert latent.dtype == torch.float32
    assert torch.equal(latent, coder.encode(image.float()))
    assert torch.equal(coder.decode(latent.to(dtype)), coder.decode(latent.to(dtype).float()))


# ------------------------------------------------------------------------------------------------ torch's transforms


def test_vmap_over_images_and_latents(family: Coder) -> None:
    image = smooth_images(3, 16, 16)
    latent = family.encode(image)
    close(torch.func.vmap(family.encode)(image.unsqueeze(1)).squeeze(1), latent)
    if family.noise_shape(latent) is None:
        close(torch.func.vmap(family.decode)(latent.unsqueeze(1)).squeeze(1), family.decode(latent))
    else:
        noise = torch.randn(family.noise_shape(latent), generator=torch.Generator().manual_seed(0))
        decode = torch.func.vmap(lambda one, drawn: family.decode(one, noise=drawn))
        close(decode(latent.unsqueeze(1), noise.unsqueeze(1)).squeeze(1), family.decode(latent, noise=noise))


def test_shapes_without_values(family: Coder) -> None:
    abstract = copy.deepcopy(family).to("meta")
    latent = abstract.encode(torch.empty(2, 3, 17, 16, device="meta"))
    assert latent.shape == family.encode(smooth_images(2, 17, 16)).shape
    shape = family.noise_shape(latent)
    noise = None if shape is None else torch.empty(shape, device="meta")
    assert abstract.decode(latent, noise=noise).is_meta


@pytest.mark.slow
@pytest.mark.parametrize("name", ["rac shuffle", "dgae", "klvae", "sixth"])
def test_each_way_compiles_as_one_graph(name: str) -> None:
    coder, image = frozen(FAMILIES[name]), smooth_images(1, 16, 16)
    latent = coder.encode(image)
    decode = partial(coder.decode, noise=coder.noise_of(latent, (0,)))  # noise that is given: generators do not compile
    for function, given in ((coder.encode, image), (decode, latent)):
        torch._dynamo.reset()
        assert torch.equal(torch.compile(function, fullgraph=True, backend="eager")(given), function(given))
