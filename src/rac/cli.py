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
import textwrap
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout
from typing import Any

from .errors import RacError, out_of_memory, printable
from .files import disk_full, home_expanded
from .notices import spoken
from .report.terminal import listing

LEAST_COLUMNS = 40
"""Least width that help texts are laid out for."""

VERBS = {
    "reconstruct": "encode and decode images; write comparison pictures, PSNR and SSIM",
    "encode": "encode images to latents",
    "decode": "decode latents to images",
    "cache": "prepare crops and a teacher's latents of them, to train on",
    "train": "train a coder or a generator: rac train RECIPE --out FOLDER",
    "generate": "generate images of classes: rac generate MODEL --classes A B --out FOLDER",
    "gap": "measure how much worse generated latents decode than encoded ones, by decoder",
    "evaluate": "measure a coder on images under a named protocol",
    "compare": "compare coders: quality, cost, speed, and pictures of where they differ",
    "smoothness": "measure how evenly decoded images move with the latent, coder against coder",
    "ablate": "train and compare variants of a recipe: rac ablate RECIPE --vary FIELD=A,B --out FOLDER",
    "cost": "list parameters and MACs of recipes, shipped models and well-known autoencoders",
    "bench": "measure images per second to train, encode, decode and generate, and where the time goes",
    "export": "export a coder as an ONNX file or a PyTorch program",
    "convert": "turn public checkpoints of SiT and the like into generators, and back",
    "weights": "list the weight files that metrics and training may need, and convert published ones",
    "models": "list the shipped coders and generators and what they cost",
    "demo": "reconstruct real photographs with the shipped RAC and write an HTML report",
    "toy": "train a RAC on points of the plane in seconds, and draw how it decodes and encodes",
    "serve": "open a page in the browser to try coders on pictures (needs the extra `serve`)",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line, with the process's arguments if none are given, and returns the exit code."""
    with warnings.catch_warnings(), _somewhere_to_write(), spoken(), _wide_enough():
        warnings.showwarning = _printing_once()
        # Pillow's complaints of damaged files name no file; our errors do.
        warnings.filterwarnings("ignore", module=r"PIL\.")
        _escape_what_cannot_be_printed()
        try:
            code = _dispatch(_as_a_shell_would(sys.argv[1:] if arguments is None else arguments))
            sys.stdout.flush()  # here, where a full disk can still be named
            return code
        except KeyboardInterrupt:
            return _fail("stopped", 130)
        except BrokenPipeError:
            # The reader, such as `head`, has gone.
            _drop_output()
            return 0
        except RacError as error:
            return _fail(f"error: {error}", 2)
        except OSError as error:
            where = f": {error.filename}" if error.filename else ""
            if disk_full(error):
                _drop_output()
                return _fail(f"error: the disk is full{where}; free some space, or write to another disk", 2)
            return _fail(f"error: {error.strerror or error}{where}", 2)
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
        hint = f"did you mean {near[0]}?" if near else f"try {', '.join(VERBS)}"
        raise RacError(f"there is no verb {verb!r}; {hint}")
    module = importlib.import_module(f".commands.{verb}", __package__)
    from .runtime import keep_memory

    keep_memory()
    if verb in ("train", "ablate"):
        return module.run(rest)

    from .commands.options import read_options

    return read_options(module.Command, f"rac {verb}", rest).run()


def _as_a_shell_would(arguments: Sequence[str]) -> list[str]:
    """Returns `arguments` with ~ replaced by the home folder also where a shell leaves it: in quotes, and after =.

    Raises `RacError` for an empty argument: as a path it would stand for the working folder.
    """
    expanded = []
    for argument in arguments:
        option, equals, value = argument.partition("=") if argument.startswith("--") else ("", "", argument)
        if not value and (equals or not option):
            what = f"{option} has no value" if option else "an argument is empty"
            raise RacError(f"{what}; is a shell variable unset? Give a value, or . for the current folder")
        expanded.append(option + equals + (str(home_expanded(value)) if value.startswith("~") else value))
    return expanded


def _overview() -> int:
    width = shutil.get_terminal_size().columns
    print("usage: rac VERB [options]\n")
    print(textwrap.fill("Encode images to latents, decode latents to images, and generate images of classes.", width))
    print("\n" + listing(VERBS, width))
    print("rac VERB --help lists a verb's options.")
    return 0


@contextmanager
def _wide_enough() -> Iterator[None]:
    """Lays help texts out for 40 columns at least: for one column the layout would take gigabytes."""
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


@contextmanager
def _somewhere_to_write() -> Iterator[None]:
    """Discards what is printed where the output was closed (`rac ... >&-`), and Python has no stream for it."""
    with open(os.devnull, "w", encoding="utf-8") as nowhere, ExitStack() as redirected:
        if sys.stdout is None:
            redirected.enter_context(redirect_stdout(nowhere))
        if sys.stderr is None:
            redirected.enter_context(redirect_stderr(nowhere))
        yield


def _drop_output() -> None:
    """Discards what is left to print, since Python would complain once more of an output that fails at its exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _escape_what_cannot_be_printed() -> None:
    """Prints names that the output's encoding lacks as escapes, so that they do not end a batch with a traceback."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _fail(line: str, code: int) -> int:
    """Prints a message to stderr as one line, whatever line breaks it has, and returns the exit code."""
    print(f"rac: {printable(' '.join(line.split()))}", file=sys.stderr)
    return code


def _printing_once() -> Callable[..., None]:
    """What prints a warning as one line, unless the same line was printed before: some collections are read twice."""
    printed: set[str] = set()

    def show(message: Warning | str, *_: Any, **__: Any) -> None:
        if str(message) not in printed:
            printed.add(str(message))
            print(f"rac: warning: {printable(str(message))}", file=sys.stderr)

    return show
