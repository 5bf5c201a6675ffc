"""Agreement with the authors' nano script, whose formulas are derived here once more, on their own.

What is written below stands on the paper's equations and on the description of the script's loss: its own loops over
time, its own indexing for the spreads, diffusers' DecoderTiny for the network. It shares no code with `rac`. One
deviation is deliberate: the script compares its teacher's decode, in [-1, 1], with an image in [0, 1]; we compare
like with like.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor, nn

from rac.coders.adapter import TinyCoder
from rac.coders.rac import RAC, RACConfig
from rac.fields import Projector
from rac.objectives.rac import Coding, rac_terms
from rac.recipes import RECIPES
from rac.states import contract, expand, image_of, image_state

NANO = RECIPES["nano"][1]
WEIGHTS = {
    "reconstruction": 1.0,
    "path_decode": 0.1,
    "path_encode": 0.1,
    "latent": 1.0,
    "state": 0.5,
    "pixel": 1.0,
    "round_trip": 1.0,
    "round_trip_state": 1.0,
}
PLACES = 1e-10
"""Largest difference allowed between two sums in float64; the claim is 1e-5."""


# ---------------------------------------------------------------------------------- the original's formulas


class OriginalField(nn.Module):
    """Blocks of 8 x 8 to channels, the time, two cosines of the place; then TAESD's decoder at four times its input."""

    def __init__(self) -> None:
        from diffusers.models.autoencoders.vae import DecoderTiny

        super().__init__()
        self.decoder = DecoderTiny(
            in_channels=4 * 64 + 1 + 2,
            out_channels=4,
            num_blocks=(3, 3, 3, 1),
            block_out_channels=(64, 64, 64, 64),
            upsampling_scaling_factor=2,
            act_fn="relu",
            upsample_fn="nearest",
        )

    def forward(self, state: Tensor, time: Tensor) -> Tensor:
        batch, channels, height, width = state.shape
        rows, columns = height // 8, width // 8
        blocks = state.reshape(batch, channels, rows, 8, columns, 8).permute(0, 1, 3, 5, 2, 4)
        y = torch.cos(torch.pi * (2 * torch.arange(rows) / (rows - 1) - 1)).to(state)
        x = torch.cos(torch.pi * (2 * torch.arange(columns) / (columns - 1) - 1)).to(state)
        place = 0.01 * torch.stack([x.expand(rows, columns), y.view(-1, 1).expand(rows, columns)])
        shown = [
            blocks.reshape(batch, channels * 64, rows, columns),
            time.view(batch, 1, 1, 1).expand(batch, 1, rows, columns),
            place.expand(batch, 2, rows, columns),
        ]
        return self.decoder(torch.cat(shown, 1))


class OriginalDownsampler(nn.Module):
    """Three strided convolutions with ReLU, 4 -> 40 -> 80 -> 80, and a 1 x 1 convolution to the latent."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(4, 40, 3, 2, 1)
        self.b = nn.Conv2d(40, 80, 3, 2, 1)
        self.c = nn.Conv2d(80, 80, 3, 2, 1)
        self.d = nn.Conv2d(80, 4, 1)

    def forward(self, state: Tensor) -> Tensor:
        return self.d(self.c(self.b(self.a(state).relu()).relu()).relu())


def with_pad(tensor: Tensor, channels: int) -> Tensor:
    """Further channels of 0.5."""
    whole = torch.full((tensor.shape[0], channels, *tensor.shape[2:]), 0.5, dtype=tensor.dtype)
    whole[:, : tensor.shape[1]] = tensor
    return whole


def spread_nearest(latent: Tensor, channels: int, factor: int) -> Tensor:
    """Site (y, x) holds the latent of block (y // f, x // f)."""
    height, width = latent.shape[-2] * factor, latent.shape[-1] * factor
    y, x = torch.arange(height) // factor, torch.arange(width) // factor
    return with_pad(latent, channels)[:, :, y][:, :, :, x]


def block_mean(state: Tensor, factor: int) -> Tensor:
    return torch.nn.functional.avg_pool2d(state, factor)


def spread_centre(latent: Tensor, channels: int, factor: int) -> Tensor:
    """Only the site in the middle of a block (row and column f // 2) holds the latent."""
    padded = with_pad(latent, channels)
    height, width = latent.shape[-2:]
    state = torch.full((latent.shape[0], channels, height * factor, width * factor), 0.5, dtype=latent.dtype)
    for y in range(height):
        for x in range(width):
            state[:, :, y * factor + factor // 2, x * factor + factor // 2] = padded[:, :, y, x]
    return state


def mse(one: Tensor, two: Tensor) -> Tensor:
    return ((one - two) ** 2).mean()


@dataclass
class Original:
    """The script's loss. `nodes` and `noise` are what it would draw, flow by flow, step by step."""

    velocity: Callable[[Tensor, Tensor], Tensor]
    spread: Callable[[Tensor], Tensor]
    contract: Callable[[Tensor], Tensor]
    teacher_decode: Callable[[Tensor], Tensor]
    channels: slice
    """The channels that the reconstruction and the round trips compare: all in v1, three in v1.1."""

    def flow(self, state: Tensor, nodes: list[float], noise: list[Tensor], backwards: bool) -> list[Tensor]:
        path = [state]
        steps = range(len(nodes) - 1)
        for count, i in enumerate(reversed(steps) if backwards else steps):
            low, high = nodes[i], nodes[i + 1]
            if noise:
                deviation = (state.flatten(1).var(dim=1, keepdim=True) ** 0.5).view(-1, 1, 1, 1)
                state = state + 0.05 * deviation * noise[count]
            time = torch.full((len(state),), high if backwards else low, dtype=state.dtype)
            change = (high - low) * self.velocity(state, time)
            state = state - change if backwards else state + change
            path.append(state)
        return path

    def path(self, states: list[Tensor], nodes: list[float], seed: Tensor, target: Tensor) -> Tensor:
        """`nodes` in the order in which the flow met them."""
        if len(states) < 3:
            return torch.zeros((), dtype=seed.dtype)
        line = torch.stack([seed + t * (target - seed) for t in nodes[1:-1]])
        return mse(torch.stack(states[1:-1]), line)

    def terms(self, image: Tensor, latent: Tensor, nodes: list[list[float]], noise: list[list[Tensor]]) -> dict:
        seed, target = self.spread(latent), with_pad(image, 4)
        decoded = self.flow(seed, nodes[0], noise[0], backwards=False)
        encoded = self.flow(target, nodes[1], noise[1], backwards=True)
        found = self.contract(encoded[-1])
        again = self.flow(self.spread(found), nodes[2], noise[2], backwards=False)[-1]
        again_state = self.flow(encoded[-1], nodes[3], noise[3], backwards=False)[-1]
        c = self.channels
        return {
            "reconstruction": mse(decoded[-1][:, c], target[:, c]),
            "path_decode": self.path(decoded, nodes[0], seed, target),
            "path_encode": self.path(encoded, nodes[1][::-1], seed, target),
            "latent": mse(found, latent),
            "state": mse(encoded[-1], seed),
            "pixel": mse(self.teacher_decode(found), image),
            "round_trip": mse(again[:, c], target[:, c]),
            "round_trip_state": mse(again_state[:, c], target[:, c]),
        }


# ---------------------------------------------------------------------------------- ours beside it


class Tape:
    """Stands in for `Draws`: noise from a list, so that both sides meet the same; grids from a generator."""

    def __init__(self, noise: list[Tensor], shared: torch.Generator) -> None:
        self.noise, self.shared, self.used = noise, shared, 0

    def rng_seed(self) -> int:
        self.used += 1
        return self.used - 1

    def normal(self, like: Tensor, rng_seed: int) -> Tensor:
        assert self.noise[rng_seed].shape == like.shape
        return self.noise[rng_seed]

    def integer(self, low: int, high: int) -> int:
        assert low == high
        return low


def copy_parameters(source: nn.Module, target: nn.Module) -> list[tuple[nn.Parameter, nn.Parameter]]:
    """Fill `target` from `source`, both having the same parameters in the same order; gives the pairs."""
    pairs = list(zip(source.parameters(), target.parameters(), strict=True))
    with torch.no_grad():
        for one, two in pairs:
            assert one.shape == two.shape
            two.copy_(one)
    return pairs


@pytest.fixture(scope="module")
def teacher() -> TinyCoder:
    from diffusers import AutoencoderTiny

    torch.manual_seed(3)
    network = AutoencoderTiny(
        encoder_block_out_channels=(8, 8, 8, 8),
        decoder_block_out_channels=(8, 8, 8, 8),
        num_encoder_blocks=(1, 1, 1, 1),
        num_decoder_blocks=(1, 1, 1, 1),
    )
    return TinyCoder(network).double().eval().requires_grad_(False)


@pytest.fixture(scope="module")
def ours(teacher) -> RAC:
    torch.manual_seed(0)
    config = RACConfig(teacher.spec, NANO.field, NANO.state_channels, NANO.spread, NANO.contraction)
    coder = RAC(config).double()
    with torch.no_grad():
        for parameter in coder.field.parameters():
            parameter.mul_(1.6)  # an untrained field hardly knows its input; agreement there would say little
    return coder


@pytest.fixture(scope="module")
def theirs(ours) -> tuple[OriginalField, OriginalDownsampler]:
    field, downsampler = OriginalField().double(), OriginalDownsampler().double()
    copy_parameters(ours.field, field)
    copy_parameters(ours.projector, downsampler)
    return field, downsampler


def near(one: Tensor, two: Tensor) -> None:
    torch.testing.assert_close(one, two, rtol=PLACES, atol=PLACES)


def test_the_preset_is_the_scripts():
    assert NANO.objective.weights.chosen() == WEIGHTS
    assert (NANO.spread, NANO.contraction, NANO.state_channels) == ("nearest", "projector", 4)
    assert NANO.objective.compare == "state"
    assert NANO.objective.steps == (4, 4)
    assert NANO.objective.random_grid
    assert NANO.objective.step_noise == 0.05
    assert (NANO.train.lr, NANO.train.betas, NANO.train.weight_decay) == (3e-4, (0.9, 0.99), 0.01)
    assert (NANO.data.size, NANO.train.batch, NANO.train.iterations) == (256, 16, 100_000)


# ---------------------------------------------------------------------------------- field, states


@pytest.mark.parametrize(("height", "width"), [(16, 16), (24, 32)])
def test_field(ours, theirs, height, width):
    state, time = 2 * torch.randn(3, 4, height, width, dtype=torch.float64), torch.tensor([0.0, 0.37, 1.0]).double()
    near(ours.field(state, time), theirs[0](state, time))


def test_field_in_single_precision(ours, theirs):
    state, time = torch.randn(2, 4, 32, 32), torch.tensor([0.2, 0.9])
    field, original = RAC(ours.config).field, OriginalField()
    copy_parameters(field, original)
    torch.testing.assert_close(field(state, time), original(state, time), rtol=0, atol=1e-5)


def test_projector(ours, theirs):
    state = torch.randn(2, 4, 16, 24, dtype=torch.float64)
    near(ours.contract(state), theirs[1](state))
    assert isinstance(ours.projector, Projector)


@pytest.mark.parametrize("channels", [4, 6])
@pytest.mark.parametrize("factor", [2, 3, 8])
def test_spreads_and_contractions(channels, factor):
    latent = torch.randn(2, 4, 3, 2, dtype=torch.float64)
    state = torch.randn(2, channels, 3 * factor, 2 * factor, dtype=torch.float64)
    nearest = {"factor": factor, "spread": "nearest"}
    centre = {"factor": factor, "spread": "centre"}
    assert torch.equal(expand(latent, state_channels=channels, **nearest), spread_nearest(latent, channels, factor))
    assert torch.equal(expand(latent, state_channels=channels, **centre), spread_centre(latent, channels, factor))
    near(contract(state, latent_channels=4, **nearest), block_mean(state, factor)[:, :4])
    middle = state[:, :4, factor // 2 :: factor, factor // 2 :: factor]
    assert torch.equal(contract(state, latent_channels=4, **centre), middle)


def test_image_state(images):
    image = images(2, 8, 16).double()
    assert torch.equal(image_state(image, 4), with_pad(image, 4))
    assert torch.equal(image_of(with_pad(image, 4)), image)


# ---------------------------------------------------------------------------------- the loss


@dataclass(frozen=True)
class Case:
    steps: int = 4
    random_grid: bool = False
    noisy: bool = False
    version: str = "v1"

    def __str__(self) -> str:
        grid, noise = "random" if self.random_grid else "even", "noisy" if self.noisy else "quiet"
        return f"{self.version}-K{self.steps}-{grid}-{noise}"


CASES = [
    Case(),
    Case(steps=1),
    Case(noisy=True),
    Case(random_grid=True),
    Case(steps=3, random_grid=True, noisy=True),
    Case(steps=2, random_grid=True, noisy=True, version="v1.1"),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_term_and_the_gradient_of_their_sum(case, ours, theirs, teacher, images):
    image = images(2, 16, 24).double()
    latent = teacher.encode(image)
    generator = torch.Generator().manual_seed(7)
    noise = [torch.randn(2, 4, 16, 24, generator=generator).double() for _ in range(4 * case.steps)]
    # A grid is 0, sorted uniform draws, 1, anew for each of the four flows.
    draws = torch.Generator().manual_seed(8)
    nodes = [
        [0.0, *torch.rand(case.steps - 1, generator=draws, dtype=torch.float64).sort().values.tolist(), 1.0]
        if case.random_grid
        else [k / case.steps for k in range(case.steps + 1)]
        for _ in range(4)
    ]
    later = case.version == "v1.1"

    objective = replace(
        NANO.objective,
        steps=(case.steps, case.steps),
        random_grid=case.random_grid,
        step_noise=0.05 if case.noisy else 0.0,
        compare="image" if later else "state",
    )
    states = replace(ours.states, spread="centre" if later else "nearest")
    contraction = (lambda state: contract(state, states)) if later else ours.contract
    coding = Coding(ours.field, states, contraction, teacher.decode)
    tape = Tape(noise if case.noisy else [], torch.Generator().manual_seed(8))
    terms = rac_terms(coding, image, latent, objective, tape)
    assert tape.used == len(tape.noise)

    field, downsampler = theirs
    original = Original(
        velocity=field,
        spread=lambda latent: (spread_centre if later else spread_nearest)(latent, 4, 8),
        contract=(lambda state: state[:, :, 4::8, 4::8]) if later else downsampler,
        teacher_decode=lambda latent: teacher.network.decode(latent).sample,
        channels=slice(3) if later else slice(4),
    )
    each = [noise[i * case.steps : (i + 1) * case.steps] if case.noisy else [] for i in range(4)]
    expected = original.terms(image, latent, nodes, each)

    assert terms.keys() == expected.keys() == WEIGHTS.keys()
    for name in terms:
        near(terms[name], expected[name])
        without_interior = case.steps == 1 and name.startswith("path")
        assert terms[name].item() > 1e-4 or without_interior, f"{name} is next to nothing, so equality says nothing"

    def gradients(of: dict, *modules: nn.Module) -> list[Tensor]:
        parameters = [parameter for module in modules for parameter in module.parameters()]
        return list(torch.autograd.grad(sum(WEIGHTS[name] * of[name] for name in WEIGHTS), parameters))

    modules = ([ours.field], [field]) if later else ([ours.field, ours.projector], [field, downsampler])
    for one, two in zip(gradients(terms, *modules[0]), gradients(expected, *modules[1]), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-8, atol=1e-9)


def test_the_deviation_is_the_pixel_terms_range(ours, teacher, images):
    """The script's teacher answers in [-1, 1] and is compared with [0, 1]: a perfect answer would not score 0."""
    image = images(1, 16, 16).double()
    objective = replace(NANO.objective, weights=replace(NANO.objective.weights), random_grid=False, step_noise=0.0)
    coding = Coding(ours.field, ours.states, ours.contract, lambda latent: image)
    terms = rac_terms(coding, image, teacher.encode(image), objective, Tape([], torch.Generator()))
    assert float(terms["pixel"]) == 0
    assert float(mse(image, (image + 1) / 2)) > 0.1
