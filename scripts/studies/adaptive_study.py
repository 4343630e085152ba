"""How good adaptive truncation is at equal budget: `bilevel.curse.EqualBudget` with ill-conditioned problems besides.

Writes the figure, the draws and claims.md with all tables, as ``bilevel curse configs/curse/equal_budget.yaml`` does.

    python scripts/studies/adaptive_study.py --draws 4 --out runs/adaptive
"""

from __future__ import annotations

import argparse
from dataclasses import asdict
from pathlib import Path

import torch

from bilevel.curse import EqualBudget, write_outcome
from bilevel.curse.draws import FAMILIES


def main() -> None:
    """Run the study and write its results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--draws", type=int, default=4, help="draws of each setting (default 4)")
    parser.add_argument("--seed", type=int, default=300, help="of the first draw of each setting (default 300)")
    parser.add_argument("--out", type=Path, default=Path("runs/adaptive"), help="folder of the results")
    options = parser.parse_args()
    torch.set_num_threads(1)
    plan = EqualBudget(families=FAMILIES, draws=options.draws, seed=options.seed)
    write_outcome("adaptive", plan.run(), options.out, {"experiment": "EqualBudget"} | asdict(plan))
    print((options.out / "claims.md").read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
