"""`rac serve`: a web page that shows what coders make of a picture, and what generators make of a class."""

from __future__ import annotations

import importlib.util
import math
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from .. import hub
from ..coders.protocol import Coder
from ..data.files import photographs
from ..errors import RacError
from ..evaluate.one_image import Loaded
from ..generators.protocol import LatentGenerator
from ..runtime import pick_device
from ..serve.generate import Maker
from ..serve.guard import Limits
from ..serve.page import build, need_gradio, serving
from .shared import DEFAULT_CODER, load_coder, load_teacher, note

PHOTOGRAPHS = ("astronaut.png", "chelsea.png", "coffee.png", "rocket.jpg", "motorcycle_left.png")
"""Names of the scikit-image photographs that the page offers, where scikit-image is installed."""


@dataclass(frozen=True)
class Command:
    """Serve a web page that compares a picture with what the teacher and RAC make of it.

    Sliders set the number of steps and the noise on the latent. With a generator the page generates images too. Only
    this machine can open the page unless --host says otherwise. There are no passwords. Ctrl-C ends the server.
    """

    host: str = "127.0.0.1"
    """Address to listen at; with 0.0.0.0 every machine that reaches this one can open the page."""
    port: int = 7860
    """Port to listen at; 0 takes a free one."""
    model: str | None = None
    """A coder to show first, beside the shipped ones: a directory or a hub name."""
    generator: str | None = None
    """A generator to show first, beside the shipped ones: the folder of a training run, a directory or a hub name."""
    device: str = "auto"
    """Where coders and generators run: auto, cpu, cuda, cuda:1 or mps."""
    max_side: int = Limits.side
    """Longest side of a picture, in pixels; larger pictures are scaled down to it."""
    max_megapixels: float = Limits.pixels / 1e6
    """Largest upload, in megapixels; larger ones are refused before they are decoded."""
    max_megabytes: float = Limits.upload_bytes / 2**20
    """Largest upload, in megabytes; larger ones are refused."""
    max_waiting: int = Limits.waiting
    """Largest number of requests that wait while one is processed; further ones are refused with a message."""

    def run(self) -> int:
        """Serve until Ctrl-C, which raises `KeyboardInterrupt` once the server is closed. Raises `RacError`."""
        for option, value in (("max-megabytes", self.max_megabytes), ("max-megapixels", self.max_megapixels)):
            if not math.isfinite(value):
                raise RacError(f"--{option} {value} must be a finite number; 16 is a good start")
        limits = Limits(
            int(self.max_megabytes * 2**20), int(self.max_megapixels * 1e6), self.max_side, self.max_waiting
        )
        need_gradio()
        shelf = Shelf(self.model, self.device)
        shelf.load(shelf.names[0])
        makers = makers_of(self.generator, shelf, self.device)
        page = build(shelf.load, shelf.names, limits, photographs=examples(), makers=makers, device=self.device)
        with _sigterm_as_ctrl_c(), serving(page, self.host, self.port, limits) as url:
            print(f"Serving {', '.join([*shelf.names, *makers])} at {url} - Ctrl-C ends it", flush=True)
            threading.Event().wait()
        return 0


class Shelf:
    """The coders that can be chosen, each loaded when it is first asked for."""

    def __init__(self, model: str | None, device: str) -> None:
        shipped = sorted(hub.available(), key=lambda name: name != DEFAULT_CODER)
        self._sources = {name: name for name in shipped}
        if model is not None:
            self._sources = {_shown(model): model, **self._sources}
        self._device = device
        self._coders: dict[str, Coder] = {}
        self._loaded: dict[str, Loaded] = {}

    @property
    def names(self) -> list[str]:
        """Names to choose from; the first is shown first."""
        return list(self._sources)

    def coder(self, name: str) -> Coder:
        """Load the coder called `name`. Raises `WeightsError`."""
        if name not in self._coders:
            self._coders[name] = load_coder(self._sources[name], self._device)
        return self._coders[name]

    def load(self, name: str) -> Loaded:
        """Load the coder called `name` and its teacher. Raises `WeightsError`."""
        if name not in self._loaded:
            coder = self.coder(name)
            teacher = load_teacher(coder, self._device)
            self._loaded[name] = Loaded(name, coder, teacher, Path(coder.teacher or "").name)
        return self._loaded[name]


def makers_of(generator: str | None, shelf: Shelf, device: str) -> dict[str, Maker]:
    """Return the generators that ship and the one called `generator`, first, each with the coders of its latents.

    Raises `RacError` if one cannot be loaded, or if there is no coder here that decodes its latents.
    """
    sources = {name: name for name in hub.available_generators()}
    if generator is not None:
        sources = {_shown(generator): generator, **sources}
    makers = {}
    for name, source in sources.items():
        loaded = hub.load_generator(source).to(pick_device(device))
        makers[name] = Maker(name, loaded, _decoders(name, loaded, shelf, device))
    return makers


def _decoders(name: str, generator: LatentGenerator, shelf: Shelf, device: str) -> dict[str, Coder]:
    """Return the coders on the shelf that decode the generator's latents, and the generator's own; flows first."""
    coders = {one: shelf.coder(one) for one in shelf.names}
    own = generator.kind.coder
    if own is not None and _shown(own) not in coders:
        try:
            coders[_shown(own)] = load_coder(own, device)
        except RacError as error:
            note(f"{name} is shown without its own coder: {error}")
    fitting = {
        one: coder
        for one, coder in coders.items()
        if not generator.kind.spec.differences(coder.spec) and "decode" in coder.trained_ways
    }
    if not fitting:
        raise RacError(f"no coder here decodes the latents of the generator {name}; give one with --model")
    return dict(sorted(fitting.items(), key=lambda item: item[1].walk("decode") is None))


def _shown(source: str) -> str:
    """Return the name that visitors see, which does not tell where a directory lies."""
    return Path(source).name or source


def examples() -> dict[str, Path]:
    """Return the paths of the photographs that the page offers, by name; empty without scikit-image."""
    if importlib.util.find_spec("skimage") is None:
        return {}
    folder = photographs()
    paths = {name: folder.path / name for name in folder.names}
    return {name.split(".")[0].split("_")[0]: paths[name] for name in PHOTOGRAPHS if name in paths}


@contextmanager
def _sigterm_as_ctrl_c() -> Iterator[None]:
    """Let SIGTERM, which service managers send, end the server as Ctrl-C does."""
    if threading.current_thread() is not threading.main_thread():  # only the main thread may handle signals
        yield
        return
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
