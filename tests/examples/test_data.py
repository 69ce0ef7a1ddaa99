"""Text, tokenizer and batches of the example."""

import json
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import parquet as pq

from examples.mla import data
from examples.mla.cli import InputError

LINES = [f"value_{i} = compute(value_{i - 1}, {i})  # naïve ☃\n" for i in range(200)]


@pytest.fixture
def folder(tmp_path):
    root = tmp_path / "text"
    root.mkdir()
    for i in range(40):
        (root / f"{i:02}.txt").write_text(f"file {i}\n" + "".join(LINES[i : i + 20]))
    return root


@pytest.fixture
def text(folder, tmp_path):
    return load(folder, tmp_path / "cache")


def load(path, cache, vocab_size=300):
    return data.load_text([path], installed_packages=False, vocab_size=vocab_size, cache=cache)


def test_the_default_corpus_is_the_standard_library_without_its_tests():
    corpus = data.read_corpus([])
    texts = {*corpus.train, *corpus.valid}
    has_json = Path(json.__file__).read_text() in texts
    has_tests = any("(unittest.TestCase):\n    def test" in text for text in texts)
    assert has_json and not has_tests
    assert 0.04 < len(corpus.valid) / len(texts) < 0.06


def test_installed_packages_come_on_top(tmp_path, monkeypatch):
    library, packages = tmp_path / "lib", tmp_path / "lib" / "site-packages"
    (packages / "thing" / "tests").mkdir(parents=True)
    (library / "os.py").write_text("standard = 1\n")
    (library / "notes.txt").write_text("no source\n")
    (packages / "thing" / "core.py").write_text("installed = 1\n")
    (packages / "thing" / "tests" / "test_core.py").write_text("tested = 1\n")
    places = {"stdlib": str(library), "purelib": str(packages), "platlib": str(packages)}
    monkeypatch.setattr(data.sysconfig, "get_paths", lambda: places)
    both = data.read_corpus([], installed_packages=True)
    assert {*both.train, *both.valid} == {"standard = 1\n", "installed = 1\n"}
    alone = data.read_corpus([])
    assert "".join(alone.train + alone.valid) == "standard = 1\n"


def test_held_out_files_are_no_training_files(folder):
    corpus = data.read_corpus([folder])
    assert len(corpus.valid) == 2 and len(corpus.train) == 38
    assert not set(corpus.valid) & set(corpus.train)


def test_the_split_depends_on_content_alone(folder):
    before = data.read_corpus([folder])
    for path in list(folder.iterdir()):
        path.rename(folder / f"{int(path.stem) * 7919 % 1000}.md")
    after = data.read_corpus([folder])
    assert set(after.valid) == set(before.valid)


def test_copies_of_a_file_are_read_once(folder):
    before = data.read_corpus([folder])
    for path in list(folder.iterdir()):
        path.with_name("copy-of-" + path.name).write_bytes(path.read_bytes())
    after = data.read_corpus([folder])
    assert set(after.valid) == set(before.valid) and set(after.train) == set(before.train)


@pytest.mark.parametrize("content", ["".join(LINES), "no line break " * 300])
def test_a_single_file_holds_out_its_end(tmp_path, content):
    path = tmp_path / "one.txt"
    path.write_text(content)
    corpus = data.read_corpus([path])
    (train,), (valid,) = corpus.train, corpus.valid
    assert train + valid == content
    assert 0 < len(valid) <= 0.07 * len(content)


def test_a_folder_is_read_whatever_the_extensions_without_binary_and_hidden_files(folder):
    expected = data.read_corpus([folder]).fingerprint
    (folder / "image.png").write_bytes(b"\x89PNG\0\0")
    (folder / "latin1.txt").write_bytes("naïve".encode("latin-1"))
    (folder / "blank.txt").write_text(" \n")
    (folder / ".git").mkdir()
    (folder / ".git" / "config").write_text("hidden")
    (folder / "dangling.txt").symlink_to(folder / "nowhere")
    assert data.read_corpus([folder]).fingerprint == expected


def test_a_byte_order_mark_is_no_text(tmp_path):
    (tmp_path / "bom.txt").write_bytes(b"\xef\xbb\xbf" + "".join(LINES).encode())
    assert data.read_corpus([tmp_path / "bom.txt"]).train[0].startswith("value_0")


@pytest.mark.parametrize("vocab_size", [data.BYTE_VOCABULARY, 300])
def test_tokens_decode_to_the_text(folder, tmp_path, vocab_size):
    text = load(folder, tmp_path / "cache", vocab_size)
    separator = text.tokenizer.token_to_id(data.SEPARATOR)
    assert text.vocab_size == vocab_size
    assert text.train.dtype == np.int32
    documents = np.split(text.train, np.flatnonzero(text.train == separator))[1:]
    decoded = [text.tokenizer.decode(d[1:].tolist()) for d in documents]
    assert tuple(decoded) == text.corpus.train


def test_a_byte_vocabulary_has_one_token_a_byte(folder, tmp_path):
    text = load(folder, tmp_path / "cache", data.BYTE_VOCABULARY)
    content = sum(len(t.encode()) for t in text.corpus.valid)
    assert len(text.valid) == content + len(text.corpus.valid)  # and one separator a file


def test_a_separator_spelled_out_in_the_text_stays_text(tmp_path):
    (tmp_path / "tricky.txt").write_text("".join(LINES) + data.SEPARATOR + "\n" + "".join(LINES))
    text = load(tmp_path / "tricky.txt", tmp_path / "cache")
    assert (text.train == text.tokenizer.token_to_id(data.SEPARATOR)).sum() == 1


def test_the_tokenizer_learns_from_training_files_only(tmp_path):
    words = [f"{a}{b}{a}{b}" for a in "bcdfgh" for b in "aeiou"]  # one to a file
    for word in words:
        (tmp_path / word).write_text(f"{word} " * 50)
    text = load(tmp_path, tmp_path / "cache", vocab_size=1000)
    vocabulary = text.tokenizer.get_vocab()
    assert all(train[:4] in vocabulary for train in text.corpus.train)
    assert not any(valid[:4] in vocabulary for valid in text.corpus.valid)
    assert len(text.corpus.valid) == 2


def test_the_tokenizer_is_cached_by_content_and_size(folder, tmp_path, monkeypatch):
    cache = tmp_path / "cache"
    first = load(folder, cache)
    load(folder, cache, vocab_size=320)
    (folder / "more.txt").write_text("another file\n" * 50)
    changed = load(folder, cache)
    assert len(list(cache.iterdir())) == 3
    assert changed.fingerprints != first.fingerprints

    monkeypatch.setattr(data, "_train_tokenizer", None)  # from here on, only the cache
    again = load(folder, cache)
    assert again.fingerprints == changed.fingerprints
    np.testing.assert_array_equal(again.train, changed.train)


def test_an_interrupted_training_leaves_no_tokenizer(folder, tmp_path, monkeypatch):
    def interrupted(texts, vocab_size):
        raise KeyboardInterrupt

    monkeypatch.setattr(data, "_train_tokenizer", interrupted)
    with pytest.raises(KeyboardInterrupt):
        load(folder, tmp_path / "cache")
    assert not list((tmp_path / "cache").iterdir())


def batches(text, seed=0, batch=3):
    return data.training_batches(text, context=16, batch=batch, seed=seed)


def test_an_epoch_has_every_window_once_and_the_next_one_another_order(text):
    whole = [tuple(window) for window in data.windows(text.train, 16)]
    stream = batches(text, batch=1)
    first, second = ([tuple(next(stream)[0]) for _ in whole] for _ in range(2))
    assert sorted(first) == sorted(second) == sorted(whole)
    assert first != second and first != whole


def test_windows_share_one_token():
    tokens = np.arange(100)
    windows = data.windows(tokens, 16)
    assert windows.shape == (6, 17)
    np.testing.assert_array_equal(np.concatenate([windows[0], *windows[1:, 1:]]), tokens[:97])


def test_the_order_is_the_seeds(text):
    streams = [batches(text, seed) for seed in (1, 1, 2)]
    one, same, other = (np.stack([next(s) for _ in range(5)]) for s in streams)
    np.testing.assert_array_equal(one, same)
    assert one.shape == (5, 3, 17) and (one != other).any()


def test_the_position_is_restored(text):
    stream, again = batches(text), batches(text)
    per_epoch = len(data.windows(text.train, 16)) // 3
    for _ in range(per_epoch + 2):  # into the second epoch
        next(stream)
    state = json.loads(json.dumps(stream.get_state()))  # as it is saved
    again.set_state(state)
    for _ in range(5):
        np.testing.assert_array_equal(next(stream), next(again))


def test_validation_batches_are_held_out_text_and_always_the_same(text):
    take = lambda count: data.validation_batches(text, context=16, batch=2, count=count)  # noqa: E731
    windows = {tuple(window) for window in data.windows(text.valid, 16)}
    found = take(4)
    assert [b.shape for b in found] == [(2, 17)] * 4
    assert {tuple(row) for b in found for row in b} <= windows
    np.testing.assert_array_equal(found, take(4))
    assert len(take(10**6)) == len(data.windows(text.valid, 16)) // 2


def write(path, content):
    path.write_bytes(content)
    return path


def parquet(path, **columns):
    pq.write_table(pa.table(columns), path)
    return path


def test_a_parquet_file_has_a_document_a_row(tmp_path):
    rows = [*LINES[:40], None, "", LINES[0]]
    file = parquet(tmp_path / "rows.parquet", text=rows, other=range(len(rows)))
    corpus = data.read_corpus([file])
    assert sorted({*corpus.train, *corpus.valid}) == sorted(LINES[:40])
    assert len(corpus.valid) == 2


def test_files_and_folders_of_text_and_parquet_go_with_one_another(folder, tmp_path):
    parquet(folder / "rows.parquet", text=pa.array(["in a folder"], pa.large_string()))
    file = parquet(tmp_path / "more.parquet", text=["alone"])
    corpus = data.read_corpus([file, folder])
    texts = {*corpus.train, *corpus.valid}
    assert len(texts) == 42 and {"in a folder", "alone"} < texts
    assert corpus.source == f"{file} + {folder}"


def test_parquet_without_pyarrow_says_what_to_install(tmp_path, monkeypatch):
    file = parquet(tmp_path / "rows.parquet", text=["a"])
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(
        InputError, match=r"rows\.parquet: this takes pyarrow, .* pip install pyarr"
    ):
        data.read_corpus([file])


WRONG_PATHS = {
    "missing": (lambda p: p / "nowhere.txt", "nowhere.txt: no such file or folder; give a text"),
    "empty file": (lambda p: write(p / "e.txt", b" \n"), "e.txt: an empty file; --data takes"),
    "NUL bytes": (lambda p: write(p / "n.bin", b"a\0b"), "n.bin: a binary file; --data takes"),
    "not UTF-8": (lambda p: write(p / "l.txt", b"na\xefve"), "l.txt: a binary file; --data takes"),
    "no Parquet": (
        lambda p: write(p / "n.parquet", b"text"),
        "n.parquet: not a Parquet file that can be read (Parquet ",
    ),
    "no column text": (
        lambda p: parquet(p / "n.parquet", content=["a"], text=[1]),
        "n.parquet: no column text of strings; it has content (string), text (int64)",
    ),
    "no rows": (lambda p: parquet(p / "n.parquet", text=[" "]), "n.parquet: an empty file"),
    "empty folder": (lambda p: p, "none of its 0 files is UTF-8 text"),
    "binary folder": (lambda p: write(p / "n.bin", b"a\0b").parent, "none of its 1 files is UTF-8"),
}


@pytest.mark.parametrize(("make", "message"), WRONG_PATHS.values(), ids=WRONG_PATHS)
def test_wrong_paths_are_named_with_the_fix(tmp_path, make, message):
    path = make(tmp_path)
    with pytest.raises(InputError) as error:
        data.read_corpus([path])
    assert str(path) in str(error.value) and message in str(error.value)


def test_too_little_text_names_the_part_and_the_need(text):
    with pytest.raises(InputError, match=r"too little training text, \d+ tokens .* takes 160001; "):
        data.training_batches(text, context=16, batch=10_000, seed=0)
    with pytest.raises(
        InputError, match=r"too little validation text.*lower --batch-size or --con"
    ):
        data.validation_batches(text, context=16, batch=1000, count=1)


def test_a_vocabulary_without_room_for_the_bytes_is_refused(folder, tmp_path):
    with pytest.raises(InputError, match="--vocab-size 256 is too small: 257 is the least"):
        load(folder, tmp_path / "cache", vocab_size=256)
