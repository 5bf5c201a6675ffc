"""Tiles: how far a network looks, and that what is put together is what the whole image gives."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import rac
from rac.coders.klvae import KLVAEConfig
from rac.coders.protocol import Coder
from rac.coders.rac import RAC
from rac.coders.taesd import TAESD, TAESDConfig
from rac.coders.tiling import exact, seam, sliced, tiled
from rac.errors import RacError
from rac.fields import LdmFieldConfig, TinyFieldConfig
from rac.fields.tiling import Tiling, in_tiles, reach
from rac.flow import Euler, FixedPoint, Heun, ReversibleHeun
from rac.states import image_of

# ------------------------------------------------------------------------------------------------ how far it looks


class Skip(nn.Module):
    """A U-Net of two resolutions: stride 2 down, nearest up, beside a wider look at full resolution."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Conv2d(3, 4, 3, stride=2, padding=1)
        self.low = nn.Conv2d(4, 4, 5, padding=2)
        self.up = nn.Sequential(nn.Upsample(scale_factor=2), nn.Conv2d(4, 3, 3, padding=1))
        self.beside = nn.Conv2d(3, 3, 3, padding=3, dilation=3)

    def forward(self, x: Tensor) -> Tensor:
        return self.up(self.low(self.down(x)).relu()) + self.beside(x)


def conv(channels: int, kernel: int | tuple[int, int] = 3, out: int | None = None, **more: object) -> nn.Conv2d:
    return nn.Conv2d(channels, out or channels, kernel, padding="same", **more)


LOCAL: dict[str, tuple[nn.Module, int]] = {
    "nothing": (nn.Identity(), 1),
    "one convolution": (conv(3, 5), 1),
    "taller than wide": (conv(3, (9, 3)), 2),
    "dilated": (nn.Sequential(conv(3, dilation=4), nn.ReLU(), conv(3)), 4),
    "unshuffle and shuffle": (nn.Sequential(nn.PixelUnshuffle(2), conv(12), nn.Tanh(), nn.PixelShuffle(2)), 2),
    "transposed": (nn.Sequential(conv(3), nn.PixelUnshuffle(2), nn.ConvTranspose2d(12, 3, 4, stride=2, padding=1)), 2),
    "down": (nn.Sequential(nn.Conv2d(3, 4, 3, stride=2, padding=1), nn.ReLU(), conv(4)), 2),
    "down, up and beside": (Skip(), 2),
}


def disturbed(network: nn.Module, block: int) -> int:
    """The reach by brute force: change one block in the middle of an image and see what else changes."""
    network, blocks, middle = network.double(), 25, 12
    torch.manual_seed(1)
    before = torch.randn(1, 3, blocks * block, blocks * block, dtype=torch.float64)
    after = before.clone()
    own = slice(middle * block, (middle + 1) * block)
    after[..., own, own] += torch.randn(1, 3, block, block, dtype=torch.float64)
    with torch.no_grad():
        changed = (network(after) != network(before)).any(dim=1)[0].view(blocks, -1, blocks, made_of(network, block))
    rows, columns = changed.any(dim=3).any(dim=1).nonzero(as_tuple=True)
    return int(torch.cat([rows - middle, columns - middle]).abs().max())


def made_of(network: nn.Module, block: int) -> int:
    """Pixels on the side of a block in what the network gives."""
    with torch.no_grad():
        return network(torch.zeros(1, 3, block, block, dtype=torch.float64)).shape[-1]


@pytest.mark.parametrize("name", LOCAL)
def test_reach_is_what_a_disturbance_reaches(name):
    network, block = LOCAL[name]
    assert reach(network, nn.Module.__call__, 3, block) == disturbed(network, block)


def test_a_layer_of_zeros_hides_nothing():
    """Fields begin with one; the reach is that of the trained network."""
    network = nn.Sequential(conv(3), nn.Conv2d(3, 3, 1))
    nn.init.zeros_(network[1].weight)
    assert reach(network, nn.Module.__call__, 3, 1) == 1


class Pooled(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + x.mean(dim=(2, 3), keepdim=True)


class Attending(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(2).transpose(1, 2)
        return nn.functional.scaled_dot_product_attention(tokens, tokens, tokens).transpose(1, 2).view_as(x)


class Placed(nn.Module):
    """Adds a ramp over the image, so that it looks at one site and yet needs to know which."""

    def forward(self, x: Tensor) -> Tensor:
        return x + 0.01 * torch.linspace(-1, 1, x.shape[-1], dtype=x.dtype)


NOT_LOCAL = {
    "group norm": nn.Sequential(conv(4), nn.GroupNorm(2, 4)),
    "pooled": nn.Sequential(conv(4), Pooled()),
    "attention": nn.Sequential(conv(4), Attending()),
    "position": nn.Sequential(conv(4), Placed()),
}


@pytest.mark.parametrize("name", NOT_LOCAL)
def test_what_has_no_reach(name):
    assert reach(NOT_LOCAL[name], nn.Module.__call__, 4, 4) is None


def test_the_module_asked_stays_as_it_is(make_rac):
    field = make_rac(lively=0.1).field
    before = {name: tensor.clone() for name, tensor in field.state_dict().items()}
    assert reach(field, lambda asked, x: asked(x, x.new_zeros(len(x))), 4, 4)
    assert all(torch.equal(tensor, before[name]) for name, tensor in field.state_dict().items())


# ------------------------------------------------------------------------------------------------ putting together


@pytest.mark.parametrize("exactly", [True, False])
@pytest.mark.parametrize(("height", "width", "tile"), [(5, 17, 8), (8, 8, 8), (23, 9, 8), (40, 33, 12)])
def test_what_needs_no_neighbours_is_unchanged(height, width, tile, exactly):
    """The blending weights add up to 1 everywhere, and each tile lands in its place."""
    x = torch.randn(2, 3, 2 * height, 2 * width, dtype=torch.float64)
    seen: list[tuple[int, ...]] = []

    def function(part: Tensor, factor: float) -> Tensor:
        seen.append(tuple(part.shape[-2:]))
        return nn.functional.interpolate(factor * part, scale_factor=2)

    made = in_tiles(function, Tiling(tile, 2, exactly), 2, 4)(x, 3.0)
    torch.testing.assert_close(made, nn.functional.interpolate(3.0 * x, scale_factor=2), rtol=0, atol=1e-14)
    assert max(map(max, seen)) <= 2 * (tile + 4)
    assert len(seen) == -(-height // tile) * -(-width // tile)


@pytest.mark.parametrize("name", [name for name in LOCAL if name != "nothing"])
def test_tiles_of_local_networks_are_exact(name):
    network, block = LOCAL[name]
    network = network.double()
    x = torch.randn(1, 3, 40, 56, dtype=torch.float64)
    seen = reach(network, nn.Module.__call__, 3, block)
    out = made_of(network, block)
    with torch.no_grad():
        whole = network(x)
        made = in_tiles(network, Tiling(6, seen, True), block, out)(x)
        less = in_tiles(network, Tiling(6, seen - 1, True), block, out)(x)
    torch.testing.assert_close(made, whole, rtol=0, atol=1e-12)
    assert (less - whole).abs().max() > 1e-4  # every block of the margin is needed


# ------------------------------------------------------------------------------------------------ coders

SOLVERS = {
    "Euler": (Euler(), 3),
    "Heun": (Heun(), 2),
    "fixed point": (FixedPoint(Euler(), iterations=4), 2),
    "reversible": (ReversibleHeun(), 2),
}


@pytest.fixture
def local(make_rac) -> RAC:
    return make_rac(lively=0.05, contraction="projector").eval()


@pytest.mark.filterwarnings("ignore::rac.errors.ConvergenceWarning")
@pytest.mark.parametrize("name", SOLVERS)
@torch.no_grad()
def test_a_local_rac_in_tiles_is_exact(local, images, name):
    """For every solver and number of steps: the field is tiled, and not the way."""
    solver, steps = SOLVERS[name]
    image = images(2, 121, 90)
    pieces = tiled(local, tile=32)
    assert isinstance(pieces, RAC)
    assert exact(pieces)
    latent = local.encode(image, steps, solver)
    torch.testing.assert_close(pieces.encode(image, steps, solver), latent, rtol=0, atol=1e-5)
    there = Euler() if isinstance(solver, FixedPoint) else solver
    torch.testing.assert_close(
        pieces.decode(latent, steps, there), local.decode(latent, steps, there), rtol=0, atol=1e-5
    )
    torch.testing.assert_close(
        pieces.reconstruct(image, steps, solver), local.reconstruct(image, steps, solver), rtol=0, atol=1e-5
    )
    flow = pieces.trajectory(latent, steps, there)
    assert flow.evaluations == local.trajectory(latent, steps, there).evaluations
    assert torch.equal(image_of(flow.end), pieces.decode(latent, steps, there))


@pytest.mark.slow
@torch.no_grad()
def test_the_shipped_rac_in_tiles_is_exact():
    coder = rac.load("rac-64")
    latent = torch.randn(1, 4, 44, 61, generator=torch.Generator().manual_seed(0))
    pieces = tiled(coder, tile=128)
    assert exact(pieces)
    assert seam(coder, latent, tile=128, steps=2).largest < 1e-5
    assert isinstance(pieces, RAC)


@torch.no_grad()
def test_no_tile_is_larger_than_asked(local):
    """The network itself sees tiles and margins alone, whatever the image."""
    margin = 4 * reach(local.field, lambda asked, x: asked(x, x.new_zeros(len(x))), 4, 4)
    seen: list[int] = []
    local.field.register_forward_pre_hook(lambda _, args: seen.append(max(args[0].shape[-2:])))
    pieces = tiled(local, tile=32)
    seen.clear()  # of what measured the reach
    pieces.decode(torch.randn(1, 4, 64, 64), 1)
    assert max(seen) == 32 + 2 * margin < 256
    assert len(seen) > 60


def whole_image_coders(make_rac: Callable[..., RAC]) -> dict[str, Coder]:
    torch.manual_seed(0)
    ldm = LdmFieldConfig(widths=(8, 8, 8), layers_per_block=1, groups=4)
    position = TinyFieldConfig(widths=(8, 8, 8), blocks=(1, 1, 1), position=True)
    return {
        "KL-VAE": KLVAEConfig(widths=(8, 8, 8), latent_channels=4, norm_groups=4).build(),
        "TAEF2": TAESD(TAESDConfig(4, pooled=True, width=8)),
        "ldm field": make_rac(lively=0.02, field=ldm),
        "position": make_rac(lively=0.05, field=position),
    }


@torch.no_grad()
def test_other_coders_blend_and_the_seam_is_measured(make_rac):
    for name, coder in whole_image_coders(make_rac).items():
        coder.eval()
        latent = torch.randn(1, 4, 40, 24, generator=torch.Generator().manual_seed(0))
        side = 16 * coder.spec.factor
        pieces = tiled(coder, tile=side)
        assert not exact(pieces), name
        found = seam(coder, latent, tile=side)
        difference = (pieces.decode(latent) - coder.decode(latent)).abs()
        assert found == pytest.approx((float(difference.max()), float(difference.mean()))), name
        assert 0 < found.mean < found.largest, name
        assert found.mean < 0.5 * float(coder.decode(latent).std()), name
        # One tile is the image, and is left alone.
        assert seam(coder, latent, tile=40 * coder.spec.factor) == (0, 0), name


@torch.no_grad()
def test_blending_leaves_no_step_between_tiles(make_rac):
    """Where hard cuts jump by the difference of two tiles, blended ones go over bit by bit."""
    coder = whole_image_coders(make_rac)["KL-VAE"].eval()
    latent = torch.randn(1, 4, 16, 64, generator=torch.Generator().manual_seed(0))
    whole = coder.decode(latent)

    def jump(overlap: int) -> float:
        error = tiled(coder, tile=128, overlap=overlap).decode(latent) - whole
        return float((error[..., 128] - error[..., 127]).abs().mean())

    assert jump(64) < jump(0) / 3


@torch.no_grad()
def test_taesd_without_pooling_is_exact(images):
    torch.manual_seed(0)
    coder = TAESD(TAESDConfig(4, width=8)).eval()
    pieces, image = tiled(coder, tile=64), images(1, 200, 145)
    assert exact(pieces)
    latent = coder.encode(image)
    torch.testing.assert_close(pieces.encode(image), latent, rtol=0, atol=1e-5)
    torch.testing.assert_close(pieces.decode(latent), coder.decode(latent), rtol=0, atol=1e-5)
    torch.testing.assert_close(pieces.reconstruct(image), coder.reconstruct(image), rtol=0, atol=1e-5)
    assert not isinstance(pieces, RAC)


@torch.no_grad()
def test_slices_see_one_image_at_a_time(make_rac, images):
    image, seen = images(3, 32, 24), []
    for name, coder in {
        "local": make_rac(lively=0.05, contraction="projector"),
        **whole_image_coders(make_rac),
    }.items():
        coder.eval()
        network = coder.field if isinstance(coder, RAC) else coder.network.decoder
        network.register_forward_pre_hook(lambda _, args: seen.append(len(args[0])))
        pieces = sliced(coder)
        assert exact(pieces)
        latent = coder.encode(image)
        torch.testing.assert_close(pieces.encode(image), latent, rtol=0, atol=1e-5)
        whole = coder.decode(latent)
        seen.clear()
        torch.testing.assert_close(pieces.decode(latent), whole, rtol=0, atol=1e-5)
        assert set(seen) == {1}, name


@torch.no_grad()
def test_slices_of_tiles(local, images):
    pieces = sliced(tiled(local, tile=32))
    assert exact(pieces)
    torch.testing.assert_close(pieces.encode(images(2, 64, 64)), local.encode(images(2, 64, 64)), rtol=0, atol=1e-5)
    assert not exact(sliced(tiled(KLVAEConfig(widths=(8, 8), norm_groups=4).build(), tile=32)))


def test_files_are_those_of_the_original(local, tmp_path):
    for name, coder in (("rac", local), ("klvae", KLVAEConfig(widths=(8, 8), norm_groups=4).build())):
        rac.save(sliced(tiled(coder, tile=32)), tmp_path / name)
        again = rac.load(tmp_path / name)
        assert again.state_dict().keys() == coder.state_dict().keys()


@pytest.mark.parametrize(
    ("tile", "overlap", "message"),
    [(0, None, "tile 0"), (30, None, "tile 30"), (-8, None, "tile -8"), (32, 3, "overlap 3"), (32, 24, "too small")],
)
def test_bad_sizes_are_refused(make_rac, tile, overlap, message):
    coder = make_rac(field=TinyFieldConfig(widths=(8, 8, 8), blocks=(1, 1, 1), position=True))
    with pytest.raises(RacError, match=message):
        tiled(coder, tile, overlap)


def test_a_field_knows_its_time_in_every_tile(make_rac):
    """Further arguments reach each tile: another time gives another velocity, and the same in tiles."""
    coder = make_rac(lively=0.1)
    field = tiled(coder, tile=16).field
    state = torch.randn(2, 4, 48, 48)
    with torch.no_grad():
        for time in (torch.tensor([0.0, 0.7]), torch.tensor([1.0, 0.2])):
            torch.testing.assert_close(field(state, time), coder.field(state, time), rtol=0, atol=1e-5)
