"""Hypergradient estimators, one file per family, and the two calls in which problem, solver and estimator meet."""

from bilevel.hypergrad.adaptive_unroll import AdaptiveUnroll as AdaptiveUnroll
from bilevel.hypergrad.auto import Auto as Auto
from bilevel.hypergrad.balanced_implicit import BalancedImplicit as BalancedImplicit
from bilevel.hypergrad.closed_form import ClosedForm as ClosedForm
from bilevel.hypergrad.finite_difference import FiniteDifference as FiniteDifference
from bilevel.hypergrad.first_order import FirstOrder as FirstOrder
from bilevel.hypergrad.hypergradient import hypergradient as hypergradient
from bilevel.hypergrad.implicit import Implicit as Implicit
from bilevel.hypergrad.layer import solution as solution
from bilevel.hypergrad.one_step import OneStep as OneStep
from bilevel.hypergrad.spectral import Spectral as Spectral
from bilevel.hypergrad.unroll import FullUnroll as FullUnroll
from bilevel.hypergrad.unroll import TruncatedUnroll as TruncatedUnroll
