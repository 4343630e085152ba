"""Few of many features matter: one penalty for each feature, beside scikit-learn's one for all.

python scripts/examples/sparse.py [FOLDER] [--rows 240]
"""

import argparse
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from sklearn import linear_model
from sklearn.datasets import make_regression
from sklearn.metrics import mean_squared_error
from sklearn.model_selection import ShuffleSplit
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from bilevel.sklearn import RidgeCV


def main(arguments: list[str] | None = None) -> None:
    """Run it; arguments of the command line are given in tests."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", nargs="?", default="runs/examples", type=Path, help="where the picture goes")
    parser.add_argument("--rows", default=240, type=int)
    parser.add_argument("--splits", default=5, type=int)
    options = parser.parse_args(arguments)
    X, y, truth = make_regression(
        n_samples=options.rows, n_features=60, n_informative=6, noise=60.0, coef=True, random_state=0
    )
    theirs, ours = [], []
    for train, test in ShuffleSplit(options.splits, test_size=0.35, random_state=0).split(X):
        scaled = make_pipeline(StandardScaler(), linear_model.RidgeCV(np.logspace(-3, 5, 100)))
        model = RidgeCV().fit(X[train], y[train])
        theirs.append(mean_squared_error(y[test], scaled.fit(X[train], y[train]).predict(X[test])))
        ours.append(mean_squared_error(y[test], model.predict(X[test])))
        print(f"test error: scikit-learn {theirs[-1]:7.0f}   ours {ours[-1]:7.0f}   {model.tuning_report_.summary}")
    print(f"ours / scikit-learn, geometric mean: {np.exp(np.mean(np.log(ours) - np.log(theirs))):.3f}")

    figure, (left, right) = plt.subplots(1, 2, figsize=(8, 3.4), layout="constrained")
    model.plot_path(ax=left)
    left.set_title("losses from one penalty to 60")
    matters = truth != 0
    for which, label in ((matters, "features that matter"), (~matters, "all others")):
        right.plot(np.flatnonzero(which), model.penalties_[which], "o", ms=4, label=label)
    right.axhline(model.cv_results_["penalties"][0, 0], color="k", lw=1, ls="--", label="one penalty for all")
    right.set(yscale="log", xlabel="feature", ylabel="penalty", title="the tuned penalties")
    right.legend(fontsize="small")
    options.folder.mkdir(parents=True, exist_ok=True)
    figure.savefig(options.folder / "sparse.png", dpi=80)
    plt.close(figure)


if __name__ == "__main__":
    main()
