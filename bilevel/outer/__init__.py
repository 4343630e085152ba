"""The outer loop: descend hypergradients with any torch optimizer, one problem or a batch of them."""

from bilevel.outer.batch import BatchOuterOptimizer as BatchOuterOptimizer
from bilevel.outer.batch import BatchOuterResult as BatchOuterResult
from bilevel.outer.loop import MakeOptimizer as MakeOptimizer
from bilevel.outer.loop import MakeScheduler as MakeScheduler
from bilevel.outer.loop import OuterOptimizer as OuterOptimizer
from bilevel.outer.loop import WarmStart as WarmStart
from bilevel.outer.records import OuterResult as OuterResult
from bilevel.outer.records import Record as Record
from bilevel.outer.records import StoppingRules as StoppingRules
from bilevel.outer.records import no_descent as no_descent
from bilevel.outer.records import not_converged as not_converged
from bilevel.outer.records import with_remark as with_remark
from bilevel.outer.schedule import ToleranceSchedule as ToleranceSchedule
