"""Penalties below what floating point carries: criteria are right, or say that they are not, by 80 digits."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from criteria_cases import penalty_cases
from paths import study

from bilevel.core.status import BilevelWarning
from bilevel.criteria import (
    ApproximateLeaveOneOut,
    Criterion,
    KFold,
    LinearData,
    Penalties,
    RidgeLeaveOneOut,
    newton_cg,
)
from bilevel.criteria import approximate as module
from bilevel.problems import Logistic, Poisson, Squared
from bilevel.selection.descend import tune


def test_criteria_are_right_where_they_say_nothing() -> None:
    weak = study("weak_penalties")
    for seed in (12, 180, 288, 86, 98, 100, 144):  # leave-one-out of wide rows was wrong
        case = weak.draw(seed)
        status, off = weak.judged(case, weak.Truth(case).both)
        assert (status, off <= 1e-6) == ("silent", True), seed
    for seed in (37, 57, 99, 107, 119, 269, 298):
        assert weak.answer(weak.draw(seed))[0] == "doubt", seed
    assert weak.answer(weak.draw(2058))[0] == "refused"  # a fold of zero counts


def test_a_fold_that_trains_on_zero_counts_alone_is_refused() -> None:
    rng = np.random.default_rng(0)
    data = LinearData.of(rng.standard_normal((8, 2)), np.r_[1.0:5.0, np.zeros(4)], loss=Poisson())
    folds = [(range(3, 8), range(3)), (range(4, 8), range(4))]
    with pytest.raises(ValueError, match="fold 2 has no model: all targets of its training rows are 0, so that"):
        KFold(data, Poisson(), Penalties.scalar(2), folds)
    assert KFold(replace(data, intercept=False), Poisson(), Penalties.scalar(2), folds).folds


@pytest.mark.parametrize("outputs", [None, 2])
def test_leave_one_out_of_wide_rows_has_the_limit_of_no_penalty(outputs: int | None) -> None:
    rng = np.random.default_rng(0)
    X, y = rng.standard_normal((9, 20)), rng.standard_normal((9, outputs) if outputs else 9)
    for weights in (None, np.r_[0.0, np.ones(8)], rng.uniform(0.5, 2.0, 9)):
        data = LinearData.of(X, y, weights)
        for penalties in penalty_cases(20, outputs)[int(weights is not None and weights.min() == 0) : 2]:
            criterion, size = RidgeLeaveOneOut(data, penalties), penalties.size
            weak, weaker = (criterion.evaluate(np.full(size, u)).losses for u in (-18.0, -40.0))
            np.testing.assert_allclose(weaker, weak, rtol=1e-6, atol=1e-12)


def test_one_infinite_value_of_a_scan_says_so_and_leaves_the_others() -> None:
    rng = np.random.default_rng(0)
    X = rng.standard_normal((8, 3)) @ rng.standard_normal((3, 20))
    criterion = RidgeLeaveOneOut(LinearData.of(X, rng.standard_normal(8)), Penalties.scalar(20))
    with pytest.warns(BilevelWarning, match=r"models at a log penalty of -40 were not found, so that the criterion"):
        found = criterion.scan(np.array([[0.0], [-40.0]]))
    assert np.isfinite(found[0].value)
    assert np.isinf(found[1].value)
    with pytest.warns(BilevelWarning, match="were not found"):  # what was judged does not mix with other penalties
        criterion.with_penalties(Penalties.feature(20)).evaluate(np.full(20, -30.0))


def test_approximate_leave_one_out_of_many_rows_is_right_where_float32_loses_penalties(monkeypatch) -> None:
    rng = np.random.default_rng(0)
    X = rng.standard_normal((400, 3))
    y = np.where(X[:, 0] + rng.standard_normal(400) > 0, 1.0, -1.0)
    data, u = LinearData.of(X, y, loss=Logistic()), np.array([-12.0])
    exact = ApproximateLeaveOneOut(data, Logistic(), Penalties.scalar(3)).evaluate(u)
    monkeypatch.setattr(module, "LARGE", 1)
    found = ApproximateLeaveOneOut(data, Logistic(), Penalties.scalar(3)).evaluate(u)
    assert newton_cg.solve(*_system(data), None, 1e-8).left == np.inf
    assert found.value == pytest.approx(exact.value, rel=1e-9)
    np.testing.assert_allclose(found.gradient, exact.gradient, rtol=1e-5)


def _system(data: LinearData) -> tuple[newton_cg.System, torch.Tensor, torch.Tensor]:
    a = torch.tensor([[np.exp(-12.0)] * 3 + [0.0]], dtype=torch.float64)
    return newton_cg.System(data, Logistic(), data.weights[None]), a, torch.zeros_like(a)


@pytest.mark.parametrize("u", [-34.0, -38.0, -42.0])
@pytest.mark.parametrize("shared", [True, False])
def test_models_whose_inverse_is_lost_in_rounding_are_not_found(u: float, shared: bool) -> None:
    for seed in range(3):
        rng = np.random.default_rng(seed)
        X = rng.standard_normal((20, 60))
        penalties = Penalties.scalar(60) if shared else Penalties.feature(60)
        at, rows = np.full(penalties.size, u), np.arange(20)
        data = LinearData.of(X, X[:, 0] + rng.standard_normal(20))
        folds = KFold(data, Squared(), penalties, [(rows[::2], rows[1::2]), (rows[1::2], rows[::2])])
        for criterion in (ApproximateLeaveOneOut(data, Squared(), penalties), folds):
            # Two that are lost in the same way agree, so that it is their own word that counts.
            assert np.isinf(criterion.compute(at, second=False).value)
            for act in (criterion.evaluate, criterion.refit):
                with pytest.warns(BilevelWarning, match="were not found"):
                    act(at)


class Own(Criterion):
    """The least that a criterion of one's own gives, but for its numbers."""

    def refit(self, u: Any, warm: Any = None) -> Any:
        return RidgeLeaveOneOut(self.data, self.penalties).refit(u)

    def take(self, rows: Any) -> Any:
        return type(self)(self.data.take(rows), self.loss, self.penalties)


class Computed(Own):
    def compute(self, u: Any, warm: Any = None, *, second: bool = True, full: bool = False) -> Any:
        return RidgeLeaveOneOut(self.data, self.penalties).compute(u, second=second)


class Evaluated(Own):
    def evaluate(self, u: Any, warm: Any = None, *, second: bool = True, full: bool = False) -> Any:
        return RidgeLeaveOneOut(self.data, self.penalties).compute(u, second=second)


def test_a_criterion_of_ones_own_computes_what_is_judged_or_evaluates_itself() -> None:
    rng = np.random.default_rng(0)
    data = LinearData.of(rng.standard_normal((8, 3)) @ rng.standard_normal((3, 20)), rng.standard_normal(8))
    parts, weak = (data, Squared(), Penalties.scalar(20)), np.array([-40.0])
    expected = RidgeLeaveOneOut(data, parts[2]).evaluate(np.zeros(1)).value
    for kind in (Computed, Evaluated):
        assert kind(*parts).evaluate(np.zeros(1)).value == expected
        assert tune(kind(*parts), np.zeros(1)).evaluation.value < expected
    with pytest.warns(BilevelWarning, match="were not found"):
        assert np.isinf(Computed(*parts).evaluate(weak).value)
    assert np.isfinite(Evaluated(*parts).evaluate(weak).value)
    with pytest.raises(NotImplementedError, match=r"Own has to define compute\(u, warm, \*, second, full\)"):
        Own(*parts).evaluate(weak)


@pytest.mark.parametrize("features", [7, 8])
def test_a_factor_of_strong_penalties_does_not_serve_weak_ones(features: int) -> None:
    rng = np.random.default_rng(3)
    data = LinearData.of(rng.normal(size=(8, features)), rng.normal(size=8))
    criterion = ApproximateLeaveOneOut(data, Squared(), Penalties.feature(features))
    warm = criterion.evaluate(np.full(features, -1.0)).warm
    ours = criterion.compute(np.full(features, -26.0), warm)
    exact = RidgeLeaveOneOut(data, Penalties.feature(features)).compute(np.full(features, -26.0))
    assert ours.value == pytest.approx(exact.value, rel=5e-3)
