"""The growth curves as pictures."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from contest import MEMORY_FLOOR

AXES = {
    "growth of steps": "inner steps",
    "growth of parameters": "parameters",
    "growth of hyperparameters": "hyperparameters",
}


def draw(contests: Mapping[str, Any], folder: Path) -> list[str]:
    """Draw time and memory of every growth contest into one picture.

    Args:
        contests: by name, as `report.store` keeps them.
        folder: where the picture goes.

    Returns:
        Lines of Markdown that show it; none without a growth contest.
    """
    shown = [contest for contest in contests.values() if contest["key"] in AXES]
    if not shown:
        return []
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(2, len(shown), figsize=(4.6 * len(shown), 7.2), squeeze=False, layout="constrained")
    for column, contest in zip(axes.T, shown, strict=True):
        lines(column, contest)
        column[0].set_title(contest["title"], fontsize=10)
        column[1].set_xlabel(AXES[contest["key"]])
        column[0].legend(fontsize=7)
    axes[0, 0].set_ylabel("CPU seconds")
    axes[1, 0].set_ylabel("memory of a warm call, MB")
    folder.mkdir(parents=True, exist_ok=True)
    figure.savefig(folder / "benchmark_growth.png", dpi=110)
    plt.close(figure)
    text = [f"- {contest['title']}: {contest['words']}" for contest in shown]
    return [f"![Growth of time and memory]({folder.name}/benchmark_growth.png)", "", *text, "", FLOOR_NOTE]


FLOOR_NOTE = f"Memory below {MEMORY_FLOOR / 2**20:g} MB cannot be told from the allocator's slack and is drawn there."


def lines(column: Any, contest: Mapping[str, Any]) -> None:
    """Draw one contest: time above, memory below; ours are solid, peers dashed."""
    names = dict.fromkeys(row["name"] for row in contest["rows"] if row["status"] == "ok")
    for name in names:
        rows = [row for row in contest["rows"] if row["name"] == name and row["status"] == "ok"]
        x = [int(row["task"]) for row in rows]
        style = {"linestyle": "-" if rows[0]["ours"] else "--", "marker": ".", "label": name}
        column[0].loglog(x, [row["cpu"] for row in rows], **style)
        column[1].loglog(x, [max(row["memory"], MEMORY_FLOOR) / 2**20 for row in rows], **style)
