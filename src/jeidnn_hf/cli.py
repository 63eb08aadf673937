"""The ``jeidnn`` command. Exit status: 0 done, 1 failed, 2 wrong usage; an error is one line."""

from __future__ import annotations

import argparse
import sys
import warnings
from collections.abc import Callable, Sequence
from importlib import import_module

from . import __version__

COMMANDS = (
    "demo", "backbones", "costs", "train", "sweep", "evaluate", "figures", "compare", "predict", "app", "card", "push",
    "convert", "export", "doctor",
)  # fmt: skip
"""Modules of `commands`, each with ``HELP``, ``add_arguments(parser)`` and ``run(options)``."""


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="jeidnn", description="Early-exit image classifiers.")
    parser.add_argument("--version", action="version", version=f"jeidnn-hf {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name in COMMANDS:
        command = import_module(f".commands.{name}", __package__)
        add_command(commands.add_parser(name, help=command.HELP), command)
    options = parse_options(parser, argv)
    warnings.filterwarnings("ignore", message=".*torch.jit.script.*", category=FutureWarning)  # timm's, on import
    return exit_status(f"jeidnn {options.command}", lambda: options.run(options), debug=options.debug)


def add_command(parser: argparse.ArgumentParser, command) -> None:
    """The options of a module of `commands`, and those that all have; ``options.run(options)`` does the work."""
    parser.set_defaults(run=command.run)
    command.add_arguments(parser)
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")


def parse_options(parser: argparse.ArgumentParser, argv: Sequence[str] | None) -> argparse.Namespace:
    """As ``parser.parse_args``, but a command may read in ``parse_rest`` what argparse does not know."""
    options, rest = parser.parse_known_args(argv)
    if not hasattr(options, "parse_rest"):
        if rest:
            parser.error(f"unrecognized arguments: {' '.join(rest)}")
        return options
    try:
        options.rest = options.parse_rest(rest)
    except ValueError as error:
        parser.error(str(error))
    return options


def exit_status(name: str, run: Callable[[], None], debug: bool = False) -> int:
    """Of ``run()``: 0, or 1 after what the user did wrong, told in one line on stderr.

    ``name`` begins the line; ``debug`` raises the error instead. Any other error is ours, and is raised.
    """
    try:
        run()
    except (ValueError, OSError, ImportError) as error:
        if debug:
            raise
        print(f"{name}: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    if "torch.distributed" in sys.modules:
        from .processes import exit_together

        exit_together()
    return 0


if __name__ == "__main__":
    sys.exit(main())
