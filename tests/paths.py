"""Where things lie in the tree."""

from pathlib import Path

TESTS = Path(__file__).parent
ROOT = TESTS.parent
CONFIGS = ROOT / "configs"
SCRIPTS = ROOT / "scripts"
STUDIES = SCRIPTS / "studies"
BENCH = SCRIPTS / "bench"
