"""The comparison: estimators x problems x seeds inside one outer loop, resumable, with tables and figures."""

from bilevel.compare.figures import draw_figures as draw_figures
from bilevel.compare.folder import RunFolder as RunFolder
from bilevel.compare.folder import RunFolderError as RunFolderError
from bilevel.compare.folder import locked as locked
from bilevel.compare.plan import Plan as Plan
from bilevel.compare.plan import Setup as Setup
from bilevel.compare.run import Comparison as Comparison
from bilevel.compare.run import compare as compare
from bilevel.compare.summary import JUDGING as JUDGING
from bilevel.compare.summary import summarize as summarize
from bilevel.compare.summary import tables as tables
from bilevel.compare.tuning import tune_beside as tune_beside
from bilevel.compare.tuning import tuning_table as tuning_table
from bilevel.core.environment import describe_environment as describe_environment
from bilevel.outer import OuterOptions as OuterOptions
