"""What a release is made of: its metadata, its licence, and what refuses it."""

import importlib.metadata
import importlib.util
import pathlib
import re
import subprocess
import tomllib

import pytest

import muonclip_jax as mc

ROOT = pathlib.Path(__file__).parent.parent
SETTINGS = tomllib.loads((ROOT / "pyproject.toml").read_text())
VERSION = SETTINGS["project"]["version"]
ADDRESS = "https://example.org/project"
FILES = ("pyproject.toml", "CHANGELOG.md", "CITATION.cff")


def module_of(file):
    spec = importlib.util.spec_from_file_location(file.stem, file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


release = module_of(ROOT / ".ci" / "release.py")


def test_the_version_is_said_once():
    assert mc.__version__ == importlib.metadata.version("muonclip_jax")
    assert f"\nversion: {VERSION}\n" in (ROOT / "CITATION.cff").read_text()


@pytest.mark.parametrize("extra", ["cuda12", "cuda13", "tpu"])
def test_extras_install_jax_for_accelerators_where_it_exists(extra):
    (requirement,) = SETTINGS["project"]["optional-dependencies"][extra]
    assert requirement.startswith(f"jax[{extra}]; sys_platform == 'linux'")


def test_a_sdist_has_what_a_build_needs_and_the_licence():
    parts = SETTINGS["tool"]["hatch"]["build"]["targets"]["sdist"]["only-include"]
    assert {"muonclip_jax", "hatch_build.py", "docs/tools/links.py", "README.md", "NOTICE"} <= set(
        parts
    )
    assert all((ROOT / part).exists() for part in parts)
    assert SETTINGS["project"]["license-files"] == ["LICENSE", "NOTICE"]
    for named in re.findall(r"\((\S+)\)", (ROOT / "NOTICE").read_text()):
        assert (ROOT / named).exists(), named


@pytest.fixture
def repository(tmp_path):
    """A repository that is ready for a release."""
    for name in FILES:
        text = (ROOT / name).read_text()
        (tmp_path / name).write_text(text.replace("## Unreleased", f"## {VERSION}"))
    person = ("-c", "user.name=a", "-c", "user.email=a@example.org")
    for command in (("init",), ("add", "."), (*person, "commit", "--message", "all")):
        subprocess.run(["git", "-C", tmp_path, *command], check=True, capture_output=True)
    return tmp_path


def change(repository, name, old, new):
    text = (repository / name).read_text()
    assert old in text
    (repository / name).write_text(text.replace(old, new, 1))


def test_a_release_needs_nothing_else(repository):
    assert release.problems(repository, ADDRESS) == []


@pytest.mark.parametrize(
    "name, old, new, words",
    [
        ("CHANGELOG.md", f"## {VERSION}", "## Unreleased", f"'Unreleased': give version {VERSION}"),
        ("CITATION.cff", f"version: {VERSION}", "version: 9.9", "CITATION.cff has version 9.9"),
    ],
)
def test_a_release_is_refused(repository, name, old, new, words):
    change(repository, name, old, new)
    unsaved, problem = release.problems(repository, ADDRESS)
    assert f" M {name}" in unsaved and words in problem


@pytest.mark.parametrize("address", ["", "http://example.org/project", f"{ADDRESS}/"])
def test_a_release_needs_the_address_of_the_repository(repository, address):
    (problem,) = release.problems(repository, address)
    assert (
        problem.startswith(f"PROJECT_URL is {address!r}") and "make release PROJECT_URL" in problem
    )


def test_a_version_is_released_once(repository):
    subprocess.run(["git", "-C", repository, "tag", f"v{VERSION}"], check=True)
    assert release.problems(repository, ADDRESS) == [
        f"The tag v{VERSION} is there: raise the version in pyproject.toml."
    ]


def test_readme_has_absolute_links_on_an_index():
    links = module_of(ROOT / "hatch_build.py").with_absolute_links
    page = "[a](docs/a.md#part) ![b](docs/b.svg) [c](https://c.org) [d](#d) `[e](e)`"
    assert links(ROOT, page, "https://host/us", "v1.2") == (
        "[a](https://host/us/blob/v1.2/docs/a.md#part) ![b](https://host/us/raw/v1.2/docs/b.svg) "
        "[c](https://c.org) [d](#d) `[e](e)`"
    )
