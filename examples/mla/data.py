"""Real text without a network: files, a tokenizer trained on them, shuffled batches of tokens.

Axis names:  batch  sequences in one step
             context  positions the model reads; a window has one more, the last target
"""

import hashlib
import json
import os
import sysconfig
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, cast

import grain
import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from examples.mla.cli import InputError, optional
from examples.mla.folder import write_whole

SEPARATOR = "<|endoftext|>"
BYTE_VOCABULARY = 257  # every byte, and the separator
PARQUET, COLUMN = ".parquet", "text"  # a document a row
HELD_OUT = 0.05  # share of the files (of the text, when there is one file) kept for validation
NOT_SOURCES = {
    *("site-packages", "dist-packages", "__pycache__"),
    *("test", "tests", "idle_test", "idlelib", "lib2to3", "distutils", "turtledemo"),
    *("encodings", "pydoc_data"),  # tables, not code
}


@dataclass(frozen=True)
class Corpus:
    """Text, split by file: no validation text is ever trained on, by model or tokenizer.

    Attributes:
      source: Where it came from, for messages.
      train: Training documents.
      valid: Held-out documents.
    """

    source: str
    train: tuple[str, ...]
    valid: tuple[str, ...]

    @property
    def fingerprint(self) -> str:
        """A hash of the whole content and its split."""
        return _digest(_digest(*self.train), _digest(*self.valid))


@dataclass(frozen=True)
class TokenizedText:
    """A corpus as token ids.

    Attributes:
      corpus: What was tokenized.
      tokenizer: Its tokenizer.
      train: int32 `[tokens]`, the documents one after another, each behind a separator.
      valid: The same for the held-out documents.
    """

    corpus: Corpus
    tokenizer: Tokenizer
    train: np.ndarray
    valid: np.ndarray

    @property
    def vocab_size(self) -> int:
        """Tokens in the vocabulary; fewer than asked for if the text is small."""
        return self.tokenizer.get_vocab_size()

    @property
    def fingerprints(self) -> dict[str, str]:
        """Hashes of the text and of the vocabulary."""
        return {
            "text": self.corpus.fingerprint,
            "vocabulary": _digest(self.tokenizer.to_str()),
        }

    def check_same(self, saved: dict[str, str], run_dir: Path) -> None:
        """Refuses other text, and a vocabulary whose ids mean other tokens.

        Raises:
          InputError: These are not the saved fingerprints.
        """
        for part, fingerprint in self.fingerprints.items():
            if fingerprint != saved.get(part):
                raise InputError(
                    f"{self.corpus.source}: its {part} is not the one that {run_dir} was trained "
                    "with; give that run's text with --data, or start a new run without --resume"
                )

    def describe(self) -> str:
        """One line for the user."""
        return (
            f"{self.corpus.source}: {len(self.train):,} tokens to train on, {len(self.valid):,} "
            f"held out, vocabulary of {self.vocab_size:,}"
        )

    @property
    def bytes_per_token(self) -> float:
        """The mean number of UTF-8 bytes of a token in the validation text."""
        return sum(len(text.encode()) for text in self.corpus.valid) / len(self.valid)


def load_text(
    data: Sequence[Path], *, installed_packages: bool, vocab_size: int, cache: Path
) -> TokenizedText:
    """Reads, splits and tokenizes the text.

    Args:
      data: Text files, Parquet files with a column `text`, or folders of them; none of them for the
        Python standard library's sources.
      installed_packages: Whether to add the sources of the installed packages.
      vocab_size: The tokenizer's vocabulary; `BYTE_VOCABULARY` makes every byte a token.
      cache: Folder of trained tokenizers.

    Raises:
      InputError: A path that is missing, or without UTF-8 text.
    """
    corpus = read_corpus(data, installed_packages=installed_packages)
    tokenizer = load_tokenizer(corpus.train, vocab_size, cache)
    return TokenizedText(
        corpus, tokenizer, encode(tokenizer, corpus.train), encode(tokenizer, corpus.valid)
    )


def read_corpus(data: Sequence[Path], *, installed_packages: bool = False) -> Corpus:
    """Reads the files and holds out some of them; see `load_text`."""
    places = sysconfig.get_paths()
    wanted = ([] if data else ["stdlib"]) + ["purelib", "platlib"] * installed_packages
    code = dict.fromkeys(Path(places[name]) for name in wanted)
    read = [*((_read, path) for path in data), *((_read_code, root) for root in code)]
    train, valid = split([text for reader, path in read for text in reader(path)])
    return Corpus(" + ".join(str(path) for _, path in read), train, valid)


def split(texts: Sequence[str]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Holds out the files whose contents have the lowest hashes: the choice depends neither on
    names nor on order, and equal files are never on both sides. Of a single file, holds out the
    end."""
    unique = {_digest(text): text for text in texts}
    if len(unique) == 1:
        (text,) = unique.values()
        end = int(len(text) * (1 - HELD_OUT))
        cut = text.rfind("\n", 0, end) + 1 or end
        return (text[:cut],), (text[cut:],)
    held_out = set(sorted(unique)[: max(1, round(len(unique) * HELD_OUT))])
    return (
        tuple(text for digest, text in unique.items() if digest not in held_out),
        tuple(text for digest, text in unique.items() if digest in held_out),
    )


def load_tokenizer(texts: Sequence[str], vocab_size: int, cache: Path) -> Tokenizer:
    """A byte-level BPE tokenizer of `texts`, trained once. The cache's key is a hash of the texts
    and the size, so other text never gets a wrong tokenizer."""
    if vocab_size < BYTE_VOCABULARY:
        raise InputError(
            f"--vocab-size {vocab_size} is too small: {BYTE_VOCABULARY} is the least, "
            "256 bytes and the document separator"
        )
    path = cache / f"tokenizer-{vocab_size}-{_digest(*texts)[:16]}.json"
    tokenizer = _cached_tokenizer(path)
    if tokenizer is None:
        cache.mkdir(parents=True, exist_ok=True)
        tokenizer = _train_tokenizer(texts, vocab_size)
        content = tokenizer.to_str()
        write_whole(path, json.dumps({"sha256": _digest(content), "tokenizer": content}).encode())
    tokenizer.encode_special_tokens = True  # a separator spelled out in the text stays text
    return tokenizer


def read_tokenizer(path: Path, fingerprint: str) -> Tokenizer:
    """The tokenizer that a run left in its folder.

    Raises:
      InputError: There is none, or another than the run's.
    """
    if not path.exists():
        raise InputError(f"{path}: no such file; a run of an older release gets it with --resume")
    content = path.read_bytes().decode(errors="replace")
    if _digest(content) != fingerprint:
        raise InputError(f"{path}: not the tokenizer of this run's checkpoint")
    tokenizer = Tokenizer.from_str(content)
    tokenizer.encode_special_tokens = True
    return tokenizer


def _cached_tokenizer(path: Path) -> Tokenizer | None:
    """The tokenizer of a file; None where there is none, or not what `load_tokenizer` wrote."""
    if not path.exists():
        return None
    try:
        cached = json.loads(path.read_bytes())
        content = cached["tokenizer"]
        return Tokenizer.from_str(content) if cached["sha256"] == _digest(content) else None
    except (ValueError, LookupError, TypeError, AttributeError):
        return None


def _train_tokenizer(texts: Sequence[str], vocab_size: int) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[SEPARATOR],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def encode(tokenizer: Tokenizer, texts: Sequence[str]) -> np.ndarray:
    """Token ids of all documents, int32 `[tokens]`, each document behind a separator."""
    separator = tokenizer.token_to_id(SEPARATOR)
    ids = []
    for start in range(0, len(texts), 256):  # encodings take much more memory than their ids
        for encoding in tokenizer.encode_batch_fast(texts[start : start + 256]):
            ids.append(np.array([separator, *encoding.ids], np.int32))
    return np.concatenate(ids)


def windows(tokens: np.ndarray, context: int) -> np.ndarray:
    """Consecutive windows `[n, context + 1]` of `[tokens]`, one token shared; a view."""
    return np.lib.stride_tricks.sliding_window_view(tokens, context + 1)[::context]


def training_batches(
    text: TokenizedText, *, context: int, batch: int, seed: int
) -> grain.DatasetIterator:
    """Endless batches int32 `[batch, context + 1]`, every epoch in a new order.

    The iterator's `get_state` and `set_state` hold the position.

    Raises:
      InputError: Less than one batch of text.
    """
    source = _windows_of(text, "training", context, batch)
    batches = source.shuffle(seed=seed).repeat().batch(batch, drop_remainder=True)
    return iter(batches.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=8)))


def validation_batches(
    text: TokenizedText, *, context: int, batch: int, count: int
) -> list[np.ndarray]:
    """At most `count` batches int32 `[batch, context + 1]`, spread over the held-out text and
    the same each time, whatever the training seed.

    Raises:
      InputError: Less than one batch of text.
    """
    source = _windows_of(text, "validation", context, batch)
    batches = source.shuffle(seed=0).batch(batch, drop_remainder=True)
    first = (batches[i] for i in range(min(count, len(batches))))
    return [batch for batch in first if batch is not None]  # none is: nothing was filtered out


def _windows_of(
    text: TokenizedText, part: Literal["training", "validation"], context: int, batch: int
) -> grain.MapDataset[np.ndarray]:
    """The windows of one part of the text, of which there must be at least one batch."""
    tokens = text.train if part == "training" else text.valid
    needed = batch * context + 1
    if len(tokens) < needed:
        raise InputError(
            f"{text.corpus.source}: too little {part} text, {len(tokens)} tokens where one batch "
            f"takes {needed}; give more with --data, or lower --batch-size or --context-length"
        )
    # An array does for Grain, which asks for a length and `[i]`; its types say less.
    return grain.MapDataset.source(cast(Sequence[np.ndarray], windows(tokens, context)))


def _read(path: Path) -> list[str]:
    """The documents of a file, or of every file with text in a folder."""
    if not path.exists():
        raise InputError(f"{path}: no such file or folder; give a text file or a folder to --data")
    if path.is_dir():
        return _texts(path, list(_files(path)))
    documents = _documents(path)
    if documents is None:
        raise InputError(f"{path}: a binary file; --data takes UTF-8 text, or Parquet")
    found = [text for text in documents if text.strip()]
    if not found:
        raise InputError(f"{path}: an empty file; --data takes a file with text in it")
    return found


def _read_code(root: Path) -> list[str]:
    """The Python sources of a library, without tests and tables."""
    return _texts(root, [path for path in _files(root, NOT_SOURCES) if path.suffix == ".py"])


def _texts(root: Path, files: Sequence[Path]) -> list[str]:
    texts = [text for file in files for text in _documents(file) or () if text.strip()]
    if not texts:
        raise InputError(
            f"{root}: none of its {len(files)} files is UTF-8 text with something in it; "
            "give a text file or a folder of text files to --data"
        )
    return texts


def _documents(path: Path) -> Sequence[str] | None:
    """A text file is one document, a Parquet file has one a row; None for a binary file."""
    if path.suffix == PARQUET:
        return _rows(path)
    content = path.read_bytes()
    try:
        return None if b"\0" in content else [content.decode("utf-8-sig")]
    except UnicodeDecodeError:
        return None


def _rows(path: Path) -> list[str]:
    """The column `text` of a Parquet file, without nulls."""
    parquet = optional("pyarrow.parquet", "pyarrow", wanted_by=str(path))
    try:
        with parquet.ParquetFile(path) as file:
            columns = {field.name: str(field.type) for field in file.schema_arrow}
            if columns.get(COLUMN) not in ("string", "large_string"):
                found = ", ".join(f"{name} ({kind})" for name, kind in columns.items())
                raise InputError(f"{path}: no column {COLUMN} of strings; it has {found}")
            rows = file.read(columns=[COLUMN])[COLUMN].to_pylist()
    except (ValueError, OSError) as error:  # pyarrow's errors are among them
        reason = " ".join(str(error).split())
        raise InputError(f"{path}: not a Parquet file that can be read ({reason})") from error
    return [row for row in rows if row is not None]


def _files(root: Path, without: Collection[str] = ()) -> Iterator[Path]:
    """The files under `root` that are not hidden, in the order of their paths."""
    for folder, children, names in os.walk(root):
        children[:] = sorted(c for c in children if c not in without and not c.startswith("."))
        files = (Path(folder, name) for name in sorted(names) if not name.startswith("."))
        yield from (file for file in files if file.is_file())


def _digest(*parts: str) -> str:
    """SHA-256 of the parts and of their boundaries, hexadecimal."""
    digest = hashlib.sha256()
    for part in parts:
        content = part.encode()
        digest.update(len(content).to_bytes(8, "big") + content)
    return digest.hexdigest()
