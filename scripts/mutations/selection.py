"""Breaks of the choice of penalties: leaks, gates that open by themselves, wrong priors."""

from __future__ import annotations

from .row import Break

SELECTION = (
    Break(
        "fold-sees-what-it-holds-out",
        "bilevel/selection/honest.py",
        "part = criterion.take(train)",
        "part = criterion",
        "test_honest_losses.py::test_folds_never_see_the_rows_that_they_hold_out",
    ),
    Break(
        "criteria-never-judged-at-weak-penalties",
        "bilevel/criteria/criterion.py",
        "right = all(self._agree(found, each.compute(u, second=False)) for each in others)",
        "right = True",
        "test_weak_penalties.py::test_criteria_are_right_where_they_say_nothing",
    ),
    Break(
        "second-level-without-the-prior",
        "bilevel/selection/honest.py",
        "torch.from_numpy(point.prior.hessian).to(J)",
        "0.0",
        "test_honest_losses.py::test_the_second_level_is_the_tuning_without_a_row_to_first_order",
    ),
    Break(
        "gate-always-open",
        "bilevel/selection/gate.py",
        "bool(gains[best] > max(kappa * errors[best], rounding))",
        "bool(gains[best] > 0)",
        "test_gate.py",
    ),
    Break(
        "one-row-opens-the-gate",
        "bilevel/selection/gate.py",
        "proved = not lone and bool(",
        "proved = bool(",
        "test_gate.py::test_a_row_that_makes_most_of_the_loss_opens_no_gate",
    ),
    Break(
        "one-se-of-unpaired-losses",
        "bilevel/selection/gate.py",
        "difference: Array = losses - other",
        "difference: Array = losses - other.mean()",
        "test_gate.py",
    ),
    Break(
        "kappa-of-nearly-separated-rows",
        "bilevel/selection/gate.py",
        "return 3.0",
        "pass",
        "test_gate.py",
    ),
    Break(
        "hyperprior-holds-the-level",
        "bilevel/selection/descend.py",
        "self.shares @ u if self.anchor is None else self.anchor",
        "0.0 if self.anchor is None else self.anchor",
        "test_tuned_path.py",
    ),
    Break(
        "descent-leaves-the-box",
        "bilevel/selection/descend.py",
        "new = np.clip(here.u + _step(g, H, free, damping), low, high)",
        "new = here.u + _step(g, H, free, damping)",
        "test_tuned_path.py",
    ),
    Break(
        "certificate-without-what-is-left-out",
        "bilevel/selection/certified.py",
        "quartic * sign ** np.arange(4, -1, -1)) - remainder",
        "quartic * sign ** np.arange(4, -1, -1))",
        "test_certified_range.py",
    ),
    Break(
        "row-weights-see-what-is-held-out",
        "bilevel/selection/row_weights.py",
        "self._problem(self.V[rows], self.y_trusted[rows])",
        "self._problem(self.V, self.y_trusted)",
        "test_row_weights.py::test_rows_that_are_held_out_have_no_say",
    ),
    Break(
        "wrong-rows-by-row-weights-rise",
        "bilevel/selection/row_weights.py",
        "u - gradient / gradient.abs()",
        "u + gradient / gradient.abs()",
        "test_row_weights.py",
    ),
    Break(
        "adaptive-weights-of-all-rows",
        "bilevel/selection/candidates.py",
        "fit = self._ridge.weights if fold is None else self._ridge.fold_weights[fold]",
        "fit = self._ridge.weights",
        "test_elastic_cv.py",
    ),
    Break(
        "rows-judge-what-they-chose",
        "bilevel/selection/candidates.py",
        "_least(pooled[..., self._held_out.others(rows)])",
        "_least(pooled)",
        "test_elastic_cv.py::test_rows_are_judged_under_penalties_that_the_other_folds_chose",
    ),
    Break(
        "combination-behind-a-shut-gate",
        "bilevel/selection/elastic_cv.py",
        'if not choice.open and guard != "off":',
        "if False:",
        "test_elastic_cv.py::test_a_gain_that_is_not_proved_keeps_the_one_penalty",
    ),
    Break(
        "combination-by-unweighted-rows",
        "bilevel/selection/honest.py",
        "return np.asarray(self._weights[index] / self._count[index])",
        "return np.ones(len(index))",
        "test_elastic_cv.py",
    ),
    Break(
        "net-without-its-intercept",
        "bilevel/selection/nets.py",
        "gradient = gradient - shift @ lines",
        "gradient = gradient - 0.0 * shift @ lines",
        "test_elastic_cv.py::test_a_logistic_path_is_that_of_scikit_learn",
    ),
    Break(
        "signs-that-change-on-the-way",
        "bilevel/numerics/elastic_net.py",
        "first = steps.min()",
        "first = 1.0",
        "test_elastic_net.py",
    ),
)
