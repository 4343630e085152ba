"""The experiments of both papers: reference numbers, claims, files, configs."""

from __future__ import annotations

import csv
import json
from argparse import Namespace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from paths import CONFIGS

from bilevel import curse
from bilevel.curse import EqualBudget, InnerSolvers, Methods, Truncation, WarmStarts, WorstCase
from bilevel.curse.problems import DataMissingError, least_squares, load

CONFIGS = sorted((CONFIGS / "curse").glob("*.yaml"))
NO_COMMAND = find_spec("bilevel.config.document") is None if find_spec("bilevel.config") else True


@pytest.fixture(scope="module")
def methods() -> curse.Outcome:
    labels = ("GD 1/L", "GD sqrt(2)/L", "GD 2/(L+l)", "Chebyshev", "heavy ball", "Sobolev", "asymptotic Sobolev")
    return Methods(methods=labels, steps=700).run()


@pytest.mark.parametrize(
    ("label", "ratio", "index"),
    [
        ("GD 1/L", 1.002, None),
        ("GD sqrt(2)/L", 1.002, None),
        ("GD 2/(L+l)", 7.31, 493),
        ("Chebyshev", 10.56, 32),
        ("heavy ball", 9.33, 38),
        ("Sobolev", 1.0002, None),
        ("asymptotic Sobolev", 1.23, 15),
    ],
)
def test_the_peaks_on_breast_cancer_are_the_reference(methods, label: str, ratio: float, index: int | None) -> None:
    assert methods.numbers["kappa breast_cancer"] == pytest.approx(1.009e-3, rel=1e-3)
    assert methods.numbers[f"peak ratio breast_cancer {label}"] == pytest.approx(ratio, rel=0.01)
    # A flat curve has no peak to place.
    if index is not None:
        assert abs(methods.numbers[f"peak index breast_cancer {label}"] - index) <= 2


def test_sobolev_is_ten_and_a_hundred_times_better_after_150_steps(methods) -> None:
    errors = {label: methods.numbers[f"error at 150 breast_cancer {label}"] for label in ("Sobolev", "Chebyshev")}
    assert errors["Chebyshev"] > 10 * errors["Sobolev"]
    assert methods.numbers["error at 150 breast_cancer GD 2/(L+l)"] > 100 * errors["Sobolev"]


def test_the_curse_needs_a_start_away_from_the_centre_of_the_penalty() -> None:
    outcome = Methods(methods=("GD 2/(L+l)", "Chebyshev"), start=0.0, steps=600).run()
    for label in ("GD 2/(L+l)", "Chebyshev"):
        assert outcome.numbers[f"peak ratio breast_cancer {label}"] == pytest.approx(1.0, abs=1e-3)
    assert [claim.holds for claim in outcome.claims if "gets worse" in claim.claim] == [False, False]


def test_the_worst_case_peaks_where_theory_says() -> None:
    numbers = WorstCase(kappas=(1e-2,), methods=("GD 2/(L+l)", "Chebyshev", "Sobolev alpha=0"), steps=100).run().numbers
    assert numbers["peak GD 2/(L+l) 0.01"] == pytest.approx(36.79, rel=1e-3)
    assert numbers["index GD 2/(L+l) 0.01"] == pytest.approx(50, abs=1)
    assert numbers["peak Chebyshev 0.01"] == pytest.approx(53.2, rel=0.01)
    assert numbers["peak Sobolev alpha=0 0.01"] == pytest.approx(1.04, rel=0.01)


@pytest.fixture(scope="module")
def truncation() -> curse.Outcome:
    return Truncation(columns=(60,), draws=12).run()


def test_truncation_lowers_the_curse_at_equal_budget_and_bounds_hold(truncation) -> None:
    claims = {claim.claim: claim for claim in truncation.claims}
    for text in (
        "the derivative first gets worse",
        "a late start damps the peak",
        "truncated reverse sweep and late-started forward mode agree",
        "the bounds (19) and (21) hold",
        "at equal budget, dropping derivative steps pays",
    ):
        assert claims[text].holds, claims[text]


def test_equal_budget_errors_are_those_of_separate_runs() -> None:
    from bilevel.theory import error_curves

    plan = Truncation(columns=(20,), steps=20, draws=2, indices=(0,), omega=2)
    batch = least_squares(20, 2)
    solvers, _ = plan.solvers(batch)
    errors, dropped = plan.equal_budget(batch, solvers), plan.dropped()
    n = dropped[3]
    alone = error_curves(batch, solvers, None, 20 + 2 * n, [20 - n])
    torch.testing.assert_close(errors[:, 3], alone.late[:, 0, -1] / alone.jacobian_norm, rtol=1e-10, atol=1e-14)


def test_a_warm_start_acts_as_a_truncation_at_equal_cost() -> None:
    outcome = WarmStarts(columns=60, steps=20, dropped=(0, 5), outer_steps=10, draws=2).run()
    assert outcome.claims[0].holds
    assert outcome.numbers["warm 0"] < outcome.numbers["cold 0"]


def test_the_order_of_the_solvers_shows_in_the_hypergradient() -> None:
    numbers = InnerSolvers(outer_steps=3).run().numbers
    assert numbers["Sobolev"] < numbers["Chebyshev"] < numbers["GD 2/(L+l)"]


@pytest.fixture(scope="module")
def equal_budget() -> curse.Outcome:
    return EqualBudget(families=("M", "ridge"), columns=(60, 140), steps=60, draws=1).run()


def test_every_strategy_stays_in_the_budget_and_the_balanced_one_wins(equal_budget) -> None:
    claims = {claim.source + claim.claim: claim for claim in equal_budget.claims}
    assert len(claims) == 5
    assert all(claim.holds for claim in claims.values() if claim.source == "this library")
    numbers = equal_budget.numbers
    assert (
        numbers['median balance="auto"'] < 0.1 < 0.9 < numbers['median tail="auto"'] < numbers["median no truncation"]
    )


@pytest.mark.parametrize("family", ["M", "ridge", "logistic", "ill-conditioned"])
def test_the_oracle_is_the_best_of_the_fixed_tails_that_the_library_runs(family: str) -> None:
    import bilevel as bl
    from bilevel.curse.draws import draws
    from bilevel.curse.strategies import fixed_tails

    # The last draw is that of momentum, where the family has it.
    *_, draw = draws((family,), (20,), 30, 1, 600)
    errors = fixed_tails(draw, 30)
    assert errors.shape == (30,)
    for n in (0, 3, 29):
        estimate = bl.hypergradient(
            draw.problem, draw.solver, bl.AdaptiveUnroll(budget=120, tail=30 - n), draw.hparams, draw.start
        )
        assert estimate.cost.gradient_equivalents <= 123
        assert float(draw.error(estimate.hypergradient)) == pytest.approx(float(errors[n]), rel=1e-9, abs=1e-13)


def test_every_draw_and_every_table_is_written(equal_budget, tmp_path: Path) -> None:
    files = curse.write_outcome("equal", equal_budget, tmp_path, {})
    assert {file.name for file in files} >= {"equal.csv", "equal.draws.csv", "equal.json", "claims.md"}
    with (tmp_path / "equal.draws.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == equal_budget.numbers["draws"] == 4 + 16
    assert all(float(row['balance="auto": cost']) <= 243 for row in rows)
    text = (tmp_path / "claims.md").read_text()
    assert "| problem | draws | min | median | p90 | max |" in text
    assert "| M, h = 1/L, 140 | 1 |" in text


def test_outcomes_are_written_as_figure_numbers_and_claims(truncation, tmp_path: Path) -> None:
    files = curse.write_outcome("m", truncation, tmp_path, {"experiment": "Truncation"})
    with (tmp_path / "m.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert {row["label"] for row in rows} >= {"$k_0$ = 0", "$k_0$ = 80"}
    assert json.loads((tmp_path / "m.json").read_text())["numbers"] == dict(truncation.numbers)
    text = (tmp_path / "claims.md").read_text()
    assert all(claim.claim in text for claim in truncation.claims)
    if find_spec("matplotlib"):
        assert files[0].read_bytes().startswith(b"\x89PNG")
    assert not list(tmp_path.glob(".*"))


def test_a_missing_data_set_is_skipped_with_a_sentence(monkeypatch) -> None:
    monkeypatch.setattr("bilevel.curse.problems.find_spec", lambda name: None)
    with pytest.raises(DataMissingError, match="bodyfat is skipped: it comes with the PyPI package `faraway`"):
        load("bodyfat")
    outcome = Methods(data=("bodyfat",), steps=150).run()
    assert outcome.rows == []
    assert "faraway" in outcome.notes[0]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Methods(data=("mnist",)), r"`Methods\.data` must be a list of some of 'breast_cancer'"),
        (lambda: Methods(methods=("Adam",)), r"`Methods\.methods` must be a list of some of 'GD 1/L'"),
        (lambda: Methods(theta=-1.0), r"`Methods\.theta` must be a positive number, got -1"),
        (lambda: Methods(at=0), r"`Methods\.at` must be an int in 1\.\.steps"),
        (lambda: Truncation(indices=(100,)), r"`Truncation\.indices` must be ints in 0\.\.99"),
        (lambda: Truncation(omega=0), r"`Truncation\.omega` must be a positive int, got 0"),
        (lambda: WorstCase(kappas=(2.0,)), r"`WorstCase\.kappas` must be numbers in \(0, 1\)"),
        (lambda: EqualBudget(families=("svm",)), r"`EqualBudget\.families` must be a list of some of 'M', 'ridge'"),
        (lambda: EqualBudget(steps=10), r"`EqualBudget\.steps` must be an int of at least 20, got 10"),
        (lambda: EqualBudget(columns=(201,)), r"`EqualBudget\.columns` must be ints in 1\.\.200"),
        (lambda: WarmStarts(dropped=(40,)), r"`WarmStarts\.dropped` must be ints in 0\.\.39"),
    ],
)
def test_options_are_checked_in_one_sentence(make, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.skipif(NO_COMMAND, reason="the command line is not there")
@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_config_makes_an_experiment(path: Path) -> None:
    from bilevel.config.curse import load_experiment

    name, plan = load_experiment(path)
    assert name == path.stem
    assert callable(plan.run)


@pytest.mark.skipif(NO_COMMAND, reason="the command line is not there")
@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("experiment: Method", r"c\.yaml: `experiment` must be one of .*did you mean `Methods`\?"),
        ("experiment: Methods\nstpes: 3", r"`stpes` is not an option of Methods .*did you mean `steps`\?"),
        ("experiment: Methods\nsteps: '3'", r"`steps` must be an int, got '3'"),
        ("experiment: Methods\ntheta: -1", r"`theta` must be a positive number, got -1"),
        ("experiment: Methods\nmodel: rigde", r"`model` must be 'ridge' or .*, got 'rigde': did you mean `ridge`\?"),
        ("experiment: Methods\nmethods: [Sobolve]", r"`methods` must be .*, got .*: did you mean `Sobolev`\?"),
        ("experiment: Methods\nname: a/b", r"`name` must be a string of letters"),
        ("experiment: {class: Methods}", r"`experiment` must be one of .*, got \{'class': 'Methods'\}"),
        ("experiment: [1]", r"`experiment` must be one of"),
        ("experiment: Methods\ndata: nope", r"`data` must be a list of values, each a string, got 'nope'"),
        ("steps: 3", r"`experiment` must be one of .*, got null"),
    ],
)
def test_mistakes_in_a_config_are_one_sentence(text: str, message: str, tmp_path: Path) -> None:
    from bilevel.config.curse import load_experiment
    from bilevel.config.document import ConfigError

    (tmp_path / "c.yaml").write_text(text)
    with pytest.raises(ConfigError, match=message):
        load_experiment(tmp_path / "c.yaml")


@pytest.mark.skipif(NO_COMMAND, reason="the command line is not there")
def test_the_command_runs_configs_into_one_folder(tmp_path: Path, capsys) -> None:
    from bilevel.cli.curse import run_curse

    (tmp_path / "a.yaml").write_text("experiment: Truncation\ncolumns: [20]\ndraws: 2\nsteps: 20\nindices: [0, 5]")
    out = tmp_path / "out"
    assert run_curse(Namespace(configs=[tmp_path / "a.yaml"], set=["draws=3"], out=str(out), threads=None)) == 0
    assert {"a.csv", "a.json", "claims.md"} <= {path.name for path in out.iterdir()}
    assert {"threads", "workers", "versions"} <= set(json.loads((out / "environment.json").read_text()))
    assert json.loads((out / "a.json").read_text())["plan"]["draws"] == 3
    assert "claims hold" in capsys.readouterr().out


@pytest.mark.parametrize("kind", [curse.Truncation, curse.Contraction, curse.WarmStarts])
def test_a_seed_beyond_what_generators_take_is_one_sentence(kind: Any) -> None:
    with pytest.raises(ValueError, match=rf"^`{kind.__name__}\.seed` must be an int in 0\.\.999999, got 1000000\.$"):
        kind(seed=1_000_000)
