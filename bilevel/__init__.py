"""Bilevel hyperparameter optimization in PyTorch: hypergradients that carry their own evidence.

A name is imported from its room when it is first used, so that `import bilevel` loads nothing and changes nothing.
"""

from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from bilevel import criteria as criteria
    from bilevel import meta as meta
    from bilevel import problems as problems
    from bilevel import selection as selection
    from bilevel import theory as theory
    from bilevel.base import BatchEstimate as BatchEstimate
    from bilevel.base import Carry as Carry
    from bilevel.base import Certificate as Certificate
    from bilevel.base import Estimate as Estimate
    from bilevel.base import InnerSolver as InnerSolver
    from bilevel.base import InnerState as InnerState
    from bilevel.base import LinearSolution as LinearSolution
    from bilevel.base import LinearSolver as LinearSolver
    from bilevel.base import LinearSystem as LinearSystem
    from bilevel.base import Pullback as Pullback
    from bilevel.base import Solution as Solution
    from bilevel.base import Traits as Traits
    from bilevel.check import check_hypergradient as check_hypergradient
    from bilevel.check import check_problem as check_problem
    from bilevel.core import threads as threads
    from bilevel.core import tree as tree
    from bilevel.core.status import BilevelWarning as BilevelWarning
    from bilevel.core.status import HypergradientError as HypergradientError
    from bilevel.core.status import Status as Status
    from bilevel.core.status import Verdict as Verdict
    from bilevel.engine.estimator import HypergradEstimator as HypergradEstimator
    from bilevel.engine.estimator import Run as Run
    from bilevel.engine.judge import InnerRun as InnerRun
    from bilevel.hypergrad import AdaptiveUnroll as AdaptiveUnroll
    from bilevel.hypergrad import Auto as Auto
    from bilevel.hypergrad import BalancedImplicit as BalancedImplicit
    from bilevel.hypergrad import ClosedForm as ClosedForm
    from bilevel.hypergrad import FiniteDifference as FiniteDifference
    from bilevel.hypergrad import FirstOrder as FirstOrder
    from bilevel.hypergrad import FullUnroll as FullUnroll
    from bilevel.hypergrad import Implicit as Implicit
    from bilevel.hypergrad import OneStep as OneStep
    from bilevel.hypergrad import Spectral as Spectral
    from bilevel.hypergrad import TruncatedUnroll as TruncatedUnroll
    from bilevel.hypergrad import solution as solution
    from bilevel.hypergrad.hypergradient import hypergradient as hypergradient
    from bilevel.inner import FISTA as FISTA
    from bilevel.inner import SGD as SGD
    from bilevel.inner import Adam as Adam
    from bilevel.inner import AdamW as AdamW
    from bilevel.inner import AsymptoticSobolev as AsymptoticSobolev
    from bilevel.inner import Chebyshev as Chebyshev
    from bilevel.inner import Coefficients as Coefficients
    from bilevel.inner import CoordinateDescent as CoordinateDescent
    from bilevel.inner import FixedPoint as FixedPoint
    from bilevel.inner import GradientDescent as GradientDescent
    from bilevel.inner import HeavyBall as HeavyBall
    from bilevel.inner import LinearMultistep as LinearMultistep
    from bilevel.inner import Nesterov as Nesterov
    from bilevel.inner import Newton as Newton
    from bilevel.inner import PreconditionedGradientDescent as PreconditionedGradientDescent
    from bilevel.inner import ProximalGradient as ProximalGradient
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
    from bilevel.oracles.folds import folds as folds
    from bilevel.oracles.inner_problem import InnerProblem as InnerProblem
    from bilevel.oracles.inner_problem import Linearization as Linearization
    from bilevel.oracles.inner_problem import Preconditioner as Preconditioner
    from bilevel.oracles.loaders import LoaderBatches as LoaderBatches
    from bilevel.oracles.nonsmooth import L1 as L1
    from bilevel.oracles.nonsmooth import ElasticNet as ElasticNet
    from bilevel.oracles.nonsmooth import GroupLasso as GroupLasso
    from bilevel.oracles.nonsmooth import NonNegative as NonNegative
    from bilevel.oracles.nonsmooth import Nonsmooth as Nonsmooth
    from bilevel.oracles.problem import BilevelProblem as BilevelProblem
    from bilevel.oracles.samplers import MiniBatches as MiniBatches
    from bilevel.oracles.samplers import Sampler as Sampler
    from bilevel.oracles.stacking import stack as stack
    from bilevel.oracles.structure import Structure as Structure
    from bilevel.oracles.tracing import trace as trace
    from bilevel.outer import SABA as SABA
    from bilevel.outer import SOBA as SOBA
    from bilevel.outer import BatchOuterOptimizer as BatchOuterOptimizer
    from bilevel.outer import BatchOuterResult as BatchOuterResult
    from bilevel.outer import HyperLBFGS as HyperLBFGS
    from bilevel.outer import HyperNewton as HyperNewton
    from bilevel.outer import OuterOptimizer as OuterOptimizer
    from bilevel.outer import SingleLoop as SingleLoop
    from bilevel.outer import StochasticMethod as StochasticMethod
    from bilevel.outer import ToleranceSchedule as ToleranceSchedule
    from bilevel.outer import Tuned as Tuned
    from bilevel.outer import WarmStart as WarmStart
    from bilevel.outer import tune as tune
    from bilevel.problems import QuadraticProblem as QuadraticProblem

    __version__: str

_NAMES = {
    "base": (
        "BatchEstimate Carry Certificate Estimate InnerSolver InnerState LinearSolution LinearSolver "
        " LinearSystem Pullback Solution Traits"
    ),
    "check": "check_hypergradient check_problem",
    "core.status": "BilevelWarning HypergradientError Status Verdict",
    "engine.estimator": "HypergradEstimator Run",
    "engine.judge": "InnerRun",
    "hypergrad": (
        "AdaptiveUnroll Auto BalancedImplicit ClosedForm FiniteDifference FirstOrder FullUnroll Implicit OneStep "
        "Spectral TruncatedUnroll hypergradient solution"
    ),
    "inner": (
        "Adam AdamW AsymptoticSobolev Chebyshev Coefficients CoordinateDescent FISTA FixedPoint GradientDescent "
        "HeavyBall LinearMultistep Nesterov Newton PreconditionedGradientDescent ProximalGradient QuasiNewton RMSprop "
        "SGD Sobolev TorchOptimizer"
    ),
    "linear": "CG Direct FixedPointIteration GMRES Neumann Nystrom",
    "networks.module_problem": "ModuleProblem",
    "networks.weight_decay": "weight_decay",
    "oracles.folds": "folds",
    "oracles.inner_problem": "InnerProblem Linearization Preconditioner",
    "oracles.loaders": "LoaderBatches",
    "oracles.nonsmooth": "ElasticNet GroupLasso L1 NonNegative Nonsmooth",
    "oracles.problem": "BilevelProblem",
    "oracles.samplers": "MiniBatches Sampler",
    "oracles.stacking": "stack",
    "oracles.structure": "Structure",
    "oracles.tracing": "trace",
    "outer": "BatchOuterOptimizer BatchOuterResult HyperLBFGS HyperNewton OuterOptimizer SABA SOBA SingleLoop "
    "StochasticMethod ToleranceSchedule Tuned WarmStart tune",
    "problems": "QuadraticProblem",
}
"""The public names of each module."""
_HOME = {name: f"{__name__}.{module}" for module, names in _NAMES.items() for name in names.split()}
_MODULES = {
    **{name: name for name in ("criteria", "meta", "problems", "selection", "theory")},
    "threads": "core.threads",
    "tree": "core.tree",
}
"""Public modules."""
_OLD = ("begin", "run_inner")
"""Functions of `engine.loop` that were public, and forward for one release."""

__all__ = sorted([*_HOME, *_MODULES])

if not TYPE_CHECKING:

    def __getattr__(name):
        """Import a public name, or a room, and keep it."""
        if name == "__version__":
            from importlib.metadata import version

            value = version(__name__)
        elif name in _OLD:
            from bilevel.core.status import warn

            warn(f"bilevel.{name} is now a part of `Run.solve`: use run.solve().", DeprecationWarning)
            return getattr(import_module(f"{__name__}.engine.loop"), name)
        elif name in _HOME:
            value = getattr(import_module(_HOME[name]), name)
        else:
            module = f"{__name__}.{_MODULES.get(name, name)}"
            if name.startswith("_") or find_spec(module) is None:
                raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
            value = import_module(module)
        globals()[name] = value
        return value


def __dir__() -> list[str]:
    return __all__
