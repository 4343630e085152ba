"""Which package is a docstring from? Several classes and sparse inputs, beside scikit-learn's grid on the same folds.

python scripts/examples/text.py [FOLDER] [--documents 100]
"""

import argparse
import ast
import importlib.util
import itertools
from collections.abc import Iterator
from pathlib import Path

import matplotlib.pyplot as plt
from sklearn import linear_model
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.metrics import log_loss
from sklearn.model_selection import StratifiedKFold, train_test_split

from bilevel.sklearn import LogisticRegressionCV


def docstrings(package: str) -> Iterator[str]:
    """Yield docstrings of more than twenty words of an installed package, which is not imported."""
    for file in sorted(Path(importlib.util.find_spec(package).origin).parent.rglob("*.py")):
        nodes = ast.walk(ast.parse(file.read_text(encoding="utf8")))
        texts = (ast.get_docstring(node) or "" for node in nodes if isinstance(node, ast.FunctionDef | ast.ClassDef))
        yield from (text.replace(package, "") for text in texts if len(text.split()) > 20)


def main(arguments: list[str] | None = None) -> None:
    """Run it; arguments of the command line are given in tests."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", nargs="?", default="runs/examples", type=Path, help="where the picture goes")
    parser.add_argument("--documents", default=100, type=int)
    options = parser.parse_args(arguments)
    packages = ("numpy", "scipy", "sklearn", "torch")
    texts = [text for package in packages for text in itertools.islice(docstrings(package), options.documents)]
    labels = [package for package in packages for _ in range(options.documents)]
    split = train_test_split(texts, labels, test_size=0.35, stratify=labels, random_state=0)
    words = TfidfVectorizer(min_df=2, sublinear_tf=True).fit(split[0])
    X, X_test, y, y_test = *map(words.transform, split[:2]), *split[2:]
    folds = StratifiedKFold(5, shuffle=True, random_state=0)
    ours = LogisticRegressionCV(cv=folds, penalty_structure="scalar")
    asked = {"scoring": "neg_log_loss", "l1_ratios": (0,), "use_legacy_attributes": False}
    theirs = linear_model.LogisticRegressionCV(cv=folds, **asked)
    for name, model in (("scikit-learn", theirs), ("ours", ours)):
        loss = log_loss(y_test, model.fit(X, y).predict_proba(X_test))
        print(f"{name:12} test log loss {loss:.4f}, C {model.C_:.4g}, X {X.shape}")
    figure, axes = plt.subplots(figsize=(5, 3.4), layout="constrained")
    axes.semilogx(theirs.Cs_, -theirs.scores_.mean((0, 1)), "o-", label="scikit-learn: a grid")
    axes.plot(ours.C_, ours.tuning_report_.nodes["criterion"][0], "s", label="ours: a descent")
    axes.legend(title="log loss of held-out folds, by C")
    options.folder.mkdir(parents=True, exist_ok=True)
    figure.savefig(options.folder / "text.png", dpi=80)
    plt.close(figure)


if __name__ == "__main__":
    main()
