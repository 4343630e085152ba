"""How good adaptive truncation is, at equal budget: errors over the error of the best fixed tail, and effectivities.

Every strategy gets the same budget ``T = (1 + omega) K`` gradient-equivalents; the oracle is the fixed tail
(``K + omega N`` steps, ``K - N`` of them differentiated) that the exact derivative shows to be the best. Writes
draws.csv, summary.json and summary.md.

    python scripts/adaptive_study.py --draws 4 --out runs/adaptive
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import sklearn.datasets
import torch
from torch import Tensor

import bilevel as bl
from bilevel.cost import Meter
from bilevel.problems import LogisticProblem, RidgeProblem

K, OMEGA = 100, 3
BUDGET = (1 + OMEGA) * K
FLOOR = 1e-13
FIRST_SEED = 300
"""The crossing rule's constant was chosen on seeds below."""
DIMENSIONS = (20, 60, 100, 140, 170, 185)


def linear_outer(family: type) -> type:
    """A linear model whose outer loss is v'w, so that the hypergradient is one VJP of the solution map."""

    class WithLinearOuter(family):  # type: ignore[misc]
        """The family with another outer loss."""

        def outer_loss(self, params: Tensor, hparams: Tensor) -> Tensor:
            """Return v'w."""
            return self.v @ params

        def outer_value_and_grads(self, params: Tensor, hparams: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            """Return v'w with its gradients."""
            return self.v @ params, self.v, torch.zeros_like(hparams)

    return WithLinearOuter


Ridge, Logistic = linear_outer(RidgeProblem), linear_outer(LogisticProblem)


@dataclass(frozen=True)
class Draw:
    """One problem with its solver, start and exact answer."""

    group: str
    setting: str
    problem: Any
    solver: bl.InnerSolver
    hparams: Tensor
    start: Tensor
    solution: Tensor
    hessian: Tensor

    @property
    def slope(self) -> Tensor:
        """Derivative of the penalties by the hyperparameters."""
        return self.problem.bind(self.hparams).slope

    @property
    def truth(self) -> Tensor:
        """The exact VJP of the solution map."""
        return -self.slope * self.solution * torch.linalg.solve(self.hessian, self.problem.v)


def numbers(solver: Any) -> tuple[float, float, str]:
    """Return step size, momentum and the kind of the solver."""
    return float(solver.step_size), float(getattr(solver, "momentum", 0.0)), type(solver).__name__


def rate(draw: Draw) -> float:
    """Spectral radius of the inner map at the solution."""
    h, m, kind = numbers(draw.solver)
    worst = 0.0
    for value in torch.linalg.eigvalsh(draw.hessian).tolist():
        a, b = {
            "GradientDescent": (1 - h * value, 0.0),
            "Nesterov": ((1 + m) * (1 - h * value), -m * (1 - h * value)),
            "HeavyBall": (1 + m - h * value, -m),
        }[kind]
        roots = torch.linalg.eigvals(torch.tensor([[a, b], [1.0, 0.0]], dtype=torch.float64))
        worst = max(worst, float(roots.abs().max()))
    return worst


def fixed_tails(draw: Draw) -> Tensor:
    """Relative errors of all fixed tails N = 0, ..., K - 1 at equal budget, in one batched sweep."""
    h, m, kind = numbers(draw.solver)
    problem, inner = draw.problem, draw.problem.bind(draw.hparams)
    x, previous, points = draw.start, draw.start, []
    for _ in range(K + OMEGA * K):
        look = x + m * (x - previous)
        y = x if kind == "HeavyBall" else look
        points.append(y)
        x, previous = look - h * inner.grad(y), x
    Y = torch.stack(points, 1)
    N = torch.arange(K)
    last, length = K + OMEGA * N - 1, K - N
    c1 = draw.problem.v[:, None].repeat(1, K)
    c2, total = torch.zeros_like(c1), torch.zeros_like(c1)
    X = problem.train.X
    for j in range(K):
        at = Y[:, (last - j).clamp(min=0)]
        g = -h * c1
        bent = X.t() @ g
        if kind_of(problem) == "logistic":
            z = X.t() @ at
            bent = bent * torch.sigmoid(z) * torch.sigmoid(-z)
        pulled = problem.scale * (X @ bent) + inner.penalty[:, None] * g
        active = (length > j).to(c1.dtype)
        total = total + active * inner.slope[:, None] * at * g
        if kind == "HeavyBall":
            c1, c2 = (1 + m) * c1 + pulled + c2, -m * c1
        else:
            c1, c2 = (1 + m) * (c1 + pulled) + c2, -m * (c1 + pulled)
    truth = draw.truth
    return torch.linalg.vector_norm(total - truth[:, None], dim=0) / torch.linalg.vector_norm(truth)


def kind_of(problem: Any) -> str:
    """Return "ridge" or "logistic"."""
    return "logistic" if isinstance(problem, LogisticProblem) else "ridge"


def half_and_half(draw: Draw) -> float:
    """Relative error of the plain implicit method: half the budget forward, half into CG at the last iterate."""
    solver = replace(draw.solver, steps=BUDGET // 2)
    estimator = bl.Implicit(bl.CG(tol=1e-15, max_steps=BUDGET // 4 - 2))
    problem, hparams = draw.problem, draw.hparams
    solved = estimator.solve(problem, solver, hparams, draw.start, bl.Carry(), Meter(torch.device("cpu")))
    return error_of(draw, solved.pullback(problem.v).hparams)


def bound_22(draw: Draw) -> int:
    """The tail that minimises the published bound, with the true constants (gradient descent on a quadratic)."""
    h, _, _ = numbers(draw.solver)
    rho = rate(draw)
    d0 = float(torch.linalg.matrix_norm(torch.linalg.solve(draw.hessian, torch.diag(draw.slope * draw.solution)), 2))
    e0 = float(torch.linalg.vector_norm(draw.start - draw.solution))
    lipschitz = h * float(draw.slope.max())
    N = torch.arange(K, dtype=torch.float64)
    psi = d0 * rho ** (K - N) + lipschitz * e0 * (K - N) * rho ** (K + OMEGA * N - 1)
    return int(torch.argmin(psi))


def error_of(draw: Draw, value: Tensor) -> float:
    """Return the relative error of a hypergradient."""
    truth = draw.truth
    return float(torch.linalg.vector_norm(value - truth) / torch.linalg.vector_norm(truth))


STRATEGIES: dict[str, Callable[[], bl.HypergradEstimator]] = {
    "tail=auto": lambda: bl.TruncatedUnroll("auto", budget=BUDGET),
    "extrapolate": lambda: bl.TruncatedUnroll("auto", budget=BUDGET, extrapolate=True),
    "balanced": lambda: bl.Implicit(balance="auto", budget=BUDGET),
}


def measure(draw: Draw) -> dict[str, Any]:
    """All strategies on one draw: relative errors, costs, and the effectivity of the balanced estimate."""
    table = fixed_tails(draw)
    rho = rate(draw)
    row: dict[str, Any] = {"group": draw.group, "setting": draw.setting, "rho": rho, "sK": -K * math.log(min(rho, 1.0))}
    row |= {"oracle": float(table.min()), "oracle_N": int(table.argmin())}
    row |= {"N=0": float(table[0]), "N=K/8": float(table[K // 8])}
    if isinstance(draw.solver, bl.GradientDescent) and kind_of(draw.problem) == "ridge":
        row["(22) true"] = float(table[bound_22(draw)])
    row["CG half"] = half_and_half(draw)
    for name, make in STRATEGIES.items():
        if name == "extrapolate" and isinstance(draw.solver, bl.HeavyBall):
            continue
        estimate = bl.hypergradient(draw.problem, draw.solver, make(), draw.hparams, draw.start, on_failure="return")
        row[name] = error_of(draw, estimate.hypergradient)
        row[f"{name} cost"] = estimate.cost.gradient_equivalents
        row[f"{name} tail"] = estimate.certificate.adjoint_steps
        if name == "extrapolate":
            row["refused"] = "no extrapolation" in estimate.certificate.error_note
        if name == "balanced" and estimate.certificate.error is not None:
            size = float(torch.linalg.vector_norm(draw.truth))
            row["effectivity"] = estimate.certificate.error / max(row[name] * size, 1e-300)
            row["EST too small to judge"] = row[name] < 1e-10
    return row


# Draws ---------------------------------------------------------------------------------------------------------------


def generator(*seeds: int) -> torch.Generator:
    """Return a generator seeded by several numbers below 1000."""
    return torch.Generator().manual_seed(sum(seed * 1000**i for i, seed in enumerate(seeds)))


def normal(g: torch.Generator, *shape: int) -> Tensor:
    """Return independent normal numbers."""
    return torch.randn(shape, generator=g, dtype=torch.float64)


def with_answer(
    group: str, setting: str, problem: Any, make: Callable[[float, float], Any], u: Tensor, x0: Tensor, v: Tensor
) -> Draw:
    """Solve by Newton's method, and give the solver the ends of the spectrum at the solution."""
    problem.v = v
    x, H = newton(problem, u)
    values = torch.linalg.eigvalsh(H)
    largest = float(values[-1]) if kind_of(problem) == "ridge" else problem.bind(u).curvature(x0).largest
    return Draw(group, setting, problem, make(float(values[0]), largest), u, x0, x, H)


def newton(problem: Any, u: Tensor) -> tuple[Tensor, Tensor]:
    """Return the inner solution and the Hessian there."""
    inner = problem.bind(u)
    x = torch.zeros(problem.params_shape(), dtype=torch.float64)
    for _ in range(60):
        H = inner.linearize(x).dense_hessian()
        step = torch.linalg.solve(H, inner.grad(x))
        x = x - step
        if float(step.norm()) <= 1e-15 * float(x.norm()):
            break
    return x, inner.linearize(x).dense_hessian()


def descent(kind: str) -> Callable[[float, float], Any]:
    """Return a maker of the solver from the ends of the spectrum."""

    def make(low: float, high: float) -> Any:
        root = math.sqrt(low / high)
        xi = (1 - root) / (1 + root)
        return {
            "1/L": lambda: bl.GradientDescent(1 / high, steps=K),
            "2/(L+l)": lambda: bl.GradientDescent(2 / (high + low), steps=K),
            "Nesterov": lambda: bl.Nesterov(1 / high, steps=K, momentum=xi),
            "heavy ball": lambda: bl.HeavyBall((2 / (math.sqrt(low) + math.sqrt(high))) ** 2, steps=K, momentum=xi**2),
        }[kind]()

    return make


def gaussian(draws: int) -> Iterator[Draw]:
    """The Gaussian problem: A of 200 x N, b, x_0 and v normal, penalties one."""
    for size in DIMENSIONS:
        for step in ("2/(L+l)", "1/L"):
            for seed in range(FIRST_SEED, FIRST_SEED + draws):
                g = generator(seed, size, 7)
                A, b, x0, v = normal(g, 200, size), normal(g, 200), normal(g, size), normal(g, size)
                problem = Ridge(A, b, A, b, "per_feature", loss="sum", parametrization="direct")
                u = torch.ones(size, dtype=torch.float64)
                yield with_answer("M", f"{size} {step}", problem, descent(step), u, x0, v)


def data_sets() -> dict[tuple[str, str], tuple[Tensor, Tensor]]:
    """Return standardised inputs and targets by (kind, name)."""
    found = {}
    for name, load, kinds in (
        ("breast_cancer", sklearn.datasets.load_breast_cancer, ("ridge", "logistic")),
        ("diabetes", sklearn.datasets.load_diabetes, ("ridge",)),
        ("digits", sklearn.datasets.load_digits, ("logistic",)),
    ):
        X, y = (torch.as_tensor(part, dtype=torch.float64) for part in load(return_X_y=True))
        X = X[:, X.std(0) > 0]
        X = (X - X.mean(0)) / X.std(0)
        y = (y >= 5).double() if name == "digits" else y
        for kind in kinds:
            found[kind, name] = (X, y if kind == "logistic" else (y - y.mean()) / y.std())
    return found


def tabular(draws: int) -> Iterator[Draw]:
    """Ridge and logistic regression on scikit-learn's data: a 70 % subsample, penalties and start are drawn."""
    for index, ((kind, name), (X, y)) in enumerate(data_sets().items()):
        for method in ("1/L", "Nesterov"):
            for warm in (False, True):
                for reg in (1e-2, 1e-1):
                    for seed in range(FIRST_SEED, FIRST_SEED + draws):
                        g = generator(seed, index, 11)
                        rows = torch.randperm(len(y), generator=g)[: int(0.7 * len(y))]
                        family = Ridge if kind == "ridge" else Logistic
                        part = y[rows] if kind == "ridge" else y[rows].long()
                        problem = family(X[rows], part, X[rows], part, "per_feature")
                        size = X.shape[1]
                        u = math.log(reg) + 0.5 * normal(g, size)
                        near = u + 0.1 * normal(g, size)
                        x0 = newton(problem, near)[0] if warm else normal(g, size)
                        group = f"{kind} {'warm' if warm else 'cold'} {'Nesterov' if method == 'Nesterov' else 'GD'}"
                        setting = f"{name} {reg}"
                        yield with_answer(group, setting, problem, descent(method), u, x0, normal(g, size))


def ill(draws: int) -> Iterator[Draw]:
    """Quadratics with log-uniform spectra, down to an inverse condition number of 1e-5."""
    size = 50
    for method in ("1/L", "2/(L+l)", "Nesterov", "heavy ball"):
        for kappa in (1e-3, 1e-4, 1e-5):
            for seed in range(FIRST_SEED, FIRST_SEED + draws):
                g = generator(seed, round(-math.log10(kappa)), 13)
                Q, _ = torch.linalg.qr(normal(g, size, size))
                values = torch.logspace(math.log10(kappa), 0, size, dtype=torch.float64)
                penalty = kappa / 100
                X = (values - penalty).sqrt()[:, None] * Q.t()
                y, x0, v = normal(g, size), normal(g, size), normal(g, size)
                problem = Ridge(X, y, X, y, "per_feature", loss="sum", parametrization="direct")
                u = torch.full((size,), penalty, dtype=torch.float64)
                yield with_answer(f"ill {method}", f"kappa {kappa:.0e}", problem, descent(method), u, x0, v)


# Report --------------------------------------------------------------------------------------------------------------

COLUMNS = ("N=0", "N=K/8", "(22) true", "tail=auto", "extrapolate", "CG half", "balanced")


def ratios(rows: list[dict[str, Any]], name: str) -> Tensor:
    """Errors over the oracle's, both floored."""
    pairs = [(max(row[name], FLOOR), max(row["oracle"], FLOOR)) for row in rows if name in row]
    return torch.tensor([math.inf if a != a else a / b for a, b in pairs], dtype=torch.float64)


def quantiles(values: Tensor) -> str:
    """Return median/p90/worst."""
    if not len(values):
        return "-"
    ordered = values.sort().values
    return "/".join(f"{float(ordered[min(len(ordered) - 1, int(q * len(ordered)))]):.2g}" for q in (0.5, 0.9, 1.0))


def share(values: Tensor, limit: float) -> float:
    """Return the share of values that are at most the limit."""
    return float((values <= limit).double().mean()) if len(values) else math.nan


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The figures that were asked for."""
    moving = [row for row in rows if row["oracle"] > 10 * FLOOR]
    fast = [row for row in moving if row["group"] == "M" and row["rho"] <= 0.98]
    judged = [row for row in rows if "effectivity" in row and not row["EST too small to judge"]]
    asked = [row for row in rows if not row["group"].startswith("ill")]
    return {
        "draws": len(rows),
        "tail=auto within 3 of the oracle": share(ratios(asked, "tail=auto"), 3.0),
        "tail=auto within 3, ill-conditioned": share(ratios([r for r in rows if r not in asked], "tail=auto"), 3.0),
        "extrapolate 10 times better, M, rho <= .98": share(ratios(fast, "extrapolate"), 0.1),
        "balanced 10 times better, sK >= 2": share(ratios([r for r in moving if r["sK"] >= 2], "balanced"), 0.1),
        "balanced 10 times better, sK >= 2, without ill": share(
            ratios([r for r in moving if r["sK"] >= 2 and r in asked], "balanced"), 0.1
        ),
        "highest cost": max(row[key] for row in rows for key in row if key.endswith(" cost")),
        "allowed cost": BUDGET + OMEGA,
        "effectivity draws": len(judged),
        "effectivity min": min((row["effectivity"] for row in judged), default=math.nan),
    }


def markdown(rows: list[dict[str, Any]], figures: dict[str, Any]) -> str:
    """Return the tables."""
    lines = [f"Budget {BUDGET}, omega {OMEGA}: err/oracle, median/p90/worst; oracle: median relative error.", ""]
    lines += ["| group | draws | oracle | " + " | ".join(COLUMNS) + " | auto <= 3 |", "|---" * (len(COLUMNS) + 4) + "|"]
    names = list(dict.fromkeys(table_key(row) for row in rows))
    for name in [*names, "all"]:
        part = [row for row in rows if name in (table_key(row), "all")]
        oracle = float(torch.tensor([row["oracle"] for row in part]).median())
        cells = [quantiles(ratios(part, column)) for column in COLUMNS]
        inside = f"{100 * share(ratios(part, 'tail=auto'), 3.0):.1f} %"
        lines.append(f"| {name} | {len(part)} | {oracle:.1e} | " + " | ".join(cells) + f" | {inside} |")
    lines += ["", "Effectivity (estimate / true error) of `Implicit(balance='auto')`, true errors above 1e-10:", ""]
    lines += ["| group | draws | min | median | p90 | max |", "|---|---|---|---|---|---|"]
    for group in dict.fromkeys(row["group"].split()[0] for row in rows):
        found = [r for r in rows if r["group"].split()[0] == group and "effectivity" in r]
        values = sorted(r["effectivity"] for r in found if not r["EST too small to judge"])
        if values:
            at = [values[min(len(values) - 1, int(q * len(values)))] for q in (0, 0.5, 0.9, 1)]
            lines.append(f"| {group} | {len(values)} | " + " | ".join(f"{value:.2g}" for value in at) + " |")
    lines += ["", *(f"- {key}: {value:.4g}" for key, value in figures.items()), ""]
    return "\n".join(lines)


def table_key(row: dict[str, Any]) -> str:
    """Return the row of the table that a draw belongs to."""
    return f"M {row['setting']}" if row["group"] == "M" else row["group"]


def main() -> None:
    """Run the study and write its results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--draws", type=int, default=4, help="draws of each setting (default 4)")
    parser.add_argument("--out", type=Path, default=Path("runs/adaptive"), help="folder of the results")
    options = parser.parse_args()
    torch.set_num_threads(1)
    begun, rows = time.perf_counter(), []
    for family in (gaussian, tabular, ill):
        for draw in family(options.draws):
            rows.append(measure(draw))
        print(f"{family.__name__}: {len(rows)} draws, {time.perf_counter() - begun:.0f} s", flush=True)
    figures = summary(rows)
    options.out.mkdir(parents=True, exist_ok=True)
    names = list(dict.fromkeys(key for row in rows for key in row))
    with (options.out / "draws.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, names)
        writer.writeheader()
        writer.writerows(rows)
    (options.out / "summary.json").write_text(json.dumps(figures, indent=1) + "\n")
    text = markdown(rows, figures)
    (options.out / "summary.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
