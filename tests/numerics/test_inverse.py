"""How far rounding moves closed forms: what is OK is right, whatever the units of the columns."""

from __future__ import annotations

import mpmath
import numpy as np
import pytest
import torch
from helpers import F64, normal, regression_data
from paths import study

import bilevel as bl
from bilevel.numerics.inverse import ByFactor, InBasis, rounding
from bilevel.problems import RidgeProblem


@pytest.mark.filterwarnings("ignore::bilevel.BilevelWarning")
def test_what_is_ok_near_singularity_is_right_to_sixty_digits() -> None:
    near_singular = study("near_singular")
    found = []
    with mpmath.workdps(60):
        for seed in range(936, 984):
            case = near_singular.draw(seed)
            ways = near_singular.WAYS[case.kind == "quadratic" :]
            found += [
                (status, off <= near_singular.LIMIT) for way in ways for status, off in near_singular.judged(case, way)
            ]
    assert ("OK", False) not in found
    assert found.count(("OK", True)) > 200
    assert found.count(("INACCURATE", False)) > 10


def test_steps_on_the_spectrum_are_right_in_float32_to_its_rounding() -> None:
    near_singular = study("near_singular")
    with mpmath.workdps(60):
        for seed in range(909, 918):
            case = near_singular.draw(seed, spectral=True)
            assert case.u.dtype is torch.float32
            for way in ("tensors", "sweep"):
                for status, off in near_singular.judged(case, way):
                    assert status == "OK"
                    assert off < 1e-6, (seed, way)


@pytest.mark.parametrize("sign", [-1.0, 1.0])
def test_no_pair_of_nearly_equal_columns_is_out_of_sight(sign: float) -> None:
    size, generator = 5, torch.Generator().manual_seed(1)
    for i in range(size):
        for j in range(i):
            X, X_val = (torch.randn(4, size, generator=generator, dtype=F64) for _ in range(2))
            X[:, i] = sign * X[:, j] + 1e-7 * X[:, i]
            y, y_val = X[:, j] + 0.3, X_val.sum(1)
            made = bl.hypergradient(
                RidgeProblem(X, y, X_val, y_val),
                bl.Newton(),
                bl.ClosedForm(),
                torch.tensor(-25.0, dtype=F64),
                on_failure="return",
            )
            with mpmath.workdps(60):
                A, V, t, t_val = (mpmath.matrix(each.tolist()) for each in (X, X_val, y, y_val))
                penalty = mpmath.exp(-25)
                H = A.T * A / 4 + penalty * mpmath.eye(size)
                w = mpmath.lu_solve(H, A.T * t / 4)
                a = mpmath.lu_solve(H, V.T * (V * w - t_val) / 4)
                truth = float(-penalty * sum(p * q for p, q in zip(a, w, strict=True)))
            assert not made.status.ok or float(made.hypergradient) == pytest.approx(truth, rel=1e-2), (i, j)


def test_a_sweep_judges_each_vector_and_warns() -> None:
    X, y, X_val, y_val = regression_data()
    problem = RidgeProblem(torch.cat([X, X], 1), y, torch.cat([X_val, X_val], 1), y_val)
    with pytest.warns(bl.BilevelWarning, match="1 of 2 members are in doubt: member 1: ClosedForm: rounding may move"):
        swept = bl.ClosedForm().sweep(problem, torch.tensor([-2.0, -33.0], dtype=F64))
    assert [verdict.status.name for verdict in swept.verdicts] == ["OK", "INACCURATE"]


def test_closed_forms_in_float32_are_those_of_their_data_in_float64() -> None:
    X, y, X_val, y_val = (each.float() for each in regression_data())
    parts, grid = (torch.cat([X, X], 1), y, torch.cat([X_val, X_val], 1), y_val), torch.tensor([-2.0, -18.0])
    swept = bl.ClosedForm().sweep(RidgeProblem(*parts), grid)
    exact = bl.ClosedForm().sweep(RidgeProblem(*(each.double() for each in parts)), grid.double())
    assert all(verdict.status.ok for verdict in swept.verdicts)
    for name in ("hypergradients", "outer_losses", "params"):
        torch.testing.assert_close(getattr(swept, name), getattr(exact, name).float(), rtol=1e-6, atol=1e-7)
    for kind in (RidgeProblem, study("near_singular").ByTensors):
        made = bl.hypergradient(kind(*parts), bl.Newton(), bl.ClosedForm(), grid[1])
        torch.testing.assert_close(made.hypergradient, swept.hypergradients[1], rtol=1e-6, atol=0.0)
        torch.testing.assert_close(made.params, swept.params[1], rtol=1e-6, atol=1e-7)


def test_another_cotangent_is_judged_by_itself() -> None:
    X, y, X_val, y_val = regression_data()
    problem = RidgeProblem(torch.cat([X, X], 1), y, torch.cat([X_val, X_val], 1), y_val)
    u = torch.tensor(-33.0, dtype=F64, requires_grad=True)
    x = bl.solution(problem, bl.Newton(), bl.ClosedForm(), u, on_failure="warn")
    with pytest.warns(bl.BilevelWarning, match="rounding may move"):
        x[0].backward()


@pytest.mark.parametrize("kind", [np.asarray, torch.as_tensor])
def test_the_estimate_knows_no_units_and_is_the_same_by_each_inverse(kind) -> None:
    X, target = normal(1, 40, 6).numpy(), normal(2, 6).numpy()
    X[:, 5] = X[:, 4] + 1e-4 * X[:, 5]
    found = []
    for units in (np.ones(6), 2.0 ** np.arange(-30, 30, 10)):
        H, b, goal = (X * units).T @ (X * units), (X * units).sum(0), target / units
        x = np.linalg.solve(H, b)
        a = np.linalg.solve(H, (x - goal) * units**2)
        outer = lambda x, units=units, goal=goal: ((x - kind(goal)) * kind(units**2), 0.0)  # noqa: E731
        pull = lambda x, a, units=units: x * a * kind(units**2)  # noqa: E731
        values, vectors = np.linalg.eigh(H)
        inverses = [ByFactor(kind(H))] + [InBasis(kind(vectors), kind(values))] * (not found)
        scale, x, a = map(kind, (np.sqrt(np.diag(H)), x, a))
        found += [[float(each) for each in rounding(inverse, scale, x, a, outer, pull)] for inverse in inverses]
    for each in found[1:]:
        assert each == pytest.approx(found[0], rel=1e-3)
    assert 1e-9 < found[0][0] / found[0][1] < 1e-5
