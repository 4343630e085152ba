"""Tuned penalties that are kept only where held-out rows speak for them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from selection_cases import ridge, table

import bilevel as bl
from bilevel.criteria import Criterion, Evidence, KFold, LinearData, Penalties, RidgeFolds, RidgeLeaveOneOut
from bilevel.problems import Softmax, Squared
from bilevel.selection import make_folds, penalty_cv


@pytest.fixture(scope="module")
def sparse() -> Any:
    """Tuning helps: two of twelve features do all."""
    return ridge(70, 12)


@pytest.fixture(scope="module")
def selected(sparse: Any) -> Any:
    return penalty_cv(sparse)


def test_tuned_penalties_are_kept_where_they_help(sparse: Any, selected: Any) -> None:
    assert selected.open
    assert selected.chosen > 0
    assert selected.node.loss < selected.scalar.loss
    assert selected.node.gate > 1.0
    assert selected.node.gain == pytest.approx(selected.scalar.loss - selected.node.loss)
    fit = sparse.refit(selected.node.u)
    torch.testing.assert_close(selected.coef, fit.coef)
    torch.testing.assert_close(selected.intercept, fit.intercept)
    torch.testing.assert_close(selected.node.penalties, torch.from_numpy(np.exp(selected.node.u)))
    assert selected.evaluations > sum(node.evaluations for node in selected.nodes)
    assert "12 tuned penalties generalise" in selected.summary
    assert (selected.honest, selected.rule, selected.choice.kappa) == ("nested", "best", 1.0)


def test_nodes_carry_their_honest_losses_and_errors(selected: Any) -> None:
    losses = selected.losses.losses
    best = losses[selected.choice.best]
    for node, row in zip(selected.nodes, losses, strict=True):
        assert node.loss == pytest.approx(row.mean())
        assert node.std_error == pytest.approx((row - best).std(ddof=1) / np.sqrt(70))
        assert node.gain_error == pytest.approx((losses[0] - row).std(ddof=1) / np.sqrt(70))
    assert selected.nodes[0].tau == np.inf


def test_one_penalty_is_kept_where_tuning_does_not_help() -> None:
    X, _ = table(50, 8)
    y = X @ np.ones(8) + 3.0 * np.random.default_rng(5).standard_normal(50)
    found = penalty_cv(RidgeLeaveOneOut(LinearData.of(X, y), Penalties.feature(8)))
    assert not found.open
    assert found.chosen == 0
    assert np.ptp(found.node.u) == 0.0
    assert found.summary.startswith("One penalty is kept")


@pytest.mark.parametrize("seed", range(3))
def test_tuned_penalties_help_where_the_signal_is_strong_too(seed: int) -> None:
    selected = penalty_cv(ridge(120, 40, seed, useful=10, noise=0.5))  # the noise is a hundredth of the spread
    assert selected.open
    assert selected.node.gain > 0.15 * selected.scalar.loss


def test_a_seed_and_workers_give_the_same_model(sparse: Any, selected: Any) -> None:
    again = penalty_cv(sparse)
    assert torch.equal(again.coef, selected.coef)
    assert (again.losses.losses == selected.losses.losses).all()
    other = penalty_cv(sparse, random_state=1)
    assert (other.losses.losses != selected.losses.losses).any()


def test_groups_share_a_penalty_and_go_through_weaker_hyperpriors(sparse: Any) -> None:
    found = penalty_cv(sparse.with_penalties(Penalties.groups([0, 0] + [1] * 10)))
    assert found.open
    assert len(found.node.u) == 2
    assert found.nodes[-1].tau == 0.001
    assert found.node.u[0] < found.node.u[1]
    assert len(set(found.node.penalties[2:].tolist())) == 1


def test_one_penalty_needs_no_outer_loop(sparse: Any) -> None:
    found = penalty_cv(sparse.with_penalties(Penalties.scalar(12)))
    assert (found.honest, len(found.nodes), found.folds) == ("none", 1, ())
    assert found.summary.startswith("One penalty, ")


def test_the_summary_has_the_figures_of_the_node_that_it_speaks_of(selected: Any) -> None:
    losses, best = selected.losses.losses, selected.choice.best
    other = replace(selected, chosen=best - 1)
    gain = 1.0 - losses[best - 1].mean() / losses[0].mean()
    assert other.summary == (
        f"12 tuned penalties generalise: their loss is {gain:.1%} smaller than one penalty's "
        f"({losses[best - 1].mean():.5g} against {losses[0].mean():.5g} on held-out rows; the least loss, "
        f"{losses[best].mean():.5g}, is {selected.nodes[best].gate:.1f} standard errors, with 1 needed)."
    )


@pytest.mark.parametrize(
    ("rows", "features", "options"), [(20, 30, {"taus": (0.3,)}), (30, 4, {}), (30, 4, {"honest": "alo"})]
)
def test_rows_of_weight_zero_are_no_rows(rows: int, features: int, options: dict) -> None:
    X, y = table(rows, features)
    none = np.random.default_rng(1).standard_normal((3 * rows, features + 1))
    weights = np.repeat([1.0, 0.0], [rows, 3 * rows])
    more = LinearData.of(np.vstack([X, none[:, 1:]]), np.append(y, none[:, 0]), weights)
    folds = make_folds(rows, 4)
    every = [
        (np.append(train, range(rows, 2 * rows)), np.append(held, range(2 * rows, 3 * rows))) for train, held in folds
    ]
    penalties = Penalties.feature(features)
    plain = penalty_cv(RidgeLeaveOneOut(LinearData.of(X, y), penalties), folds=folds, **options)
    other = penalty_cv(RidgeLeaveOneOut(more, penalties), folds=every, **options)
    assert (other.rule, other.choice.kappa, other.chosen) == (plain.rule, plain.choice.kappa, plain.chosen)
    assert other.losses.rows.tolist() == list(range(rows))
    for one, two in zip(plain.nodes, other.nodes, strict=True):
        # Weights have mean 1: sums of losses, and penalties beside them, are four times as large.
        np.testing.assert_allclose(two.u, one.u + np.log(4.0), atol=1e-5)
        assert (two.tau, two.loss) == pytest.approx((one.tau, one.loss), rel=1e-6)
        assert two.gain_error == pytest.approx(one.gain_error, rel=1e-5)


def test_the_outer_loop_without_refits(sparse: Any) -> None:
    found = penalty_cv(sparse, honest="alo", taus=(0.1, 0.01))
    assert (found.honest, found.rule, found.folds) == ("alo", "one_se", ())
    assert found.open
    assert found.losses.evaluations == 3


def test_rules_can_be_asked_for(sparse: Any) -> None:
    assert penalty_cv(sparse, kappa=1e3, taus=(0.1,)).chosen == 0
    assert penalty_cv(sparse, guard="one_se", taus=(0.1,)).rule == "one_se"
    off = penalty_cv(sparse, guard="off", taus=(0.1,))
    assert (off.honest, off.chosen, off.open) == ("none", 1, False)
    assert "not known" in off.summary
    assert np.isnan(off.node.loss)


def test_folds_of_ones_own_and_groups_of_rows(sparse: Any) -> None:
    folds = [(np.arange(35), np.arange(35, 70)), (np.arange(35, 70), np.arange(35))]
    found = penalty_cv(sparse, folds=folds, taus=(0.1,))
    assert [held.tolist() for _, held in found.folds] == [held.tolist() for _, held in folds]
    groups = np.arange(70) // 7
    grouped = penalty_cv(sparse, folds=3, groups=groups, taus=(0.1,))
    assert all(not set(groups[train]) & set(groups[held]) for train, held in grouped.folds)
    blocks = penalty_cv(sparse, folds=3, ordered=True, taus=(0.1,))
    assert all((np.diff(held) == 1).all() for _, held in blocks.folds)


def test_more_penalties_than_rows_without_an_outer_loop_are_warned_of() -> None:
    wide = ridge(20, 30)
    with pytest.warns(bl.BilevelWarning, match="30 penalties were tuned on 20 rows without an outer loop") as caught:
        found = penalty_cv(wide, guard="off", taus=(0.3,))
    assert caught[0].filename == __file__
    assert any("without an outer loop" in remark for remark in found.remarks)
    guarded = penalty_cv(wide, taus=(0.3,))
    assert (guarded.rule, guarded.choice.kappa) == ("one_se", 2.0)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"guard": "yes"}, "`guard` must be one of 'auto', 'best', 'one_se', 'off', got 'yes'."),
        ({"honest": "cv"}, "`honest` must be one of 'auto', 'nested', 'alo', got 'cv'."),
        ({"folds": 1}, "`folds` must be from 2 to 20"),
        ({"honest": "alo"}, "more than half as many as the rows, here 12 and 20: use honest='nested'."),
    ],
)
def test_options_that_do_not_fit_are_refused(options: dict, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        penalty_cv(ridge(20, 12), **options)


@pytest.mark.parametrize("kind", ["kfold", "softmax", "folds", "evidence"])
def test_honest_losses_of_single_rows_need_a_criterion_that_leaves_them_out(kind: str) -> None:
    X, y = table(40, 3)
    pairs, penalties = make_folds(40, 4), Penalties.feature(3)
    data, classes = LinearData.of(X, y), LinearData.of(X, np.arange(40) % 3, loss=Softmax())
    criterion: Criterion = {
        "kfold": lambda: KFold(data, Squared(), penalties, pairs),
        "softmax": lambda: KFold(classes, Softmax(), Penalties.feature(3, 3), pairs),
        "folds": lambda: RidgeFolds(data, penalties, pairs),
        "evidence": lambda: Evidence(data, penalties),
    }[kind]()
    says = f"leaves out single rows, and {type(criterion).__name__} does not: use honest='nested'."
    with pytest.raises(ValueError, match=says):
        penalty_cv(criterion, honest="alo")
    # Without an outer loop, nothing is taken.
    assert penalty_cv(criterion, honest="alo", guard="off", taus=(1.0,), steps=1).honest == "none"


def test_penalties_at_their_limits_and_rows_that_decide_are_named() -> None:
    X, y = table(40, 3)
    y[7] += 60.0
    with pytest.warns(bl.BilevelWarning, match=r"row 7 \(counted from 0\) alone makes"):
        found = penalty_cv(RidgeLeaveOneOut(LinearData.of(X, y), Penalties.scalar(3)))
    assert any("row 7 (counted from 0) alone makes" in remark for remark in found.remarks)
    full = np.column_stack([np.ones(40), X])
    useless = y - full @ np.linalg.lstsq(full, y)[0]
    with pytest.warns(bl.BilevelWarning, match=r"row 7 \(counted from 0\) alone makes"):
        flat = penalty_cv(RidgeLeaveOneOut(LinearData.of(X, useless), Penalties.scalar(3)))
    assert any("all but constant" in remark for remark in flat.remarks)


def test_the_one_penalty_may_be_the_best_of_candidates(sparse: Any, selected: Any) -> None:
    candidates = np.array([-3.0, 1.0, 3.0, 9.0])
    found = penalty_cv(sparse, candidates=candidates)
    values = [each.value for each in sparse.with_penalties(Penalties.scalar(12)).scan(candidates[:, None])]
    assert found.scalar.u[0] == candidates[np.argmin(values)]
    assert found.scalar.value >= selected.scalar.value


def test_a_search_may_begin_where_another_ended(sparse: Any, selected: Any) -> None:
    found = penalty_cv(sparse, start=float(selected.scalar.u[0]))
    assert found.scalar.value == pytest.approx(selected.scalar.value, rel=1e-6)
    assert found.scalar.evaluations < selected.scalar.evaluations
    np.testing.assert_array_equal(found.losses.losses[0], selected.losses.losses[0])


def test_a_score_takes_the_place_of_the_loss_in_the_outer_loop(sparse: Any, selected: Any) -> None:
    X, y = sparse.data.X, sparse.data.y

    def score(fit: Any, rows: Any) -> float:
        # The columns are standardised, and the models are in the units of what was given.
        z = X[rows] @ (fit.coef * sparse.data.scale) + fit.intercept + fit.coef @ sparse.data.offset
        return -float((z - y[rows]).square().mean() / 2)

    found = penalty_cv(sparse, score=score)
    assert found.losses.losses.shape == (len(selected.nodes), 5)
    means = [float(selected.losses.losses[:, held].mean()) for _, held in selected.folds]
    np.testing.assert_allclose(found.losses.losses.mean(0), means, rtol=1e-8)
    assert found.choice.kappa == 1.0


def test_few_steps_are_said_not_to_have_converged(sparse: Any, selected: Any) -> None:
    assert all(node.converged for node in selected.nodes)
    assert not all(node.converged for node in penalty_cv(sparse, steps=1, guard="off").nodes)
