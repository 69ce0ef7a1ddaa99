"""docs/how-to/errors.md: each mistake says what the page says, and what is right does not raise."""

import pathlib
import re
from typing import NamedTuple

import pytest

PAGE = pathlib.Path(__file__).parent.parent / "docs" / "how-to" / "errors.md"
START = re.compile(r"```python\n(.*?)```", re.DOTALL)
MISTAKE = re.compile(
    r"^### (?P<title>[^\n]*)\n[^#]*?```py\n(?P<wrong>.*?)```\n```text\n(?P<message>.*?)\n```\n"
    r"```py\n(?P<right>.*?)```",
    re.DOTALL | re.MULTILINE,
)


class Mistake(NamedTuple):
    title: str
    wrong: str
    message: str
    right: str


MISTAKES = [Mistake(*match.groups()) for match in MISTAKE.finditer(PAGE.read_text())]


@pytest.fixture(scope="module")
def before():
    """What all mistakes start from."""
    namespace: dict = {"__name__": "mistakes"}
    exec(START.search(PAGE.read_text())[1], namespace)
    return namespace


def test_no_mistake_is_left_out():
    assert len(MISTAKES) == len(re.findall("^### ", PAGE.read_text(), re.MULTILINE)) >= 25


@pytest.mark.bad_input
@pytest.mark.parametrize("mistake", MISTAKES, ids=lambda mistake: mistake.title)
def test_a_mistake_says_what_the_page_says(mistake, before):
    with pytest.raises((ValueError, TypeError)) as caught:
        exec(mistake.wrong, dict(before))
    said, at = f"{caught.type.__name__}: {caught.value}", 0
    for words in filter(None, mistake.message.split(" … ")):
        words = words.removeprefix("… ")
        assert words in said[at:], f"{words!r} is not in, or not behind the words before it: {said}"
        at = said.index(words, at) + len(words)
    exec(mistake.right, dict(before))
