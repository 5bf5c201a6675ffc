"""The command `rac`: finds the verb, imports it alone, and turns errors into one line and an exit code.

Exit codes: 0 done; 1 some files of a batch failed; 2 nothing was done, for the reason on stderr; 130 Ctrl-C.
"""

from __future__ import annotations

import difflib
import importlib
import io
import os
import shutil
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from .errors import RacError, out_of_memory
from .notices import spoken

LEAST_COLUMNS = 40
"""Width that help texts are laid out for at least."""

VERBS = {
    "reconstruct": "images through a coder and back: strips, trajectories, PSNR and SSIM",
    "encode": "images to latents",
    "decode": "latents to images",
    "cache": "crops and a teacher's latents of them, prepared once, to train on",
    "train": "train a coder: rac train RECIPE --out FOLDER",
    "evaluate": "judge a coder on images under a named protocol",
    "compare": "several coders side by side: quality, cost, speed, and pictures of where they differ",
    "ablate": "variants of a recipe, trained alike and judged alike: rac ablate RECIPE --vary FIELD=A,B --out FOLDER",
    "cost": "parameters and MACs of every recipe, shipped coder and well-known autoencoder",
    "bench": "images per second to train, encode and decode, what the time goes into, and the share of this machine",
    "export": "a coder as an ONNX file, or an exported PyTorch program, for other runtimes",
    "weights": "the weight files of LPIPS, KID and FID: which are there, and conversion of published ones",
    "models": "the shipped coders, and what coders cost",
    "demo": "a tour of the shipped RAC on real photographs, as an HTML report",
    "toy": "RAC's idea on points of the plane: trained in seconds, drawn forward and back",
    "serve": "a page in the browser: drop a picture, move the steps (needs the extra `serve`)",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; `arguments` are those of the process where none are given. Returns the exit code."""
    with warnings.catch_warnings(), spoken(), _wide_enough():
        warnings.showwarning = _warn
        # Pillow's complaints of damaged files name no file; our errors do.
        warnings.filterwarnings("ignore", module=r"PIL\.")
        _escape_what_cannot_be_printed()
        try:
            return _dispatch(list(sys.argv[1:] if arguments is None else arguments))
        except KeyboardInterrupt:
            return _fail("stopped", 130)
        except BrokenPipeError:
            # The reader, such as `head`, has gone; without this Python would complain once more at exit.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 0
        except RacError as error:
            return _fail(f"error: {error}", 2)
        except OSError as error:
            return _fail(f"error: {error.strerror or error}{f': {error.filename}' if error.filename else ''}", 2)
        except (MemoryError, RuntimeError) as error:
            if not out_of_memory(error):
                raise
            return _fail("error: out of memory; take tiles (--tile), smaller images (--size) or another device", 2)


def _dispatch(arguments: list[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        return _overview()
    verb, *rest = arguments
    if verb in ("--version", "version"):
        from . import __version__

        print(f"rac {__version__}")
        return 0
    if verb not in VERBS:
        near = difflib.get_close_matches(verb, VERBS, n=1)
        raise RacError(f"no verb {verb!r}; " + (f"did you mean {near[0]}?" if near else f"try {', '.join(VERBS)}"))
    module = importlib.import_module(f".commands.{verb}", __package__)
    from .runtime import keep_memory

    keep_memory()
    if verb in ("train", "ablate"):
        return module.run(rest)

    import tyro

    return tyro.cli(module.Command, prog=f"rac {verb}", args=rest).run()


def _overview() -> int:
    width = max(len(verb) for verb in VERBS)
    print("usage: rac VERB [options]\n\nRAC, the rectified flow auto coder: images to latents and back, in steps.\n")
    for verb, summary in VERBS.items():
        print(f"  {verb:<{width}}  {summary}")
    print("\nrac VERB --help lists a verb's options.")
    return 0


@contextmanager
def _wide_enough() -> Iterator[None]:
    """Let help texts be laid out for 40 columns at least: for one column the layout would take gigabytes."""
    before = os.environ.get("COLUMNS")
    if shutil.get_terminal_size().columns < LEAST_COLUMNS:
        os.environ["COLUMNS"] = str(LEAST_COLUMNS)
    try:
        yield
    finally:
        if before is None:
            os.environ.pop("COLUMNS", None)
        else:
            os.environ["COLUMNS"] = before


def _escape_what_cannot_be_printed() -> None:
    """Let names that the output's encoding lacks come out as escapes, and not end a batch with a traceback."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _fail(line: str, code: int) -> int:
    """Print one line, whatever the message is made of."""
    print(f"rac: {' '.join(line.split())}", file=sys.stderr)
    return code


def _warn(message: Warning | str, category: type[Warning], *_: Any, **__: Any) -> None:
    print(f"rac: warning: {message}", file=sys.stderr)
