"""The report of a fit, and its figures."""

import numpy as np
import pytest

from bilevel.sklearn import LogisticRegressionCV, PenaltiesDisplay, RidgeCV, TuningPathDisplay

rng = np.random.default_rng(0)
X = rng.standard_normal((100, 30))
y = X[:, :3] @ [2.0, -2.0, 2.0] + rng.standard_normal(100)


@pytest.fixture(scope="module")
def fitted():
    return RidgeCV().fit(X, y)


def test_the_report_says_what_was_gained_whether_it_survived_and_what_it_cost(fitted):
    report = fitted.tuning_report_
    assert report.survived
    assert report.gain == pytest.approx(1.0 - report.tuned_loss / report.one_penalty_loss)
    assert report.gate > report.kappa == 1.0
    text = str(report)
    assert text.startswith("RidgeCV: 30 penalties, tuned by ")
    for part in (
        "one penalty",
        "tau 0.03",
        "<- chosen",
        "30 tuned penalties generalise",
        "evaluations",
        "processor time",
    ):
        assert part in text
    assert repr(report) == text


def test_the_report_of_one_penalty_is_short():
    report = RidgeCV(penalty_structure="scalar").fit(X, y).tuning_report_
    assert report.honest == "none"
    assert not report.survived
    assert "tau" not in str(report)
    assert np.isnan(report.kappa)


@pytest.fixture
def pyplot():
    pyplot = pytest.importorskip("matplotlib.pyplot")
    pyplot.switch_backend("agg")
    yield pyplot
    pyplot.close("all")


def test_figures_are_displays(fitted, pyplot):
    path = TuningPathDisplay.from_estimator(fitted)
    assert path.ax_.get_ylabel() == "mean squared error"
    assert len(path.ax_.get_xticklabels()) == len(fitted.cv_results_["tau"])
    assert path.figure_ is path.ax_.figure
    penalties = fitted.plot_penalties(ax=path.ax_.figure.add_subplot())
    assert isinstance(penalties, PenaltiesDisplay)
    assert sorted(penalties.points_[0].get_xdata()) == pytest.approx(sorted(fitted.penalties_))
    # Strongest effects, with the weakest penalties, stand on top.
    assert {label.get_text() for label in penalties.ax_.get_yticklabels()[:3]} == {"0", "1", "2"}


def test_figures_without_an_outer_loop_and_of_classes(pyplot):
    model = LogisticRegressionCV(guard="off").fit(X[:, :5], y > 0)
    assert model.plot_path(color="red").ax_.get_ylabel() == "log loss"
    assert len(model.plot_penalties().points_) == 1


def test_figures_without_matplotlib_say_what_to_install(fitted, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)
    with pytest.raises(ImportError, match="figures need matplotlib: pip install 'bilevel"):
        fitted.plot_path()
