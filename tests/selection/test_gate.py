"""The gate and the one-standard-error rule, beside arithmetic by hand."""

from __future__ import annotations

import numpy as np
import pytest

from bilevel.criteria import LinearData, Penalties, RidgeLeaveOneOut
from bilevel.problems.losses import Logistic, Softmax, Squared, SquaredHinge
from bilevel.selection import choose, elastic_cv, kappa_of, one_se, paired
from bilevel.selection.gate import in_errors, rounding_of, verdict

ZERO = np.array([4.0, 2.0, 3.0, 3.0])
BETTER = np.array([2.0, 1.0, 2.0, 3.0])  # gains 2, 1, 1, 0: mean 1, sd sqrt(2/3), se 0.40825
NEARLY = np.array([2.0, 1.0, 3.0, 3.0])  # above BETTER by 0, 0, 1, 0: mean 0.25, sd 0.5, se 0.25


def test_differences_are_paired() -> None:
    mean, error = paired(ZERO, BETTER)
    assert mean == 1.0
    assert error == pytest.approx(np.sqrt(2 / 3) / 2)
    # Rows differ by far more than the losses of one row do.
    assert paired(np.array([1.0, 10.0]), np.array([0.0, 8.0])) == (1.5, 0.5)
    assert np.isinf(paired(np.array([1.0]), np.array([0.0]))[1])


def test_the_first_node_within_one_standard_error_is_taken() -> None:
    assert one_se(np.stack([ZERO, NEARLY, BETTER])) == 1
    assert one_se(np.stack([ZERO, BETTER, NEARLY])) == 1
    assert one_se(np.stack([ZERO, ZERO + 1, BETTER])) == 2
    assert one_se(np.stack([ZERO, ZERO])) == 0


def test_a_gain_that_is_printed_as_none_or_within_its_error_does_not_generalise() -> None:
    assert verdict("It", 6e-4, 1.1) == "It generalises: its loss is 0.1% smaller than"
    assert "next to nothing: its loss is less than 0.1% smaller" in verdict("It", 4e-4, 9.0)
    assert "no more than a standard error: their loss is 2.0%" in verdict("They", 0.02, 0.9, several=True)


def test_the_gate_opens_by_as_many_standard_errors_as_asked_for() -> None:
    losses = np.stack([ZERO, NEARLY, BETTER])
    gate = 1.0 / (np.sqrt(2 / 3) / 2)  # 2.449
    open_, closed = choose(losses, gate - 1e-6), choose(losses, gate + 1e-6)
    assert (open_.node, open_.best, open_.open) == (2, 2, True)
    assert (closed.node, closed.best, closed.open) == (0, 2, False)
    np.testing.assert_allclose(open_.gates, [0.0, 0.75 / (np.sqrt(2.75 / 3) / 2), gate])
    np.testing.assert_allclose(open_.gains, [0.0, 0.75, 1.0])
    np.testing.assert_allclose(open_.losses, [3.0, 2.25, 2.0])
    assert choose(losses, 1.0, "one_se").node == 1
    assert choose(losses, gate + 1e-6, "one_se").node == 0


def test_nodes_that_fail_are_never_taken() -> None:
    broken = np.array([np.nan, 0.0, 0.0, 0.0])
    choice = choose(np.stack([ZERO, broken, BETTER, np.full(4, np.inf)]), 1.0, "one_se")
    assert choice.node == 2
    assert np.isinf(choice.losses[[1, 3]]).all()
    assert np.isinf(choice.gains[[1, 3]]).all()
    assert choice.gates[[1, 3]].tolist() == [0.0, 0.0]


def test_gains_that_are_easily_mistaken_need_two_standard_errors() -> None:
    for loss in (Logistic(), Softmax(), SquaredHinge()):
        assert kappa_of(loss, np.full(100, 0.49), 50) == 3.0
        assert kappa_of(loss, np.full(100, 0.51), 50) == 1.0
    assert kappa_of(Squared(), np.full(100, 0.01), 50) == 1.0
    assert kappa_of(Squared(), np.full(100, 1.0), 51) == 2.0


def test_by_one_standard_error_a_gain_below_it_leaves_one_penalty_and_does_not_open_the_gate() -> None:
    losses = np.array([[3.0, -2.0, 3.0, -2.0], [0.0] * 4])  # gain 0.5, standard error 1.44
    assert choose(losses, 0.2, "best").open
    choice = choose(losses, 0.2, "one_se")
    assert (choice.node, choice.open, choice.kappa) == (0, False, 1.0)


@pytest.mark.parametrize("value", [0.1, 5.0, 1e9 / 3])
def test_rounding_opens_no_gate(value: float) -> None:
    data = LinearData.of(np.random.default_rng(0).standard_normal((100, 8)), np.full(100, value))
    found = elastic_cv(RidgeLeaveOneOut(data, Penalties.feature(8)), kappa=0.1)
    assert not found.open
    assert found.candidates[0].weight == 1.0
    rounding = rounding_of(Squared(), data)
    assert value**2 * 1e-30 < rounding < value**2 * 1e-26
    rows = np.linspace(0.5, 1.0, 8) * rounding
    assert not choose(np.stack([rows, 0.0 * rows]), 1.0, "one_se", rounding).open
    assert choose(np.stack([9.0 * rows, 0.0 * rows]), 1.0, "one_se", rounding).open


def test_a_row_that_makes_most_of_the_loss_opens_no_gate() -> None:
    losses = np.stack([[0.1, 9.0, 0.1, 0.1], [0.01, 8.0, 0.0, 0.0]])
    rows = np.array([3, 7, 8, 9])
    assert choose(losses, 1.0).open
    closed = choose(losses, 1.0, rows=rows)
    assert (closed.node, closed.best, closed.open) == (0, 1, False)
    assert closed.proof == "row 7 (counted from 0) alone makes 97% of the loss"
    calm = choose(np.stack([ZERO, BETTER]), 1.0, rows=rows)
    assert calm.open
    assert calm.proof == "2.4 standard errors, with 1 needed"
    # Of two rows, one always makes half.
    assert not choose(losses[:, :2], 0.5, rows=rows[:2]).lone_row


def test_a_gain_beside_what_was_needed_has_the_digits_that_tell_them_apart() -> None:
    found = [in_errors(gate, kappa).split(" standard")[0] for gate, kappa in ((0.96, 1), (1.004, 1), (2.0004, 2.0))]
    assert found == ["0.96", "1.004", "2.0004"]
    assert in_errors(0.0, 1.0) == "0.0 standard errors, with 1 needed"
