"""The script that measures the package's shape counts what is planted, and nothing else."""

import subprocess
import sys

from paths import ROOT

RUN = "\n".join(f"    x = x * {k} + 1" for k in range(6))
FILES = {
    "core/tree.py": f'"""Trees."""\n\n\ndef first(x):\n    """One."""\n{RUN}\n',
    "inner/one.py": "from bilevel.core import tree\n\n\nclass Base: ...\n\n\nclass One(Base): ...\n\n\n"
    f"def second(x):\n{RUN}\n",
    "inner/two.py": "from bilevel.inner.one import One\n\n\ndef asks(x):\n    return isinstance(x, One)\n",
    "linear/a.py": "from bilevel.linear.b import b\n",
    "linear/b.py": "def b():\n    import bilevel.linear.a\n",
    "linear/long.py": "def long():\n" + "    pass\n" * 400,
}  # fmt: skip


def test_the_figures_are_those_of_what_was_planted(tmp_path):
    for name, text in FILES.items():
        path = tmp_path / "bilevel" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    command = [sys.executable, str(ROOT / "scripts" / "studies" / "structure.py"), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    lines = sum(text.count("\n") for text in FILES.values())
    # The lines of `first` stand again in `second`, and 400 equal lines repeat themselves.
    figures = [lines, 2, 7 + 9 + 2 + 1 + 401, 3, 1, 2, 1, 1, 1, 2]
    assert [int(line.rpartition(" ")[2].rstrip("}")) for line in done.stdout.splitlines()] == figures
