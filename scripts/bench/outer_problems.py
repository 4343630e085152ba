"""Problems, starts and runs of `outer.py`: linear models with log penalties, alone, in groups, or for each weight."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import scipy.optimize
import torch
from numpy.typing import NDArray
from sklearn.datasets import load_breast_cancer, load_diabetes, load_digits

import bilevel as bl
from bilevel.outer import loop

Vector = NDArray[np.float64]
EVALUATIONS = 100
"""Most evaluations of one run."""
MARKS = (1e-2, 1e-4, 1e-6)
"""Shares of the best value known, above it, to which evaluations are counted."""


# Problems ---------------------------------------------------------------------------------------------------------


class Grouped:
    """A linear model whose neighbouring weights share a penalty: `groups` runs of features of equal length."""

    def __init__(self, *data: Any, groups: int, **options: Any) -> None:
        super().__init__(*data, "per_feature", **options)  # type: ignore[call-arg]
        count = self.train.X.shape[0]  # type: ignore[attr-defined]
        owner = torch.arange(count) // max(1, count // groups)
        self.owner = owner.clamp(max=groups)
        self._hparams_shape = (int(self.owner.max()) + 1,)

    def spread(self, hparams: torch.Tensor) -> torch.Tensor:
        """Return the value of each feature's group."""
        return hparams[self.owner]

    def gather(self, weights: torch.Tensor) -> torch.Tensor:
        """Return the sum over each group."""
        return weights.new_zeros(self._hparams_shape).index_add_(0, self.owner, weights.expand(len(self.owner)))


class GroupedRidge(Grouped, bl.problems.RidgeProblem):
    """Ridge regression with a penalty for each group of features."""


class GroupedLogistic(Grouped, bl.problems.LogisticProblem):
    """Logistic regression with a penalty for each group of features."""


def real(name: str, kind: str, seed: int) -> tuple[Vector, ...]:
    """Return rows of a data set, 60 % to train and 40 % to validate, standardised by the training rows."""
    data = {"diabetes": load_diabetes, "breast_cancer": load_breast_cancer}[name]()
    X, y = data.data, data.target.astype(float)
    order = np.random.default_rng(1 + seed).permutation(len(y))
    count = int(0.4 * len(y))
    val, train = order[:count], order[count:]
    X = (X - X[train].mean(0)) / np.maximum(X[train].std(0), 1e-12)
    if kind == "ridge":
        y = (y - y[train].mean()) / y[train].std()
    return X[train], y[train], X[val], y[val]


def ill_scaled(seed: int, rows: int = 215, features: int = 102) -> tuple[Vector, ...]:
    """Return data like spectra: neighbouring columns that correlate to 1 - 1e-6, scales over five decades."""
    rng = np.random.default_rng(seed)
    at = np.linspace(0, 1, features - 2)
    bumps = np.stack([np.exp(-0.5 * ((at - centre) / 0.12) ** 2) for centre in np.linspace(0, 1, 9)])
    shares = rng.standard_normal((rows, 9)) * 0.5 ** np.arange(9)
    spectra = shares @ bumps + 3 + 1e-4 * rng.standard_normal((rows, features - 2))
    further = np.stack([1e3 * rng.standard_normal(rows), 1e-2 * rng.standard_normal(rows)], 1)
    X = np.hstack([spectra, further])
    y = shares @ rng.standard_normal(9) * 4 + shares[:, 0] ** 2 + 0.3 * rng.standard_normal(rows)
    order = np.random.default_rng(1 + seed).permutation(rows)
    count = int(0.4 * rows)
    val, train = order[:count], order[count:]
    X, y = X - X.mean(0), y - y.mean()
    return X[train], y[train], X[val], y[val]


def wide(seed: int) -> tuple[Vector, ...]:
    """Return 3,600 rows of 300 correlated features of which a third has an effect, and 1,800 to validate."""
    rng = np.random.default_rng(5 + seed)
    X = rng.standard_normal((5400, 300)) @ (np.eye(300) + 0.3 * rng.standard_normal((300, 300)) / 17)
    w = rng.standard_normal(300) * (rng.random(300) < 0.3) * rng.exponential(1, 300)
    y = 0.3 * (X @ w) + 2 * rng.standard_normal(5400)
    return X[:3600], y[:3600], X[3600:], y[3600:]


def ijcnn_like(seed: int, train: int, val: int) -> tuple[Vector, ...]:
    """Return data of the shape of ijcnn1: ten one-hot and twelve other columns, 12 % positives."""
    rng, at = np.random.default_rng(seed), [np.random.default_rng(each + 4 * seed) for each in (1, 2, 3)]
    mixing = at[0].standard_normal((3, 12))

    def inputs(rows: int) -> Vector:
        hot = np.eye(10)[rng.integers(0, 10, rows)]
        factors = rng.standard_normal((rows, 3))
        return np.hstack([hot, np.tanh(0.7 * factors @ mixing + 0.4 * rng.standard_normal((rows, 12)))])

    X, X_val = inputs(train), inputs(val)
    w = at[1].standard_normal(22) * np.r_[np.ones(10), 2.5 * np.ones(12)] * (at[2].random(22) < 0.6)
    y, y_val = ((rng.random(len(each)) < 1 / (1 + np.exp(-(each @ w - 3.2)))).astype(float) for each in (X, X_val))
    return X, y, X_val, y_val


def digits(seed: int) -> bl.BilevelProblem:
    """Return softmax regression on digits with a penalty for each of 610 weights; its training rows are separable."""
    X, y = load_digits(return_X_y=True)
    order = np.random.default_rng(1 + seed).permutation(len(y))
    val, train = order[: int(0.4 * len(y))], order[int(0.4 * len(y)) :]
    spread = X[train].std(0)
    alive = np.argsort(-spread)[:61]
    X = (X[:, alive] - X[train][:, alive].mean(0)) / np.maximum(spread[alive], 1e-12)
    return made(bl.problems.SoftmaxProblem, (X[train], y[train], X[val], y[val]), "per_weight")


def made(kind: type[Any], data: tuple[Vector, ...], penalty: str | int) -> bl.BilevelProblem:
    """Return a problem in float64; an int is a number of groups."""
    tensors = [torch.from_numpy(np.ascontiguousarray(each)) for each in data]
    if isinstance(penalty, int):
        kind = GroupedRidge if kind is bl.problems.RidgeProblem else GroupedLogistic
        return kind(*tensors, groups=penalty)  # type: ignore[no-any-return]
    return kind(*tensors, penalty)  # type: ignore[no-any-return]


RIDGE, LOGISTIC = bl.problems.RidgeProblem, bl.problems.LogisticProblem
PROBLEMS: dict[str, Callable[[int], bl.BilevelProblem]] = {
    "ridge diabetes, 1": lambda seed: made(RIDGE, real("diabetes", "ridge", seed), "scalar"),
    "ridge ill-scaled, 1": lambda seed: made(RIDGE, ill_scaled(seed), "scalar"),
    "ridge diabetes, 5 groups": lambda seed: made(RIDGE, real("diabetes", "ridge", seed), 5),
    "ridge diabetes, 10": lambda seed: made(RIDGE, real("diabetes", "ridge", seed), "per_feature"),
    "ridge breast_cancer, 5 groups": lambda seed: made(RIDGE, real("breast_cancer", "ridge", seed), 5),
    "ridge 3600x300, 5 groups": lambda seed: made(RIDGE, wide(seed), 5),
    "logistic breast_cancer, 5 groups": lambda seed: made(LOGISTIC, real("breast_cancer", "logistic", seed), 5),
    "ridge breast_cancer, 30": lambda seed: made(RIDGE, real("breast_cancer", "ridge", seed), "per_feature"),
    "ridge 3600x300, 300": lambda seed: made(RIDGE, wide(seed), "per_feature"),
    "ridge 3600x300, 12 groups": lambda seed: made(RIDGE, wide(seed), 12),
    "logistic breast_cancer, 1": lambda seed: made(LOGISTIC, real("breast_cancer", "logistic", seed), "scalar"),
    "ijcnn1like 1000, 22": lambda seed: made(LOGISTIC, ijcnn_like(seed, 1000, 1800), "per_feature"),
    "ijcnn1like 5000, 22": lambda seed: made(LOGISTIC, ijcnn_like(seed, 5000, 9170), "per_feature"),
    "ijcnn1like 49990, 22": lambda seed: made(LOGISTIC, ijcnn_like(seed, 49990, 91701), "per_feature"),
    "softmax digits, 610": digits,
}
TABLE = tuple(PROBLEMS)[:7]
"""The problems whose worst start counts."""


def centre_of(problem: Any) -> torch.Tensor:
    """Return the log penalties at which a lone weight is shrunk by half."""
    return torch.log(problem.penalty_scales(problem.initial_hparams()))


def starts_of(problem: Any, count: int, seed: int) -> list[torch.Tensor]:
    """Return random starts: an offset U(-6, 4) around the centre, and N(0, 1.5) for each of several penalties."""
    rng, centre = np.random.default_rng(seed), centre_of(problem)
    found = []
    for _ in range(count):
        offset = rng.uniform(-6, 4)
        moved = 1.5 * rng.standard_normal(centre.shape) if centre.numel() > 1 else np.zeros(centre.shape)
        found.append(centre + torch.from_numpy(np.asarray(offset + moved)))
    return found


# Runs -------------------------------------------------------------------------------------------------------------


@dataclass
class Trace:
    """What a run found: a value for each evaluation (NaN for a failed one), processor seconds, and how it ended."""

    values: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    equivalents: list[float] = field(default_factory=list)
    stopped: str = ""
    hparams: Any = None

    def told(self, estimate: bl.Estimate, seconds: float) -> float:
        """Take one evaluation; returns its outer loss, corrected to that at the inner solution."""
        value = estimate.outer_loss - (estimate.certificate.value_error or 0.0)
        self.values.append(value if estimate.status.ok else float("nan"))
        self.seconds.append(seconds)
        self.equivalents.append(estimate.cost.gradient_equivalents)
        return value

    @property
    def best(self) -> float:
        """The smallest value."""
        return float(np.nanmin(self.values)) if np.isfinite(self.values).any() else float("inf")

    def until(self, goal: float) -> int | None:
        """Return the number of evaluations until a value is at most `goal`; None if none is."""
        hit = np.flatnonzero(np.asarray(self.values) <= goal)
        return int(hit[0]) + 1 if len(hit) else None


def searched(
    problem: Any,
    u: torch.Tensor,
    rule: Any,
    solver: Any = None,
    estimator: Any = None,
    most: int = EVALUATIONS,
    **options: Any,
) -> Trace:
    """Run `OuterOptimizer`, one evaluation after the other."""
    trace, start = Trace(), time.process_time()

    def told(outer: bl.OuterOptimizer, estimate: bl.Estimate) -> None:
        nonlocal start
        now = time.process_time()
        trace.told(estimate, now - start)
        start = now

    parts = (problem, solver or bl.QuasiNewton(), estimator or bl.Implicit(), u, rule)
    outer = bl.OuterOptimizer(*parts, on_failure="return", callbacks=[told], **options)
    result = outer.run(most, progress=False)
    trace.stopped, trace.hparams = result.stopped, result.best_hparams
    return trace


def exactly(problem: Any, u: torch.Tensor, solver: Any, estimator: Any) -> tuple[list[float], list[float], str]:
    """Run `HyperNewton`: the exact outer loss at the accepted point after each evaluation, their costs, and its end."""
    values: list[float] = []
    spent: list[float] = []
    last: Any = None

    def told(outer: bl.OuterOptimizer, estimate: bl.Estimate) -> None:
        nonlocal last
        spent.append(estimate.cost.gradient_equivalents)
        if not any(record.accepted for record in outer.history):
            values.append(float("inf"))
        elif last is None or not torch.equal(outer.hparams, last):
            last = outer.hparams
            values.append(bl.hypergradient(problem, bl.QuasiNewton(), bl.Implicit(), last, check=False).outer_loss)
        else:
            values.append(values[-1])

    outer = bl.OuterOptimizer(problem, solver, estimator, u, bl.HyperNewton(), on_failure="return", callbacks=[told])
    return values, spent, outer.run(EVALUATIONS, progress=False).stopped


def adam(rate: float) -> Callable[[list[torch.Tensor]], torch.optim.Optimizer]:
    """Return what makes torch's Adam."""
    return lambda tensors: torch.optim.Adam(tensors, lr=rate)


class Ended(Exception):
    """A peer has taken all its evaluations."""


def oracle(problem: Any, trace: Trace, most: int, u: torch.Tensor) -> Callable[[Vector], tuple[float, Vector]]:
    """Return a function of log penalties that gives outer loss and hypergradient, warm-started, into a trace."""
    carry = bl.Carry()

    def at(x: Vector) -> tuple[float, Vector]:
        nonlocal carry
        if len(trace.values) >= most:
            raise Ended
        start = time.process_time()
        at_u = torch.from_numpy(np.clip(x, -60.0, 60.0)).reshape(u.shape)
        estimate = bl.hypergradient(
            problem, bl.QuasiNewton(), bl.Implicit(), at_u, carry=carry, on_failure="return", check=not trace.values
        )
        carry = estimate.carry if estimate.status.usable else bl.Carry()
        value = trace.told(estimate, time.process_time() - start)
        return value, estimate.hypergradient.reshape(-1).numpy().astype(float)

    return at


def by_scipy(method: str) -> Callable[[Any, torch.Tensor, int], Trace]:
    """Return a run of `scipy.optimize.minimize` in log penalties."""

    def run(problem: Any, u: torch.Tensor, most: int) -> Trace:
        trace = Trace()
        options = {"L-BFGS-B": {"ftol": 1e-15, "gtol": 1e-12}, "trust-constr": {"gtol": 1e-12, "xtol": 1e-12}}[method]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                scipy.optimize.minimize(
                    oracle(problem, trace, most, u),
                    u.reshape(-1).numpy(),
                    jac=True,
                    method=method,
                    options=options | {"maxiter": most},
                )
            except Ended:
                pass
            except (ValueError, ArithmeticError, np.linalg.LinAlgError) as error:
                trace.stopped = type(error).__name__
        return trace

    return run


def by_torch_lbfgs(problem: Any, u: torch.Tensor, most: int) -> Trace:
    """Run torch's L-BFGS with its line search."""
    trace, z = Trace(), u.reshape(-1).clone().requires_grad_()
    at = oracle(problem, trace, most, u)
    optimizer = torch.optim.LBFGS([z], max_iter=most, line_search_fn="strong_wolfe", tolerance_grad=0.0)

    def closure() -> float:
        value, gradient = at(z.detach().numpy().copy())
        z.grad = torch.from_numpy(gradient)
        return value

    try:
        optimizer.step(closure)  # type: ignore[arg-type]
    except Ended:
        pass
    except (ValueError, ArithmeticError) as error:
        trace.stopped = type(error).__name__
    return trace


def by_optuna(problem: Any, u: torch.Tensor, most: int) -> Trace:
    """Run Optuna's TPE on values alone, in the box of the searches; ImportError where it is not installed."""
    import optuna

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    trace, centre = Trace(), centre_of(problem).reshape(-1).numpy()
    at = oracle(problem, trace, most, u)

    def objective(trial: Any) -> float:
        moved = [trial.suggest_float(str(index), -28.0, 10.0) for index in range(len(centre))]
        return at(centre + np.asarray(moved))[0]

    optuna.create_study(sampler=optuna.samplers.TPESampler(seed=0)).optimize(objective, n_trials=most)
    return trace


def peers() -> dict[str, Callable[[Any, torch.Tensor, int], Trace]]:
    """Return what the searches stand beside, by name; each is called with a problem, a start and most evaluations."""

    def by_adam(rate: float) -> Callable[[Any, torch.Tensor, int], Trace]:
        return lambda problem, u, most: searched(problem, u, adam(rate), most=most)

    found: dict[str, Callable[[Any, torch.Tensor, int], Trace]] = {
        f"Adam {rate:g}": by_adam(rate) for rate in (0.03, 0.1, 0.3, 1.0)
    }
    found |= {f"scipy {method}": by_scipy(method) for method in ("L-BFGS-B", "trust-constr")}
    found["torch LBFGS"] = by_torch_lbfgs
    try:
        import optuna  # noqa: F401
    except ImportError:
        return found
    return found | {"Optuna TPE": by_optuna}


def left_after(problem: Any, u: torch.Tensor) -> tuple[float, float]:
    """Return the exact outer loss at some hyperparameters, and by how much long runs from there lower it.

    One run is ours to 1e-14; the other is scipy's L-BFGS-B in the shrinkage t, in a box, which shares no code with it.
    """
    exact = {"solver": bl.QuasiNewton(tol=1e-12), "estimator": bl.Implicit(bl.CG(tol=1e-12))}
    centre = centre_of(problem).reshape(-1).numpy()
    trace, carry = Trace(), bl.Carry()

    def at(t: Vector) -> tuple[float, Vector]:
        nonlocal carry
        moved = torch.from_numpy(centre - np.log(t) + np.log1p(-t)).reshape(u.shape)
        estimate = bl.hypergradient(problem, *exact.values(), moved, carry=carry, on_failure="return", check=False)
        value = trace.told(estimate, 0.0)
        if not estimate.status.ok:
            # The outer loss at what is no inner solution may be lower than any: a wall, so that the search turns back.
            carry = bl.Carry()
            return 10 * abs(trace.values[0]), np.zeros_like(t)
        carry = estimate.carry
        return value, -estimate.hypergradient.reshape(-1).numpy() / (t * (1 - t))

    low, high = (1 / (1 + np.exp(-each)) for each in (-10.0, 28.0))
    t = np.clip(1 / (1 + np.exp(u.reshape(-1).numpy() - centre)), low, high)
    first, _ = at(t)
    scipy.optimize.minimize(
        at, t, jac=True, method="L-BFGS-B", bounds=[(low, high)] * len(t), options={"ftol": 1e-15, "gtol": 1e-13}
    )
    ours = searched(problem, u, bl.HyperNewton(tol=1e-14, start="given"), **exact)
    return first, first - min(trace.best, ours.best)


@contextmanager
def timed(module: Any, name: str, clock: Callable[[], float] = time.process_time) -> Iterator[list[float]]:
    """Add up the processor seconds in a function while the context is open: a list of one number for each call."""
    spent: list[float] = []
    function = getattr(module, name)

    def call(*arguments: Any, **options: Any) -> Any:
        start = clock()
        try:
            return function(*arguments, **options)
        finally:
            spent.append(clock() - start)

    setattr(module, name, call)
    try:
        yield spent
    finally:
        setattr(module, name, function)


def loop_of() -> Any:
    """Return the module whose `hypergradient` the outer loop calls."""
    return loop
