"""What is known of unrolled derivatives: bounds, rates, peaks, budgets, residual polynomials.

S is Scieur et al. 2022 ("The Curse of Unrolling"), M is Mehmood et al. 2026 ("Understanding the Curse of Unrolling").
"""

from bilevel.numerics.polynomials import SobolevCoefficients as SobolevCoefficients
from bilevel.theory.bounds import accumulated_bound as accumulated_bound
from bilevel.theory.bounds import iterate_bound as iterate_bound
from bilevel.theory.bounds import late_start_bound as late_start_bound
from bilevel.theory.bounds import unroll_bound as unroll_bound
from bilevel.theory.budget import Budget as Budget
from bilevel.theory.budget import budget as budget
from bilevel.theory.budget import optimal_truncation as optimal_truncation
from bilevel.theory.budget import split_budget as split_budget
from bilevel.theory.constants import Constants as Constants
from bilevel.theory.constants import EstimatedConstants as EstimatedConstants
from bilevel.theory.constants import contraction_constants as contraction_constants
from bilevel.theory.constants import estimate_constants as estimate_constants
from bilevel.theory.curves import ErrorCurves as ErrorCurves
from bilevel.theory.curves import error_curves as error_curves
from bilevel.theory.polynomials import chebyshev_coefficients as chebyshev_coefficients
from bilevel.theory.polynomials import residual_polynomial as residual_polynomial
from bilevel.theory.polynomials import sobolev_coefficients as sobolev_coefficients
from bilevel.theory.quadratic_batch import QuadraticBatch as QuadraticBatch
from bilevel.theory.rates import Peak as Peak
from bilevel.theory.rates import chebyshev_peak as chebyshev_peak
from bilevel.theory.rates import chebyshev_rate as chebyshev_rate
from bilevel.theory.rates import curse_peak as curse_peak
from bilevel.theory.rates import gd_monotone_step_size as gd_monotone_step_size
from bilevel.theory.rates import gd_peak as gd_peak
from bilevel.theory.rates import gd_rate as gd_rate
from bilevel.theory.rates import lower_bound as lower_bound
from bilevel.theory.rates import minimax_error as minimax_error
from bilevel.theory.rates import worst_case_curve as worst_case_curve
