"""P3c: data cleaning on digits, a weight for each of 898 training rows of which half carry random labels."""

from __future__ import annotations

from functools import partial
from types import SimpleNamespace
from typing import Any

import implicit_peers as peers
from contest import Asked, Contestant, Problem, Task
from p3_softmax import OURS, WORDS, rivals
from softmax_peers import data, formulas


def _ours(d: SimpleNamespace, kind: str) -> dict[str, Any]:
    import torch

    import bilevel as bl

    parts = [torch.as_tensor(part) for part in (d.X, d.y, d.X_val, d.y_val)]
    problem = bl.problems.SampleWeightProblem(*parts, penalty=d.penalty)
    newton = bl.Newton(linear_solver=bl.CG(), tol=peers.TOL) if kind == "Newton" else None
    return peers.ours(problem, newton or bl.QuasiNewton(tol=peers.TOL), d)


PROBLEMS = [
    Problem(
        key="p3c",
        title="P3c: data cleaning, digits, 898 sample weights, half of the labels random",
        words=WORDS + " Weights are sigmoid(u); the penalty on W is 1e-3.",
        sizes={"full": {"rows": 898, "steps": 20}, "quick": {"rows": 898, "steps": 3}},
        data=partial(data, "weights", penalty=1e-3, corrupted=0.5),
        reference=lambda d: peers.dense_newton(formulas(d), d),
        tasks={
            "first": Task("first hypergradient"),
            "loop": Task("all warm outer steps", tolerance=1e-3, rounds=3),
        },
        contestants=[
            Contestant(OURS[0], lambda d: _ours(d, "quasi-Newton"), "bilevel"),
            Contestant(OURS[1], lambda d: _ours(d, "Newton"), "bilevel"),
            *rivals(),
        ],
        asked=[
            Asked("first", OURS, ["jaxopt*"], 2.5, 4.0),
            Asked("first", OURS, ["scipy*"], 2.5, 4.0),
            Asked("loop", OURS, ["jaxopt*"], 3.0, 5.0),
            Asked("loop", OURS, ["scipy*"], None),
        ],
        absent=peers.ABSENT,
    )
]
