"""Small linear models by dense Newton steps on the host: the numbers and the evidence are those of steps."""

from __future__ import annotations

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
                assert each.cost.counts["gradient"] > each.certificate.inner_steps
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
        form(made(LogisticProblem, rows=12, features=30)),
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
