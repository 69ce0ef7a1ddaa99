"""docs/tools: how the pages of the site are gathered, and how older versions stay readable."""

import json
import subprocess

import pytest

from docs.tools import gather, publish
from docs.tools.links import relink

HOST = "https://host/us"


def page(tmp_path, monkeypatch, text, url=HOST):
    (tmp_path / "docs" / "how-to").mkdir(parents=True)
    (tmp_path / "docs" / "a.md").write_text("# A")
    (tmp_path / "studies" / "clip").mkdir(parents=True)
    (tmp_path / "studies" / "clip" / "README.md").write_text("# Clip")
    (tmp_path / "studies" / "clip" / "curves.png").write_bytes(b"")
    (tmp_path / "code.py").write_text("")
    (tmp_path / "docs" / "how-to" / "b.md").write_text(text)
    monkeypatch.setattr(gather, "ROOT", tmp_path)
    return gather.page("docs/how-to/b.md", url, "v1")


@pytest.mark.parametrize(
    ("link", "built"),
    [
        ("[a](../a.md#part)", "[a](../a.md#part)"),
        ("[c](../../studies/clip/README.md)", "[c](../studies/clip/index.md)"),
        ("![c](../../studies/clip/curves.png)", "![c](../studies/clip/curves.png)"),
        ("[`code` of it](../../code.py)", f"[`code` of it]({HOST}/blob/v1/code.py)"),
        ("[h](https://other/x) [p](#part)", "[h](https://other/x) [p](#part)"),
        ("`[a](../a.md)`\n```\n[a](gone.md)\n```", "`[a](../a.md)`\n```\n[a](gone.md)\n```"),
    ],
)
def test_links_of_a_page(tmp_path, monkeypatch, link, built):
    assert page(tmp_path, monkeypatch, link)[0] == built


def test_without_an_address_there_are_no_links_into_the_repository(tmp_path, monkeypatch):
    assert (
        page(tmp_path, monkeypatch, "See [its code](../../code.py).", url="")[0] == "See its code."
    )


def test_a_link_that_leads_nowhere_stops_the_build(tmp_path, monkeypatch):
    with pytest.raises(SystemExit, match=r"how-to/b\.md: the link \[x\] leads to docs/gone\.md"):
        page(tmp_path, monkeypatch, "[x](../gone.md)")


def test_pictures_of_elsewhere_come_along(tmp_path, monkeypatch):
    _, shown = page(tmp_path, monkeypatch, "![c](../../studies/clip/curves.png)")
    assert shown == {"studies/clip/curves.png"}


def test_a_link_is_seen_with_its_folder():
    seen = []
    relink("[a b](../x.md#y)", "docs/how-to", lambda *link: seen.append(link) or "")
    assert seen == [("[a b]", "docs/x.md", "#y")]


@pytest.fixture
def repository(tmp_path, monkeypatch):
    for who in ("AUTHOR", "COMMITTER"):
        monkeypatch.setenv(f"GIT_{who}_NAME", "a")
        monkeypatch.setenv(f"GIT_{who}_EMAIL", "a@example.org")
    folder = tmp_path / "repository"
    subprocess.run(["git", "init", "--quiet", folder], check=True)
    return folder


def on_the_branch(repository, name):
    return publish.git(repository, "show", f"{publish.BRANCH}:{name}")


def test_older_versions_stay(repository, tmp_path):
    built = tmp_path / "built"
    (built / "tutorials").mkdir(parents=True)
    for version in ("0.9.0", "0.10.0", "0.10.0"):  # the last one again
        (built / "tutorials" / "index.html").write_text(f"all of {version}")
        publish.publish(repository, built, version)
    assert on_the_branch(repository, "0.9.0/tutorials/index.html") == "all of 0.9.0"
    assert on_the_branch(repository, "0.10.0/tutorials/index.html") == "all of 0.10.0"
    listed = json.loads(on_the_branch(repository, "versions.json"))
    assert [each["version"] for each in listed] == ["0.10.0", "0.9.0"]
    assert "url=0.10.0/" in on_the_branch(repository, "index.html")
    assert publish.git(repository, "rev-list", "--count", publish.BRANCH) == "3"
