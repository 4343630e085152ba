"""The command ``bilevel``, and ``python -m bilevel``."""

import warnings

from bilevel.cli import main as run


def main() -> int:
    """Run the command line of this process."""
    # Python hides these from users; but a config that should say something else now is theirs.
    warnings.filterwarnings("default", category=DeprecationWarning, module=r"bilevel\.config\.")
    return run()


if __name__ == "__main__":
    raise SystemExit(main())
