"""A generator of latents makes on the GPU what it makes on the CPU, from the same seeds."""

from __future__ import annotations

import pytest
import torch

from rac.fields import SiTFieldConfig
from rac.generators.flow import FlowGenerator, FlowGeneratorConfig
from rac.generators.sampling import Sampling
from rac.latents import LatentSpec
from rac.runtime import reproducible


@pytest.mark.parametrize("style", ["layer", "rms"])
@pytest.mark.parametrize(
    "sampling", [Sampling(steps=4, guidance=2.0, interval=(0.2, 0.8)), Sampling(steps=4, method="sde")]
)
def test_samples_are_alike(style: str, sampling: Sampling, cuda: torch.device) -> None:
    torch.manual_seed(0)
    field = SiTFieldConfig(depth=2, width=32, heads=2, classes=3, style=style)
    generator = FlowGenerator(FlowGeneratorConfig(LatentSpec(8, 4), 8, field, ("a", "b", "c")))
    with torch.no_grad():
        for parameter in generator.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    generator.eval().requires_grad_(False)
    with reproducible():
        here = generator.sample([1, 2], [0, 2], sampling)
        there = generator.to(cuda).sample([1, 2], [0, 2], sampling)
    assert there.latent.device.type == cuda.type
    assert there.evaluations == here.evaluations
    torch.testing.assert_close(there.latent.cpu(), here.latent, rtol=1e-3, atol=1e-3)
