"""The outer step: evaluations and processor seconds to the minimum, true endings, planted faults, and its own time.

Ten bars. The starts are random, an offset U(-6, 4) around the penalties that shrink a lone weight by half and N(0, 1.5)
for each penalty; ``--seed`` makes other starts, ``--data`` other data and splits. An evaluation is one outer loss with
its hypergradient. Peers stand beside the first starts only (``--peers``), and no run takes more than 100 evaluations.
"""

from __future__ import annotations

import argparse
import io
import math
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from common import emit
from outer_faults import FAULTS, KILLED, NAME, ending, killed
from outer_problems import (
    MARKS,
    PROBLEMS,
    TABLE,
    Trace,
    adam,
    exactly,
    left_after,
    loop_of,
    peers,
    searched,
    starts_of,
    timed,
)

import bilevel as bl

Options = argparse.Namespace


def reached(traces: Sequence[Trace], best: float) -> dict[str, Any]:
    """Return the median evaluations and processor seconds to each mark above the best value, and how many reach it."""
    figures: dict[str, Any] = {}
    for mark in MARKS:
        counts = [trace.until(best + mark * abs(best)) for trace in traces]
        hit = [(count, sum(trace.seconds[:count])) for count, trace in zip(counts, traces, strict=True) if count]
        evaluations, seconds = (statistics.median(each) for each in zip(*hit, strict=True)) if hit else (None, None)
        figures[f"{mark:.0e}"] = {"reached": f"{len(hit)}/{len(traces)}", "ev": evaluations, "cpu_s": seconds}
    return figures


def beside(problem: Any, starts: Sequence[torch.Tensor], options: Options) -> dict[str, list[Trace]]:
    """Return the runs of every peer from the first starts."""
    return {name: [run(problem, u, options.most) for u in starts[: options.peers]] for name, run in peers().items()}


def best_of(*runs: Sequence[Trace]) -> float:
    """Return the best value that any run found."""
    return min(trace.best for traces in runs for trace in traces)


def to_the_minimum(bar: str, names: Sequence[str], options: Options, ask: dict[str, float], mark: float = 1e-6) -> bool:
    """Count the evaluations of the automatic search from random starts to the best value that any found."""
    ok = True
    for name in names:
        problem = PROBLEMS[name](options.data)
        starts = starts_of(problem, options.starts, options.seed)
        ours = [searched(problem, u, "auto", most=options.most) for u in starts]
        others = beside(problem, starts, options)
        best = best_of(ours, *others.values())
        counts = [trace.until(best + mark * abs(best)) for trace in ours]
        hit = [count for count in counts if count is not None]
        worst = max(hit) if len(hit) == len(counts) else math.inf
        taken = max(len(trace.values) for trace in ours)
        spent = [sum(trace.seconds[:count]) for trace, count in zip(ours, counts, strict=True)]
        seconds = statistics.median(spent)
        asked = f"{mark:g} from all starts in at most {ask['ev']:g} ev"
        fine = (taken if "taken" in ask else worst) <= ask["ev"] and len(hit) == len(counts)
        if "cpu_s" in ask:
            asked += f", at most {ask['cpu_s']:g} CPU s"
            fine &= seconds <= ask["cpu_s"]
        ok &= emit(
            f"bar {bar}: {name}",
            taken if "taken" in ask else worst,
            asked,
            fine,
            reached=f"{len(hit)}/{len(counts)}",
            median_ev=statistics.median(hit) if hit else None,
            taken=sorted(len(trace.values) for trace in ours),
            cpu_s=seconds,
            whole_cpu_s=statistics.median(sum(trace.seconds) for trace in ours),
            left=max(trace.best - best for trace in ours) / abs(best),
            best=best,
            converged=sum(trace.stopped.startswith("converged") for trace in ours),
            auto=reached(ours, best),
            peers={kind: reached(traces, best) for kind, traces in others.items()},
            optuna="beside the others" if "Optuna TPE" in others else "not installed",
            seed=options.seed,
            data=options.data,
        )
    return ok


def large(options: Options) -> bool:
    """Bar 1: the shape of ijcnn1, at 5,000 rows and, in a full run, at 49,990."""
    ok = to_the_minimum("1", ["ijcnn1like 5000, 22"], options, {"ev": 13})
    if options.full:
        ok &= to_the_minimum("1", ["ijcnn1like 49990, 22"], options, {"ev": 13, "cpu_s": 0.5})
    return ok


def ill(options: Options) -> bool:
    """Bar 2: one penalty of an ill-scaled ridge regression."""
    return to_the_minimum("2", ["ridge ill-scaled, 1"], options, {"ev": 15})


def table(options: Options) -> bool:
    """Bar 3: seven problems, the worst start of each."""
    return to_the_minimum("3", [name for name in TABLE if name in options.problems], options, {"ev": 25})


def many(options: Options) -> bool:
    """Bar 4: 300 penalties; ends are local minima."""
    return to_the_minimum("4", ["ridge 3600x300, 300"], options, {"ev": 25, "taken": 1}, mark=3e-4)


TRUE = (*TABLE, "ridge breast_cancer, 30", "ijcnn1like 1000, 22")
"""Problems whose endings are looked at."""


def endings(options: Options) -> bool:
    """Bar 5: what long runs find below an end that is called converged."""
    return _endings(bl.HyperNewton, options) & _endings(bl.HyperLBFGS, options)


def _endings(rule: Callable[..., Any], options: Options) -> bool:
    ratios, words = [], []
    for name in (each for each in TRUE if each in options.problems):
        problem = PROBLEMS[name](options.data)
        for u in starts_of(problem, max(1, (2 * options.starts + 4) // 5), options.seed):
            for tol in (1e-4, 1e-6, 1e-8):
                trace = searched(problem, u, rule(tol=tol), most=options.most)
                words.append(trace.stopped.startswith("converged"))
                if words[-1]:
                    first, left = left_after(problem, trace.hparams)
                    ratios.append((left / (tol * abs(first)), name, tol))
    false = [f"{name} at {tol:g}: {ratio:.2g} tol" for ratio, name, tol in ratios if ratio > 3]
    return emit(
        f"bar 5: {rule.__name__}: ends called converged of which at most 3 tol is left",
        1 - len(false) / max(1, len(ratios)),
        "all",
        not false,
        ends=len(words),
        converged=len(ratios),
        within_tol=sum(ratio <= 1 for ratio, *_ in ratios),
        largest_in_tol=max((ratio for ratio, *_ in ratios), default=None),
        false=false,
        seed=options.seed,
        data=options.data,
    )


def faults(options: Options) -> bool:
    """Bar 6: planted faults, each with how it ended."""
    ok = True
    for fault in FAULTS:
        problem = PROBLEMS[NAME](options.data)
        (u,) = starts_of(problem, 1, options.seed)
        said, fine = ending(fault, problem, u)
        ok &= emit(f"bar 6: {fault}", float(fine), "the right word, or truly converged", fine, ended=said)
    for phase in KILLED:
        said, fine = killed(phase, options.seed)
        ok &= emit(f"bar 6: kill -9 in the {phase}", float(fine), "the bits of an undisturbed run", fine, ended=said)
    return ok


def own_time(options: Options) -> bool:
    """Bar 7: processor time outside the hypergradient and the second derivatives, per evaluation."""
    ok = True
    cases = ((1, "ridge diabetes, 1"), (5, "ridge diabetes, 5 groups"), (10, "ridge diabetes, 10"))
    for k, name in (*cases, (22, "ijcnn1like 1000, 22"), (30, "ridge breast_cancer, 30")):
        problem = PROBLEMS[name](options.data)
        (u,) = starts_of(problem, 1, options.seed)
        rules = {"HyperNewton": (bl.HyperNewton(), 300.0), "HyperLBFGS": (bl.HyperLBFGS(), 300.0)}
        for kind, (rule, asked) in (rules | {"Adam": (adam(0.1), 60.0)}).items():
            figures = []
            for _ in range(options.rounds):
                with (
                    timed(loop_of(), "hypergradient") as inside,
                    timed(problem, "hyper_hessians") as second,
                    timed(torch.optim.Adam, "step") as steps,
                ):
                    trace = searched(problem, u, rule, most=20)
                count = len(trace.values)
                # The first evaluation makes the problem's caches and examines its derivatives.
                spent = sum(trace.seconds[1:]) - sum(inside[1:]) - sum(second) - sum(steps[1:])
                parts = (spent, sum(second), sum(inside[1:]), sum(steps[1:]))
                figures.append([1e6 * part / (count - 1) for part in parts])
            # The least of the rounds: other processes only add to it.
            own, hessians, hypergradients, adam_step = (min(each) for each in zip(*figures, strict=True))
            ok &= emit(
                f"bar 7: {kind}, k = {k}: us per evaluation outside the hypergradient",
                own,
                f"at most {asked:g}" + " beside torch's own step" * (kind == "Adam"),
                own <= asked,
                second_derivatives_us=hessians,
                hypergradient_us=hypergradients,
                adam_step_us=adam_step,
            )
    return ok


INSIDE = ("ridge 3600x300, 5 groups", "ridge 3600x300, 12 groups", "ridge diabetes, 5 groups", "ridge diabetes, 10")
"""Problems of bar 8: gradient descent takes 100,000 steps and more where the best penalties are much weaker."""


def first_order_inside(options: Options) -> bool:
    """Bar 8: gradient descent and CG inside, accuracies of the search's own choice against tolerances of 1e-7."""
    ok = True
    for name in (each for each in INSIDE if each in options.problems):
        problem = PROBLEMS[name](options.data)
        costs: dict[str, list[list[float]]] = {"own": [], "fixed": []}
        ended = []
        for u in starts_of(problem, max(1, options.starts // 3), options.seed):
            runs = {
                way: exactly(problem, u, bl.PreconditionedGradientDescent(tol=tol), bl.Implicit(bl.CG(tol=tol)))
                for way, tol in (("own", None), ("fixed", 1e-7))
            }
            best = min(min(values) for values, *_ in runs.values())
            for way, (values, spent, stopped) in runs.items():
                hit = [next((i for i, v in enumerate(values) if v <= best * (1 + mark)), None) for mark in MARKS]
                costs[way].append([math.inf if i is None else sum(spent[: i + 1]) for i in hit])
                if way == "own":
                    ended.append(stopped)
        for at, (mark, share) in enumerate(zip(MARKS, (0.25, 0.5, 0.5), strict=True)):
            medians = {way: statistics.median(each[at] for each in runs) for way, runs in costs.items()}
            ratio = medians["own"] / medians["fixed"]
            ok &= emit(
                f"bar 8: {name}: gradient-equivalents to {mark:g}, of those at fixed tolerances of 1e-7",
                ratio,
                f"at most {share:g}",
                ratio <= share,
                medians=medians,
                ended=ended,
                seed=options.seed,
                data=options.data,
            )
    return ok


def resumes(options: Options) -> bool:
    """Bar 9: a run that is saved, dropped and loaded after every evaluation against one that is not."""
    ok = True
    for name in ("ridge diabetes, 10", "logistic breast_cancer, 5 groups"):
        problem = PROBLEMS[name](options.data)
        (u,) = starts_of(problem, 1, options.seed)
        for rule in (bl.HyperNewton(), bl.HyperLBFGS()):

            def fresh(problem: Any = problem, u: torch.Tensor = u, rule: Any = rule) -> bl.OuterOptimizer:
                return bl.OuterOptimizer(problem, bl.QuasiNewton(), bl.Implicit(), u, rule)

            whole, part, state = fresh(), fresh(), None
            whole.run(options.most, progress=False)
            for _ in whole.history:
                part = fresh()
                if state is not None:
                    part.load_state_dict(torch.load(io.BytesIO(state), weights_only=True))
                part.step()
                buffer = io.BytesIO()
                torch.save(part.state_dict(), buffer)
                state = buffer.getvalue()
            pairs = zip(whole.history, part.history, strict=True)
            same = sum(one.outer_loss == other.outer_loss for one, other in pairs)
            fine = same == len(whole.history) and torch.equal(whole.hparams, part.hparams)
            share = same / len(whole.history)
            ok &= emit(f"bar 9: {type(rule).__name__}, {name}: same bits after every evaluation", share, "all", fine)
    return ok


def automatic(options: Options) -> bool:
    """Bar 10: evaluations of "auto" against Adam's at 0.3 and 1, to every mark; the scan's 8 are allowed at 1e-2."""
    ok = True
    for name in (each for each in TRUE if each in options.problems):
        problem = PROBLEMS[name](options.data)
        starts = starts_of(problem, options.peers, options.seed)
        runs = {"auto": [searched(problem, u, "auto", most=options.most) for u in starts]}
        runs |= {
            f"Adam {rate:g}": [searched(problem, u, adam(rate), most=options.most) for u in starts] for rate in (0.3, 1)
        }
        best, late = best_of(*runs.values()), []
        for mark in MARKS:
            counts = {
                kind: [trace.until(best + mark * abs(best)) or math.inf for trace in traces]
                for kind, traces in runs.items()
            }
            ours, adams = (statistics.median(counts["auto"]), [statistics.median(counts[k]) for k in list(counts)[1:]])
            if ours > min(adams) + 8 * (mark == 1e-2):
                late.append(f"to {mark:g}: {ours:g} against {min(adams):g}")
        figures = {kind: reached(traces, best) for kind, traces in runs.items()}
        ok &= emit(f"bar 10: {name}: marks later than Adam", len(late), "none", not late, late=late, **figures)
    return _separable(options) and ok if "softmax digits, 610" in options.problems else ok


def _separable(options: Options) -> bool:
    problem = PROBLEMS["softmax digits, 610"](options.data)
    (u,) = starts_of(problem, 1, options.seed)
    rules = {"auto": "auto", "Adam 1": adam(1.0)} | ({"HyperNewton": bl.HyperNewton()} if options.full else {})
    runs = {kind: searched(problem, u, rule, most=40) for kind, rule in rules.items()}
    values = {kind: trace.best for kind, trace in runs.items()}
    seconds = {kind: sum(trace.seconds) for kind, trace in runs.items()}
    asked = min(0.0011, values["Adam 1"])
    return emit(
        "bar 10: softmax digits, 610 penalties: outer loss after 40 evaluations",
        values["auto"],
        f"at most {asked:.2g}, the better of 0.0011 and Adam 1",
        values["auto"] <= asked,
        values=values,
        cpu_s=seconds,
        ended=runs["auto"].stopped,
    )


BARS: dict[int, Callable[[Options], bool]] = {
    1: large,
    2: ill,
    3: table,
    4: many,
    5: endings,
    6: faults,
    7: own_time,
    8: first_order_inside,
    9: resumes,
    10: automatic,
}


def main(arguments: Sequence[str] = ()) -> bool:
    """Print every bar as asked and measured."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", type=int, nargs="+", choices=sorted(BARS), default=sorted(BARS), help="bars")
    parser.add_argument("--seed", type=int, default=0, help="of the starts (default 0)")
    parser.add_argument("--data", type=int, default=0, help="seed of data and splits (default 0)")
    parser.add_argument("--starts", type=int, default=10, help="random starts of each problem (default 10)")
    parser.add_argument("--peers", type=int, default=3, help="starts from which peers run (default 3)")
    parser.add_argument("--most", type=int, default=100, help="most evaluations of a run (default 100)")
    parser.add_argument("--rounds", type=int, default=5, help="rounds of timings (default 5)")
    parser.add_argument("--problems", nargs="+", default=PROBLEMS, choices=PROBLEMS, help="of bars 3, 5 and 10")
    parser.add_argument("--full", action="store_true", help="also 49,990 rows, and HyperNewton on 610 penalties")
    options = parser.parse_args(arguments)
    start = time.process_time()
    passed = {bar: BARS[bar](options) for bar in options.only}
    failed = [bar for bar, fine in passed.items() if not fine]
    words = "all hold" if not failed else f"not held: {', '.join(map(str, failed))}"
    return emit(
        f"outer bars, {words}",
        len(passed) - len(failed),
        f"{len(passed)}",
        not failed,
        cpu_s=time.process_time() - start,
    )


if __name__ == "__main__":
    import sys

    torch.set_num_threads(1)
    raise SystemExit(not main(sys.argv[1:]))
