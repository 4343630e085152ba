"""Classes of a user's own without one member: a default takes its place, or one sentence names it."""

from __future__ import annotations

import ast
import re
import sys
from pathlib import Path

import pytest
import torch
from paths import ROOT
from torch import Tensor

import bilevel as bl
from bilevel.config import ConfigError, load_plan

PAGE = (ROOT / "docs" / "extending.md").read_text()
FILES = dict(re.findall(r"```(?:python|yaml)\n# (my_\w+\.\w+)\n(.*?)```", PAGE, re.DOTALL))

DEFAULTS = ("tol", "max_curvature", "task", "_hvp", "_cross", "_grad", "linearization", "inner_problem")
SENTENCES = {
    "__init__": "nor from a seed",
    "glm": "LogCoshProblem needs a loss, a `GLMLoss`: name it in the class, such as `glm = ",
    "initial_hparams": "does not say where tuning starts: give it a method `initial_hparams(self)`",
    "SoftSignDescent": "'my_solver' has no class 'SoftSignDescent' that is an inner solver",
    "IdentityHessian": "'my_estimator' has no class 'IdentityHessian' that is a hypergradient estimator",
    "MinimalResidual": "'my_linear_solver' has no class 'MinimalResidual' that is a linear solver",
    "LogCosh": "LogCoshProblem needs a loss, a `GLMLoss`",
    "LogCoshProblem": "'my_loss' has no class 'LogCoshProblem' that is a problem",
    "Denoising": "'my_oracles' has no class 'FastDenoising' that is a problem",
    "FastDenoising": "'my_oracles' has no class 'FastDenoising' that is a problem",
}
"""What is said without a member, or, by the name of a class, without its base; of others, the name alone."""


def members() -> list[tuple[str, str, str]]:
    """(file, class, member) of every class of the page; the class again, for its base."""
    found = []
    for file, source in FILES.items():
        for node in ast.parse(source).body if file.endswith(".py") else ():
            if isinstance(node, ast.ClassDef):
                found += [(file, node.name, name) for each in node.body if (name := name_of(each))]
                found += [(file, node.name, node.name)] * (node.name in SENTENCES)
    return found


def name_of(node: ast.stmt) -> str:
    if isinstance(node, ast.FunctionDef):
        return node.name
    return "" if isinstance(node, ast.Expr) else ast.unparse(node).split("=")[0].split(":")[0].strip()


def without(source: str, owner: str, member: str) -> str:
    tree = ast.parse(source)
    for node in tree.body:
        if isinstance(node, ast.ClassDef) and node.name == owner:
            node.body = [each for each in node.body if name_of(each) != member]
            node.bases = [] if member == owner else node.bases
    return ast.unparse(tree)


def results(folder: Path, files: dict[str, str]) -> list[Tensor]:
    """What the page's config computes in a folder with these files."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr("sys.path", [str(folder), *sys.path])
        for name, source in files.items():
            Path(name).write_text(source)
            sys.modules.pop(Path(name).stem, None)
        exec(files["my_data.py"], {})
        try:
            plan = load_plan("my_config.yaml", allow_import=True)
            setups = [build(0) for build in plan.problems.values()]
            return [
                bl.hypergradient(each.problem, plan.solver, rule, each.hparams, on_failure="return").hypergradient
                for each in setups
                for rule in plan.estimators.values()
            ]
        finally:
            for name in files:
                sys.modules.pop(Path(name).stem, None)


@pytest.fixture(scope="module")
def complete(tmp_path_factory: pytest.TempPathFactory) -> list[Tensor]:
    return results(tmp_path_factory.mktemp("complete"), FILES)


@pytest.mark.parametrize(("file", "owner", "member"), members())
def test_a_member_that_is_missing_has_a_default_or_a_sentence(
    file: str, owner: str, member: str, tmp_path: Path, complete: list[Tensor]
) -> None:
    files = {**FILES, file: without(FILES[file], owner, member)}
    if member in DEFAULTS:
        taken = results(tmp_path, files)
        if member != "task":  # without it, targets are not centred
            torch.testing.assert_close(taken, complete)
        return
    # An attribute that is the class's own is missed by its own code; `compare` and `check` say it in this sentence.
    with pytest.raises((ConfigError, AttributeError)) as error:
        results(tmp_path, files)
    assert SENTENCES.get(member, member) in str(error.value)
    assert "\n" not in str(error.value)
