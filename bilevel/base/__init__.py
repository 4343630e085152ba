"""The contracts: what an inner solver and a linear solver are, and what solvers and estimators return.

Parts never import each other; they meet in one call above, `bilevel.hypergradient`. Solvers and estimators are frozen
dataclasses of options; whatever changes is a value that is returned (`InnerState`, `Carry`).
"""

from bilevel.base.estimate import BatchEstimate as BatchEstimate
from bilevel.base.estimate import Carry as Carry
from bilevel.base.estimate import Certificate as Certificate
from bilevel.base.estimate import ErrorKind as ErrorKind
from bilevel.base.estimate import Estimate as Estimate
from bilevel.base.estimate import Pullback as Pullback
from bilevel.base.estimate import Solution as Solution
from bilevel.base.estimate import verdict_of as verdict_of
from bilevel.base.inner_solver import InnerSolver as InnerSolver
from bilevel.base.inner_solver import InnerState as InnerState
from bilevel.base.inner_solver import Variables as Variables
from bilevel.base.linear_solver import BLOW_UP as BLOW_UP
from bilevel.base.linear_solver import LinearSolution as LinearSolution
from bilevel.base.linear_solver import LinearSolver as LinearSolver
from bilevel.base.linear_solver import LinearSystem as LinearSystem
from bilevel.base.traits import Traits as Traits
from bilevel.core.options import describe as describe
