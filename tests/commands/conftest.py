"""Coders and photographs for the command line: tiny, random, saved to disk."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

import rac
from rac.cli import main
from rac.coders.klvae import KLVAEConfig
from rac.fields import SiTFieldConfig
from rac.generators.flow import FlowGenerator, FlowGeneratorConfig
from rac.generators.sampling import Sampling


class Ran(NamedTuple):
    """What a command left behind."""

    code: int
    out: str
    err: str


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Callable[..., Ran]:
    """`run("encode", path, ...)`: the command line in this process."""

    def call(*arguments: object) -> Ran:
        capsys.readouterr()
        try:
            code = main([str(argument) for argument in arguments])
        except SystemExit as exit_:
            code = int(exit_.code or 0)
        return Ran(code, *capsys.readouterr())

    return call


@pytest.fixture(scope="session")
def coder_dir(tmp_path_factory: pytest.TempPathFactory, make_rac) -> Path:  # type: ignore[no-untyped-def]
    """A directory with a random RAC, f = 4, c = 4, whose teacher lies beside it."""
    folder = tmp_path_factory.mktemp("coders")
    torch.manual_seed(0)
    teacher = KLVAEConfig(widths=(8, 8, 8), latent_channels=4, norm_groups=4).build()
    rac.save(teacher, folder / "teacher")
    rac.save(make_rac(lively=0.05, spec=teacher.spec, teacher=str(folder / "teacher")), folder / "coder")
    return folder / "coder"


@pytest.fixture(scope="session")
def generator_dir(coder_dir: Path) -> Path:
    """A directory with a random generator of that coder's latents, 4 x 4, of the classes cat, dog and fish."""
    torch.manual_seed(0)
    spec, field = rac.load(coder_dir).spec, SiTFieldConfig(depth=2, width=16, heads=2, patch=2, classes=3)
    sampling = Sampling(steps=2, guidance=1.5)
    generator = FlowGenerator(FlowGeneratorConfig(spec, 4, field, ("cat", "dog", "fish"), str(coder_dir), sampling))
    with torch.no_grad():
        for parameter in generator.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    generator.save(coder_dir.parent / "generator")
    return coder_dir.parent / "generator"


@pytest.fixture
def photo(tmp_path: Path, images) -> Path:  # type: ignore[no-untyped-def]
    """A picture file of 18 x 25 pixels."""
    path = tmp_path / "photo.png"
    rac.write_image(images(1, 18, 25), path)
    return path
