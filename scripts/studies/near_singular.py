"""Do ClosedForm and Spectral say OK only where they are right, though H is near singular? Truth beside status.

Ridge problems with copied and nearly copied columns, one pair of them or half, fewer rows than features, columns of
very different units, Hankel spectra and low rank, and quadratics with a small eigenvalue; penalties from none to
large, both dtypes; from the data, penalty after penalty, by tensors, all at once, and by `bilevel.solution`, whose
truth is that of the outer gradient it is given. The truth has 60 digits, and takes the data as exact numbers.
With ``--spectral``: 3 to 100,000 steps of gradient descent, heavy ball or Nesterov's method, differentiated.

A hypergradient is right where it is off by at most `LIMIT` of its norm, or of half of its digits in the parts
``|dH/du| |w| |a|`` that cancel in it. Nothing that is OK should be wrong, and little that is INACCURATE right.

    python scripts/studies/near_singular.py
    python scripts/studies/near_singular.py --seeds 1000 1400
    python scripts/studies/near_singular.py --spectral
"""

from __future__ import annotations

import argparse
import warnings
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from typing import Any

import mpmath
import numpy as np
import torch

import bilevel as bl
from bilevel.base import InnerState
from bilevel.problems import RidgeProblem

KINDS = ("copies", "near copies", "wide", "units", "hankel", "low rank", "close fit", "pair", "quadratic")
LIMIT = 1e-2
WAYS = ("arrays", "tensors", "sweep", "layer")


class ByTensors(RidgeProblem):
    """Ridge regression without arrays on the host."""

    solved_on_host = False


@dataclass(frozen=True)
class Draw:
    """One problem, made again for each way, and its truth: the hypergradient, and the size of its parts."""

    make: Any
    u: torch.Tensor
    kind: str
    scalar: bool
    terms: Any
    outer: Any
    solver: Any = field(default_factory=bl.Newton)
    estimator: Any = field(default_factory=bl.ClosedForm)

    def truth(self, outer: Any = None) -> tuple[Any, float]:
        """Return the hypergradient, of the outer loss or of another gradient of it, and the size of its parts."""
        terms = np.array(self.terms(outer or self.outer))
        return (terms.sum(keepdims=True) if self.u.numel() == 1 else terms), _norm(terms)


def draw(seed: int, spectral: bool = False) -> Draw:
    """Draw everything from one seed."""
    rng = np.random.default_rng(seed)
    kind, dtype = KINDS[seed % len(KINDS)], (np.float64, np.float32)[seed // len(KINDS) % 2]
    scalar, d = spectral or bool(seed // (2 * len(KINDS)) % 2), int(rng.integers(3, 9))
    n, m = {"wide": int(rng.integers(2, d)), "pair": d - 1}.get(kind, 3 * d), int(rng.integers(3, 20))
    X, X_val = rng.standard_normal((n, d)), rng.standard_normal((m, d))
    half, mixed = d // 2, rng.standard_normal((d // 2, d))
    for Z, noise in ((X, rng.standard_normal((n, d))), (X_val, rng.standard_normal((m, d)))):
        if kind in ("copies", "near copies"):
            Z[:, -half:] = Z[:, :half]
        if kind == "near copies":
            Z[:, -half:] += 10.0 ** -rng.integers(1, 9) * noise[:, -half:]
        if kind == "low rank":
            Z[:] = Z[:, :half] @ mixed
    if kind == "pair":  # of any two places and signs, with one row fewer than features
        i, j = rng.choice(d, 2, replace=False)
        X[:, i] = rng.choice([-1.0, 1.0]) * X[:, j] + 10.0 ** rng.uniform(-8, -4) * rng.standard_normal(n)
    if kind == "units":
        scales = 10.0 ** rng.uniform(-6, 6, d)
        X, X_val = X * scales, X_val * scales
    if kind == "hankel":
        mix = np.linalg.qr(rng.standard_normal((d, d)))[0] * 10.0 ** -np.linspace(0, rng.uniform(1, 8), d)
        X, X_val = X @ mix, X_val @ mix
    w = rng.standard_normal(d)
    y, y_val = (Z @ w + (1e-6 if kind == "close fit" else 1.0) * rng.standard_normal(len(Z)) for Z in (X, X_val))
    u = np.full(() if scalar else d, rng.uniform(-38.0, 0.0)) + (0.0 if scalar else rng.standard_normal(d))
    arrays = [np.asarray(each, dtype) for each in (X, y, X_val, y_val, u)]
    tensors = [torch.from_numpy(each.copy()) for each in arrays]
    if kind == "quadratic":
        return _quadratic(rng, d, dtype, scalar, spectral)
    X, y, X_val, y_val, u = (_exact(each) for each in arrays)
    penalty = [mpmath.exp(u if scalar else u[i]) for i in range(d)]
    H, moment = X.T * X / X.rows + mpmath.diag(penalty), X.T * y / X.rows
    ridge: dict[str, Any] = {"arrays": RidgeProblem, "tensors": ByTensors}
    name = "scalar" if scalar else "per_feature"
    make = lambda way: ridge.get(way, RidgeProblem)(*tensors[:4], name)  # noqa: E731
    outer = lambda w: X_val.T * (X_val * w - y_val) / X_val.rows  # noqa: E731
    if spectral:
        solver, terms = _unrolled(rng, H, -moment, penalty[0])
        return Draw(make, tensors[4], kind, scalar, terms, outer, solver, bl.Spectral())
    terms = _implicit(H, moment, lambda w: [penalty[i] * w[i] for i in range(d)])
    return Draw(make, tensors[4], kind, scalar, terms, outer)


def _implicit(H: Any, b: Any, turn: Any) -> Any:
    """Return the gradient of the outer loss -> what the coordinates add to the hypergradient at the w of H w = b."""
    w = mpmath.lu_solve(H, b)
    turned = turn(w)
    return lambda outer: [-each * other for each, other in zip(mpmath.lu_solve(H, outer(w)), turned, strict=True)]


def _unrolled(rng: Any, H: Any, b: Any, slope: Any) -> tuple[Any, Any]:
    """Draw a solver, and return it with what the eigenvalues of H add to its unrolled derivative by a shift of H."""
    values, Q = mpmath.eigsy(H)
    linear, steps = Q.T * b, int(10.0 ** rng.uniform(0.5, 5))
    h = float(rng.uniform(0.3, 1.0) / values[len(values) - 1])
    solver = (
        bl.GradientDescent(h, steps=steps),
        bl.HeavyBall(h, float(rng.uniform(0.1, 0.95)), steps=steps),
        bl.Nesterov(h, float(rng.uniform(0.1, 0.95)), steps=steps),
    )[rng.integers(3)]
    numbers = solver.coefficients(InnerState(None, (), 1))
    read, write, mix = (_exact(np.array(each)) for each in (numbers.read, numbers.write, numbers.mix))
    p = len(read)
    z, by_value = mpmath.zeros(len(values), 1), []
    for i, value in enumerate(values):
        dual = mpmath.zeros(2 * p + 2)  # of (d state, 0, state, 1)
        for first in (0, p + 1):
            for j in range(p):
                dual[first + j, first + p] = write[j] * linear[i]
                for k in range(p):
                    dual[first + j, first + k] = mix[j, k] + value * write[j] * read[k]
                    dual[j, p + 1 + k] = write[j] * read[k]
            dual[first + p, first + p] = 1
        power = dual**steps
        z[i] = power[p + 1, 2 * p + 1]
        by_value.append(power[0, 2 * p + 1])
    return solver, lambda outer: [slope * w * each for w, each in zip(Q.T * outer(Q * z), by_value, strict=True)]


def _quadratic(rng: Any, d: int, dtype: Any, scalar: bool, spectral: bool) -> Draw:
    """Draw a `QuadraticProblem` of one hyperparameter whose H has a small eigenvalue."""
    basis = np.linalg.qr(rng.standard_normal((d, d)))[0]
    values = 10.0 ** np.append(rng.uniform(-2, 2, d - 1), -rng.uniform(2, 18))
    H, b, direction = (basis * values) @ basis.T, rng.standard_normal(d), rng.standard_normal((d, d))
    H, direction = (H + H.T) / 2, np.eye(d) if scalar else direction @ direction.T
    target, u = rng.standard_normal(d), np.array([10.0 ** -rng.uniform(0, 16)])
    arrays = [np.asarray(each, dtype) for each in (H, b, direction[None], np.zeros((1, d)), target)]
    tensors = [torch.from_numpy(each.copy()) for each in arrays]
    u = np.asarray(u, dtype)
    H, b, slope, target = (_exact(each) for each in (arrays[0], arrays[1], arrays[2][0], arrays[4]))
    H = H + slope * mpmath.mpf(float(u[0]))
    make = lambda way: bl.QuadraticProblem(*tensors)  # noqa: E731
    outer, u = (lambda w: w - target), torch.from_numpy(u.copy())
    if spectral:
        solver, terms = _unrolled(rng, H, b, mpmath.mpf(1))
        return Draw(make, u, "quadratic", scalar, terms, outer, solver, bl.Spectral())
    return Draw(make, u, "quadratic", scalar, _implicit(H, -b, lambda w: slope * w), outer)


def _exact(values: Any) -> Any:
    if values.ndim == 2:
        return mpmath.matrix(values.tolist())
    return mpmath.matrix(values.tolist()) if values.ndim else mpmath.mpf(float(values))


def _norm(values: Any) -> float:
    return float(mpmath.sqrt(sum(each * each for each in values)))


def answers(case: Draw, way: str) -> list[tuple[str, Any, Any]]:
    """Return statuses and hypergradients of one way to ask, and the outer gradients that were given, if any."""
    problem = case.make(way)
    if way == "layer":
        return [_layer(case, problem)]
    if way == "sweep":
        if problem.spectrum() is None:
            return []
        try:
            how = (problem,) if isinstance(case.estimator, bl.ClosedForm) else (problem, case.solver)
            swept = case.estimator.sweep(*how, torch.stack([case.u, case.u]))
        except ValueError:
            return [("failed", None, None)]
        verdicts = swept.verdicts or [bl.Verdict()]
        return [(verdicts[0].status.name, swept.hypergradients[0], None)]
    found = []
    for _ in range(2):  # from the data, and again
        made = bl.hypergradient(problem, case.solver, case.estimator, case.u, on_failure="return")
        found.append((made.status.name if made.status.usable else "failed", made.hypergradient, None))
    return found


def _layer(case: Draw, problem: Any) -> tuple[str, Any, Any]:
    """Return status and gradient of `solution` under the problem's outer loss in its own dtype, and the cotangent."""
    u, said = case.u.clone().requires_grad_(), "OK"
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            w = bl.solution(problem, case.solver, case.estimator, u, on_failure="warn")
            w.retain_grad()
            problem.outer_loss(w, case.u).backward()
        except bl.HypergradientError:
            return "failed", None, None
    if caught or not u.grad.isfinite().all():
        said = "INACCURATE" if u.grad.isfinite().all() else "failed"
    cotangent = _exact(w.grad.numpy())
    return said, u.grad, lambda w: cotangent


def judged(case: Draw, way: str) -> list[tuple[str, float]]:
    """Return statuses, and by how much the hypergradients are off: `LIMIT` is the most that is right."""
    found = []
    for status, gradient, outer in answers(case, way):
        off = float("nan")
        if status != "failed":
            truth, parts = case.truth(outer)
            g = [mpmath.mpf(float(each)) for each in gradient.reshape(-1)]
            error = _norm([a - b for a, b in zip(g, truth, strict=True)])
            off = min(error / _norm(truth), LIMIT * error / (torch.finfo(case.u.dtype).eps ** 0.5 * parts))
        found.append((status, off))
    return found


def main() -> int:
    """Print how many are OK, in doubt, right and wrong, by the kind of problem and the dtype."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs=2, default=(0, 400))
    parser.add_argument("--spectral", action="store_true", help="steps on the spectrum, and no closed form")
    parser.add_argument("--show", action="store_true", help="name the cases that are OK and wrong")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    mpmath.mp.dps = 60
    counts: dict[tuple[str, str], Counter[str]] = defaultdict(Counter)
    worst: dict[tuple[str, str], float] = defaultdict(float)
    for seed in range(*options.seeds):
        case = draw(seed, options.spectral)
        key = case.kind, str(case.u.dtype)[6:]
        for way in WAYS if case.kind != "quadratic" else WAYS[1:]:
            for status, off in judged(case, way):
                said = "right" if off <= LIMIT else "wrong"
                counts[key]["failed" if status == "failed" else f"{status} {said}"] += 1
                if status == "OK":
                    worst[key] = max(worst[key], off)
                    if options.show and off > LIMIT:
                        print(f"seed {seed} {key} {way}: off by {off:.2g}")
    columns = ("OK right", "OK wrong", "INACCURATE right", "INACCURATE wrong", "failed")
    print(f"{'':24}" + "".join(f"{each:>18}" for each in columns) + f"{'worst OK':>12}")
    counts["all", ""] = sum(counts.values(), Counter())
    worst["all", ""] = max(worst.values())
    for key, of_key in counts.items():
        figures = "".join(f"{of_key[each]:18}" for each in columns)
        print(f"{key[0]:14}{key[1]:10}{figures}{worst[key]:12.1e}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
