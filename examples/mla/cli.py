"""The command line: flags from a dataclass, and one line for every error."""

import contextlib
import importlib
import io
import itertools
import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import jax
import tyro
from rich.console import Console

Settings = TypeVar("Settings")


class InputError(Exception):
    """An error that the user can correct; its text is the one line to show, with the fix in it."""


def console() -> Console:
    """The console of a run; of several processes, only the first prints."""
    return Console(quiet=jax.process_index() > 0)


def shown(text: str, *, keep: str = "") -> str:
    """The text with escapes for all that would not show, such as line breaks, the codes that move
    a terminal's cursor, and bytes that are not UTF-8; but for those in `keep`."""
    return "".join(c if c.isprintable() or c in keep else repr(c)[1:-1] for c in text)


def say(console: Console, text: str, *, keep: str = "") -> None:
    """Prints text as it is: nothing in it is markup."""
    console.print(
        shown(text, keep=keep), markup=False, emoji=False, highlight=False, soft_wrap=True
    )


def parse(
    settings: type[Settings],
    args: Sequence[str] | None,
    *,
    prog: str,
    description: str | None = None,
    default: Settings | None = None,
) -> Settings:
    """Reads the flags.

    Args:
      settings: The dataclass whose fields are the flags.
      args: The arguments; None for those of the process.
      prog: The command, for `--help`.
      description: What the command does; None for the dataclass's docstring.
      default: The values of flags that are not given; None for the dataclass's own defaults.

    Raises:
      InputError: A flag that does not exist, or a value that does not parse or fit.
    """
    with _tyro_errors(), one_line_errors():
        return tyro.cli(
            settings,
            args=args,
            prog=prog,
            description=description,
            default=tyro.MISSING_NONPROP if default is None else default,
        )


def peek(settings: type[Settings], args: Sequence[str] | None) -> Settings:
    """Reads the flags of `settings` and ignores all others.

    Raises:
      InputError: A value that does not parse or fit.
    """
    with _tyro_errors(), one_line_errors():
        return tyro.cli(settings, args=args, return_unknown_args=True, add_help=False)[0]


@contextlib.contextmanager
def _tyro_errors() -> Iterator[None]:
    """Turns tyro's framed error and exit into an `InputError`."""
    box = io.StringIO()
    try:
        with contextlib.redirect_stderr(box):
            yield
    except SystemExit as stop:
        if not stop.code:  # --help
            raise
        raise InputError(_first_message(box.getvalue()) + " (see --help)") from None


def _first_message(box: str) -> str:
    """The text of tyro's error, between its title and its next rule, without the frame, and the
    flags that tyro finds nearest to those unknown; where the output is not in Unicode, rules are
    hyphens and there is no frame."""

    def is_rule(line: str) -> bool:
        return re.fullmatch("[─-]+|╰─+╯", line) is not None

    _title, *body = filter(None, (line.strip(" │") for line in box.splitlines()))
    message = itertools.takewhile(
        lambda line: not is_rule(line), itertools.dropwhile(is_rule, body)
    )
    nearest = sorted(
        re.findall(r"(?:Perhaps you meant|Arguments similar to \S+):[\s│]*(--[\w-]+)", box)
    )  # tyro's order is that of a set
    meant = f"; did you mean {', '.join(nearest)}?" if nearest else ""
    return " ".join(" ".join(message).split()) + meant


@contextlib.contextmanager
def one_line_errors() -> Iterator[None]:
    """Turns the library's and the model's errors about wrong settings into an `InputError`."""
    try:
        yield
    except (ValueError, TypeError) as error:
        raise InputError(" ".join(str(error).split())) from error


def optional(module: str, package: str, *, wanted_by: str) -> Any:
    """Imports what the example does without.

    Raises:
      InputError: The package is not installed.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise InputError(
            f"{wanted_by}: this takes {package}, which is not installed; pip install {package}"
        ) from error


def run(main: Callable[[], int]) -> int:
    """Calls `main`, prints an error in one line, and returns the exit status.

    0 is success, 2 wrong input, 128 + n a stop by signal n.
    """
    try:
        return main()
    except InputError as error:
        print(f"error: {shown(str(error))}", file=sys.stderr)
    except OSError as error:
        path = error.filename2 or error.filename  # the file meant, not the partial one beside it
        where = f"{os.fsdecode(path)}: " if isinstance(path, str | bytes) else ""
        print(f"error: {shown(f'{where}{error.strerror or error}')}", file=sys.stderr)
    except KeyboardInterrupt:
        print(
            "error: interrupted outside of training; what was saved before is kept", file=sys.stderr
        )
        return 130
    return 2
