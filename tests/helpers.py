"""Shared factories: one table per kind. A new export needs one row here, and enters every suite by existing."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor

import bilevel as bl
from bilevel.problems import (
    HuberProblem,
    LogisticProblem,
    PoissonProblem,
    QuadraticProblem,
    RidgeProblem,
    SampleWeightProblem,
    SoftmaxProblem,
    SquaredHingeProblem,
)

F64 = torch.float64
STEP, MOMENTUM = 0.1, 0.5


def normal(seed: int, *shape: int) -> Tensor:
    """Standard normal numbers that are the same on every machine."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def spd(seed: int, size: int, condition: float = 10.0) -> Tensor:
    """A symmetric positive definite matrix with spectrum [1, condition]."""
    basis, _ = torch.linalg.qr(normal(seed, size, size))
    matrix = basis @ torch.diag(torch.linspace(1.0, condition, size, dtype=F64)) @ basis.t()
    return (matrix + matrix.t()) / 2


def exported(package: ModuleType, base: type) -> list[type]:
    """The concrete classes of a kind that a package exports."""
    classes = (value for value in vars(package).values() if inspect.isclass(value))
    return [cls for cls in classes if issubclass(cls, base) and not inspect.isabstract(cls)]


class Frame:
    """What data frames of pandas and polars have in common."""

    def __init__(self, columns: dict[str, Any]) -> None:
        self.columns = list(columns)
        self._columns = columns

    def __getitem__(self, name: str) -> Any:
        column = self._columns[name]
        return column if isinstance(column, np.ndarray) else np.array(column, dtype=object)


def write_npz(folder: Path, **arrays: Any) -> str:
    """Write arrays to a file, and return its path."""
    path = folder / "arrays.npz"
    np.savez(path, **{name: np.asarray(values) for name, values in arrays.items()})
    return str(path)


def numbered(rows: int = 40, features: int = 3) -> tuple[np.ndarray, np.ndarray]:
    """Data whose first feature is the number of the row, so that a split can be read back."""
    X = np.random.default_rng(0).normal(size=(rows, features))
    X[:, 0] = np.arange(rows)
    return X, np.arange(rows) * 0.5


# Trees, moved to vectors and back by arithmetic that the package has no part in ------------------------------------


def flat(tree: Any) -> Tensor:
    """All numbers of a tree as one vector, dicts in insertion order."""
    if isinstance(tree, Tensor):
        return tree.reshape(-1)
    parts = tree.values() if isinstance(tree, dict) else tree
    return torch.cat([flat(part) for part in parts]) if len(parts) else torch.zeros(0, dtype=F64)


def shaped(vector: Tensor, like: Any) -> Any:
    """The vector in the structure of `like`."""
    if isinstance(like, Tensor):
        return vector.reshape(like.shape)
    result, start = {}, 0
    for key, part in like.items():
        size = flat(part).numel()
        result[key] = shaped(vector[start : start + size], part)
        start += size
    return result


PARAMS = {
    "tensor": torch.zeros(5, dtype=F64),
    "0-d": torch.zeros((), dtype=F64),
    "one": torch.zeros(1, dtype=F64),
    "matrix": torch.zeros(2, 3, dtype=F64),
    "dict": {"a": torch.zeros(2, dtype=F64), "b": {"c": torch.zeros((), dtype=F64), "d": torch.zeros(2, 2, dtype=F64)}},
}
HPARAMS = {
    "tensor": torch.tensor([-0.3, 0.4], dtype=F64),
    "dict": {"penalty": torch.tensor(-0.3, dtype=F64), "shift": torch.tensor([0.4], dtype=F64)},
}


# Cases: a problem beside its dense algebra --------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """A problem, where to differentiate it, and its derivatives on flat vectors (x, u), written without the package."""

    problem: bl.BilevelProblem
    hparams: Any
    start: Any
    grad: Callable[[Tensor, Tensor], Tensor]
    hessian: Callable[[Tensor, Tensor], Tensor]
    cross: Callable[[Tensor, Tensor], Tensor]
    outer: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]

    def solution(self) -> Tensor:
        """The inner solution, by Newton's method on dense matrices."""
        x, u = flat(self.start).clone(), flat(self.hparams)
        for _ in range(50):
            step = torch.linalg.solve(self.hessian(x, u), self.grad(x, u))
            x = x - step
            # Convergence is quadratic: the next step would be below rounding.
            if float(step.norm()) <= 1e-9 * float(x.norm()):
                break
        return x

    def hypergradient(self) -> Tensor:
        """The exact hypergradient, by the implicit function theorem on dense matrices."""
        x, u = self.solution(), flat(self.hparams)
        by_x, by_u = self.outer(x, u)
        return by_u - self.cross(x, u).t() @ torch.linalg.solve(self.hessian(x, u), by_x)


LOOKED_AT: dict[tuple[str, str, int], Any] = {}
"""Whether the losses of a `tree_case` have been looked at."""


def tree_case(params: str = "tensor", hparams: str = "tensor", seed: int = 0) -> Case:
    """A smooth strongly convex inner loss on any tree, whose outer loss depends on the hyperparameters directly."""
    like, u_like = PARAMS[params], HPARAMS[hparams]
    n = flat(like).numel()
    A, b, s, c, target = spd(seed, n, 4.0), normal(seed + 1, n), normal(seed + 2, n), normal(seed + 3, n), normal(9, n)

    def inner(x: Tensor, u: Tensor) -> Tensor:
        return x @ (0.5 * (A @ x + u[0].exp() * x) + b + u[1] * s) + 0.2 * (x - c).cosh().log().sum()

    def outer(x: Tensor, u: Tensor) -> Tensor:
        return 0.5 * (x - target) @ (x - target) + 0.3 * u @ u + u[0] * x.sum()

    problem = bl.BilevelProblem(
        lambda p, h: inner(flat(p), flat(h)), lambda p, h: outer(flat(p), flat(h)), shaped(normal(seed + 4, n), like)
    )
    # Its losses are looked at once, not in every test; tests/oracles/test_purity.py is about the look.
    problem.purity = LOOKED_AT.setdefault((params, hparams, seed), problem.purity)
    grad = torch.func.grad(inner)
    return Case(
        problem,
        u_like,
        problem.params,
        grad,
        torch.func.jacrev(grad),
        torch.func.jacrev(grad, argnums=1),
        torch.func.grad(outer, argnums=(0, 1)),
    )


def quadratic_case(size: int = 6, count: int = 3) -> Case:
    """A quadratic: H(u) = H_0 + sum u_j H_j, b(u) = b_0 + sum u_j b_j."""
    problem = QuadraticProblem.random(size, count, condition=8.0, seed=3)
    H0, Hj, b0, bj, target = (
        problem.hessian,
        problem.hessian_directions,
        problem.linear,
        problem.linear_directions,
        problem.target,
    )

    def hessian(x: Tensor, u: Tensor) -> Tensor:
        return H0 + sum(u[j] * Hj[j] for j in range(count))

    return Case(
        problem,
        0.3 * normal(5, count),
        normal(6, size),
        lambda x, u: hessian(x, u) @ x + b0 + bj.t() @ u,
        hessian,
        lambda x, u: torch.stack([Hj[j] @ x + bj[j] for j in range(count)], 1),
        lambda x, u: (x - target, torch.zeros_like(u)),
    )


def regression_data(rows: int = 40, features: int = 5) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """X, y, X_val, y_val of a noisy linear model."""
    X, X_val, w = normal(11, rows, features), normal(12, rows // 2, features), normal(13, features)
    return X, X @ w + 0.5 * normal(14, rows), X_val, X_val @ w + 0.5 * normal(15, rows // 2)


def ridge_case(penalty: str = "per_feature") -> Case:
    """Ridge regression, mean loss, penalties exp(u)."""
    X, y, X_val, y_val = regression_data()
    n, m, d = len(X), len(X_val), X.shape[1]
    u = -1.0 + 0.5 * normal(16, d) if penalty == "per_feature" else torch.tensor(-0.7, dtype=F64)
    spread = torch.eye(d, dtype=F64) if penalty == "per_feature" else torch.ones(d, 1, dtype=F64)
    return Case(
        RidgeProblem(X, y, X_val, y_val, penalty=penalty),
        u,
        normal(17, d),
        lambda x, u: X.t() @ (X @ x - y) / n + (spread @ u).exp() * x,
        lambda x, u: X.t() @ X / n + torch.diag((spread @ u).exp()),
        lambda x, u: ((spread @ u).exp() * x)[:, None] * spread,
        lambda x, u: (X_val.t() @ (X_val @ x - y_val) / m, torch.zeros_like(u)),
    )


def logistic_case(penalty: str = "per_feature") -> Case:
    """Binary logistic regression, mean loss, penalties exp(u), labels -1 and +1."""
    X, y, X_val, y_val = regression_data()
    y, y_val = y.sign(), y_val.sign()
    n, m, d = len(X), len(X_val), X.shape[1]
    u = -2.0 + 0.5 * normal(18, d) if penalty == "per_feature" else torch.tensor(-1.5, dtype=F64)
    spread = torch.eye(d, dtype=F64) if penalty == "per_feature" else torch.ones(d, 1, dtype=F64)

    def slope(z: Tensor, y: Tensor) -> Tensor:
        return -y / (1 + (y * z).exp())

    def bend(z: Tensor) -> Tensor:
        return 1 / ((1 + z.exp()) * (1 + (-z).exp()))

    return Case(
        LogisticProblem(X, y, X_val, y_val, penalty=penalty),
        u,
        normal(19, d),
        lambda x, u: X.t() @ slope(X @ x, y) / n + (spread @ u).exp() * x,
        lambda x, u: (X.t() * bend(X @ x)) @ X / n + torch.diag((spread @ u).exp()),
        lambda x, u: ((spread @ u).exp() * x)[:, None] * spread,
        lambda x, u: (X_val.t() @ slope(X_val @ x, y_val) / m, torch.zeros_like(u)),
    )


def softmax_case() -> Case:
    """Softmax regression with a penalty for each class; dense algebra by torch.func on the loss written out here."""
    X, X_val = normal(21, 30, 3), normal(22, 20, 3)
    labels = (X @ normal(23, 3, 3)).argmax(1)
    labels_val = (X_val @ normal(23, 3, 3) + normal(24, 20, 3)).argmax(1)

    def cross_entropy(X: Tensor, y: Tensor, W: Tensor) -> Tensor:
        Z = X @ W.t()
        return (Z.exp().sum(1).log() - Z.gather(1, y[:, None])[:, 0]).mean()

    def inner(x: Tensor, u: Tensor) -> Tensor:
        W = x.reshape(3, 3)
        return cross_entropy(X, labels, W) + 0.5 * (u.exp()[:, None] * W * W).sum()

    def outer(x: Tensor, u: Tensor) -> Tensor:
        return cross_entropy(X_val, labels_val, x.reshape(3, 3)) + 0.0 * u.sum()

    grad = torch.func.grad(inner)
    return Case(
        SoftmaxProblem(X, labels, X_val, labels_val, penalty="per_class"),
        torch.tensor([-1.5, -1.0, -2.0], dtype=F64),
        normal(25, 3, 3),
        grad,
        torch.func.jacrev(grad),
        torch.func.jacrev(grad, argnums=1),
        torch.func.grad(outer, argnums=(0, 1)),
    )


def glm_case(family: type) -> Case:
    """A linear model of another loss, a penalty for each weight; torch.func on the loss written out."""
    X, z, X_val, z_val = regression_data()
    counts = family is PoissonProblem
    hinge = family is SquaredHingeProblem
    y, y_val = ((t.abs() / 3).round() if counts else t.sign() if hinge else t for t in (z, z_val))

    def loss(z: Tensor, y: Tensor) -> Tensor:
        if counts:
            return (z.exp() - y * z).mean()
        if hinge:
            return 0.5 * torch.where(y * z < 1, 1 - y * z, 0.0).square().mean()
        r = (z - y).abs()
        return torch.where(r < 1, 0.5 * r.square(), r - 0.5).mean()

    def inner(x: Tensor, u: Tensor) -> Tensor:
        return loss(X @ x, y) + 0.5 * (u.exp() * x * x).sum()

    def outer(x: Tensor, u: Tensor) -> Tensor:
        return loss(X_val @ x, y_val) + 0.0 * u.sum()

    grad = torch.func.grad(inner)
    return Case(
        family(X, y, X_val, y_val, penalty="per_feature"),
        -2.0 + 0.5 * normal(18, X.shape[1]),
        0.3 * normal(31, 5) if counts or hinge else normal(13, 5),  # whence Newton's own steps converge
        grad,
        torch.func.jacrev(grad),
        torch.func.jacrev(grad, argnums=1),
        torch.func.grad(outer, argnums=(0, 1)),
    )


def sample_weight_case() -> Case:
    """Softmax regression with a weight for each row; dense algebra by torch.func on the loss written out here."""
    X, X_val = normal(26, 12, 3), normal(27, 20, 3)
    labels = torch.arange(12) % 3
    labels_val = (X_val @ normal(28, 3, 3)).argmax(1)

    def losses(X: Tensor, y: Tensor, x: Tensor) -> Tensor:
        Z = X @ x.reshape(3, 3).t()
        return Z.exp().sum(1).log() - Z.gather(1, y[:, None])[:, 0]

    def inner(x: Tensor, u: Tensor) -> Tensor:
        return (losses(X, labels, x) / (1.0 + (-u).exp())).mean() + 0.1 * x @ x

    def outer(x: Tensor, u: Tensor) -> Tensor:
        return losses(X_val, labels_val, x).mean() + 0.0 * u.sum()

    grad = torch.func.grad(inner)
    return Case(
        SampleWeightProblem(X, labels, X_val, labels_val, penalty=0.2),
        normal(29, 12),
        normal(30, 3, 3),
        grad,
        torch.func.jacrev(grad),
        torch.func.jacrev(grad, argnums=1),
        torch.func.grad(outer, argnums=(0, 1)),
    )


PROBLEMS: dict[type, Callable[[], Case]] = {
    QuadraticProblem: quadratic_case,
    RidgeProblem: ridge_case,
    LogisticProblem: logistic_case,
    SoftmaxProblem: softmax_case,
    SampleWeightProblem: sample_weight_case,
    **{family: partial(glm_case, family) for family in (PoissonProblem, HuberProblem, SquaredHingeProblem)},
}


def descent(problem: type, **limits: Any) -> bl.GradientDescent:
    """Gradient descent with a safe step: automatic, but for Poisson regression, whose curvature has no bound."""
    return bl.GradientDescent(0.2 if problem is PoissonProblem else "auto", **limits)


# Inner solvers: gold options, and the published step on flat vectors --------------------------------------------------

Gradient = Callable[[Tensor], Tensor]
Memory = tuple[Tensor, ...]


@dataclass(frozen=True)
class SolverRow:
    """How to make a solver for a problem, its step written out, the residual that it reaches, and what a step launches.

    Attributes:
        make: (problem, **limits) -> solver.
        formula: (gradient, x, memory, k) -> (x, memory) for step k = 0, 1, ...
        kernels: most kernels of one step on an accelerator: on the quadratic of `device_cases`, whose gradient is one
            of them; of a solver that waits, on its logistic regression.
        reason: where they come from.
        waits: times that a step waits for the accelerator by itself.
        reaches: residual within 5,000 steps on well-conditioned problems.
        forward: whether forward mode covers its steps.
        unrolls: whether its steps are differentiated at all; without that, its own tests check the step.
    """

    make: Callable[..., bl.InnerSolver]
    formula: Callable[[Gradient, Tensor, Memory, int], tuple[Tensor, Memory]] | None
    kernels: int
    reason: str
    waits: int = 0
    reaches: float = 1e-10
    forward: bool = True
    unrolls: bool = True

    @property
    def solver(self) -> bl.InnerSolver:
        """The solver for any problem of numbers in one tensor."""
        return self.make(None)

    @property
    def estimator(self) -> bl.HypergradEstimator:
        """What differentiates it."""
        return bl.FullUnroll() if self.unrolls else bl.Implicit()


def made(kind: type, *options: Any, **more: Any) -> Any:
    """A solver of a kind, for any problem: the row's options, the problem, then limits of the caller's."""
    *first, _ = options
    return kind(*first, **more)


def descent_formula(gradient: Gradient, x: Tensor, memory: Memory, k: int) -> tuple[Tensor, Memory]:
    return x - STEP * gradient(x), ()


def adam_formula(gradient: Gradient, x: Tensor, memory: Memory, k: int) -> tuple[Tensor, Memory]:
    g = gradient(x)
    m, v = 0.9 * memory[0] + 0.1 * g, 0.999 * memory[1] + 0.001 * g**2
    m_hat, v_hat = m / (1 - 0.9 ** (k + 1)), v / (1 - 0.999 ** (k + 1))
    return x - 0.05 * m_hat / (v_hat.sqrt() + 1e-8), (m, v)


def adamw_formula(gradient: Gradient, x: Tensor, memory: Memory, k: int) -> tuple[Tensor, Memory]:
    shrunk = (1 - 0.05 * 1e-6) * x
    after, parts = adam_formula(lambda _: gradient(x), shrunk, memory, k)
    return after, parts


def sgd_formula(gradient: Gradient, x: Tensor, memory: Memory, k: int) -> tuple[Tensor, Memory]:
    g = gradient(x)
    buffer = MOMENTUM * memory[0] + g
    return x - STEP * (g + MOMENTUM * buffer), (buffer,)


def rmsprop_formula(gradient: Gradient, x: Tensor, memory: Memory, k: int) -> tuple[Tensor, Memory]:
    g = gradient(x)
    v, c = 0.9 * memory[0] + 0.1 * g**2, 0.9 * memory[1] + 0.1 * g
    b = 0.5 * memory[2] + g / ((v - c**2).sqrt() + 1.0)
    return x - STEP * b, (v, c, b)


def heavy_ball_formula(gradient: Gradient, x: Tensor, memory: Memory, k: int) -> tuple[Tensor, Memory]:
    return x - STEP * gradient(x) + MOMENTUM * (x - memory[0]), (x,)


def nesterov_formula(gradient: Gradient, x: Tensor, memory: Memory, k: int) -> tuple[Tensor, Memory]:
    y = x + MOMENTUM * (x - memory[0])
    return y - STEP * gradient(y), (x,)


def fista_formula(gradient: Gradient, x: Tensor, memory: Memory, k: int) -> tuple[Tensor, Memory]:
    whole = torch.cat([part.reshape(-1) for part in memory])
    before, (t, size) = whole[: len(x)], whole[len(x) :].detach()  # the two are constants
    after = (1 + (1 + 4 * t**2).sqrt()) / 2
    y = x + (t - 1) / after * (x - before)
    new = y - size * gradient(y)
    back = ((y - new) * (new - x)).sum() > 0
    return new, (x, torch.where(back, 1.0, after)[None], whole[-1:])


def newton_formula(gradient: Gradient, x: Tensor, memory: Memory, k: int) -> tuple[Tensor, Memory]:
    hessian = torch.autograd.functional.jacobian(gradient, x, create_graph=True)
    return x - torch.linalg.solve(hessian, gradient(x)), ()


def make_fixed_point(problem: bl.BilevelProblem | None, **limits: Any) -> bl.FixedPoint:
    """The user's own map: a gradient step on the problem's loss, by autograd; of no problem, a product and two sums."""
    if problem is None:
        return bl.FixedPoint(lambda x, u: 0.9 * x + u.sum(), **limits)

    def update(params: Any, hparams: Any) -> Any:
        gradient = problem.gradient_graph(params, hparams)
        return shaped(flat(params) - STEP * flat(gradient), params)

    return bl.FixedPoint(update, **limits)


LOW, HIGH = 0.2, 12.0
"""An interval that holds the spectra of all cases."""


def chebyshev_formula(gradient: Gradient, x: Tensor, memory: Memory, k: int) -> tuple[Tensor, Memory]:
    s, r, before = (HIGH + LOW) / (HIGH - LOW), 0.0, 0.0
    for index in range(k + 1):
        before, r = r, 1.0 / s if index == 0 else 1.0 / (2.0 * s - r)
    h, m = (2.0 / (HIGH + LOW), 0.0) if k == 0 else (4.0 * r / (HIGH - LOW), r * before)
    return x - h * gradient(x) + m * (x - memory[0]), (x,)


def sobolev_formula(gradient: Gradient, x: Tensor, memory: Memory, k: int) -> tuple[Tensor, Memory]:
    y, y_before, w, w_before = memory
    table = bl.theory.sobolev_coefficients(LOW, HIGH, k + 1, alpha=1.0)
    h, m, p, q = (float(column[k]) for column in (table.h, table.m, table.p, table.q))
    new = y - h * gradient(y) + m * (y - y_before)
    new_w = new - p * y_before + q * w_before
    return float(table.keep[k]) * x + float(table.gain[k]) * new_w, (new, y, new_w, w)


def asymptotic_formula(gradient: Gradient, x: Tensor, memory: Memory, k: int) -> tuple[Tensor, Memory]:
    y, y_before = memory
    h = (2.0 / (LOW**0.5 + HIGH**0.5)) ** 2
    m = ((HIGH**0.5 - LOW**0.5) / (HIGH**0.5 + LOW**0.5)) ** 2
    h = h / (1.0 + m) if k == 0 else h
    new = y - h * gradient(y) + m * (y - y_before)
    return new + m * (x - y_before), (new, y)


SOLVERS: dict[type, SolverRow] = {
    bl.Chebyshev: SolverRow(partial(made, bl.Chebyshev, LOW, HIGH), chebyshev_formula, 4, "as heavy ball"),
    bl.Sobolev: SolverRow(
        partial(made, bl.Sobolev, LOW, HIGH), sobolev_formula, 13, "x, y and w are sums of five, three and four terms"
    ),
    bl.AsymptoticSobolev: SolverRow(
        partial(made, bl.AsymptoticSobolev, LOW, HIGH, "half"),
        asymptotic_formula,
        8,
        "x and y are sums of four and three terms",
    ),
    bl.GradientDescent: SolverRow(
        partial(made, bl.GradientDescent, STEP), descent_formula, 2, "the update is one kernel"
    ),
    bl.PreconditionedGradientDescent: SolverRow(
        partial(made, bl.PreconditionedGradientDescent, STEP),
        lambda gradient, x, memory, k: (x - memory[0] * gradient(x), memory),
        2,
        "the update is one kernel",
    ),
    bl.HeavyBall: SolverRow(
        partial(made, bl.HeavyBall, STEP, MOMENTUM), heavy_ball_formula, 4, "three terms: a product, two sums"
    ),
    bl.Nesterov: SolverRow(
        partial(made, bl.Nesterov, STEP, MOMENTUM), nesterov_formula, 6, "two kernels for y, three for the new x"
    ),
    bl.Adam: SolverRow(
        partial(made, bl.Adam, 0.05),
        adam_formula,
        13,
        "moments three, a square root safe at zero six, the quotient three",
        reaches=1e-6,
    ),
    bl.AdamW: SolverRow(
        partial(made, bl.AdamW, 0.05, weight_decay=1e-6),
        adamw_formula,
        14,
        "as Adam; the weights shrink in one",
        reaches=1e-5,
    ),
    bl.SGD: SolverRow(
        partial(made, bl.SGD, STEP, MOMENTUM, nesterov=True),
        sgd_formula,
        5,
        "momentum two, Nesterov's sum one, the update one",
    ),
    bl.ProximalGradient: SolverRow(
        partial(made, bl.ProximalGradient, STEP),
        lambda gradient, x, memory, k: (x - memory[0].detach() * gradient(x), memory),
        2,
        "without a nonsmooth term the update is one kernel",
    ),
    bl.FISTA: SolverRow(
        partial(made, bl.FISTA, STEP),
        fista_formula,
        16,
        "the momentum six, y two, gradient and update two, a restart six",
    ),
    bl.RMSprop: SolverRow(
        partial(made, bl.RMSprop, STEP, 0.9, 1.0, momentum=0.5, centered=True),
        rmsprop_formula,
        15,
        "the gradient, mean and mean square three, variance, its safe root six, eps, momentum two, the update",
    ),
    bl.Newton: SolverRow(
        partial(made, bl.Newton),
        newton_formula,
        31,
        "the gradient at the trial nine, the Hessian eight; it looks at each of its decisions",
        waits=4,
        forward=False,
    ),
    bl.QuasiNewton: SolverRow(
        partial(made, bl.QuasiNewton),
        None,
        51,
        "gradient, curvature and Newton direction of the first step, eleven for a pair",
        waits=7,
        forward=False,
        unrolls=False,
    ),
    bl.CoordinateDescent: SolverRow(
        partial(made, bl.CoordinateDescent),
        None,
        40,
        "gradient and Hessian, the moment, and copies to and from the host",
        waits=12,
        forward=False,
        unrolls=False,
    ),
    bl.TorchOptimizer: SolverRow(
        partial(made, bl.TorchOptimizer, partial(torch.optim.SGD, lr=STEP, momentum=MOMENTUM)),
        None,
        40,
        "copies, the loss and two comparisons (with the start, for the closure and at the end) besides torch's kernels",
        waits=2,
        forward=False,
        unrolls=False,
    ),
    bl.FixedPoint: SolverRow(make_fixed_point, descent_formula, 3, "the user's map alone"),
}

UNROLLED = [cls for cls, row in SOLVERS.items() if row.unrolls]
"""The solvers whose steps are differentiated."""


# Linear solvers and estimators: gold options --------------------------------------------------------------------------


@dataclass(frozen=True)
class LinearRow:
    """A linear solver, and what its steps take on an accelerator.

    Attributes:
        fixed: makes the solver from k: it takes k steps and cannot stop earlier.
        solver: the solver as one would use it.
        kernels: most kernels of one step, its matrix-vector product (one kernel) included.
        reason: where they come from.
        looks: as in `device_cases.EstimatorRow`, for implicit differentiation with this solver.
        tolerance: whether it looks for one.
    """

    fixed: Callable[[int], bl.LinearSolver]
    solver: bl.LinearSolver
    kernels: float
    reason: str
    looks: int = 10
    tolerance: bool = True


LINEAR_ROWS: dict[type, LinearRow] = {
    bl.CG: LinearRow(
        lambda k: bl.CG(tol=1e-30, max_steps=k),
        bl.CG(tol=1e-12),
        9 + 1 / 8,
        "three dot products, two quotients, three updates; their numbers are stacked for each look",
    ),
    bl.GMRES: LinearRow(
        lambda k: bl.GMRES(tol=1e-30, max_steps=k, restart=k),
        bl.GMRES(tol=1e-12),
        13,
        "the basis stacked, four kernels for each of two orthogonalisations, norm, its place, quotient",
    ),
    bl.Neumann: LinearRow(
        lambda k: bl.Neumann(steps=k, step_size=1e-7),
        bl.Neumann(steps=250),
        3,
        "x + h r and b - A x",
        looks=9,
        tolerance=False,
    ),
    bl.FixedPointIteration: LinearRow(
        lambda k: bl.FixedPointIteration(step_size=1e-7, tol=1e-30, max_steps=k),
        bl.FixedPointIteration(tol=1e-12),
        3 + 3 / 8,
        "as Neumann; norm, product and comparison at each look",
        looks=37,
    ),
    bl.Nystrom: LinearRow(
        lambda k: bl.Nystrom(rank=k),
        bl.Nystrom(rank=60),
        2,
        "the product, and its place in a stack",
        looks=9,
        tolerance=False,
    ),
    bl.Direct: LinearRow(lambda k: bl.Direct(), bl.Direct(), 0, "no steps", looks=7, tolerance=False),
}
LINEAR_SOLVERS = {cls: row.solver for cls, row in LINEAR_ROWS.items()}

ESTIMATORS: dict[type, bl.HypergradEstimator] = {
    bl.FullUnroll: bl.FullUnroll(),
    bl.TruncatedUnroll: bl.TruncatedUnroll(tail=0.9),
    bl.Implicit: bl.Implicit(bl.CG(tol=1e-12)),
    bl.FiniteDifference: bl.FiniteDifference(),
    bl.AdaptiveUnroll: bl.AdaptiveUnroll(),
    bl.BalancedImplicit: bl.BalancedImplicit(),
    bl.Auto: bl.Auto(),
}
QUADRATIC_ESTIMATORS: dict[type, bl.HypergradEstimator] = {
    bl.Spectral: bl.Spectral(),
    bl.ClosedForm: bl.ClosedForm(),
}
"""Those that need structure of the inner loss; `test_spectral.py` is their suite."""
BIASED_ESTIMATORS: dict[type, bl.HypergradEstimator] = {
    bl.FirstOrder: bl.FirstOrder(),
    bl.OneStep: bl.OneStep(),
}
"""Those that leave something out on purpose, converged or not; `test_one_step.py` is their suite."""
