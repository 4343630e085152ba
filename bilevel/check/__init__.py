"""Checks before use: a problem, its inner solver and its estimators, each finding with its number and its remedy."""

from bilevel.check.hypergradient import CheckReport as CheckReport
from bilevel.check.hypergradient import Row as Row
from bilevel.check.hypergradient import check_hypergradient as check_hypergradient
from bilevel.check.problem import check_problem as check_problem
from bilevel.check.report import Finding as Finding
from bilevel.check.report import ProblemReport as ProblemReport
