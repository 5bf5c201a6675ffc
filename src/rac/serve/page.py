"""The web page of `rac serve`: its layout and what its controls do. gradio is imported when a page is built."""

from __future__ import annotations

import os
import socket
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from html import escape
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from ..errors import RacError, install_extra
from ..evaluate.one_image import Loaded, decode_noised, reconstruct
from ..images import PICTURE_SUFFIXES
from ..runtime import pick_device
from .generate import GREATEST_GUIDANCE, GREATEST_STEPS_THERE, Generation, Maker
from .guard import Gate, Limits, admit
from .html import figures_html, film_html, notes_html, versions_html
from .numbers import GREATEST_STEPS, number_in, whole_number

GREATEST_NOISE = 1.5
"""Greatest standard deviation of the noise on a latent, whose own deviation is about 1."""
TABS = ("steps", "noise")
ZOOMS = ("1x", "2x", "4x", "8x")
UPLOAD_HEIGHT = 132
"""Height in pixels of the field that takes an upload."""

Load = Callable[[str], Loaded]


class Page(NamedTuple):
    """A page that `serving` can serve."""

    blocks: Any
    """gradio's `Blocks`, with the queue set up."""
    busy: threading.Lock
    """Lock that is held while a picture is processed."""


def need_gradio() -> Any:
    """Imports gradio, with its usage statistics switched off. Raises `RacError` if it is not installed."""
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    try:
        import gradio
    except ImportError as error:
        raise RacError(f"rac serve needs gradio ({error}); {install_extra('serve')}") from None
    return gradio


@dataclass(frozen=True)
class Answers:
    """Computes the contents of the page from the values of its controls. Needs no gradio."""

    load: Load
    names: tuple[str, ...]
    limits: Limits
    photographs: Mapping[str, Path]
    device: str = "cpu"
    busy: threading.Lock = field(default_factory=threading.Lock)

    def __call__(
        self, tab: str, upload: str | None, photograph: str | None, name: str, steps: object, sigma: object
    ) -> str | None:
        """Computes the HTML of `tab`, "steps" or "noise".

        None stands for no change: the number that the tab needs is missing while its box is edited.

        - `tab`: the tab to compute.
        - `upload`: path of the uploaded picture, if any.
        - `photograph`: name of the chosen photograph, if any.
        - `name`: name of the coder.
        - `steps`: number of steps.
        - `sigma`: standard deviation of the noise.

        Raises:
            RacError: The picture is refused, the coder is unknown, or the number lies outside its range.
        """
        path = upload or self.photographs.get(str(photograph))
        if path is None:
            return EMPTY
        if (steps if tab == "steps" else sigma) is None:
            return None
        if name not in self.names:
            raise RacError(f"there is no coder {name!r} here; choose one of {', '.join(self.names)}")
        compute: Callable[[Loaded, Tensor], str]
        if tab == "steps":
            compute = partial(_steps_html, steps=whole_number(steps, 1, GREATEST_STEPS, "{} steps cannot be taken"))
        else:
            words = "noise of {} standard deviations cannot be added"
            compute = partial(_noise_html, sigma=number_in(sigma, 0, GREATEST_NOISE, words))
        with self.busy:
            image, note = admit(path, self.limits)
            loaded = self.load(name)
            return notes_html(note, _teacher_note(loaded)) + compute(loaded, image.to(pick_device(self.device)))


class Controls(NamedTuple):
    """gradio's components of the page: the controls that visitors set, then the answers of the first two tabs."""

    upload: Any
    photograph: Any
    name: Any
    zoom: Any
    tabs: tuple[Any, Any]
    steps: Any
    sigma: Any
    answers: tuple[Any, Any]
    generate: GenerateControls | None
    """Those of the tab that generates; None where there is no generator."""

    @property
    def given(self) -> list[Any]:
        """The inputs of `Answers`, after the tab."""
        return [self.upload, self.photograph, self.name, self.steps, self.sigma]


class GenerateControls(NamedTuple):
    """gradio's components of the tab that generates: the tab, the inputs of `Generation`, and its answer."""

    tab: Any
    name: Any
    class_name: Any
    seed: Any
    guidance: Any
    steps: Any
    coder: Any
    last: Any
    another: Any
    """Button that chooses another seed."""
    answer: Any

    @property
    def given(self) -> list[Any]:
        """The inputs of `Generation`."""
        return [self.name, self.class_name, self.seed, self.guidance, self.steps, self.coder, self.last]


def build(
    load: Load,
    names: Sequence[str],
    limits: Limits,
    *,
    photographs: Mapping[str, Path] | None = None,
    makers: Mapping[str, Maker] | None = None,
    device: str = "cpu",
) -> Page:
    """Builds the page.

    Args:
        load: gives the coder of one of `names`.
        names: the coders to choose from; the first is chosen at first.
        limits: what a visitor may ask of the machine.
        photographs: pictures offered beside what visitors upload, by name.
        makers: generators to choose from, by name; where there is none, the page has no tab for them.
        device: where pictures are put; `load` puts the coders there.

    Programs can ask the endpoints "reconstruct", "perturb" and "generate". Raises `RacError` if gradio is not
    installed.
    """
    gr = need_gradio()
    answers = Answers(load, tuple(names), limits, photographs or {}, device)
    with gr.Blocks(title="rac", analytics_enabled=False, delete_cache=(600, 3000)) as blocks:
        generation = Generation(makers, answers.busy) if makers else None
        controls = _lay_out(gr, answers, generation)
        _connect(gr, controls, answers, generation)
    blocks.queue(max_size=limits.waiting, default_concurrency_limit=1, api_open=False)
    return Page(blocks, answers.busy)


def _lay_out(gr: Any, page: Answers, generation: Generation | None) -> Controls:
    gr.HTML(HEADER, elem_classes="rac-header")
    photographs = list(page.photographs)
    with gr.Row(equal_height=False, elem_classes="rac-main"):
        with gr.Column(scale=1, min_width=280, elem_classes="rac-controls"):
            upload = gr.File(
                label="Your picture", file_types=list(PICTURE_SUFFIXES), type="filepath", height=UPLOAD_HEIGHT
            )
            chosen = {"filterable": False, "min_width": 120}
            with gr.Row(elem_classes="rac-choices"):
                photograph = gr.Dropdown(
                    photographs,
                    value=next(iter(photographs), None),
                    label="or a photograph",
                    visible=bool(photographs),
                    **chosen,
                )
                name = gr.Dropdown(list(page.names), value=page.names[0], label="Coder", **chosen)
            zoom = gr.Radio(list(ZOOMS), value=ZOOMS[0], label="Zoom", elem_classes="rac-zoom")
        with gr.Column(scale=4, min_width=300, elem_classes="rac-results"), gr.Tabs():
            with gr.Tab("Steps", id="steps") as first:
                steps = gr.Slider(1, GREATEST_STEPS, 2, step=1, label="Steps in each direction")
                reconstruction = gr.HTML(EMPTY, elem_classes="rac-answer")
            with gr.Tab("Noisy latent", id="noise") as second:
                sigma = gr.Slider(0, GREATEST_NOISE, 0.5, step=0.05, label="Noise, standard deviations")
                denoised = gr.HTML(EMPTY, elem_classes="rac-answer")
            generate = None if generation is None else _lay_out_generate(gr, generation)
    gr.HTML(f"<p class='rac-note'>{escape(_limits_in_words(page.limits))}</p>", elem_classes="rac-limits")
    # `Answers` checks what is sent. gradio's own checks fail on an emptied box, and log a traceback for every refusal.
    upload.preprocess = lambda file: None if file is None else file.path
    for control in (photograph, name, steps, sigma):
        control.preprocess = lambda value: value
    return Controls(upload, photograph, name, zoom, (first, second), steps, sigma, (reconstruction, denoised), generate)


def _lay_out_generate(gr: Any, generation: Generation) -> GenerateControls:
    names = list(generation.makers)
    maker = generation.makers[names[0]]
    own = maker.generator.sampling
    with gr.Tab("Generate", id="generate") as tab:
        with gr.Row(elem_classes="rac-generate"):
            name = gr.Dropdown(names, value=names[0], label="Generator", visible=len(names) > 1, min_width=120)
            class_name = gr.Dropdown(**_classes(maker), label="Class", min_width=120)
            coder = gr.Dropdown(**_coders(maker), label="Decoded by", filterable=False, min_width=120)
            seed = gr.Number(0, label="Seed", precision=0, step=1, min_width=120)
            another = gr.Button("Another seed", size="sm", min_width=120)
        with gr.Row():
            guidance = gr.Slider(0, GREATEST_GUIDANCE, own.guidance, step=0.1, label="Guidance, 1: none")
            steps = gr.Slider(1, GREATEST_STEPS_THERE, own.steps, step=1, label="Steps of the generator")
            last = gr.Slider(1, GREATEST_STEPS, 8, step=1, label="Steps of decoding")
        answer = gr.HTML("", elem_classes="rac-answer")
    for control in (name, class_name, coder, seed, guidance, steps, last):
        control.preprocess = lambda value: value
    return GenerateControls(tab, name, class_name, seed, guidance, steps, coder, last, another, answer)


def _classes(maker: Maker) -> dict[str, Any]:
    """Returns the choices of a list of classes, and which is chosen at first."""
    classes = maker.generator.classes
    return {"choices": [(NO_CLASS, ""), *((name, name) for name in classes)], "value": classes[0] if classes else ""}


def _coders(maker: Maker) -> dict[str, Any]:
    """Returns the choices of a list of coders, and which is chosen at first."""
    return {"choices": list(maker.coders), "value": next(iter(maker.coders))}


def _connect(gr: Any, controls: Controls, answers: Answers, generation: Generation | None) -> None:
    tab = gr.State("steps")

    def show(front: str, *given: Any) -> list[Any]:
        """Returns the contents of two tabs, of which only the one in front is computed, and which one that is."""
        if front not in TABS:
            return [gr.skip(), gr.skip(), front]
        made = _in_gradio_errors(gr, partial(answers, front, *given))
        shown = gr.skip() if made is None else made
        return [shown, gr.skip(), front] if front == "steps" else [gr.skip(), shown, front]

    # One at a time for the whole page, and of a slider's many values only the last.
    one = {"concurrency_id": "coder", "concurrency_limit": 1, "trigger_mode": "always_last"}
    one |= {"show_progress": "minimal"}
    if controls.generate is not None and generation is not None:
        _connect_generate(gr, controls.generate, generation, tab, one)
    one |= {"outputs": [*controls.answers, tab]}
    hidden = {**one, "api_visibility": "private"}
    given = controls.given
    # A tab is selected when the page opens, too.
    gr.on([controls.upload.change, controls.photograph.input, controls.name.input], show, [tab, *given], **hidden)
    sliders = (controls.steps, controls.sigma)
    for front, label, slider, api_name in zip(controls.tabs, TABS, sliders, ("reconstruct", "perturb"), strict=True):
        front.select(partial(show, label), given, **hidden)
        # Of gradio's events only `change` comes for the mouse, the keyboard, the number box and the reset button alike.
        slider.change(partial(show, label), given, api_name=api_name, api_visibility="undocumented", **one)
    controls.zoom.change(None, controls.zoom, None, js=ON_ZOOM)


def _connect_generate(
    gr: Any, controls: GenerateControls, generation: Generation, tab: Any, one: Mapping[str, Any]
) -> None:
    def show(*given: Any) -> list[Any]:
        """Returns the contents of the tab, and its name."""
        made = _in_gradio_errors(gr, partial(generation, *given))
        return [gr.skip() if made is None else made, "generate"]

    def choose(name: str) -> list[Any]:
        """Returns the lists of classes and coders of another generator."""
        maker = generation.makers.get(name)
        if maker is None:
            return [gr.skip(), gr.skip()]
        return [gr.Dropdown(**_classes(maker)), gr.Dropdown(**_coders(maker))]

    given, outputs = controls.given, [controls.answer, tab]
    hidden = {**one, "api_visibility": "private"}
    controls.tab.select(show, given, outputs, **hidden)
    lists = [controls.class_name, controls.coder]
    chosen = controls.name.input(choose, controls.name, lists, api_visibility="private")
    chosen.then(show, given, outputs, **{name: value for name, value in hidden.items() if name != "trigger_mode"})
    gr.on([one.input for one in lists], show, given, outputs, **hidden)
    for number in (controls.seed, controls.guidance, controls.steps):
        number.change(show, given, outputs, **hidden)
    controls.last.change(show, given, outputs, api_name="generate", api_visibility="undocumented", **one)
    controls.another.click(None, None, controls.seed, js=ON_ANOTHER)


def _in_gradio_errors(gr: Any, compute: Callable[[], str | None]) -> str | None:
    """Returns the result of `compute`, and shows errors that the visitor can mend on the page.

    These leave no traceback in the log.
    """
    try:
        return compute()
    except RacError as error:
        raise gr.Error(str(error), duration=None, title="This cannot be shown", print_exception=False) from None
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "memory" not in str(error):
            raise
        words = "this picture needs more memory than the machine has; choose a smaller one, or fewer steps"
        raise gr.Error(words, title="Out of memory", print_exception=False) from None


def _limits_in_words(limits: Limits) -> str:
    return (
        f"Pictures may have up to {limits.upload_bytes / 2**20:g} MB and {limits.pixels / 1e6:g} megapixels. "
        f"If a side is longer than {limits.side} pixels, the picture is scaled down. "
        "It stays on the machine that serves this page, for an hour at most."
    )


@contextmanager
def serving(page: Page, host: str, port: int, limits: Limits) -> Iterator[str]:
    """Serves a page while the context lasts, and gives its URL.

    - `page`: the page.
    - `host`, `port`: the address to listen at; port 0 takes a free one.
    - `limits`: limits on what visitors may send.

    Raises `RacError` if the server cannot listen at this address.
    """
    gr = need_gradio()
    from starlette.middleware import Middleware

    port = free_port(host, port)
    before = os.environ.get("GRADIO_TEMP_DIR")
    with tempfile.TemporaryDirectory(prefix="rac-serve-") as uploads:
        os.environ["GRADIO_TEMP_DIR"] = uploads
        try:
            _, url, _ = page.blocks.launch(
                server_name=host,
                server_port=port,
                share=False,
                inbrowser=False,
                quiet=True,
                prevent_thread_lock=True,
                show_error=False,
                ssr_mode=False,
                pwa=False,
                mcp_server=False,
                enable_monitoring=False,
                run_history=False,
                footer_links=[],
                allowed_paths=[],
                max_file_size=limits.upload_bytes,
                app_kwargs={
                    "docs_url": None,
                    "redoc_url": None,
                    "openapi_url": None,
                    "middleware": [Middleware(Gate, upload_bytes=limits.upload_bytes)],
                },
                theme=_theme(gr),
                css=STYLE,
                js=ON_LOAD,
            )
            yield url.rstrip("/")
        except OSError as error:
            raise RacError(f"cannot serve at {host}:{port} ({error}); choose another --port") from error
        finally:
            page.blocks.close(verbose=False)
            with page.busy:  # a thread cut off in the middle of torch would take the process down with a crash
                pass
            if before is None:
                os.environ.pop("GRADIO_TEMP_DIR", None)
            else:
                os.environ["GRADIO_TEMP_DIR"] = before


def free_port(host: str, port: int) -> int:
    """Returns `port` if it is free, or a free one for 0.

    Raises `RacError` if the port is taken or `host` is not this machine.
    """
    if not 0 <= port <= 65_535:
        raise RacError(f"port {port} must lie in 0 to 65535; 7860 is a good start")
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
            return int(probe.getsockname()[1])
    except socket.gaierror:
        raise RacError(
            f"host {host!r} is not known; 127.0.0.1 serves this machine only, 0.0.0.0 every machine that can reach it"
        ) from None
    except PermissionError:
        raise RacError(f"port {port} is reserved for the system; choose one above 1023 with --port") from None
    except OSError as error:
        taken = error.errno == 98 or "in use" in str(error)
        reason = "is in use; choose another with --port, or 0 for any"
        if not taken:
            reason = f"is not available ({error.strerror}); choose another --host or --port"
        raise RacError(f"port {port} at {host} {reason}") from None


# ------------------------------------------------------------------------------------------ answers


def _steps_html(loaded: Loaded, image: Tensor, steps: int) -> str:
    made = reconstruct(loaded, image, steps)
    note = f"{loaded.name} decodes in one pass; the number of steps changes nothing." if made.decoding is None else ""
    return (
        notes_html(note)
        + versions_html(image, made.versions)
        + figures_html(made.versions, "round trip")
        + film_html("Encoding: from the image back to the seed state", made.encoding, image)
        + film_html("Decoding: from the latent's seed state to the image", made.decoding, image)
    )


def _noise_html(loaded: Loaded, image: Tensor, sigma: float) -> str:
    versions = decode_noised(loaded, image, sigma)
    owner = f"latent of {loaded.name}" if loaded.teacher is None else "teacher's latent"
    note = f"All decode the same input: the {owner} plus normal noise of {sigma:g} standard deviations."
    return notes_html(note) + versions_html(image, versions) + figures_html(versions, "decoding")


def _teacher_note(loaded: Loaded) -> str:
    missing = loaded.teacher is None and loaded.teacher_name
    return f"The teacher {loaded.teacher_name} is not available here, so it is not compared." if missing else ""


# ------------------------------------------------------------------------------------------ looks


def _theme(gr: Any) -> Any:
    # Plain names: fonts of the machine that looks, none from the web.
    fonts = ["system-ui", "Segoe UI", "Helvetica", "Arial", "sans-serif"]
    return gr.themes.Base(
        primary_hue="blue", neutral_hue="gray", font=fonts, font_mono=["ui-monospace", "Menlo", "monospace"]
    )


HEADER = (
    "<h1>Rectified Flow Auto Coder</h1><p>One network encodes and decodes: its flow turns a latent into an image, "
    "and, followed backwards, an image into a latent.</p>"
)
EMPTY = "<p class='rac-empty'>Upload a picture, or choose a photograph.</p>"

NO_CLASS = "none"
"""What the list of classes calls images of no class."""

ON_ANOTHER = "() => Math.floor(Math.random() * 1e6)"
ON_ZOOM = """(zoom) => {
  const root = document.documentElement;
  root.style.setProperty('--rac-zoom', parseInt(zoom));
  root.classList.toggle('rac-zoomed', parseInt(zoom) > 1);
}"""
# The pointer, or the arrow keys, move the part of the pictures that is shown. Gradio keeps fractions of a step that
# are typed; they become the number that is computed once the box is left or Enter pressed.
ON_LOAD = """() => {
  const root = document.documentElement;
  let x = 50, y = 50;
  const aim = (across, down) => {
    [x, y] = [across, down].map((percent) => Math.min(Math.max(percent, 0), 100));
    root.style.setProperty('--rac-x', x + '%');
    root.style.setProperty('--rac-y', y + '%');
  };
  document.addEventListener('pointermove', (event) => {
    const lens = event.target.closest && event.target.closest('.rac-lens');
    if (!lens) return;
    const box = lens.getBoundingClientRect();
    aim(100 * (event.clientX - box.left) / box.width, 100 * (event.clientY - box.top) / box.height);
  });
  const moves = {ArrowLeft: [-10, 0], ArrowRight: [10, 0], ArrowUp: [0, -10], ArrowDown: [0, 10]};
  document.addEventListener('keydown', (event) => {
    const move = moves[event.key];
    if (!move || !root.classList.contains('rac-zoomed') || !event.target.matches('.rac-pictures')) return;
    event.preventDefault();
    aim(x + move[0], y + move[1]);
  });
  document.addEventListener('change', ({target}) => {
    if (target.type !== 'number' || target.step !== '1' || Number.isInteger(Number(target.value))) return;
    target.value = Math.round(target.value);
    target.dispatchEvent(new Event('input', {bubbles: true}));
  });
}"""

STYLE = """
.gradio-container { max-width: 1180px !important; margin: 0 auto !important; }
.gradio-container > .main { padding: 1rem clamp(.75rem, 4vw - .25rem, 2rem) !important; }
.rac-header h1 { font-size: 1.6rem; font-weight: 650; letter-spacing: -.01em; margin: .6rem 0 .15rem; }
.rac-header p, .rac-note, .rac-empty { color: var(--body-text-color-subdued); }
.rac-note { font-size: .85rem; line-height: 1.45; margin: .15rem 0 .5rem; }
.rac-empty { padding: 3rem 1rem; text-align: center; }
/* gradio takes the ring away from sliders, lists and zoom. */
.gradio-container :is(input, button, [role=tab], [tabindex]):focus-visible {
  outline: 2px solid var(--color-accent) !important; outline-offset: 2px; }
.rac-pictures { display: grid; gap: 1rem; margin: .5rem 0 1rem;
  grid-template-columns: repeat(var(--columns), minmax(0, 1fr)); }
.rac-pictures figure, .rac-film figure { margin: 0; }
.rac-lens { overflow: hidden; border-radius: 8px; background: var(--background-fill-secondary); }
.rac-zoomed .rac-lens { cursor: crosshair; touch-action: none; }
.rac-lens img { display: block; width: 100%; height: auto; image-rendering: pixelated;
  transform-origin: var(--rac-x, 50%) var(--rac-y, 50%); transform: scale(var(--rac-zoom, 1)); }
.rac-pictures figcaption { display: flex; flex-wrap: wrap; justify-content: space-between; gap: 0 .75rem;
  font-size: .875rem; padding: .4rem .1rem; font-variant-numeric: tabular-nums; }
.rac-pictures figcaption b { font-weight: 600; }
.rac-pictures figcaption span, .rac-film figcaption { color: var(--body-text-color-subdued); }
/* The page hands out no files: there is nothing behind gradio's link to the upload. */
.rac-controls .download { visibility: hidden; }
.rac-generate { align-items: end; }
.rac-choices .form { flex-direction: column; }
.rac-zoom .wrap { gap: .3rem !important; }
.rac-zoom label { padding: .3rem .5rem !important; }
/* They scroll: what is in them must not widen the page. */
.rac-table, .rac-film { contain: inline-size; overflow-x: auto; }
.rac-table :is(table, thead, tbody, tr) { border: 0 !important; }
.rac-table table { border-collapse: collapse; width: 100%; font-size: .9rem;
  font-variant-numeric: tabular-nums; }
.rac-table th, .rac-table td { padding: .35rem 0 .35rem .75rem; text-align: right; white-space: nowrap;
  border: 0; border-bottom: 1px solid var(--border-color-primary); background: none; }
.rac-table th { font-weight: 600; color: var(--body-text-color-subdued); vertical-align: bottom; }
.rac-table th:first-child, .rac-table td:first-child { text-align: left; padding-left: 0; white-space: normal; }
.rac-title { font-size: .95rem; font-weight: 600; margin: 1.4rem 0 .5rem; }
.rac-film { display: flex; gap: .5rem; padding-bottom: .5rem; }
.rac-film figure { flex: 0 0 auto; text-align: center; }
.rac-film img { display: block; height: 112px; width: auto; border-radius: 5px; }
.rac-film figcaption { font-size: .75rem; padding-top: .25rem; font-variant-numeric: tabular-nums; }
@media (max-width: 900px) {
  .rac-main { flex-direction: column !important; }
  .rac-main > * { width: 100% !important; min-width: 0 !important; flex: none !important; }
  .rac-controls { gap: .6rem !important; }
  .rac-choices .form { flex-flow: row nowrap; }
  .rac-zoom { display: flex; align-items: center; gap: .75rem; }
  .rac-zoom > span { margin: 0 !important; }
  .rac-controls .upload-container { height: 4rem !important; padding-top: 1.5rem; }
  .rac-controls .upload-container .wrap { flex-direction: row; gap: .35rem; min-height: 0; padding: 0;
    font-size: .875rem; }
  .rac-controls .upload-container .icon-wrap { display: none; }
}
@media (max-width: 640px) {
  .rac-header h1 { font-size: 1.2rem; margin-top: 0; }
  .rac-header p { font-size: .85rem; line-height: 1.35; }
  .rac-answer .html-container { padding: 0 !important; }
  .rac-pictures { gap: .4rem; }
  .rac-pictures figcaption { font-size: .75rem; }
  .rac-table table { font-size: .75rem; }
  .rac-table th, .rac-table td { padding-left: .4rem; }
  .rac-table th { white-space: normal; }
  .rac-film img { height: 88px; }
}
"""
