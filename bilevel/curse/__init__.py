"""The curse of unrolling, measured: the experiments of both papers as typed plans, their figures and claims.

S is Scieur et al. 2022, "The Curse of Unrolling"; M is Mehmood et al. 2026, "Understanding the Curse of Unrolling".
"""

from bilevel.curse.comparison import Methods as Methods
from bilevel.curse.equal_budget import EqualBudget as EqualBudget
from bilevel.curse.folder import write_outcome as write_outcome
from bilevel.curse.outcome import Claim as Claim
from bilevel.curse.outcome import Experiment as Experiment
from bilevel.curse.outcome import Line as Line
from bilevel.curse.outcome import Outcome as Outcome
from bilevel.curse.outcome import Panel as Panel
from bilevel.curse.outcome import Table as Table
from bilevel.curse.outer_loop import InnerSolvers as InnerSolvers
from bilevel.curse.outer_loop import WarmStarts as WarmStarts
from bilevel.curse.truncation import Contraction as Contraction
from bilevel.curse.truncation import Truncation as Truncation
from bilevel.curse.worst_case import WorstCase as WorstCase
