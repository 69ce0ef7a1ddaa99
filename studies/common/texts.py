"""Two texts that differ in kind, of the same files: code without words, and the words alone."""

import ast
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from examples.mla import data

DOCUMENTED = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True)
class TwoTexts(data.TokenizedText):
    """The text of the second phase of a training, with that of the first.

    Attributes:
      first: What the model was trained on before; in tokens of the same vocabulary.
    """

    first: data.TokenizedText

    @property
    def fingerprints(self) -> dict[str, str]:
        """Hashes of both texts and of the vocabulary."""
        return {**super().fingerprints, "first": self.first.corpus.fingerprint}


def code_then_words(corpus: data.Corpus, vocab_size: int, cache: Path) -> TwoTexts:
    """The words of a corpus of Python files, and their code as what comes first. A file is on the
    same side of the split in both, and the vocabulary is that of the whole files."""
    tokenizer = data.load_tokenizer(corpus.train, vocab_size, cache)
    code, words = (
        data.TokenizedText(
            part, tokenizer, data.encode(tokenizer, part.train), data.encode(tokenizer, part.valid)
        )
        for part in (part_of(corpus, code_of), part_of(corpus, words_of))
    )
    return TwoTexts(words.corpus, tokenizer, words.train, words.valid, code)


def part_of(corpus: data.Corpus, part: Callable[[str], str]) -> data.Corpus:
    """That part of every file that has it."""

    def parts(texts: Iterable[str]) -> tuple[str, ...]:
        return tuple(found for text in texts if (found := part(text)).strip())

    source = f"{corpus.source}, {part.__name__.removesuffix('_of')}"
    return data.Corpus(source, parts(corpus.train), parts(corpus.valid))


def code_of(text: str) -> str:
    """A file's code as `ast.unparse` writes it, without comments and docstrings."""
    tree = parse(text)
    for node in ast.walk(tree):
        if isinstance(node, DOCUMENTED) and ast.get_docstring(node, clean=False) is not None:
            node.body = node.body[1:] or [ast.Pass()]
    return ast.unparse(tree)


def words_of(text: str) -> str:
    """A file's docstrings, with an empty line between them."""
    nodes = (node for node in ast.walk(parse(text)) if isinstance(node, DOCUMENTED))
    return "\n\n".join(words for node in nodes if (words := ast.get_docstring(node)))


def parse(text: str) -> ast.Module:
    """The tree of a file; an empty one for what is no Python of this version."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the files' own faults, such as invalid escapes
        try:
            return ast.parse(text)
        except (SyntaxError, ValueError):
            return ast.Module([], [])
