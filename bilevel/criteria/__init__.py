"""Criteria of linear models in closed form: what tuned penalties are judged by, with exact derivatives."""

from bilevel.criteria.approximate import ApproximateLeaveOneOut as ApproximateLeaveOneOut
from bilevel.criteria.choose import choose_criterion as choose_criterion
from bilevel.criteria.criterion import Criterion as Criterion
from bilevel.criteria.criterion import Evaluation as Evaluation
from bilevel.criteria.criterion import Fit as Fit
from bilevel.criteria.data import LinearData as LinearData
from bilevel.criteria.evidence import Evidence as Evidence
from bilevel.criteria.folds import KFold as KFold
from bilevel.criteria.gram_folds import RidgeFolds as RidgeFolds
from bilevel.criteria.leave_one_out import RidgeLeaveOneOut as RidgeLeaveOneOut
from bilevel.criteria.penalties import Penalties as Penalties
