"""The command ``bilevel``, and ``python -m bilevel``: Ctrl-C has its answer before torch is loaded."""

import warnings

from bilevel.core.interrupt import quiet_interrupt


def main() -> int:
    """Run the command line of this process."""
    # Python hides these from users; but a config that should say something else now is theirs.
    warnings.filterwarnings("default", category=DeprecationWarning, module=r"bilevel\.config\.")
    with quiet_interrupt():
        from bilevel.cli import main as run
    return run()


if __name__ == "__main__":
    raise SystemExit(main())
