"""Which of eight packages is a docstring from? One penalty on sparse words, beside scikit-learn's grid.

    python scripts/bench/sklearn_text.py

2,000 docstrings of installed packages, 5,590 words by tf-idf, as CSR: `LogisticRegressionCV` of both, on the same five
folds. Each is fitted in a process of its own with one thread; seconds are processor time, and the peak is of the whole
process, its imports included. A further 1,000 docstrings are the test rows.
"""

from __future__ import annotations

import argparse
import ast
import importlib.util
import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import joblib
import numpy as np
from sklearn import linear_model
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.metrics import log_loss
from sklearn.model_selection import StratifiedKFold

PACKAGES = ("numpy", "scipy", "sklearn", "torch", "sympy", "networkx", "pandas", "matplotlib")
TRAIN, TEST, WORDS = 250, 125, 5590
"""Documents of each package to train on and to test on, and features."""
TIME, MEGABYTES = 1.5, 500
"""What is asked: less than so many times scikit-learn's time, and less memory than that."""


def docstrings(package: str) -> Iterator[str]:
    """Yield docstrings of more than twenty words of an installed package, which is not imported, without its name."""
    found = importlib.util.find_spec(package)
    assert found is not None
    assert found.origin is not None
    for file in sorted(Path(found.origin).parent.rglob("*.py")):
        nodes = ast.walk(ast.parse(file.read_text(encoding="utf8")))
        texts = (ast.get_docstring(node) or "" for node in nodes if isinstance(node, ast.FunctionDef | ast.ClassDef))
        yield from (text.replace(package, "") for text in texts if len(text.split()) > 20)


def sets(seed: int) -> tuple[Any, Any, Any, Any]:
    """Return sparse training rows, their packages, and test rows."""
    rng = np.random.default_rng(seed)
    train, test = [], []
    for package in PACKAGES:
        texts = list(dict.fromkeys(itertools.islice(docstrings(package), 4 * (TRAIN + TEST))))
        order = rng.permutation(len(texts))
        train += [texts[index] for index in order[:TRAIN]]
        test += [texts[index] for index in order[TRAIN : TRAIN + TEST]]
    words = TfidfVectorizer(min_df=2, max_features=WORDS, sublinear_tf=True).fit(train)
    y, y_test = np.repeat(PACKAGES, TRAIN), np.repeat(PACKAGES, TEST)
    return words.transform(train), y, words.transform(test), y_test


def fit(which: str, file: str, seed: int) -> dict[str, Any]:
    """Return the seconds, the peak and the test loss of a model, fitted in this process to the data of a file."""
    X, y, X_test, y_test = joblib.load(file)
    folds = StratifiedKFold(5, shuffle=True, random_state=seed)
    model: Any
    if which == "ours":
        import torch

        from bilevel.sklearn import LogisticRegressionCV

        torch.set_num_threads(1)
        model = LogisticRegressionCV(cv=folds, penalty_structure="scalar")
    else:
        asked = {"scoring": "neg_log_loss", "l1_ratios": (0,), "use_legacy_attributes": False}
        model = linear_model.LogisticRegressionCV(cv=folds, max_iter=1000, **asked)
    start = time.process_time()
    model.fit(X, y)
    seconds = time.process_time() - start
    return {
        "shape": X.shape,
        "seconds": seconds,
        "peak": int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) / 1024,
        "loss": log_loss(y_test, model.predict_proba(X_test)),
        "C": float(model.C_),
    }


def main() -> int:
    """Fit both and return 0 where each bar is reached."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=0, help="of the documents and the folds")
    parser.add_argument("--fit", nargs=2, help="fit `ours` or `scikit-learn` to the data in a file, in this process")
    options = parser.parse_args()
    if options.fit:
        print(json.dumps(fit(*options.fit, options.seed)))
        return 0
    from common import emit

    found = {}
    with tempfile.TemporaryDirectory() as folder:
        file = str(Path(folder, "text.joblib"))
        joblib.dump(sets(options.seed), file)
        for which in ("ours", "scikit-learn"):
            command = [sys.executable, __file__, "--fit", which, file, "--seed", str(options.seed)]
            environment = os.environ | {"OMP_NUM_THREADS": "1"}
            done = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE)
            found[which] = json.loads(done.stdout.splitlines()[-1])
    ours, theirs = found["ours"], found["scikit-learn"]
    rounded = {which: {key: np.round(each, 4).tolist() for key, each in found[which].items()} for which in found}
    fine = [
        emit("text, time", ratio := ours["seconds"] / theirs["seconds"], f"below {TIME}", ratio < TIME),
        emit("text, peak in MB", ours["peak"], f"below {MEGABYTES}", ours["peak"] < MEGABYTES, **rounded),
    ]
    return 0 if all(fine) else 1


if __name__ == "__main__":
    raise SystemExit(main())
