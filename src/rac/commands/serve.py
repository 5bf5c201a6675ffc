"""`rac serve`: a page in the browser to drop pictures on."""

from __future__ import annotations

import importlib.util
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from .. import hub
from ..coders.rac import RAC
from ..data.files import photographs
from ..serve.figures import Loaded
from ..serve.guard import Limits
from ..serve.page import build, need_gradio, serving
from .shared import DEFAULT_CODER, load_coder, load_teacher

PHOTOGRAPHS = ("astronaut.png", "chelsea.png", "coffee.png", "rocket.jpg", "motorcycle_left.png")
"""Of scikit-image's, where it is installed."""


@dataclass(frozen=True)
class Command:
    """A page on which a picture goes through the teacher and RAC, and the number of steps is a slider.

    It listens to this machine alone unless --host says otherwise; it has no passwords. Ctrl-C ends it.
    """

    host: str = "127.0.0.1"
    """Address to listen at; 0.0.0.0 lets every machine of the network in."""
    port: int = 7860
    """0 takes a free one."""
    model: str | None = None
    """A directory or hub name to show first, beside the shipped coders."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1 or mps."""
    max_side: int = Limits.side
    """Larger pictures are scaled down until their longer side has this many pixels."""
    max_megapixels: float = Limits.pixels / 1e6
    """Larger uploads are refused before they are decoded."""
    max_megabytes: float = Limits.upload_bytes / 2**20
    """Larger uploads are refused."""
    max_waiting: int = Limits.waiting
    """Requests in the queue, one of which is worked on; further ones are told to come back."""

    def run(self) -> int:
        """Serve until Ctrl-C, which raises `KeyboardInterrupt` once all is closed. Raises `RacError`."""
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
        """What visitors choose from, the one to begin with first."""
        return list(self._sources)

    def load(self, name: str) -> Loaded:
        """The coder called `name` and its teacher. Raises `WeightsError`."""
        if name not in self._loaded:
            coder = load_coder(self._sources[name], self._device)
            teacher = load_teacher(coder, self._device) if isinstance(coder, RAC) else None
            self._loaded[name] = Loaded(name, coder, teacher, Path(coder.teacher or "").name)
        return self._loaded[name]


def examples() -> dict[str, Path]:
    """Photographs to begin with, by name; none without scikit-image."""
    if importlib.util.find_spec("skimage") is None:
        return {}
    folder = photographs()
    paths = {name: folder.path / name for name in folder.names}
    return {name.split(".")[0].split("_")[0]: paths[name] for name in PHOTOGRAPHS if name in paths}


@contextmanager
def _sigterm_as_ctrl_c() -> Iterator[None]:
    """What a service manager sends ends the server as a person would."""
    if threading.current_thread() is not threading.main_thread():  # only the main thread may handle signals
        yield
        return
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
