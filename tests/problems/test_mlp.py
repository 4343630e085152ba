"""The perceptron with tuned decays: losses against one written by hand, hypergradients against dense algebra."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from paths import CONFIGS
from problem_cases import close, data, generator, normal

import bilevel as bl
from bilevel.cli import main
from bilevel.config import load_plan
from bilevel.problems import MLPProblem

CONFIG = CONFIGS / "mlp_weight_decay.yaml"
DECAYS = ("shared", "per_layer", "per_weight")
decays = pytest.mark.parametrize("decay", DECAYS)


def made(decay: str = "per_layer", **options: Any) -> MLPProblem:
    return MLPProblem(**data(3), **({"hidden": [5, 2]} | options), decay=decay)


def point(problem: MLPProblem, seed: int = 0) -> tuple[dict[str, torch.Tensor], Any]:
    params = {name: normal(*each.shape, seed=seed + i) for i, (name, each) in enumerate(problem.params.items())}
    start = problem.initial_hparams()
    if isinstance(start, dict):
        return params, {name: normal(*each.shape, seed=seed + 50 + i) for i, (name, each) in enumerate(start.items())}
    return params, normal(*start.shape, seed=seed + 50)


def by_hand(params: dict[str, torch.Tensor], X: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """The mean cross-entropy of two hidden layers of tanh units."""
    first = torch.tanh(X @ params["0.weight"].t() + params["0.bias"])
    second = torch.tanh(first @ params["2.weight"].t() + params["2.bias"])
    Z = second @ params["4.weight"].t() + params["4.bias"]
    return (Z.exp().sum(1).log() - Z[torch.arange(len(y)), y]).mean()


def decay_by_hand(decay: str, params: dict[str, torch.Tensor], u: Any) -> Any:
    if decay == "per_weight":
        return sum((u[name].exp() * value**2).sum() for name, value in params.items()) / 2
    layers = [u] * 3 if decay == "shared" else u
    names = (("0.weight", "0.bias"), ("2.weight", "2.bias"), ("4.weight", "4.bias"))
    return sum(torch.exp(u) * (params[n] ** 2).sum() for u, pair in zip(layers, names, strict=True) for n in pair) / 2


@decays
def test_losses_equal_a_perceptron_written_by_hand(decay: str) -> None:
    problem, splits = made(decay), data(3)
    params, u = point(problem)
    inner = by_hand(params, splits["X_train"], splits["y_train"]) + decay_by_hand(decay, params, u)
    close(problem.inner_loss(params, u), inner)
    close(problem.outer_loss(params, u), by_hand(params, splits["X_val"], splits["y_val"]))
    figures = problem.metrics(params)
    assert figures["test_loss"] == pytest.approx(float(by_hand(params, splits["X_test"], splits["y_test"])), rel=1e-12)
    assert set(figures) == {f"{part}_{score}" for part in ("train", "val", "test") for score in ("loss", "accuracy")}


@decays
def test_hypergradients_equal_dense_algebra_at_the_same_solution(decay: str) -> None:
    problem, splits = made(decay, hidden=[3]), data(3)
    u = problem.initial_hparams(-1.0)
    params = bl.solution(problem, bl.QuasiNewton(tol=1e-4), bl.Implicit(), u)
    newton = bl.Newton(bl.Direct(), tol=1e-12)
    estimate = bl.hypergradient(problem, newton, bl.Implicit(bl.Direct()), u, params)
    names = list(problem.params)

    def split(x: torch.Tensor) -> dict[str, torch.Tensor]:
        parts = x.split([problem.params[name].numel() for name in names])
        return {name: part.reshape(problem.params[name].shape) for name, part in zip(names, parts, strict=True)}

    def loss(params: dict[str, torch.Tensor], part: str) -> torch.Tensor:
        hidden = torch.tanh(splits[f"X_{part}"] @ params["0.weight"].t() + params["0.bias"])
        Z = hidden @ params["2.weight"].t() + params["2.bias"]
        return (Z.exp().sum(1).log() - Z.gather(1, splits[f"y_{part}"][:, None])[:, 0]).mean()

    def each(flat_u: torch.Tensor) -> torch.Tensor:
        counts = [problem.params[name].numel() for name in names]
        if decay == "per_weight":
            return flat_u.exp()
        layers = flat_u.exp().expand(2) if decay == "shared" else flat_u.exp()
        return torch.cat([layers[i // 2].expand(count) for i, count in enumerate(counts)])

    def inner(x: torch.Tensor, flat_u: torch.Tensor) -> torch.Tensor:
        return loss(split(x), "train") + 0.5 * (each(flat_u) * x**2).sum()

    x = torch.cat([estimate.params[name].reshape(-1) for name in names])
    flat_u = torch.cat([u[name].reshape(-1) for name in names]) if decay == "per_weight" else u.reshape(-1)
    grad = torch.func.grad(inner)
    H, C = torch.func.jacrev(grad)(x, flat_u), torch.func.jacrev(grad, argnums=1)(x, flat_u)
    expected = -C.t() @ torch.linalg.solve(H, torch.func.grad(lambda x: loss(split(x), "val"))(x))
    got = estimate.hypergradient
    got = torch.cat([got[name].reshape(-1) for name in names]) if decay == "per_weight" else got.reshape(-1)
    assert (got - expected).norm() <= 1e-8 * expected.norm()


def test_the_start_follows_from_the_seed_and_leaves_the_global_generator_alone() -> None:
    before = torch.get_rng_state()
    first, again, other = made(seed=1).params, made(seed=1).params, made(seed=2).params
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["0.weight"], other["0.weight"])
    assert not any(value.any() for name, value in first.items() if "bias" in name)
    wide = MLPProblem(**data(3, features=100), hidden=[300]).params["0.weight"]
    assert float(wide.std()) == pytest.approx(0.1, rel=0.02)
    draws = torch.randn(5, 4, generator=generator(1), dtype=torch.float64)
    close(first["0.weight"], draws / 2)


def test_every_hyperparameter_has_a_name() -> None:
    assert made("shared").labels(["a"]) == ["all weights"]
    assert made("per_layer").labels(["a"]) == ["layer 1", "layer 2", "layer 3"]
    names = made("per_weight", hidden=[2]).labels(["a"])
    assert len(names) == 2 * 4 + 2 + 3 * 2 + 3
    assert names[5] == "0.weight[1,1]"
    assert names[9] == "0.bias[1]"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"hidden": []}, r"`MLPProblem.hidden` must be a list of positive ints, one for each hidden layer, got \[\]"),
        ({"hidden": [8, 0]}, r"`MLPProblem.hidden` must be a list of positive ints, .* got \[8, 0\]"),
        ({"hidden": [2.5]}, r"`MLPProblem.hidden` must be a list of positive ints, .* got \[2.5\]"),
        ({"hidden": 8}, "`MLPProblem.hidden` must be a list of positive ints, .* got 8"),
        ({"hidden": "32"}, "`MLPProblem.hidden` must be a list of positive ints, .* got '32'"),
        (
            {"decay": "per_unit"},
            "`MLPProblem.decay` must be 'shared' or 'per_layer' or 'per_weight', got 'per_unit'",
        ),
        ({"seed": -1}, "`MLPProblem.seed` must be an int that is not negative, got -1"),
        ({"y_train": normal(13, seed=1)}, "y_train holds labels that are not whole numbers: a regression target"),
        ({"X_val": normal(7, 3, seed=1)}, "X_val has 3 features, but X_train has 4"),
        ({"y_test": None}, "give X_test and y_test together, or neither"),
    ],
)
def test_options_and_data_that_cannot_work(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MLPProblem(**(data(3) | options))


def test_trees_that_do_not_fit_are_refused() -> None:
    problem = made("per_weight")
    u = problem.initial_hparams()
    with pytest.raises(
        ValueError, match=r"`hparams` of MLPProblem\(decay='per_weight'\) must be a dict with the keys 0"
    ):
        problem.check(problem.params, torch.zeros((), dtype=torch.float64))
    with pytest.raises(ValueError, match=r"keys 0.weight, .*, got the keys '0.weight'\."):
        problem.check(problem.params, {"0.weight": u["0.weight"]})
    with pytest.raises(ValueError, match=r"`hparams\['4.bias'\]` of MLPProblem.* shape \(3,\), got \(4,\)"):
        problem.check(problem.params, u | {"4.bias": torch.zeros(4, dtype=torch.float64)})
    with pytest.raises(ValueError, match=r"`hparams` of MLPProblem\(decay='per_layer'\) .* shape \(3,\), got \(2,\)"):
        bl.hypergradient(made(), bl.GradientDescent(steps=1), bl.FullUnroll(), torch.zeros(2, dtype=torch.float64))


def test_the_config_runs_whole_with_every_estimator(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plan = load_plan(CONFIG)
    changes = [f"problems.{name}.data=iris" for name in plan.problems] + ["outer.steps=2", "solver.steps=30"]
    overrides = [word for change in changes for word in ("--set", change)]
    assert main(["compare", str(CONFIG), "--out", str(tmp_path / "run"), "--jobs", "1", *overrides]) == 0
    out = capsys.readouterr().out
    # Thirty steps of Adam are far from a solution, where alone the implicit formula holds.
    assert out.count(" ok") == out.count(" inaccurate") == len(plan.problems)
    rows = [json.loads(row) for row in (tmp_path / "run" / "results.jsonl").read_text().splitlines()]
    assert {row["referee"] for row in rows} == {"none: the inner problem has several solutions"}
    for first, last in zip(rows[::2], rows[1::2], strict=True):
        assert last["outer_loss"] < first["outer_loss"]


def test_tune_prints_decays_beside_their_logarithms(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    changes = ["problems={iris: {class: MLPProblem, data: iris, hidden: [2], start: -3.0}}", "outer.steps=2"]
    overrides = [word for change in changes for word in ("--set", change)]
    assert main(["tune", str(CONFIG), "--out", str(tmp_path / "run"), *overrides]) == 0
    shown = capsys.readouterr().out
    header = next(line for line in shown.splitlines() if line.startswith("hyperparameter"))
    assert header.split("  ")[-1].strip() == "decay"
    layer = next(line for line in shown.splitlines() if line.startswith("layer 1"))
    _, start, tuned, shown_decay = map(float, layer.removeprefix("layer").split())
    assert start == -3.0
    assert shown_decay == pytest.approx(np.exp(tuned), rel=1e-3)
