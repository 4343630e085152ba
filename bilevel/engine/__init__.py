"""What estimators share: the loop of inner steps, the reverse sweep, checkpoints, tolerances, checks of the result."""
