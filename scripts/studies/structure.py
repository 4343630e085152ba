"""Measure the shape of the package: lines, rooms, imports, type tests, long files and functions, repeated runs.

    python scripts/studies/structure.py [ROOT] [--list]

ROOT is a checkout (default: this one), so that two states can be compared; --list names what is counted.
"""

from __future__ import annotations

import argparse
import ast
import json
from pathlib import Path
from typing import Any

LONG_FILE, LONG_FUNCTION, REPEATED = 350, 60, 6
IMPORTS = (ast.Import, ast.ImportFrom)
CONTRACTS = {"BilevelProblem", "InnerSolver", "LinearSolver", "HypergradEstimator", "InnerProblem", "Linearization"}


def lines_of(nodes: Any) -> set[int]:
    """Return the lines that nodes of a syntax tree cover."""
    return {line for node in nodes for line in range(node.lineno, node.end_lineno + 1)}


def is_text(node: ast.AST) -> bool:
    """Whether a node is a docstring, that of an attribute included."""
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)


def imported(tree: ast.AST) -> set[str]:
    """Return the modules of the package that a file imports, wherever in it and for whatever purpose."""
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "bilevel":
            names |= {str(node.module), *(f"{node.module}.{alias.name}" for alias in node.names)}
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
    return names


def on_circles(graph: dict[str, set[str]]) -> list[str]:
    """Return the modules on a circle of imports, and those above one."""
    while leaves := [name for name, ends in graph.items() if not ends & graph.keys()]:
        graph = {name: ends for name, ends in graph.items() if name not in leaves}
    return sorted(graph)


def repeated(code: dict[str, list[tuple[int, str]]]) -> list[str]:
    """Return where six or more lines of code stand a second time."""
    seen: dict[tuple[str, ...], tuple[str, int]] = {}
    runs, until = [], ("", 0)
    for path, lines in code.items():
        for start in range(len(lines) - REPEATED + 1):
            first = seen.setdefault(tuple(text for _, text in lines[start : start + REPEATED]), (path, start))
            if first == (path, start):
                continue
            if until[0] != path or until[1] < start:
                runs.append(f"{path}:{lines[start][0]} as {first[0]}:{code[first[0]][first[1]][0]}")
            until = (path, start + REPEATED)
    return runs


def measured(root: Path) -> dict[str, Any]:
    """Return each figure, or the list whose length it is."""
    texts = {str(path.relative_to(root)): path.read_text() for path in sorted((root / "bilevel").rglob("*.py"))}
    trees = {path: ast.parse(text) for path, text in texts.items()}
    modules = {path.removesuffix(".py").removesuffix("/__init__").replace("/", "."): path for path in trees}
    nodes = [(path, node) for path, tree in trees.items() for node in ast.walk(tree)]
    classes = [(path, node) for path, node in nodes if isinstance(node, ast.ClassDef)]
    own = {node.name for _, node in classes}
    methods = {
        node.name for _, node in classes if own & {base.id for base in node.bases if isinstance(base, ast.Name)}
    } - CONTRACTS
    ends = {path: {modules[end] for end in imported(tree) if end in modules} - {path} for path, tree in trees.items()}
    room = {path: path.split("/")[1] for path in trees if path.count("/") > 1}
    docs = {path: lines_of(filter(is_text, ast.walk(tree))) for path, tree in trees.items()}
    uses = {path: lines_of(node for at, node in nodes if at == path and isinstance(node, IMPORTS)) for path in trees}
    code = {
        path: [
            (number, line.strip())
            for number, line in enumerate(texts[path].splitlines(), 1)
            if line.strip() and line.strip()[0] != "#" and number not in docs[path] | uses[path]
        ]
        for path in trees
    }
    return {
        "lines": sum(text.count("\n") for text in texts.values()),
        "lines of docstrings": sum(map(len, docs.values())),
        "lines of code, imports aside": sum(map(len, code.values())),
        "rooms": len(set(room.values())),
        "arrows between rooms": len({
            (room[path], room[end]) for path in room for end in ends[path] & room.keys() if room[path] != room[end]
        }),
        "modules on circles": on_circles({path: each for path, each in ends.items() if "__init__" not in path}),
        "isinstance on one method's class, outside config": [
            f"{path}:{node.lineno} {', '.join(sorted(kinds))}"
            for path, node in nodes
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "isinstance"
            if (kinds := methods & {part.id for part in ast.walk(node.args[1]) if isinstance(part, ast.Name)})
            if room.get(path) != "config" and not all(name.endswith("Error") for name in kinds)
        ],
        f"files over {LONG_FILE} lines": [path for path, text in texts.items() if text.count("\n") > LONG_FILE],
        f"functions over {LONG_FUNCTION} lines": [
            f"{path}:{node.lineno} {node.name}"
            for path, node in nodes
            if isinstance(node, ast.FunctionDef) and len(lines_of([node])) > LONG_FUNCTION
        ],
        f"runs of {REPEATED} or more lines that stand twice": repeated(code),
    }


def main() -> None:
    """Print a line of JSON for each figure."""
    parser = argparse.ArgumentParser(description="Measure the shape of the package.")
    parser.add_argument("root", nargs="?", type=Path, default=Path(__file__).resolve().parents[2])
    parser.add_argument("--list", action="store_true", help="name what is counted")
    options = parser.parse_args()
    for name, value in measured(options.root).items():
        print(json.dumps({name: value if isinstance(value, int) else len(value)}))
        if options.list and not isinstance(value, int):
            print("".join(f"    {each}\n" for each in value), end="")


if __name__ == "__main__":
    main()
