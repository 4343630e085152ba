"""Bilevel hyperparameter optimization in PyTorch: hypergradients that carry their own evidence."""

# ruff: noqa: E402  (the first call comes before anything that loads torch)

from bilevel.core.interrupt import quiet_interrupt

quiet_interrupt()

from bilevel import meta as meta
from bilevel import problems as problems
from bilevel import theory as theory
from bilevel.base import BatchEstimate as BatchEstimate
from bilevel.base import Carry as Carry
from bilevel.base import Certificate as Certificate
from bilevel.base import Estimate as Estimate
from bilevel.base import HypergradEstimator as HypergradEstimator
from bilevel.base import InnerSolver as InnerSolver
from bilevel.base import InnerState as InnerState
from bilevel.base import LinearSolution as LinearSolution
from bilevel.base import LinearSolver as LinearSolver
from bilevel.base import Pullback as Pullback
from bilevel.base import Solution as Solution
from bilevel.check import check_hypergradient as check_hypergradient
from bilevel.check import check_problem as check_problem
from bilevel.core import threads as threads
from bilevel.core import tree as tree
from bilevel.core.status import BilevelWarning as BilevelWarning
from bilevel.core.status import HypergradientError as HypergradientError
from bilevel.core.status import Status as Status
from bilevel.hypergrad import Auto as Auto
from bilevel.hypergrad import ClosedForm as ClosedForm
from bilevel.hypergrad import FiniteDifference as FiniteDifference
from bilevel.hypergrad import FirstOrder as FirstOrder
from bilevel.hypergrad import FullUnroll as FullUnroll
from bilevel.hypergrad import Implicit as Implicit
from bilevel.hypergrad import OneStep as OneStep
from bilevel.hypergrad import Spectral as Spectral
from bilevel.hypergrad import TruncatedUnroll as TruncatedUnroll
from bilevel.hypergrad import hypergradient as hypergradient
from bilevel.hypergrad import solution as solution
from bilevel.inner import SGD as SGD
from bilevel.inner import Adam as Adam
from bilevel.inner import AdamW as AdamW
from bilevel.inner import AsymptoticSobolev as AsymptoticSobolev
from bilevel.inner import Chebyshev as Chebyshev
from bilevel.inner import FixedPoint as FixedPoint
from bilevel.inner import GradientDescent as GradientDescent
from bilevel.inner import HeavyBall as HeavyBall
from bilevel.inner import Nesterov as Nesterov
from bilevel.inner import Newton as Newton
from bilevel.inner import QuasiNewton as QuasiNewton
from bilevel.inner import RMSprop as RMSprop
from bilevel.inner import Sobolev as Sobolev
from bilevel.inner import TorchOptimizer as TorchOptimizer
from bilevel.linear import CG as CG
from bilevel.linear import GMRES as GMRES
from bilevel.linear import Direct as Direct
from bilevel.linear import FixedPointIteration as FixedPointIteration
from bilevel.linear import Neumann as Neumann
from bilevel.linear import Nystrom as Nystrom
from bilevel.networks.module_problem import ModuleProblem as ModuleProblem
from bilevel.networks.weight_decay import weight_decay as weight_decay
from bilevel.oracles.inner_problem import InnerProblem as InnerProblem
from bilevel.oracles.inner_problem import Linearization as Linearization
from bilevel.oracles.inner_problem import Preconditioner as Preconditioner
from bilevel.oracles.loaders import LoaderBatches as LoaderBatches
from bilevel.oracles.problem import BilevelProblem as BilevelProblem
from bilevel.oracles.samplers import MiniBatches as MiniBatches
from bilevel.oracles.samplers import Sampler as Sampler
from bilevel.oracles.stacking import stack as stack
from bilevel.oracles.tracing import trace as trace
from bilevel.outer import BatchOuterOptimizer as BatchOuterOptimizer
from bilevel.outer import BatchOuterResult as BatchOuterResult
from bilevel.outer import OuterOptimizer as OuterOptimizer
from bilevel.outer import ToleranceSchedule as ToleranceSchedule
from bilevel.outer import WarmStart as WarmStart
from bilevel.problems import QuadraticProblem as QuadraticProblem
