"""scikit-learn's linear models, with penalties that are tuned by a criterion and kept only where that generalises."""

from bilevel.sklearn.displays import PenaltiesDisplay as PenaltiesDisplay
from bilevel.sklearn.displays import TuningPathDisplay as TuningPathDisplay
from bilevel.sklearn.elastic_net import ElasticNetCV as ElasticNetCV
from bilevel.sklearn.elastic_net import LassoCV as LassoCV
from bilevel.sklearn.logistic import LogisticRegressionCV as LogisticRegressionCV
from bilevel.sklearn.report import TuningReport as TuningReport
from bilevel.sklearn.ridge import RidgeCV as RidgeCV
from bilevel.sklearn.sample_weights import SampleWeights as SampleWeights
from bilevel.sklearn.weight_report import WeightReport as WeightReport
