"""Logistic regression, 20,000 x 500, one penalty for each feature: one hypergradient from a cold start.

Alternatives, all to an inner gradient norm of 1e-8 and an adjoint residual of 1e-8: L-BFGS plus CG and accelerated
gradient descent plus CG, written by hand with autograd as one would without this library.
"""

from __future__ import annotations

import torch
from common import emit, interleave, medians, ratio, relative_error

import bilevel as bl

ROWS, FEATURES, TOL = 20_000, 500, 1e-8


def data() -> tuple[torch.Tensor, ...]:
    """Return correlated Gaussian features and noisy labels, training and validation."""
    generator = torch.Generator().manual_seed(0)
    X = torch.randn(2 * ROWS, FEATURES, generator=generator, dtype=torch.float64)
    X = X * torch.linspace(0.2, 2.0, FEATURES, dtype=torch.float64)
    weights = torch.randn(FEATURES, generator=generator, dtype=torch.float64) / FEATURES**0.5
    noise = torch.randn(2 * ROWS, generator=generator, dtype=torch.float64)
    y = (X @ weights + noise > 0).double()
    return X[:ROWS], y[:ROWS], X[ROWS:], y[ROWS:]


def by_hand(problem_data: tuple[torch.Tensor, ...], u: torch.Tensor) -> torch.Tensor:
    """Return the hypergradient by torch's L-BFGS with autograd, and CG on double-backward products."""
    X, y, X_val, y_val = problem_data
    loss_of = torch.nn.functional.binary_cross_entropy_with_logits
    penalty = u.exp()

    def inner(w: torch.Tensor) -> torch.Tensor:
        return loss_of(X @ w, y) + 0.5 * (penalty * w * w).sum()

    w = torch.zeros(FEATURES, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [w], max_iter=1000, history_size=20, tolerance_grad=TOL / FEATURES**0.5, tolerance_change=0.0,
        line_search_fn="strong_wolfe",
    )  # fmt: skip

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = inner(w)
        loss.backward()
        return loss

    optimizer.step(closure)
    w = w.detach().requires_grad_()
    (gradient,) = torch.autograd.grad(inner(w), w, create_graph=True)
    (b,) = torch.autograd.grad(loss_of(X_val @ w, y_val), w)
    x, r = torch.zeros_like(b), b
    p, rr = r, r @ r
    while rr.sqrt() > TOL * b.norm():
        (Hp,) = torch.autograd.grad(gradient, w, p, retain_graph=True)
        alpha = rr / (p @ Hp)
        x, r = x + alpha * p, r - alpha * Hp
        rr, old = r @ r, rr
        p = r + (rr / old) * p
    by_hand.residual = float(gradient.detach().norm())
    return -(penalty * w.detach() * x)


def main() -> bool:
    """Compare one cold hypergradient."""
    problem_data = data()
    X, y, X_val, y_val = problem_data
    problem = bl.problems.LogisticProblem(X, y, X_val, y_val, "per_feature")
    u = problem.initial_hparams(-6.0)
    truth = bl.hypergradient(problem, bl.Newton(tol=1e-12), bl.Implicit(bl.Direct()), u, on_failure="return")

    def ours() -> bl.Estimate:
        newton = bl.Newton(linear_solver=bl.CG(), tol=TOL)
        return bl.hypergradient(problem, newton, bl.Implicit(bl.CG(tol=TOL)), u)

    seconds = interleave({"bilevel": ours, "by hand": lambda: by_hand(problem_data, u)}, rounds=5)
    estimate = ours()
    share = ratio(seconds, "bilevel", "by hand")
    error = relative_error(estimate.hypergradient, truth.hypergradient)
    error_by_hand = relative_error(by_hand(problem_data, u), truth.hypergradient)
    return emit(
        "large logistic: time / L-BFGS + CG by hand with autograd",
        share,
        "below 1 at an equal or smaller error",
        share < 1 and error <= max(error_by_hand, 1e-8),
        error=error,
        error_by_hand=error_by_hand,
        inner_residual=estimate.certificate.inner_residual,
        inner_residual_by_hand=by_hand.residual,
        counts=dict(estimate.cost.counts),
        seconds=medians(seconds),
    )


if __name__ == "__main__":
    raise SystemExit(not main())
