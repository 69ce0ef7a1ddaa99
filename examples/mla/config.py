"""Flags from a TOML file: `--config FILE`. Every run leaves its own as settings.toml."""

import difflib
import os
import sys
import tomllib
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import tomli_w

from examples.mla import cli, metrics
from examples.mla.cli import InputError
from examples.mla.devices import Devices
from examples.mla.folder import write_whole
from examples.mla.settings import Launch, Settings, arguments, flag

FILE = "settings.toml"
KEYS = {
    *metrics.flat(Settings().to_json()),
    *(field.name for field in fields(Devices)),
    "run_dir",
}


def expanded(args: Sequence[str] | None) -> list[str]:
    """The arguments (None: the process's), with those of the file that `--config` names before
    them: of a flag that is given twice, the last counts.

    Raises:
      InputError: The file is no TOML, or has a key that is no flag.
    """
    given = sys.argv[1:] if args is None else list(args)
    file = cli.peek(Launch, given).config
    return [*arguments(read(file)), *given] if file else given


def read(file: Path) -> dict[str, Any]:
    """Flags and values of a file.

    Raises:
      InputError: It is no TOML, or has a key that is no flag.
    """
    try:
        values = tomllib.loads(os.fsdecode(file.read_bytes()))
    except tomllib.TOMLDecodeError as error:
        raise InputError(f"{file}: no TOML ({error})") from error
    tables = {key: value for key, value in values.items() if isinstance(value, dict)}
    inside = {f"{key}.{name}": v for key, table in tables.items() for name, v in table.items()}
    flags = {key: value for key, value in values.items() if key not in tables} | inside
    return {_name(key, value, file): value for key, value in flags.items()}


def _name(key: str, value: Any, file: Path) -> str:
    """The flag's name, as a field has it."""
    name = key.replace("-", "_")
    if name not in KEYS:
        nearest = difflib.get_close_matches(name, KEYS, n=1)
        meant = f"; did you mean {nearest[0]}?" if nearest else ""
        raise InputError(f"{file}: {key} is no flag that a file can give{meant} (see --help)")
    items = value if isinstance(value, list) else [value]
    if not all(isinstance(item, str | int | float) for item in items):
        raise InputError(f"{file}: {key} is neither text, nor a number, nor true or false")
    if isinstance(value, list) and name != "data":
        raise InputError(f"{file}: {key} takes one value")
    return name


def write(settings: Settings) -> None:
    """Leaves the settings of a run in its folder."""
    run = settings.to_json()
    model = run.pop("model")
    values = run | model
    given = {flag(name)[2:]: value for name, value in values.items() if value is not None}
    write_whole(settings.folder / FILE, os.fsencode(tomli_w.dumps(given)))
