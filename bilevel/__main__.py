"""The command ``bilevel``, and ``python -m bilevel``."""

import warnings

from bilevel.cli import main as run


def main() -> int:
    """Run the command line of this process."""
    # What a config should say in another way is said once, though it is read several times.
    warnings.filterwarnings("once", category=DeprecationWarning, module="__main__")
    return run()


if __name__ == "__main__":
    raise SystemExit(main())
