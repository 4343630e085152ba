"""The report of a fit, and its figures."""

import numpy as np
import pytest
from sklearn import linear_model
from sklearn.base import clone
from sklearn.metrics import make_scorer, r2_score
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from bilevel.criteria import Evidence, LinearData, Penalties
from bilevel.sklearn import (
    ElasticNetCV,
    LassoCV,
    LogisticRegressionCV,
    PenaltiesDisplay,
    RidgeCV,
    SampleWeights,
    TuningPathDisplay,
)

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
        "tau: how strongly the penalties of a line are held together; at a low tau each is free.",
        "30 tuned penalties generalise",
        "evaluations",
        "processor time",
    ):
        assert part in text
    assert repr(report) == text


def test_the_best_tuned_penalties_are_shown_where_one_penalty_is_better():
    noise, kept = np.random.default_rng(1).standard_normal((60, 3)), 0
    nets = ElasticNetCV(candidates=["ridge", "elastic_net"], alphas=5)
    for model in (RidgeCV(), RidgeCV(scoring="r2"), nets):
        for target in noise.T:
            model.fit(X[:60, :4], target)
            report, losses = model.tuning_report_, model.cv_results_["loss"]
            assert report.tuned_loss == losses[1:].min()
            assert report.gate == model.cv_results_["gate"][1 + losses[1:].argmin()]
            if not report.loss_name.startswith("minus"):
                assert report.gain == pytest.approx(1.0 - report.tuned_loss / report.one_penalty_loss)
            kept += report.tuned_loss > report.one_penalty_loss
    assert kept > 0
    alone = clone(nets).set_params(candidates=["elastic_net"]).fit(X[:60, :4], noise[:, 0]).tuning_report_
    assert np.isnan([alone.tuned_loss, alone.gain]).all()


def test_the_report_of_one_penalty_is_short():
    report = RidgeCV(penalty_structure="scalar").fit(X, y).tuning_report_
    assert report.honest == "none"
    assert not report.survived
    assert "tau" not in str(report)
    for model, name in (
        (RidgeCV(penalty_structure="scalar"), "alpha"),
        (LogisticRegressionCV(penalty_structure="scalar"), "C"),
    ):
        model.fit(X, y if name == "alpha" else y > 0, sample_weight=np.full(100, 3.0))
        value = model.alpha_ if name == "alpha" else model.C_
        assert model.tuning_report_.summary.startswith(f"One penalty, {name} = {value:.4g}, with criterion ")
    assert np.isnan(report.kappa)


def test_scores_are_named_and_have_no_percentage():
    model = RidgeCV(scoring="r2").fit(X[:, :8], y)
    report = model.tuning_report_
    assert report.loss_name == "minus r2"
    assert np.isnan(report.gain)
    text = str(report)
    assert "tuned by exact leave-one-out (mean squared error)" in text
    assert "held-out minus r2" in text
    assert f"r2 {-report.tuned_loss:.5g} against {-report.one_penalty_loss:.5g} on held-out rows" in text
    assert "smaller" not in text
    model.set_params(scoring=make_scorer(r2_score), guard="one_se").fit(X, y)
    assert model.tuning_report_.survived
    first = f"the score {model.best_score_:.5g} against {-model.cv_results_['loss'][0]:.5g} on held-out rows"
    assert first in model.tuning_report_.summary


def test_the_evidence_is_named_and_not_scaled():
    model = RidgeCV(criterion="evidence", penalty_structure="scalar").fit(X[:, :3], y)
    data = LinearData.of(X[:, :3], y)
    value = Evidence(data, Penalties.scalar(3)).evaluate(np.log([model.alpha_])).value
    assert -model.best_score_ == pytest.approx(value)
    assert "tuned by evidence (minus log evidence of a row)" in str(model.tuning_report_)
    guarded = RidgeCV(criterion="evidence").fit(X[:, :3], y)
    assert guarded.tuning_report_.loss_name == "mean squared error"
    assert 0.7 < guarded.cv_results_["loss"][-1] < 1.5


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


def test_scores_and_the_criterion_have_axes_of_their_own(pyplot):
    path = RidgeCV(scoring="r2").fit(X[:, :8], y).plot_path()
    held_out, criterion = path.lines_
    assert path.ax_.get_ylabel() == "minus r2"
    assert criterion.axes is not held_out[0].axes is path.ax_
    assert criterion.axes.get_ylabel() == "mean squared error"


def test_figures_without_an_outer_loop_and_of_classes(pyplot):
    model = LogisticRegressionCV(guard="off").fit(X[:, :5], y > 0)
    assert model.plot_path(color="red").ax_.get_ylabel() == "log loss"
    assert len(model.plot_penalties().points_) == 1


def test_figures_say_what_they_leave_out_and_have_no_line_of_what_is_not_there(pyplot):
    def legend(display):
        shown = display.ax_.get_legend()
        return [] if shown is None else [each.get_text() for each in shown.get_texts()]

    wide = rng.standard_normal((40, 35))
    scalar = RidgeCV(penalty_structure="scalar").fit(wide, wide[:, 0])
    assert scalar.plot_penalties().ax_.get_title() == "the 30 weakest penalties of 35"
    assert legend(scalar.plot_penalties()) == ["one penalty for all"]
    assert legend(scalar.plot_path()) == ["criterion, all rows", "chosen"]
    lasso = LassoCV(cv=2, alphas=5, candidates=["lasso"]).fit(X[:, :3], y)
    assert legend(lasso.plot_path()) == ["held-out rows", "chosen"]
    assert lasso.plot_penalties().ax_.get_title() == "lasso"
    assert legend(lasso.plot_penalties()) == []
    net = ElasticNetCV(cv=2, alphas=5, guard="off", stacking=False, candidates=["ridge", "elastic_net"]).fit(
        X[:, :3], y
    )
    chosen = net.plot_penalties().ax_.get_title()
    assert chosen in net.weights_
    assert legend(net.plot_penalties()) == (["one penalty for all"] if chosen == "ridge" else [])


def test_figures_take_the_last_step_of_a_pipeline_and_the_best_of_a_search(fitted, pyplot):
    pipe = make_pipeline(StandardScaler(), RidgeCV(penalty_structure="scalar"))
    search = GridSearchCV(pipe, {"ridgecv__fit_intercept": [True]}, cv=2)
    ours = [model.fit(X[:, :3], y) for model in (pipe, search)]
    others = (
        linear_model.Ridge(),
        make_pipeline(linear_model.Ridge()),
        SampleWeights(linear_model.Ridge(), guard="off"),
    )
    for display in (TuningPathDisplay, PenaltiesDisplay):
        assert all(isinstance(display.from_estimator(model), display) for model in ours)
        for other in others:
            with pytest.raises(ValueError, match="has no penalties that were tuned here: pass a fitted RidgeCV"):
                display.from_estimator(other.fit(X[:, :3], y))


def test_the_best_score_is_that_of_the_chosen_node():
    model = LogisticRegressionCV(guard="off").fit(X[:, :5], y > 0)
    assert model.best_score_ == -model.cv_results_["criterion"][-1]
    model = LogisticRegressionCV(scoring="accuracy").fit(X[:, :5], y > 0)
    assert model.best_score_ == -model.cv_results_["loss"][model.cv_results_["chosen"]][0]
    assert 0.6 < model.best_score_ <= 1.0


def test_figures_without_matplotlib_say_what_to_install(fitted, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)
    with pytest.raises(ImportError, match="figures need matplotlib: pip install 'bilevel"):
        fitted.plot_path()
