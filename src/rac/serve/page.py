"""How the page looks and what its controls do. gradio is imported when a page is made."""

from __future__ import annotations

import base64
import io
import math
import os
import socket
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from html import escape
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image
from torch import Tensor

from ..errors import RacError
from ..flow import Trajectory
from ..images import PICTURE_SUFFIXES, crop, to_pixels
from ..report.document import Table
from ..runtime import pick_device
from .figures import Loaded, Version, decode_noised, reconstruct
from .guard import Gate, Limits, admit

GREATEST_STEPS = 16
FILM_SIDE = 144
"""Of the pictures of a film strip; they are there to be seen side by side, not to be judged."""

Load = Callable[[str], Loaded]


class Page(NamedTuple):
    """What `serving` serves."""

    blocks: Any
    """gradio's, with the queue."""
    busy: threading.Lock
    """Held while a picture is worked on."""


def need_gradio() -> Any:
    """gradio, told to keep to itself. Raises `RacError` where it is not installed."""
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    try:
        import gradio
    except ImportError as error:
        raise RacError(
            f"rac serve needs gradio ({error}); install the extra: pip install 'rectified-auto-coder[serve]'"
        ) from None
    return gradio


def build(
    load: Load,
    names: Sequence[str],
    limits: Limits,
    *,
    photographs: Mapping[str, Path] | None = None,
    device: str = "cpu",
) -> Page:
    """The page.

    `load` gives the coder of one of `names`, the first of which is chosen at first; `photographs` are offered beside
    what visitors upload. The two endpoints are "reconstruct" and "perturb".
    """
    gr = need_gradio()
    photographs, busy = photographs or {}, threading.Lock()

    def show(tab: str, upload: str | None, photograph: str | None, name: str, steps: float, sigma: float) -> list[Any]:
        """What stands in both tabs, of which only the one in front is computed, and which that is."""
        path = upload or photographs.get(photograph or "")
        if path is None:
            return [EMPTY, EMPTY, tab]
        try:
            with busy:
                made = _answer(tab, admit(path, limits), load(name), int(steps), float(sigma), device)
        except RacError as error:
            raise gr.Error(str(error), duration=None, title="This cannot be shown", print_exception=False) from None
        except (MemoryError, RuntimeError) as error:
            if isinstance(error, RuntimeError) and "memory" not in str(error):
                raise
            words = "this picture is too much for the machine; take a smaller one, or fewer steps"
            raise gr.Error(words, title="Out of memory", print_exception=False) from None
        return [made, gr.skip(), tab] if tab == "steps" else [gr.skip(), made, tab]

    with gr.Blocks(title="rac", analytics_enabled=False, delete_cache=(600, 3000)) as blocks:
        gr.HTML(HEADER, elem_classes="rac-header")
        tab = gr.State("steps")
        with gr.Row(equal_height=False, elem_classes="rac-main"):
            with gr.Column(scale=1, min_width=280, elem_classes="rac-controls"):
                upload = gr.File(label="Your picture", file_types=list(PICTURE_SUFFIXES), type="filepath", height=132)
                photograph = gr.Dropdown(
                    list(photographs),
                    value=next(iter(photographs), None),
                    label="or a photograph",
                    visible=bool(photographs),
                )
                name = gr.Dropdown(list(names), value=names[0], label="Coder")
                zoom = gr.Radio(
                    ["1x", "2x", "4x", "8x"],
                    value="1x",
                    label="Zoom",
                    info="point at a picture",
                    elem_classes="rac-zoom",
                )
                gr.HTML(_limits_in_words(limits), elem_classes="rac-note")
            with gr.Column(scale=4, min_width=300), gr.Tabs():
                with gr.Tab("Steps", id="steps") as first:
                    steps = gr.Slider(1, GREATEST_STEPS, 4, step=1, label="Steps, each way")
                    there_and_back = gr.HTML(EMPTY, elem_classes="rac-answer")
                with gr.Tab("Moved latents", id="moved") as second:
                    sigma = gr.Slider(0, 1.5, 0.5, step=0.05, label="Noise on the latent, in its own deviations")
                    moved = gr.HTML(EMPTY, elem_classes="rac-answer")
        given, shown = [upload, photograph, name, steps, sigma], [there_and_back, moved, tab]
        # One at a time for the whole page, and of a slider's many values only the last.
        one = {"concurrency_id": "coder", "concurrency_limit": 1, "trigger_mode": "always_last", "outputs": shown}
        one["show_progress"] = "minimal"
        hidden = {**one, "api_visibility": "private"}
        # A tab is selected when the page opens, too.
        gr.on([upload.change, photograph.input, name.input], show, [tab, *given], **hidden)
        for front, label in ((first, "steps"), (second, "moved")):
            front.select(partial(show, label), given, **hidden)
        open_ = {**one, "api_visibility": "undocumented"}
        steps.release(partial(show, "steps"), given, api_name="reconstruct", **open_)
        sigma.release(partial(show, "moved"), given, api_name="perturb", **open_)
        zoom.change(None, zoom, None, js=ZOOM)
    blocks.queue(max_size=limits.waiting, default_concurrency_limit=1, api_open=False)
    return Page(blocks, busy)


def _limits_in_words(limits: Limits) -> str:
    return (
        f"Pictures up to {limits.upload_bytes / 2**20:g} MB and {limits.pixels / 1e6:g} megapixels; above "
        f"{limits.side} pixels a side they are scaled down. "
        "They stay on the machine that serves this page, for an hour at most."
    )


@contextmanager
def serving(page: Page, host: str, port: int, limits: Limits) -> Iterator[str]:
    """Serve `page` at the address given while the context lasts; gives its URL. `port` 0 takes a free one.

    Raises `RacError` where the address cannot be had.
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
                js=POINTER,
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
    """`port` if it is free, any free one for 0. Raises `RacError` if it is taken, or `host` is not ours."""
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
            f"host {host!r} is not known; 127.0.0.1 is this machine alone, 0.0.0.0 all that reach it"
        ) from None
    except PermissionError:
        raise RacError(f"port {port} is not for ordinary users; choose one above 1023 with --port") from None
    except OSError as error:
        taken = error.errno == 98 or "in use" in str(error)
        mend = "is in use; choose another with --port, or 0 for any" if taken else f"cannot be had ({error.strerror})"
        raise RacError(f"port {port} at {host} {mend}") from None


# ------------------------------------------------------------------------------------------ answers


def _answer(tab: str, admitted: Any, loaded: Loaded, steps: int, sigma: float, device: str) -> str:
    image = admitted.image.to(pick_device(device))
    notes = [admitted.note]
    if tab == "steps":
        made = reconstruct(loaded, image, steps)
        if made.decoding is None:
            notes.append(f"{loaded.name} decodes at once: the steps change nothing.")
        body = pictures_html(image, made.versions) + figures_html(made.versions, "there and back")
        body += film_html("Encoding: the image flows back to the seed state", made.encoding, image)
        body += film_html("Decoding: the latent's seed state flows to the image", made.decoding, image)
    else:
        versions = decode_noised(loaded, image, sigma)
        owner = "own" if loaded.teacher is None else "teacher's"
        notes.append(f"All of these decode the same latent, the {owner}, moved by {sigma:g} of its deviation.")
        body = pictures_html(image, versions) + figures_html(versions, "decoding alone")
    if loaded.teacher is None and loaded.teacher_name:
        notes.append(f"The teacher {loaded.teacher_name} is not to be had here.")
    said = "".join(f"<p class='rac-note'>{escape(note)}</p>" for note in notes if note)
    return said + body


def pictures_html(image: Tensor, versions: Sequence[Version]) -> str:
    """The original and its versions side by side, in lenses that move together."""
    cells = [("original", f"{image.shape[-1]} x {image.shape[-2]}", image)]
    cells += [(one.name, f"{_decibels(one.psnr)} dB", one.image) for one in versions]
    columns = 3 if len(cells) in (3, 5, 6) else len(cells)
    figures = "".join(
        f"<figure><div class='rac-lens'><img src='{_png(picture)}' alt='{escape(name)}'></div>"
        f"<figcaption><b>{escape(name)}</b><span>{escape(note)}</span></figcaption></figure>"
        for name, note, picture in cells
    )
    return f"<div class='rac-pictures' style='--columns:{columns}'>{figures}</div>"


def figures_html(versions: Sequence[Version], what: str) -> str:
    """PSNR, SSIM, time and cost of each version."""
    rows = tuple(
        (
            one.name,
            _decibels(one.psnr),
            "-" if math.isnan(one.ssim) else f"{one.ssim:.3f}",
            f"{1000 * one.seconds:,.0f} ms",
            f"{one.evaluations}",
            f"{one.macs / 1e9:.3g}",
        )
        for one in versions
    )
    table = Table((what, "PSNR dB", "SSIM", "time", "evaluations", "GMACs"), rows)
    return f"<div class='rac-table'>{table.to_html()}</div>"


def film_html(title: str, flow: Trajectory | None, image: Tensor) -> str:
    """The states of a flow, first three channels, in the order in which they were walked."""
    if flow is None:
        return ""
    frames = "".join(
        f"<figure><img src='{_thumbnail(crop(state[:, :3], (image.shape[-2], image.shape[-1])))}' alt='t = {time:.3g}'>"
        f"<figcaption>t = {time:.3g}</figcaption></figure>"
        for state, time in zip(flow.states, flow.times, strict=True)
    )
    return f"<h3 class='rac-title'>{escape(title)}</h3><div class='rac-film'>{frames}</div>"


def _decibels(psnr: float) -> str:
    return f"{psnr:.2f}" if math.isfinite(psnr) else "∞"


def _png(image: Tensor) -> str:
    return _data(Image.fromarray(to_pixels(image)), "PNG")


def _thumbnail(image: Tensor) -> str:
    picture = Image.fromarray(to_pixels(image))
    picture.thumbnail((FILM_SIDE, FILM_SIDE), Image.Resampling.LANCZOS)
    return _data(picture, "JPEG", quality=92, subsampling=0)


def _data(picture: Image.Image, kind: str, **options: Any) -> str:
    buffer = io.BytesIO()
    picture.save(buffer, kind, **options)
    return f"data:image/{kind.lower()};base64,{base64.b64encode(buffer.getvalue()).decode()}"


# ------------------------------------------------------------------------------------------ looks


def _theme(gr: Any) -> Any:
    # Plain names: fonts of the machine that looks, none from the web.
    fonts = ["system-ui", "Segoe UI", "Helvetica", "Arial", "sans-serif"]
    return gr.themes.Base(
        primary_hue="blue", neutral_hue="gray", font=fonts, font_mono=["ui-monospace", "Menlo", "monospace"]
    )


HEADER = (
    "<h1>Rectified Flow Auto Coder</h1><p>One velocity field: followed forwards it decodes a latent to an image, "
    "followed backwards it is the encoder.</p>"
)
EMPTY = "<p class='rac-empty'>Drop a picture, or choose a photograph.</p>"

ZOOM = "(zoom) => document.documentElement.style.setProperty('--rac-zoom', parseInt(zoom))"
POINTER = """() => document.addEventListener('pointermove', (event) => {
  const lens = event.target.closest && event.target.closest('.rac-lens');
  if (!lens) return;
  const box = lens.getBoundingClientRect(), root = document.documentElement.style;
  root.setProperty('--rac-x', 100 * (event.clientX - box.left) / box.width + '%');
  root.setProperty('--rac-y', 100 * (event.clientY - box.top) / box.height + '%');
})"""

STYLE = """
.gradio-container { max-width: 1180px !important; margin: 0 auto !important; }
.rac-header h1 { font-size: 1.6rem; font-weight: 650; letter-spacing: -.01em; margin: .6rem 0 .15rem; }
.rac-header p, .rac-note, .rac-empty { color: var(--body-text-color-subdued); }
.rac-note { font-size: .85rem; line-height: 1.45; margin: .15rem 0 .5rem; }
.rac-empty { padding: 3rem 1rem; text-align: center; }
.rac-pictures { display: grid; gap: 1rem; margin: .5rem 0 1rem;
  grid-template-columns: repeat(var(--columns), minmax(0, 1fr)); }
.rac-pictures figure, .rac-film figure { margin: 0; }
.rac-lens { overflow: hidden; border-radius: 8px; cursor: crosshair; touch-action: none;
  background: var(--background-fill-secondary); }
.rac-lens img { display: block; width: 100%; height: auto; image-rendering: pixelated;
  transform-origin: var(--rac-x, 50%) var(--rac-y, 50%); transform: scale(var(--rac-zoom, 1)); }
.rac-pictures figcaption { display: flex; flex-wrap: wrap; justify-content: space-between; gap: 0 .75rem;
  font-size: .875rem; padding: .4rem .1rem; font-variant-numeric: tabular-nums; }
.rac-pictures figcaption b { font-weight: 600; }
.rac-pictures figcaption span, .rac-film figcaption { color: var(--body-text-color-subdued); }
.rac-controls .download { pointer-events: none; }
.rac-zoom label { padding: .3rem .55rem !important; }
/* They scroll: what is in them must not widen the page. */
.rac-table, .rac-film { contain: inline-size; overflow-x: auto; }
.rac-table :is(table, thead, tbody, tr) { border: 0 !important; }
.rac-table table { border-collapse: collapse; width: 100%; font-size: .9rem;
  font-variant-numeric: tabular-nums; }
.rac-table th, .rac-table td { padding: .35rem .75rem .35rem 0; text-align: right; white-space: nowrap;
  border: 0; border-bottom: 1px solid var(--border-color-primary); background: none; }
.rac-table th { font-weight: 600; color: var(--body-text-color-subdued); }
.rac-table th:first-child, .rac-table td:first-child { text-align: left; }
.rac-title { font-size: .95rem; font-weight: 600; margin: 1.4rem 0 .5rem; }
.rac-film { display: flex; gap: .5rem; padding-bottom: .5rem; }
.rac-film figure { flex: 0 0 auto; text-align: center; }
.rac-film img { display: block; height: 112px; width: auto; border-radius: 5px; }
.rac-film figcaption { font-size: .75rem; padding-top: .25rem; font-variant-numeric: tabular-nums; }
@media (max-width: 640px) {
  .rac-pictures { grid-template-columns: repeat(min(2, var(--columns)), minmax(0, 1fr)); gap: .6rem; }
  .rac-film img { height: 88px; }
}
@media (max-width: 760px) {
  .rac-main { flex-direction: column !important; }
  .rac-main > * { width: 100% !important; min-width: 0 !important; flex: none !important; }
}
"""
