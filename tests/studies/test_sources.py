"""A run's hash: of what its functions compute, and of nothing else."""

import sys

import pytest

import studies
from studies.common import sources

IMPORTS = "from studies.fake.train import helper\nfrom studies.fake.parts import RATE\n"
STEP = '''
@jit
def step(x):
    """Doc."""
    return helper(x, RATE)  # comment
'''
BASE = {
    "train": f"""
from studies.fake import parts
from studies.fake.parts import RATE, Config
from elsewhere import jit

def helper(x, rate):
    return parts.scale(x) * rate
{STEP}
def make(config: Config):
    return config.build()

def train(config: Config):
    return step(make(config))

def unused():
    return 1
""",
    "parts": '''
from dataclasses import dataclass

RATE = 2
OTHER = 3

@dataclass
class Config:
    """Doc."""
    width: int = 3
    """Doc of a field."""

    def build(self):
        return self.width

def scale(x):
    return x
''',
}


@pytest.fixture
def digest(tmp_path, monkeypatch):
    """Writes a package `studies.fake`, and says the hash of its `train`."""
    monkeypatch.setattr(studies, "__path__", [*studies.__path__, str(tmp_path)])

    def write(**modules):
        folder = tmp_path / "fake"
        folder.mkdir(exist_ok=True)
        for name, text in {"__init__": "", **BASE, **modules}.items():
            (folder / f"{name}.py").write_text(text)
        for name in [name for name in sys.modules if name.startswith("studies.fake")]:
            monkeypatch.delitem(sys.modules, name)
        for cached in (sources.digest, sources.definitions, sources._is_module):
            cached.cache_clear()
        sys.path_importer_cache.clear()
        return sources.digest(("studies.fake.train", "train"))

    yield write
    for name in [name for name in sys.modules if name.startswith("studies.fake")]:
        del sys.modules[name]
    for cached in (sources.digest, sources.definitions, sources._is_module):
        cached.cache_clear()


def changed(module, *pairs):
    text = BASE[module]
    for old, new in pairs:
        assert old in text
        text = text.replace(old, new)
    return {module: text}


SAME = {
    "comment": changed("train", ("# comment", "# another")),
    "docstring": changed("train", ('"""Doc."""', '"""Another."""')),
    "annotation": changed("train", ("def helper(x, rate)", "def helper(x: int, rate) -> int")),
    "layout": changed("train", ("step(make(config))", "step(\n        make(config)\n    )")),
    "what is not used": changed("train", ("return 1", "return 2")),
    "constant that is not used": changed("parts", ("OTHER = 3", "OTHER = 4")),
    "option": changed("parts", ("width: int = 3", "width: int = 3\n    height: int = 4")),
    "move to another file": {
        **changed("train", (STEP, "from studies.fake.moved import step\n")),
        "moved": IMPORTS + STEP,
    },
}
OTHER = {
    "function": changed("train", ("* rate", "/ rate")),
    "function of another file": changed("parts", ("return x", "return -x")),
    "constant": changed("parts", ("RATE = 2", "RATE = 3")),
    "method": changed("parts", ("return self.width", "return -self.width")),
    "decorator": changed("train", ("@jit", "@jit(static=1)")),
}


@pytest.mark.parametrize("modules", SAME.values(), ids=SAME)
def test_what_computes_the_same_has_the_same_hash(digest, modules):
    assert digest() == digest(**modules)


@pytest.mark.parametrize("modules", OTHER.values(), ids=OTHER)
def test_what_computes_something_else_has_another_hash(digest, modules):
    assert digest() != digest(**modules)


def test_a_run_uses_the_model_and_its_optimizer_and_no_report():
    names = {name for _, name in sources.used([("studies.common.training", "train")])}
    assert {"LatentAttention", "Optimizer", "take_steps", "evaluate", "attention_layout"} <= names
    assert not names & {"Study", "Grid", "load_text", "report"}
