"""Features come from three sources of different use: one penalty for each source, beside scikit-learn's one for all.

python scripts/examples/grouped.py [FOLDER] [--rows 200]
"""

import argparse
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from sklearn import linear_model
from sklearn.metrics import mean_squared_error
from sklearn.model_selection import ShuffleSplit
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from bilevel.sklearn import RidgeCV

SOURCES = {"blood": (10, 1.0), "survey": (30, 0.3), "images": (120, 0.0)}
"""Features of each source, and how large their coefficients are."""


def main(arguments: list[str] | None = None) -> None:
    """Run it; arguments of the command line are given in tests."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", nargs="?", default="runs/examples", type=Path, help="where the picture goes")
    parser.add_argument("--rows", default=200, type=int)
    parser.add_argument("--splits", default=5, type=int)
    options = parser.parse_args(arguments)
    rng = np.random.default_rng(0)
    groups = np.repeat(list(SOURCES), [count for count, _ in SOURCES.values()])
    coef = rng.standard_normal(len(groups)) * [SOURCES[source][1] for source in groups]
    X = rng.standard_normal((options.rows, len(groups)))
    y = X @ coef + 3.0 * rng.standard_normal(options.rows)
    theirs, ours, found = [], [], []
    for train, test in ShuffleSplit(options.splits, test_size=0.35, random_state=0).split(X):
        scaled = make_pipeline(StandardScaler(), linear_model.RidgeCV(np.logspace(-3, 5, 100)))
        model = RidgeCV(penalty_structure="group", groups=groups).fit(X[train], y[train])
        theirs.append(mean_squared_error(y[test], scaled.fit(X[train], y[train]).predict(X[test])))
        ours.append(mean_squared_error(y[test], model.predict(X[test])))
        found.append([model.penalties_[groups == source][0] for source in SOURCES])
        print(f"test error: scikit-learn {theirs[-1]:6.2f}   ours {ours[-1]:6.2f}   {model.tuning_report_.summary}")
    print(f"ours / scikit-learn, geometric mean: {np.exp(np.mean(np.log(ours) - np.log(theirs))):.3f}")

    figure, (left, right) = plt.subplots(1, 2, figsize=(8, 3.4), layout="constrained")
    left.plot(theirs, ours, "o")
    left.axline((theirs[0], theirs[0]), slope=1, color="k", lw=1, ls="--", label="equal")
    left.set(xlabel="test error, one penalty (scikit-learn)", ylabel="test error, one for each source")
    left.legend()
    right.plot(list(SOURCES), np.transpose(found), "o", color="C0")
    right.set(yscale="log", ylabel="penalty", title="the penalty of each source, by split")
    options.folder.mkdir(parents=True, exist_ok=True)
    figure.savefig(options.folder / "grouped.png", dpi=80)
    plt.close(figure)


if __name__ == "__main__":
    main()
