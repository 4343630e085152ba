"""Meta-learning: MAML of `bilevel.meta` beside a plain PyTorch MAML, and tasks side by side beside a loop.

Asked: on sine waves (10 shots) the test error after 1 and 5 gradient steps at the level of the plain MAML of the same
network, meta-batches and Adam, for 3 seeds; on glyphs (5 ways, 1 shot) at least 95 % of its accuracy; 32 sine tasks
side by side at least 3 times faster per meta-batch than the loop over tasks (the ratio of larger networks is shown);
as many tasks at once as the library chooses at most 1.15 times slower than the best of other numbers.
Times are process CPU time. ``--full`` trains long enough for useful weights (ten minutes).
"""

from __future__ import annotations

import argparse
import copy
import time
from functools import partial
from typing import Any

import torch
from common import emit, interleave, medians, ratio
from maml_reference import PlainMAML

import bilevel as bl
from bilevel.meta import GlyphProblem, GlyphTasks, MetaProblem, SineProblem, SineTasks, evaluate
from bilevel.meta.tasks import mlp
from bilevel.oracles.separate import Separate

SEEDS = (0, 1, 2)
HELD_OUT = 200
SIZES = ((1, (40, 40), 10), (20, (100, 64), 10), (64, (200, 128), 20), (200, (512, 320), 40))
"""Inputs, hidden units and shots of networks of which a step holds about 10 KB, 50 KB, 200 KB and 1.2 MB."""
LEVEL = 0.05
"""Relative difference of the test errors below which two runs are at the same level."""


def cast(task: Any, dtype: torch.dtype = torch.float32) -> Any:
    """Return a task in another dtype; ints stay."""
    return bl.tree.tree_map(lambda leaf: leaf.to(dtype) if leaf.is_floating_point() else leaf, task)


def trained(
    problem: MetaProblem, held_out: Any, step_size: float, inner_steps: int, outer_steps: int
) -> dict[str, Any]:
    """Train both on the same meta-batches, and evaluate both on the same held-out tasks after 1 and 5 steps."""
    solver = bl.GradientDescent(step_size, steps=inner_steps)
    start = time.process_time()
    outer = bl.OuterOptimizer(
        problem,
        solver,
        bl.FullUnroll(),
        problem.initial_hparams(),
        optimizer=lambda tensors: torch.optim.Adam(tensors, lr=1e-3),
    )
    outer.run(outer_steps, progress=False)
    seconds = {"bilevel": time.process_time() - start}
    start = time.process_time()
    reference = PlainMAML(copy.deepcopy(problem.module), problem.loss, step_size, inner_steps)
    size, dtype = problem.batch_size, next(problem.module.parameters()).dtype
    for index in range(outer_steps):
        reference.step([cast(problem.tasks(task), dtype) for task in range(index * size, (index + 1) * size)])
    seconds["plain"] = time.process_time() - start
    ours = evaluate(problem, solver, outer.hparams, held_out, HELD_OUT)
    test = [cast(held_out(index), dtype) for index in range(HELD_OUT)]
    return {
        "bilevel": {k: {name: score.mean for name, score in ours[k].items()} for k in (1, 5)},
        "interval": {k: {name: score.half_width for name, score in ours[k].items()} for k in (1, 5)},
        "plain": {k: reference.evaluate(test, k) for k in (1, 5)},
        "cpu_seconds": seconds,
    }


def sine(outer_steps: int) -> bool:
    """Compare the test errors on sine waves."""
    good = []
    for seed in SEEDS:
        problem = SineProblem(seed=seed)
        held_out = SineTasks(shots=10, queries=100, split="test", seed=seed)
        found = trained(problem, held_out, 0.01, 1, outer_steps)
        error = max(abs(found["bilevel"][k]["loss"] / found["plain"][k]["loss"] - 1.0) for k in (1, 5))
        good.append(
            emit(
                f"MAML sine, 10 shots, {outer_steps} outer steps, seed {seed}: test error beside plain MAML",
                error,
                f"at most {LEVEL} apart after 1 and 5 steps",
                error <= LEVEL,
                **found,
            )
        )
    return all(good)


def glyphs(outer_steps: int) -> bool:
    """Compare the test accuracies on glyphs, in float64: in float32 rounding alone sends two equal trainings apart."""
    made = GlyphProblem()
    problem = MetaProblem(made.module.double(), made.loss, made.tasks, batch_size=made.batch_size)
    found = trained(problem, GlyphTasks(split="test"), 0.2, 5, outer_steps)
    share = min(found["bilevel"][k]["accuracy"] / found["plain"][k]["accuracy"] for k in (1, 5))
    return emit(
        f"MAML glyphs, 5 ways, 1 shot, {outer_steps} outer steps: share of plain MAML's accuracy",
        share,
        "at least 0.95 after 1 and 5 steps",
        share >= 0.95,
        **found,
    )


def side_by_side(name: str, problem: MetaProblem, step_size: float, asked: float | None, rounds: int) -> bool:
    """Time one meta-gradient of all tasks at once, and of one after the other by the same library."""
    solver, hparams = bl.GradientDescent(step_size, steps=1), problem.initial_hparams()
    single = [problem.on_tasks(problem.tasks, [index]) for index in range(problem.batch_size)]

    def take(each: MetaProblem) -> Any:
        return bl.hypergradient(each, solver, bl.FullUnroll(), hparams, check=False).hypergradient

    def plain() -> Any:
        reference.module.zero_grad()
        reference.meta_loss(tasks).backward()

    reference = PlainMAML(problem.module, problem.loss, step_size, 1)
    tasks = [cast(problem.tasks(index)) for index in range(problem.batch_size)]
    seconds = interleave(
        {"side by side": lambda: take(problem), "loop": lambda: [take(each) for each in single], "plain loop": plain},
        rounds,
        time.process_time,
    )
    gain = ratio(seconds, "loop", "side by side")
    return emit(
        f"{name}: time of the loop over tasks / of all at once",
        gain,
        "shown" if asked is None else f"at least {asked:g}",
        asked is None or gain >= asked,
        plain_loop=ratio(seconds, "plain loop", "side by side"),
        cpu_milliseconds={key: 1e3 * value for key, value in medians(seconds).items()},
    )


def chosen(inputs: int, hidden: tuple[int, ...], shots: int, rounds: int, tasks: int = 64) -> bool:
    """Time the meta-gradient with as many tasks at once as the rule says, beside all, some and one after the other."""

    def task(index: int) -> Any:
        draw = torch.Generator().manual_seed(index)
        X, w = torch.randn(2 * shots, inputs, generator=draw), torch.randn(inputs, 1, generator=draw)
        y = torch.sin(X @ w)
        return (X[:shots], y[:shots]), (X[shots:], y[shots:])

    problem = MetaProblem(mlp(inputs, hidden, 1, 0), torch.nn.functional.mse_loss, task, tasks)
    solver, hparams, rule = bl.GradientDescent(0.001, steps=5), problem.initial_hparams(), Separate.at_once
    sizes = {"by the rule": None, "side by side": tasks, "16 at a time": 16, "4 at a time": 4, "one by one": 1}

    def take(at_once: int | None) -> Any:
        Separate.at_once = rule if at_once is None else lambda *_: at_once  # type: ignore[method-assign, assignment]
        return bl.hypergradient(problem, solver, bl.FullUnroll(), hparams, check=False)

    bl.hypergradient(problem, solver, bl.FullUnroll(), hparams)
    calls = {name: partial(take, at_once) for name, at_once in sizes.items()}
    made = {name: [call() for _ in range(3)][-1].certificate.measured for name, call in calls.items()}
    seconds = medians(interleave(calls, rounds, time.process_time))
    Separate.at_once = rule  # type: ignore[method-assign]
    worst = seconds["by the rule"] / min(seconds.values())
    kilobytes = problem.separate().nbytes / 1e3  # type: ignore[union-attr]
    return emit(
        f"{tasks} tasks of {kilobytes:.0f} KB each: time by the rule / of the best number at once",
        worst,
        "at most 1.15",
        worst <= 1.15,
        chosen=made["by the rule"]["tasks"],
        cpu_milliseconds={key: 1e3 * value for key, value in seconds.items()},
    )


def main(outer_steps: int = 30, rounds: int = 5) -> bool:
    """Measure everything; both runs agree from the first outer step on, so that a short run shows a difference too."""
    wide = SineProblem(hidden=(512, 512), batch_size=32)
    return all([
        side_by_side("32 sine tasks, 1-40-40-1", SineProblem(batch_size=32), 0.01, 3.0, rounds),
        side_by_side("32 sine tasks, 1-512-512-1", wide, 0.001, None, rounds),
        side_by_side("16 glyph tasks, 784-64-64-5", GlyphProblem(), 0.1, None, rounds),
        *(chosen(*size, rounds) for size in SIZES),
        sine(outer_steps),
        glyphs(max(outer_steps // 10, 5)),
    ])  # fmt: skip


if __name__ == "__main__":
    torch.set_num_threads(1)
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--full", action="store_true", help="2,000 outer steps on sine waves, 200 on glyphs")
    raise SystemExit(not main(2000 if parser.parse_args().full else 30))
