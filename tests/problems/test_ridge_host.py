"""Small ridge problems by arrays on the host: the numbers and the evidence are those of tensors."""

from __future__ import annotations

import pickle

import pytest
import torch
from torch import Tensor

import bilevel as bl
from bilevel.problems import RidgeProblem

F64 = torch.float64


class ByTensors(RidgeProblem):
    """Ridge regression without arrays."""

    solved_on_host = False


def data(seed: int, rows: int, features: int, val: int, noise: float = 0.1) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    X, w, X_val, e = (
        torch.randn(*shape, generator=generator, dtype=F64)
        for shape in ((rows, features), (features,), (val, features), (rows,))
    )
    return X, X @ w + noise * e, X_val, X_val @ w


def at(problem: bl.BilevelProblem, u: Tensor, estimator: bl.HypergradEstimator | None = None, **options):
    return bl.hypergradient(problem, bl.HeavyBall(), estimator or bl.ClosedForm(), u, **options)


@pytest.mark.crossed
@pytest.mark.parametrize("penalty", ["scalar", "per_feature"])
@pytest.mark.parametrize("options", [{}, {"parametrization": "direct"}, {"loss": "sum"}])
@pytest.mark.parametrize("shape", [(60, 7, 40), (60, 7, 4), (9, 14, 20), (50, 40, 45)])
def test_numbers_counts_and_evidence_are_those_of_tensors(penalty: str, options: dict[str, str], shape) -> None:
    for noise in (1e-6, 1.0):  # of a close fit the outer loss is small beside its parts
        parts = data(sum(shape), *shape, noise=noise)
        problems = [kind(*parts, penalty, **options) for kind in (RidgeProblem, ByTensors)]
        for value in (0.5, 1.5, 0.1):
            u = torch.full(problems[0].hparams_shape(), value, dtype=F64)
            quick, slow = (at(problem, u) for problem in problems)
            assert quick.verdict == slow.verdict
            assert quick.cost.counts == slow.cost.counts
            assert quick.outer_loss == pytest.approx(slow.outer_loss, rel=1e-11)
            state, adjoint = quick.carry.state, quick.carry.adjoint
            for one, other in (
                (quick.hypergradient, slow.hypergradient),
                (quick.params, slow.params),
                (adjoint, slow.carry.adjoint),
                (state.memory[0], slow.carry.state.memory[0]),
            ):
                torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-11 * float(other.norm()))
            inner = problems[0].bind(u)
            slopes = problems[0].outer_value_and_grads(quick.params, u)[1]
            left = float((slopes - inner.hvp_at(quick.params, adjoint)).norm() / slopes.norm())
            # The certificate tells the size of rounding, however it came about.
            assert max(left, quick.certificate.adjoint_residual, slow.certificate.adjoint_residual) < 1e-13
            assert quick.certificate.inner_residual < 1e-13 * float(problems[0].moment.norm())


def test_one_penalty_is_factored_first_and_diagonalised_where_it_recurs() -> None:
    problem = RidgeProblem(*data(0, 60, 7, 40))
    at(problem, torch.tensor(0.0, dtype=F64))
    assert "_eigenbasis" not in vars(problem)
    at(problem, torch.tensor(0.1, dtype=F64))
    assert "_eigenbasis" in vars(problem)


def test_what_arrays_do_not_know_goes_by_tensors() -> None:
    class Shifted(RidgeProblem):
        def outer_value_and_grads(self, params: Tensor, hparams: Tensor):
            value, by_params, by_hparams = super().outer_value_and_grads(params, hparams)
            return value + hparams, by_params, by_hparams + 1.0

        def outer_loss(self, params: Tensor, hparams: Tensor) -> Tensor:
            return super().outer_loss(params, hparams) + hparams

    class Renamed(RidgeProblem):
        task = "raw"

    parts, u = data(1, 60, 7, 40), torch.tensor(0.3, dtype=F64)
    quick = RidgeProblem(*parts)
    assert quick.exact(u) is not None
    assert Renamed(*parts).exact(u) is not None
    assert Shifted(*parts).exact(u) is None
    close = torch.testing.assert_close
    close(at(Shifted(*parts), u).hypergradient, at(quick, u).hypergradient + 1.0)
    single = [part.float() for part in parts]
    assert RidgeProblem(*single).exact(u.float()) is None
    assert RidgeProblem(*data(1, 9, 301, 4)).exact(u) is None
    assert quick.batched(2).exact(torch.stack([u, u])) is None  # type: ignore[attr-defined]
    # What cannot be used is left to those who say so.
    assert [quick.exact(torch.tensor(value, dtype=F64)) for value in (800.0, float("nan"))] == [None, None]


@pytest.mark.parametrize("calls", [1, 2])
def test_a_problem_without_a_unique_solution_is_named_as_ever(calls: int) -> None:
    X, y = torch.ones(4, 2, dtype=F64), torch.ones(4, dtype=F64)
    problem, u = RidgeProblem(X, y, X, y, parametrization="direct"), torch.tensor(0.0, dtype=F64)
    for _ in range(calls):
        estimate = at(problem, u, on_failure="return")
    assert estimate.status in (bl.Status.SINGULAR, bl.Status.NEGATIVE_CURVATURE)
    assert "the inner Hessian has the smallest eigenvalue" in estimate.verdict.detail


def test_other_cotangents_are_pulled_back_and_estimates_can_be_stored() -> None:
    problem, u = RidgeProblem(*data(2, 60, 7, 40)), torch.tensor(0.3, dtype=F64, requires_grad=True)
    for _ in range(2):
        problem.outer_loss(bl.solution(problem, bl.HeavyBall(), bl.ClosedForm(), u), u.detach()).backward()
        estimate = at(problem, u.detach(), "auto")  # type: ignore[arg-type]
        torch.testing.assert_close(u.grad, estimate.hypergradient)
        assert estimate.verdict.detail.startswith("auto chose ClosedForm()")
        u.grad = None
    again = pickle.loads(pickle.dumps(at(problem, u.detach())))
    assert torch.equal(again.carry.state.params, again.params)
    assert again.certificate.measured == {}


@pytest.mark.parametrize("start", [None, 0.7])
@pytest.mark.parametrize("steps", [1, 2, 40, 1000])
def test_steps_on_the_spectrum_are_those_of_tensors(start: float | None, steps: int) -> None:
    parts = data(3, 60, 7, 40)
    for step_size in (0.05, 0.4):
        solver, x = (
            bl.GradientDescent(step_size, steps=steps),
            None if start is None else torch.full((7,), start, dtype=F64),
        )
        for value in (-6.0, 0.5):
            quick, slow = (
                bl.hypergradient(kind(*parts), solver, bl.Spectral(), torch.tensor(value, dtype=F64), x)
                for kind in (RidgeProblem, ByTensors)
            )
            assert quick.verdict == slow.verdict
            assert quick.cost.counts == slow.cost.counts
            one, other = quick.certificate, slow.certificate
            assert (one.inner_steps, one.adjoint_steps, one.adjoint_residual, one.form) == (
                steps,
                steps,
                None,
                "eigenbasis",
            )
            assert (other.inner_steps, other.adjoint_steps, other.form) == (steps, steps, "eigenbasis")
            assert one.inner_residual == pytest.approx(other.inner_residual, rel=1e-9, abs=1e-14)
            assert quick.outer_loss == pytest.approx(slow.outer_loss, rel=1e-11)
            for a, b in ((quick.hypergradient, slow.hypergradient), (quick.params, slow.params)):
                torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-13)


def test_what_is_odd_about_steps_on_the_spectrum_is_said_as_ever() -> None:
    parts, u = data(3, 60, 7, 40), torch.tensor(0.5, dtype=F64)
    for solver in (bl.GradientDescent(5.0, steps=30), bl.GradientDescent(1e-9, steps=3)):
        quick, slow = (
            bl.hypergradient(kind(*parts), solver, bl.Spectral(), u, on_failure="return")
            for kind in (RidgeProblem, ByTensors)
        )
        assert quick.verdict == slow.verdict
        torch.testing.assert_close(quick.hypergradient, slow.hypergradient, equal_nan=True)


@pytest.mark.parametrize("kind", [RidgeProblem, ByTensors])
@pytest.mark.parametrize(
    ("shape", "penalty", "u", "status"),
    [
        ("duplicates", "scalar", -32.0, "INACCURATE"),
        ("duplicates", "per_feature", -32.0, "INACCURATE"),
        ("wide", "scalar", -34.0, "SINGULAR"),
        ("wide", "per_feature", -35.0, "SINGULAR"),
        ("wide", "scalar", -12.0, "OK"),
    ],
)
def test_adjoints_without_half_of_their_digits_are_named_at_every_call(kind, shape, penalty, u, status) -> None:
    X, y, X_val, y_val = data(3, 40, 8, 20, noise=1.0) if shape == "duplicates" else data(4, 5, 20, 7)
    if shape == "duplicates":
        X[:, -2:] = X[:, :2]
    problem = kind(X, y, X_val, y_val, penalty)
    hparams = torch.full(problem.hparams_shape(), u, dtype=F64)
    one, *more = (at(problem, hparams, on_failure="return") for _ in range(3))
    assert one.status is bl.Status[status]
    assert all(each.status is one.status for each in more)
    if status == "INACCURATE":
        assert "rounding may move the hypergradient by" in one.verdict.detail
        assert str(one.verdict).endswith("take a larger penalty, standardised columns, or float64.")
        exact = problem.exact_hypergradient(hparams)
        assert all(float((each.hypergradient - exact).norm() / exact.norm()) < 0.5 for each in (one, *more))
