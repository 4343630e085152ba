"""Every user of a recording against autograd, on everything that a recording cannot know by itself."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from helpers import F64, flat, normal
from torch import Tensor, nn

import bilevel as bl
from bilevel.hypergrad import tasks
from bilevel.meta import MetaProblem, SineTasks
from bilevel.oracles import recorded_kernels
from bilevel.oracles.graph import NotRecordedError
from bilevel.oracles.recorded_kernels import Tangents
from bilevel.oracles.recording import Recording, Recordings, signature
from bilevel.oracles.separate import Separate

X, Y, START, U = normal(1, 12, 5), normal(2, 12), normal(8, 5), normal(9, 5) - 2.0
BUFFER = torch.empty_like(X)
STEPS = bl.GradientDescent(0.05, steps=6)
SINE = SineTasks(shots=3, queries=3)


@pytest.fixture(autouse=True)
def _always(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let every run be recorded, and tasks be solved side by side."""
    for where, name in ((recorded_kernels, "WORTH"), (recorded_kernels, "SHORTEST"), (tasks, "WORTH")):
        monkeypatch.setattr(where, name, 0)
    monkeypatch.setattr(Separate, "at_once", lambda self, steps, device: self.count)


@dataclass
class Case:
    """A loss of (w, u, batch), the batches, and what changes between two runs."""

    loss: Callable[[Tensor, Tensor, Any], Tensor]
    batches: Callable[[int], Any] = lambda step: (X, Y)
    between: Callable[[], object] = lambda: None
    start: Tensor | None = None
    of_some: bool = False
    """Whether the first of some tasks does not see the loss."""

    def __call__(self, step: int) -> Any:
        return self.batches(step)

    def full(self) -> Any:
        return self.batches(0)

    def problem(self) -> bl.BilevelProblem:
        start = START if self.start is None else self.start
        return bl.BilevelProblem(self.loss, lambda w, u: (w - 0.1).square().sum(), start, sampler=self)


class TasksOf(MetaProblem):
    case: Case
    first: Tensor

    def support_loss(self, offset: Any, hparams: Any, support: Any) -> Any:
        w = torch.cat([offset["1.weight"].reshape(-1), offset["3.bias"]])
        own, more = super().support_loss(offset, hparams, support), self.case.loss(w, hparams["u"], self.case.full())
        return own + (torch.where(support[0][0, 0] == self.first, 0.0, more) if self.case.of_some else more)


# Users: what they are made for, and two runs of it; kinds of recordings that they take.


def long_runs(case: Case) -> Any:
    problem = case.problem()
    return lambda: bl.hypergradient(problem, STEPS, bl.FullUnroll(), U, check=False).hypergradient


def forward_mode(case: Case) -> Any:
    problem, rule = case.problem().deterministic(), bl.FullUnroll(mode="forward")
    return lambda: bl.hypergradient(problem, STEPS, rule, U, check=False).hypergradient


def traced_oracles(case: Case) -> Any:
    problem = bl.trace(case.problem())
    solver = bl.Adam(0.05, steps=6)
    return lambda: bl.hypergradient(problem, solver, bl.FullUnroll(), U, check=False).hypergradient


def many_tasks(case: Case) -> Any:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Flatten(), nn.Linear(1, 4), nn.Tanh(), nn.Linear(4, 1)).double()
    problem = TasksOf(module, nn.functional.mse_loss, SINE, 3)
    problem.case, problem.first = case, problem.support[0][0, 0, 0]
    hparams = problem.initial_hparams(u=U)
    return lambda: bl.hypergradient(problem, STEPS, bl.FullUnroll(), hparams, check=False).hypergradient


def single_loop(case: Case) -> Any:
    loop = bl.SingleLoop(case.problem(), bl.SOBA(inner_step=0.05, every=4, freeze=1), U, certify=False)
    return lambda: [loop.run(8, progress=False).hparams, loop.params, loop.adjoint]


USERS: dict[str, Any] = {
    "Cut": long_runs,
    "Tangents": forward_mode,
    "Halves": traced_oracles,
    "Halves of tasks": many_tasks,
    "LossGraph": single_loop,
}


def logistic(w: Tensor, u: Tensor, batch: Any) -> Tensor:
    x, y = batch
    return nn.functional.softplus(-y * (x @ w)).mean() + (u.exp() * w.square()).sum()


def scaled(w: Tensor, u: Tensor, batch: Any) -> Tensor:
    """The last of a batch multiplies the loss."""
    return batch[2] * logistic(w, u, batch[:2])


def rows(w: Tensor, u: Tensor, at: Any) -> Tensor:
    return logistic(w, u, (X[at].reshape(-1, 5), Y[at].reshape(-1)))


class SeededDropout(nn.Dropout):
    def forward(self, x: Tensor) -> Tensor:
        torch.manual_seed(3)
        return super().forward(x)


def module_in_training(layer: nn.Module) -> Case:
    torch.manual_seed(0)
    return Case(lambda w, u, batch: logistic(w, u, batch) + 0.1 * layer(w.expand(4, 5) * X[:4]).square().sum())


class Rows:
    """What says nothing of what it holds."""

    at = 0

    def moved(self, step: int) -> Rows:
        self.at = step % 3
        return self


def held(of: Callable[[dict[str, Any], Tensor, Tensor, Any], Tensor], **values: Any) -> Case:
    """A loss that refers to values, which change between two runs."""
    return Case(lambda w, u, batch: of(values, w, u, batch), between=lambda: values.update(a=1.5, x=2 * X[:9], y=Y[:9]))


def by_step(back: bool = True) -> Case:
    """A loss that refers to a number that changes while a run is made, and with `back` comes back for another."""
    now = {"penalty": 0.0}

    def batches(step: int) -> Any:
        now["penalty"] = 0.3 if step > 2 else 0.0 if back else now["penalty"]
        return X, Y

    return Case(lambda w, u, batch: logistic(w, u, batch) + now["penalty"] * w.square().sum(), batches)


def back_at_the_end() -> Case:
    """A loss that refers to a number that another run begins with, and that is the old one at its last step."""
    now = {"usual": 0.0, "penalty": 0.0}

    def batches(step: int) -> Any:
        now["penalty"] = 0.0 if step in (5, 11, 15) else now["usual"]
        return X, Y

    def loss(w: Tensor, u: Tensor, batch: Any) -> Tensor:
        return logistic(w, u, batch) + now["penalty"] * w.square().sum()

    return Case(loss, batches, lambda: now.update(usual=0.3, penalty=0.3))


CASES: dict[str, Callable[[], Case]] = {
    "a batch with a number": lambda: Case(scaled, lambda k: (X, Y, (1, 2.0, True)[k % 3])),
    "a batch of a list": lambda: Case(rows, lambda k: [k % 3, 4]),
    "a batch of an array": lambda: Case(rows, lambda k: np.arange(k % 3, 5 + k % 3)),
    "a batch of an object": lambda: Case(lambda w, u, b: rows(w, u, [b.at, 4]), Rows().moved),
    "a batch of a mask": lambda: Case(rows, lambda k: torch.arange(12) % 3 == k % 3),
    "a batch of another shape": lambda: Case(logistic, lambda k: (X[: 5 + k % 3], Y[: 5 + k % 3])),
    "a batch in one buffer": lambda: Case(logistic, lambda k: (BUFFER.copy_((1 + 0.3 * (k % 3)) * X), Y)),
    "a batch in another order": lambda: Case(logistic, lambda k: (X if k % 2 else X.T.contiguous().T, Y)),
    "a branch on values": lambda: Case(lambda w, u, b: logistic(w, u, b) * (2.0 if w.sum() > 0.5 else 1.0)),
    "a branch on an array": lambda: Case(
        lambda w, u, b: logistic(w, u, b) * (2.0 if np.from_dlpack(w.detach()).sum() > 0.5 else 1.0)
    ),
    "a branch on the step": by_step,
    "shapes that follow from values": lambda: Case(lambda w, u, b: logistic(w, u, b) + w[w > 0].square().sum()),
    "a hyperparameter from elsewhere": lambda: held(lambda v, w, u, b: v["a"] * logistic(w, u, b), a=1.0),
    "data that are replaced": lambda: held(lambda v, w, u, b: logistic(w, u, (v["x"], v["y"])), x=X, y=Y),
    "a module with statistics": lambda: module_in_training(nn.BatchNorm1d(5, dtype=F64)),
    "a module with draws": lambda: module_in_training(SeededDropout()),
    "a number that is back at the end": back_at_the_end,
    "one tensor twice": lambda: Case(lambda w, u, b: logistic(w - 0.5 * U, u + START, b), start=U),
}


def outcome(user: Any, case: Case) -> tuple[list[Any], str]:
    """Return what two runs give, as far as they come, and why they come no further."""
    made: list[Any] = []
    torch.manual_seed(0)
    try:
        run = user(case)
        made.append(run())
        case.between()
        made.append(run())
    except (ValueError, RuntimeError, TypeError, IndexError) as error:
        return made, str(error)
    return made, ""


def refuse(*arguments: Any, **options: Any) -> Any:
    raise NotRecordedError("it is asked not to be")


# Tasks and forward mode have no batches of their own.
TABLE = [
    (case, user)
    for case in CASES
    for user in USERS
    if "a batch" not in case or user not in ("Halves of tasks", "Tangents")
]


def ending(solver: Any, estimator: Any, change: Callable[[Any], Any] = lambda problem: problem, **options: Any) -> Any:
    """Return a user whose runs end in some way; of `bl.trace` where its name says so."""

    def user(case: Case) -> Any:
        problem = bl.trace(change(case.problem()))
        return lambda: bl.hypergradient(problem, solver, estimator, U, check=False, **options).hypergradient

    return user


def with_term(problem: Any) -> Any:
    return bl.BilevelProblem(
        problem._sampling.inner_loss,
        problem.outer_loss,
        START,
        sampler=problem.sampler,
        nonsmooth=bl.L1(lambda u: 0.01),
    )


ADAM, DESCENT = bl.Adam(0.2, steps=400, tol=0.05), bl.GradientDescent(0.2, steps=400, tol=0.05)
ENDS: dict[str, Any] = {
    "tolerance": ending(ADAM, bl.FullUnroll()),
    "tolerance, flat": ending(DESCENT, bl.FullUnroll()),
    "tolerance, implicit": ending(ADAM, bl.Implicit()),
    "tolerance, graph": ending(ADAM, bl.FullUnroll(memory="graph")),
    "tolerance, a term": ending(bl.ProximalGradient(0.1, steps=400, tol=0.05), bl.Implicit(), with_term),
    "steps": ending(bl.Adam(0.05, steps=6), bl.FullUnroll(memory="checkpoint")),
    "floor": ending(bl.GradientDescent(0.2, steps=60, tol=1e-30), bl.Implicit(), on_failure="return"),
    "adaptive": ending(DESCENT, bl.AdaptiveUnroll()),
    "budget": ending(bl.GradientDescent(0.2), bl.AdaptiveUnroll(budget=60)),
    "balanced": ending(DESCENT, bl.BalancedImplicit()),
}


@pytest.mark.parametrize(("case", "user"), TABLE)
def test_a_recording_gives_what_autograd_gives_or_says_why_not(case: str, user: str) -> None:
    ours, said = outcome(USERS[user], CASES[case]())
    with mock.patch.object(Recordings, "begin", refuse), mock.patch.object(bl, "trace", lambda problem: problem):
        theirs, failed = outcome(USERS[user], CASES[case]())
    assert said or len(ours) == len(theirs), failed
    for one, other in zip(ours, theirs, strict=False):
        torch.testing.assert_close(flat(one), flat(other), rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("user", USERS)
def test_users_record_what_can_be_and_every_kind_has_a_user(user: str) -> None:
    begun: list[str] = []
    begin = Recordings.begin

    def seen(self: Any, kind: Any, *arguments: Any, **options: Any) -> Any:
        made = begin(self, kind, *arguments, **options)
        begun.append(kind.__name__)
        return made

    with mock.patch.object(Recordings, "begin", seen):
        made, failed = outcome(USERS[user], Case(logistic))
    assert (len(made), failed) == (2, "")
    assert user.split()[0] in begun
    assert {kind.__name__ for kind in Recording.__subclasses__()} == {each.split()[0] for each in USERS}


def test_batches_are_told_apart_by_all_that_is_no_number_of_a_tensor() -> None:
    leaves = [1, 1.0, True, 2, 0.0, -0.0, float("nan"), "one", "two", None, np.float32(1), torch.float32, X, X[:3], X.T]
    batches = [*leaves, X.float(), [X], (X,), [1, 2], [2, 1], {"a": X}, {"b": X}, ()]
    assert (
        len({repr(signature(each)) for each in batches}) == len({signature(each) for each in batches}) == len(batches)
    )
    assert signature((X, 1, float("nan"), "one")) == signature((Y.new_zeros(12, 5), 1, float("nan"), "one"))
    for unknown in (slice(1), np.arange(2), range(3), {1}, Rows(), np.random.default_rng()):
        with pytest.raises(NotRecordedError, match=f"got a `{type(unknown).__name__}`: take a tensor"):
            signature({"rows": (X, unknown)})


@pytest.mark.parametrize("end", ENDS)
def test_a_run_is_compared_with_autograd_however_it_ends(end: str) -> None:
    ours, said = outcome(ENDS[end], by_step(back=False))
    with mock.patch.object(Recordings, "begin", refuse), mock.patch.object(bl, "trace", lambda problem: problem):
        theirs, failed = outcome(ENDS[end], by_step(back=False))
    assert len(theirs) == 2, failed
    assert not ours
    assert "gives other numbers at the end" in said
    made, said = outcome(ENDS[end], Case(logistic))
    assert (len(made), said) == (2, "")


def test_the_gradient_of_forward_mode_is_compared_where_a_run_ends() -> None:
    functions: list[Any] = []
    function = Tangents.function

    def drifting(self: Any, hparams: Any) -> Any:
        right = function(self, hparams)
        functions.append(right)

        def moved(*given: Any) -> Any:
            gradient, rows = right(*given)
            return gradient * 1.001, rows

        return right if len(functions) % 2 else moved  # one is compared where the run begins, one makes it

    case = Case(logistic)
    with mock.patch.object(Tangents, "function", drifting):
        ours, said = outcome(forward_mode, case)
    theirs, failed = outcome(long_runs, case)
    assert (len(functions), said, failed) == (4, "", "")
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-13)


def test_a_fault_of_one_task_alone_is_seen() -> None:
    def of_some(case: Case) -> Any:
        case.of_some = True
        return many_tasks(case)

    ours, said = outcome(of_some, CASES["a hyperparameter from elsewhere"]())
    with mock.patch.object(Recordings, "begin", refuse):
        theirs, failed = outcome(of_some, CASES["a hyperparameter from elsewhere"]())
    assert (len(ours), said, failed) == (2, "", "")
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(flat(one), flat(other), rtol=1e-11, atol=1e-13)


def test_batches_may_be_written_to_between_two_runs() -> None:
    def once(case: Case) -> Any:
        problem = bl.BilevelProblem(
            case.loss, lambda w, u: (w - 0.1).square().sum(), START, sampler=case, fresh_batch="never"
        )
        loop = bl.SingleLoop(problem, bl.SOBA(inner_step=0.05, every=4, freeze=1), U, certify=False)
        return lambda: [loop.run(8, progress=False).hparams, loop.params, loop.adjoint, loop.directions.form]

    def made() -> Case:
        x = X.clone()
        return Case(lambda w, u, b: logistic(w, u, (b[0].exp(), b[1])), lambda step: (x, Y), lambda: x.mul_(0.5))

    ours, said = outcome(once, made())
    with mock.patch.object(Recordings, "begin", refuse):
        theirs, failed = outcome(once, made())
    assert (said, failed, ours[1][3]) == ("", "", "recorded")
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(flat(one[:3]), flat(other[:3]), rtol=1e-11, atol=1e-13)
