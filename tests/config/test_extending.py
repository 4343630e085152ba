"""Classes of a user's own without one member: a default takes its place, or one sentence names it."""

from __future__ import annotations

import ast
import re
import sys
from pathlib import Path

import pytest
from paths import ROOT

import bilevel as bl
from bilevel.config import ConfigError, load_plan

PAGE = (ROOT / "docs" / "extending.md").read_text()
FILES = dict(re.findall(r"```(?:python|yaml)\n# (my_\w+\.\w+)\n(.*?)```", PAGE, re.DOTALL))

SENTENCES = {
    **dict.fromkeys(("tol", "max_curvature", "task"), ""),  # have defaults
    "__init__": "nor from a seed",
    "glm": "LogCoshProblem needs a loss: name it in the class, such as `glm = ",
    "initial_hparams": "does not say where tuning starts: give it a method `initial_hparams(self)`",
}
"""What is said without a member; of others, its name."""


def members() -> list[tuple[str, str, str]]:
    """(file, class, member) of every class of the page."""
    return [
        (file, node.name, member)
        for file, source in FILES.items()
        if file.endswith(".py")
        for node in ast.parse(source).body
        if isinstance(node, ast.ClassDef)
        for each in node.body
        if (member := name_of(each))
    ]


def name_of(node: ast.stmt) -> str:
    if isinstance(node, ast.FunctionDef):
        return node.name
    assigned = ast.unparse(node).split("=")[0].split(":")[0].strip()
    return assigned if assigned in SENTENCES else ""


def without(source: str, owner: str, member: str) -> str:
    tree = ast.parse(source)
    for node in tree.body:
        if isinstance(node, ast.ClassDef) and node.name == owner:
            node.body = [each for each in node.body if name_of(each) != member]
    return ast.unparse(tree)


@pytest.mark.parametrize(("file", "owner", "member"), members())
def test_a_member_that_is_missing_has_a_default_or_a_sentence(
    file: str, owner: str, member: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", [str(tmp_path), *sys.path])
    for name, source in FILES.items():
        Path(name).write_text(without(source, owner, member) if name == file else source)
        monkeypatch.delitem(sys.modules, Path(name).stem, raising=False)
    exec(FILES["my_data.py"], {})
    try:
        plan = load_plan("my_config.yaml", allow_import=True)
        for build in plan.problems.values():
            setup = build(0)
            for estimator in plan.estimators.values():
                bl.hypergradient(setup.problem, plan.solver, estimator, setup.hparams, on_failure="return")
        said = ""
    except ConfigError as error:
        said = str(error)
    finally:
        for name in FILES:
            sys.modules.pop(Path(name).stem, None)
    expected = SENTENCES.get(member, member)
    assert expected in said
    assert bool(said) == bool(expected)
    assert "\n" not in said
