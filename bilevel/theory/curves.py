"""`error_curves`: how wrong iterates and unrolled derivatives are after every step, with bounds beside them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from bilevel.base import InnerSolver
from bilevel.core.options import describe, is_int
from bilevel.core.tree import Tree
from bilevel.inner import Coefficients
from bilevel.oracles.inner_problem import InnerProblem
from bilevel.oracles.problem import BilevelProblem
from bilevel.problems import QuadraticProblem
from bilevel.theory.quadratic_batch import QuadraticBatch
from bilevel.theory.sweeps import Errors, Oracle, QuadraticOracle, VmapOracle, batched_errors, recurrence, single_errors


@dataclass(frozen=True)
class ErrorCurves:
    """Errors of K = `steps` inner steps and of their derivatives, in the Euclidean and the Frobenius norm.

    Shapes have the batch in front where error_curves was given lists; the last axis is the iteration k = 0, ..., K.

    Attributes:
        steps: K.
        tails: numbers of last steps that the late starts differentiate.
        suboptimality: ``f(x_k) - f(x*)`` of the inner loss, (..., K+1); NaN for a problem stated by an optimality map.
        iterate: ``e_k = |x_k - x*|``, (..., K+1).
        forward: ``d_k = |dx_k - dx*|`` of the full unroll, (..., K+1).
        reverse: error of the reverse sweep from K once it has reached k, (..., K+1): the derivative of x_K that
            differentiates its last K - k steps; ``reverse[..., 0] == forward[..., K]``.
        late: error of the derivative of x_k that starts (from zero) at the truncation index ``K - tail``,
            (..., tails, K+1); ``|dx*|`` up to there.
        solution_norm: ``|x*|``, (...).
        jacobian_norm: ``|dx*|``, (...).
        iterate_bound: ``rho^k e_0``, or None where no contraction factor is known.
        forward_bound: ``rho^k d_0 + C k rho^(k-1) e_0`` (Mehmood et al. 2026, (19)), or None.
        reverse_bound: ``rho^n d_0 + C n rho^(K-1) e_0`` with n = K - k, or None.
        late_bound: ``rho^n d_0 + C n rho^(n-1) e_{k0}`` with n = k - k0 (their (21), at the true e_{k0}), or None.
    """

    steps: int
    tails: tuple[int, ...]
    suboptimality: Tensor
    iterate: Tensor
    forward: Tensor
    reverse: Tensor
    late: Tensor
    solution_norm: Tensor
    jacobian_norm: Tensor
    iterate_bound: Tensor | None = None
    forward_bound: Tensor | None = None
    reverse_bound: Tensor | None = None
    late_bound: Tensor | None = None

    @property
    def relative(self) -> ErrorCurves:
        """The same curves relative to ``|x*|`` and ``|dx*|``."""
        x, derivative = self.solution_norm[..., None], self.jacobian_norm[..., None]
        norms = {"iterate": x, "forward": derivative, "reverse": derivative, "late": derivative[..., None]}
        norms |= {f"{name}_bound": norm for name, norm in norms.items()}
        known = {name: value for name in norms if (value := getattr(self, name)) is not None}
        changed: dict[str, Any] = {name: value / norms[name] for name, value in known.items()}
        changed |= {name: torch.ones_like(getattr(self, name)) for name in ("solution_norm", "jacobian_norm")}
        return replace(self, **changed)

    @property
    def peak(self) -> tuple[Tensor, Tensor]:
        """Height ``max_k d_k / d_0`` and index of the curse: (1, 0) where the error only falls."""
        height, index = (self.forward / self.forward[..., :1]).max(-1)
        return height, index

    def truncated(self, tail: int) -> Tensor:
        """Return the error at K of the derivative of the last `tail` steps, for any tail in 1..K."""
        _checked_tails((tail,), self.steps)
        return self.reverse[..., self.steps - tail]


def error_curves(
    problem: BilevelProblem | QuadraticBatch | Sequence[BilevelProblem],
    solver: InnerSolver | Sequence[InnerSolver],
    hparams: Tree,
    steps: int,
    tails: Sequence[int] = (),
    *,
    params: Tree = None,
) -> ErrorCurves:
    """Return the errors of every iterate and of its unrolled derivatives, forward, reverse and started late.

        forward    X_{k+1} = A_k X_k + B_k,   d_k = |X_k - X*|         X* = dx*/du, by the implicit function theorem
        reverse    e(k) = |E_k - X*|,   E_k = sum_{i>=k} A_{K-1} ... A_{i+1} B_i
        late       X_{k0} = 0, then forward                             (k0 = K - tail; at K equal to E_{k0})

    A list in place of any of problem, solver, hparams and params makes a batch: all lists have its length, and what is
    no list is shared. Quadratics (`QuadraticProblem`, `RidgeProblem`, `QuadraticBatch`) with linear multistep solvers
    run as one batch in their eigenbases; one problem of any loss at many hyperparameters or starts under
    ``torch.func.vmap``; everything else one at a time. Bounds are given for gradient descent on quadratics, where
    ``rho = max |1 - h lam|`` and ``C = h |dH|`` (Mehmood et al. 2026, Theorems 7 and 8), for starts that are fixed.

    Args:
        problem: a problem, a list of them, or stacked quadratics (then `hparams` is None).
        solver: the inner solver; its own `steps` and `tol` are not looked at.
        hparams: hyperparameters of any shape, (p,) in all; a list of them for a batch.
        steps: K.
        tails: numbers of last steps to differentiate, each in 1..K.
        params: where the inner solver starts; default: the problem's start.

    Raises:
        ValueError: for tails outside 1..K, and lists of different lengths.

    >>> from bilevel import GradientDescent, QuadraticProblem
    >>> problem = QuadraticProblem.random(size=5, hyperparameters=2, condition=100.0)
    >>> curves = error_curves(problem, GradientDescent(2 / 101), torch.zeros(2).double(), 200, tails=[50])
    >>> curves.forward.shape, curves.late.shape
    (torch.Size([201]), torch.Size([1, 201]))
    >>> bool((curves.forward <= curves.forward_bound * (1 + 1e-9)).all())
    True
    """
    tails = _checked_tails(tails, steps)
    begins = (0, *(steps - tail for tail in tails))
    if isinstance(problem, QuadraticBatch):  # a second kind of argument: stacked quadratics are no problem
        return _quadratic(problem, *_solvers(problem, solver), steps, tails, begins)
    problems, solvers, us, starts, single = _broadcast(problem, solver, hparams, params)
    linear = all(each.traits.multistep for each in solvers)
    inners = [each.bind(u) for each, u in zip(problems, us, strict=True)]
    batch = QuadraticBatch.stack(problems, us, starts) if linear else None
    if batch is not None:
        curves = _quadratic(batch, solvers, inners, steps, tails, begins)
    elif linear and not single and len(set(map(id, problems))) == 1 and problems[0].optimality is None:
        oracle = VmapOracle(problems[0], us, starts)
        numbers, vectors = _numbers(solvers, inners, starts, steps, oracle)
        curves = _curves(*batched_errors(oracle, numbers, vectors, begins), steps, tails)
    else:
        curves = _one_at_a_time(list(zip(problems, solvers, us, starts, strict=True)), steps, tails, begins)
    return _first(curves) if single else curves


def _one_at_a_time(
    members: Sequence[tuple[BilevelProblem, InnerSolver, Tree, Tree]],
    steps: int,
    tails: tuple[int, ...],
    begins: Sequence[int],
) -> ErrorCurves:
    parts = [single_errors(*each, steps, begins) for each in members]
    errors = tuple(torch.cat(each) for each in zip(*(part[0] for part in parts), strict=True))
    solution, jacobian = torch.cat([part[1] for part in parts]), torch.cat([part[2] for part in parts])
    return _curves(errors, solution, jacobian, steps, tails)  # type: ignore[arg-type]


def _solvers(problem: QuadraticBatch, given: Any) -> tuple[list[InnerSolver], list[InnerProblem]]:
    """Return a solver for each stacked quadratic, and the bound problems that "auto" options are measured from."""
    solvers = list(given) if isinstance(given, list | tuple) else [given] * len(problem.start)
    if len(solvers) != len(problem.start):
        raise ValueError(f"{len(problem.start)} stacked problems got {len(solvers)} solvers.")
    if odd := [describe(each) for each in solvers if not each.traits.multistep]:
        raise ValueError(f"stacked quadratics are run by linear multistep solvers alone, got {odd[0]}.")
    return solvers, _bound(problem, solvers)


def _checked_tails(tails: Sequence[int], steps: int) -> tuple[int, ...]:
    if not is_int(steps):
        raise ValueError(f"`steps` must be a positive int, got {steps!r}.")
    for tail in tails:
        if not is_int(tail) or tail > steps:
            raise ValueError(f"a tail must be an int in 1..{steps} (the steps), got {tail!r}.")
    return tuple(tails)


def _broadcast(
    problem: Any, solver: Any, hparams: Tree, params: Tree
) -> tuple[list[BilevelProblem], list[InnerSolver], list[Tree], list[Tree], bool]:
    """Return lists of one length, and whether none was given."""
    given = {"problem": problem, "solver": solver, "hparams": hparams, "params": params}
    lengths = {name: len(value) for name, value in given.items() if isinstance(value, list)}
    if len(set(lengths.values())) > 1:
        shown = ", ".join(f"{name} {length}" for name, length in lengths.items())
        raise ValueError(f"the lists that make a batch must have one length, got {shown}.")
    count = next(iter(lengths.values()), 1)
    problems, solvers, us, xs = (value if isinstance(value, list) else [value] * count for value in given.values())
    starts = [each.start(x) for each, x in zip(problems, xs, strict=True)]
    for each, u, start in zip(problems, us, starts, strict=True):
        each.check(start, u)
    return problems, solvers, us, starts, not lengths


def _numbers(
    solvers: Sequence[Any], inners: Sequence[InnerProblem], starts: Sequence[Tree], steps: int, oracle: Oracle
) -> tuple[list[Coefficients], int]:
    """Return the numbers of all steps, and how many vectors a solver stores."""
    states = [each.init(inner, x) for each, inner, x in zip(solvers, inners, starts, strict=True)]
    vectors = 1 + len(states[0].memory)
    shared = len(set(map(id, solvers))) == 1 and len({tuple(state.measured.items()) for state in states}) == 1
    count = 1 if shared else len(solvers)
    return list(recurrence(solvers[:count], states[:count], steps, oracle.start)), vectors


def _quadratic(
    batch: QuadraticBatch,
    solvers: Sequence[InnerSolver],
    inners: Sequence[InnerProblem],
    steps: int,
    tails: tuple[int, ...],
    begins: Sequence[int],
) -> ErrorCurves:
    oracle = QuadraticOracle(batch)
    numbers, vectors = _numbers(solvers, inners, list(batch.start), steps, oracle)
    curves = _curves(*batched_errors(oracle, numbers, vectors, begins), steps, tails)
    # One stored vector and one set of numbers: x <- x - h g, the only method whose map contracts in the 2-norm.
    if vectors > 1 or len(set(map(id, numbers))) > 1:
        return curves
    (_, mix), (_, write) = numbers[0].rows[0]
    h = -torch.as_tensor(write, dtype=batch.start.dtype, device=batch.start.device)
    if not isinstance(mix, float | int) or mix != 1.0:
        return curves
    return _bounded(curves, batch, h, begins[1:])


def _bounded(curves: ErrorCurves, batch: QuadraticBatch, h: Tensor, begins: Sequence[int]) -> ErrorCurves:
    """Add the bounds of gradient descent."""
    h = h.expand(len(batch.start))
    values = batch.eigen[0]
    rho = (1.0 - h[:, None] * values).abs().amax(-1)[:, None]
    constant = (h * batch.cross_lipschitz)[:, None]
    start, first = curves.iterate[:, :1], curves.forward[:, :1]
    k = torch.arange(curves.steps + 1, dtype=values.dtype, device=values.device)
    n = k.flip(0)

    def unrolled(count: Tensor, power: Tensor, distance: Tensor) -> Tensor:
        # 0 * rho^(-1) is no number for rho = 0.
        curse = torch.where(count > 0, constant * count * rho ** power.clamp(min=0), 0.0) * distance
        return rho**count * first + curse

    late = [
        torch.where(
            k >= begin, unrolled((k - begin).clamp(min=0), k - begin - 1, curves.iterate[:, begin, None]), first
        )
        for begin in begins
    ]
    return replace(
        curves,
        iterate_bound=rho**k * start,
        forward_bound=unrolled(k, k - 1, start),
        reverse_bound=unrolled(n, torch.full_like(n, curves.steps - 1), start),
        late_bound=torch.stack(late, 1) if late else curves.late.clone(),
    )


def _curves(errors: Errors, solution: Tensor, jacobian: Tensor, steps: int, tails: tuple[int, ...]) -> ErrorCurves:
    suboptimality, iterate, forward, reverse = errors
    return ErrorCurves(steps, tails, suboptimality, iterate, forward[:, 0], reverse, forward[:, 1:], solution, jacobian)


def _first(curves: ErrorCurves) -> ErrorCurves:
    """Return the curves of a batch of one without its axis."""
    changed: dict[str, Any] = {name: value[0] for name, value in vars(curves).items() if isinstance(value, Tensor)}
    return replace(curves, **changed)


def _bound(batch: QuadraticBatch, solvers: Sequence[Any]) -> list[InnerProblem]:
    """Return the bound problems that "auto" options are measured from; without such options one serves all."""
    count = len(solvers) if any(each.automatic for each in solvers) else 1
    parts = (batch.hessian, batch.linear, batch.hessian_derivatives, batch.linear_derivatives)
    bound: list[InnerProblem] = [
        QuadraticProblem(hessian, linear, directions, derivatives).bind(linear.new_zeros(len(derivatives)))
        for hessian, linear, directions, derivatives in zip(*(part[:count] for part in parts), strict=True)
    ]
    return bound if count == len(solvers) else bound * len(solvers)
