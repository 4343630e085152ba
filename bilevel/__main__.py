"""The command ``bilevel``, and ``python -m bilevel``: Ctrl-C has its answer before torch is loaded."""

from bilevel.core.interrupt import quiet_interrupt


def main() -> int:
    """Run the command line of this process."""
    with quiet_interrupt():
        from bilevel.cli import main as run
    return run()


if __name__ == "__main__":
    raise SystemExit(main())
