"""One break of one line."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Break:
    """A line of the library, what to put in its place, and the tests that should notice.

    Attributes:
        name: for ``--only`` and the table.
        file: that holds the line, from the root of the tree.
        old: text that occurs exactly once there.
        new: what takes its place.
        tests: node ids by the bare names of files below tests/, separated by spaces.
    """

    name: str
    file: str
    old: str
    new: str
    tests: str
