"""Breaks of the outer searches: the trust region, coordinates, second derivatives, and what their ends rest on."""

from __future__ import annotations

from .row import Break

TESTS = "test_searches.py::"
SEARCHES = (
    Break(
        "search-hard-case",
        "bilevel/outer/trust_region.py",
        "if short > 1e-5 * radius * radius and lowest < 0:",
        "if short > 1e9 * radius * radius and lowest < 0:",
        TESTS + "test_steps_in_a_ball_satisfy_the_conditions_of_a_global_minimiser",
    ),
    Break(
        "search-ball-of-the-step-alone",
        "bilevel/outer/trust_region.py",
        "room = math.sqrt(max(0.0, radius * radius - float(held @ held)))",
        "room = radius",
        TESTS + "test_steps_in_a_box_stay_in_it_and_no_small_change_is_better",
    ),
    Break(
        "search-flat-coordinates",
        "bilevel/outer/coordinates.py",
        "exact + np.diag(gradient * self.bend(u))",
        "exact",
        TESTS + "test_second_derivatives_in_shrinkage_are_those_of_differences",
    ),
    Break(
        "search-third-derivative-lost",
        "bilevel/problems/hyper_hessian.py",
        "if not glm.quadratic:",
        "if False:",
        TESTS + "test_hyper_hessians_are_the_differences_of_hypergradients",
    ),
    Break(
        "search-lagrangian-without-constraint",
        "bilevel/oracles/hyper_hessian.py",
        "lagrangian = outer - a @ g",
        "lagrangian = outer - 0.9 * (a @ g)",
        TESTS + "test_hyper_hessians_of_dicts_and_of_outer_losses_that_see_the_hyperparameters",
    ),
    Break(
        "search-no-probe",
        "bilevel/outer/ends.py",
        "if not state.probed:",
        "if False:",
        TESTS + "test_converged_is_never_said_of_wrong_numbers",
    ),
    Break(
        "search-probe-blind-to-slopes",
        "bilevel/outer/ends.py",
        "agrees &= bool(np.all(",
        "agrees &= bool(np.any(",
        TESTS + "test_converged_is_never_said_of_wrong_numbers",
    ),
    Break(
        "search-noise-unheeded",
        "bilevel/outer/ends.py",
        "return self.tol * abs(answer.value) / SURE, 3.0 * answer.error",
        "return self.tol * abs(answer.value) / SURE, 0.0",
        TESTS + "test_noise_that_is_known_ends_at_the_accuracy_of_the_inner_solver",
    ),
    Break(
        "search-probe-without-a-model-unread",
        "bilevel/outer/ends.py",
        "agrees = abs(rise - expected) <= MEAN * abs(expected) + noise",
        "agrees = True",
        TESTS + "test_a_slope_of_the_wrong_sign_shows_at_the_end_without_second_derivatives",
    ),
    Break(
        "search-ends-on-first-order-figures",
        "bilevel/outer/hyper_lbfgs.py",
        "if predicted <= max(self.bounds(answer)):",
        "if True:",
        TESTS + "test_converged_is_true_at_every_tolerance",
    ),
    Break(
        "search-reach-of-any-rejected-step",
        "bilevel/outer/hyper_newton.py",
        "if far > LONG else reach",
        "if True else reach",
        TESTS + "test_a_rejected_step_towards_strong_penalties_does_not_shorten_the_way_to_weak_ones",
    ),
    Break(
        "search-value-uncorrected",
        "bilevel/outer/searcher.py",
        "value, error = estimate.outer_loss - correction,",
        "value, error = estimate.outer_loss + correction,",
        TESTS + "test_values_are_corrected_to_those_at_the_inner_solution",
    ),
    Break(
        "search-accepts-what-is-not-ok",
        "bilevel/outer/searcher.py",
        "estimate.status.ok if accuracy is None else",
        "estimate.status.usable if accuracy is None else",
        TESTS + "test_an_inner_run_that_did_not_converge_is_never_accepted",
    ),
    Break(
        "search-carry-of-a-rejected-trial",
        "bilevel/outer/searches.py",
        "return new if any(taken) else old",
        "return new",
        TESTS + "test_a_rejected_trial_leaves_no_warm_start",
    ),
    Break(
        "search-values-to-first-order-alone",
        "bilevel/outer/accuracy.py",
        "return first + self.bend * residual**2",
        "return first",
        "outer/test_accuracy.py::test_two_looks_at_a_point_show_what_is_left_of_second_order",
    ),
    Break(
        "search-forgets-a-run-that-goes-on",
        "bilevel/outer/accuracy.py",
        '| {"pending": held}',
        '| {"pending": None}',
        "outer/test_accuracy.py::test_a_run_that_is_saved_after_any_evaluation_goes_on_bit_for_bit_in_the_middle_of_a_point",
    ),
)
