"""Problems with closed-form oracles, behind the same interface as a `BilevelProblem` made from two functions."""

from bilevel.problems.linear_model import LinearModelProblem as LinearModelProblem
from bilevel.problems.logistic import LogisticProblem as LogisticProblem
from bilevel.problems.quadratic import QuadraticProblem as QuadraticProblem
from bilevel.problems.ridge import RidgeProblem as RidgeProblem
from bilevel.problems.sample_weights import SampleWeightProblem as SampleWeightProblem
from bilevel.problems.softmax import SoftmaxProblem as SoftmaxProblem
