"""Where things lie in the tree."""

import importlib.util
import sys
from pathlib import Path
from typing import Any

TESTS = Path(__file__).parent
ROOT = TESTS.parent
CONFIGS = ROOT / "configs"
SCRIPTS = ROOT / "scripts"
STUDIES = SCRIPTS / "studies"
BENCH = SCRIPTS / "bench"


def study(name: str) -> Any:
    """A file of the folder of studies as a module."""
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, STUDIES / f"{name}.py")
        assert spec is not None
        assert spec.loader is not None
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]
