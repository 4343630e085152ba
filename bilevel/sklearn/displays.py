"""Figures of a tuned estimator, as scikit-learn's Displays: made by `from_estimator`, drawn by `plot`."""

from __future__ import annotations

from typing import Any, Self

import numpy as np
from numpy.typing import NDArray
from sklearn.pipeline import Pipeline
from sklearn.utils.validation import check_is_fitted

from bilevel.core.figures import COLOURS
from bilevel.sklearn.report import TuningReport, labels_of

MOST = 30
"""Features that a figure names."""


def _axes(ax: Any) -> Any:
    """Return the axes to draw into; None for new ones.

    Raises:
        ImportError: without matplotlib.
    """
    try:
        from matplotlib import pyplot
    except ImportError:
        raise ImportError("figures need matplotlib: pip install 'bilevel[plot]'.") from None
    return pyplot.subplots(layout="constrained")[1] if ax is None else ax


def _fitted(estimator: Any) -> Any:
    """Return an estimator that is fitted, of a pipeline the last step, of a search the best one.

    Raises:
        ValueError: for one that has tuned nothing here.
    """
    check_is_fitted(estimator)
    while isinstance(estimator, Pipeline) or hasattr(estimator, "best_estimator_"):
        estimator = estimator[-1] if isinstance(estimator, Pipeline) else estimator.best_estimator_
    if not isinstance(getattr(estimator, "tuning_report_", None), TuningReport):
        raise ValueError(
            f"{type(estimator).__name__} has no penalties that were tuned here: pass a fitted RidgeCV, "
            "LogisticRegressionCV, ElasticNetCV or LassoCV of bilevel.sklearn."
        )
    return estimator


class TuningPathDisplay:
    """The losses of the nodes of a path, from one penalty for all to freely tuned ones.

    Bars are one standard error of the gain over one penalty. Where the criterion falls and the loss of held-out rows
    does not, tuning over-fits the criterion.

    Args:
        labels: of the nodes: weights of the hyperprior, or names of candidates.
        loss: of held-out rows, (nodes,); NaN without an outer loop.
        gain_error: standard errors of the gains over one penalty, (nodes,).
        criterion: its values on all rows, (nodes,); NaN for candidates without.
        chosen: the index of the node that was taken.
        loss_name: what the losses are.
        criterion_name: what values of the criterion are; where it is not the loss they have an axis of their own.

    Attributes:
        ax_: the axes.
        figure_: the figure.
        lines_: losses of held-out rows, and values of the criterion.
    """

    def __init__(
        self,
        *,
        labels: list[str],
        loss: NDArray[np.float64],
        gain_error: NDArray[np.float64],
        criterion: NDArray[np.float64],
        chosen: int,
        loss_name: str,
        criterion_name: str,
    ) -> None:
        self.labels, self.loss, self.gain_error, self.criterion = labels, loss, gain_error, criterion
        self.chosen, self.loss_name, self.criterion_name = chosen, loss_name, criterion_name

    @classmethod
    def from_estimator(cls, estimator: Any, *, ax: Any = None, **kwargs: Any) -> Self:
        """Return the drawn display of a fitted estimator, or of a pipeline or a search that ends in one."""
        estimator = _fitted(estimator)
        results = estimator.tuning_report_.nodes
        display = cls(
            labels=labels_of(results),
            loss=results["loss"],
            gain_error=results["gain_error"],
            criterion=results["criterion"],
            chosen=int(np.flatnonzero(results["chosen"])[0]),
            loss_name=estimator.tuning_report_.loss_name,
            criterion_name=estimator.tuning_report_.criterion_name,
        )
        return display.plot(ax=ax, **kwargs)

    def plot(self, ax: Any = None, **kwargs: Any) -> Self:
        """Return self, drawn into matplotlib's axes or new ones, with options of its errorbar."""
        ax = _axes(ax)
        at = np.arange(len(self.labels))
        style = {"color": COLOURS[0], "marker": "o", "capsize": 3, "label": "held-out rows"} | kwargs
        held_out = ax.errorbar(at, self.loss, yerr=np.nan_to_num(self.gain_error), **style)
        other = ax if self.criterion_name == self.loss_name else ax.twinx()
        (fitted,) = other.plot(at, self.criterion, color=COLOURS[1], linestyle="--", label="criterion, all rows")
        known = np.isfinite(self.loss[self.chosen])
        shown, its = (self.loss, ax) if known else (self.criterion, other)
        (mark,) = its.plot(self.chosen, shown[self.chosen], "o", ms=12, mfc="none", color=COLOURS[6], label="chosen")
        ax.set_xticks(at, self.labels, rotation=30 if len(at) > 4 else 0)
        ax.set(ylabel=self.loss_name)
        if other is not ax:
            other.set_ylabel(self.criterion_name)
        drawn = [(held_out, self.loss), (fitted, self.criterion)]
        ax.legend(handles=[*(line for line, values in drawn if np.isfinite(values).any()), mark])
        self.ax_, self.figure_, self.lines_ = ax, ax.figure, [held_out, fitted]
        return self


class PenaltiesDisplay:
    """The penalty of each feature, beside the best one for all: a strong one takes a feature out.

    Args:
        penalties: (features,), or (outputs, features).
        one_penalty: the best one for all; None where penalties are of another kind.
        feature_names: (features,).
        model: whose penalties these are, where that has a name.

    Attributes:
        ax_: the axes.
        figure_: the figure.
        points_: a matplotlib line for each output.
    """

    def __init__(
        self,
        *,
        penalties: NDArray[np.float64],
        one_penalty: float | None,
        feature_names: NDArray[np.object_],
        model: str = "",
    ) -> None:
        self.penalties, self.one_penalty, self.feature_names = penalties, one_penalty, feature_names
        self.model = model

    @classmethod
    def from_estimator(cls, estimator: Any, *, ax: Any = None, **kwargs: Any) -> Self:
        """Return the drawn display of a fitted estimator, or of a pipeline or a search that ends in one."""
        estimator = _fitted(estimator)
        names, results = getattr(estimator, "feature_names_in_", None), estimator.tuning_report_.nodes
        model = str(results["candidate"][results["chosen"]][0]) if "candidate" in results else ""
        # Penalties of squares and of absolute values have no common scale.
        comparable = not model or (model.startswith("ridge") and results["candidate"][0] == "ridge")
        display = cls(
            penalties=estimator.penalties_,
            one_penalty=float(results["penalties"][0].mean()) if comparable else None,
            feature_names=np.arange(estimator.n_features_in_).astype(object) if names is None else names,
            model=model,
        )
        return display.plot(ax=ax, **kwargs)

    def plot(self, ax: Any = None, **kwargs: Any) -> Self:
        """Return self, drawn with options of matplotlib's plot: the weakest penalties on top, of many only these."""
        ax = _axes(ax)
        penalties = np.atleast_2d(self.penalties)
        order = np.argsort(np.log(penalties).mean(0), kind="stable")[:MOST]
        at = np.arange(len(order))[::-1]
        style = {"linestyle": "none", "marker": "o"} | kwargs
        self.points_ = [ax.plot(each[order], at, **style)[0] for each in penalties]
        if self.one_penalty is not None:
            ax.axvline(self.one_penalty, color=COLOURS[6], linestyle="--", linewidth=1, label="one penalty for all")
            ax.legend()
        ax.set_xscale("log")
        ax.set_yticks(at, [str(self.feature_names[each]) for each in order])
        count = penalties.shape[1]
        titles = [self.model, f"the {len(order)} weakest penalties of {count}" if count > len(order) else ""]
        ax.set(xlabel="penalty", title=", ".join(filter(None, titles)))
        self.ax_, self.figure_ = ax, ax.figure
        return self
