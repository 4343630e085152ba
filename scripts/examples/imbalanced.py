"""One row in fifteen is of the class that matters: class weights, and an outer loop that chooses by average precision.

python scripts/examples/imbalanced.py [FOLDER] [--rows 600]
"""

import argparse
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from sklearn import linear_model
from sklearn.datasets import make_classification
from sklearn.metrics import PrecisionRecallDisplay, average_precision_score
from sklearn.model_selection import StratifiedShuffleSplit
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from bilevel.sklearn import LogisticRegressionCV


def main(arguments: list[str] | None = None) -> None:
    """Run it; arguments of the command line are given in tests."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", nargs="?", default="runs/examples", type=Path, help="where the picture goes")
    parser.add_argument("--rows", default=600, type=int)
    parser.add_argument("--splits", default=3, type=int)
    options = parser.parse_args(arguments)
    X, y = make_classification(
        options.rows, 30, n_informative=5, n_redundant=0, weights=[14 / 15], class_sep=0.8, random_state=0
    )
    theirs, ours = [], []
    for train, test in StratifiedShuffleSplit(options.splits, test_size=0.35, random_state=0).split(X, y):
        asked = {"class_weight": "balanced", "scoring": "average_precision"}
        grid = linear_model.LogisticRegressionCV(l1_ratios=(0,), use_legacy_attributes=False, **asked)
        one = make_pipeline(StandardScaler(), grid).fit(X[train], y[train])
        model = LogisticRegressionCV(**asked).fit(X[train], y[train])
        for scores, each in ((theirs, one), (ours, model)):
            scores.append(average_precision_score(y[test], each.predict_proba(X[test])[:, 1]))
        print(
            f"average precision: scikit-learn {theirs[-1]:.3f}   ours {ours[-1]:.3f}   {model.tuning_report_.summary}"
        )
    print(f"mean: scikit-learn {np.mean(theirs):.3f}, ours {np.mean(ours):.3f}")

    figure, axes = plt.subplots(figsize=(5, 3.6), layout="constrained")
    for name, each in (("scikit-learn, one penalty", one), ("ours, a penalty for each feature", model)):
        PrecisionRecallDisplay.from_estimator(each, X[test], y[test], name=name, ax=axes)
    axes.set_title(f"the last split: {y[test].mean():.0%} of the rows are positive")
    axes.legend(fontsize="small")
    options.folder.mkdir(parents=True, exist_ok=True)
    figure.savefig(options.folder / "imbalanced.png", dpi=80)
    plt.close(figure)


if __name__ == "__main__":
    main()
