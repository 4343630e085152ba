"""P7: whole tuning on small data, ridge and logistic regression: 40 warm steps of Adam, and one penalty."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from types import SimpleNamespace
from typing import Any

import implicit_peers as peers
import numpy as np
import p2_logistic
from contest import Asked, Contestant, Problem, Task
from shared import BEFORE, OUTER_RATE, conjugate_gradients, earlier, torch_adam, warm_torch

EXCESS = 1e-3
"""A tuning ends at an outer loss so far above the least one, relative to it."""
FIRST, LOWEST, HIGHEST = 2.0, -9.0, 3.0
"""Log penalties: where a tuning begins, and the range that holds the best one."""


def data(kind: str, rows: int, features: int, steps: int, seed: int) -> SimpleNamespace:
    """Return Gaussian features, half of which tell nothing, with noisy targets, numbers or -1/+1."""
    random = np.random.default_rng(seed)
    X, X_val = random.standard_normal((2, rows, features))
    truth = random.standard_normal(features) * (np.arange(features) % 2)
    y, y_val = (Z @ truth + 2.0 * random.standard_normal(rows) for Z in (X, X_val))
    if kind == "logistic":
        y, y_val = np.sign(y), np.sign(y_val)
    d = SimpleNamespace(X=X, y=y, X_val=X_val, y_val=y_val, steps=steps, u=np.full(features, -3.0), size=features)
    d.kind = kind
    best = min(exact_loss(d, u) for u in np.linspace(LOWEST, HIGHEST, 61))
    d.goal = best * (1.0 + EXCESS)
    return d


def formulas(d: SimpleNamespace) -> SimpleNamespace:
    """Return what `implicit_peers` needs, in NumPy."""
    if d.kind == "logistic":
        f = p2_logistic.formulas(d)
        f.outer = lambda w: np.logaddexp(0.0, -d.y_val * (d.X_val @ w)).mean()
        return f
    n, gram, moment = len(d.y), d.X.T @ d.X / len(d.y), d.X.T @ d.y / len(d.y)

    def inner(w: Any, u: Any) -> tuple[float, Any]:
        residual, penalty = d.X @ w - d.y, np.exp(u)
        return 0.5 * (residual @ residual / n + (penalty * w) @ w), d.X.T @ residual / n + penalty * w

    return SimpleNamespace(
        inner=inner,
        products=lambda w, u: lambda v: gram @ v + np.exp(u) * v,
        hessian=lambda w, u: gram + np.diag(np.exp(u)),
        outer_gradient=lambda w: d.X_val.T @ (d.X_val @ w - d.y_val) / len(d.y_val),
        pull=lambda w, u, adjoint: -np.exp(u) * w * adjoint,
        outer=lambda w: 0.5 * np.square(d.X_val @ w - d.y_val).mean(),
        gram=gram,
        moment=moment,
    )


def exact_loss(d: SimpleNamespace, u: float) -> float:
    """Return the outer loss at one penalty for all features, by dense Newton steps."""
    f, penalties, w = formulas(d), np.full(d.size, float(u)), np.zeros(d.size)
    for _ in range(30):
        step = np.linalg.solve(f.hessian(w, penalties), f.inner(w, penalties)[1])
        w = w - step
        if np.linalg.norm(step) <= 1e-10 * np.linalg.norm(w):
            break
    return float(f.outer(w))


def reference(d: SimpleNamespace) -> dict[str, Any]:
    """Return the last hypergradient of the steps of Adam, and the least outer loss of one penalty."""
    from scipy.optimize import minimize_scalar

    best = minimize_scalar(partial(exact_loss, d), bounds=(LOWEST, HIGHEST), method="bounded", options={"xatol": 1e-6})
    return {"steps": peers.dense_newton(formulas(d), d)["loop"], "tune": [best.fun]}


def grade(d: SimpleNamespace, task: str, answer: list[float]) -> list[float]:
    """Return the loss at the penalty that a tuning has found."""
    return [exact_loss(d, answer[0])] if task == "tune" else answer


# This library ---------------------------------------------------------------------------------------------------------


def ours(d: SimpleNamespace, kind: str) -> dict[str, Any]:
    """Return the calls of this library, with the inner solver and estimator that `kind` says."""
    import torch

    import bilevel as bl

    warm_torch()
    parts = [torch.as_tensor(part) for part in (d.X, d.y, d.X_val, d.y_val)]
    made = bl.problems.LogisticProblem if d.kind == "logistic" else bl.problems.RidgeProblem
    problem, tied = (made(*parts, penalty=penalty) for penalty in ("per_feature", "scalar"))
    solver, estimator = {
        "Auto": lambda: (bl.QuasiNewton(tol=peers.TOL), "auto"),
        "ClosedForm": lambda: (bl.Newton(), bl.ClosedForm()),
        "Newton": lambda: (bl.Newton(tol=peers.TOL), bl.Implicit(bl.Direct())),
        "QuasiNewton": lambda: (bl.QuasiNewton(tol=peers.TOL), bl.Implicit(bl.CG(tol=peers.TOL))),
    }[kind]()

    def steps() -> Any:
        outer = bl.OuterOptimizer(problem, solver, estimator, torch.as_tensor(d.u), optimizer=torch_adam)
        for _ in range(d.steps):
            estimate = outer.step()
        return estimate

    def tune() -> Any:
        reached = lambda outer, estimate: estimate.outer_loss <= d.goal  # noqa: E731
        first = torch.tensor(FIRST, dtype=torch.float64)
        outer = bl.OuterOptimizer(tied, solver, estimator, first, callbacks=[reached])
        return outer.run(100, progress=False).best_hparams

    return {"steps": steps, "tune": tune}


# Peers ----------------------------------------------------------------------------------------------------------------


def by_jax(d: SimpleNamespace, rate: float) -> dict[str, Any]:
    """Return the calls of two programs that jax compiles whole: warm Newton steps, Cholesky factors, Adam.

    Args:
        d: the data.
        rate: of the Adam that tunes one penalty.
    """
    import jax
    import jax.numpy as jnp
    from jax.scipy.linalg import cho_factor, cho_solve

    X, y, X_val, y_val = (jnp.asarray(part) for part in (d.X, d.y, d.X_val, d.y_val))
    n, gram, moment = len(d.y), X.T @ X / len(d.y), X.T @ y / len(d.y)

    def gradient(w: Any, penalty: Any) -> Any:
        return X.T @ (-y * jax.nn.sigmoid(-y * (X @ w))) / n + penalty * w

    def factor(w: Any, penalty: Any) -> Any:
        p = jax.nn.sigmoid(X @ w)
        return cho_factor((X.T * (p * (1.0 - p) / n)) @ X + jnp.diag(penalty))

    def solved(w: Any, penalty: Any) -> tuple[Any, Any]:
        if d.kind == "ridge":
            made = cho_factor(gram + jnp.diag(penalty))
            return cho_solve(made, moment), made
        unsolved = lambda w: jnp.linalg.norm(gradient(w, penalty)) > peers.TOL  # noqa: E731
        newton = lambda w: w - cho_solve(factor(w, penalty), gradient(w, penalty))  # noqa: E731
        w = jax.lax.while_loop(unsolved, newton, w)
        return w, factor(w, penalty)

    def outer(w: Any) -> Any:
        z = X_val @ w
        return jnp.mean(jnp.logaddexp(0.0, -y_val * z)) if d.kind == "logistic" else 0.5 * jnp.mean((z - y_val) ** 2)

    def step(u: Any, state: Any, rate: float, one: bool) -> Any:
        w, first, second, count, _, _ = state
        penalty = jnp.exp(u) * jnp.ones(d.size)
        w, made = solved(w, penalty)
        value, slope = jax.value_and_grad(outer)(w)
        pulled = -penalty * w * cho_solve(made, slope)
        pulled, count = (jnp.sum(pulled) if one else pulled), count + 1
        first, second = 0.9 * first + 0.1 * pulled, 0.999 * second + 0.001 * pulled**2
        change = (first / (1 - 0.9**count)) / (jnp.sqrt(second / (1 - 0.999**count)) + 1e-8)
        return u - rate * change, (w, first, second, count, value, pulled)

    def begun(u: Any) -> Any:
        return u, (jnp.zeros(d.size), jnp.zeros_like(u), jnp.zeros_like(u), 0.0, jnp.inf, jnp.zeros_like(u))

    def steps(u: Any) -> Any:
        each = lambda pair, _: (step(*pair, OUTER_RATE, False), None)  # noqa: E731
        return jax.lax.scan(each, begun(u), length=d.steps)[0][1][-1]

    def tune(u: Any) -> Any:
        above = lambda triple: triple[2][4] > d.goal  # noqa: E731
        each = lambda triple: (triple[1], *step(triple[1], triple[2], rate, True))  # noqa: E731
        return jax.lax.while_loop(above, each, (u, *begun(u)))[0]

    compiled, first, u = (jax.jit(steps), jax.jit(tune)), jnp.asarray(FIRST), jnp.asarray(d.u)
    return {"steps": lambda: compiled[0](u).block_until_ready(), "tune": lambda: compiled[1](first).block_until_ready()}


def hoag(d: SimpleNamespace) -> dict[str, Any]:
    """Return the tuning of HOAG (Pedregosa 2016, algorithm 1) by hand: accuracies that grow from step to step."""
    from scipy.optimize import minimize

    f = formulas(d)

    def tune() -> Any:
        u, old, accuracy, lipschitz = FIRST, np.inf, 0.1, 0.0
        w = adjoint = np.zeros(d.size)
        for _ in range(500):
            penalties, accuracy = np.full(d.size, u), max(0.9 * accuracy, 1e-9)
            options = {"gtol": accuracy / d.size**0.5, "ftol": 0.0, "maxcor": 20, "maxiter": 10_000}
            w = minimize(f.inner, w, args=(penalties,), jac=True, method="L-BFGS-B", options=options).x
            value = f.outer(w)
            if value <= d.goal:
                break
            # As in the author's code: longer steps while the loss falls, shorter ones where it rises.
            lipschitz *= 0.8 if value <= old else 2.0
            adjoint = conjugate_gradients(f.products(w, penalties), f.outer_gradient(w), adjoint, accuracy)
            slope, old = f.pull(w, penalties, adjoint).sum(), value
            lipschitz = lipschitz or abs(slope)
            u = u - slope / lipschitz
        return u

    return {"tune": tune}


def by_scikit_learn(d: SimpleNamespace, points: int) -> dict[str, Any]:
    """Return the tuning of LogisticRegressionCV over a grid, with the validation rows as its only fold."""
    import warnings

    from sklearn.linear_model import LogisticRegressionCV

    warnings.simplefilter("ignore", FutureWarning)
    n = len(d.y)
    X, y = np.concatenate([d.X, d.X_val]), np.concatenate([d.y, d.y_val])
    fold = [(np.arange(n), np.arange(n, len(y)))]
    grid = 1.0 / (n * np.exp(np.linspace(LOWEST, HIGHEST, points)))

    def tune() -> Any:
        model = LogisticRegressionCV(
            Cs=grid, cv=fold, scoring="neg_log_loss", fit_intercept=False, refit=False, max_iter=1000
        )
        return -np.log(n * float(np.ravel(model.fit(X, y).C_)[0]))

    return {"tune": tune}


AUTO, BY_JAX = "bilevel Auto", "jax, compiled whole"


def _problem(key: str, kind: str, entries: Sequence[str], rows: int, features: int, asked: Sequence[Asked]) -> Problem:
    def contestant(name: str) -> Contestant:
        return Contestant(f"bilevel {name}", lambda d: ours(d, name), "bilevel")

    def by_scipy(d: SimpleNamespace) -> dict[str, Any]:
        return {"steps": peers.scipy(formulas(d), d)["loop"]}

    before: Callable[[Any], Any] = earlier(lambda d: {"steps": ours(d, entries[0])["steps"]})
    sklearn = [Contestant("LogisticRegressionCV", lambda d: by_scikit_learn(d, 25), "scikit-learn", "25 penalties")]
    return Problem(
        key=key,
        title=f"P7: whole tuning, {kind} regression, {rows} x {features}",
        words=f"40 steps of Adam at rate 0.1 move {features} penalties, warm started, at an inner gradient norm of "
        "1e-8; the answer is the last hypergradient. One penalty is tuned from exp(2) until the validation loss is "
        "within 0.1 % of the least one; each contestant is told that loss, and the exact loss at its answer is what is "
        "compared. Reference: dense Newton, in NumPy.",
        sizes={
            "full": {"rows": rows, "features": features, "steps": 40},
            "quick": {"rows": rows, "features": features, "steps": 5},
        },
        data=partial(data, kind),
        reference=reference,
        tasks={
            "steps": Task("40 warm outer steps (quick: 5)", tolerance=1e-5),
            "tune": Task("one penalty, to equal loss", tolerance=2 * EXCESS),
        },
        contestants=[
            *map(contestant, (*entries, "Auto")),
            Contestant(BEFORE, before, note=f"{entries[0]}, an earlier commit, by git"),
            Contestant(BY_JAX, lambda d: by_jax(d, 0.5), "jax", "formulas by hand", compiles="*"),
            Contestant("scipy L-BFGS, CG by hand", by_scipy, "scipy", "formulas by hand"),
            Contestant("HOAG by hand", hoag, "scipy", "formulas by hand"),
            *(sklearn if kind == "logistic" else []),
        ],
        asked=[
            *asked,
            Asked("tune", ["bilevel *"], [BY_JAX]),
            Asked("tune", ["bilevel *"], ["HOAG*"]),
            *([Asked("tune", ["bilevel *"], ["LogisticRegressionCV"])] if kind == "logistic" else []),
        ],
        grade=grade,
    )


EACH = ["bilevel *"]
PROBLEMS = [
    _problem("p7r", "ridge", ["ClosedForm"], 341, 30, [Asked("steps", EACH, [BY_JAX]), Asked("steps", EACH, [BEFORE])]),
    _problem("p7", "logistic", ["QuasiNewton", "Newton"], 341, 30, [Asked("steps", EACH, [BY_JAX], 0.7)]),
    _problem(
        "p7w", "logistic", ["QuasiNewton", "Newton"], 600, 50,
        [Asked("steps", EACH, [BEFORE], 4.0), Asked("steps", EACH, [BY_JAX])],
    ),
]  # fmt: skip
