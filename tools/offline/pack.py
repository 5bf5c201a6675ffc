"""Pack a training for a machine that has torch and numpy but no internet: program, packages, pictures, weights.

    python tools/offline/pack.py --out pack --data photos --data more.tar
    python tools/offline/pack.py --out pack --latents pets-64 --coder klvae-f8d4

See README.md beside this.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import numpy as np
import safetensors.torch
import torch
from packaging.requirements import Requirement
from PIL import Image
from torch import Tensor

import rac
from rac import hub
from rac.data.cache import PLAN, CachedStream
from rac.data.files import find_pictures
from rac.data.pictures import Picture
from rac.errors import RacError
from rac.images import from_pixels, read_picture
from rac.representations.lpips import FILES, LPIPS
from rac.representations.weight_files import find_weights

HERE = Path(__file__).parent
PACKAGE = Path(rac.__file__).parent
MIB = 2**20
UNNEEDED = {"hf-xet"}
"""Requirements of requirements that only download."""
SCALE = ".scale"
HEADER = 64
"""Bytes that a picture's entry in the archive takes, at most, besides its own."""


@dataclass(frozen=True)
class Target:
    """The machine that the pack is for: 64-bit Linux on x86."""

    python: str = "3.12"
    there: frozenset[str] = frozenset({"torch", "numpy"})
    """Distributions it has already, by normalised name."""

    def environment(self) -> dict[str, str]:
        """What the markers of requirements look at."""
        return {
            "python_version": self.python,
            "python_full_version": f"{self.python}.0",
            "sys_platform": "linux",
            "platform_system": "Linux",
            "platform_machine": "x86_64",
            "os_name": "posix",
            "extra": "",
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder to make; must not exist")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--data", type=Path, action="append", help="folder or tar file of pictures")
    what.add_argument("--latents", type=Path, help="folder that rac cache made, to train a generator; no pictures")
    parser.add_argument("--limit-mib", type=float, default=48.0, help="size of the whole pack")
    parser.add_argument("--side", type=int, default=144, help="short side of the packed pictures, in pixels")
    parser.add_argument("--quality", type=int, default=85, help="of the packed pictures, which are WebP")
    parser.add_argument("--pictures", type=int, default=0, help="at most so many; 0: as many as fit")
    parser.add_argument("--python", default="3.12", help="version of the target's Python")
    parser.add_argument("--there", nargs="+", default=["torch", "numpy"], help="packages that the target has already")
    parser.add_argument(
        "--coder", action="append", default=[], help="a coder to take along: a folder, or the name of a shipped one"
    )
    options = parser.parse_args()
    if options.out.exists():
        parser.error(f"{options.out} exists; choose another --out, or remove it")
    if options.data and not os.environ.get("RAC_WEIGHTS_DIR"):
        parser.error(f"name the folder that holds {FILES['vgg16']} in RAC_WEIGHTS_DIR")
    try:
        pack(options)
    except RacError as error:
        sys.exit(f"error: {error}")


def pack(options: argparse.Namespace) -> None:
    """Write the folder. Raises `RacError` where pictures or LPIPS's weights are missing, or nothing fits."""
    if options.latents is not None:
        crops_in(options.latents)
    target = Target(options.python, frozenset(map(normalised, options.there)))
    wanted = closure(target)
    print("packages:", *(f"{name} {version}" for name, version in sorted(wanted.items())))
    options.out.mkdir(parents=True)
    with tempfile.TemporaryDirectory() as folder:
        content = Path(folder)
        for wheel in download(wanted, target, content / "wheels"):
            print(f"  {wheel.stat().st_size / MIB:6.2f} MiB {wheel.name}")
            unzip(wheel, content / "site")
        leave_out = shutil.ignore_patterns("__pycache__", "weights")
        shutil.copytree(PACKAGE, content / "src" / "rac", ignore=leave_out)
        (content / "src" / "rac" / "weights").mkdir()
        for coder in options.coder:
            pack_coder(coder, content)
        if options.latents is None:
            (content / "weights").mkdir()
            pack_lpips(content / "weights" / "lpips_vgg16_int8.safetensors", options.data)
        program = options.out / "program.tar.xz"
        with tarfile.open(program, "w:xz", preset=3) as tar:
            for part in ("src", "site", "weights", "coders"):
                if (content / part).exists():
                    tar.add(content / part, part)
    shutil.copy(HERE / "run.py", options.out)
    room = int(options.limit_mib * MIB) - size_of(options.out) - 64 * 1024
    data, what = ("pictures.tar.xz", "pictures") if options.latents is None else ("latents.tar.xz", "prepared crops")
    print(f"program {program.stat().st_size / MIB:.1f} MiB, room for {what} {room / MIB:.1f} MiB")
    if options.latents is None:
        count = pack_pictures(options.out / data, options, room)
    else:
        count = pack_latents(options.out / data, options.latents, room)
    manifest = {
        "python": target.python,
        "packages": wanted,
        "there": sorted(target.there),
        "data": data,
        "images": count,
        "rac": rac.__version__,
    }
    (options.out / "manifest.json").write_text(json.dumps(manifest, indent=2) + "\n")
    size = (options.out / data).stat().st_size
    print(f"{count} {what}, {size / MIB:.1f} MiB, {size / count:.0f} bytes each")
    print(f"{options.out}: {size_of(options.out) / MIB:.1f} of {options.limit_mib:g} MiB")


def normalised(name: str) -> str:
    """A distribution's name in the one spelling that compares equal."""
    return re.sub(r"[-_.]+", "-", name).lower()


def closure(target: Target, root: str = "rectified-auto-coder") -> dict[str, str]:
    """What `root` needs on the target, and what that needs, by name: the versions that are installed here."""
    found: dict[str, str] = {}
    waiting = [Requirement(line) for line in metadata.requires(root) or []]
    while waiting:
        requirement = waiting.pop()
        name = normalised(requirement.name)
        applies = requirement.marker is None or requirement.marker.evaluate(target.environment())
        if not applies or name in found or name in target.there or name in UNNEEDED:
            continue
        found[name] = metadata.version(name)
        waiting += [Requirement(line) for line in metadata.requires(name) or []]
    return found


def download(wanted: Mapping[str, str], target: Target, folder: Path) -> list[Path]:
    """The target's wheels of these versions, in `folder`. Raises `RacError` where the registry has none."""
    platforms = [f"manylinux_2_{minor}_x86_64" for minor in (17, 24, 26, 27, 28, 31, 34)]
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
    command += ["--python-version", target.python, "--implementation", "cp", "--dest", str(folder)]
    command += [option for one in (*platforms, "manylinux2014_x86_64") for option in ("--platform", one)]
    done = subprocess.run([*command, *(f"{name}=={version}" for name, version in wanted.items())], check=False)
    if done.returncode:
        raise RacError("pip could not download the packages above; look at its message, and at the connection")
    return sorted(folder.glob("*.whl"))


def unzip(wheel: Path, site: Path) -> None:
    """Lay a wheel out as installed. Raises `RacError` for one that would need more than that."""
    with zipfile.ZipFile(wheel) as file:
        odd = [name for name in file.namelist() if re.match(r"[^/]+\.data/(purelib|platlib)/", name)]
        if odd:
            raise RacError(f"{wheel.name} keeps code in {odd[0]}, which unzipping does not install")
        file.extractall(site)


def pack_lpips(path: Path, data: Collection[Path]) -> None:
    """LPIPS (VGG16) in 8 bits: half of its file, and the pack's greatest part but the pictures.

    Says how far its distances move on a few pictures. Raises `WeightsError` where its file is not found.
    """
    tensors = safetensors.torch.load_file(find_weights(None, FILES["vgg16"]))
    narrow = narrowed(tensors)
    safetensors.torch.save_file(narrow, path)
    whole, again = LPIPS.load("vgg16"), LPIPS.load("vgg16")
    again.load_state_dict({name: tensor.float() for name, tensor in widened(narrow).items()})
    with torch.no_grad():
        for file in find_pictures(tuple(data))[:2]:
            image = from_pixels(np.asarray(read_picture(io.BytesIO(file.read()), convert=True).resize((64, 64))))
            blurred = torch.nn.functional.avg_pool2d(image, 3, 1, 1)
            one, other = float(whole(image, blurred)), float(again(image, blurred))
            print(f"  LPIPS of a blurred picture: {one:.4f}, in 8 bits {other:.4f}")


def narrowed(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Convolution weights as int8 with one scale for each output channel, under the same names and name.scale."""
    found: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if not (name.startswith("conv") and name.endswith(".weight")):
            found[name] = tensor
            continue
        scale = (tensor.float().abs().amax(dim=(1, 2, 3), keepdim=True) / 127).clamp(min=1e-12)
        found[name] = (tensor.float() / scale).round().to(torch.int8)
        found[name + SCALE] = scale
    return found


def widened(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The left inverse of `narrowed`, up to half a level; run.py holds the same for the other side."""
    scales = {name: tensor for name, tensor in tensors.items() if name.endswith(SCALE)}
    return {
        name: (tensor.float() * scales[name + SCALE]).half() if name + SCALE in scales else tensor
        for name, tensor in tensors.items()
        if name not in scales
    }


def pack_pictures(path: Path, options: argparse.Namespace, room: int) -> int:
    """As many pictures as fit `room` bytes, in the order of their names' hashes, so a fair sample; how many.

    Each lies in a folder of its class, if it has one.

    Raises `RacError` where none fits.
    """
    files = find_pictures(tuple(options.data))
    if options.pictures:
        files = files[: options.pictures]
    count, used = 0, 512
    # Pictures do not shrink any more, but a tar file's headers and padding do: they are an eighth of it.
    with tarfile.open(path, "w:xz", preset=0) as tar:
        for file, data in encoded(files, options.side, options.quality):
            used += len(data) + HEADER
            if used > room:
                break
            name = f"{count:06d}.webp"
            info = tarfile.TarInfo(name if file.class_name is None else f"{file.class_name}/{name}")
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
            count += 1
            if count % 1000 == 0:
                print(f"  {count} of {len(files)} pictures, {used / MIB:.1f} MiB, last {file.name}", flush=True)
    if not count:
        raise RacError(f"no picture fits: the rest of the pack leaves {room} bytes; raise --limit-mib")
    return count


def pack_coder(name: str, content: Path) -> None:
    """A coder's folder under `coders`, or a shipped one where the packed program finds it by its name.

    Raises `RacError` where it is neither.
    """
    if Path(name).is_dir():
        shutil.copytree(name, content / "coders" / Path(name).name)
    elif name in hub.available():
        shutil.copytree(hub.SHIPPED / name, content / "src" / "rac" / "weights" / name)
    else:
        raise RacError(f"--coder {name} is neither a folder nor a shipped coder: {', '.join(hub.available())}")


def crops_in(folder: Path) -> int:
    """The number of crops with latents in a folder of `rac cache`. Raises `RacError` where they lack."""
    if not (folder / PLAN).is_file():
        raise RacError(f"{folder} holds no prepared crops (no {PLAN}); make them with rac cache --no-pixels")
    crops = CachedStream(folder, wants=())
    if crops.plan["teacher"] is None:
        raise RacError(f"{folder} holds crops without latents; make them with rac cache --teacher")
    return len(crops)


def pack_latents(path: Path, folder: Path, room: int) -> int:
    """A folder of prepared crops, whole; how many. Raises `RacError` where they do not fit `room` bytes."""
    count = crops_in(folder)
    with tarfile.open(path, "w:xz", preset=0) as tar:
        for file in sorted([folder / PLAN, *folder.glob("*.safetensors")]):
            tar.add(file, file.name)
    if (size := path.stat().st_size) > room:
        raise RacError(
            f"the prepared crops take {size / MIB:.1f} MiB, and the rest of the pack leaves {room / MIB:.1f}: raise "
            "--limit-mib, prepare fewer crops, or pack pictures and let the other machine prepare them"
        )
    return count


def encoded(files: Collection[Picture], side: int, quality: int) -> Iterator[tuple[Picture, bytes]]:
    """Each picture, its short side brought down to `side`, as WebP; damaged ones are left out."""
    for file in files:
        try:
            picture = read_picture(io.BytesIO(file.read()), convert=True, name=file.name)
        except RacError as error:
            print(f"  left out: {error}")
            continue
        short = min(picture.size)
        if short > side:
            size = (round(picture.width * side / short), round(picture.height * side / short))
            picture = picture.resize(size, Image.Resampling.LANCZOS)
        buffer = io.BytesIO()
        picture.save(buffer, "WEBP", quality=quality, method=4)
        yield file, buffer.getvalue()


def size_of(folder: Path) -> int:
    """Bytes of all files in a folder."""
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


if __name__ == "__main__":
    main()
