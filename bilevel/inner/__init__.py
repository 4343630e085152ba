"""Inner solvers: one file per method."""

from typing import Any

from bilevel.core.status import warn
from bilevel.inner.adam import Adam as Adam
from bilevel.inner.adam import AdamW as AdamW
from bilevel.inner.chebyshev import Chebyshev as Chebyshev
from bilevel.inner.coefficients import Coefficients as Coefficients
from bilevel.inner.coordinate_descent import CoordinateDescent as CoordinateDescent
from bilevel.inner.elementwise import ElementwiseSolver as ElementwiseSolver
from bilevel.inner.fixed_point import FixedPoint as FixedPoint
from bilevel.inner.gradient_descent import GradientDescent as GradientDescent
from bilevel.inner.heavy_ball import HeavyBall as HeavyBall
from bilevel.inner.multistep import LinearMultistep as LinearMultistep
from bilevel.inner.multistep import StepSizeMethod as StepSizeMethod
from bilevel.inner.nesterov import Nesterov as Nesterov
from bilevel.inner.newton import Newton as Newton
from bilevel.inner.preconditioned import PreconditionedGradientDescent as PreconditionedGradientDescent
from bilevel.inner.proximal import FISTA as FISTA
from bilevel.inner.proximal import ProximalGradient as ProximalGradient
from bilevel.inner.quasi_newton import QuasiNewton as QuasiNewton
from bilevel.inner.rmsprop import RMSprop as RMSprop
from bilevel.inner.sgd import SGD as SGD
from bilevel.inner.sobolev import AsymptoticSobolev as AsymptoticSobolev
from bilevel.inner.sobolev import Sobolev as Sobolev
from bilevel.inner.torch_optimizer import TorchOptimizer as TorchOptimizer


def __getattr__(name: str) -> Any:
    if name != "LeafwiseSolver":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    warn("`LeafwiseSolver` is now `ElementwiseSolver`.", DeprecationWarning)
    return ElementwiseSolver
