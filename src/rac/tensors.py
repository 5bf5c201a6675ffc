"""Checks of tensors that the public functions share."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .errors import RacError


def check_dense(tensor: Tensor, what: str, error: type[RacError] = RacError) -> None:
    """Raises `error` unless `tensor`, called `what` in the message, is dense: neither sparse nor nested."""
    if tensor.is_nested:
        raise error(f"{what} must be one dense tensor, not a nested one; give images of one size, or one by one")
    if tensor.layout is not torch.strided:
        kind = str(tensor.layout).removeprefix("torch.").lstrip("_")
        raise error(f"{what} must be a dense tensor, not one of layout {kind}; convert it with .to_dense()")


def check_device(tensor: Tensor, module: nn.Module, what: str, whose: str) -> None:
    """Raises `RacError` unless `tensor` is on the device of all parameters of `module`.

    `what` and `whose` call the tensor and the module in the message. Nothing is checked where parameters are on several
    devices or on "meta", as with weights that are moved to a device when they are used, and while torch compiles.
    """
    if torch.compiler.is_compiling():
        return
    devices = {parameter.device for parameter in module.parameters()}
    if len(devices) == 1 and tensor.device not in devices and (device := devices.pop()).type != "meta":
        raise RacError(
            f"{what} is on the device {tensor.device}, {whose} on {device}; move one of them with .to(device)"
        )


def check_pair(image: Tensor, reference: Tensor) -> None:
    """Raises `RacError` unless two images that are compared are dense, and on one device."""
    for tensor, what in ((image, "the image"), (reference, "the reference")):
        check_dense(tensor, what)
    if image.device != reference.device:
        raise RacError(f"compare images on one device, not {image.device} and {reference.device}; move one with .to")


def may_read(tensor: Tensor) -> bool:
    """Returns whether code may branch on the values of `tensor`, and read them without waiting for a device.

    False while torch compiles or exports, under `torch.func` transforms, and for tensors without values.
    """
    return (
        tensor.device.type == "cpu"
        and not torch.compiler.is_compiling()
        and type(tensor) in (Tensor, nn.Parameter)
        and not torch._C._functorch.is_functorch_wrapped_tensor(tensor)
    )
