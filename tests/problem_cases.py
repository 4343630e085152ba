"""The problems with closed forms in every version, and random points for them: one line makes a new problem a case."""

from __future__ import annotations

import itertools
from functools import partial
from types import SimpleNamespace

import pytest
import torch

from bilevel import BilevelProblem
from bilevel.problems import (
    HuberProblem,
    LogisticProblem,
    PoissonProblem,
    QuadraticProblem,
    RidgeProblem,
    SampleWeightProblem,
    SoftmaxProblem,
    SquaredHingeProblem,
)

FEATURES, CLASSES = 4, 3


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=generator(seed), dtype=torch.float64)


def data(classes: int = 0, rows: int = 13, features: int = FEATURES) -> dict[str, torch.Tensor]:
    """Seeded splits: regression targets, or labels of which every class occurs."""
    splits = {}
    for seed, (part, count) in enumerate({"train": rows, "val": 7, "test": 9}.items(), 1):
        splits[f"X_{part}"] = normal(count, features, seed=seed)
        splits[f"y_{part}"] = torch.arange(count) % classes if classes else 0.5 + normal(count, seed=10 + seed)
    return splits


def ridge(rows: int, **options: str) -> RidgeProblem:
    return RidgeProblem(**data(rows=rows), **options)


def logistic(**options: str) -> LogisticProblem:
    return LogisticProblem(**data(classes=2), **options)


def multinomial(**options: str) -> SoftmaxProblem:
    return SoftmaxProblem(**data(classes=CLASSES), **options)


def poisson(**options: str) -> PoissonProblem:
    return PoissonProblem(**data(classes=4), **options)


def huber(**options: str) -> HuberProblem:
    return HuberProblem(**data(), width=0.7, **options)


def hinge(**options: str) -> SquaredHingeProblem:
    return SquaredHingeProblem(**data(classes=2), **options)


def weighted(classes: int = CLASSES, **options: str) -> SampleWeightProblem:
    return SampleWeightProblem(**data(classes=classes), penalty=0.3, **options)


def versions(family, penalties, **options):
    """One factory for every combination of the options that all linear models share."""
    for penalty, loss, kind in itertools.product(penalties, ("mean", "sum"), ("log", "direct")):
        name = "-".join([family.__name__, *map(str, options.values()), penalty, loss, kind])
        yield name, partial(family, penalty=penalty, loss=loss, parametrization=kind, **options)


LINEAR_MODELS = {
    **dict(versions(ridge, ("scalar", "per_feature"), rows=13)),
    **dict(versions(ridge, ("scalar", "per_feature"), rows=3)),
    **dict(versions(logistic, ("scalar", "per_feature"))),
    **dict(versions(poisson, ("per_feature",))),
    **dict(versions(huber, ("per_feature",))),
    **dict(versions(hinge, ("per_feature",))),
    **dict(versions(multinomial, ("scalar", "per_class", "per_feature", "per_weight"))),
}
WEIGHTED = {
    f"weighted-{classes}-{loss}-{kind}": partial(weighted, classes, loss=loss, parametrization=kind)
    for classes, loss, kind in ((3, "mean", "sigmoid"), (2, "sum", "sigmoid"), (3, "mean", "direct"))
}
PROBLEMS = {
    **LINEAR_MODELS,
    **WEIGHTED,
    "quadratic": partial(QuadraticProblem.random, size=5, hyperparameters=3),
    "quadratic-one": partial(QuadraticProblem.random, size=1, hyperparameters=1),
}
LINEAR = {name: factory for name, factory in PROBLEMS.items() if not name.startswith("quadratic")}
KEEPING = {
    "ridge": partial(ridge, 13, penalty="per_feature"),
    "logistic": partial(logistic, penalty="per_feature"),
    "softmax": partial(multinomial, penalty="per_weight"),
    "weighted": weighted,
    "poisson": poisson,
    "huber": huber,
}
"""One version of each family, whose curvature can be kept."""
RIDGES = {name: factory for name, factory in LINEAR_MODELS.items() if name.startswith("ridge")}


def over(factories):
    return pytest.mark.parametrize("factory", factories.values(), ids=factories.keys())


def draw(problem: BilevelProblem, seed: int = 0) -> SimpleNamespace:
    """Random points and directions; hyperparameters are positive, which every parametrization allows."""
    shape = problem.linear_directions.shape[:1] if isinstance(problem, QuadraticProblem) else problem.hparams_shape()
    params = problem.params.shape
    return SimpleNamespace(
        x=normal(*params, seed=seed + 100),
        u=0.1 + normal(*shape, seed=seed + 200).abs(),
        v=normal(*params, seed=seed + 300),
        w=normal(*params, seed=seed + 400),
        du=normal(*shape, seed=seed + 500),
    )


def close(got, want, tolerance=1e-12):
    torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance)
