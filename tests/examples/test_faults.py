"""What goes wrong around a run: files damaged, gone or foreign, a full disk, other runs, odd names.

The run goes on with the exact next losses, or stops with one line and status 2. Either way nothing
is lost, and nothing that a file holds is executed or shown as anything but text.
"""

import errno
import io
import json
import os
import pickle
import re
import resource
import shutil
import subprocess
import sys
from datetime import datetime
from pathlib import Path

import pytest
from rich.console import Console

from examples.mla import cli, compare, data, folder, metrics, page, report, train
from examples.mla.checkpoint import Checkpoints
from examples.mla.cli import InputError
from examples.mla.comparison import Comparison
from examples.mla.metrics import select
from examples.mla.settings import Settings

from .test_train import numbers, one_line

pytestmark = [
    # What a failed read leaves: Orbax's other reads, which nobody waits for.
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
    pytest.mark.filterwarnings("ignore:coroutine .* was never awaited"),
    pytest.mark.usefixtures("no_pictures"),
]


@pytest.fixture
def run_dir(finished, tmp_path):
    """A run of 6 steps that was killed after the checkpoint of step 3."""
    shutil.copytree(finished, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "6")
    return tmp_path / "run"


def contents(run_dir):
    return {p: p.read_bytes() for p in run_dir.rglob("*") if p.is_file() and p.name != folder.LOCK}


def resume(run_dir, *more):
    return train.main(["--resume", "--run-dir", str(run_dir), *more])


class Executed:
    """Unpickled, it raises."""

    def __reduce__(self):
        return exec, ("raise SystemExit('executed')",)


PICKLE = pickle.dumps(Executed())


def about(change, digest=True):
    """A fault: `about` of checkpoint 3 is changed; without its digest, as releases to 0.1.0 wrote
    it, so that what is wrong is seen by itself."""

    def fault(run_dir):
        path = run_dir / "checkpoints" / "3" / "about" / "metadata"
        found = json.loads(path.read_text())
        if not digest:
            del found["digest"]
        path.write_text(json.dumps(change(found)))

    return fault


def setting(**changed):
    """A fault: other values for some settings, None to leave one out."""

    def change(found):
        settings = {**found["settings"], **changed}
        return {**found, "settings": {k: v for k, v in settings.items() if v is not None}}

    return about(change, digest=False)


def of_state(change, pattern="*"):
    """A fault: files of checkpoint 3 with other bytes."""

    def fault(run_dir):
        paths = [p for p in (run_dir / "checkpoints" / "3").rglob(pattern) if p.is_file()]
        assert paths
        for path in paths:
            path.write_bytes(change(path.read_bytes()))

    return fault


def of_position(text):
    def fault(run_dir):
        about(lambda found: found, digest=False)(run_dir)
        (run_dir / "checkpoints" / "3" / "position" / "metadata").write_text(text)

    return fault


def without(name):
    return lambda run_dir: shutil.rmtree(run_dir / "checkpoints" / "3" / name)


def flipped(content):
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]


def renamed(run_dir):
    (run_dir / "checkpoints" / "3").rename(run_dir / "checkpoints" / "5")


def foreign(run_dir):
    (run_dir / "checkpoints" / "7").mkdir()
    (run_dir / "checkpoints" / "7" / "weights.bin").write_bytes(PICKLE)


DAMAGED = "damaged, or not a checkpoint of this model; move it away to resume from the one before"
CHANGED = "(settings or position are not what was saved)"
CHECKPOINTS = {
    "no settings": (about(lambda a: {"text": a["text"]}), "(without its settings and text)"),
    "no fingerprints": (about(lambda a: {"settings": a["settings"]}), "(without its settings and"),
    "a list": (about(lambda a: [1]), "(without its settings and text)"),
    "settings are a list": (
        about(lambda a: {**a, "settings": [1]}, False),
        "(no settings of a run)",
    ),
    "fingerprints are null": (about(lambda a: {**a, "text": None}), CHANGED),
    "one setting gone": (setting(seed=None), "(settings without seed)"),
    "the model gone": (setting(model=None), "(no settings of a run)"),
    "a setting of tomorrow": (setting(tomorrow=3), "(Unrecognized options: --tomorrow"),
    "a word for a number": (
        setting(steps="six"),
        "Error parsing --steps: invalid literal for int()",
    ),
    "half a step": (setting(steps=6.5), "(Error parsing --steps: invalid literal for int()"),
    "no such optimizer": (setting(optimizer="exec('1')"), "for argument '--optimizer'"),
    "a seed too long": (setting(seed=2**40), "--seed must be below 2**32, got 1099511627776"),
    "another seed": (about(lambda a: {**a, "settings": {**a["settings"], "seed": 1}}), CHANGED),
    "about is gone": (without("about"), 'Item "about" was not found'),
    "position is gone": (without("position"), 'Item "position" was not found'),
    "arrays are gone": (without("state"), "state"),
    "settings cut short": (of_state(lambda c: c[:40], "about/metadata"), ""),
    "a pickle for settings": (of_state(lambda _: PICKLE, "about/metadata"), "can't decode"),
    "a pickle for names": (of_state(lambda _: PICKLE, "_METADATA"), "can't decode byte"),
    "a pickle for arrays": (of_state(lambda _: PICKLE, "manifest.ocdbt"), "DATA_LOSS"),
    "a bit of the arrays": (of_state(flipped, "d/*"), ""),
    "arrays one byte short": (of_state(lambda c: c[:-1], "d/*"), ""),
    "empty files": (of_state(lambda _: b""), ""),
    "another position": (of_state(lambda c: c.replace(b"3", b"4"), "position/metadata"), CHANGED),
    "no position": (of_position("[]"), "(without its next_index)"),
    "a position before the first": (of_position('{"next_index": -5}'), "out of range"),
    "half a position": (of_position('{"next_index": 2.5}'), "(next_index is 2.5)"),
    "another step's name": (renamed, CHANGED),
    "another program's": (foreign, 'Item "about" was not found'),
}


@pytest.mark.parametrize(("fault", "why"), CHECKPOINTS.values(), ids=CHECKPOINTS)
def test_a_checkpoint_that_is_not_one_is_named_in_one_line_and_kept(run_dir, capfd, fault, why):
    fault(run_dir)
    before = contents(run_dir)
    assert resume(run_dir) == 2
    said = one_line(capfd)
    assert re.search(rf"run/checkpoints/\d: {DAMAGED}", said) and why in said
    assert contents(run_dir) == before


@pytest.mark.slow
def test_a_damaged_checkpoint_moved_away_leaves_the_one_before(finished, tmp_path, capfd):
    run_dir = tmp_path / "run"
    shutil.copytree(finished, run_dir)
    newest = run_dir / "checkpoints" / "6"
    for path in newest.rglob("d/*"):
        path.write_bytes(path.read_bytes()[:-1])
    assert resume(run_dir) == 2
    assert "checkpoints/6: damaged" in one_line(capfd)
    newest.rename(tmp_path / "away")
    assert resume(run_dir) == 0
    assert numbers(run_dir) == numbers(finished)


def recorded(change):
    """A fault: other lines in the metrics."""

    def fault(run_dir):
        path = run_dir / metrics.FILE
        path.write_bytes(change(path.read_bytes()))

    return fault


def lines(change):
    return recorded(lambda content: b"".join(change(content.splitlines(keepends=True))))


GOES_ON = {
    "nothing": lambda _: None,
    "half a line at the end": recorded(lambda c: c + b'{"event": "st'),
    "zeros at the end": recorded(lambda c: c + bytes(100)),
    "no end": lines(lambda rows: rows[:-1]),
    "a save cut short": lambda d: (d / "checkpoints" / "6.orbax-checkpoint-tmp-1").mkdir(),
    "other things beside": lambda d: (
        (d / "checkpoints" / "notes").mkdir(),
        (d / "checkpoints" / "9").write_text("no folder"),
        (d / "notes.txt").write_text("mine"),
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("fault", GOES_ON.values(), ids=GOES_ON)
def test_a_run_goes_on_with_the_exact_losses(run_dir, finished, fault):
    fault(run_dir)
    assert resume(run_dir) == 0
    assert numbers(run_dir) == numbers(finished)


LOST = {
    "gone": lambda d: (d / metrics.FILE).unlink(),
    "empty": recorded(lambda _: b""),
    "its beginning lost": lines(lambda rows: rows[6:]),
}


@pytest.mark.slow
@pytest.mark.parametrize("fault", LOST.values(), ids=LOST)
def test_a_run_goes_on_without_its_metrics(run_dir, finished, capfd, fault):
    fault(run_dir)
    gone = not (run_dir / metrics.FILE).exists()
    assert resume(run_dir) == 0
    said = capfd.readouterr().out
    assert ("metrics.jsonl is gone: the record begins at step 3" in said) == gone
    after = [row for row in numbers(finished) if row["step"] > 3]
    assert numbers(run_dir) == after and (run_dir / report.FILE).exists()


DAMAGED_METRICS = {
    "half a line within": (lines(lambda rows: [*rows[:3], rows[3][:20] + b"\n", *rows[4:]]), 4),
    "half a line, ended": (recorded(lambda c: c + b'{"event": "st\n'), 12),
    "another program's": (recorded(lambda c: b'{"a": 1}\n' + c), 1),
    "no objects": (recorded(lambda c: c + b"3\n"), 12),
    "no step": (recorded(lambda c: c + b'{"event": "step", "step": "7"}\n'), 12),
    "a pickle": (recorded(lambda _: PICKLE), 1),
    "not UTF-8": (recorded(lambda c: b"\xff\n" + c), 1),
}


@pytest.mark.parametrize(("fault", "line"), DAMAGED_METRICS.values(), ids=DAMAGED_METRICS)
def test_damaged_metrics_are_named_by_line_and_kept(run_dir, capfd, fault, line):
    fault(run_dir)
    before = contents(run_dir)
    for tried in (resume(run_dir), report.main([str(run_dir)])):
        assert tried == 2
        said = capfd.readouterr().err.splitlines()
        assert all(f"{metrics.FILE}, line {line}: not the metrics of a run" in s for s in said)
    assert contents(run_dir) == before


@pytest.mark.parametrize(
    "row",
    [
        '{"event": "step", "step": 3}',
        '{"event": "step", "step": 3, "loss": "x", "max_logits": [], "tokens": {}, "seconds": 0}',
        '{"event": "start", "step": 3, "settings": 4, "facts": []}',
        '{"event": "eval", "step": 3, "loss": [], "participation_ratio": 3}',
    ],
)
def test_a_report_of_other_rows_stops_in_one_line(run_dir, capfd, row):
    recorded(lambda c: c + row.encode() + b"\n")(run_dir)
    assert report.main([str(run_dir)]) == 2
    assert f"{metrics.FILE}: not the metrics of a run (" in one_line(capfd)


# A full disk, and folders that cannot be.


@pytest.fixture
def small_files():
    """A context in which no file may grow beyond a size: the kernel refuses what is written, to
    Python and to tensorstore alike, as on a full disk (EFBIG in the place of ENOSPC)."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def full_disk_in_a_save(step, small_files, monkeypatch):
    """From the save of a step on, no file may be larger than 2 kB."""
    save = Checkpoints.save

    def limited(checkpoints, at, *args, **kwargs):
        if at == step:
            small_files(2048)
        save(checkpoints, at, *args, **kwargs)

    monkeypatch.setattr(Checkpoints, "save", limited)


@pytest.mark.slow
@pytest.mark.parametrize("step", [3, 6])
def test_a_full_disk_in_a_save_stops_in_one_line_and_keeps_the_save_before(
    flags, finished, tmp_path, small_files, monkeypatch, capfd, step
):
    run_dir, unlimited = tmp_path / "run", resource.getrlimit(resource.RLIMIT_FSIZE)
    full_disk_in_a_save(step, small_files, monkeypatch)
    assert train.main(flags(run_dir)) == 2
    said = one_line(capfd)
    assert f"checkpoints: step {step} could not be saved; what was saved before is whole" in said
    monkeypatch.undo()
    resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)
    if step == 3:
        assert resume(run_dir) == 2
        assert "no complete checkpoint there" in one_line(capfd)
    else:
        assert resume(run_dir) == 0
        assert numbers(run_dir) == numbers(finished)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a device that is always full")
def test_a_full_disk_under_the_metrics(flags, tmp_path, monkeypatch, capfd):
    """Real ENOSPC."""
    full = open("/dev/full", "a")  # noqa: SIM115 (closed by the run)
    monkeypatch.setattr(train.Run, "_metrics_file", lambda _: full)
    assert train.main(flags(tmp_path / "run")) == 2
    assert "No space left on device" in one_line(capfd)


def test_files_are_written_whole_or_not_at_all(tmp_path, small_files):
    path = tmp_path / "report.html"
    folder.write_whole(path, b"before")
    small_files(1000)
    with pytest.raises(OSError, match="File too large"):
        folder.write_whole(path, bytes(100_000))
    assert path.read_bytes() == b"before" and os.listdir(tmp_path) == ["report.html"]


def in_place(name):
    """A fault: a folder where a file should be, or the reverse."""

    def fault(run_dir):
        path = run_dir / name
        if path.is_dir():
            shutil.rmtree(path)
            path.write_text("")
        else:
            path.unlink(missing_ok=True)
            path.mkdir()

    return fault


IN_PLACE = {
    "checkpoints": "no complete checkpoint there",
    "checkpoints/3": "no complete checkpoint there",
    "metrics.jsonl": "metrics.jsonl: Is a directory",
    "lock": "lock: Is a directory",
    "report.html": "report.html: Is a directory",
}


@pytest.mark.parametrize(("name", "message"), IN_PLACE.items(), ids=IN_PLACE)
def test_something_else_in_the_place_of_a_file(run_dir, capfd, name, message):
    in_place(name)(run_dir)
    assert resume(run_dir) == 2
    assert message in one_line(capfd)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_is_read_only(run_dir, flags, tmp_path, capfd):
    for path in (run_dir, tmp_path):
        path.chmod(0o500)
    try:
        before = contents(run_dir)
        assert resume(run_dir) == 2
        assert "Permission denied" in one_line(capfd)
        assert train.main(flags(tmp_path / "new")) == 2
        assert "Permission denied" in one_line(capfd)
        assert contents(run_dir) == before
    finally:
        for path in (tmp_path, run_dir):
            path.chmod(0o700)


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="a folder that takes no files")
def test_a_folder_that_nobody_may_write_into(flags, tmp_path, capfd):
    for changed in ({}, {"cache_dir": "/proc/cache"}):
        run_dir = tmp_path / "run" if changed else "/proc/run"
        assert train.main(flags(run_dir, **changed)) == 2
        assert "/proc/" in one_line(capfd)


# Other runs.

HOLDS = """
import fcntl, sys, time
file = open(sys.argv[1], "a")
fcntl.flock(file, fcntl.LOCK_EX)
file.write("process 123 on host")
print("held", file=sys.stderr, flush=True)
file.flush()
time.sleep(600)
"""


def test_a_folder_that_another_process_writes_into_until_it_is_killed(run_dir, finished, capfd):
    saving = run_dir / "checkpoints" / "6.orbax-checkpoint-tmp-1"
    saving.mkdir()  # what the other process is about to complete
    holds = [sys.executable, "-c", HOLDS, str(run_dir / folder.LOCK)]
    with subprocess.Popen(holds, stderr=subprocess.PIPE, text=True) as other:
        try:
            assert other.stderr.readline() == "held\n"
            while not (run_dir / folder.LOCK).read_text():
                pass
            before = contents(run_dir)
            assert resume(run_dir) == 2
            assert f"{run_dir} is in use by process 123 on host; wait for it" in one_line(capfd)
            assert contents(run_dir) == before and saving.exists()
        finally:
            other.kill()
    assert resume(run_dir) == 0  # a killed process leaves its name, and no lock
    assert numbers(run_dir) == numbers(finished)
    assert (run_dir / folder.LOCK).read_text() == "" and not saving.exists()


def test_the_lock_names_this_process_and_ends(tmp_path):
    for _ in range(2):
        with folder.locked(tmp_path):
            with (
                pytest.raises(InputError, match=f"in use by process {os.getpid()} on "),
                folder.locked(tmp_path),
            ):
                pass
            assert (tmp_path / folder.LOCK).read_text()
    assert folder.new_run_dir(tmp_path) == tmp_path  # a lock alone is no run


def test_a_file_system_without_locks_is_written_into(tmp_path, monkeypatch):
    def flock(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(folder.fcntl, "flock", flock)
    with folder.locked(tmp_path):
        assert (tmp_path / folder.LOCK).read_text()


def test_two_runs_that_found_the_same_folder_empty(flags, tmp_path, monkeypatch, capfd):
    """The other one takes it, and ends, while this one reads its text."""
    run_dir, load = tmp_path / "run", train.load_text

    def slow(*args, **kwargs):
        run_dir.mkdir()
        (run_dir / metrics.FILE).write_text("the other's")
        return load(*args, **kwargs)

    monkeypatch.setattr(train, "load_text", slow)
    assert train.main(flags(run_dir)) == 2
    assert "is in use already; continue the run there with --resume" in one_line(capfd)
    assert contents(run_dir) == {run_dir / metrics.FILE: b"the other's"}


def test_runs_of_the_same_second_have_different_names(monkeypatch):
    class Stopped(datetime):
        @classmethod
        def now(cls, tz=None):
            return cls(2026, 1, 2, 3, 4, 5)

    monkeypatch.setattr(folder, "datetime", Stopped)
    found = [folder.new_run_dir(None) for _ in range(3)]
    assert all(path.name.startswith("mla-20260102-030405-") for path in found)
    assert len(set(found)) == 3


@pytest.fixture
def runs(tmp_path, monkeypatch):
    """Makes runs with checkpoints of a given age in seconds."""
    monkeypatch.chdir(tmp_path)

    def make(**ages):
        for name, age in ages.items():
            saved = Path("runs", name, "checkpoints")
            saved.mkdir(parents=True)
            os.utime(saved, (10**9 - age, 10**9 - age))

    return make


def test_the_newest_run_is_the_one_saved_last_whatever_the_clock_says(runs):
    runs(before=0, after=3600)  # the clock went back an hour
    folder.note_newest(Path("runs/before"))
    folder.note_newest(Path("runs/after").absolute())
    folder.note_newest(Path("elsewhere/run"))
    assert folder.newest_run_dir() == Path("runs/after")
    shutil.rmtree("runs/after")
    assert folder.newest_run_dir() == Path("runs/before")


@pytest.mark.parametrize("note", [b"", b"..", b"old/", b"../../etc", b"\xff\0", PICKLE, None])
def test_a_note_that_names_no_run_is_not_followed(runs, note):
    runs(old=10, newest=0)
    if note is None:
        Path("runs/latest").mkdir()
    else:
        Path("runs/latest").write_bytes(note)
    assert folder.newest_run_dir() == Path("runs/newest")


@pytest.mark.slow
def test_a_save_notes_the_run(flags, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert train.main(flags("runs/x[bold]", steps=3)) == 2  # Orbax cannot
    assert train.main(flags("runs/x")) == 0
    assert Path("runs/latest").read_text() == "x" and folder.newest_run_dir() == Path("runs/x")


# The tokenizer's cache.

TEXTS = [f"value_{i} = compute(value_{i - 1})\n" * 3 for i in range(40)]


def cached(cache):
    (path,) = cache.iterdir()
    return path


def cut(path):
    path.write_bytes(path.read_bytes()[:1000])


def other_vocabulary(path):
    """As the format was before it had a digest, and of another text."""
    content = json.loads(path.read_text())["tokenizer"]
    path.write_text(content.replace("alue", "elua"))


def other_vocabulary_inside(path):
    path.write_text(path.read_text().replace("alue", "elua"))


CACHES = {
    "cut short": cut,
    "empty": lambda path: path.write_bytes(b""),
    "a pickle": lambda path: path.write_bytes(PICKLE),
    "another program's": lambda path: path.write_text('{"tokenizer": 3, "sha256": "x"}'),
    "a list": lambda path: path.write_text("[]"),
    "an older release's": other_vocabulary,
    "another vocabulary": other_vocabulary_inside,
}


@pytest.mark.parametrize("fault", CACHES.values(), ids=CACHES)
def test_a_killed_or_foreign_tokenizer_is_trained_again(tmp_path, fault):
    before = data.load_tokenizer(TEXTS, 300, tmp_path).to_str()
    whole = cached(tmp_path).read_bytes()
    fault(cached(tmp_path))
    assert cached(tmp_path).read_bytes() != whole
    assert data.load_tokenizer(TEXTS, 300, tmp_path).to_str() == before
    assert cached(tmp_path).read_bytes() == whole


def test_a_tokenizer_cannot_be_cached(tmp_path, capfd):
    data.load_tokenizer(TEXTS, 300, tmp_path)
    in_place(cached(tmp_path).name)(tmp_path)

    def load():
        data.load_tokenizer(TEXTS, 300, tmp_path)
        return 0

    assert cli.run(load) == 2
    assert "Is a directory" in one_line(capfd)


# Names, numbers and words.

NAMES = {
    "closing tag": "a[/b]c",
    "tag": "a[bold]b",
    "only a tag": "[/]",
    "pattern": "a*b",
    "backslash": "a\\b",
    "not UTF-8": os.fsdecode(b"bad\xff"),
}


@pytest.mark.parametrize("name", NAMES.values(), ids=NAMES)
def test_a_folder_that_orbax_cannot_read_again_is_refused_before_anything(
    run_dir, flags, tmp_path, capfd, name
):
    assert train.main(flags(tmp_path / name)) == 2
    assert "Orbax cannot keep checkpoints under a path with" in one_line(capfd)
    assert not (tmp_path / name).exists()
    moved = tmp_path / name / "run"
    moved.parent.mkdir(parents=True)
    run_dir.rename(moved)
    assert resume(moved) == 2
    assert "Orbax cannot keep checkpoints under a path with" in one_line(capfd)


@pytest.mark.slow
def test_odd_names_are_shown_as_they_are_and_resumed(flags, finished, text_file, tmp_path, capfd):
    run_dir = tmp_path / "<script>:smile:\n\x1b]x"
    text = tmp_path / "[/b]" / os.fsdecode(b"[link=x]\xff\n.txt")  # a run cannot have this one
    text.parent.mkdir(parents=True)
    shutil.copy(text_file, text)
    assert train.main(flags(run_dir, data=text)) == 0
    said = capfd.readouterr().out
    assert f"report: {tmp_path}/<script>:smile:\\n\\x1b]x/report.html" in said
    assert f"{tmp_path}/[/b]/[link=x]\\udcff\\n.txt: 8,901 tokens" in said

    shutil.rmtree(run_dir / "checkpoints" / "6")
    assert resume(run_dir) == 0
    assert numbers(run_dir) == numbers(finished)
    html = (run_dir / report.FILE).read_text()
    assert "<script" not in html and page.escape(text.name) in html


def test_nothing_in_a_report_is_a_tag(run_dir):
    """Every text of every row is one."""
    tag, count = "<script>alert('x')</script>", 0

    def planted(value, key=""):
        nonlocal count
        if isinstance(value, dict):
            return {k: planted(v, k) for k, v in value.items()}
        if isinstance(value, str) and key != "event":
            count += 1
            return tag + "\udcff"
        return value

    rows = [planted(row) for row in metrics.read(run_dir)]
    assert count > 10
    both = Comparison(tag, {tag: rows, f"{tag} too": rows})
    for html in (
        report.run_page(rows, None),
        report.run_page(rows, both),
        compare.comparison_page(both),
    ):
        html.encode()
        assert "<script" not in html and "&lt;script&gt;" in html
        assert re.search(r"alert\(['\"]", html) is None


def test_what_is_said_is_no_markup_and_one_line():
    file = io.StringIO()
    console = Console(file=file, width=20)
    cli.say(console, "[/b] [red]x :smile: a\nb\x1b[0m \udcff and more than the width")
    assert file.getvalue() == "[/b] [red]x :smile: a\\nb\\x1b[0m \\udcff and more than the width\n"


NUMBERS = {
    "seed of 33 bits": ({"seed": 2**32}, "--seed must be below 2**32, got 4294967296"),
    "seed of 100 bits": ({"seed": 2**100}, "--seed must be below 2**32, got 12676506"),
    "negative seed": ({"seed": -1}, "--seed must be 0 or more"),
    "steps": ({"steps": 10**30}, "--steps must be at most 2147483647, got 1000000"),
    "batch": ({"batch_size": 2**31}, "--batch-size must be at most 2147483647, got 2147483648"),
    "prompt": ({"prompt": os.fsdecode(b"\xff")}, "--prompt is no UTF-8 text"),
}


@pytest.mark.parametrize(("changed", "message"), NUMBERS.values(), ids=NUMBERS)
def test_numbers_and_words_that_do_not_fit(flags, tmp_path, capfd, changed, message):
    assert train.main(flags(tmp_path / "run", **changed)) == 2
    assert message in one_line(capfd)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("encoding", ["ascii", "utf-8"])
def test_wrong_flags_get_one_line_in_any_encoding(monkeypatch, encoding):
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding=encoding))
    for flags, message in (
        (["--stepz", "3"], "Unrecognized options: --stepz, 3; did you mean --steps? (see --help)"),
        (["--seed", str(2**32)], "Error parsing Settings: --seed must be below 2**32, got"),
    ):
        with pytest.raises(InputError) as error:
            cli.parse(Settings, flags, prog="train")
        assert str(error.value).startswith(message) and "--- " not in str(error.value)


@pytest.mark.slow
def test_the_largest_seed(flags, tmp_path):
    assert train.main(flags(tmp_path / "run", seed=2**32 - 1)) == 0
    rows = metrics.read(tmp_path / "run")
    assert select(rows, "start")[0]["settings"]["seed"] == 2**32 - 1


def test_settings_come_back_as_they_were():
    for settings in (
        Settings(),
        Settings(prompt="--resume", per_head=True, data=(Path("-x"),), weight_decay=1e-7, seed=3),
        Settings(prompt='a "b" \\ \n [/b]', data=(Path(os.fsdecode(b"\xff")), Path("b"))),
    ):
        assert Settings.from_json(json.loads(json.dumps(settings.to_json()))) == settings
