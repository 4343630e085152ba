"""Every Python example in the README and the guides runs."""

import re

import pytest
from paths import ROOT

import bilevel as bl

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_examples_of_a_page_run_from_top_to_bottom(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", page.read_text(), flags=re.DOTALL)
    # One namespace a page: later examples use what earlier ones made, as a reader would.
    namespace: dict[str, object] = {"__name__": page.stem}
    for block in blocks:
        exec(compile(block, str(page), "exec"), namespace)
    assert blocks or "```python" not in page.read_text()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_links_of_a_page_lead_to_files(page):
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", page.read_text()):
        assert (page.parent / target).exists(), f"{page.name} links to {target}, which does not exist"


def test_every_page_says_what_it_is_for_and_is_in_the_contents():
    contents = (ROOT / "docs" / "README.md").read_text()
    navigation = (ROOT / "scripts" / "docs" / "mkdocs.yml").read_text()
    for page in PAGES[2:]:
        title, empty, first = page.read_text().split("\n")[:3]
        assert title.startswith("# ")
        assert not empty
        assert first.startswith("This page is for "), page.name
        assert page.name == "README.md" or f"]({page.name})" in contents
        assert page.name in navigation


def test_the_reference_has_every_public_name():
    listed = set(
        re.findall(r"^::: bilevel\.(?:core\.)?(\w+)$", (ROOT / "docs" / "reference.md").read_text(), re.MULTILINE)
    )
    assert listed == set(bl.__all__)
