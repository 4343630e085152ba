"""Implicit hypergradients as the peers compute them, for any smooth inner loss over a flat vector of weights.

All solve the inner problem to a gradient norm of `TOL` and the adjoint system to a relative residual of `TOL`. `d`
holds the first hyperparameters `u`, the number of weights `size` and of outer `steps`. Tasks: "first", the
hypergradient at ``d.u`` from zero weights; "loop", all warm outer steps by Adam, whose answer is the last one.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any

import numpy as np
from shared import adam, conjugate_gradients, torch_adam, warm_torch

TOL = 1e-8


def _tasks(hypergradient: Callable[[Any, dict[str, Any]], Any], cold: Callable[[], dict[str, Any]], d: Any) -> Any:
    """Return both tasks from a hypergradient that takes and changes a warm start."""

    def loop() -> Any:
        state = cold()
        return adam(lambda u: hypergradient(u, state), d.u, d.steps)

    return {"first": lambda: hypergradient(d.u, cold()), "loop": loop}


def dense_newton(f: SimpleNamespace, d: Any) -> dict[str, Any]:
    """Return the reference: dense Newton steps to the rounding floor and a Cholesky factor, in NumPy."""
    from scipy.linalg import cho_factor, cho_solve

    def hypergradient(u: Any, state: dict[str, Any]) -> Any:
        w = state["w"]
        for _ in range(50):
            factor = cho_factor(f.hessian(w, u))
            step = cho_solve(factor, f.inner(w, u)[1])
            length = np.linalg.norm(step)
            # A long step need not lower the gradient norm: it is halved until it does.
            t, norm = 1.0, np.linalg.norm(f.inner(w, u)[1])
            while length > 1e-6 and np.linalg.norm(f.inner(w - t * step, u)[1]) > norm:
                t /= 2
            w = w - t * step
            # Convergence is quadratic: after a step this short the factor belongs to the solution as well.
            if length <= 1e-9 * np.linalg.norm(w):
                break
        state["w"] = w = w - cho_solve(factor, f.inner(w, u)[1])
        return f.pull(w, u, cho_solve(factor, f.outer_gradient(w)))

    return {name: call() for name, call in _tasks(hypergradient, lambda: {"w": np.zeros(d.size)}, d).items()}


def ours(problem: Any, solver: Any, d: Any) -> dict[str, Any]:
    """Return both tasks by this library, for weights of any shape."""
    import torch

    import bilevel as bl

    warm_torch()
    estimator = bl.Implicit(bl.CG(tol=TOL))
    u = torch.as_tensor(d.u).reshape(problem.hparams_shape())

    def loop() -> Any:
        outer = bl.OuterOptimizer(problem, solver, estimator, u, optimizer=torch_adam)
        for _ in range(d.steps):
            estimate = outer.step()
        return estimate

    return {"first": lambda: bl.hypergradient(problem, solver, estimator, u), "loop": loop}


def jaxopt(inner: Any, outer: Any, d: Any) -> dict[str, Any]:
    """Return both tasks by jaxopt's L-BFGS and implicit differentiation with conjugate gradients, compiled as one."""
    import jax
    import jax.numpy as jnp
    import jaxopt as package

    solve = partial(package.linear_solve.solve_cg, tol=TOL, maxiter=5000)
    solver = package.LBFGS(inner, tol=TOL, maxiter=5000, implicit_diff=True, implicit_diff_solve=solve)

    def after(u: Any, start: Any) -> tuple[Any, Any]:
        w = solver.run(start, u).params
        return outer(w), w

    gradient = jax.jit(jax.grad(after, has_aux=True))

    def hypergradient(u: Any, state: dict[str, Any]) -> Any:
        value, state["w"] = gradient(jnp.asarray(u), state["w"])
        return np.asarray(value)

    return _tasks(hypergradient, lambda: {"w": jnp.zeros(d.size)}, d)


def scipy(f: SimpleNamespace, d: Any) -> dict[str, Any]:
    """Return both tasks by SciPy's L-BFGS and conjugate gradients on formulas written by hand."""
    from scipy.optimize import minimize

    # L-BFGS-B stops by the largest component; so small a bound on it keeps the norm below TOL.
    options = {"gtol": TOL / d.size**0.5, "ftol": 0.0, "maxiter": 20_000, "maxfun": 20_000, "maxcor": 20}

    def hypergradient(u: Any, state: dict[str, Any]) -> Any:
        w = minimize(f.inner, state["w"], args=(u,), jac=True, method="L-BFGS-B", options=options).x
        adjoint = conjugate_gradients(f.products(w, u), f.outer_gradient(w), state["adjoint"], TOL)
        state |= {"w": w, "adjoint": adjoint}
        return f.pull(w, u, adjoint)

    return _tasks(hypergradient, lambda: {"w": np.zeros(d.size), "adjoint": np.zeros(d.size)}, d)


def torch_lbfgs(inner: Any, start: Any, u: Any) -> Any:
    """Return the inner solution by torch's L-BFGS with strong Wolfe conditions."""
    import torch

    w = start.detach().clone().requires_grad_()
    lbfgs = torch.optim.LBFGS(
        [w], max_iter=20_000, max_eval=40_000, history_size=20, tolerance_grad=TOL / w.numel() ** 0.5,
        tolerance_change=0.0, line_search_fn="strong_wolfe",
    )  # fmt: skip

    def closure() -> Any:
        lbfgs.zero_grad()
        loss = inner(w, u)
        loss.backward()
        return loss

    lbfgs.step(closure)
    return w.detach()


def torch_by_hand(inner: Any, outer: Any, d: Any) -> dict[str, Any]:
    """Return both tasks by torch's L-BFGS and conjugate gradients on double-backward products."""
    import torch

    warm_torch()

    def hypergradient(u: Any, state: dict[str, Any]) -> Any:
        hparams = torch.as_tensor(u).clone().requires_grad_()
        w = torch_lbfgs(inner, state["w"], hparams.detach()).requires_grad_()
        (gradient,) = torch.autograd.grad(inner(w, hparams), w, create_graph=True)
        (b,) = torch.autograd.grad(outer(w), w)
        products = lambda v: torch.autograd.grad(gradient, w, v, retain_graph=True)[0]  # noqa: E731
        adjoint = conjugate_gradients(products, b, state["adjoint"], TOL)
        state |= {"w": w.detach(), "adjoint": adjoint}
        return -torch.autograd.grad(gradient, hparams, adjoint)[0]

    def cold() -> dict[str, Any]:
        w, adjoint = torch.zeros(2, d.size, dtype=torch.float64)
        return {"w": w, "adjoint": adjoint}

    return _tasks(hypergradient, cold, d)


def torchopt(inner: Any, outer: Any, d: Any) -> dict[str, Any]:
    """Return the first hypergradient by torchopt's implicit decorator around torch's L-BFGS."""
    import torch
    import torchopt as package

    warm_torch()
    solve_cg = package.linear_solve.solve_cg(rtol=TOL, atol=0.0)

    @package.diff.implicit.custom_root(torch.func.grad(inner), argnums=1, solve=solve_cg)
    def solve(w: Any, u: Any) -> Any:
        return torch_lbfgs(inner, w, u.detach()).requires_grad_()

    def first() -> Any:
        u = torch.as_tensor(d.u).clone().requires_grad_()
        w = solve(torch.zeros(d.size, dtype=u.dtype, requires_grad=True), u)
        return torch.autograd.grad(outer(w), u)[0]

    return {"first": first}


ABSENT = {
    "hypertorch (FAR-HO's successor)": "not on PyPI; its conjugate gradients on double-backward products are the row "
    "by hand",
    "hypergrad": "needs torchvision, which would replace this torch",
}
