"""A contest without peers, for the tests of the runner: contestants that are right, wrong, broken, slow or dead."""

import os
import time

from contest import Asked, Contestant, Problem, Task


def prepare(answer=(1.0, 2.0), seconds=0.0):
    def call():
        time.sleep(seconds)
        return answer

    return lambda data: {"add": call, "half": call} if seconds == 0 else {"add": call}


def broken(data):
    raise ImportError("no module named 'peer'")


def dead(data):
    return {"add": lambda: os._exit(3)}


PROBLEMS = [
    Problem(
        key="toy",
        title="A toy",
        words="Nothing to see.",
        sizes={"quick": {}},
        data=lambda seed: seed,
        reference=lambda data: {"add": [1.0, 2.0], "half": [1.0, 2.0]},
        tasks={"add": Task("one sum", tolerance=1e-3, per=2, unit="summand"), "half": Task("half a sum")},
        contestants=[
            Contestant("bilevel Sum", prepare(), "bilevel"),
            Contestant("wrong peer", prepare((1.0, 3.0)), "peer"),
            Contestant("slow peer", prepare(seconds=0.02), "peer"),
            Contestant("broken peer", broken, "peer"),
            Contestant("dead peer", dead, "peer"),
            Contestant("hanging peer", prepare(seconds=60.0), "peer"),
        ],
        asked=[
            Asked("add", ["bilevel *"], ["*peer"], 2.0, measure="wall"),
            Asked("add", ["missing"], ["*peer"], 2.0),
            Asked("half", ["bilevel *"], ["*peer"], None, words="any peer"),
        ],
        absent={"shy peer": "does not add"},
    )
]
