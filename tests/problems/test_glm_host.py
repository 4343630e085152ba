"""Small linear models by dense Newton steps on the host: the numbers and the evidence are those of steps."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

import bilevel as bl
from bilevel.problems import HuberProblem, LogisticProblem, PoissonProblem, SquaredHingeProblem

F64 = torch.float64


class Quartic(bl.problems.GLMLoss):
    """A loss of a user's own, with the three functions alone."""

    def value(self, z: Tensor, y: Tensor) -> Tensor:
        return (z - y).square().square() + (z - y).square()

    def slope(self, z: Tensor, y: Tensor) -> Tensor:
        return 4.0 * (z - y) ** 3 + 2.0 * (z - y)

    def curvature(self, z: Tensor, y: Tensor) -> Tensor:
        return 12.0 * (z - y).square() + 2.0


class Own(bl.problems.LinearModelProblem):
    glm = Quartic()


KINDS = (LogisticProblem, PoissonProblem, HuberProblem, SquaredHingeProblem, Own)


def made(
    kind: type[bl.BilevelProblem], seed: int = 0, rows: int = 80, features: int = 6, **options
) -> bl.BilevelProblem:
    generator = torch.Generator().manual_seed(seed)
    X, w, X_val = (
        torch.randn(*shape, generator=generator, dtype=F64)
        for shape in ((rows, features), (features,), (rows // 2, features))
    )
    y, y_val = (each @ w + torch.randn(len(each), generator=generator, dtype=F64) for each in (X, X_val))
    if issubclass(kind, LogisticProblem | SquaredHingeProblem):
        y, y_val = (y > 0).long(), (y_val > 0).long()
    if kind is PoissonProblem:
        y, y_val = y.exp().clamp(max=30).round(), y_val.exp().clamp(max=30).round()
    return kind(X, y, X_val, y_val, **options)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "options", [{}, {"penalty": "per_feature"}, {"penalty": "per_feature", "parametrization": "direct", "loss": "sum"}]
)
def test_dense_steps_lead_where_steps_lead(kind, options) -> None:
    problem, carries, forms = made(kind, **options), [None, None, None], set()
    by_steps = bl.QuasiNewton(pairs=11), bl.Implicit()
    for value in (0.5, 0.6, 0.2):
        u = torch.full(problem.hparams_shape(), value, dtype=F64)
        ways = (bl.QuasiNewton(), bl.Implicit()), (bl.Newton(), bl.Implicit(bl.Direct())), by_steps
        dense, newton, steps = (
            bl.hypergradient(problem, solver, estimator, u, carry=carry)
            for (solver, estimator), carry in zip(ways, carries, strict=True)
        )
        carries = [each.carry for each in (dense, newton, steps)]
        assert steps.certificate.form == "step by step"
        assert dense.status.ok
        forms |= {each.certificate.form for each in (dense, newton)}
        assert dense.outer_loss == pytest.approx(steps.outer_loss, rel=1e-9)
        for one, other in ((dense.hypergradient, steps.hypergradient), (dense.params, steps.params)):
            torch.testing.assert_close(one, other, rtol=1e-7, atol=1e-9 * float(other.norm()))
        torch.testing.assert_close(dense.carry.adjoint, steps.carry.adjoint, rtol=1e-7, atol=1e-9)
        inner = problem.bind(u)
        # What the certificate says is what the oracles say.
        assert float(inner.grad(dense.params).norm()) == pytest.approx(dense.certificate.inner_residual, abs=1e-13)
        slopes = problem.outer_value_and_grads(dense.params, u)[1]
        left = (slopes - inner.hvp_at(dense.params, dense.carry.adjoint)).norm() / slopes.norm()
        assert float(left) == pytest.approx(dense.certificate.adjoint_residual, abs=1e-12)
        for each in (dense, newton):
            if each.certificate.form == "dense Newton":
                assert each.certificate.adjoint_residual < 1e-13
                assert each.cost.counts["gradient"] >= each.certificate.inner_steps
    assert "dense Newton" in forms
    # The derivatives of a problem of a user's own are looked at first.
    assert forms == {"dense Newton"} or kind is Own


def test_a_tolerance_that_was_given_ends_the_steps() -> None:
    problem = made(LogisticProblem)
    u = problem.initial_hparams(-3.0)
    for tol in (1e-2, 1e-5):
        estimate = bl.hypergradient(problem, bl.Newton(tol=tol), bl.Implicit(), u, on_failure="return")
        assert estimate.certificate.inner_residual <= tol
    assert bl.hypergradient(problem, bl.Newton(tol=1e-2), bl.Implicit(), u, certify=True).certificate.error is not None


def test_what_dense_steps_do_not_know_is_left_to_steps() -> None:
    class Shifted(LogisticProblem):
        def inner_loss(self, params: Tensor, hparams: Tensor) -> Tensor:
            return super().inner_loss(params, hparams)

    def form(problem, solver=None, estimator=None, params=None, value=-1.0) -> str:
        u = problem.initial_hparams(value)
        return bl.hypergradient(
            problem, solver or bl.QuasiNewton(), estimator or bl.Implicit(), u, params
        ).certificate.form

    assert form(made(LogisticProblem)) == "dense Newton"
    for other in (
        form(made(Shifted)),
        form(made(LogisticProblem, rows=405, features=402)),
        form(made(LogisticProblem), bl.Newton(damping=0.1)),
        form(made(LogisticProblem), bl.Newton(bl.CG())),
        form(made(LogisticProblem), bl.QuasiNewton(refresh=0.5)),
        form(made(LogisticProblem), estimator=bl.Implicit(bl.CG(max_steps=50))),
        form(made(LogisticProblem), estimator=bl.Implicit(damping=0.1)),
        # From so far away all steps lead uphill.
        form(made(LogisticProblem), params=torch.full((6,), 1e4, dtype=F64), value=-15.0),
    ):
        assert other == "step by step"


def test_other_cotangents_are_pulled_back_and_runs_resume() -> None:
    problem = made(LogisticProblem, penalty="per_feature")
    u = problem.initial_hparams(-1.0).requires_grad_()
    x = bl.solution(problem, bl.QuasiNewton(), bl.Implicit(), u)
    problem.outer_loss(x, u.detach()).backward()
    estimate = bl.hypergradient(problem, bl.QuasiNewton(), bl.Implicit(), u.detach())
    torch.testing.assert_close(u.grad, estimate.hypergradient, rtol=1e-7, atol=1e-10)

    def fresh() -> bl.OuterOptimizer:
        return bl.OuterOptimizer(problem, bl.QuasiNewton(), bl.Implicit(), u.detach(), None)

    whole, first, second = fresh(), fresh(), fresh()
    whole.run(5, progress=False)
    first.run(2, progress=False)
    second.load_state_dict(first.state_dict())
    second.run(3, progress=False)
    assert torch.equal(whole.hparams, second.hparams)


def in_80_bits(problem: LogisticProblem, penalty: np.ndarray) -> np.ndarray:
    """Return the hypergradient by log penalties, by gradients and residuals in 80-bit arithmetic."""
    (X, y), (X_val, y_val) = (
        (split.X.numpy().T.astype(np.longdouble), split.y.numpy().astype(np.longdouble))
        for split in (problem.train, problem.val)
    )
    w = np.zeros(X.shape[1], np.longdouble)
    for _ in range(60):
        p = 1 / (1 + np.exp(y * (X @ w)))
        H = (X.T * (p * (1 - p) / len(y))) @ X + np.diag(penalty)
        w = w - np.linalg.solve(H.astype(float), (penalty * w - X.T @ (y * p) / len(y)).astype(float))
    slopes = -X_val.T @ (y_val / (1 + np.exp(y_val * (X_val @ w)))) / len(y_val)
    a = np.zeros_like(w)
    for _ in range(6):
        a = a + np.linalg.solve(H.astype(float), (slopes - H @ a).astype(float))
    return (-penalty * w * a).astype(float)


@pytest.mark.parametrize(("rows", "features"), [(80, 6), (60, 40), (40, 50), (20, 90)])
def test_warm_steps_by_the_hessian_of_other_penalties_are_exact(rows: int, features: int) -> None:
    problem, other = (
        made(LogisticProblem, seed, rows=rows, features=features, penalty="per_feature") for seed in (3, 4)
    )
    solver, u, carry, made_new = bl.QuasiNewton(tol=1e-13), torch.linspace(-3.0, -1.0, features, dtype=F64), None, []
    foreign = bl.hypergradient(other, solver, bl.Implicit(), u).carry
    for step in range(4):
        u = u + 0.1 * torch.cos(torch.arange(features) * (step + 1.0)).double()
        # What another problem has left is a poor start, and no more.
        for start in (carry, foreign):
            estimate = bl.hypergradient(problem, solver, bl.Implicit(), u, carry=start)
            assert estimate.certificate.form == "dense Newton"
            assert estimate.status.ok
            exact = torch.from_numpy(in_80_bits(problem, u.exp().numpy()))
            assert float((estimate.hypergradient - exact).norm() / exact.norm()) < 1e-10
            if start is carry:
                made_new.append(estimate.cost.counts["curvature"])
                following = estimate.carry
        carry = following
    assert made_new[0] > 1
    assert max(made_new[1:]) <= 2
    again = bl.hypergradient(problem, solver, bl.Implicit(), u, carry=carry)
    torch.testing.assert_close(again.hypergradient, estimate.hypergradient, rtol=1e-10, atol=0.0)


def test_steps_by_any_solver_go_on_from_what_dense_steps_leave() -> None:
    problem = made(LogisticProblem, penalty="per_feature")
    u = problem.initial_hparams(-1.0)
    carry = bl.hypergradient(problem, bl.QuasiNewton(), bl.Implicit(), u).carry
    assert carry.state.cache is not None
    warm, cold = (
        bl.hypergradient(problem, bl.QuasiNewton(pairs=11), bl.Implicit(), u + 0.1, carry=start)
        for start in (carry, None)
    )
    assert warm.certificate.form == "step by step"
    torch.testing.assert_close(warm.hypergradient, cold.hypergradient, rtol=1e-7, atol=1e-10)
    assert warm.cost.gradient_equivalents < cold.cost.gradient_equivalents


def test_a_singular_hessian_is_left_to_those_who_say_so() -> None:
    X = torch.randn(40, 3, generator=torch.Generator().manual_seed(0), dtype=F64)
    X = torch.cat([X, X[:, :1]], 1)
    y = (X[:, 0] > 0.3 * X[:, 1]).long()
    problem = LogisticProblem(X, y, X, y, "per_feature", parametrization="direct")
    u = torch.tensor([0.0, 0.1, 0.1, 0.0], dtype=F64)
    estimate = bl.hypergradient(problem, bl.Newton(tol=1e-6), bl.Implicit(), u, on_failure="return")
    assert estimate.certificate.form != "dense Newton"


def test_a_start_without_a_gradient_is_left_to_those_who_say_so() -> None:
    problem = made(PoissonProblem)
    far = torch.full((6,), 1e4, dtype=F64)
    for solver in (bl.QuasiNewton(), bl.Newton()):
        estimate = bl.hypergradient(
            problem, solver, bl.Implicit(), problem.initial_hparams(), far, check=False, on_failure="return"
        )
        assert not estimate.status.usable
        assert estimate.certificate.form != "dense Newton"
