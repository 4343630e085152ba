"""Every Python example in the README and the guides runs."""

import functools
import importlib
import inspect
import pkgutil
import re
import sys
from pathlib import Path

import pytest
from paths import ROOT

import bilevel as bl
from bilevel.cli import main

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_examples_of_a_page_run_from_top_to_bottom(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    # Figures take longer than the commands of a page.
    monkeypatch.setattr("bilevel.cli.commands.draw_figures", lambda *_: True)
    blocks = re.findall(r"```(python|yaml|sh)\n(.*?)```", page.read_text(), flags=re.DOTALL)
    # One namespace a page: later examples use what earlier ones made, as a reader would.
    namespace: dict[str, object] = {"__name__": page.stem}
    files = set()
    for language, block in blocks:
        # A block that begins with the name of a file is that file, and commands that name one are run.
        if named := re.match(r"# (my_\w+\.\w+)\n", block):
            Path(named[1]).write_text(block)
            files.add(named[1])
            monkeypatch.syspath_prepend(str(tmp_path))
        elif language == "python":
            exec(compile(block, str(page), "exec"), namespace)
        elif language == "sh":
            for line in block.splitlines():
                if line.startswith("bilevel ") and line.split()[2].partition(":")[0] in files:
                    assert main(line.split()[1:]) == 0
    for file in files:
        sys.modules.pop(Path(file).stem, None)


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


def test_every_public_method_has_a_docstring_of_its_own_or_inherits_one():
    bare = []
    for module in pkgutil.walk_packages(bl.__path__, "bilevel."):
        for name, cls in inspect.getmembers(importlib.import_module(module.name), inspect.isclass):
            own = cls.__module__ == module.name and not name.startswith("_")
            bare += [
                f"{module.name}.{name}.{method}"
                for method, value in vars(cls).items()
                if own and not method.startswith("_")
                if inspect.isroutine(value) or isinstance(value, property | functools.cached_property)
                if not inspect.getdoc(getattr(cls, method))
            ]
    assert not bare
