"""Breaks of the outer loop, comparisons, run folders and the command line."""

from __future__ import annotations

from .row import Break

LOOPS = (
    Break(
        "outer-nan-step-not-undone",
        "bilevel/outer/loop.py",
        "                self._restore(before)\n                self._hparams = hparams\n",
        "                self._hparams = hparams\n",
        "test_outer.py::test_a_step_to_nan_leaves_no_trace_in_what_follows",
    ),
    Break(
        "outer-nan-hyperparameters",
        "bilevel/outer/loop.py",
        "                self._restore(before)\n                self._hparams = hparams\n",
        "                self._restore(before)\n",
        "test_outer.py::test_a_step_to_nan_leaves_no_trace_in_what_follows",
    ),
    Break(
        "outer-interrupted-step",
        "bilevel/outer/loop.py",
        "        except BaseException:\n            self._restore(before)\n",
        "        except BaseException:\n",
        "test_outer.py::test_an_interrupt_leaves_a_state_from_which_the_run_continues_to_the_same_numbers",
    ),
    Break(
        "outer-best-is-last",
        "bilevel/outer/loop.py",
        "if self.problem.renewed or estimate.outer_loss < self.best[0]:",
        "if self.problem.renewed or estimate.outer_loss == estimate.outer_loss:",
        "test_outer.py::test_the_best_hyperparameters_are_those_of_the_smallest_loss_and_do_not_move_on",
    ),
    Break(
        "outer-callers-tensor",
        "bilevel/outer/loop.py",
        "self._hparams = tree.tree_map(torch.clone, tree.detach(hparams))",
        "self._hparams = tree.detach(hparams)",
        "test_outer.py::test_a_tensor_that_the_caller_moves_later_does_not_move_the_run",
    ),
    Break(
        "outer-patience",
        "bilevel/outer/records.py",
        "self.min_progress) >= self.patience:",
        "self.min_progress) > self.patience:",
        "test_outer.py::test_the_run_stops_for_the_reason_that_it_names",
    ),
    Break(
        "outer-progress",
        "bilevel/outer/records.py",
        "if loss < best - min_progress:",
        "if loss < best:",
        "test_outer.py::test_the_run_stops_for_the_reason_that_it_names",
    ),
    Break(
        "constraint-chain-rule",
        "bilevel/constraints.py",
        "return list(torch.autograd.grad(hparams, tree.leaves(free), tree.leaves(gradient)))",
        "return list(tree.leaves(gradient))",
        "test_outer.py::test_the_chain_rule_through_a_constraint_equals_finite_differences_in_the_free_variable",
    ),
    Break(
        "config-unknown-option",
        "bilevel/config/build.py",
        "        if option not in allowed:\n",
        "        if option in ():\n",
        "test_config.py",
    ),
)
