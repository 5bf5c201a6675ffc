"""The report of `rac demo`, section by section."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import avg_pool2d

from ..coders.rac import RAC
from ..report.document import Figure, Section
from ..report.pictures import Panel, sheet, strip, trajectory_strip
from .latent_metrics import LatentAgreement
from .one_image import Loaded, Reconstruction, Seeded, decodings, means, round_trip
from .principal import latent_axes, latent_colours

ENLARGED = 4
"""Factor by which a detail of each photograph is enlarged; its side is the photograph's divided by it."""
MARK = (1.0, 0.9, -1.0)
"""Colour of the frame around the detail, red, green and blue in [-1, 1]."""

INTRODUCTION = (
    "RAC replaces the decoder of an image autoencoder by a velocity field. Followed forwards, it carries a seed state, "
    "laid out from the latent, to the image; followed backwards, it is the encoder. Every picture and figure below was "
    "computed on this machine, just now."
)


@dataclass(frozen=True)
class Shown:
    """A photograph and what was made of it."""

    image: Tensor
    """The photograph, 1 3 H W in [-1, 1]."""
    latent: Tensor
    """Its latent by the teacher, 1 c h w; the coder's own where there is no teacher."""
    decoded: tuple[Reconstruction, ...]
    """The latent decoded by the teacher, if there is one, and by the coder at each of `one_image.STEPS`."""
    alone: Reconstruction
    """The photograph encoded and decoded by the coder, at its own number of steps."""

    @property
    def versions(self) -> tuple[Reconstruction, ...]:
        """All reconstructions, in the order in which they are shown."""
        return (*self.decoded, self.alone)


def shown(loaded: Loaded, image: Tensor, name: str) -> Shown:
    """Encodes and decodes a photograph, 1 3 H W in [-1, 1], in all ways that the report shows.

    `name` is the photograph's; it chooses the noise of coders that decode from noise.
    """
    steps, seeded = RAC.of(loaded.coder).config.steps, Seeded(name=name)
    with torch.no_grad():
        latent = (loaded.teacher or loaded.coder).encode(image)
    alone = round_trip(loaded, image, steps, seeded)
    return Shown(image, latent, decodings(loaded, image, latent, seeded), alone)


def sections(coder: RAC, photographs: dict[str, Shown]) -> list[Section]:
    """Returns the report's sections. `photographs` are by name; the flows of the first are drawn."""
    first = next(iter(photographs.values()))
    results = {name: one.versions for name, one in photographs.items()}
    return [
        _there_and_back(photographs),
        Section("Quality and cost", _QUALITY, [means(results)]),
        _on_the_way(first),
        _the_latent(coder, first),
    ]


def _there_and_back(photographs: dict[str, Shown]) -> Section:
    figures = [Figure(_with_detail(one, name), f"strip-{Path(name).stem}") for name, one in photographs.items()]
    return Section("There and back", _THERE_AND_BACK, figures)


def _with_detail(one: Shown, title: str) -> Image.Image:
    """Draws the photograph and its reconstructions, and below them the detail in which those differ most, enlarged."""
    top, left, side = most_different([version.image for version in one.versions])
    whole = [Panel(_framed(one.image, top, left, side), "original")]
    whole += [
        Panel(version.image, version.name, f"{version.psnr:.2f} dB · SSIM {version.ssim:.3f}")
        for version in one.versions
    ]
    details = [
        Panel(_enlarged(image[..., top : top + side, left : left + side]))
        for image in (one.image, *(version.image for version in one.versions))
    ]
    return sheet([strip(whole, title), strip(details)])


def most_different(images: Sequence[Tensor]) -> tuple[int, int, int]:
    """Returns top, left and side of the square in which images 1 3 H W differ most from each other, on average.

    Its side is the shorter one of the images divided by `ENLARGED`.
    """
    stacked = torch.cat(list(images)).float()
    spread = (stacked.amax(dim=0) - stacked.amin(dim=0)).mean(dim=0)
    side = max(1, min(spread.shape) // ENLARGED)
    means = avg_pool2d(spread[None, None], side, stride=1)[0, 0]
    top, left = divmod(int(means.argmax()), means.shape[1])
    return top, left, side


def _framed(image: Tensor, top: int, left: int, side: int) -> Tensor:
    framed, colour = image.clone(), torch.tensor(MARK, device=image.device).view(1, 3, 1)
    bottom, right = top + side - 1, left + side - 1
    for row in (top, bottom):
        framed[..., row, left : right + 1] = colour
    for column in (left, right):
        framed[..., top : bottom + 1, column] = colour
    return framed


def _enlarged(image: Tensor) -> Tensor:
    return image.repeat_interleave(ENLARGED, dim=-2).repeat_interleave(ENLARGED, dim=-1)


def _on_the_way(first: Shown) -> Section:
    """Returns a section on the states while decoding and while encoding."""
    decoding, encoding = first.decoded[-1].decoding, first.alone.encoding
    assert decoding is not None
    assert encoding is not None
    figures = [
        Figure(trajectory_strip(decoding, title="decoding: from the seed state to the image"), "decoding"),
        Figure(trajectory_strip(encoding, title="encoding: from the image to the seed state"), "encoding"),
    ]
    return Section("On the way", _ON_THE_WAY, figures)


def _the_latent(coder: RAC, first: Shown) -> Section:
    """Returns a section on the latent that the coder finds by walking back, beside the teacher's."""
    encoding = first.alone.encoding
    assert encoding is not None
    own, agreement = coder.contract(encoding.end), LatentAgreement()
    agreement.update(own, first.latent)
    explained = float(agreement.explained_variance().mean())
    axes, factor = latent_axes([first.latent]), coder.spec.factor
    panels = [
        Panel(first.image, "original"),
        Panel(latent_colours(first.latent, axes, factor), "the teacher's latent"),
        Panel(latent_colours(own, axes, factor), "found by walking back", f"explains {100 * explained:.1f} %"),
    ]
    return Section("The latent", _LATENT, [Figure(strip(panels), "latent")])


_THERE_AND_BACK = (
    "The teacher is the autoencoder whose latents this RAC learned to imitate. It encoded each photograph; then it "
    "decoded its latent once, and RAC decoded the same latent in 1, 2 and 4 steps. The last picture is RAC's alone: "
    "encoded by walking the flow backwards, decoded by walking it forwards. Below, the framed detail, in which the "
    "reconstructions differ most from each other, is enlarged without smoothing."
)
_QUALITY = (
    "Means over the photographs. An evaluation is one pass through a network; GMACs are the 10^9 multiply-accumulates "
    "of all of them: of decoding alone, and of encoding and decoding together in the last row."
)
_ON_THE_WAY = "The first three channels of the states at each time node, clamped to the range of an image."
_LATENT = (
    "The channels of a latent, reduced to three by principal component analysis of the teacher's and shown as red, "
    "green and blue. Given is the share of the variance of the teacher's latent that RAC's explains, averaged over its "
    "channels."
)
