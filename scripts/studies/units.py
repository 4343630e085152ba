"""Units decide nothing: scaled problems take the same steps, end with the same status, and scale the hypergradient.

    python scripts/studies/units.py [--quick]

The inner loss, the outer loss, the targets and the features of one problem are multiplied by c in 1e-15 ... 1e15. Each
row is one solver, dtype and scaling: over all c, the most that steps differ, the statuses, and the largest relative
difference of the hypergradient from its scaled value. A violation is another number of steps by more than one (at
float32's rounding floor by more than a tenth), another status, or a difference above 1e-6 (float32: 3e-2).

Options that have a unit are scaled: a number as a step size has that of 1 / curvature. Adam and RMSprop divide by
``sqrt(v) + eps``: their steps have the unit of params, whatever the loss, and `eps` that of the gradient, so that
`step_size` and `eps` are scaled.
"""

from __future__ import annotations

import argparse
import math
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

import bilevel as bl

POWERS = (-15, -9, -4, 4, 9, 15)
U = -1.0


@dataclass(frozen=True)
class Scaling:
    """What is multiplied.

    Attributes:
        inner: of the inner loss.
        outer: of the outer loss.
        y: of the targets.
        X: of the features; the penalty goes with its square.
    """

    inner: float = 1.0
    outer: float = 1.0
    y: float = 1.0
    X: float = 1.0

    @property
    def curvature(self) -> float:
        """Unit of the inner Hessian."""
        return self.inner * self.X**2

    @property
    def params(self) -> float:
        """Unit of params."""
        return self.y / self.X

    @property
    def gradient(self) -> float:
        """Unit of the inner gradient."""
        return self.inner * self.X * self.y

    @property
    def hypergradient(self) -> float:
        """Unit of the hypergradient."""
        return self.outer * self.y**2


def data(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return inputs of shape (40, 3) and targets."""
    draw = torch.Generator().manual_seed(0)
    X = torch.randn(40, 3, generator=draw, dtype=torch.float64)
    y = X.sum(1) + 0.3 * torch.randn(40, generator=draw, dtype=torch.float64)
    return X.to(dtype), y.to(dtype)


def ridge(s: Scaling, dtype: torch.dtype) -> bl.BilevelProblem:
    """Return a problem of two losses: autograd's oracles."""
    X, y = data(dtype)
    X, y = s.X * X, s.y * y
    return bl.BilevelProblem(
        lambda w, u: s.inner * (((X[:20] @ w - y[:20]) ** 2).mean() + (s.X * s.X) * u.exp() * (w * w).sum()),
        lambda w, u: s.outer * ((X[20:] @ w - y[20:]) ** 2).mean(),
        torch.zeros(3, dtype=dtype),
    )


def saturating(s: Scaling, dtype: torch.dtype) -> bl.BilevelProblem:
    """Return a logistic regression of two losses; its targets are classes, so that `y` is not scaled."""
    X, y = data(dtype)
    X, z = s.X * X, (y > 0).to(dtype) * 2 - 1
    softplus = torch.nn.functional.softplus
    return bl.BilevelProblem(
        lambda w, u: s.inner * (softplus(-z[:20] * (X[:20] @ w)).mean() + (s.X * s.X) * u.exp() * (w * w).sum()),
        lambda w, u: s.outer * softplus(-z[20:] * (X[20:] @ w)).mean(),
        torch.zeros(3, dtype=dtype),
    )


def solvers(s: Scaling) -> dict[str, bl.InnerSolver]:
    """Return the inner solvers; what has a unit is scaled."""
    h = 0.1 / s.curvature
    auto = {
        each.__name__: each()
        for each in (bl.GradientDescent, bl.HeavyBall, bl.Nesterov, bl.Chebyshev, bl.Newton, bl.QuasiNewton)
    }
    return auto | {
        "HeavyBall auto": bl.HeavyBall(momentum="auto"),
        "Nesterov auto": bl.Nesterov(momentum="auto"),
        "Newton CG": bl.Newton(linear_solver=bl.CG()),
        "GradientDescent number": bl.GradientDescent(step_size=h),
        "SGD": bl.SGD(step_size=h, momentum=0.5),
        "Adam": bl.Adam(step_size=0.05 * s.params, eps=1e-8 * s.gradient, steps=400),
        "RMSprop": bl.RMSprop(step_size=0.02 * s.params, eps=1e-8 * s.gradient, steps=400),
        "torch SGD": bl.TorchOptimizer(lambda params: torch.optim.SGD(params, lr=h, momentum=0.5)),
    }


def linear_solvers(s: Scaling) -> dict[str, bl.LinearSolver]:
    """Return the linear solvers."""
    return {
        "CG": bl.CG(),
        "GMRES": bl.GMRES(),
        "Direct": bl.Direct(),
        "FixedPointIteration": bl.FixedPointIteration(),
        "Neumann": bl.Neumann(steps=40),
        "Nystrom": bl.Nystrom(rank=3),
    }


@dataclass(frozen=True)
class Row:
    """What one solver does over all c.

    Attributes:
        name: the solver.
        dtype: of everything.
        scaled: what is multiplied.
        steps: the most that steps differ.
        statuses: all of them.
        apart: largest relative difference of the hypergradient.
        bad: the c that violate the rule.
    """

    name: str
    dtype: torch.dtype
    scaled: str
    steps: int
    statuses: tuple[str, ...]
    apart: float
    bad: tuple[float, ...]


def value(
    make: Callable[[Scaling, torch.dtype], bl.BilevelProblem],
    s: Scaling,
    dtype: torch.dtype,
    solver: bl.InnerSolver,
    estimator: Any,
) -> bl.Estimate:
    """Return the hypergradient of a scaled problem; RuntimeError where it is refused."""
    u = torch.tensor(U, dtype=dtype)
    try:
        return bl.hypergradient(make(s, dtype), solver, estimator, u, on_failure="return")
    except ValueError as error:
        raise RuntimeError(f"{solver} {estimator} {s} {dtype}: {error}") from error


def row(
    name: str,
    make: Callable[[Scaling, torch.dtype], bl.BilevelProblem],
    dtype: torch.dtype,
    scaled: str,
    of: Callable[[Scaling], tuple[bl.InnerSolver, Any]],
    powers: tuple[int, ...] = POWERS,
) -> Row:
    """Compare all c with c = 1."""
    plain = value(make, Scaling(), dtype, *of(Scaling()))
    most, apart, bad, statuses = 0, 0.0, [], {plain.status.name}
    for power in powers:
        s = replace(Scaling(), **{scaled: 10.0**power})
        try:
            found = value(make, s, dtype, *of(s))
        except RuntimeError:
            bad.append(10.0**power)
            statuses.add("REFUSED")
            continue
        differ = abs(found.certificate.inner_steps - plain.certificate.inner_steps)
        differ = max(differ, abs(found.certificate.adjoint_steps - plain.certificate.adjoint_steps))
        expected = float(plain.hypergradient)
        relative = abs(float(found.hypergradient.double()) / s.hypergradient - expected) / abs(expected)
        relative = relative if relative == relative else math.inf
        loose = dtype is torch.float32
        allowed = max(1, plain.certificate.inner_steps // 10) if loose else 1
        if differ > allowed or found.status is not plain.status or relative > (3e-2 if loose else 1e-6):
            bad.append(10.0**power)
        most, apart = max(most, differ), max(apart, relative)
        statuses.add(found.status.name)
    return Row(name, dtype, scaled, most, tuple(sorted(statuses)), apart, tuple(bad))


def rows(powers: tuple[int, ...] = POWERS, names: tuple[str, ...] | None = None) -> Iterator[Row]:
    """Compare every inner and every linear solver, on two problems, in both dtypes.

    Args:
        powers: exponents of c.
        names: solvers; None for all.

    Yields:
        The rows of the table.
    """
    for problem, make in (("ridge", ridge), ("logistic", saturating)):
        for dtype in (torch.float64, torch.float32):
            for scaled in ("inner", "outer", "y", "X")[: None if problem == "ridge" else 2]:
                for name in solvers(Scaling()):
                    if names is not None and name not in names:
                        continue

                    def of(s: Scaling, name: str = name) -> tuple[bl.InnerSolver, Any]:
                        return solvers(s)[name], bl.Implicit()

                    yield row(f"{problem} {name}", make, dtype, scaled, of, powers)
                for name in linear_solvers(Scaling()):
                    if names is not None and name not in names:
                        continue

                    def of(s: Scaling, name: str = name) -> tuple[bl.InnerSolver, Any]:
                        return bl.QuasiNewton(), bl.Implicit(linear_solvers(s)[name])

                    yield row(f"{problem} {name}", make, dtype, scaled, of, powers)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="c = 1e-15 and 1e15 alone")
    warnings.simplefilter("ignore")
    count = violations = 0
    for each in rows((-15, 15) if parser.parse_args().quick else POWERS):
        count, violations = count + 1, violations + len(each.bad)
        dtype = str(each.dtype).removeprefix("torch.")
        bad = f"  VIOLATED at {', '.join(f'{c:.0e}' for c in each.bad)}" if each.bad else ""
        print(
            f"{each.name:32} {dtype} c*{each.scaled:6} steps +-{each.steps:<4} {each.apart:.1e} "
            f"{'/'.join(each.statuses)}{bad}",
            flush=True,
        )
    print(f"{count} rows, {violations} violations")


if __name__ == "__main__":
    main()
