"""Inner solvers: one file per method."""

from bilevel.inner.adam import Adam as Adam
from bilevel.inner.chebyshev import Chebyshev as Chebyshev
from bilevel.inner.fixed_point import FixedPoint as FixedPoint
from bilevel.inner.gradient_descent import GradientDescent as GradientDescent
from bilevel.inner.heavy_ball import HeavyBall as HeavyBall
from bilevel.inner.multistep import Coefficients as Coefficients
from bilevel.inner.multistep import LinearMultistep as LinearMultistep
from bilevel.inner.multistep import StepSizeMethod as StepSizeMethod
from bilevel.inner.nesterov import Nesterov as Nesterov
from bilevel.inner.newton import Newton as Newton
from bilevel.inner.quasi_newton import QuasiNewton as QuasiNewton
from bilevel.inner.sobolev import AsymptoticSobolev as AsymptoticSobolev
from bilevel.inner.sobolev import Sobolev as Sobolev
