"""The gallery runs, on few rows, prints both sides and leaves a picture."""

import importlib.util
import re

import pytest
from paths import SCRIPTS

EXAMPLES = {
    "sparse": ["--rows", "60", "--splits", "1"],
    "grouped": ["--rows", "60", "--splits", "1"],
    "text": ["--documents", "8"],
    "imbalanced": ["--rows", "110", "--splits", "1"],
}


@pytest.mark.parametrize("name", EXAMPLES)
def test_an_example_runs_from_its_command_line(name, tmp_path, capsys):
    path = SCRIPTS / "examples" / f"{name}.py"
    assert len(path.read_text().splitlines()) < 60
    spec = importlib.util.spec_from_file_location(f"example_{name}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.main([str(tmp_path / "pictures"), *EXAMPLES[name]])
    printed = capsys.readouterr().out
    assert re.search(r"scikit-learn .*\d\.\d", printed)
    assert re.search(r"ours .*\d\.\d", printed)
    assert (tmp_path / "pictures" / f"{name}.png").stat().st_size > 5_000


def test_every_example_is_tested_and_shown():
    assert {path.stem for path in (SCRIPTS / "examples").glob("*.py")} == set(EXAMPLES)
    page = (SCRIPTS.parent / "docs" / "sklearn.md").read_text()
    for name in EXAMPLES:
        picture = SCRIPTS.parent / "docs" / "figures" / f"example_{name}.png"
        assert picture.stat().st_size < 60_000
        assert picture.name in page
        assert f"scripts/examples/{name}.py" in page
