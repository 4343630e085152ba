"""Few rows are tuned on one thread of torch and of BLAS, whose numbers are given back."""

import numpy as np
import pytest
import torch
from threadpoolctl import threadpool_info, threadpool_limits

from bilevel.core.threads import TORCH
from bilevel.criteria import LinearData, Penalties, RidgeLeaveOneOut
from bilevel.selection.penalty_cv import penalty_cv


def blas() -> set[int]:
    return {each["num_threads"] for each in threadpool_info() if each["user_api"] == "blas"}


@pytest.mark.parametrize("fails", [False, True])
def test_few_rows_take_one_thread_and_give_the_number_back(monkeypatch, fails) -> None:
    X, noise = np.split(np.random.default_rng(0).standard_normal((20, 3)), [2], axis=1)
    criterion = RidgeLeaveOneOut(LinearData.of(X, X[:, 0] + noise[:, 0]), Penalties.scalar(2))
    seen, evaluate = [], RidgeLeaveOneOut.evaluate

    def spied(self, *args, **options):
        seen.append((torch.get_num_threads(), *blas()))
        if fails:
            raise ZeroDivisionError
        return evaluate(self, *args, **options)

    for name in TORCH:  # who sets them has chosen
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(RidgeLeaveOneOut, "evaluate", spied)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with threadpool_limits(2, user_api="blas"):
            if fails:
                with pytest.raises(ZeroDivisionError):
                    penalty_cv(criterion)
            else:
                penalty_cv(criterion)
            assert set(seen) == {(1, 1)}
            assert torch.get_num_threads() == 2
            assert blas() == {2}
    finally:
        torch.set_num_threads(before)
