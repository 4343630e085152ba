"""Choose penalties of linear models: descend a criterion, and keep what an honest outer loop speaks for."""

from bilevel.selection.certified import RangeCertificate as RangeCertificate
from bilevel.selection.certified import certify_range as certify_range
from bilevel.selection.descend import Hyperprior as Hyperprior
from bilevel.selection.descend import Tuned as Tuned
from bilevel.selection.descend import tune as tune
from bilevel.selection.folds import make_folds as make_folds
from bilevel.selection.gate import Choice as Choice
from bilevel.selection.gate import choose as choose
from bilevel.selection.gate import kappa_of as kappa_of
from bilevel.selection.gate import one_se as one_se
from bilevel.selection.gate import paired as paired
from bilevel.selection.honest import HonestLosses as HonestLosses
from bilevel.selection.honest import nested as nested
from bilevel.selection.honest import second_level as second_level
from bilevel.selection.path import PathPoint as PathPoint
from bilevel.selection.path import path as path
from bilevel.selection.penalty_cv import penalty_cv as penalty_cv
from bilevel.selection.row_weights import RowWeights as RowWeights
from bilevel.selection.row_weights import learn_row_weights as learn_row_weights
from bilevel.selection.scalar import best_penalty as best_penalty
from bilevel.selection.selected import Node as Node
from bilevel.selection.selected import Selected as Selected
from bilevel.selection.stack import stack as stack
