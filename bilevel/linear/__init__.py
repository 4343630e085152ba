"""Linear solvers: one file per method."""

from bilevel.linear.cg import CG as CG
from bilevel.linear.direct import Direct as Direct
from bilevel.linear.gmres import GMRES as GMRES
from bilevel.linear.nystrom import Nystrom as Nystrom
from bilevel.linear.richardson import FixedPointIteration as FixedPointIteration
from bilevel.linear.richardson import Neumann as Neumann
