"""Reading a verb's options off the command line, with help texts that fit the terminal."""

from __future__ import annotations

import inspect
import shutil
import textwrap
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import docstring_parser
import tyro
from docstring_parser import Docstring, DocstringStyle

T = TypeVar("T")


def read_options(cls: type[T], prog: str, arguments: Sequence[str], description: str | None = None) -> T:
    """Returns the dataclass `cls` with the values that `arguments` give, or prints the help text and exits.

    `prog` is the beginning of the command, such as "rac encode"; `description` stands above the options in the help
    text; None: the docstring of `cls`.
    """
    text = inspect.getdoc(cls) if description is None else description
    width = shutil.get_terminal_size().columns
    # tyro wraps no line of this text, and keeps a line break only before a line that is indented.
    wrapped = (textwrap.fill(paragraph, width, subsequent_indent="  ") for paragraph in (text or "").split("\n\n"))
    with _options_described_in_one_line():
        return tyro.cli(
            cls,
            prog=prog,
            description="\n\n".join(wrapped),
            args=arguments,
            # A field of a recipe stays of the recipe's kind, and its settings stay plain options.
            config=(tyro.conf.AvoidSubcommands,),
        )


@contextmanager
def _options_described_in_one_line() -> Iterator[None]:
    """Takes the line breaks of our source files out of the texts of options.

    tyro reads these texts by `docstring_parser.parse_from_object`, and keeps a line break where the next line is
    indented, as all lines of ours are.
    """
    original = docstring_parser.parse_from_object

    def parsed(obj: Any, style: DocstringStyle = DocstringStyle.AUTO) -> Docstring:
        docstring = original(obj, style)
        for option in docstring.params:
            option.description = option.description and " ".join(option.description.split())
        return docstring

    docstring_parser.parse_from_object = parsed
    try:
        yield
    finally:
        docstring_parser.parse_from_object = original
