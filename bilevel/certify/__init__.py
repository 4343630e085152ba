"""How far a hypergradient is from the exact one: proved bounds where the problem offers them, estimates elsewhere."""

from bilevel.certify.certificate import ErrorBound as ErrorBound
from bilevel.certify.certificate import bound_error as bound_error
from bilevel.certify.certificate import certify_error as certify_error
from bilevel.certify.floor import rounding_floor as rounding_floor
from bilevel.certify.refine import ErrorEstimate as ErrorEstimate
from bilevel.certify.refine import Refinement as Refinement
from bilevel.certify.refine import refine as refine
