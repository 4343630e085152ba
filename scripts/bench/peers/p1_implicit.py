"""P1i: the exact hypergradient of ridge regression at the inner solution, breast_cancer, one penalty."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
from contest import Asked, Contestant, Problem, Task
from p1_ridge import jax_losses
from shared import BEFORE, breast_cancer, earlier, warm_torch

PENALTIES = 100


def data(seed: int) -> SimpleNamespace:
    """Return the splits, and the penalties that come one after another."""
    X, y, X_val, y_val = breast_cancer(seed)
    return SimpleNamespace(X=X, y=y, X_val=X_val, y_val=y_val, penalties=np.linspace(-6.0, 2.0, PENALTIES))


def reference(d: SimpleNamespace) -> dict[str, Any]:
    """Return ``-penalty slope' H^-1 w`` with 50-digit arithmetic in the eigenbasis of the Gram matrix.

    The eigenbasis itself is refined to 50 digits, so nothing here is float64.
    """
    import mpmath

    mpmath.mp.dps = 50
    X, y, X_val, y_val = (mpmath.matrix(part.tolist()) for part in (d.X, d.y, d.X_val, d.y_val))
    gram, moment = X.T * X / X.rows, X.T * y / X.rows
    gram_val, moment_val = X_val.T * X_val / X_val.rows, X_val.T * y_val / X_val.rows
    values, basis = mpmath.eigsy(gram)
    m, mv, gv = basis.T * moment, basis.T * moment_val, basis.T * gram_val * basis
    answers = []
    for u in d.penalties:
        penalty = mpmath.exp(mpmath.mpf(float(u)))
        w = mpmath.matrix([m[i] / (values[i] + penalty) for i in range(len(m))])
        slope = gv * w - mv
        answers.append(-penalty * sum(slope[i] * w[i] / (values[i] + penalty) for i in range(len(m))))
    return {"penalties": np.array(answers, dtype=float), "scratch": float(answers[PENALTIES // 2])}


def large_data(rows: int, features: int, seed: int) -> SimpleNamespace:
    """Return Gaussian data and one penalty."""
    random = np.random.default_rng(seed)
    X, X_val = random.standard_normal((rows, features)), random.standard_normal((2000, features))
    truth = random.standard_normal(features) / features**0.5
    y, y_val = (Z @ truth + random.standard_normal(len(Z)) for Z in (X, X_val))
    return SimpleNamespace(X=X, y=y, X_val=X_val, y_val=y_val, penalties=np.array([-3.0]))


def refined(d: SimpleNamespace) -> dict[str, Any]:
    """Return the hypergradient by a Cholesky factor, and a step of refinement with 80-bit residuals for each system."""
    from scipy.linalg import cho_factor, cho_solve

    penalty = np.exp(d.penalties[0])
    H = d.X.T @ d.X / len(d.X) + penalty * np.eye(d.X.shape[1])
    factor, wide = cho_factor(H), H.astype(np.longdouble)

    def solved(b: Any) -> Any:
        x = cho_solve(factor, b)
        return x + cho_solve(factor, (b - wide @ x).astype(float))

    w = solved(d.X.T @ d.y / len(d.X))
    slope = d.X_val.T @ (d.X_val @ w - d.y_val) / len(d.y_val)
    return {"penalties": -penalty * (w @ solved(slope))}


def _kept(calls: dict[str, Any]) -> dict[str, Any]:
    """Return the calls without the one that starts from the data."""
    return {"penalties": calls["penalties"]}


def _calls(d: SimpleNamespace, kept: Any, scratch: Any) -> dict[str, Any]:
    """Return both tasks from one function of a penalty and one that starts from the data."""
    middle = float(d.penalties[len(d.penalties) // 2])
    return {"penalties": lambda: [kept(float(u)) for u in d.penalties], "scratch": lambda: scratch(middle)}


# This library ---------------------------------------------------------------------------------------------------------


def _ours(d: SimpleNamespace, kind: str) -> dict[str, Any]:
    import torch

    import bilevel as bl

    parts = [torch.as_tensor(part) for part in (d.X, d.y, d.X_val, d.y_val)]
    estimator = bl.ClosedForm() if kind == "closed form" else bl.Implicit(bl.Direct())
    problem = bl.problems.RidgeProblem(*parts)

    def at(problem: Any, u: float) -> Any:
        hparams = torch.tensor(u, dtype=torch.float64)
        return bl.hypergradient(problem, bl.Newton(), estimator, hparams)

    return _calls(d, lambda u: at(problem, u), lambda u: at(bl.problems.RidgeProblem(*parts), u))


def _sweep(d: SimpleNamespace) -> dict[str, Any]:
    import torch

    import bilevel as bl

    problem = bl.problems.RidgeProblem(*(torch.as_tensor(part) for part in (d.X, d.y, d.X_val, d.y_val)))
    penalties = torch.as_tensor(d.penalties)
    return {"penalties": lambda: bl.ClosedForm().sweep(problem, penalties).hypergradients.numpy()}


# Peers ----------------------------------------------------------------------------------------------------------------


def _optimistix(d: SimpleNamespace, on_gram: bool) -> dict[str, Any]:
    import jax
    import jax.numpy as jnp
    import lineax as lx
    import optimistix as optx

    cholesky = lx.Cholesky()
    newton = optx.Newton(rtol=1e-12, atol=1e-12, linear_solver=cholesky)
    options = {"tags": frozenset({lx.positive_semidefinite_tag}), "adjoint": optx.ImplicitAdjoint(cholesky)}

    def inner(w: Any, arguments: Any) -> Any:
        u, X, y = arguments
        return 0.5 * jnp.mean((X @ w - y) ** 2) + 0.5 * jnp.exp(u) * (w @ w)

    def on_data(w: Any, arguments: Any) -> Any:
        return jax.grad(inner)(w, arguments)

    def normal_equations(w: Any, arguments: Any) -> Any:
        u, gram, moment = arguments
        return gram @ w - moment + jnp.exp(u) * w

    def outer(u: Any, first: Any, second: Any, X_val: Any, y_val: Any) -> Any:
        residual = normal_equations if on_gram else on_data
        w = optx.root_find(residual, newton, jnp.zeros(d.X.shape[1]), (u, first, second), **options).value
        return 0.5 * jnp.mean((X_val @ w - y_val) ** 2)

    def from_data(u: Any, X: Any, y: Any, X_val: Any, y_val: Any) -> Any:
        return outer(u, *((X.T @ X / len(X), X.T @ y / len(X)) if on_gram else (X, y)), X_val, y_val)

    X, y, X_val, y_val = parts = tuple(jnp.asarray(part) for part in (d.X, d.y, d.X_val, d.y_val))
    kept, scratch = jax.jit(jax.grad(outer)), jax.jit(jax.grad(from_data))
    first, second = (X.T @ X / len(X), X.T @ y / len(X)) if on_gram else (X, y)
    return _calls(d, lambda u: float(kept(u, first, second, X_val, y_val)), lambda u: float(scratch(u, *parts)))


def _jaxopt(d: SimpleNamespace) -> dict[str, Any]:
    import jax
    import jax.numpy as jnp
    import jaxopt

    _, outer = jax_losses(d)
    parts = tuple(jnp.asarray(part) for part in (d.X, d.y, d.X_val, d.y_val))
    cholesky = jaxopt.linear_solve.solve_cholesky

    def solved(u: Any, gram: Any, moment: Any) -> Any:
        optimality = lambda w, u: gram @ w - moment + jnp.exp(u) * w  # noqa: E731
        eye = jnp.eye(gram.shape[0])

        def solve(_: Any, u: Any) -> Any:
            return jax.scipy.linalg.solve(gram + jnp.exp(u) * eye, moment, assume_a="pos")

        return jaxopt.implicit_diff.custom_root(optimality, solve=cholesky)(solve)(None, u)

    def from_data(u: Any, X: Any, y: Any, X_val: Any, y_val: Any) -> Any:
        w = solved(u, X.T @ X / len(X), X.T @ y / len(X))
        return 0.5 * jnp.mean((X_val @ w - y_val) ** 2)

    gram, moment = parts[0].T @ parts[0] / len(d.X), parts[0].T @ parts[1] / len(d.X)
    kept = jax.jit(jax.grad(lambda u: outer(solved(u, gram, moment))))
    scratch = jax.jit(jax.grad(from_data))
    return _calls(d, lambda u: float(kept(u)), lambda u: float(scratch(u, *parts)))


def _torch_by_hand(d: SimpleNamespace) -> dict[str, Any]:
    import torch

    warm_torch()
    X, y, X_val, y_val = (torch.as_tensor(part) for part in (d.X, d.y, d.X_val, d.y_val))
    eye = torch.eye(X.shape[1], dtype=X.dtype)

    def at(u: float, gram: Any, moment: Any) -> float:
        log_penalty = torch.tensor(u, dtype=X.dtype, requires_grad=True)
        factor = torch.linalg.cholesky(gram + log_penalty.exp() * eye)
        w = torch.cholesky_solve(moment[:, None], factor)[:, 0]
        return float(torch.autograd.grad(0.5 * (X_val @ w - y_val).square().mean(), log_penalty)[0])

    gram, moment = X.t() @ X / len(X), X.t() @ y / len(X)
    return _calls(d, lambda u: at(u, gram, moment), lambda u: at(u, X.t() @ X / len(X), X.t() @ y / len(X)))


def _scipy_by_hand(d: SimpleNamespace) -> dict[str, Any]:
    from scipy.linalg import cho_factor, cho_solve

    eye = np.eye(d.X.shape[1])

    def at(u: float, gram: Any, moment: Any) -> float:
        factor = cho_factor(gram + np.exp(u) * eye)
        w = cho_solve(factor, moment)
        slope = d.X_val.T @ (d.X_val @ w - d.y_val) / len(d.y_val)
        return float(-np.exp(u) * (w @ cho_solve(factor, slope)))

    gram, moment = d.X.T @ d.X / len(d.X), d.X.T @ d.y / len(d.X)
    return _calls(d, lambda u: at(u, gram, moment), lambda u: at(u, d.X.T @ d.X / len(d.X), d.X.T @ d.y / len(d.X)))


BY_HAND = "normal equations by hand"
SWEEP = "bilevel ClosedForm.sweep"
OURS = ["bilevel ClosedForm", "bilevel Newton, Implicit(Direct)"]

PROBLEMS = [
    Problem(
        key="p1i",
        title="P1i: ridge, breast_cancer (341 x 30), one penalty, exact implicit hypergradient",
        words="Those with the Gram matrix by hand keep it from penalty to penalty. Reference: 50-digit arithmetic.",
        sizes={"full": {}, "quick": {}},
        data=data,
        reference=reference,
        tasks={
            "penalties": Task("penalty after penalty", tolerance=1e-8, per=PENALTIES, unit="penalty"),
            "scratch": Task("one hypergradient, from the data", tolerance=1e-8),
        },
        contestants=[
            Contestant(OURS[0], lambda d: _ours(d, "closed form"), "bilevel", "eigenbasis kept"),
            Contestant(OURS[1], lambda d: _ours(d, "implicit"), "bilevel"),
            Contestant(SWEEP, _sweep, "bilevel", "all penalties at once"),
            Contestant("optimistix Newton", lambda d: _optimistix(d, False), "optimistix", "on the loss"),
            Contestant("optimistix Newton, Gram by hand", lambda d: _optimistix(d, True), "optimistix", BY_HAND),
            Contestant("jaxopt custom_root, Gram by hand", _jaxopt, "jaxopt", BY_HAND),
            Contestant("torch Cholesky by hand", _torch_by_hand, "torch", BY_HAND),
            Contestant("scipy Cholesky by hand", _scipy_by_hand, "scipy", "inner and outer formulas by hand"),
        ],
        asked=[
            Asked("penalties", OURS, ["optimistix Newton"], 4.5),
            Asked("scratch", OURS, ["optimistix Newton"], 1.5),
            Asked("penalties", [SWEEP], ["optimistix*", "jaxopt*"], None, words="all at once, against each"),
            Asked("penalties", OURS, ["*by hand"], None, words="formulas by hand"),
            Asked("scratch", OURS, ["*by hand"], None, words="formulas by hand"),
        ],
    ),
    Problem(
        key="p1l",
        title="P1l: ridge, 20,000 x 2,000, one penalty, exact implicit hypergradient",
        words="This library makes the Gram matrix in its first call; by hand it is there before. Reference: Cholesky "
        "factor and one step of refinement with 80-bit residuals, in NumPy.",
        sizes={"full": {"rows": 20_000, "features": 2000}, "quick": {"rows": 2000, "features": 300}},
        data=large_data,
        reference=refined,
        tasks={"penalties": Task("one hypergradient", tolerance=1e-8)},
        contestants=[
            Contestant(OURS[0], lambda d: _kept(_ours(d, "closed form")), "bilevel"),
            Contestant(BEFORE, earlier(lambda d: _kept(_ours(d, "closed form")))),
            Contestant("scipy Cholesky by hand", lambda d: _kept(_scipy_by_hand(d)), "scipy"),
        ],
        asked=[
            Asked("penalties", OURS[:1], [], measure="first_cpu", at_most=0.4),
            Asked("penalties", OURS[:1], ["scipy*"]),
        ],
    ),
]
