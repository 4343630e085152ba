"""Error estimates for hypergradients; rigorous bounds have their place here."""

from bilevel.certify.refine import ErrorEstimate as ErrorEstimate
from bilevel.certify.refine import refine as refine
