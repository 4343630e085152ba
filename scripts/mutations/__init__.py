"""The breaks that scripts/mutation.py makes, by the rooms of the library."""

from __future__ import annotations

from .estimators import ESTIMATORS
from .evidence import EVIDENCE
from .inputs import INPUTS
from .loops import LOOPS
from .row import Break
from .searches import SEARCHES
from .selection import SELECTION
from .solvers import SOLVERS
from .verdicts import VERDICTS

BREAKS: tuple[Break, ...] = (*SOLVERS, *ESTIMATORS, *EVIDENCE, *VERDICTS, *LOOPS, *SEARCHES, *SELECTION, *INPUTS)
"""All rows, each with a name of its own."""
