"""P2: logistic regression, 20,000 x 500, 500 penalties: first hypergradient, 10 warm outer steps; P2w: few rows."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import implicit_peers as peers
import numpy as np
from contest import Asked, Contestant, Problem, Task
from shared import BEFORE, earlier


def data(rows: int, features: int, steps: int, seed: int) -> SimpleNamespace:
    """Return Gaussian features of different scales, noisy labels -1/+1, and the start of the log penalties."""
    random = np.random.default_rng(seed)
    scales = np.linspace(0.2, 2.0, features)
    X, X_val = (random.standard_normal((rows, features)) * scales for _ in range(2))
    weights = random.standard_normal(features) / np.sqrt(features)
    y, y_val = (np.where(Z @ weights + random.standard_normal(rows) > 0, 1.0, -1.0) for Z in (X, X_val))
    u = np.full(features, -6.0)
    return SimpleNamespace(X=X, y=y, X_val=X_val, y_val=y_val, steps=steps, u=u, size=features)


def formulas(d: SimpleNamespace) -> SimpleNamespace:
    """Return what `implicit_peers` needs, in NumPy."""
    from scipy.special import expit

    n, m = len(d.y), len(d.y_val)

    def inner(w: Any, u: Any) -> tuple[float, Any]:
        z, penalty = d.y * (d.X @ w), np.exp(u)
        value = np.logaddexp(0.0, -z).mean() + 0.5 * (penalty * w) @ w
        return value, d.X.T @ (-d.y * expit(-z)) / n + penalty * w

    def curvature(w: Any) -> Any:
        z = d.X @ w
        return expit(z) * expit(-z) / n

    def products(w: Any, u: Any) -> Any:
        bend, penalty = curvature(w), np.exp(u)
        return lambda v: d.X.T @ (bend * (d.X @ v)) + penalty * v

    return SimpleNamespace(
        inner=inner,
        products=products,
        hessian=lambda w, u: (d.X.T * curvature(w)) @ d.X + np.diag(np.exp(u)),
        outer_gradient=lambda w: d.X_val.T @ (-d.y_val * expit(-d.y_val * (d.X_val @ w))) / m,
        pull=lambda w, u, adjoint: -np.exp(u) * w * adjoint,
    )


def ours(d: SimpleNamespace, kind: str) -> dict[str, Any]:
    """Return the calls of this library, the inner solver being "quasi-Newton" or "Newton"."""
    import torch

    import bilevel as bl

    parts = [torch.as_tensor(part) for part in (d.X, d.y, d.X_val, d.y_val)]
    problem = bl.problems.LogisticProblem(*parts, penalty="per_feature")
    newton = bl.Newton(linear_solver=bl.CG(), tol=peers.TOL) if kind == "Newton" else None
    return peers.ours(problem, newton or bl.QuasiNewton(tol=peers.TOL), d)


def jaxopt(d: SimpleNamespace) -> dict[str, Any]:
    """Return the calls of jaxopt."""
    import jax.numpy as jnp

    X, y, X_val, y_val = (jnp.asarray(part) for part in (d.X, d.y, d.X_val, d.y_val))

    def inner(w: Any, u: Any) -> Any:
        return jnp.mean(jnp.logaddexp(0.0, -y * (X @ w))) + 0.5 * jnp.sum(jnp.exp(u) * w * w)

    return peers.jaxopt(inner, lambda w: jnp.mean(jnp.logaddexp(0.0, -y_val * (X_val @ w))), d)


def _torch_losses(d: SimpleNamespace) -> tuple[Any, Any]:
    import torch

    X, y, X_val, y_val = (torch.as_tensor(part) for part in (d.X, d.y, d.X_val, d.y_val))
    softplus = torch.nn.functional.softplus

    def inner(w: Any, u: Any) -> Any:
        return softplus(-y * (X @ w)).mean() + 0.5 * (u.exp() * w * w).sum()

    return inner, lambda w: softplus(-y_val * (X_val @ w)).mean()


def torch_by_hand(d: SimpleNamespace) -> dict[str, Any]:
    """Return the first hypergradient by torch's L-BFGS and CG; ten of them would take it a minute."""
    return {"first": peers.torch_by_hand(*_torch_losses(d), d)["first"]}


OURS = ["bilevel QuasiNewton, Implicit(CG)", "bilevel Newton(CG), Implicit(CG)"]

CONTESTANTS = [
    Contestant(OURS[0], lambda d: ours(d, "quasi-Newton"), "bilevel"),
    Contestant(OURS[1], lambda d: ours(d, "Newton"), "bilevel"),
    Contestant("jaxopt LBFGS, implicit CG", jaxopt, "jaxopt", compiles="first"),
    Contestant("scipy L-BFGS, CG by hand", lambda d: peers.scipy(formulas(d), d), "scipy", "formulas by hand"),
    Contestant("torch L-BFGS, CG by hand", torch_by_hand, "torch", "no loop"),
    Contestant("torchopt custom_root, CG", lambda d: peers.torchopt(*_torch_losses(d), d), "torchopt", "no warm loop"),
]
BEFORE_CONTESTANT = Contestant(
    BEFORE, earlier(lambda d: ours(d, "quasi-Newton")), note="QuasiNewton, an earlier commit, by git"
)

PROBLEMS = [
    Problem(
        key="p2",
        title="P2: logistic regression, 20,000 x 500, 500 penalties",
        words="Inner gradient norm 1e-8, adjoint residual 1e-8. The loop is 10 steps of Adam at rate 0.1, warm "
        "started; its answer is the last hypergradient. Reference: dense Newton to the rounding floor, in NumPy.",
        sizes={
            "full": {"rows": 20_000, "features": 500, "steps": 10},
            "quick": {"rows": 2_000, "features": 100, "steps": 5},
        },
        data=data,
        reference=lambda d: peers.dense_newton(formulas(d), d),
        tasks={
            "first": Task("first hypergradient", rounds=5),
            "loop": Task("all warm outer steps", tolerance=1e-3, rounds=3, timeout=900.0),
        },
        contestants=CONTESTANTS,
        asked=[
            Asked("first", OURS, ["jaxopt*"], 2.0, 5.0),
            Asked("loop", OURS, ["jaxopt*"], 8.0, 17.0),
            Asked("first", OURS, ["jaxopt*"], 2.0, 5.0, measure="wall"),
            Asked("loop", OURS, ["jaxopt*"], 8.0, 17.0, measure="wall"),
            Asked("first", OURS, ["torch*"], None, words="fastest torch peer"),
            Asked("first", OURS, ["scipy*"], None),
            Asked("loop", OURS, ["scipy*"], None),
        ],
        absent=peers.ABSENT,
    ),
    Problem(
        key="p2w",
        title="P2w: logistic regression, 200 x 1,000, 1,000 penalties",
        words="P2 with more features than rows. Inner gradient norm 1e-8, adjoint residual 1e-8. Reference: dense "
        "Newton to the rounding floor, in NumPy.",
        sizes={
            "full": {"rows": 200, "features": 1000, "steps": 1},
            "quick": {"rows": 100, "features": 200, "steps": 1},
        },
        data=data,
        reference=lambda d: {"first": peers.dense_newton(formulas(d), d)["first"]},
        tasks={"first": Task("first hypergradient")},
        contestants=[*CONTESTANTS, BEFORE_CONTESTANT],
        asked=[
            Asked("first", OURS[:1], [], at_most=0.010),
            Asked("first", OURS, [BEFORE]),
            Asked("first", OURS, ["jaxopt*"]),
            Asked("first", OURS, ["scipy*"]),
        ],
        absent=peers.ABSENT,
    ),
]
