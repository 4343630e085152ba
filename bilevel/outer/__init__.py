"""The outer loop: descend hypergradients with any torch optimizer, one problem or rows of them."""

from bilevel.outer.hyper_lbfgs import HyperLBFGS as HyperLBFGS
from bilevel.outer.hyper_newton import HyperNewton as HyperNewton
from bilevel.outer.loop import BatchOuterOptimizer as BatchOuterOptimizer
from bilevel.outer.loop import OuterOptimizer as OuterOptimizer
from bilevel.outer.moves import MakeOptimizer as MakeOptimizer
from bilevel.outer.moves import MakeScheduler as MakeScheduler
from bilevel.outer.options import OuterOptions as OuterOptions
from bilevel.outer.records import BatchOuterResult as BatchOuterResult
from bilevel.outer.records import OuterResult as OuterResult
from bilevel.outer.records import Record as Record
from bilevel.outer.schedule import ToleranceSchedule as ToleranceSchedule
from bilevel.outer.single_loop import SingleLoop as SingleLoop
from bilevel.outer.state import WarmStart as WarmStart
from bilevel.outer.state import joined as joined
from bilevel.outer.state import separated as separated
from bilevel.outer.stochastic import SABA as SABA
from bilevel.outer.stochastic import SOBA as SOBA
from bilevel.outer.stochastic import StochasticMethod as StochasticMethod
from bilevel.outer.stopping import StoppingRules as StoppingRules
from bilevel.outer.stopping import no_descent as no_descent
from bilevel.outer.stopping import not_converged as not_converged
from bilevel.outer.stopping import with_remark as with_remark
from bilevel.outer.tuning import Tuned as Tuned
from bilevel.outer.tuning import tune as tune
