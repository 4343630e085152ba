"""Every mistake in a config is one sentence with the file, the path in it, what is allowed and what was given."""

from __future__ import annotations

import hashlib
import re
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from paths import CONFIGS

from bilevel import (
    CG,
    SGD,
    Auto,
    BalancedImplicit,
    GradientDescent,
    HyperNewton,
    Implicit,
    QuasiNewton,
    ToleranceSchedule,
    TruncatedUnroll,
    WarmStart,
)
from bilevel.compare import RunFolderError
from bilevel.config import ConfigError, DataSetup, load_plan
from bilevel.config.document import parse_yaml
from bilevel.config.folds import load_folds
from bilevel.problems import RidgeProblem

BASE = """\
name: tiny
problems:
  iris: {class: SoftmaxProblem, data: iris, start: -2.0}
  ridge: {class: RidgeProblem, data: {name: synthetic_regression, rows: 40, features: 4}}
solver: {class: GradientDescent, steps: 20}
estimators:
  short tail: {class: TruncatedUnroll, tail: 5}
  implicit: {class: Implicit, linear_solver: {class: CG, tol: 1e-6}}
outer: {optimizer: Adam, lr: 0.1, steps: 2}
seeds: [0, 1]
"""


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "tiny.yaml"
    path.write_text(BASE)
    return path


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_shipped_configs_load_and_are_short(path: Path) -> None:
    plan = load_folds(path) or load_plan(path)
    assert plan.name == path.stem
    assert len(path.read_text().splitlines()) < 25
    assert path.read_text().startswith("#")


def test_the_documented_configs_are_shipped() -> None:
    names = {path.stem for path in CONFIGS.glob("*.yaml")}
    assert names >= {"quickstart", "ridge_diabetes", "logistic_breast_cancer", "softmax_digits"}
    assert names >= {"cleaning_digits", "mlp_weight_decay"}


def test_plan_holds_the_typed_objects(config: Path) -> None:
    plan = load_plan(config, ["outer.warm_start={adjoint: false}", "outer.patience=3"])
    assert plan.solver == GradientDescent(steps=20)
    # 1e-6 without a decimal point is a number here.
    assert plan.estimators == {"short tail": TruncatedUnroll(tail=5), "implicit": Implicit(CG(tol=1e-6))}
    assert plan.outer.warm_start == WarmStart(state=True, adjoint=False)
    assert plan.outer.patience == 3
    setup = plan.problems["ridge"](0)
    assert setup.problem.train.X.shape[0] == 4


def test_options_that_are_classes_of_their_own_now_still_load(config: Path) -> None:
    old = "estimators.implicit={class: Implicit, balance: auto, budget: 60}"
    with pytest.warns(DeprecationWarning, match=r"is now BalancedImplicit\(budget=60\.0\)\."):
        plan = load_plan(config, [old])
    assert plan.estimators["implicit"].successor == BalancedImplicit(60)
    with pytest.warns(DeprecationWarning, match=r"TruncatedUnroll with these options is now AdaptiveUnroll\(\)\."):
        load_plan(config, ["estimators.short tail.tail=auto"])
    new = load_plan(config, ["estimators.implicit={class: BalancedImplicit, budget: 60}"])
    assert new.estimators["implicit"] == BalancedImplicit(60)


def test_torchs_optimizers_are_inner_solvers_of_a_config(config: Path) -> None:
    plan = load_plan(config, ["solver={class: SGD, step_size: 0.1, momentum: 0.9, nesterov: true, steps: 20}"])
    assert plan.solver == SGD(step_size=0.1, momentum=0.9, nesterov=True, steps=20)
    assert load_plan(config, ["solver={class: Adam, betas: [0.9, 0.99], steps: 20}"]).solver.betas == (0.9, 0.99)


def test_overrides_reach_names_with_spaces_and_list_indices(config: Path) -> None:
    plan = load_plan(config, ["estimators.short tail.tail=0.5", "seeds.1=7", "budget=100", "solver.tol=1e-3"])
    assert plan.estimators["short tail"] == TruncatedUnroll(tail=0.5)
    assert plan.seeds == (0, 7)
    assert plan.budget == 100
    assert plan.solver == GradientDescent(steps=20, tol=1e-3)


def test_seed_shifts_the_seeds(config: Path) -> None:
    assert load_plan(config, seed=5).seeds == (5, 6)


def test_tune_keeps_one_estimator_and_one_seed(config: Path) -> None:
    plan = load_plan(config, tune=True)
    assert list(plan.estimators) == ["short tail"]
    assert plan.seeds == (0,)
    assert list(load_plan(config, only="implicit", tune=True).estimators) == ["implicit"]


def test_outer_searches_are_named_in_a_config_and_are_the_default_of_tuning(config: Path) -> None:
    alone = "estimators={implicit: {class: Implicit}}"
    named = load_plan(config, ["outer={optimizer: HyperNewton, tol: 1.0e-5, start: given, steps: 7}", alone])
    assert named.outer.optimizer == HyperNewton(tol=1e-5, start="given")
    assert (named.outer.tol, named.outer.steps) == (None, 7)
    text = config.read_text().replace("outer: {optimizer: Adam, lr: 0.1, steps: 2}", "outer: {steps: 9}")
    config.write_text(text)
    assert load_plan(config, tune=True).outer.optimizer == "auto"
    assert load_plan(config).outer.optimizer != "auto"
    with pytest.raises(ConfigError, match=r"`outer.tol`: `HyperNewton.tol` must be|`outer.limits`: .*two numbers"):
        load_plan(config, ["outer={optimizer: HyperNewton, limits: [3.0, 1.0]}", alone])
    with pytest.raises(ConfigError, match="`outer`: HyperNewton compares outer losses, but those of TruncatedUnroll"):
        load_plan(config, ["outer={optimizer: HyperNewton}"])


SEARCHES = {
    "{optimizer: HyperNewton, limits: [-28, -20]}": "`outer`: hyperparameter 0 starts at -2, outside its limits ",
    "{optimizer: HyperLBFGS, scheduler: {class: StepLR, step_size: 2}}": "leave out `scheduler`.",
}


@pytest.mark.parametrize("outer", SEARCHES)
def test_what_a_search_does_not_take_is_one_sentence(config: Path, outer: str) -> None:
    alone = ["estimators={implicit: {class: Implicit}}", "solver={class: Newton}"]
    with pytest.raises(ConfigError, match=re.escape(SEARCHES[outer])) as caught:
        load_plan(config, [*alone, f"outer={outer}"])
    assert "\n" not in str(caught.value)


def test_a_scan_of_what_is_no_log_penalty_and_a_schedule_are_one_sentence(config: Path) -> None:
    alone = ["estimators={implicit: {class: Implicit}}", "solver={class: Newton}"]
    weights = "problems={iris: {class: SampleWeightProblem, data: iris, penalty: 0.1}}"
    with pytest.raises(
        ConfigError, match="'scan' is for log penalties, which these hyperparameters are not: use start"
    ):
        load_plan(config, [*alone, weights, "outer={optimizer: HyperNewton, start: scan}"])
    with (
        pytest.warns(DeprecationWarning, match="choose their own accuracies"),
        pytest.raises(
            ConfigError, match="`outer`: HyperNewton chooses its own steps and accuracies: leave out `schedule`"
        ),
    ):
        load_plan(config, [*alone, "outer={optimizer: HyperNewton, schedule: cubic}"])


def test_tuning_is_a_plan_beside_that_of_the_comparison(config: Path) -> None:
    tuning = "tuning={solver: {class: QuasiNewton}, estimator: auto, outer: {optimizer: auto, steps: 9}}"
    plan = load_plan(config, [tuning])
    assert plan.tuning is not None
    assert (plan.tuning.solver, plan.tuning.estimators) == (QuasiNewton(), {"tuning": Auto()})
    assert (plan.tuning.outer.optimizer, plan.tuning.outer.steps, plan.tuning.seeds) == ("auto", 9, (0,))
    assert plan.config["tuning"]["solver"] == {"class": "QuasiNewton"}
    assert load_plan(config, [tuning], tune=True).tuning is None
    # A config without it is the same as before there was one.
    assert "tuning" not in load_plan(config).config


def test_written_config_is_the_same_plan(config: Path, tmp_path: Path) -> None:
    plan = load_plan(config, ["outer.certify=true"])
    copy = tmp_path / "copy.yaml"
    copy.write_text(yaml.safe_dump(plan.config, sort_keys=False))
    assert load_plan(copy).config == plan.config


def test_targets_schedules_and_the_word_auto_reach_the_plan(config: Path) -> None:
    auto = ["estimators={best: auto}", "solver={class: GradientDescent}"]
    with pytest.warns(DeprecationWarning, match="choose their own accuracies") as caught:
        plan = load_plan(config, [*auto, "outer={steps: 2, target_error: 1e-3, schedule: cubic}"])
    with pytest.warns(DeprecationWarning, match="choose their own accuracies"):
        outer = plan.outer.start(plan.problems["iris"](0), plan.solver, plan.estimators["best"])
    # Python shows what is deprecated where the line that called is of the main module, as that of a command is.
    assert {each.filename for each in caught} == {__file__}
    assert plan.estimators == {"best": Auto()}
    assert (plan.outer.target_error, plan.outer.schedule) == (1e-3, "cubic")
    assert outer.schedule == ToleranceSchedule("cubic", least=1e-3)
    with pytest.warns(DeprecationWarning, match="choose their own accuracies"):
        plan = load_plan(config, [*auto, "outer={schedule: {decrease: exponential, first: 0.5, rate: 0.95}}"])
    assert plan.outer.schedule == ToleranceSchedule("exponential", first=0.5, rate=0.95)
    plan = load_plan(config, ["estimators={best: {class: Auto, unroll: true, memory_limit: 1e6}}"])
    assert plan.estimators == {"best": Auto(unroll=True, memory_limit=1e6)}


SENTENCES = {
    "solver.stesp=5": (
        "`solver.stesp` is not an option of GradientDescent (step_size, steps, tol): did you mean `steps`?"
    ),
    "solver.class=CG": (
        "`solver.class` must be an inner solver (Adam, AdamW, AsymptoticSobolev, Chebyshev, CoordinateDescent, "
        "FISTA, FixedPoint, GradientDescent, HeavyBall, Nesterov, Newton, PreconditionedGradientDescent, "
        "ProximalGradient, QuasiNewton, RMSprop, SGD, Sobolev, TorchOptimizer), got 'CG', "
        "which is a linear solver."
    ),
    "solver={class: SGD, step_size: fast}": "`solver.step_size` must be a number, got 'fast'.",
    "solver={class: Adam, betas: [0.9]}": "`solver.betas` must be a list of 2 values, each a number, got [0.9].",
    "solver={class: RMSprop, alpha: 2, steps: 9}": "`solver.alpha`: `RMSprop.alpha` must be a number in [0, 1)",
    "solver={class: TorchOptimizer, steps: 3}": (
        "`solver.class` is TorchOptimizer, whose `optimizer` is a Python function, which a config cannot hold"
    ),
    "solver={class: AdamW, steps: 20}": (
        "`estimators.implicit`: Implicit(linear_solver=CG(tol=1e-06)) rests on the inner solution, but "
        "`AdamW.weight_decay` leads the steps away from the minimiser of the inner loss"
    ),
    "solver.class=GradientDecent": "got 'GradientDecent': did you mean `GradientDescent`?",
    "solver.steps=-3": "`solver.steps`: `GradientDescent.steps` must be a positive int or None, got -3.",
    "solver.steps=abc": "`solver.steps` must be an int or null, got 'abc'.",
    "solver.step_size=[1]": "`solver.step_size` must be a number or a string, got [1].",
    "solver={class: FixedPoint, steps: 3}": (
        "`solver.class` is FixedPoint, whose `update` is a Python function, which a config cannot hold"
    ),
    "solver=3": "`solver` must be of the form {class: Name, option: value, ...}, got 3.",
    "solver={steps: 3}": "`solver` must be an inner solver, such as {class: Adam}, got {'steps': 3}.",
    "estimators.implicit.linear_solver.tol=small": (
        "`estimators.implicit.linear_solver.tol` must be a number or null, got 'small'."
    ),
    "estimators.implicit.linear_solver.tol=-1": (
        "`estimators.implicit.linear_solver.tol`: `CG.tol` must be a positive number or None, got -1.0."
    ),
    "estimators.implicit.linear_solver.tool=1": (
        "`estimators.implicit.linear_solver.tool` is not an option of CG (tol, max_steps, check_every, steps): "
        "did you mean `tol`?"
    ),
    "estimators.implicit.linear_solver=Adam": "got 'Adam', which is an inner solver.",
    "estimators.short tail.tail=21": (
        "`estimators.short tail.tail`: `TruncatedUnroll.tail` is 21, but the inner solver takes 20 steps"
    ),
    "estimators.short tail.tail=true": "`estimators.short tail.tail` must be a number or a string, got true.",
    "estimators.short tail={class: TruncatedUnroll}": "`estimators.short tail` lacks `tail`, which Truncated",
    "estimators={}": (
        "`estimators` must hold at least one `name: {class: Name, ...}`, or be left out to tune by folds, got {}."
    ),
    "outer.stesp=5": "`outer.stesp` is neither a key of `outer`",
    "outer.lr=fast": "`outer.lr` must be a number, got 'fast'.",
    "outer.lr=-1": "`outer.lr` must not be negative, got -1.0.",
    "outer.optimizer=Adma": "`outer.optimizer` must be a torch optimizer or an outer search (auto, ",
    "outer.optimizer=hypernewton": "got 'hypernewton': did you mean `HyperNewton`?",
    "outer.tol=-1": "`outer.tol` must be greater than 0, got -1.",
    "outer={optimizer: auto, lr: 0.1}": "nor an option of auto, which has none: name an optimizer.",
    "outer={optimizer: HyperNewton, lr: 0.1}": "nor an option of HyperNewton (tol, start, limits, radius).",
    "outer={optimizer: HyperNewton, start: here}": "`outer.start`: `HyperNewton.start` must be 'scan', 'given' or None",
    "outer={optimizer: HyperLBFGS, memory: 0}": "`outer.memory`: `HyperLBFGS.memory` must be a positive int, got 0.",
    "estimators.implicit=Implcit": "must be a hypergradient estimator (auto, Adaptive",
    "tuning=3": "`tuning` must be a mapping (`key: value` lines), got 3.",
    "tuning={solver: Newton}": "`tuning` lacks the key `estimator`.",
    "tuning={solver: Newton, estimator: auto, outer: {}, seeds: [1]}": "`tuning.seeds` is not a key of `tuning` (",
    "tuning={solver: Newtn, estimator: auto, outer: {}}": "in `tuning`: `solver.class` must be an inner solver",
    "tuning={solver: {class: GradientDescent, steps: 5}, estimator: FullUnroll, outer: {optimizer: HyperNewton}}": (
        "in `tuning`: `outer`: HyperNewton compares outer losses, but those of FullUnroll"
    ),
    "outer.optimizer=LBFGS": "got 'LBFGS': did you mean `HyperLBFGS`?",
    "outer.steps=0": "`outer.steps` must be at least 1, got 0.",
    "outer.betas=[0.9]": "`outer.betas` must be a list of 2 values, each a number, got [0.9].",
    "outer.warm_start=maybe": "`outer.warm_start` must be true, false or {state: true or false,",
    "outer.warm_start={adjiont: false}": (
        "`outer.warm_start.adjiont` is not a key of `outer.warm_start` (state, adjoint): did you mean `adjoint`?"
    ),
    "estimators.implicit={class: Implicit, linear_solver: GC}": "got 'GC': did you mean `CG`?",
    "device=gpu": "the device must be auto, cpu or cuda, got 'gpu': did you mean `cuda`?",
    "outer.constraints=positve": "got 'positve': did you mean `positive`?",
    "outer.constraints=positive": "`outer`: `hparams` does not satisfy its constraint",
    "outer.scheduler=StepLR": "`outer.scheduler` lacks `step_size`, which StepLR needs: an int.",
    "problems.iris.data=irsi": "or .svmlight: did you mean `iris`?",
    "problems.iris.data=diabetes": "`problems.iris`: 'diabetes' has too few rows (442, "
    "split 222/110/110 into train/val/test): each part needs a row of every class, 214 in all (or is",
    "problems.iris.data=nofile.csv": "`problems.iris`: the data file 'nofile.csv' does not exist.",
    "problems.iris.data={name: iris, validaton: 0.3}": (
        "`problems.iris.data.validaton` is not an option of a data set (name, validation, test, standardize, target, "
        "drop, strings, missing, index, rare, separator, decimal, encoding, split, groups, weights, corrupted, rows, "
        "features, noise): did you mean `validation`?"
    ),
    "problems.iris.data={name: iris, seed: 3}": "`problems.iris.data.seed` is not given here, but by",
    "problems.iris.data={name: iris, validation: 0.9}": "`problems.iris`: `validation` + `test` must be below 1",
    "problems.iris.data=3": "`problems.iris.data` must be a data set (breast_cancer, diabetes,",
    "problems.iris.class=LogisticProblem": (
        "`problems.iris`: y_train holds 3 classes: LogisticProblem takes two, SoftmaxProblem any number."
    ),
    "problems.iris.start=x": "`problems.iris.start` must be a number, got 'x'.",
    "problems.iris.penalti=scalar": (
        "`problems.iris.penalti` is not an option of SoftmaxProblem (data, start, penalty, loss, parametrization): "
        "did you mean `penalty`?"
    ),
    "problems.ridge.penalty=per_class": (
        "`problems.ridge.penalty`: `RidgeProblem.penalty` must be one of 'scalar', 'per_feature', got 'per_class'."
    ),
    "problems.ridge.penalty=per_featur": "'scalar', 'per_feature', got 'per_featur': did you mean `per_feature`?",
    "problems.iris.loss=men": "`SoftmaxProblem.loss` must be 'mean' or 'sum', got 'men': did you mean `mean`?",
    "problems.iris.data={name: iris, rare: refus}": "'leave_out' or 'refuse', got 'refus': did you mean `refuse`?",
    "problems.iris.data={name: iris, split: tme}": "got 'tme': did you mean `time`?",
    "solver.step_size=aut": "or 'auto', got 'aut': did you mean `auto`?",
    "batch=aut": "got 'aut': did you mean `auto`?",
    "device=cud": "the device must be auto, cpu or cuda, got 'cud': did you mean `cuda`?",
    "outer={schedule: quadratc}": "got 'quadratc': did you mean `quadratic`?",
    "outer={optimizer: HyperNewton, start: gven}": "got 'gven': did you mean `given`?",
    "problems.ridge.class=QuadraticProblem": "`problems.ridge.class` is QuadraticProblem, which is not made",
    "problems.ridge.class=LinearModelProblem": "`problems.ridge.class` must be a problem (ElasticNetProblem, ",
    "seeds=[0, 0]": "`seeds` must not repeat a seed, got [0, 0].",
    "seeds=[-1]": "`seeds.0` must be at least 0, got -1.",
    "seeds=3": "`seeds` must be a list, got 3.",
    "seeds=[]": "`seeds` must be a list of at least one value, got [].",
    "seeds=[a]": "`seeds.0` must be an int, got 'a'.",
    "outer.steps=2.5": "`outer.steps` must be an int, got 2.5.",
    "outer={steps: 3, certify: 1}": "`outer.certify` must be true or false, got 1.",
    "outer={target_error: 0}": "`outer.target_error` must be greater than 0, got 0.",
    "outer={target_error: 1}": "`outer.target_error` must be less than 1, got 1.",
    "outer={target_error: 0.1}": "`outer`: a tail of 5 steps leaves an error that no tolerance takes away, so that it",
    "outer={schedule: linear}": "`outer`: `schedule` must be 'quadratic', 'cubic', 'exponential' or a",
    "outer={schedule: {decrease: slow}}": "`outer.schedule.decrease`: `ToleranceSchedule.decrease` must be 'quadratic'",
    "outer={schedule: {start: 1}}": "`outer.schedule.start` is not an option of ToleranceSchedule (decrease, first,",
    "outer={steps: 3, tol: x}": "`outer.tol` must be a number, got 'x'.",
    "outer=3": "`outer` must be a mapping (`key: value` lines), got 3.",
    "device=3": "`device` must be a string, got 3.",
    "budget=-1": "`budget` must be greater than 0, got -1.",
    "name=a/b": "`name` must be a string of letters, digits and . _ -, as it names a folder, got 'a/b'.",
    "device=tpu": "the device must be auto, cpu or cuda, got 'tpu': did you mean `cpu`?",
    "sovler=5": "`sovler` is not a key of the config (name, problems, solver,",
    "sovler.steps=5": "--set sovler: the config has no key 'sovler'",
    "estimators.implict.damping=1": "`estimators` has no key 'implict' (short tail, implicit): did",
    "problems.iris.data.test=0.1": "`problems.iris.data` is 'iris', which has no parts: give the whole value",
    "seeds.7=3": "--set seeds.7: `seeds` is a list with the indices 0 to 1, got '7'.",
    "nonsense": "--set must look like `a.b=value`, got 'nonsense'.",
    "solver.steps=[1": "--set solver.steps: the value '[1' is not valid YAML",
}


@pytest.mark.parametrize("assignment", SENTENCES)
def test_a_mistake_is_one_sentence(config: Path, assignment: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_plan(config, [assignment])
    text = str(caught.value)
    assert text.startswith(f"{config}: ")
    assert SENTENCES[assignment] in text
    assert "\n" not in text
    assert text.endswith((".", "?"))


LAUGHS = "&a [1, 1, 1, 1, 1, 1, 1, 1, 1, 1]"
for letter in "bcdefgh":
    LAUGHS = f"&{letter} [{LAUGHS}" + f", *{chr(ord(letter) - 1)}" * 9 + "]"
MERGES = "a: &a {k: 1}\n" + "".join(
    f"{letter}: &{letter} {{<<: [{', '.join([f'*{chr(ord(letter) - 1)}'] * 9)}]}}\n" for letter in "bcdefgh"
)
TEXTS = {
    "seeds: 2020-13-45": "`seeds` must be a list, got '2020-13-45'.",
    "budget: 0b_": "the value '0b_' cannot be read as int.",
    "budget: !!int x": "the value 'x' cannot be read as int.",
    "budget: !!bool x": "the value 'x' cannot be read as bool.",
    "budget: !!float [1]": "'tag:yaml.org,2002:float' is no tag of a plain value.",
    "budget: !!timestamp 2020-01-01": "'tag:yaml.org,2002:timestamp' is no tag of a plain value.",
    "budget: !!binary aGFsbG8=": "'tag:yaml.org,2002:binary' is no tag of a plain value.",
    "budget: !!python/object/apply:os.getcwd []": "is no tag of a plain value.",
    "budget: !!set {a, b}": "'tag:yaml.org,2002:set' is no tag of a plain value.",
    f"budget: {'1' * 5000}": "cannot be read as int.",
    f"budget: 0x{'f' * 5000}": "a whole number has more than 64 bits.",
    "budget: .nan": "the value '.nan' is not finite.",
    "budget: 1e999": "the value '1e999' is not finite.",
    "seeds: " + "[" * 1200: "values are nested more than 40 deep.",
    "budget:" + "".join("\n" + " " * level + "-" for level in range(1, 100)): "values are nested more than 40 deep.",
    "seeds: &a [*a]": "there are more than 50,000 values, those that aliases repeat included.",
    f"budget: {LAUGHS}": "there are more than 50,000 values, those that aliases repeat included.",
    MERGES: "there are more than 50,000 values, those that aliases repeat included.",
    "3: 1": "the key 3 is no string of at most 100 printable characters.",
    "? [1, 2]\n: 3": "the key [1, 2] is no string of at most 100 printable characters.",
    f"? {'k' * 5000}\n: 3": "is no string of at most 100 printable characters.",
    'name: "a\\0b"': "the text 'a\\x00b' holds what is no character.",
    'name: "\\ud800"': "the text '\\ud800' holds what is no character.",
    'name: "\\U00110000"': "is not valid YAML",
    "name: a\0b": "unacceptable character #x0000",
    "# " + "x" * 3_000_000: "it is longer than 100,000 bytes.",
    "name: a\tb\n\tc: 1": "is not valid YAML",
    "<<: 3": "is not valid YAML",
    "budget: *nobody": "found undefined alias 'nobody'.",
}


@pytest.mark.parametrize("text", TEXTS, ids=lambda text: text[:20])
def test_a_value_that_is_no_plain_one_is_one_short_sentence(config: Path, text: str) -> None:
    key = text.partition(":")[0].strip()
    lines = [line for line in config.read_text().splitlines() if not line.startswith(f"{key}:")]
    config.write_text("\n".join([*lines, text]))
    start = time.process_time()
    with pytest.raises(ConfigError) as caught:
        load_plan(config)
    assert time.process_time() - start < 2
    sentence = str(caught.value).removeprefix(str(config))
    assert TEXTS[text] in sentence
    assert len(sentence) < 260
    assert "\n" not in sentence


@pytest.mark.parametrize("encoding", ["utf-16", "utf-32", "latin-1"])
def test_a_file_in_another_encoding_is_one_sentence(config: Path, encoding: str) -> None:
    config.write_bytes((config.read_text() + "# ä\n").encode(encoding))
    with pytest.raises(ConfigError, match="the file cannot be read: it is not text in UTF-8"):
        load_plan(config)


def test_aliases_merges_and_a_byte_order_mark_are_fine(config: Path) -> None:
    text = config.read_text().replace("\nsolver: {", "\nsolver: &it {")
    config.write_bytes(text.encode("utf-8-sig"))
    plan = load_plan(config)
    assert parse_yaml("a: &a {x: 1}\nb: {<<: *a, y: 2}\nc: *a") == {"a": {"x": 1}, "b": {"x": 1, "y": 2}, "c": {"x": 1}}
    assert load_plan(config, ["solver.steps=7"]).solver == GradientDescent(steps=7)
    assert plan.solver == GradientDescent(steps=20)


FILES = {
    "": "the file is empty",
    "- 1\n": "the file must hold a mapping (`key: value` lines), got [1].",
    "a: [1\nb: 2\n": "is not valid YAML, line 2: ",
    "solver: 1\nsolver: 2\n": "line 2: the key 'solver' stands twice.",
    "solver: {class: Newton}\n": "the config lacks the key `problems`",
}


@pytest.mark.parametrize("text", FILES, ids=["empty", "list", "syntax", "twice", "missing"])
def test_a_broken_file_is_one_sentence(tmp_path: Path, text: str) -> None:
    path = tmp_path / "broken.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        load_plan(path)
    assert FILES[text] in str(caught.value)
    assert str(path) in str(caught.value)


def test_data_in_the_place_of_a_config_are_told_what_names_them(tmp_path: Path) -> None:
    example = r"`problems: \{NAME: \{data: \{name: prices.csv, target: COLUMN\}\}\}`; see docs/data.md"
    for load in (load_plan, load_folds):
        with pytest.raises(
            ConfigError, match=rf"prices.csv holds data, .*: write a .yaml file with the line {example}"
        ):
            load(tmp_path / "prices.csv")


def test_folds_beside_an_empty_list_of_estimators_are_no_mistake_yet(config: Path) -> None:
    with pytest.raises(ConfigError, match=r"`estimators` must hold at least one .*, or be left out to tune by folds"):
        load_plan(config, ["estimators={}", "folds=3"])


def test_a_missing_file_suggests_its_neighbour(config: Path) -> None:
    with pytest.raises(ConfigError, match=r"there is no such file: did you mean `.*tiny.yaml`\?"):
        load_plan(config.with_name("tinny.yaml"))


def test_an_unknown_estimator_to_tune_is_named(config: Path) -> None:
    with pytest.raises(ConfigError, match=r"there is no estimator 'implict' in `estimators` \(short tail, implicit\)"):
        load_plan(config, only="implict", tune=True)


OWN = """\
from dataclasses import dataclass

import bilevel as bl


@dataclass(frozen=True)
class Signed(bl.InnerSolver):
    rate: float = 0.1

    def step(self, inner, state):
        moved = bl.tree.tree_map(lambda x, g: x - self.rate * g.tanh(), state.params, inner.grad(state.params))
        return state.moved(moved)


class Halved(bl.problems.RidgeProblem):
    def initial_hparams(self, start=0.0):
        return super().initial_hparams(start / 2)
"""


def test_a_config_names_classes_of_the_users_own_only_where_that_is_allowed(
    config: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.path", [*sys.path])
    (config.parent / "own_classes.py").write_text(OWN + "print('run')\n")
    changes = ["solver={class: own_classes:Signed, rate: 0.2, steps: 20}", "problems.ridge.class=own_classes:Halved"]
    expected = (
        f"{config}: `problems.ridge.class` names code outside the package, 'own_classes:Halved': pass --allow-import "
        "if you trust this config and what it imports."
    )
    with pytest.raises(ConfigError) as error:
        load_plan(config, changes)
    assert str(error.value) == expected
    assert "own_classes" not in sys.modules
    plan = load_plan(config, changes, allow_import=True)
    assert (type(plan.solver).__name__, plan.solver.steps, plan.solver.rate) == ("Signed", 20, 0.2)  # type: ignore[attr-defined]
    assert type(plan.problems["ridge"](0).problem).__name__ == "Halved"
    # What is allowed once is not allowed ever after.
    with pytest.raises(ConfigError, match="--allow-import"):
        load_plan(config, changes)


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("no_such_module:Signed", "'no_such_module' cannot be imported (ModuleNotFoundError: No module named"),
        ("json:Signed", "'json' has no class 'Signed' that is an inner solver."),
        ("json:JSONDecoder", "'json' has no class 'JSONDecoder' that is an inner solver."),
        (":Signed", "'' cannot be imported (ValueError: Empty module name)."),
    ],
)
def test_what_cannot_be_imported_is_one_sentence(config: Path, name: str, sentence: str) -> None:
    with pytest.raises(ConfigError) as error:
        load_plan(config, [f"solver.class='{name}'"], allow_import=True)
    assert f"{config}: `solver.class`: {sentence}" in str(error.value)


# The problem class decides the task ---------------------------------------------------------------------------------


TASKS = """
from bilevel.problems import LogisticProblem, RidgeProblem


class Counts(RidgeProblem):
    task = "raw"


class Levels(LogisticProblem):
    pass


class Odd(RidgeProblem):
    task = "ordinal"
"""


@pytest.mark.parametrize(
    ("name", "target", "found"),
    [
        ("RidgeProblem", "y", set()),
        ("own_tasks:Counts", "y", {1, 2, 3, 4, 5, 24}),
        ("own_tasks:Levels", "word", {-1, 1}),
        ("LogisticProblem", "half", {-1, 1}),
    ],
)
def test_the_problem_class_decides_what_the_target_is(
    tmp_path: Path, name: str, target: str, found: set[float]
) -> None:
    (tmp_path / "own_tasks.py").write_text(TASKS)
    lines = [f"{row},{'nay' if row % 2 else 'yea'},{row % 2}.0,{(1, 2, 3, 4, 5, 24)[row % 6]}" for row in range(240)]
    columns = {"x": 0, "word": 1, "half": 2, "y": 3}
    kept = [0, columns[target]]
    table = "\n".join(",".join(line.split(",")[i] for i in kept) for line in [",".join(columns), *lines])
    (tmp_path / "d.csv").write_text(table)
    spec = {"class": name, "data": {"name": str(tmp_path / "d.csv")}}
    (tmp_path / "c.yaml").write_text(
        yaml.safe_dump({"problems": {"p": spec}, "solver": "QuasiNewton", "estimators": {"implicit": "Implicit"}})
    )
    plan = load_plan(tmp_path / "c.yaml", allow_import=True)
    y = plan.problems["p"](0).problem.train.y
    if name == "RidgeProblem":
        assert abs(float(y.mean())) < 1e-12
        assert len(y.unique()) == 6
        assert float(y.max() - y.min()) == 23
    else:
        assert set(y.tolist()) == found


def test_a_task_that_is_none_is_named(tmp_path: Path) -> None:
    (tmp_path / "odd_tasks.py").write_text(TASKS)
    spec = {"problems": {"p": {"class": "odd_tasks:Odd", "data": "diabetes"}}, "solver": "Newton"}
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(spec | {"estimators": {"implicit": "Implicit"}}))
    with pytest.raises(
        ConfigError, match="`task` must be 'regression', 'classification', 'raw' or None, got 'ordinal'"
    ):
        load_plan(tmp_path / "c.yaml", allow_import=True)
    with pytest.raises(ConfigError, match=r"but by the problem class \(Odd.task is 'ordinal'\), got 'raw'"):
        load_plan(tmp_path / "c.yaml", ["problems.p.data={name: diabetes, task: raw}"], allow_import=True)


FAULTY = """\
from helper_of_own import number
import bilevel as bl

class Broken(bl.GradientDescent):
    def __post_init__(self):
        return {}["lost"]
"""


def test_an_exception_of_the_users_own_class_names_type_file_and_line(
    config: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.path", [*sys.path])
    (config.parent / "helper_of_own.py").write_text("number = 1\n")
    (config.parent / "faulty_classes.py").write_text(FAULTY)
    with pytest.raises(ConfigError) as error:
        load_plan(config, ["solver={class: faulty_classes:Broken, steps: 3}"], allow_import=True)
    assert str(error.value) == f"{config}: `solver`: KeyError: 'lost' (faulty_classes.py, line 6)."
    assert isinstance(error.value.__cause__, KeyError)


def test_a_plan_knows_its_data_and_the_sources_of_its_classes(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.path", [*sys.path])
    folder = config.parent
    (folder / "named_classes.py").write_text("import beside_them, json\nfrom inside.deep import x\n" + OWN)
    (folder / "beside_them.py").write_text("from inside import deep\n")
    (folder / "unrelated.py").write_text("")
    (folder / "inside").mkdir()
    (folder / "inside" / "__init__.py").write_text("")
    (folder / "inside" / "deep.py").write_text("x = 1\n")
    np.savez(folder / "d.npz", X=np.arange(24.0).reshape(12, 2), y=np.arange(12.0))
    monkeypatch.chdir(folder)
    changes = ["solver={class: named_classes:Signed, steps: 20}", "problems.ridge.data=d.npz"]

    def identity() -> Any:
        return load_plan(config, changes, allow_import=True).identity

    first = identity()
    assert set(first["classes"]) == {"named_classes.py", "beside_them.py", "inside/__init__.py", "inside/deep.py"}
    assert first["data"]["iris"] == "iris"
    digest = hashlib.sha256((folder / "d.npz").read_bytes()).hexdigest()
    assert first["data"]["ridge"] == digest
    (folder / "inside" / "deep.py").write_text("x = 2\n")
    np.savez(folder / "d.npz", X=np.arange(24.0).reshape(12, 2), y=3 * np.arange(12.0))
    second = identity()
    changed = [name for kind in ("classes", "data") for name in first[kind] if first[kind][name] != second[kind][name]]
    assert changed == ["inside/deep.py", "ridge"]
    # A file that changes while the command runs.
    build = load_plan(config, changes, allow_import=True).problems["ridge"]
    (folder / "d.npz").write_bytes(b"")
    with pytest.raises(RunFolderError, match=r"the data file d\.npz has changed since this command began"):
        build(0)


def test_a_problem_class_says_how_a_data_set_makes_it() -> None:
    class Halved(RidgeProblem):
        @classmethod
        def from_data(cls, dataset: Any, **options: Any) -> Any:
            return cls(dataset.X_train / 2, dataset.y_train, dataset.X_val / 2, dataset.y_val, **options)

    made = [DataSetup(kind, {"penalty": "scalar"}, {"name": "diabetes"}, 0.0)(0) for kind in (RidgeProblem, Halved)]
    assert torch.equal(made[1].problem.train.X * 2, made[0].problem.train.X)
    assert made[0].labels == made[1].labels
