"""``python -m bilevel``, the same as the command ``bilevel``."""

from bilevel.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
