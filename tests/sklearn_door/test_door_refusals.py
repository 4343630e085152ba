"""What the estimators refuse or warn of: one sentence each, which names the parameter."""

from functools import partial
from typing import Any

import numpy as np
import pandas as pd
import pytest
from scipy import sparse
from sklearn.exceptions import ConvergenceWarning, NotFittedError
from sklearn.model_selection import GroupKFold, KFold, TimeSeriesSplit

import bilevel as bl
from bilevel.sklearn import ElasticNetCV, LassoCV, LogisticRegressionCV, RidgeCV, SampleWeights

rng = np.random.default_rng(0)
X = rng.standard_normal((40, 4))
y = X[:, 0] + rng.standard_normal(40)
LABELS = np.where(y > 0, "yes", "no")
THREE = np.array(["a", "b"] * 19 + ["c", "c"])
OPTIONS = [
    (RidgeCV(alphas=-1.0), "The 'alphas' parameter of RidgeCV"),
    (RidgeCV(alphas=[1.0, 0.0]), r"alphas\[1\] == 0.0, must be > 0"),
    (RidgeCV(alphas=[]), "alphas must hold at least one number, got none"),
    (RidgeCV(alphas=[1.0, np.inf]), r"alphas\[1\] == inf, must be finite"),
    (RidgeCV(cv=[(np.arange(41), np.arange(3))]), "Fold 1 of cv must hold indices of the 40 rows of X, or masks of"),
    (RidgeCV(cv=[(np.ones(30, bool), np.arange(3))]), r"Fold 1 of cv holds a mask of shape \(30,\), but X has 40 rows"),
    (
        RidgeCV(penalty_structure="group", groups=["a", None, "b", "b"]),
        "groups of features must be labels of one type without None: name every group",
    ),
    (RidgeCV(scoring="r2", honest="alo"), "scoring='r2' is of held-out folds, and honest='alo' has none"),
    (RidgeCV(device="foo"), "device='foo' is no device of torch here: give 'cpu', or None"),
    (RidgeCV(penalty_structure="each"), "The 'penalty_structure' parameter of RidgeCV must be a str among"),
    (RidgeCV(criterion="mse"), "The 'criterion' parameter of RidgeCV must be a str among"),
    (
        RidgeCV(criterion="r2"),
        "criterion='r2' is a scorer, and has no derivatives by the penalties: give it as scoring",
    ),
    (RidgeCV(guard=1), "The 'guard' parameter of RidgeCV must be a str among"),
    (RidgeCV(scoring="nice"), "The 'scoring' parameter of RidgeCV must be a str among"),
    (RidgeCV(cv=0), "The 'cv' parameter of RidgeCV must be an int"),
    (RidgeCV(cv=41), "cv=41 must be at least 2 and at most 40, the number of rows"),
    (RidgeCV(penalty_structure="group"), "penalty_structure='group' needs groups, the group of every feature"),
    (RidgeCV(groups=[0, 0, 1, 1]), "penalty_structure='feature' takes no groups: say 'group'"),
    (
        RidgeCV(penalty_structure="group", groups=[0, 0, 1]),
        "groups must hold one label for each of the 4 features of X, got 3 entries",
    ),
    (
        RidgeCV(penalty_structure="group", groups=[[0, 1], [2, 3], [0, 1], [2, 3]]),
        "groups must hold one label for each of the 4 features of X",
    ),
    (
        RidgeCV(penalty_structure="group", groups=[0, 0, 1, 1], alpha_per_target=True),
        "alpha_per_target=True takes no penalty_structure='group'",
    ),
    (RidgeCV(criterion="loo", cv=TimeSeriesSplit(3)), "criterion='loo' .* cv=TimeSeriesSplit.* ordered"),
]
CLASSES = [
    (LogisticRegressionCV(Cs=0), "The 'Cs' parameter of LogisticRegressionCV"),
    (LogisticRegressionCV(candidates=["elastic_net"]), "beside an elastic net: give l1_ratios"),
    (LogisticRegressionCV(l1_ratios=[0.0, 0.5], candidates=["elastic_net"]), "no penalty makes .* zero: give Cs"),
    (LogisticRegressionCV(l1_ratios=[0.5], candidates=["ridge"]), "candidates must be of .* with 'elastic_net' among"),
    (LogisticRegressionCV(Cs=[]), "Cs must hold at least one number, got none"),
    (LogisticRegressionCV(Cs=[1.0, np.nan]), r"Cs\[1\] == nan, must be finite"),
    (LogisticRegressionCV(penalty="l3"), "The 'penalty' parameter of LogisticRegressionCV"),
    (LogisticRegressionCV(penalty="l1", l1_ratios=[0.5]), "penalty='l1' is not that of l1_ratios"),
    (LogisticRegressionCV(penalty="elasticnet"), "penalty='elasticnet' needs l1_ratios"),
    (LogisticRegressionCV(l1_ratios=[0.5, 2.0]), r"l1_ratios\[1\] == 2.0, must be <= 1.0"),
    (LogisticRegressionCV(l1_ratios=[0.5], penalty_structure="class"), "penalty_structure='class' is of squares"),
    (LogisticRegressionCV(l1_ratios=[0.5], honest="alo"), "judged by held-out folds: leave honest='alo' out"),
    (LogisticRegressionCV(refit=False), "The 'refit' parameter of LogisticRegressionCV"),
    (
        LogisticRegressionCV(class_weight={"maybe": 2.0}),
        "The given class_weight dict must have the class labels as keys",
    ),
    (LogisticRegressionCV(criterion="accuracy"), "criterion='accuracy' is a scorer"),
    (
        LogisticRegressionCV(cv=[(np.flatnonzero(y > 0), np.flatnonzero(y < 0))]),
        "Fold 1 of cv trains on no row of class no",
    ),
]


@pytest.mark.parametrize(("estimator", "sentence"), OPTIONS, ids=lambda value: str(value)[:40])
def test_options_of_ridge(estimator, sentence):
    with pytest.raises(ValueError, match=sentence):
        estimator.fit(X, y)


@pytest.mark.parametrize(("estimator", "sentence"), CLASSES, ids=lambda value: str(value)[:40])
def test_options_of_logistic_regression(estimator, sentence):
    with pytest.raises(ValueError, match=sentence):
        estimator.fit(X, LABELS)


@pytest.mark.parametrize("criterion", ["loo", "alo"])
def test_single_rows_are_not_left_out_of_groups(criterion):
    estimator = RidgeCV(criterion="loo") if criterion == "loo" else LogisticRegressionCV(criterion="alo")
    with pytest.raises(ValueError, match=f"criterion='{criterion}' leaves out single rows, but .* grouped"):
        estimator.fit(X, LABELS if criterion == "alo" else y, groups=np.arange(40) // 4)
    with pytest.raises(ValueError, match=f"criterion='{criterion}' leaves out single rows, but .* grouped"):
        estimator.set_params(cv=GroupKFold(3)).fit(X, LABELS if criterion == "alo" else y, groups=np.arange(40) // 4)


def test_data_are_refused_as_by_scikit_learn():
    model = RidgeCV(penalty_structure="scalar")
    with pytest.raises(NotFittedError):
        model.predict(X)
    with pytest.raises(ValueError, match="Input X contains NaN"):
        model.fit(np.where(X > 2, np.nan, X), y)
    with pytest.raises(ValueError, match="inconsistent numbers of samples"):
        model.fit(X, y[:-1])
    with pytest.raises(ValueError, match="Negative values in data passed to `sample_weight`"):
        model.fit(X, y, sample_weight=np.r_[-1.0, np.ones(39)])
    with pytest.raises(ValueError, match="Sample weights must contain at least one non-zero number"):
        model.fit(X, y, sample_weight=np.zeros(40))
    with pytest.raises(ValueError, match=r"RidgeCV.fit takes \['nonsense'\] with sklearn.set_config"):
        model.fit(X, y, nonsense=1)
    with pytest.raises(ValueError, match="groups of rows must be labels of one type without None"):
        model.fit(X, y, groups=["a", None] * 20)
    model.fit(X, y)
    with pytest.raises(ValueError, match="X has 3 features, but RidgeCV is expecting 4 features"):
        model.predict(X[:, :3])


DAYS = pd.date_range("2020-01-01", periods=40)
NO_NUMBERS = [
    (DAYS, "holds times: turn them into numbers, such as days, or leave them out"),
    (DAYS.tz_localize("UTC"), "holds times"),
    (DAYS - DAYS[0], "holds times"),
    (DAYS.to_period("D"), r"holds Period\('2020-01-01', 'D'\) in row 0 \(counted from 0\), which is no number"),
    ([each.date() for each in DAYS], r"holds datetime.date\(2020, 1, 1\) in row 0"),
    (pd.Categorical(["x", "y"] * 20), "holds 'x' in row 0"),
    (
        [1, "x"] * 20,
        r"holds 'x' in row 1 \(counted from 0\), which is no number: turn it into numbers, or leave it out",
    ),
    (pd.array([None, "y"] * 20, dtype="string"), "holds 'y' in row 1"),
    ([[1, 2]] * 40, r"holds \[1, 2\] in row 0"),
]


@pytest.mark.parametrize("model", [RidgeCV(), LogisticRegressionCV(), ElasticNetCV(), SampleWeights(RidgeCV())])
def test_columns_of_frames_without_numbers_are_named_in_one_sentence(model):
    target = LABELS if isinstance(model, LogisticRegressionCV) else y
    for column, said in NO_NUMBERS:
        with pytest.raises(ValueError, match=f"^the column 'bad' of X {said}"):
            model.fit(pd.DataFrame({"good": y, "bad": column}), target)
        if target is y:
            wanted = said.replace("leave it out", "use LogisticRegressionCV for classes")
            with pytest.raises(ValueError, match=f"^y {wanted}"):
                model.fit(X, pd.Series(column))


def test_nullable_numbers_are_numbers_and_what_is_missing_is_named():
    for column in (pd.array([1, 2] * 20, dtype="Int64"), pd.array([True, False] * 20, dtype="boolean")):
        frame = pd.DataFrame({"good": y, "other": column})
        plain = RidgeCV().fit(frame.astype(float), y).coef_
        assert RidgeCV().fit(frame, y).coef_.tolist() == plain.tolist()
        frame.loc[3, "other"] = pd.NA
        with pytest.raises(ValueError, match="Input X contains NaN"):
            RidgeCV().fit(frame, y)


def test_sentences_name_no_parameter_that_was_not_given():
    for model, target in ((RidgeCV(), y), (LogisticRegressionCV(), LABELS), (ElasticNetCV(), y)):
        with pytest.raises(
            ValueError, match=r"^groups of rows hold one group only, and folds hold out whole groups: name"
        ):
            model.fit(X, target, groups=np.zeros(40))
        with pytest.raises(ValueError, match="cv=3 must be at least 2 and at most 1, the number of groups of rows"):
            model.set_params(cv=3).fit(X, target, groups=np.zeros(40))
    with pytest.raises(ValueError, match="leaves out single rows, but groups say that rows are grouped"):
        RidgeCV(criterion="loo").fit(X, y, groups=np.arange(40) // 4)


def test_a_scorer_that_is_none_has_the_names_that_are_close():
    for given, close in (
        ("mse", "neg_mean_squared_error"),
        ("auc", "roc_auc"),
        ("log_loss", "neg_log_loss"),
        ("acuracy", "accuracy"),
    ):
        with pytest.raises(ValueError, match=f"Got '{given}' instead: close are .*{close}"):
            RidgeCV(scoring=given).fit(X, y)
    with pytest.raises(ValueError, match=r"Got 'nice' instead\."):
        RidgeCV(scoring="nice").fit(X, y)


def test_weights_of_a_regression_say_which_estimator_to_give():
    for target in (y, y.astype(np.float32)):
        with pytest.raises(ValueError, match=r"Without an estimator SampleWeights takes classes: give .*RidgeCV\(\)"):
            SampleWeights().fit(X, target)


def test_classes_need_rows():
    model = LogisticRegressionCV(penalty_structure="scalar")
    with pytest.raises(ValueError, match="the data contain only one class: yes"):
        model.fit(X, np.full(40, "yes"))
    with pytest.raises(ValueError, match="the data contain only one class: yes"):
        model.fit(X, LABELS, sample_weight=LABELS == "yes")
    with pytest.raises(ValueError, match="All rows of class c have weight zero: leave them out"):
        model.fit(X, THREE, sample_weight=THREE != "c")
    with pytest.raises(ValueError, match=r"^folds can hold out no row: every class of y has so few"):
        LogisticRegressionCV().fit(X[:6], list("aabbcc"))
    with pytest.raises(ValueError, match="Unknown label type"):
        model.fit(X, y)
    with pytest.raises(
        ValueError, match="Fold 2 of cv trains on no row of class c: use StratifiedKFold, or fewer folds"
    ):
        model.set_params(cv=KFold(2)).fit(X, THREE)


def test_a_class_of_one_row_is_trained_on():
    labels = np.where(np.arange(40) == 7, "rare", LABELS)
    model = LogisticRegressionCV(penalty_structure="scalar").fit(X, labels)
    assert model.classes_.tolist() == ["no", "rare", "yes"]
    assert np.isfinite(model.coef_).all()


def test_more_penalties_than_rows_without_a_guard_are_warned_of():
    wide = np.random.default_rng(1).standard_normal((12, 20))
    with pytest.warns(bl.BilevelWarning, match="20 penalties were tuned on 12 rows without an outer loop"):
        RidgeCV(guard="off").fit(wide, wide[:, 0])


def test_a_row_that_makes_most_of_the_criterion_is_named():
    spoiled = y.copy()
    spoiled[17] = 1e3
    with pytest.warns(bl.BilevelWarning, match=r"row 17 \(counted from 0\) alone makes 9.% of the criterion"):
        RidgeCV(penalty_structure="scalar").fit(X, spoiled)


ONE = np.where(np.arange(100) == 7, 4.0, 3.0)


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("estimator", [RidgeCV(), LassoCV(), ElasticNetCV(alphas=8)], ids=["ridge", "lasso", "net"])
def test_a_target_that_is_constant_but_for_one_row_opens_no_gate(estimator, seed):
    table = np.random.default_rng(seed).standard_normal((100, 20))
    with pytest.warns(bl.BilevelWarning, match=r"row 7 \(counted from 0\) alone makes 9.% of the"):
        report = estimator.fit(table, ONE).tuning_report_
    assert not report.survived
    assert " is kept" in report.summary


@pytest.mark.parametrize("options", [{}, {"l1_ratios": [1.0], "penalty_structure": "scalar"}], ids=["ridge", "net"])
def test_a_wrong_label_among_separated_classes_opens_no_gate(options):
    table = np.random.default_rng(0).standard_normal((100, 8))
    labels = table[:, 0] > 0
    table[:, 0] += 4.0 * np.sign(table[:, 0])
    labels[7] = ~labels[7]
    with pytest.warns(bl.BilevelWarning, match=r"row 7 \(counted from 0\) alone makes [5-9].% of the"):
        report = LogisticRegressionCV(**options).fit(table, labels).tuning_report_
    assert not report.survived


@pytest.mark.parametrize("classes", [2, 3])
def test_columns_that_are_all_constant_leave_the_shares_of_the_classes(classes):
    model = LogisticRegressionCV().fit(np.ones((90, 2)), np.arange(90) % classes)
    np.testing.assert_array_equal(model.coef_, 0.0)
    np.testing.assert_allclose(model.predict_proba(np.ones((1, 2))), 1 / classes, rtol=1e-6)


def test_a_search_that_was_cut_short_says_what_to_do():
    many = np.random.default_rng(1).standard_normal((120, 30))
    with pytest.warns(ConvergenceWarning, match="used up its steps .max_iter=1.: raise max_iter, or tol, which is 0"):
        RidgeCV(guard="off", max_iter=1).fit(many, many[:, 0] + rng.standard_normal(120))


def test_a_proof_is_of_one_target():
    with pytest.raises(
        ValueError, match="certify_range takes leave-one-out or K-fold of ridge regression with one target"
    ):
        RidgeCV(penalty_structure="scalar", certify=True).fit(X, X[:, :2])


def test_a_score_without_an_outer_loop_has_no_say():
    with pytest.warns(UserWarning, match="scoring='r2' has no say without an outer loop: the mean squared error alone"):
        RidgeCV(penalty_structure="scalar", scoring="r2").fit(X, y)


def test_folds_that_are_too_few_for_an_outer_loop_leave_one_penalty():
    with pytest.warns(
        bl.BilevelWarning, match="cv=TimeSeriesSplit.*too few for an outer loop, so one penalty was tuned"
    ):
        model = RidgeCV(cv=TimeSeriesSplit(2)).fit(X, y)
    assert isinstance(model.alpha_, float)
    assert "too few for an outer loop" in str(model.tuning_report_)


@pytest.mark.filterwarnings("ignore:Only one class:sklearn.exceptions.UndefinedMetricWarning")
def test_folds_without_a_score_are_warned_of():
    held = [np.flatnonzero(y > 0)[:3], np.arange(20, 30), np.arange(30, 40)]
    cv = [(np.setdiff1d(np.arange(40), part), part) for part in held]
    with pytest.warns(bl.BilevelWarning, match="scoring='roc_auc' is not finite on fold 1 of the outer loop, so one"):
        model = LogisticRegressionCV(criterion="alo", scoring="roc_auc", cv=cv).fit(X[:, :2], LABELS)
    assert isinstance(model.C_, float)
    assert "One penalty is kept: roc_auc is not finite on all held-out folds." in str(model.tuning_report_)


def test_parameters_that_were_valid_once_are_checked_anew_where_they_differ() -> None:
    X, y = np.random.default_rng(0).standard_normal((20, 2)), np.arange(20.0)
    model = RidgeCV(penalty_structure="scalar", tol=1.0).fit(X, y)
    assert model.fit(X, y).tol == 1.0
    for name, bad in (("tol", -1.0), ("max_iter", 0), ("fit_intercept", 1), ("alphas", [-1.0])):
        with pytest.raises(ValueError, match=name):
            RidgeCV(penalty_structure="scalar", tol=1.0).set_params(**{name: bad}).fit(X, y)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("size", [1e200, 1e-200])
@pytest.mark.parametrize(
    "form", [np.asarray, sparse.csr_array, partial(pd.DataFrame, columns=["x0", "x1", "x2", "x3"])]
)
def test_numbers_whose_squares_are_none_are_refused_by_their_column(size: float, form: Any) -> None:
    odd = np.concatenate([X[:, :3], size * X[:, 3:]], axis=1) if size > 1 else size * X
    named = repr("x3" if size > 1 else "x0") if form not in (np.asarray, sparse.csr_array) else r"\d"
    for model in (RidgeCV(), ElasticNetCV(), LogisticRegressionCV(), SampleWeights(RidgeCV())):
        targets = LABELS if isinstance(model, LogisticRegressionCV) else y
        with pytest.raises(
            ValueError, match=rf"the column {named} of X holds numbers up to .*: write it in another unit"
        ):
            model.fit(form(odd), targets)
        if targets is y:
            with pytest.raises(
                ValueError, match=r"^y holds numbers up to .*e[+-]\d*, whose squares leave the range of"
            ):
                model.fit(form(X), size * y)


@pytest.mark.parametrize("model", [RidgeCV(), RidgeCV(criterion="kfold"), ElasticNetCV(), LassoCV()])
def test_two_rows_have_one_penalty(model: Any) -> None:
    for features in (X, X[:, :2]):
        assert np.isfinite(model.fit(features[:2], y[:2]).predict(features)).all()


def test_a_tiny_column_among_others_and_zeros_are_fitted() -> None:
    odd = np.concatenate([X[:, :3], 1e-200 * X[:, 3:]], axis=1)
    assert np.isfinite(RidgeCV(guard="off").fit(odd, y).coef_).all()
    assert not RidgeCV(guard="off").fit(0 * X, y).coef_.any()
