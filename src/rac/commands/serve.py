"""`rac serve`: a web page that shows what coders make of a picture."""

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
from ..data.files import photographs
from ..errors import RacError
from ..evaluate.one_image import Loaded
from ..serve.guard import Limits
from ..serve.page import build, need_gradio, serving
from .shared import DEFAULT_CODER, load_coder, load_teacher

PHOTOGRAPHS = ("astronaut.png", "chelsea.png", "coffee.png", "rocket.jpg", "motorcycle_left.png")
"""Names of the scikit-image photographs that the page offers, where scikit-image is installed."""


@dataclass(frozen=True)
class Command:
    """Serve a web page that compares a picture with what the teacher and RAC make of it.

    Sliders set the number of steps and the noise on the latent. Only this machine can open the page unless --host says
    otherwise. There are no passwords. Ctrl-C ends the server.
    """

    host: str = "127.0.0.1"
    """Address to listen at; with 0.0.0.0 every machine that reaches this one can open the page."""
    port: int = 7860
    """Port to listen at; 0 takes a free one."""
    model: str | None = None
    """A coder to show first, beside the shipped ones: a directory or a hub name."""
    device: str = "auto"
    """Where the coders run: auto, cpu, cuda, cuda:1 or mps."""
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
        page = build(shelf.load, shelf.names, limits, photographs=examples(), device=self.device)
        with _sigterm_as_ctrl_c(), serving(page, self.host, self.port, limits) as url:
            print(f"Serving {', '.join(shelf.names)} at {url} - Ctrl-C ends it", flush=True)
            threading.Event().wait()
        return 0


class Shelf:
    """The coders that can be chosen, each loaded when it is first asked for."""

    def __init__(self, model: str | None, device: str) -> None:
        shipped = sorted(hub.available(), key=lambda name: name != DEFAULT_CODER)
        self._sources = {name: name for name in shipped}
        if model is not None:
            # Visitors see a name, not where it lies.
            self._sources = {Path(model).name or model: model, **self._sources}
        self._device = device
        self._loaded: dict[str, Loaded] = {}

    @property
    def names(self) -> list[str]:
        """Names to choose from; the first is shown first."""
        return list(self._sources)

    def load(self, name: str) -> Loaded:
        """Load the coder called `name` and its teacher. Raises `WeightsError`."""
        if name not in self._loaded:
            coder = load_coder(self._sources[name], self._device)
            teacher = load_teacher(coder, self._device)
            self._loaded[name] = Loaded(name, coder, teacher, Path(coder.teacher or "").name)
        return self._loaded[name]


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
