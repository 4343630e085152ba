"""Relations that must hold between problems: repeated rows, scaled inputs, renamed labels, equal penalties."""

from __future__ import annotations

import pickle
from types import SimpleNamespace

import pytest
import torch
from problem_cases import CLASSES, LINEAR_MODELS, close, data, draw, logistic, multinomial, over

import bilevel as bl
from bilevel.core import tree
from bilevel.problems import LogisticProblem, RidgeProblem, SoftmaxProblem


def everything(problem, at, hparams=None):
    u = at.u if hparams is None else hparams
    inner = problem.bind(u)
    point = inner.linearize(at.x)
    return inner.value(at.x), inner.grad(at.x), point.vjp(at.v), problem.outer_value_and_grads(at.x, u)[:2]


FAMILIES = {"ridge": (RidgeProblem, 0), "logistic": (LogisticProblem, 2), "softmax": (SoftmaxProblem, CLASSES)}
families = pytest.mark.parametrize(("family", "classes"), FAMILIES.values(), ids=FAMILIES.keys())


@families
def test_repeating_every_row_changes_no_mean(family, classes):
    splits = data(classes)
    once, twice = family(**splits), family(**{key: torch.cat([value, value]) for key, value in splits.items()})
    at = draw(once)
    close(everything(twice, at), everything(once, at))
    assert twice.metrics(at.x) == pytest.approx(once.metrics(at.x))


@families
def test_sum_is_rows_times_mean_at_a_penalty_of_rows_times_as_much(family, classes):
    mean, total = (family(**data(classes), loss=loss, parametrization="direct") for loss in ("mean", "sum"))
    at = draw(mean)
    close(total.bind(13 * at.u).value(at.x), 13 * mean.bind(at.u).value(at.x))
    close(total.bind(13 * at.u).grad(at.x), 13 * mean.bind(at.u).grad(at.x))


@families
def test_log_and_direct_differ_by_the_chain_rule(family, classes):
    log, direct = (family(**data(classes), penalty="per_feature", parametrization=kind) for kind in ("log", "direct"))
    at = draw(log)
    penalty = at.u.exp()
    close(log.bind(at.u).grad(at.x), direct.bind(penalty).grad(at.x))
    by_log = log.bind(at.u).linearize(at.x).cross(at.v)
    close(by_log, penalty * direct.bind(penalty).linearize(at.x).cross(at.v))


@families
def test_scaling_the_inputs_scales_the_weights_back(family, classes):
    splits = data(classes)
    plain = family(**splits, parametrization="direct")
    scaled = family(
        **{key: 3 * value if key[0] == "X" else value for key, value in splits.items()}, parametrization="direct"
    )
    at = draw(plain)
    close(scaled.bind(9 * at.u).value(at.x / 3), plain.bind(at.u).value(at.x))
    close(scaled.bind(9 * at.u).grad(at.x / 3), 3 * plain.bind(at.u).grad(at.x))
    assert scaled.metrics(at.x / 3) == pytest.approx(plain.metrics(at.x))


@families
def test_equal_penalties_are_one_penalty(family, classes):
    one = family(**data(classes))
    at = draw(one)
    for penalty in one.penalty_axes():
        many = family(**data(classes), penalty=penalty)
        u = many.initial_hparams(float(at.u))
        close(many.bind(u).grad(at.x), one.bind(at.u).grad(at.x))
        close(many.bind(u).linearize(at.x).cross(at.v).sum(), one.bind(at.u).linearize(at.x).cross(at.v))


@over(LINEAR_MODELS)
def test_gather_is_the_transpose_of_spread(factory):
    problem = factory()
    at = draw(problem)
    close((problem.spread(at.du) * at.w).sum(), tree.dot(at.du, problem.gather(at.w)))
    assert problem.initial_hparams(2.0).tolist() == torch.full(problem.hparams_shape(), 2.0).tolist()


@pytest.mark.parametrize("labels", [(-1, 1), (3, 7), (-1.0, 1.0), (0.0, 4.0)])
def test_any_two_labels_are_the_same_problem(labels):
    splits = data(2)
    renamed = {key: torch.tensor(labels)[value] if key[0] == "y" else value for key, value in splits.items()}
    problem = LogisticProblem(**splits)
    at = draw(problem)
    close(everything(LogisticProblem(**renamed), at), everything(problem, at))
    assert LogisticProblem(**renamed).metrics(at.x) == problem.metrics(at.x)


def test_softmax_labels_are_sorted_and_may_have_gaps():
    splits = data(CLASSES)
    renamed = {key: torch.tensor([-5, 2, 9])[value] if key[0] == "y" else value for key, value in splits.items()}
    at = draw(SoftmaxProblem(**splits))
    close(everything(SoftmaxProblem(**renamed), at), everything(SoftmaxProblem(**splits), at))


def test_softmax_of_two_classes_is_logistic_regression():
    splits = data(2)
    two, binary = (
        SoftmaxProblem(**splits, parametrization="direct"),
        LogisticProblem(**splits, parametrization="direct"),
    )
    at = draw(binary)
    weights = torch.stack([-at.x / 2, at.x / 2])
    # |W|^2 is half of |w|^2.
    close(two.bind(2 * at.u).value(weights), binary.bind(at.u).value(at.x))
    below, above = two.bind(2 * at.u).grad(weights)
    close(above, -below)
    close(above, binary.bind(at.u).grad(at.x))


def test_losses_survive_large_predictions():
    for problem in (logistic(), multinomial()):
        at = draw(problem)
        big = problem.bind(at.u)
        assert all(bool(torch.isfinite(value).all()) for value in (big.value(1e6 * at.x), big.grad(1e6 * at.x)))
        assert bool(torch.isfinite(big.linearize(1e6 * at.x).hvp(at.v)).all())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize(("family", "classes"), FAMILIES.values(), ids=FAMILIES.keys())
def test_closed_forms_on_cuda_equal_those_on_the_cpu(family, classes):
    splits = data(classes)
    problem, moved = family(**splits), family(**{key: value.cuda() for key, value in splits.items()})
    at = draw(problem)
    there = SimpleNamespace(**{key: value.cuda() for key, value in vars(at).items()})
    close(tree.tree_map(torch.Tensor.cpu, everything(moved, there)), everything(problem, at), 1e-11)


@pytest.mark.parametrize("name", [name for name in LINEAR_MODELS if name.endswith("mean-log")])
def test_a_problem_that_has_been_solved_is_pickled(name):
    problem = LINEAR_MODELS[name]()
    u = problem.initial_hparams()
    there = bl.hypergradient(problem, bl.QuasiNewton(tol=1e-8), bl.Implicit(), u, on_failure="return")
    again = bl.hypergradient(
        pickle.loads(pickle.dumps(problem)), bl.QuasiNewton(tol=1e-8), bl.Implicit(), u, on_failure="return"
    )
    close(again.hypergradient, there.hypergradient)
