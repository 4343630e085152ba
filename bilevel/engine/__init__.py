"""What estimators share: a run of inner steps, the way back over them, and what is said of both.

From a call to one inner step and back, here of `FullUnroll`; each line is called by the one above it that stands
further left:

    hypergrad.hypergradient.hypergradient    looks at the arguments (`checks`), makes a `Run` (`estimator`)
      attempt.attempt                        solve, outer loss, pullback, the sum of both gradients; failures: verdicts
        FullUnroll.solve(run)
          flat.flat_run                      the run on flat vectors, or None: then `loop.run_inner`
            inner.kernels()                  the problem's own, or those of its loss, `recorded_kernels.recorded`
            lean.Plan.between                the steps as stretches, each of one form
            Doubled.forward, Steps.forward   K steps; what the way back needs stays
            loop.conclude                    residuals at both ends; `judge`: the verdict
        Solution.pullback(outer gradient)    back over the same stretches, the last one first
          Doubled.backward, Steps.backward   K products ``H' v``; the sum of ``C' v`` at their end
      evidence.confirmed                     `derivatives` and `kinks`: is the result what it claims to be?

There are three forms of a step, and a certificate names the one that was taken (`form`). They give the same iterates:

    form              taken where                                                 one step is
    ----------------  ----------------------------------------------------------  ---------------------------------
    doubled           the gradient is ``H x + b`` (`Kernels.affine`), many steps  a share of some products of
    (`affine`)        share their numbers, and sums lose no digits (`doubles`)    matrices, all steps together
    flat, recorded    the problem has kernels, or its loss could be recorded      one kernel for the gradient, one
    (`lean`)                                                                      small product for the rest
    step by step      all else: solvers with a step of their own, proximal        ``solver.step(inner, state)``, with
    (`loop`)          terms, rows that end each by itself, runs that overflow     a tree and a state for each

A solver says what its steps are by `coefficients`, a problem what its gradient is by `kernels`; nobody asks for types.
What is refused on the way (a loss that is not recorded, a run that overflows) goes on as the next form, from the start.

    run and way back   estimator, attempt; flat, affine, lean; loop (one problem), rows_loop (rows, and their way back),
                       one_by_one (a batch as a loop of calls); checkpointing (states made again on the way back)
    end of a run       tolerance (when it is reached, when rounding is), judge (a failure, its step, what leads away),
                       kinks (steps that cannot settle)
    around it          checks (arguments), not_finite (what made it so), derivatives and derivative_lines (whether those
                       of the losses are right)
"""
