"""Problems with closed forms: their oracles against autograd, numpy, scikit-learn, and identities."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import torch
from problem_cases import (
    CLASSES,
    FEATURES,
    LINEAR_MODELS,
    PROBLEMS,
    RIDGES,
    close,
    data,
    draw,
    logistic,
    multinomial,
    over,
    ridge,
)
from scipy.special import huber, logsumexp, softmax
from sklearn.linear_model import LogisticRegression, PoissonRegressor, Ridge
from sklearn.metrics import (
    accuracy_score,
    d2_tweedie_score,
    log_loss,
    mean_poisson_deviance,
    mean_squared_error,
    r2_score,
)
from sklearn.svm import LinearSVC

import bilevel as bl
from bilevel import BilevelProblem
from bilevel.core import tree
from bilevel.problems import (
    GLMLoss,
    Huber,
    HuberProblem,
    LinearModelProblem,
    Logistic,
    LogisticProblem,
    Poisson,
    PoissonProblem,
    QuadraticProblem,
    Softmax,
    SoftmaxProblem,
    Squared,
    SquaredHingeProblem,
)

# Against autograd ----------------------------------------------------------------------------------------------------


@over(PROBLEMS)
@pytest.mark.parametrize("seed", [0, 1])
def test_closed_forms_equal_autograd(factory, seed):
    problem = factory()
    plain = BilevelProblem(problem.inner_loss, problem.outer_loss, problem.params)
    at = draw(problem, seed)
    ours, theirs = problem.bind(at.u), plain.bind(at.u)
    close(ours.value(at.x), theirs.value(at.x))
    close(ours.grad(at.x), theirs.grad(at.x))
    point, plain_point = ours.linearize(at.x), theirs.linearize(at.x)
    close(point.hvp(at.v), plain_point.hvp(at.v))
    close(point.cross(at.v), plain_point.cross(at.v))
    close(point.vjp(at.v), plain_point.vjp(at.v))
    close(point.jvp(at.v, at.du), plain_point.jvp(at.v, at.du))
    close(point.hvp_vjp(at.v, at.w), plain_point.hvp_vjp(at.v, at.w))
    close(point.dense_hessian(), plain_point.dense_hessian())
    close(problem.outer_value_and_grads(at.x, at.u), plain.outer_value_and_grads(at.x, at.u))


@over(PROBLEMS)
def test_oracles_are_closed_forms(factory, monkeypatch):
    """None of them may fall back to autograd: that would be right and several times slower."""
    problem = factory()
    at = draw(problem)
    monkeypatch.setattr(torch.autograd, "grad", None)
    inner = problem.bind(at.u)
    inner.grad(at.x)
    point = inner.linearize(at.x)
    point.vjp(at.v), point.jvp(at.v, at.du), point.dense_hessian(), problem.outer_value_and_grads(at.x, at.u)


@over(PROBLEMS)
def test_oracles_are_adjoint(factory):
    problem = factory()
    at = draw(problem)
    point = problem.bind(at.u).linearize(at.x)
    close(tree.dot(point.hvp(at.v), at.w), tree.dot(at.v, point.hvp(at.w)))
    by_params, by_hparams = point.vjp(at.w)
    close(tree.dot(point.jvp(at.v, at.du), at.w), tree.dot(at.v, by_params) + tree.dot(at.du, by_hparams))


@over(PROBLEMS)
def test_rebind_equals_a_fresh_linearization(factory):
    problem = factory()
    at = draw(problem)
    old, new = problem.bind(at.u), problem.bind(at.u + 0.3)
    used, fresh = old.linearize(at.x), new.linearize(at.x)
    used.hvp(at.v)
    for point in (used.rebind(new), old.linearize(at.x).rebind(new)):
        assert point.inner is new
        close(point.vjp(at.v), fresh.vjp(at.v))
        close(point.jvp(at.v, at.du), fresh.jvp(at.v, at.du))
        close(point.dense_hessian(), fresh.dense_hessian())


@pytest.mark.parametrize("problem", [logistic(), multinomial()], ids=["logistic", "softmax"])
def test_rebind_takes_no_second_data_pass_for_the_curvature(problem, monkeypatch):
    at = draw(problem)
    point = problem.bind(at.u).linearize(at.x)
    point.hvp(at.v)
    monkeypatch.setattr(type(problem.glm), "curvature", None)
    point.rebind(problem.bind(at.u + 1.0)).hvp(at.v)


@pytest.mark.crossed
@over(PROBLEMS)
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_curvature_contains_the_spectrum(factory, seed):
    problem = factory()
    at = draw(problem, seed)
    inner = problem.bind(at.u)
    # Zero weights are where the bound of logistic regression is tight.
    for params in (at.x, 10 * at.x, torch.zeros_like(at.x)):
        values = np.linalg.eigvalsh(inner.linearize(params).dense_hessian().numpy())
        spectrum = inner.curvature(params)
        assert spectrum.smallest <= values[0] + 1e-10 * values[-1]
        assert spectrum.largest >= values[-1] * (1 - 1e-10)


@pytest.mark.parametrize("family", [LogisticProblem, SoftmaxProblem])
def test_curvature_bound_holds_for_many_features(family):
    problem = family(**data(classes=2, rows=300, features=120))
    inner = problem.bind(problem.initial_hparams(-8.0))
    values = np.linalg.eigvalsh(inner.linearize(problem.params).dense_hessian().numpy())
    spectrum = inner.curvature(problem.params)
    assert spectrum.smallest <= values[0] * (1 + 1e-9)
    assert values[-1] * (1 - 1e-5) <= spectrum.largest <= values[-1] * 1.001


# Against independent arithmetic --------------------------------------------------------------------------------------


def independent_loss(problem, part: str, w: np.ndarray) -> float:
    """The mean unpenalised loss in numpy."""
    name = type(problem).__name__
    classes = {"LogisticProblem": 2, "SquaredHingeProblem": 2, "SoftmaxProblem": CLASSES, "PoissonProblem": 4}
    splits = data(classes.get(name, 0), rows=problem.train.rows)
    X, y = splits[f"X_{part}"].numpy(), splits[f"y_{part}"].numpy()
    if name == "RidgeProblem":
        return float(np.mean([(X[i] @ w - y[i]) ** 2 / 2 for i in range(len(y))]))
    if name == "LogisticProblem":
        return float(np.mean(np.log1p(np.exp(-(2 * y - 1) * (X @ w)))))
    z = X @ w.T
    if name == "PoissonProblem":
        return mean_poisson_deviance(y, np.exp(z)) / 2
    if name == "SquaredHingeProblem":
        return float(np.mean([max(0.0, 1 - (2 * y[i] - 1) * z[i]) ** 2 / 2 for i in range(len(y))]))
    if name == "HuberProblem":
        return float(np.mean(huber(0.7, z - y)))
    return float(np.mean(logsumexp(z, axis=1) - z[np.arange(len(y)), y]))


def independent_penalty(problem, u: np.ndarray, w: np.ndarray) -> float:
    """The penalty by loops over the weights."""
    pen = np.exp(u) if problem.parametrization == "log" else u
    total = 0.0
    for index in np.ndindex(w.shape):
        group = {"scalar": (), "per_class": index[:1], "per_feature": index[-1:], "per_weight": index}[problem.penalty]
        total += 0.5 * pen[group] * w[index] ** 2
    return float(total)


@over(LINEAR_MODELS)
def test_losses_against_numpy(factory):
    problem = factory()
    at = draw(problem)
    w, u = at.x.numpy(), at.u.numpy()
    scale = problem.train.rows if problem.loss == "sum" else 1
    inner = scale * independent_loss(problem, "train", w) + independent_penalty(problem, u, w)
    assert problem.inner_loss(at.x, at.u).item() == pytest.approx(inner, rel=1e-13)
    assert problem.outer_loss(at.x, at.u).item() == pytest.approx(independent_loss(problem, "val", w), rel=1e-13)
    assert problem.metrics(at.x)["test_loss"] == pytest.approx(independent_loss(problem, "test", w), rel=1e-13)


@pytest.mark.parametrize("loss", ["mean", "sum"])
@pytest.mark.parametrize("rows", [13, 3])
def test_ridge_solution_is_that_of_scikit_learn(loss, rows):
    problem, splits = ridge(rows, loss=loss), data(rows=rows)
    u = torch.tensor(-0.7, dtype=torch.float64)
    alpha = float(u.exp()) * (rows if loss == "mean" else 1)
    theirs = Ridge(alpha=alpha, fit_intercept=False).fit(splits["X_train"].numpy(), splits["y_train"].numpy())
    w = torch.from_numpy(theirs.coef_)
    close(problem.solve(u), w)
    close(problem.bind(u).grad(w), torch.zeros_like(w), 1e-13)


@pytest.mark.parametrize("loss", ["mean", "sum"])
@pytest.mark.parametrize("family", [logistic, multinomial])
def test_classifiers_have_no_gradient_at_the_solution_of_scikit_learn(family, loss):
    problem = family(loss=loss)
    splits = data(classes=2 if family is logistic else CLASSES)
    u = torch.tensor(-2.0, dtype=torch.float64)
    C = problem.scale / float(u.exp())
    theirs = LogisticRegression(C=C, fit_intercept=False, solver="newton-cholesky", tol=1e-12)
    theirs.fit(splits["X_train"].numpy(), splits["y_train"].numpy())
    w = torch.from_numpy(theirs.coef_).reshape(problem.params_shape())
    assert w.norm() > 0.1
    close(problem.bind(u).grad(w), torch.zeros_like(w), 1e-9)


@pytest.mark.parametrize("family", [PoissonProblem, SquaredHingeProblem])
def test_solvers_find_the_solution_of_scikit_learn(family):
    splits = data(4 if family is PoissonProblem else 2, rows=40)
    problem, u = family(**splits), torch.tensor(-3.0, dtype=torch.float64)
    alpha = float(u.exp())
    if family is PoissonProblem:
        theirs = PoissonRegressor(alpha=alpha, fit_intercept=False, solver="newton-cholesky", tol=1e-10)
    else:
        theirs = LinearSVC(C=1 / (2 * 40 * alpha), fit_intercept=False, dual=False, tol=1e-12)
    theirs.fit(splits["X_train"].numpy(), splits["y_train"].numpy())
    w = torch.from_numpy(theirs.coef_).reshape(-1)
    for solver in (bl.Newton(tol=1e-10), bl.QuasiNewton(tol=1e-10)):
        close(bl.hypergradient(problem, solver, bl.Implicit(), u).params, w, 1e-6)


def test_predictions_of_the_new_losses_are_scored_as_by_scikit_learn():
    problem, splits = PoissonProblem(**data(4)), data(4)
    w = 0.3 * draw(problem).x
    mu = np.exp(splits["X_val"].numpy() @ w.numpy())
    assert problem.metrics(w)["val_d2"] == pytest.approx(d2_tweedie_score(splits["y_val"], mu, power=1), rel=1e-12)
    constant = mean_poisson_deviance(splits["y_val"], np.full(7, splits["y_train"].double().mean())) / 2
    assert problem.constant_loss(problem.val) == pytest.approx(constant, rel=1e-12)
    hinge = SquaredHingeProblem(**data(2))
    grid = torch.linspace(-1, 1, 20_001, dtype=torch.float64)[:, None]
    best = hinge.glm.value(grid, hinge.train.y).mean(1).min()
    assert hinge.constant_loss(hinge.train) == pytest.approx(float(best), abs=1e-8)


def test_targets_that_a_loss_is_not_made_for_are_one_sentence():
    splits = data(4)
    for make, words in (
        (
            lambda: PoissonProblem(**splits | {"y_val": splits["y_val"] - 1}),
            r"y_val is negative \(-1 in row 1\): Poisson",
        ),
        (lambda: PoissonProblem(**splits | {"y_train": 0 * splits["y_train"]}), "y_train is all zeros: the logarithm"),
        (lambda: SquaredHingeProblem(**splits), "y_train holds 4 classes: SquaredHingeProblem takes two"),
        (lambda: HuberProblem(**splits, width=0), "`Huber.width` must be a positive number, got 0"),
    ):
        with pytest.raises(ValueError, match=words):
            make()


@over(RIDGES)
def test_exact_hypergradient_of_ridge(factory):
    problem = factory()
    splits = {key: value.numpy() for key, value in data(rows=problem.train.rows).items()}
    X, y, X_val, y_val = (splits[key] for key in ("X_train", "y_train", "X_val", "y_val"))
    root = np.sqrt(problem.scale)

    def penalties(u: np.ndarray) -> np.ndarray:
        return np.broadcast_to(np.exp(u) if problem.parametrization == "log" else u, FEATURES)

    def weights(u: np.ndarray) -> np.ndarray:
        # Least squares on augmented rows: no normal equations.
        rows, targets = np.vstack([root * X, np.diag(np.sqrt(penalties(u)))]), np.append(root * y, np.zeros(FEATURES))
        return np.linalg.lstsq(rows, targets, rcond=None)[0]

    def outer(u: np.ndarray) -> float:
        return float(np.mean((X_val @ weights(u) - y_val) ** 2) / 2)

    u = draw(problem).u.numpy()
    w = weights(u)
    np.testing.assert_allclose(problem.solve(torch.tensor(u)).numpy(), w, rtol=1e-11, atol=1e-12)
    slope = penalties(u) if problem.parametrization == "log" else np.ones(FEATURES)
    jacobian = -np.linalg.inv(problem.scale * X.T @ X + np.diag(penalties(u))) @ np.diag(slope * w)
    by_weight = jacobian.T @ (X_val.T @ (X_val @ w - y_val) / len(y_val))
    want = by_weight.sum() if problem.penalty == "scalar" else by_weight
    got = problem.exact_hypergradient(torch.tensor(u)).numpy()
    np.testing.assert_allclose(got, want, rtol=1e-10, atol=1e-12)
    np.testing.assert_allclose(got, central_difference(outer, u), rtol=1e-6, atol=1e-8)


def central_difference(function, u: np.ndarray, step: float = 1e-5) -> np.ndarray:
    """Differences along every hyperparameter; the last axes are those of u."""
    moves = [step * row.reshape(u.shape) for row in np.eye(u.size)]
    columns = [(np.asarray(function(u + move)) - function(u - move)) / (2 * step) for move in moves]
    return np.stack(columns, axis=-1).reshape((*columns[0].shape, *u.shape))


def test_exact_solution_jacobian_and_hypergradient_of_the_quadratic():
    problem = QuadraticProblem.random(size=5, hyperparameters=3, condition=50.0, seed=4)
    H0, b0, H, b, target = (
        getattr(problem, name).numpy()
        for name in ("hessian", "linear", "hessian_directions", "linear_directions", "target")
    )

    def solve(u: np.ndarray) -> np.ndarray:
        return -np.linalg.inv(H0 + sum(u[j] * H[j] for j in range(3))) @ (b0 + sum(u[j] * b[j] for j in range(3)))

    u = draw(problem).u
    x = solve(u.numpy())
    np.testing.assert_allclose(problem.solve(u).numpy(), x, rtol=1e-11, atol=1e-13)
    hessian = H0 + np.einsum("j,jkl->kl", u.numpy(), H)
    jacobian = np.stack([-np.linalg.inv(hessian) @ (H[j] @ x + b[j]) for j in range(3)], axis=1)
    np.testing.assert_allclose(problem.exact_jacobian(u).numpy(), jacobian, rtol=1e-10, atol=1e-12)
    np.testing.assert_allclose(jacobian, central_difference(solve, u.numpy()), rtol=1e-6, atol=1e-8)
    hypergradient = problem.exact_hypergradient(u).numpy()
    np.testing.assert_allclose(hypergradient, jacobian.T @ (x - target), rtol=1e-10)
    outer = central_difference(lambda at: float(np.sum((solve(at) - target) ** 2) / 2), u.numpy())
    np.testing.assert_allclose(hypergradient, outer, rtol=1e-6, atol=1e-8)


def test_random_quadratic_has_the_spectrum_that_is_asked_for():
    problem = QuadraticProblem.random(size=6, hyperparameters=2, condition=100.0, seed=1)
    values = np.linalg.eigvalsh(problem.hessian.numpy())
    assert (values[0], values[-1]) == pytest.approx((1.0, 100.0))
    assert np.linalg.eigvalsh(problem.hessian_directions.numpy()).min() > -1e-12
    again = QuadraticProblem.random(size=6, hyperparameters=2, condition=100.0, seed=1)
    assert torch.equal(problem.linear_directions, again.linear_directions)
    assert not torch.equal(problem.linear, QuadraticProblem.random(6, 2, condition=100.0, seed=2).linear)


class Probit(GLMLoss):
    """One's own loss: three methods; its curvature depends on the target."""

    def value(self, z, y):
        return -torch.special.log_ndtr(y * z)

    def slope(self, z, y):
        return -y * self.hazard(y * z)

    def curvature(self, z, y):
        hazard = self.hazard(y * z)
        return hazard * (hazard + y * z)

    def hazard(self, t):
        return torch.exp(-0.5 * t.square() - torch.special.log_ndtr(t)) / (2 * torch.pi) ** 0.5

    def encode(self, splits):
        return {name: 2.0 * split.y - 1.0 for name, split in splits.items()}


class ProbitProblem(LinearModelProblem):
    glm = Probit()


class Hooked(LinearModelProblem):
    """The loss by methods of the problem, as before there were loss objects."""

    max_loss_curvature = 1.0

    def prepare_targets(self):
        for split in self.splits.values():
            split.y = split.y.to(split.X.dtype)

    def loss_at(self, z, y):
        return (z - y).cosh().log().sum()

    def slope_at(self, z, y):
        return (z - y).tanh()

    def curvature_at(self, z):
        return 1.0 - (z - self.train.y).tanh().square()

    def bend(self, curvature, dz):
        return curvature * dz


def test_a_loss_of_ones_own_is_a_problem_of_two_lines():
    problem = ProbitProblem(**data(2), penalty="per_feature")
    plain = BilevelProblem(problem.inner_loss, problem.outer_loss, problem.params)
    u = problem.initial_hparams(-2.0)
    ours, theirs = (bl.hypergradient(p, bl.Newton(), bl.Implicit(), u, certify=True) for p in (problem, plain))
    close(ours.hypergradient, theirs.hypergradient, 1e-9)
    assert (ours.certificate.error_kind, ours.status) == ("estimate", bl.Status.OK)
    # Nothing is declared of its largest curvature.
    with pytest.raises(ValueError, match="largest curvature, which is inf here: give numbers, or use QuasiNewton"):
        bl.hypergradient(problem, bl.GradientDescent(), bl.Implicit(), u)
    with pytest.raises(ValueError, match="LinearModelProblem needs a loss, a `GLMLoss`: name it in the class"):
        LinearModelProblem(**data())


def test_a_loss_stated_by_methods_of_the_problem_still_runs_with_a_warning():
    with pytest.warns(DeprecationWarning, match="Hooked defines loss_at, .*: state its loss by a bilevel.problems.GLM"):
        problem = Hooked(**data())
    plain = BilevelProblem(problem.inner_loss, problem.outer_loss, problem.params)
    at = draw(problem)
    ours, theirs = problem.bind(at.u), plain.bind(at.u)
    close(ours.value(at.x), theirs.value(at.x))
    close(ours.linearize(at.x).vjp(at.v), theirs.linearize(at.x).vjp(at.v))
    assert problem.row_losses(at.x, problem.val).shape == (7,)
    found = bl.hypergradient(problem, bl.Newton(), bl.Implicit(), at.u, certify=True)
    assert found.certificate.error_kind == "estimate"


def test_a_problem_without_closed_form_says_so():
    assert logistic().exact_hypergradient(logistic().initial_hparams()) is None
    assert multinomial().exact_hypergradient(multinomial().initial_hparams()) is None


@pytest.mark.parametrize(
    ("loss", "classes"), [(Squared(), 0), (Huber(), 0), (Poisson(), 4), (Logistic(), 2), (Softmax(), 3)]
)
def test_figures_of_weighted_rows_are_those_of_repeated_rows(loss, classes):
    rng = np.random.default_rng(0)
    times = torch.from_numpy(rng.integers(0, 5, 30))
    y = torch.from_numpy(rng.integers(0, classes, 30) if classes else rng.standard_normal(30))
    y = 2.0 * y - 1.0 if isinstance(loss, Logistic) else y if isinstance(loss, Softmax) else y.double()
    z = torch.from_numpy(rng.standard_normal((3, 30) if isinstance(loss, Softmax) else 30))
    figures = loss.scores(z, y, times.double())
    assert figures == pytest.approx(loss.scores(z.repeat_interleave(times, -1), y.repeat_interleave(times)), rel=1e-12)
    assert figures != pytest.approx(loss.scores(z, y), rel=1e-3)


def test_metrics_against_scikit_learn():
    for family, classes in ((partial(ridge, 13), 0), (logistic, 2), (multinomial, CLASSES)):
        problem, splits = family(), data(classes)
        w = draw(problem).x
        figures = problem.metrics(w)
        score = "accuracy" if classes else "r2"
        assert set(figures) == {f"{part}_{what}" for part in ("train", "val", "test") for what in ("loss", score)}
        for part in ("train", "val", "test"):
            X, y = splits[f"X_{part}"].numpy(), splits[f"y_{part}"].numpy()
            z = X @ w.numpy().T
            if classes == 0:
                want = mean_squared_error(y, z) / 2, r2_score(y, z)
            elif classes == 2:
                want = log_loss(y, 1 / (1 + np.exp(-z))), accuracy_score(y, z > 0)
            else:
                want = log_loss(y, softmax(z, axis=1)), accuracy_score(y, z.argmax(1))
            assert (figures[f"{part}_loss"], figures[f"{part}_{score}"]) == pytest.approx(want, rel=1e-12)
