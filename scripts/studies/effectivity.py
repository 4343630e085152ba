"""How sharp the certificates are: bound / true error over problems, penalties, solvers, tolerances and estimators.

The truth is Newton's method in long double (`longdouble.py`). Writes cases.json, table.md and effectivity.png.

    python scripts/studies/effectivity.py --out runs/effectivity
    python scripts/studies/effectivity.py --quick
"""

from __future__ import annotations

import argparse
import itertools
import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from longdouble import LONG, Truth, model_of

import bilevel as bl
from bilevel.certify import ErrorEstimate, bound_error, certify_error, refine
from bilevel.data import load

PENALTIES = (1e-4, 1e-2, 1.0, 1e2)
TOLERANCES = (1e-1, 1e-3, 1e-6, 1e-9)
CERTIFICATES = ("A0", "A1", "A1 diagonal", "A1 distance", "B")
ESTIMATES = ("A1 distance", "B")
RESOLVED = 8
"""Rounding units of the dtype from which an error counts as one: below, p is right to its last digits."""


@dataclass(frozen=True)
class Case:
    """One certificate beside the truth; errors are relative to the exact hypergradient."""

    problem: str
    penalty: float
    dtype: str
    estimator: str
    certificate: str
    true: float
    value: float | None
    lower: float | None
    note: str
    holds: bool = True
    """Whether the bounds of the single components and the certain signs are right."""

    @property
    def effectivity(self) -> float | None:
        """Bound / true error."""
        return None if self.value is None or self.true == 0 else self.value / self.true

    @property
    def resolved(self) -> bool:
        """Whether the true error is more than the last digits of the hypergradient's dtype."""
        return self.true > RESOLVED * torch.finfo(getattr(torch, self.dtype)).eps

    @property
    def violated(self) -> bool:
        """Whether something proved is wrong."""
        if self.certificate in ESTIMATES or self.value is None:
            return False
        return (
            not self.holds
            or self.value < self.true
            or (self.lower is not None and self.lower > self.true * (1 + 1e-12))
        )


def ill_conditioned(condition: float, seed: int, rows: int = 80, features: int = 20) -> dict[str, torch.Tensor]:
    """Draw Gaussian inputs whose Gram matrix has about the given condition number, and targets of a linear model."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    scales = torch.logspace(0, -0.5 * float(np.log10(condition)), features, dtype=torch.float64)
    basis, _ = torch.linalg.qr(normal(features, features))
    X, V, w = normal(rows, features) * scales @ basis, normal(rows // 2, features) * scales @ basis, normal(features)
    return {
        "X_train": X,
        "y_train": X @ w + 0.1 * normal(rows),
        "X_val": V,
        "y_val": V @ w + 0.1 * normal(rows // 2),
    }


def problems(quick: bool) -> Iterator[tuple[str, type, dict[str, torch.Tensor], str]]:
    """Yield (name, class, data, penalty) of the grid."""
    problems = bl.problems
    hard = ill_conditioned(1e6, 2)
    signs = hard | {"y_train": (hard["y_train"] > 0).long(), "y_val": (hard["y_val"] > 0).long()}
    kinds: list[tuple[str, type, dict[str, torch.Tensor], tuple[str, ...]]] = [
        ("diabetes ridge", problems.RidgeProblem, load("diabetes", test=0.0).splits(), ("scalar", "per_feature")),
        ("cancer logistic", problems.LogisticProblem, load("breast_cancer", test=0.0).splits(), ("scalar",)),
        ("wine softmax", problems.SoftmaxProblem, load("wine", test=0.0).splits(), ("per_class", "per_weight")),
    ]
    if not quick:
        kinds += [
            ("cancer logistic", problems.LogisticProblem, load("breast_cancer", test=0.0).splits(), ("per_feature",)),
            ("ridge 1e2", problems.RidgeProblem, ill_conditioned(1e2, 1), ("scalar",)),
            ("ridge 1e6", problems.RidgeProblem, hard, ("scalar", "per_feature")),
            ("logistic 1e6", problems.LogisticProblem, signs, ("scalar", "per_feature")),
            ("digits softmax", problems.SoftmaxProblem, load("digits", test=0.0).splits(), ("per_class",)),
        ]
    for name, kind, data, penalties in kinds:
        for penalty in penalties:
            yield f"{name}, {penalty}", kind, data, penalty


def settings(start: float, largest: float, quick: bool) -> Iterator[tuple[str, Any, Any]]:
    """Yield (name, solver, estimator), given the inner gradient's norm at the start and the largest curvature."""
    step = 1.0 / largest
    for tol in TOLERANCES[1::2] if quick else TOLERANCES:
        implicit = bl.Implicit(bl.CG(tol=tol))
        yield f"implicit, Newton, {tol:g}", bl.Newton(bl.CG(), tol=tol * start), implicit
        yield f"implicit, gradient descent, {tol:g}", bl.GradientDescent(step, steps=1000, tol=tol * start), implicit
    for steps in (100,) if quick else (30, 300):
        yield f"unrolled, {steps}", bl.GradientDescent(step, steps=steps), bl.FullUnroll()
        yield f"truncated, {steps}", bl.Nesterov(step, steps=steps), bl.TruncatedUnroll(tail=steps // 5)


def certificates(problem: Any, u: Any, estimate: Any) -> Iterator[tuple[str, Any]]:
    """Yield (name, certificate) of one estimate."""
    arguments = (problem, u, estimate.params, estimate.hypergradient)
    adjoint = estimate.carry.adjoint
    sharp = certify_error(*arguments, adjoint)
    yield "A1", sharp
    if u.dtype == torch.float64:
        yield "A1 distance", ErrorEstimate(float((estimate.hypergradient - sharp.corrected).norm()), "estimate", "")
    yield "A1 diagonal", certify_error(*arguments, adjoint, metric="diagonal")
    if adjoint is not None:
        yield "A0", bound_error(*arguments, adjoint)
    yield "B", refine(*arguments, adjoint)


def measure(name: str, problem: Any, u: Any, penalty: float, truth: Truth, quick: bool) -> Iterator[Case]:
    """Yield the cases of one problem at one penalty."""
    inner = problem.bind(u)
    start, largest = float(inner.grad(problem.params).norm()), inner.curvature(problem.params).largest
    exact = truth.hypergradient
    size = float(np.linalg.norm(exact.astype(float)))
    for setting, solver, estimator in settings(start, largest, quick):
        estimate = bl.hypergradient(problem, solver, estimator, u, on_failure="return")
        if not estimate.status.usable:
            continue
        given = estimate.hypergradient.double().numpy().ravel().astype(LONG)
        true = float(np.sqrt(np.sum((given - exact) ** 2)))
        for certificate, found in certificates(problem, u, estimate):
            value = None if found.value is None else found.value / size
            lower = None if found.lower is None else found.lower / size
            dtype = str(u.dtype).removeprefix("torch.")
            right = holds(found, given - exact, exact)
            yield Case(name, penalty, dtype, setting, certificate, true / size, value, lower, found.note, right)


def holds(found: Any, errors: np.ndarray, exact: np.ndarray) -> bool:
    """Return whether what is proved of single components holds, and whether the certain signs are those of `exact`."""
    if found.components is None:
        return True
    signs = found.signs.double().numpy().ravel()
    within = np.abs(errors) <= found.components.double().numpy().ravel()
    return bool(within.all() and ((signs == 0) | (signs == np.sign(exact.astype(float)))).all())


def run(quick: bool = False, save: Callable[[list[Case]], object] = len) -> list[Case]:
    """Measure the whole grid; `save` sees the cases so far after every problem."""
    cases: list[Case] = []
    for index, (name, kind, data, penalty) in enumerate(problems(quick)):
        for value, dtype in itertools.product(PENALTIES[1:3] if quick else PENALTIES, (torch.float64, torch.float32)):
            parametrization = ("log", "direct")[index % 2]
            parts = {key: part.to(dtype) if part.is_floating_point() else part for key, part in data.items()}
            problem = kind(**parts, penalty=penalty, parametrization=parametrization)
            shape = problem.hparams_shape()
            spread = torch.rand(shape, generator=torch.Generator().manual_seed(index), dtype=torch.float64)
            u = (
                (float(np.log(value)) + 2 * spread - 1).to(dtype)
                if shape
                else torch.tensor(float(np.log(value))).to(dtype)
            )
            u = u if parametrization == "log" else u.exp()
            truth = model_of(problem, u).solve()
            cases += measure(name, problem, u, value, truth, quick)
        save(cases)
    return cases


def table(cases: list[Case]) -> str:
    """Return a table of effectivities, one row for each certificate and dtype; all errors, then the resolved ones."""
    columns = (
        "certificate | dtype | cases | with a figure | min | median | 95 % | max | <= 3 | in [0.1, 100] | violations"
    )
    lines = [f"| {columns} |", "|" + "---|" * 11]
    rows = itertools.product((False, True), CERTIFICATES, ("float64", "float32"))
    for resolved, certificate, dtype in rows:
        own = [case for case in cases if (case.certificate, case.dtype) == (certificate, dtype)]
        own = [case for case in own if case.resolved] if resolved else own
        values = np.array([case.effectivity for case in own if case.effectivity is not None])
        if not len(values):
            continue
        figures = [f"{figure:.3g}" for figure in (values.min(), *np.quantile(values, [0.5, 0.95]), values.max())]
        shares = [
            f"{100 * share:.1f} %" for share in ((values <= 3).mean(), ((values >= 0.1) & (values <= 100)).mean())
        ]
        counts = [str(len(own)), str(len(values))]
        wrong = sum(case.violated for case in own)
        lines.append(
            "| "
            + " | ".join([certificate + ("*" if resolved else ""), dtype, *counts, *figures, *shares, str(wrong)])
            + " |"
        )
    note = f"*: without errors below {RESOLVED} rounding units of the dtype; the bars are about these.\n"
    return "\n".join(lines) + "\n\n" + note


def plot(cases: list[Case], path: Path) -> None:
    """Draw effectivity over true error, one panel for each certificate."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    names = ("A0", "A1", "B")
    figure = Figure(figsize=(12, 4), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, name in zip(figure.subplots(1, 3), names, strict=True):
        for dtype, marker in (("float64", "o"), ("float32", "x")):
            own = [c for c in cases if c.certificate == name and c.dtype == dtype and c.effectivity is not None]
            axes.loglog(
                [c.true for c in own], [c.effectivity for c in own], marker, markersize=4, alpha=0.6, label=dtype
            )
        axes.axhline(1.0, color="black", linewidth=0.8)
        axes.set(title=name, xlabel="true relative error", ylabel="certificate / true error")
        axes.legend()
    figure.savefig(path, dpi=120)


def bars(cases: list[Case]) -> dict[str, bool]:
    """Return what is asked of the certificates, and whether it holds."""
    counted = [c for c in cases if c.resolved and c.effectivity is not None]
    sharp = np.array([c.effectivity for c in counted if c.dtype == "float64" and c.certificate == "A1"])
    estimates = np.array([c.effectivity for c in counted if c.certificate == "B"])
    return {
        "no violation of a bound": not any(case.violated for case in cases),
        "A1 median below 1.5 in float64": bool(np.median(sharp) < 1.5),
        "A1 at most 3 in 94 % of float64": bool((sharp <= 3).mean() >= 0.94),
        "B within [0.1, 100] in 99 %": bool(((estimates >= 0.1) & (estimates <= 100)).mean() >= 0.99),
    }


def main() -> int:
    """Run the grid and write its results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a small part of the grid")
    parser.add_argument("--out", type=Path, default=Path("runs/effectivity"), help="folder of the results")
    options = parser.parse_args()
    torch.set_num_threads(1)
    options.out.mkdir(parents=True, exist_ok=True)

    def save(cases: list[Case]) -> None:
        text = json.dumps([asdict(case) for case in cases], indent=1)
        (options.out / "cases.json").write_text(text, encoding="utf-8")

    cases = run(options.quick, save)
    held = bars(cases)
    text = table(cases) + "\n" + "\n".join(f"- {'yes' if ok else 'NO'}: {what}" for what, ok in held.items()) + "\n"
    (options.out / "table.md").write_text(text, encoding="utf-8")
    plot(cases, options.out / "effectivity.png")
    print(text)
    return int(not all(held.values()))


if __name__ == "__main__":
    raise SystemExit(main())
