"""Numerical methods on plain matrices and operators: they know nothing of bilevel problems."""
