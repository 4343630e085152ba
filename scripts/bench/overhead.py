"""What the library adds to a hand-written loop that calls the same oracles, at 500 features, and to an outer step."""

from __future__ import annotations

import copy
import time
from unittest import mock

import torch
from common import emit, interleave, medians, ratio, relative_error

import bilevel as bl

FEATURES, STEPS = 500, 200


def main() -> bool:
    """Compare a full unroll and an implicit hypergradient with loops written around `grad`, `vjp` and `hvp`."""
    generator = torch.Generator().manual_seed(0)
    ok = True
    for rows in (1_000, 5_000):
        X = torch.randn(rows, FEATURES, generator=generator, dtype=torch.float64)
        y = (X @ torch.randn(FEATURES, generator=generator, dtype=torch.float64) > 0).double()
        for kind in (bl.problems.LogisticProblem, bl.problems.RidgeProblem):
            problem = kind(X, y, X, y, "per_feature")
            u = problem.initial_hparams(-3.0)
            h = 1.0 / problem.bind(u).curvature(problem.params).largest
            ok &= _compare(problem, u, h, f"{kind.__name__}, {rows} x {FEATURES}")
    for name, make in OPTIMIZERS.items():
        ok &= _outer_step(name, make)
    return ok


OPTIMIZERS: dict[str, bl.outer.MakeOptimizer] = {
    "SGD": lambda tensors: torch.optim.SGD(tensors, lr=1e-3),
    "Adam": lambda tensors: torch.optim.Adam(tensors, lr=1e-3),
}
OUTER_STEPS, PENALTIES = 200, 30


def _outer_step(name: str, make: bl.outer.MakeOptimizer) -> bool:
    """Take the CPU time of an outer step whose hypergradient is at hand, beside that of the optimizer alone."""
    generator = torch.Generator().manual_seed(0)
    X, y = (torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in ((50, PENALTIES), (50,)))
    problem = bl.problems.RidgeProblem(X, y, X, y, "per_feature")
    u = problem.initial_hparams(0.0)
    outer = bl.OuterOptimizer(problem, bl.GradientDescent(steps=5), bl.Implicit(), u, make, on_failure="return")
    estimate = outer.step()
    x = torch.zeros(PENALTIES, dtype=torch.float64, requires_grad=True)
    alone, x.grad = make([x]), torch.ones_like(x)

    def steps() -> None:
        for _ in range(OUTER_STEPS):
            outer.step()
        outer.history.clear()

    def alone_steps() -> None:
        for _ in range(OUTER_STEPS):
            alone.step()

    def deep_copies() -> None:
        for _ in range(OUTER_STEPS):
            copy.deepcopy(outer.optimizer.state_dict())

    def ready(*_: object, **__: object) -> bl.Estimate:
        return estimate

    with mock.patch("bilevel.outer.loop.hypergradient", ready):
        ways = {"step": steps, "optimizer alone": alone_steps, "deep copies of its state": deep_copies}
        seconds = interleave(ways, rounds=25, clock=time.process_time)
    micro = {way: 1e6 * value / OUTER_STEPS for way, value in medians(seconds).items()}
    return emit(
        f"overhead: outer step: {name}, {PENALTIES} hyperparameters",
        micro["step"],
        "at most 60 us of CPU time outside the hypergradient",
        micro["step"] <= 60,
        microseconds=micro,
    )


def _compare(problem: bl.BilevelProblem, u: torch.Tensor, h: float, name: str) -> bool:
    solver = bl.GradientDescent(step_size=h, steps=STEPS)

    def forward() -> tuple[object, list[torch.Tensor], torch.Tensor]:
        inner = problem.bind(u)
        x, stored = problem.params, []
        for _ in range(STEPS):
            stored.append(x)
            x = torch.sub(x, inner.grad(x), alpha=h)
        inner.grad(x).norm()
        return inner, stored, x

    def unroll_by_hand() -> torch.Tensor:
        inner, stored, x = forward()
        _, a, total = problem.outer_value_and_grads(x, u)
        for x in reversed(stored):
            by_params, by_hparams = inner.linearize(x).vjp(a)
            total = torch.sub(total, by_hparams, alpha=h)
            a = torch.sub(a, by_params, alpha=h)
        return total

    def implicit_by_hand() -> torch.Tensor:
        inner, _, x = forward()
        _, b, _ = problem.outer_value_and_grads(x, u)
        point = inner.linearize(x)
        w, r = torch.zeros_like(b), b
        p, rr = r, torch.dot(r, r)
        goal = 1e-16 * rr
        while bool(rr > goal):
            product = point.hvp(p)
            alpha = rr / torch.dot(p, product)
            w, r = w + alpha * p, r - alpha * product
            rr, previous = torch.dot(r, r), rr
            p = r + (rr / previous) * p
        return -point.cross(w)

    ok = True
    for label, estimator, hand in (
        ("full unroll", bl.FullUnroll(), unroll_by_hand),
        ("implicit", bl.Implicit(bl.CG(tol=1e-8)), implicit_by_hand),
    ):

        def ours(estimator: bl.HypergradEstimator = estimator) -> bl.Estimate:
            return bl.hypergradient(problem, solver, estimator, u)

        seconds = interleave({"bilevel": ours, "by hand": hand}, rounds=15)
        share = ratio(seconds, "bilevel", "by hand")
        ok &= emit(
            f"overhead: {label}: {name}",
            share - 1,
            "at most 0.15 above a hand-written loop",
            share <= 1.15,
            relative_difference=relative_error(ours().hypergradient, hand()),
            seconds=medians(seconds),
        )
    return ok


if __name__ == "__main__":
    raise SystemExit(not main())
