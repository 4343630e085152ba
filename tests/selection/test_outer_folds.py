"""Folds of the outer loop."""

from __future__ import annotations

import numpy as np
import pytest

from bilevel.selection import make_folds


def held(folds: list) -> np.ndarray:
    """Return the fold that holds out each row."""
    owner = np.full(sum(len(part) for _, part in folds), -1)
    for index, (train, part) in enumerate(folds):
        assert (owner[part] == -1).all()
        owner[part] = index
        assert sorted([*train, *part]) == list(range(len(owner)))
    return owner


def test_every_row_is_held_out_once_and_sizes_differ_by_one_at_most() -> None:
    assert sorted(np.bincount(held(make_folds(23, 5)))) == [4, 4, 5, 5, 5]
    assert held(make_folds(7, 3, ordered=True)).tolist() == [0, 0, 0, 1, 1, 2, 2]


def test_classes_are_spread_evenly() -> None:
    labels = np.r_[np.zeros(33), np.ones(12), np.full(5, 2)]
    owner = held(make_folds(50, 5, labels=labels))
    for label in range(3):
        counts = np.bincount(owner[labels == label], minlength=5)
        assert counts.max() - counts.min() <= 1


def test_groups_are_held_out_whole() -> None:
    groups = np.array(["a", "b", "c", "d", "e", "f"])[np.random.default_rng(0).integers(0, 6, 60)]
    owner = held(make_folds(60, 3, groups=groups))
    assert all(len(set(owner[groups == name])) == 1 for name in set(groups))
    assert np.bincount(owner).min() >= 10


def test_a_seed_makes_the_same_folds() -> None:
    assert (held(make_folds(40, 4, seed=1)) == held(make_folds(40, 4, seed=1))).all()
    assert (held(make_folds(40, 4, seed=1)) != held(make_folds(40, 4, seed=2))).any()


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"folds": 1}, "`folds` must be from 2 to 6, the number of rows, got 1."),
        ({"folds": 7}, "the number of rows, got 7."),
        ({"folds": 3, "groups": [0, 0, 0, 1, 1, 1]}, "the number of groups of rows, got 3."),
        ({"folds": 2, "groups": [0, 1]}, "must name the group of each of the 6 rows, got 2."),
    ],
)
def test_folds_that_cannot_be_made_are_refused(options: dict, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        make_folds(6, **options)
