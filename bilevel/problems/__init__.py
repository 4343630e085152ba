"""Problems made from data, most with closed-form oracles, behind the interface of a `BilevelProblem`."""

from bilevel.problems.data_problem import DataProblem as DataProblem
from bilevel.problems.glm_problems import HuberProblem as HuberProblem
from bilevel.problems.glm_problems import LogisticProblem as LogisticProblem
from bilevel.problems.glm_problems import PoissonProblem as PoissonProblem
from bilevel.problems.glm_problems import SoftmaxProblem as SoftmaxProblem
from bilevel.problems.glm_problems import SquaredHingeProblem as SquaredHingeProblem
from bilevel.problems.lasso import ElasticNetProblem as ElasticNetProblem
from bilevel.problems.lasso import LassoProblem as LassoProblem
from bilevel.problems.linear_model import LinearModelProblem as LinearModelProblem
from bilevel.problems.losses import GLMLoss as GLMLoss
from bilevel.problems.losses import Huber as Huber
from bilevel.problems.losses import Logistic as Logistic
from bilevel.problems.losses import Poisson as Poisson
from bilevel.problems.losses import Softmax as Softmax
from bilevel.problems.losses import Squared as Squared
from bilevel.problems.losses import SquaredHinge as SquaredHinge
from bilevel.problems.mlp import MLPProblem as MLPProblem
from bilevel.problems.quadratic import QuadraticProblem as QuadraticProblem
from bilevel.problems.ridge import RidgeProblem as RidgeProblem
from bilevel.problems.sample_weights import SampleWeightProblem as SampleWeightProblem
