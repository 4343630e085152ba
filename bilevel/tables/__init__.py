"""A front door for tables: penalties tuned by folds with a guard, models in files, predictions of new rows."""

from bilevel.data.load import Rows as Rows
from bilevel.data.load import load_rows as load_rows
from bilevel.data.table import TableOptions as TableOptions
from bilevel.tables.model import Predictions as Predictions
from bilevel.tables.model import TableModel as TableModel
from bilevel.tables.scores import Score as Score
from bilevel.tables.tune import ALIASES as ALIASES
from bilevel.tables.tune import PENALTIES as PENALTIES
from bilevel.tables.tune import FoldOptions as FoldOptions
from bilevel.tables.tune import TunedTable as TunedTable
from bilevel.tables.tune import tune_rows as tune_rows
