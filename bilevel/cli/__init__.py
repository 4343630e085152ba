"""The command line: ``bilevel compare``, ``bilevel tune``, ``bilevel doctor``."""

from bilevel.cli.entry import main as main
