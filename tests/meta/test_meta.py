"""Meta-learning: methods against plain autograd and dense algebra, tasks, evaluation, resume, bad input."""

import json
import runpy
import sys
import unicodedata

import numpy as np
import pytest
import torch
from paths import BENCH, CONFIGS
from torch import nn

import bilevel as bl
from bilevel.cli import main
from bilevel.core import tree
from bilevel.meta import GlyphTasks, MetaProblem, SineProblem, SineTasks, evaluate, glyphs, squared_norm
from bilevel.meta.tasks import mlp

mse = nn.functional.mse_loss
F64 = torch.float64
TASKS = SineTasks(shots=5, queries=7)


def network():
    """A network in float64 whose names are "1.*" (body) and "3.*" (head)."""
    return mlp(1, (6,), 1, seed=3).double()


def problem_of(module=None, batch_size=4, tasks=TASKS, **options):
    return MetaProblem(module or network(), mse, tasks, batch_size, **options)


def plain_loss(step_sizes, steps, adapted=("1", "3"), first_order=False):
    """MAML by hand: one task after the other, a graph through all steps. Returns the initial weights and the loss."""
    module, losses = network(), []
    start = {name: value.detach().requires_grad_() for name, value in module.named_parameters()}
    for (X, y), (X_query, y_query) in [TASKS(index) for index in range(4)]:
        weights = dict(start)
        names = [name for name in weights if name[0] in adapted]
        for _ in range(steps):
            value = mse(torch.func.functional_call(module, weights, (X,)), y)
            gradients = torch.autograd.grad(value, [weights[name] for name in names], create_graph=True)
            for name, gradient in zip(names, gradients, strict=True):
                weights[name] = weights[name] - step_sizes[name] * (gradient.detach() if first_order else gradient)
        losses.append(mse(torch.func.functional_call(module, weights, (X_query,)), y_query))
    return start, torch.stack(losses).mean()


def constant(value):
    """The same step size for every parameter."""
    return {name: value for name, _ in network().named_parameters()}


def assert_gradient(found, loss, roots):
    expected = torch.autograd.grad(loss, list(roots.values()), retain_graph=True)
    assert found.keys() == roots.keys()
    for name, value in zip(roots, expected, strict=True):
        torch.testing.assert_close(found[name], value, rtol=1e-12, atol=1e-12)


# Methods -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [1, 5])
@pytest.mark.parametrize("memory", ["iterates", "graph", "checkpoint"])
def test_mamls_meta_gradient_is_that_of_plain_autograd(steps, memory):
    problem, solver = problem_of(), bl.GradientDescent(step_size=0.03, steps=steps)
    estimate = bl.hypergradient(problem, solver, bl.FullUnroll(memory=memory), problem.initial_hparams())
    start, loss = plain_loss(constant(0.03), steps)
    assert estimate.outer_loss == pytest.approx(loss.item(), rel=1e-13)
    assert_gradient(estimate.hypergradient["init"], loss, start)


@pytest.mark.parametrize("steps", [1, 5])
def test_first_order_mamls_meta_gradient_is_that_of_plain_autograd(steps):
    problem, solver = problem_of(), bl.GradientDescent(step_size=0.03, steps=steps)
    estimate = bl.hypergradient(problem, solver, bl.FirstOrder(), problem.initial_hparams())
    start, loss = plain_loss(constant(0.03), steps, first_order=True)
    assert_gradient(estimate.hypergradient["init"], loss, start)


def test_imamls_meta_gradient_is_that_of_dense_linear_algebra():
    problem, c = problem_of(nn.Linear(1, 1).double(), proximity=0.7), 0.7
    hparams = problem.initial_hparams()
    w = np.array([hparams["init"]["weight"].item(), hparams["init"]["bias"].item()])
    expected = np.zeros(2)
    for index in range(4):
        support, query = [[np.column_stack([X, np.ones(len(X))]), y.numpy()[:, 0]] for X, y in TASKS(index)]
        hessian = 2 / 5 * support[0].T @ support[0]
        inverse = np.linalg.inv(hessian + c * np.eye(2))
        offset = -inverse @ (2 / 5 * support[0].T @ (support[0] @ w - support[1]))
        outer = 2 / 7 * query[0].T @ (query[0] @ (w + offset) - query[1])
        expected += (np.eye(2) - hessian @ inverse) @ outer / 4
    estimate = bl.hypergradient(problem, bl.GradientDescent(tol=1e-11), bl.Implicit(bl.CG()), hparams)
    found = [estimate.hypergradient["init"][name].item() for name in ("weight", "bias")]
    np.testing.assert_allclose(found, expected, rtol=1e-8)


def test_partial_adaptation_leaves_the_body_alone_and_has_the_meta_gradient_of_plain_autograd():
    problem, solver = problem_of(adapt=["3.*"]), bl.GradientDescent(step_size=0.03, steps=3)
    hparams = problem.initial_hparams()
    estimate = bl.hypergradient(problem, solver, bl.FullUnroll(), hparams)
    assert set(estimate.params) == {"3.weight", "3.bias"}
    first = problem.adapted({name: offset[0] for name, offset in estimate.params.items()}, hparams)
    assert torch.equal(first["1.weight"], hparams["init"]["1.weight"])
    assert not torch.equal(first["3.weight"], hparams["init"]["3.weight"])
    start, loss = plain_loss(constant(0.03), 3, adapted="3")
    assert_gradient(estimate.hypergradient["init"], loss, start)


def test_learned_step_sizes_have_the_meta_gradient_of_plain_autograd():
    problem, solver = problem_of(), bl.SGD(step_size=lambda hparams: hparams["step_size"], steps=3)
    rates = {name: torch.full_like(value, 0.02) for name, value in problem.initial_hparams()["init"].items()}
    hparams = problem.initial_hparams(step_size=rates)
    estimate = bl.hypergradient(problem, solver, bl.FullUnroll(), hparams)
    roots = {name: rate.clone().requires_grad_() for name, rate in rates.items()}
    start, loss = plain_loss(roots, 3)
    assert_gradient(estimate.hypergradient["init"], loss, start)
    assert_gradient(estimate.hypergradient["step_size"], loss, roots)


def test_tasks_side_by_side_are_the_mean_of_tasks_alone():
    problem, solver = problem_of(batch_size=3), bl.GradientDescent(step_size=0.03, steps=2)
    hparams = problem.initial_hparams()
    together = bl.hypergradient(problem, solver, bl.FullUnroll(), hparams).hypergradient["init"]
    alone = [
        bl.hypergradient(problem.on_tasks(TASKS, [index]), solver, bl.FullUnroll(), hparams).hypergradient["init"]
        for index in range(3)
    ]
    for name, value in together.items():
        torch.testing.assert_close(value, sum(each[name] for each in alone) / 3, rtol=1e-12, atol=1e-12)


class LearnedProximity(MetaProblem):
    """A method of a user's own: the price of the distance from the start is learned, too."""

    def support_loss(self, offset, hparams, support):
        price = 0.5 * hparams["log_price"].exp() * squared_norm(offset)
        return super().support_loss(offset, hparams, support) + price


class Reptile(MetaProblem):
    """Another: the start moves towards the adapted weights (Nichol, Achiam & Schulman 2018), with `FirstOrder`."""

    def query_loss(self, offset, hparams, query):
        adapted = self.adapted(offset, hparams)
        return 0.5 * squared_norm({name: adapted[name].detach() - start for name, start in hparams["init"].items()})


def test_a_users_own_method_is_differentiated_rightly():
    # Linear, so that the check of the problem finds the inner solution in a few steps.
    problem = LearnedProximity(nn.Linear(1, 1).double(), mse, TASKS, 3)
    hparams = problem.initial_hparams(log_price=torch.zeros((), dtype=F64))
    report = bl.check_hypergradient(problem, bl.GradientDescent(0.03, steps=3), bl.FullUnroll(), hparams)
    assert report.ok, report


def test_reptile_moves_the_start_towards_the_mean_of_the_adapted_weights():
    problem = Reptile(network(), mse, TASKS, 3)
    estimate = bl.hypergradient(problem, bl.GradientDescent(0.03, steps=3), bl.FirstOrder(), problem.initial_hparams())
    for name, value in estimate.hypergradient["init"].items():
        torch.testing.assert_close(value, -estimate.params[name].mean(0), rtol=1e-12, atol=1e-14)


def test_a_few_outer_steps_are_those_of_the_plain_reference(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCH))
    plain = runpy.run_path(str(BENCH / "maml_reference.py"))["PlainMAML"]
    problem, solver = problem_of(), bl.GradientDescent(step_size=0.02, steps=2)
    outer = bl.OuterOptimizer(
        problem,
        solver,
        bl.FullUnroll(),
        problem.initial_hparams(),
        optimizer=lambda tensors: torch.optim.Adam(tensors, lr=1e-3),
    )
    reference = plain(network(), mse, 0.02, 2)
    for index in range(5):
        loss = reference.step([TASKS(task) for task in range(4 * index, 4 * index + 4)])
        assert outer.step().outer_loss == pytest.approx(loss, rel=1e-11)
    for name, value in reference.module.named_parameters():
        torch.testing.assert_close(outer.hparams["init"][name], value.detach(), rtol=1e-10, atol=1e-10)
    held_out = SineTasks(split="test")
    for steps in (1, 5):
        ours = evaluate(problem, solver, outer.hparams, held_out, count=10, steps=(steps,))[steps]["loss"].mean
        expected = reference.evaluate([held_out(index) for index in range(10)], steps)["loss"]
        assert ours == pytest.approx(expected, rel=1e-9)


# Tasks ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [SineTasks, GlyphTasks])
def test_a_task_is_a_pure_function_of_its_index_its_split_and_its_seed(kind):
    def leaves(index, **options):
        return torch.cat([leaf.double().reshape(-1) for leaf in bl.tree.leaves(kind(**options)(index))])

    assert torch.equal(leaves(3), leaves(3))
    assert not torch.equal(leaves(3), leaves(4))
    assert not torch.equal(leaves(3), leaves(3, seed=1))
    assert not torch.equal(leaves(3), leaves(3, split="test"))


def test_sine_tasks_are_sine_waves_in_the_ranges_of_finn_et_al():
    for index in range(50):
        (X, y), (X_query, y_query) = SineTasks(shots=40, queries=2)(index)
        assert float(X.abs().max()) <= 5
        waves = torch.cat([X.sin(), X.cos()], dim=1)
        a, b = torch.linalg.lstsq(waves, y).solution[:, 0].tolist()
        torch.testing.assert_close(y, waves @ torch.tensor([[a], [b]], dtype=F64), rtol=0, atol=1e-9)
        torch.testing.assert_close(y_query, a * X_query.sin() + b * X_query.cos(), rtol=0, atol=1e-9)
        assert 0.1 <= np.hypot(a, b) <= 5
        assert b <= 1e-9  # y = amplitude (sin x cos p - cos x sin p) with p in [0, pi]


def test_letters_have_twelve_faces_and_no_two_letters_look_alike_in_any():
    found = glyphs()
    assert found.images.shape == (len(found.letters), 12, 28, 28)
    assert len(found.letters) > 1000
    assert len(set(found.faces)) == 12
    assert all(unicodedata.category(letter).startswith("L") for letter in found.letters)
    assert {"A", "a", "ß", "λ", "ж"} <= set(found.letters)
    assert not {"\N{GREEK CAPITAL LETTER ALPHA}", "\N{KELVIN SIGN}"} & set(found.letters)
    for face in range(12):
        assert len({image.numpy().tobytes() for image in found.images[:, face]}) == len(found.letters)
    ink = found.images.reshape(len(found.letters), 12, -1).amax(-1)
    assert int(ink.min()) > 50  # no empty image


def test_the_splits_share_no_letter_and_hold_all():
    parts = [set(GlyphTasks(split=split, seed=2).letters) for split in ("train", "val", "test")]
    assert sum(map(len, parts)) == len(set.union(*parts)) == len(glyphs().letters)
    assert parts[0] != set(GlyphTasks(seed=3).letters)


def test_a_glyph_task_has_distinct_letters_and_its_query_shares_no_image_with_its_support():
    tasks = GlyphTasks(ways=6, shots=2, queries=10)
    rows = {image.numpy().tobytes(): row for row, each in enumerate(glyphs().images) for image in each}
    (images, labels), (query, query_labels) = tasks(1)
    assert labels.tolist() == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5]

    def keys(pictures):
        return [picture.mul(255).round().byte().numpy().tobytes() for picture in pictures[:, 0]]

    assert not set(keys(images)) & set(keys(query))
    letters = [{rows[key] for key, label in zip(keys(query), query_labels, strict=True) if label == way}
               for way in range(6)]  # fmt: skip
    assert all(len(each) == 1 for each in letters)
    assert len(set.union(*letters)) == 6
    assert {rows[key] for key in keys(images)} == set.union(*letters)


# The outer loop ------------------------------------------------------------------------------------------------------


def outer_of(problem, **options):
    return bl.OuterOptimizer(
        problem, bl.GradientDescent(0.02, steps=2), bl.FullUnroll(), problem.initial_hparams(), **options
    )


def test_a_run_that_resumes_sees_the_same_tasks_and_comes_to_the_same_weights_bit_for_bit():
    whole = outer_of(problem_of())
    whole.run(6, progress=False)
    first = outer_of(problem_of())
    first.run(3, progress=False)
    second = outer_of(problem_of())
    second.load_state_dict(first.state_dict())
    second.run(3, progress=False)
    assert all(torch.equal(whole.hparams["init"][name], value) for name, value in second.hparams["init"].items())
    assert [record.outer_loss for record in whole.history] == [record.outer_loss for record in second.history]
    assert len({record.outer_loss for record in whole.history}) == 6


def test_each_outer_step_starts_at_offsets_of_zero_and_the_last_weights_are_the_best():
    outer = outer_of(problem_of(), warm_start=True)
    assert outer.warm_start == bl.WarmStart(state=False, adjoint=False)
    result = outer.run(4, progress=False)
    assert outer.carry.state is None
    assert result.best_loss == result.history[-1].outer_loss


def test_evaluation_gives_means_and_confidence_intervals_over_tasks():
    problem, solver, tasks = problem_of(batch_size=2), bl.GradientDescent(step_size=0.03), SineTasks(split="val")
    hparams = problem.initial_hparams()
    found = evaluate(problem, solver, hparams, tasks, count=120, steps=(0, 2))
    losses = []
    for index in range(120):
        (X, y), (X_query, y_query) = tasks(index)
        weights = {name: value.clone().requires_grad_() for name, value in hparams["init"].items()}
        for _ in range(2):
            value = mse(torch.func.functional_call(network(), weights, (X,)), y)
            gradients = torch.autograd.grad(value, list(weights.values()))
            weights = {
                name: (old - 0.03 * gradient).detach().requires_grad_()
                for (name, old), gradient in zip(weights.items(), gradients, strict=True)
            }
        losses.append(mse(torch.func.functional_call(network(), weights, (X_query,)), y_query).item())
    score = found[2]["loss"]
    assert score.mean == pytest.approx(np.mean(losses), rel=1e-12)
    assert score.half_width == pytest.approx(1.96 * np.std(losses, ddof=1) / np.sqrt(120), rel=1e-4)
    assert str(found).startswith("after 0 steps: loss ")
    assert set(found.flat("val")) >= {"val_loss_after_0", "val_loss_after_2_interval"}


def test_evaluation_counts_hits_where_targets_are_ints():
    problem = MetaProblem(mlp(784, (), 3, seed=0), nn.functional.cross_entropy, GlyphTasks(ways=3), 2)
    found = evaluate(
        problem, bl.GradientDescent(0.1), problem.initial_hparams(), GlyphTasks(ways=3, split="val"), count=30
    )
    assert 0.5 < found[5]["accuracy"].mean <= 1.0


# Configs -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["maml_sine", "imaml_glyphs"])
def test_the_configs_run_and_show_scores_on_held_out_tasks(name, tmp_path, capsys):
    (problem,) = {"maml_sine": ["sine"], "imaml_glyphs": ["glyphs"]}[name]
    small = ["outer.steps=2", *(f"problems.{problem}.{each}" for each in ("batch_size=2", "evaluated_tasks=4"))]
    options = [part for each in small for part in ("--set", each)]
    assert main(["compare", str(CONFIGS / f"{name}.yaml"), "--out", str(tmp_path), *options]) == 0
    rows = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert {row["step"] for row in rows} == {1, 2}
    assert {row["referee"] for row in rows} == {"none: each outer step has an inner problem of its own"}
    assert any(key.startswith("val_loss_after_") and rows[0][key] > 0 for key in rows[0])
    score = {"maml_sine": "val loss after 1", "imaml_glyphs": "val accuracy after 20"}[name]
    assert score in capsys.readouterr().out
    # The seed is that of the first meta-batch, which all estimators see.
    assert len({row["outer_loss"] for row in rows if row["step"] == 1 and row["estimator"] != "iMAML"}) == 1


def test_tune_shows_the_last_weights(tmp_path, capsys):
    config = str(CONFIGS / "maml_sine.yaml")
    options = ["--set", "outer.steps=3", "--set", "problems.sine.evaluated_tasks=4"]
    assert main(["tune", config, "--out", str(tmp_path), *options]) == 0
    found = json.loads((tmp_path / "tuned.json").read_text())["sine"]
    assert found["best_step"] == 3
    assert found["unit"] == "initial weight"
    assert "val loss after 5" in capsys.readouterr().out


# Bad input -----------------------------------------------------------------------------------------------------------


def batch_norm():
    return nn.Sequential(nn.Linear(1, 4), nn.BatchNorm1d(4), nn.Linear(4, 1)).double()


def shapes_that_differ(index):
    return SineTasks(shots=1 + index)(0)


class Recurrent(torch.nn.Module):
    """A recurrent layer, which torch.func.vmap does not take."""

    def __init__(self, kind):
        super().__init__()
        torch.manual_seed(0)
        self.layer, self.head = kind(1, 3, batch_first=True), torch.nn.Linear(3, 1)

    def forward(self, x):
        return self.head(self.layer(x[..., None])[0][:, -1])


@pytest.mark.parametrize(
    ("module", "tasks"),
    [
        (network(), shapes_that_differ),
        (Recurrent(torch.nn.GRU).double(), TASKS),
        (Recurrent(torch.nn.LSTM).double(), TASKS),
    ],
    ids=["unequal", "GRU", "LSTM"],
)
def test_tasks_that_do_not_run_side_by_side_run_one_after_the_other(module, tasks):
    both = problem_of(module, 2, tasks, held_out=tasks, evaluated_tasks=2)
    solver = bl.GradientDescent(0.005, steps=2)
    u = both.initial_hparams()
    found = bl.hypergradient(both, solver, bl.FullUnroll(), u)
    alone = [
        bl.hypergradient(problem_of(module, 1, tasks).on_outer_step(index), solver, bl.FullUnroll(), u)
        for index in (0, 1)
    ]
    expected = tree.scale(0.5, tree.add(*[each.hypergradient for each in alone]))
    for ours, theirs in zip(tree.leaves(found.hypergradient), tree.leaves(expected), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)
    assert found.outer_loss == pytest.approx(sum(each.outer_loss for each in alone) / 2, rel=1e-12)
    assert both.metrics(found.params, u, solver)["val_loss_after_1"] > 0


BAD = [
    (lambda: problem_of(batch_size=0), "`MetaProblem.batch_size` must be a positive int, got 0."),
    (lambda: problem_of(proximity=-1.0), "`MetaProblem.proximity` must be a number that is not negative, got -1.0."),
    (
        lambda: problem_of(adapt=["head.*"]),
        "`MetaProblem.adapt` has the pattern 'head.*', which fits no parameter (1.weight, 1.bias, 3.weight, 3.bias).",
    ),
    (lambda: problem_of(adapt="3.*"), "`MetaProblem.adapt` must be a list of patterns, such as ['head.*'], got '3.*'."),
    (lambda: problem_of(adapt=[]), "`MetaProblem.adapt` must be a list of patterns, such as ['head.*'], got []."),
    (
        lambda: problem_of(batch_norm()),
        "the module's BatchNorm layer '1' is in train mode and keeps running statistics, which tasks side by side "
        "cannot share: make it with track_running_stats=False (statistics of the task's own batch), or call "
        "module.eval().",
    ),
    (
        lambda: problem_of(tasks=lambda index: torch.zeros(3)),
        "`tasks(0)` must return (support, query), each (inputs, targets) of tensors, got Tensor.",
    ),
    (lambda: problem_of(tasks=7), "`tasks` must be a function of (index), got 7."),
    (
        lambda: MetaProblem(network(), lambda outputs: outputs.sum(), TASKS, 2),
        "`loss` must be a function of (outputs, targets), got one of (outputs).",
    ),
    (lambda: problem_of(evaluated_tasks=1), "`MetaProblem.evaluated_tasks` must be an int of at least 2, got 1."),
    (
        lambda: problem_of(evaluated_steps=()),
        "`MetaProblem.evaluated_steps` must be numbers of steps, such as (1, 5), got ().",
    ),
    (lambda: problem_of().batched(2), "MetaProblem runs its tasks side by side already: raise `batch_size` instead."),
    (
        lambda: bl.stack([problem_of(), problem_of()]),
        "MetaProblem runs its tasks side by side already: raise `batch_size` instead.",
    ),
    (lambda: SineTasks(shots=0), "`SineTasks.shots` must be a positive int, got 0."),
    (lambda: SineTasks(split="dev"), "`SineTasks.split` must be 'train', 'val' or 'test', got 'dev'."),
    (lambda: SineTasks(seed=-1), "`SineTasks.seed` must be an int that is not negative, got -1."),
    (lambda: SineProblem(hidden=(0,)), "`hidden` must be a list of positive ints, got (0,)."),
    (
        lambda: GlyphTasks(shots=2, queries=11),
        "`GlyphTasks.queries` must be a positive int, with 2 shots at most 10, as a letter has 12 images, got 11.",
    ),
    (
        lambda: evaluate(problem_of(), bl.GradientDescent(0.1), {}, TASKS, count=1),
        "`count` must be an int of at least 2 tasks, got 1.",
    ),
    (
        lambda: evaluate(problem_of(), bl.GradientDescent(0.1), {}, TASKS, steps=(-1,)),
        "`steps` must be numbers of steps, such as (1, 5), got (-1,).",
    ),
]


@pytest.mark.parametrize(("make", "sentence"), BAD)
def test_bad_input_gets_one_sentence(make, sentence):
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        make()
    assert str(caught.value) == sentence


def test_a_loss_without_reduction_is_refused():
    problem = MetaProblem(network(), lambda outputs, targets: (outputs - targets) ** 2, TASKS, 2)
    with pytest.raises(ValueError, match=r"`loss` must return a scalar Tensor for a task, got one of shape \(5, 1\)\."):
        bl.hypergradient(problem, bl.GradientDescent(0.1, steps=1), bl.FullUnroll(), problem.initial_hparams())


def test_too_many_ways_are_refused_with_the_number_of_letters():
    count = len(GlyphTasks(split="test").letters)
    with pytest.raises(ValueError, match=f"`GlyphTasks.ways` must be an int from 2 to the {count} letters of this sp"):
        GlyphTasks(ways=count + 1, split="test")


def test_batch_norm_by_the_tasks_own_statistics_works():
    module = nn.Sequential(nn.Linear(1, 4), nn.BatchNorm1d(4, track_running_stats=False), nn.Linear(4, 1)).double()
    problem = problem_of(module)
    solver = bl.GradientDescent(0.01, steps=1)
    assert bl.hypergradient(problem, solver, bl.FullUnroll(), problem.initial_hparams()).status.ok


def test_glyphs_without_matplotlib_say_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ValueError, match=r"rendered from the fonts of matplotlib: pip install 'bilevel\[plot\]'\."):
        glyphs.__wrapped__()


def test_active_dropout_is_refused() -> None:
    module = torch.nn.Sequential(torch.nn.Linear(1, 4), torch.nn.Dropout(0.5), torch.nn.Linear(4, 1))
    with pytest.raises(ValueError, match=r"random layer '1' \(dropout\) is active, .* call module\.eval\(\) first"):
        MetaProblem(module, torch.nn.functional.mse_loss, SineTasks(), batch_size=2)


def test_any_of_several_patterns_chooses_what_adapts() -> None:
    problem = SineProblem(batch_size=2, adapt=["1.*", "*.bias"])
    assert set(problem.params) == {"1.weight", "1.bias", "3.bias", "5.bias"}
