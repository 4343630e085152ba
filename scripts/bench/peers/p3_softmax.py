"""P3: softmax regression on digits, one penalty for each of 640 weights: the first hypergradient and 20 outer steps."""

from __future__ import annotations

from functools import partial
from types import SimpleNamespace
from typing import Any

import implicit_peers as peers
from contest import Asked, Contestant, Problem, Task
from softmax_peers import data, formulas, jax_losses, torch_losses


def _ours(d: SimpleNamespace, kind: str) -> dict[str, Any]:
    import torch

    import bilevel as bl

    parts = [torch.as_tensor(part) for part in (d.X, d.y, d.X_val, d.y_val)]
    problem = bl.problems.SoftmaxProblem(*parts, penalty="per_weight")
    newton = bl.Newton(linear_solver=bl.CG(), tol=peers.TOL) if kind == "Newton" else None
    return peers.ours(problem, newton or bl.QuasiNewton(tol=peers.TOL), d)


def rivals() -> list[Contestant]:
    """Return the peers; they take any softmax problem of `softmax_peers`."""
    scipy = Contestant("scipy L-BFGS, CG by hand", lambda d: peers.scipy(formulas(d), d), "scipy", "formulas by hand")
    return [
        scipy,
        Contestant("jaxopt LBFGS, implicit CG", lambda d: peers.jaxopt(*jax_losses(d), d), "jaxopt", compiles="first"),
        Contestant("torch L-BFGS, CG by hand", lambda d: peers.torch_by_hand(*torch_losses(d), d), "torch"),
        Contestant(
            "torchopt custom_root, CG", lambda d: peers.torchopt(*torch_losses(d), d), "torchopt", "no warm loop"
        ),
    ]


WORDS = (
    "Inner gradient norm 1e-8, adjoint residual 1e-8. The loop is 20 steps of Adam at rate 0.1, warm started; its "
    "answer is the last hypergradient. Reference: dense Newton to the rounding floor, in NumPy."
)
OURS = ["bilevel QuasiNewton, Implicit(CG)", "bilevel Newton(CG), Implicit(CG)"]

PROBLEMS = [
    Problem(
        key="p3",
        title="P3: softmax regression, digits (898 x 64, 10 classes), 640 penalties",
        words=WORDS,
        sizes={"full": {"rows": 898, "steps": 20}, "quick": {"rows": 898, "steps": 3}},
        data=partial(data, "penalties", penalty=1e-3),
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
            Asked("first", OURS, ["scipy*"], 1.2, 2.0),
            Asked("first", OURS, ["torch*"], 4.0, words="fastest torch peer"),
            Asked("loop", OURS, ["jaxopt*"], 5.0, 10.0),
            Asked("loop", OURS, ["scipy*"], None),
        ],
        absent=peers.ABSENT,
    )
]
