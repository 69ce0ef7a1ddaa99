"""The folder of a run: which one it is, who writes into it, and how a file gets there whole.

runs/NAME/      checkpoints/, metrics.jsonl, report.html, settings.toml, tokenizer.json
runs/NAME/lock  held by the process that writes into the folder; names it
runs/latest     the name of the run that was saved last
"""

import errno
import fcntl
import os
import secrets
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path

from examples.mla.cli import InputError

RUNS = Path("runs")
LATEST = "latest"
LOCK = "lock"

# What `flock` says on a file system that has no locks, as on some clusters.
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)


def write_whole(path: Path, content: bytes) -> None:
    """Writes a file or leaves the one before: at no moment, killed or out of space, half of it."""
    partial = path.with_name(f".{path.name}.{secrets.token_hex(4)}.partial")
    try:
        with partial.open("xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


@contextmanager
def locked(run_dir: Path) -> Iterator[None]:
    """Keeps other processes out of the folder, until the block ends or this process is killed.

    Raises:
      InputError: Another process writes into the folder.
    """
    with (run_dir / LOCK).open("a+", encoding="utf-8", errors="replace") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise InputError(
                f"{run_dir} is in use by {file.read(100) or 'another process'}; wait for it, or "
                "stop it"
            ) from None
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}")
        file.flush()
        try:
            yield
        finally:
            file.truncate(0)


def new_run_dir(wanted: Path | None) -> Path:
    """The folder of a fresh run, not made yet. The name of a new one in `RUNS` ends at random: two
    runs may start in the same second, and clocks go back.

    Raises:
      InputError: It holds something already, or cannot hold checkpoints.
    """
    run_dir = wanted or RUNS / f"mla-{datetime.now():%Y%m%d-%H%M%S}-{secrets.token_hex(2)}"
    check_name(run_dir)
    if run_dir.exists() and (not run_dir.is_dir() or set(os.listdir(run_dir)) - {LOCK}):
        raise InputError(
            f"{run_dir} is in use already; continue the run there with --resume {run_dir}, or give "
            "another --run-dir"
        )
    return run_dir


def check_name(run_dir: Path) -> None:
    """Refuses a folder that Orbax saves into and cannot read again: it takes paths for patterns,
    and for UTF-8.

    Raises:
      InputError: The path has such a character.
    """
    path = str(run_dir.absolute())
    unusable = sorted({c for c in path if c in "*?[\\" or "\ud800" <= c <= "\udfff"})
    if unusable:
        raise InputError(
            f"{run_dir}: Orbax cannot keep checkpoints under a path with {' '.join(unusable)}; "
            "give another --run-dir"
        )


def note_newest(run_dir: Path) -> None:
    """Notes that this run was saved last, if it is one of `RUNS`."""
    if run_dir.absolute().parent == RUNS.absolute():
        write_whole(RUNS / LATEST, os.fsencode(run_dir.name))


def run_dir_to_resume(resume: Path | bool, run_dir: Path | None) -> Path:
    """The folder that `--resume`, with or without a folder of its own, and `--run-dir` name.

    Raises:
      InputError: They name two, or neither names one and there is none in `RUNS`.
    """
    if isinstance(resume, bool):
        return run_dir or newest_run_dir()
    if run_dir not in (None, resume):
        raise InputError(
            f"--resume {resume} and --run-dir {run_dir} are two folders; give the run's once"
        )
    return resume


def newest_run_dir() -> Path:
    """The run in `RUNS` that was saved last, by its note; where there is none, by the clock.

    Raises:
      InputError: There is none.
    """
    saved = sorted(RUNS.glob("*/checkpoints"), key=lambda path: path.stat().st_mtime)
    if not saved:
        raise InputError(f"no checkpoint to resume in {RUNS}/; start a run without --resume")
    by_name = {os.fsencode(path.parent.name): path.parent for path in saved}
    note = RUNS / LATEST
    noted = note.read_bytes() if note.is_file() else b""
    return by_name.get(noted, saved[-1].parent)
