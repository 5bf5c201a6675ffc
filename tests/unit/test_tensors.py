"""Tensors and paths that no function here can take: an error of ours in place of torch's or Python's words."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor, nn

import rac
from rac import flow, states
from rac.evaluate.image_metrics import psnr, ssim
from rac.evaluate.latent_metrics import LatentAgreement
from rac.images import image_files
from rac.integrations.diffusers import AutoencoderRAC
from rac.representations.lpips import LPIPS
from rac.tensors import check_dense, check_device

IMAGE, LATENT = torch.zeros(1, 3, 64, 64), torch.zeros(1, 4, 16, 16)
DOORS: dict[str, tuple[Callable[..., object], Tensor]] = {
    "encode": (lambda coder, image: coder.encode(image), IMAGE),
    "moments": (lambda coder, image: coder.moments(image), IMAGE),
    "reconstruct": (lambda coder, image: coder.reconstruct(image), IMAGE),
    "decode": (lambda coder, latent: coder.decode(latent), LATENT),
    "drop-in encode": (lambda coder, image: AutoencoderRAC.from_rac(coder).encode(image), IMAGE),
    "drop-in decode": (lambda coder, latent: AutoencoderRAC.from_rac(coder).decode(latent), LATENT),
    "psnr": (lambda _, image: psnr(image, IMAGE), IMAGE),
    "ssim": (lambda _, image: ssim(IMAGE, image), IMAGE),
    "lpips": (lambda _, image: LPIPS("alex")(image, IMAGE), IMAGE),
    "write": (lambda _, image: rac.write_image(image, Path(tempfile.gettempdir()) / "never.png"), IMAGE),
}
DENSE: dict[str, tuple[Callable[..., object], Tensor]] = {
    **DOORS,
    "finish": (lambda coder, moments: coder.finish(moments), LATENT),
    "expand": (lambda _, latent: states.expand(latent, factor=4, state_channels=4), LATENT),
    "contract": (lambda _, state: states.contract(state, factor=4, latent_channels=4), torch.zeros(1, 4, 64, 64)),
    "image_state": (lambda _, image: states.image_state(image, 4), IMAGE),
    "integrate": (lambda _, state: flow.integrate(lambda s, t: s, state, flow.TimeGrid.uniform(2)), IMAGE),
    "agreement": (lambda _, latent: LatentAgreement().update(latent, LATENT), LATENT),
    "from_pixels": (lambda _, image: rac.images.from_pixels(image), torch.zeros(8, 8, 3, dtype=torch.uint8)),
}


@pytest.mark.filterwarnings("ignore:Sparse CSR")
@pytest.mark.parametrize("door", DENSE)
@pytest.mark.parametrize("sparse", [lambda x: x.to_sparse(), lambda x: x.to_sparse_csr()], ids=["coo", "csr"])
def test_a_sparse_tensor_is_refused(make_rac, door: str, sparse: Callable[[Tensor], Tensor]) -> None:  # type: ignore[no-untyped-def]
    call, tensor = DENSE[door]
    with pytest.raises(rac.RacError, match=r"dense tensor, not one of layout .*\.to_dense\(\)"):
        call(make_rac(), sparse(tensor))


@pytest.mark.parametrize("door", DOORS)
def test_a_tensor_on_another_device_is_refused(make_rac, door: str) -> None:  # type: ignore[no-untyped-def]
    call, tensor = DOORS[door]
    with pytest.raises(rac.RacError, match="device"):
        call(make_rac(), tensor.to("meta"))


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested")
def test_a_nested_tensor_is_refused() -> None:
    with pytest.raises(rac.RacError, match="not a nested one"):
        check_dense(torch.nested.nested_tensor([torch.zeros(3, 8, 8), torch.zeros(3, 9, 9)]), "an image")


def test_weights_that_are_moved_when_they_are_used_may_be_elsewhere() -> None:
    check_device(IMAGE, nn.Linear(1, 1, device="meta"), "the image", "the coder")
    two = nn.ModuleList([nn.Linear(1, 1), nn.Linear(1, 1, device="meta")])
    check_device(IMAGE.to("meta"), two, "the image", "the coder")


@pytest.mark.parametrize("path", [None, 3, b"rac-64", ["rac-64"]])
def test_what_is_no_path_is_refused(path: object, make_rac) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(rac.WeightsError, match="name or the directory of a coder"):
        rac.load(path)  # type: ignore[arg-type]
    with pytest.raises(rac.WeightsError, match="expected a path"):
        rac.save(make_rac(), path)  # type: ignore[arg-type]
    for call in (rac.read_image, image_files, lambda given: rac.write_image(IMAGE, given)):
        with pytest.raises(rac.ImageError, match="expected a path"):
            call(path)  # type: ignore[arg-type]


def test_open_files_of_every_kind_are_read() -> None:
    with tempfile.NamedTemporaryFile(suffix=".png") as named, tempfile.SpooledTemporaryFile() as spooled:
        for file in (named, spooled):
            Image.new("RGB", (8, 8)).save(file, "PNG")
            file.seek(0)
            assert rac.read_image(file).shape == (1, 3, 8, 8)  # type: ignore[arg-type]
