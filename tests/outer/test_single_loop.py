"""The stochastic single loop: its steps beside formulas written anew, its evidence, its failures, and its state."""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import bilevel as bl
from bilevel.compare import Setup
from bilevel.compare.referee import error_against_referee
from bilevel.oracles.directions import LossDirections
from bilevel.oracles.samplers import ORDER, keyed_generator, seed_of
from bilevel.problems import row_steps

softplus = torch.nn.functional.softplus
Start = dict[str, Any]


def rows(count: int, seed: int, features: int = 4) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    X = torch.randn(count, features, generator=generator, dtype=torch.float64)
    chance = torch.sigmoid(X @ torch.tensor([1.0, -0.5, 0.0, 0.3], dtype=torch.float64))
    return X, (torch.rand(count, generator=generator, dtype=torch.float64) < chance).double()


def logistic(penalty: str = "per_feature", **options: Any) -> bl.BilevelProblem:
    return bl.problems.LogisticProblem(*rows(150, 0), *rows(90, 1), penalty=penalty, **options)


def as_written(size: int = 30) -> bl.BilevelProblem:
    """The same problem by its losses; its batches hold the rows that `batches_of` says."""

    def inner(w: Tensor, u: Tensor, batch: tuple[Tensor, Tensor]) -> Tensor:
        return softplus(-batch[1] * (batch[0] @ w)).mean() + 0.5 * (u.exp() * w * w).sum()

    def outer(w: Tensor, u: Tensor, batch: tuple[Tensor, Tensor]) -> Tensor:
        return softplus(-batch[1] * (batch[0] @ w)).mean()

    samplers = [bl.MiniBatches((X, 2.0 * y - 1.0), size) for X, y in (rows(150, 0), rows(90, 1))]
    start = torch.zeros(4, dtype=torch.float64)
    return bl.BilevelProblem(inner, outer, start, sampler=samplers[0], outer_sampler=samplers[1])


def batches_of(X: Tensor, y: Tensor, size: int, seed: int) -> list[tuple[Any, Any]]:
    order = torch.randperm(len(X), generator=torch.Generator().manual_seed(seed)).numpy()
    X_, y_ = X.numpy()[order], 2.0 * y.numpy()[order] - 1.0
    return [(X_[i : i + size], y_[i : i + size]) for i in range(0, len(X_), size)]


def draws(count: int, parts: list[int]) -> Iterator[tuple[int, int]]:
    for chunk in range(math.ceil(count / 1000)):
        random = np.random.default_rng((0, chunk))
        yield from zip(*(random.integers(size, size=1000).tolist() for size in parts), strict=True)


def by_hand(
    inner: Any, outer: Any, steps: int, *, saga: bool, split: bool, scaling: str, rate: float, **more: Any
) -> Any:
    """Take the steps of SOBA or SABA on logistic losses in NumPy, one row after the other where it does not matter.

    `split`: the penalty is no part of what is sampled, and its step is implicit.
    """
    n, m, d = sum(len(y) for _, y in inner), sum(len(y) for _, y in outer), inner[0][0].shape[1]
    w, v, u, squares = np.zeros(d), np.zeros(d), np.full(d, -1.0), np.full(d, np.finfo(float).tiny)

    def sampled(i: int, j: int) -> tuple[Any, Any]:
        (A, a), (B, b) = inner[i], outer[j]
        s, t = 1.0 / (1.0 + np.exp(a * (A @ w))), 1.0 / (1.0 + np.exp(b * (B @ w)))
        g = -(a * s) @ A * len(inner) / n
        h = (s * (1.0 - s) * (A @ v)) @ A * len(inner) / n
        f = -(b * t) @ B * len(outer) / m
        pen = np.exp(u)
        parts = [g, h] if split else [g + pen * w, h + pen * v, pen * w * v]
        return np.concatenate(parts), np.concatenate([f] if split else [f, 0.0 * u])

    tables = [[sampled(i, 0)[0] for i in range(len(inner))], [sampled(0, j)[1] for j in range(len(outer))]]
    for k, (i, j) in zip(range(steps), draws(steps, [len(inner), len(outer)]), strict=False):
        new = list(sampled(i, j))
        direction = [np.array(each) for each in new]
        for level, index in enumerate((i, j) if saga else ()):
            table = tables[level]
            direction[level] = new[level] - table[index] + np.mean(table, 0)
            table[index] = new[level]
        q, f = direction
        q[d : d + len(f)] += f
        pen, at = np.exp(u), rate * (1.0 + k / more["after"]) ** -more["decay"]
        of_u = pen * w * v if split else q[2 * d :]
        w, v = w - at * q[:d], v - at * q[d : 2 * d]
        if split:
            w, v = w / (1.0 + at * pen), v / (1.0 + at * pen)
        if k < more["freeze"]:
            continue
        if scaling == "none":
            u = u - more["length"] * (1.0 + k / more["after"]) ** -more["decay"] * of_u
        else:
            squares, most = squares + of_u**2, more["cap"](u, at)
            u = u - np.clip(more["length"] * of_u / np.sqrt(squares), -most, most)
    return np.concatenate([w, v, u])


def reached(loop: bl.SingleLoop) -> Any:
    return torch.cat([each.reshape(-1) for each in (loop.params, loop.adjoint, loop.hparams)]).numpy()  # type: ignore[union-attr]


@pytest.mark.crossed
@pytest.mark.parametrize("scaling", ["adagrad", "none"])
@pytest.mark.parametrize("size", [30, 32])  # 32 leaves a last batch with fewer rows
@pytest.mark.parametrize("method", [bl.SOBA, bl.SABA])
def test_the_steps_of_linear_models_are_the_formulas(method: Any, size: int, scaling: str) -> None:
    options = {"scaling": scaling, "outer_step": 0.3 if scaling == "adagrad" else 2.0, "freeze": 7}
    loop = bl.SingleLoop(
        logistic(), method(batch_size=size, inner_step=0.7, every=500, **options), torch.full((4,), -1.0).double()
    )
    loop.run(1100, progress=False)
    seeds = [keyed_generator(seed, ORDER).initial_seed() for seed in (0, 1)]
    inner, outer = (batches_of(*rows(*each), size, seed) for each, seed in zip([(150, 0), (90, 1)], seeds, strict=True))
    gram = rows(150, 0)[0].numpy().T @ rows(150, 0)[0].numpy() / 150

    least = 0.25 * np.linalg.eigvalsh(gram)[0]

    def cap(u: Any, at: float) -> Any:
        return at * (least + np.exp(u).min())

    decay = 0.5 if method is bl.SOBA else 0.0
    more = {"after": len(inner), "decay": decay, "length": options["outer_step"], "freeze": 7, "cap": cap}
    kind = {"saga": method is bl.SABA, "split": True, "scaling": scaling, "rate": 0.7}
    expected = by_hand(inner, outer, 1100, **kind, **more)
    np.testing.assert_allclose(reached(loop), expected, rtol=1e-12, atol=1e-12)
    assert loop.directions.form == "closed form on the host"


@pytest.mark.parametrize("method", [bl.SOBA, bl.SABA])
def test_the_steps_of_losses_as_written_are_the_formulas(method: Any) -> None:
    loop = bl.SingleLoop(as_written(), method(inner_step=0.4, freeze=3), torch.full((4,), -1.0).double())
    assert loop.directions.form == "recorded"
    loop.run(400, progress=False)
    inner, outer = (batches_of(*rows(*each), 30, seed_of(ORDER, 0)) for each in [(150, 0), (90, 1)])
    decay = 0.5 if method is bl.SOBA else 0.0
    more = {"after": len(inner), "decay": decay, "length": 0.3, "freeze": 3, "cap": lambda u, at: np.inf}
    kind = {"saga": method is bl.SABA, "split": False, "scaling": "adagrad", "rate": 0.4}
    expected = by_hand(inner, outer, 400, **kind, **more)
    np.testing.assert_allclose(reached(loop), expected, rtol=1e-12, atol=1e-12)


MODELS: dict[str, Callable[[], bl.BilevelProblem]] = {
    "logistic": logistic,
    "one penalty, sums": lambda: logistic("scalar", loss="sum"),
    "direct": lambda: logistic(parametrization="direct"),
    "ridge": lambda: bl.problems.RidgeProblem(*rows(70, 2), *rows(50, 3), penalty="per_feature"),
    "Huber": lambda: bl.problems.HuberProblem(*rows(70, 2), *rows(50, 3), width=0.3),
    "hinge": lambda: bl.problems.SquaredHingeProblem(*rows(70, 2), *rows(50, 3)),
    "Poisson": lambda: bl.problems.PoissonProblem(*rows(70, 2), *rows(50, 3)),
    **{
        f"softmax, {penalty}": lambda penalty=penalty: bl.problems.SoftmaxProblem(
            *((X, (2 * y + (X[:, 0] > 0)).long()) for X, y in (rows(70, 2),)).__next__(),
            *((X, (2 * y + (X[:, 0] > 0)).long()) for X, y in (rows(50, 3),)).__next__(),
            penalty=penalty,
        )
        for penalty in ("scalar", "per_class", "per_feature", "per_weight")
    },
}


@pytest.mark.parametrize("name", list(MODELS))
def test_the_mean_over_all_batches_is_the_direction_on_all_rows(name: str) -> None:
    problem = MODELS[name]()
    made = problem.directions(16, 5)
    assert made.host
    assert problem.directions(20_000, 5).host  # there are not as many rows
    generator, d = torch.Generator().manual_seed(1), made.size
    u = 0.3 * torch.rand(problem.initial_hparams().numel(), generator=generator, dtype=torch.float64) + 0.1  # type: ignore[attr-defined]
    z = 0.5 * torch.randn(2 * d, generator=generator, dtype=torch.float64)
    plain = LossDirections(problem, problem.start(), problem.initial_hparams())  # type: ignore[attr-defined]
    q, f = plain.sampled(0, 0, z, u)
    pairs = [made.sampled(i % made.parts[0], i % made.parts[1], made.array(z), made.array(u)) for i in range(30)]
    ours, outer = (sum(pair[level] for pair in pairs[: made.parts[level]]) / made.parts[level] for level in (0, 1))
    of_z, of_u, penalty = made.complete(ours, made.array(z), made.array(u))
    after = made.tensor(made.shrunk(made.array(z) - 0.1 * of_z, 0.1, penalty))
    # An implicit step solves (1 + rate pen) z' = z - rate D without pen z.
    spread = problem.penalties(u.reshape(problem.hparams_shape())).expand(problem.params_shape()).reshape(-1)  # type: ignore[attr-defined]
    explicit = (z - after * (1.0 + 0.1 * spread.repeat(2))) / 0.1 + z * spread.repeat(2)
    torch.testing.assert_close(explicit, q[: 2 * d], rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(made.tensor(of_u), q[2 * d :], rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(made.tensor(outer), f[:d], rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("method", [bl.SOBA, bl.SABA])
@pytest.mark.parametrize("name", list(MODELS))
def test_steps_on_tensors_are_those_on_the_host(name: str, method: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    ends: list[Any] = []
    options: dict[str, Any] = {"batch_size": 16, "preconditioner": "none", "freeze": 20}
    options["inner_step"] = 0.05 if name == "Poisson" else "auto"
    bounded = torch.distributions.constraints.greater_than_eq(0.0) if name == "direct" else None
    for places, scaling in ((10_000, "adagrad"), (0, "adagrad"), (10_000, "none"), (0, "none")):
        monkeypatch.setattr(row_steps, "ON_HOST", places)
        options["scaling"], options["outer_step"] = scaling, 0.3 if scaling == "adagrad" else 1e-3
        loop = bl.SingleLoop(MODELS[name](), method(**options), certify=False, constraints=bounded)
        assert loop.directions.static is (places == 0)
        loop.run(150, progress=False)
        second = bl.SingleLoop(MODELS[name](), loop.method, certify=False, constraints=bounded)
        second.load_state_dict(loop.state_dict())
        assert (reached(second) == reached(loop)).all()
        loop.run(150, progress=False), second.run(150, progress=False)
        assert (reached(second) == reached(loop)).all()
        ends.append(reached(loop))
    for host, tensors in (ends[:2], ends[2:]):
        np.testing.assert_allclose(tensors, host, rtol=1e-12, atol=1e-12 * abs(host).max())


def exact_hypergradient(w: Any, v: Any, u: Any) -> tuple[Any, Any, float]:
    """Return f_u + C' v on all rows, the hypergradient at the inner solution, and the outer loss there, in NumPy."""
    X, y = (each.numpy() for each in rows(150, 0))
    Z, t = (each.numpy() for each in rows(90, 1))
    signs, others, pen, x = 2.0 * y - 1.0, 2.0 * t - 1.0, np.exp(u), w
    for _ in range(30):
        s = 1.0 / (1.0 + np.exp(signs * (X @ x)))
        H = (X.T * (s * (1.0 - s))) @ X / 150 + np.diag(pen)
        x = x - np.linalg.solve(H, -(signs * s) @ X / 150 + pen * x)
    f = -(others / (1.0 + np.exp(others * (Z @ x)))) @ Z / 90
    return pen * w * v, -pen * x * np.linalg.solve(H, f), float(np.log1p(np.exp(-others * (Z @ x))).mean())


@pytest.mark.parametrize("make", [logistic, as_written])
def test_a_record_says_how_far_the_loop_is_from_the_inner_solution(make: Callable[[], bl.BilevelProblem]) -> None:
    loop = bl.SingleLoop(make(), bl.SABA(every=200, inner_step=0.4), torch.full((4,), -1.0).double())
    result = loop.run(500, progress=False)
    assert [record.step for record in result.history] == [200, 400, 500]
    d = 4
    z = reached(loop)
    ours, exact, loss = exact_hypergradient(z[:d], z[d : 2 * d], z[2 * d :])
    last = result.history[-1]
    np.testing.assert_allclose(last.hypergradient_norm, np.linalg.norm(ours), rtol=1e-10)
    np.testing.assert_allclose(last.error, np.linalg.norm(ours - exact), rtol=1e-5)
    assert last.error_kind == "estimate"
    assert result.best_loss <= loss * (1 + 1e-9)
    assert last.inner_residual > 0
    silent = bl.SingleLoop(make(), bl.SABA(every=200, inner_step=0.4), torch.full((4,), -1.0).double(), certify=False)
    assert silent.run(200, progress=False).history[-1].error is None


def test_costs_count_batches_by_their_share() -> None:
    loop = bl.SingleLoop(logistic(), bl.SABA(batch_size=30, every=100), certify=False)
    (record,) = loop.run(100, progress=False).history
    # Each step: a gradient and a product (1 + 3) on 1/5 of the rows, an outer gradient on 1/3; a pass; the record.
    assert record.gradient_equivalents == pytest.approx(100 * (4 / 5 + 1 / 3) + 5 + 5)


@pytest.mark.parametrize("make", [logistic, as_written])
@pytest.mark.parametrize("method", [bl.SOBA, bl.SABA])
def test_a_run_that_resumes_goes_on_bit_for_bit(method: Any, make: Callable[[], bl.BilevelProblem]) -> None:
    start = torch.full((4,), -1.0).double()
    whole = bl.SingleLoop(make(), method(every=100), start, certify=False)
    whole.run(1050, progress=False)
    for stop in (300, 970) if make is logistic else (970,):
        first = bl.SingleLoop(make(), method(every=100), start, certify=False)
        first.run(stop, progress=False)
        file = io.BytesIO()
        torch.save(first.state_dict(), file)
        file.seek(0)
        second = bl.SingleLoop(make(), method(every=100), start, certify=False)
        second.load_state_dict(torch.load(file, weights_only=True))
        second.run(1050 - stop, progress=False)
        assert (reached(second) == reached(whole)).all()
        assert second.best[0] == whole.best[0] or stop == 970  # a record more may be the best one
    other = bl.SingleLoop(make(), method(every=200), start)
    with pytest.raises(ValueError, match="of a run with the method"):
        other.load_state_dict(whole.state_dict())


def test_an_interrupted_run_goes_on_as_if_nothing_had_happened(monkeypatch: pytest.MonkeyPatch) -> None:
    start, calls = torch.full((4,), -1.0).double(), 0
    whole = bl.SingleLoop(logistic(), bl.SABA(every=300), start)
    whole.run(600, progress=False)
    loop = bl.SingleLoop(logistic(), bl.SABA(every=300), start)
    sampled = loop.directions.sampled

    def interrupted(*arguments: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 200:
            raise KeyboardInterrupt
        return sampled(*arguments)

    monkeypatch.setattr(loop.directions, "sampled", interrupted)
    with pytest.raises(KeyboardInterrupt):
        loop.run(600, progress=False)
    assert loop.steps_taken == 192
    loop.run(600 - loop.steps_taken, progress=False)
    assert (reached(loop) == reached(whole)).all()


def squares() -> bl.BilevelProblem:
    (X, y), (Z, t) = rows(150, 0), rows(90, 1)

    def inner(w: Tensor, u: Tensor) -> Tensor:
        return (X @ w - y).square().mean() + (u.exp() * w * w).sum()

    return bl.BilevelProblem(inner, lambda w, u: (Z @ w - t).square().mean(), torch.zeros(4).double())


@pytest.mark.parametrize("make", [lambda: MODELS["ridge"](), squares])
def test_a_run_that_diverges_is_named_with_its_step(make: Callable[[], bl.BilevelProblem]) -> None:
    loop = bl.SingleLoop(make(), bl.SOBA(inner_step=30.0, decay=0.0), torch.full((4,), -9.0).double())
    with pytest.raises(bl.HypergradientError, match="at step ") as raised:
        loop.run(3000, progress=False)
    assert raised.value.verdict.status is bl.Status.DIVERGED
    assert torch.isfinite(loop.hparams).all()  # type: ignore[arg-type]
    assert f"step {loop.steps_taken + 1} " in str(raised.value)
    assert "a hypergradient failed" in loop.run(10, progress=False).stopped
    assert loop.history[-1].status == raised.value.verdict.status.name


def test_a_run_that_diverges_on_tensors_ends_at_the_same_step(monkeypatch: pytest.MonkeyPatch) -> None:
    ends = []
    for places in (10_000, 0):
        monkeypatch.setattr(row_steps, "ON_HOST", places)
        method = bl.SABA(batch_size=16, inner_step=30.0, freeze=0, every=300)
        loop = bl.SingleLoop(MODELS["ridge"](), method, torch.full((4,), -9.0).double(), on_failure="return")
        loop.run(600, progress=False)
        assert loop.history[-1].status == "DIVERGED"
        assert torch.isfinite(loop.hparams).all()  # type: ignore[arg-type]
        ends.append(loop.steps_taken)
    assert ends[0] == ends[1]


def test_saba_reaches_the_minimum_and_soba_stays_at_a_distance() -> None:
    problem = bl.problems.LogisticProblem(*rows(640, 5), *rows(640, 6))
    ends = [bl.SingleLoop(problem, method(batch_size=32, every=2000)) for method in (bl.SABA, bl.SOBA)]
    saba, soba = (loop.run(6000, progress=False) for loop in ends)
    least = bl.tune(problem).outer_loss
    assert saba.best_loss - least < 1e-6
    assert saba.history[-1].inner_residual < 1e-4
    assert saba.history[-1].error < 1e-9
    assert soba.history[-1].inner_residual > 10 * saba.history[-1].inner_residual


def test_a_comparison_judges_a_record_where_it_was_made() -> None:
    problem, start = logistic(), torch.full((4,), -1.0).double()
    options = bl.outer.OuterOptions(steps=2, certify=True)
    loop = options.start(Setup(problem, start), bl.QuasiNewton(), bl.SABA(batch_size=30, every=40))
    for steps in (40, 80):
        estimate = loop.step()
        error, _ = error_against_referee(problem, loop.evaluated, estimate)
        exact = bl.hypergradient(problem, bl.QuasiNewton(), bl.Implicit(), loop.evaluated).hypergradient
        assert error == pytest.approx(estimate.certificate.error / float(exact.norm()), rel=1e-5)
        assert loop.steps_taken == loop.histories[0][-1].step == steps


def test_hyperparameters_stay_within_their_bounds() -> None:
    between = torch.distributions.constraints.interval(-1.5, -0.5)
    loop = bl.SingleLoop(logistic(), bl.SABA(every=300), torch.full((4,), -1.0).double(), constraints=between)
    hparams = loop.run(900, progress=False).hparams
    assert hparams.min() >= -1.5
    assert hparams.max() <= -0.5
    assert ((hparams == -1.5) | (hparams == -0.5)).any()


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: bl.SingleLoop(logistic(), bl.SGD()), "`method` must be a method such as SABA"),
        (lambda: bl.SingleLoop(as_written(), bl.SABA(batch_size=8), torch.zeros(4).double()), "is for linear models"),
        (lambda: bl.SingleLoop(as_written(40), bl.SABA(), torch.zeros(4).double()), "a batch_size that divides"),
        (lambda: bl.SingleLoop(MODELS["Poisson"](), bl.SABA()), "inner_step` is 'auto', but the curvature is inf"),
        (lambda: bl.SingleLoop(logistic().batched(2), bl.SABA(), torch.zeros(2, 4).double()), "this is a batch"),
        (
            lambda: bl.hypergradient(logistic(), bl.SGD(), bl.SABA(), torch.zeros(4)),
            "is a method of single loops: SingleLoop",
        ),  # type: ignore[arg-type]
        (lambda: bl.tune(logistic(), estimator=bl.SOBA()), "is a method of single loops: SingleLoop"),
        (lambda: bl.SABA(every=0), "`SABA.every` must be a positive int, got 0"),
        (lambda: bl.SOBA(scaling="adam"), "`SOBA.scaling` must be 'adagrad' or 'none', got 'adam'"),
    ],
)
def test_what_cannot_be_done_is_refused_in_a_sentence(make: Callable[[], Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        make()


def test_losses_that_cannot_be_recorded_take_autograd_and_say_so() -> None:
    def inner(w: Tensor, u: Tensor) -> Tensor:
        return ((w - 1.0) ** 2).sum() + u.exp() * (w * w).sum() * (2.0 if float(w.detach().sum()) < 1e9 else 1.0)

    problem = bl.BilevelProblem(inner, lambda w, u: ((w - 0.5) ** 2).sum(), torch.zeros(3).double())
    loop = bl.SingleLoop(problem, bl.SABA(every=300), torch.zeros(()).double())
    assert "not recorded" in loop.directions.form
    # The solution w = 1 / (1 + 2 exp(u)) is 0.5 there.
    assert float(loop.run(300, progress=False).hparams) == pytest.approx(math.log(0.5), abs=0.05)  # type: ignore[arg-type]
    assert "not recorded" in str(loop)


@pytest.mark.parametrize("penalty", ["per_feature", "scalar"])
def test_preconditioned_steps_are_the_formulas_and_the_preconditioner_is_never_far(penalty: str) -> None:
    count = 1 if penalty == "scalar" else 4
    start = torch.full(() if count == 1 else (4,), -1.0, dtype=torch.float64)
    loop = bl.SingleLoop(logistic(penalty), bl.SOBA(batch_size=30, decay=0.0), start)
    seeds = [keyed_generator(seed, ORDER).initial_seed() for seed in (0, 1)]
    inner, outer = (batches_of(*rows(*each), 30, seed) for each, seed in zip([(150, 0), (90, 1)], seeds, strict=True))
    X = np.concatenate([A for A, _ in inner])
    w, v, u, squares = np.zeros(4), np.zeros(4), np.full(count, -1.0), np.full(count, np.finfo(float).tiny)

    def made(u: Any) -> tuple[Any, float]:
        P = np.linalg.inv(X.T @ X / (4 * 150) + np.exp(u) * np.eye(4))
        return P, 0.5 / (29 / 30 + np.einsum("ij,jk,ik->i", X, P, X).max() / (4 * 30))

    (P, rate), anchor, until, renewed = made(u), u, 1, 0
    assert loop.freeze == math.ceil(16 / rate)
    for k, (i, j) in zip(range(900), draws(900, [5, 3]), strict=False):
        (A, a), (B, b), pen = inner[i], outer[j], np.exp(u)
        s, t = 1.0 / (1.0 + np.exp(a * (A @ w))), 1.0 / (1.0 + np.exp(b * (B @ w)))
        f, of_u = -(b * t) @ B / 30, pen * w * v
        D_w = -(a * s) @ A / 30 + pen * w
        D_v = (s * (1.0 - s) * (A @ v)) @ A / 30 + f + pen * v
        w, v = w - rate * P @ D_w, v - rate * P @ D_v
        if k < loop.freeze:
            continue
        of_u = of_u if count == 4 else of_u.sum(keepdims=True)
        squares = squares + of_u**2
        u = u - np.clip(of_u / np.sqrt(squares), -rate / 4, rate / 4)
        assert np.abs(u - anchor).max() <= 0.5
        until -= 1
        if until <= 0:
            if np.abs(u - anchor).max() > 0.2:
                (P, rate), anchor, renewed = made(u), u, renewed + 1
            until = max(1, int((0.5 - np.abs(u - anchor).max()) / (rate / 4)))
    assert renewed > 3
    loop.run(900, progress=False)
    np.testing.assert_allclose(reached(loop), np.concatenate([w, v, u]), rtol=1e-9, atol=1e-11)


def test_a_state_of_another_kind_is_refused_and_nothing_is_loaded() -> None:
    loop = bl.SingleLoop(logistic(), bl.SABA(every=50), torch.full((4,), -1.0).double(), certify=False)
    loop.run(50, progress=False)
    before, state = reached(loop), loop.state_dict()
    wrong = [{}, state | {"format": 1}, {k: v for k, v in state.items() if k != "u"}, state | {"z": state["z"][:3]}]
    for each, sentence in zip(wrong, ("got {}", "has the format 1", "it lacks u", "has the shape"), strict=True):
        with pytest.raises(ValueError, match=sentence):
            loop.load_state_dict(each)
        assert (reached(loop) == before).all()
    loop.load_state_dict({k: v for k, v in state.items() if k != "root"} | {"format": 2, "squares": state["root"] ** 2})
    torch.testing.assert_close(loop.state_dict()["root"], state["root"])
    with pytest.raises(ValueError, match="give `hparams`"):
        bl.SingleLoop(squares(), bl.SABA())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("parametrization", ["log", "direct"])
def test_features_that_are_zero_or_the_same_are_no_obstacle(parametrization: Any, dtype: torch.dtype) -> None:
    (X, y), (Z, t) = (rows(150, seed) for seed in (0, 1))
    A, B = (torch.cat([each, each[:, :1], 0.0 * each[:, :1]], 1).to(dtype) for each in (X, Z))
    problem = bl.problems.LogisticProblem(A, y, B, t, penalty="per_feature", parametrization=parametrization)
    positive = torch.distributions.constraints.greater_than_eq(0.0) if parametrization == "direct" else None
    for preconditioner in ("auto", "none"):
        method = bl.SABA(batch_size=30, every=300, preconditioner=preconditioner)
        start = torch.zeros(6, dtype=dtype)
        loop = bl.SingleLoop(problem, method, start, certify=False, constraints=positive)
        assert loop.run(300, progress=False).history[-1].status == "OK"
        assert torch.isfinite(loop.hparams).all()  # type: ignore[arg-type]


@pytest.mark.parametrize("method", [bl.SOBA, bl.SABA])
def test_automatic_rates_follow_penalties_that_grow(method: Any) -> None:
    # The outer rows have other signs, so that the best model is none and penalties grow.
    problem = as_written()
    (X, y), start = rows(90, 1), torch.full((4,), -2.0).double()
    other = bl.MiniBatches((X, 1.0 - 2.0 * y), 30)
    sampling = problem._sampling
    problem = bl.BilevelProblem(
        sampling.inner_loss, sampling.outer_loss, problem.params, sampler=sampling.sampler, outer_sampler=other
    )
    loop = bl.SingleLoop(problem, method(every=400), start, certify=False)
    before = loop.state.rate
    assert loop.run(800, progress=False).history[-1].status == "OK"
    # The Hessian is at least the penalties.
    assert float(loop.hparams.exp().max()) * before > 2.0  # type: ignore[union-attr]
    assert float(loop.hparams.exp().max()) * loop.state.rate < 1.0  # type: ignore[union-attr]


def test_rates_foresee_that_curvature_grows_along_the_gradient() -> None:
    X = rows(150, 0)[0]
    y = torch.full((150,), 60.0).double()

    def loss(w: Tensor, u: Tensor) -> Tensor:
        z = X @ w[:4] + w[4]
        return (z.exp() - y * z).mean() + 0.5 * (u.exp() * w * w).sum()

    problem = bl.BilevelProblem(loss, lambda w, u: (X @ w[:4] + w[4] - 3.0).square().mean(), torch.zeros(5).double())
    loop = bl.SingleLoop(problem, bl.SABA(every=300), torch.full((5,), -3.0).double(), certify=False)
    assert loop.run(300, progress=False).history[-1].status == "OK"
    torch.testing.assert_close(loop.params[4], torch.tensor(60.0).double().log(), rtol=0.01, atol=0.0)  # type: ignore[index]


def test_a_run_says_its_fall_by_the_step_from_its_last_records() -> None:
    result = bl.SingleLoop(logistic(), bl.SABA(every=200), torch.full((4,), -1.0).double()).run(1000, progress=False)
    losses = [record.outer_loss for record in result.history]
    fall = (losses[-2] - losses[-1]) / 200
    assert fall > 0
    assert f"still falling by {fall:.1e} a step" in result.stopped
