"""A coder of a family that the library does not have: a flow of the image's channels, and nothing learned."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rac.coders.protocol import Coded, Coder, Decoded, Keep, Network, Way
from rac.flow import Trajectory, Walk, integrate
from rac.latents import LatentSpec, Statistics
from rac.storage import fit_tensors, read_settings, read_weights, write_directory

FORMAT = "affine"
FACTOR = 4


class AffineField(nn.Module):
    """v(s, t) = rate s + (1 - t) offset, each channel by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.rate = nn.Parameter(torch.tensor([0.1, -0.2, 0.3]))
        self.offset = nn.Parameter(torch.tensor([0.1, 0.0, -0.1]))

    def forward(self, state: Tensor, time: Tensor) -> Tensor:
        """State B 3 H W and time B -> velocity B 3 H W."""
        rate, offset = (values.view(1, -1, 1, 1) for values in (self.rate, self.offset))
        return state * rate + (1 - time).view(-1, 1, 1, 1) * offset


class AffineCoder(Coder):
    """Pixels rearranged to 48 channels at 1/4 of the sides, with statistics for each channel and position."""

    def __init__(self, statistics: Statistics | None = None) -> None:
        ramp = torch.linspace(0.5, 1.5, 3 * FACTOR**2 * 4).view(-1, 2, 2)
        super().__init__(LatentSpec(FACTOR, 3 * FACTOR**2), statistics or Statistics.of(ramp - 1, ramp))
        self.field = AffineField()

    def default_steps(self, way: Way) -> int:
        return 3

    def _encode(self, image: Tensor, walk: Walk | None, keep: Keep) -> Coded:
        assert walk is not None
        flow = integrate(self.field, image, walk.grid, walk.solver, keep=keep)
        latent = self.statistics.normalise(F.pixel_unshuffle(flow.end, FACTOR))
        return Coded(latent, flow.evaluations, flow)

    def _decode(self, latent: Tensor, walk: Walk | None, noise: Tensor | None, keep: Keep) -> Decoded:
        assert walk is not None
        seed = F.pixel_shuffle(self.statistics.denormalise(latent), FACTOR)
        flow = integrate(self.field, seed, walk.grid, walk.solver, keep=keep)
        return Decoded(flow.end, flow.evaluations, flow)

    def state_round_trip(self, flow_back: Trajectory, walk_back: Walk) -> Tensor:
        walk = walk_back.inverse()
        return integrate(self.field, flow_back.end, walk.grid, walk.solver).end

    def networks(self) -> dict[str, Network]:
        return {"field": Network(self.field, lambda height, width: ((1, 3, height, width), (1,)), "both")}

    def _save(self, directory: Path, dtype: torch.dtype | None) -> None:
        statistics = {f"statistics.{name}": values for name, values in self.statistics.named_buffers()}
        write_directory(directory, {"format": FORMAT}, self.state_dict(), dtype=dtype, exact=statistics)

    @classmethod
    def load(cls, directory: str | Path) -> AffineCoder:
        """Reads what `save` wrote."""
        assert read_settings(Path(directory)) == {"format": FORMAT}
        tensors, source = read_weights(Path(directory))
        coder = cls(Statistics(*(tensors.pop(f"statistics.{name}") for name in ("shift", "scale"))))
        fit_tensors(coder, tensors, source)
        return coder
