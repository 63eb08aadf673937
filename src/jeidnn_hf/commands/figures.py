"""``jeidnn figures``."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

HELP = "draw the figures and tables of an evaluated run folder"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run_dir", type=Path)
    parser.add_argument("--output_dir", type=Path, help="default: RUN_DIR/figures")
    parser.add_argument("--formats", nargs="+", choices=["png", "svg"], default=["png", "svg"])


def run(options: argparse.Namespace) -> None:
    from ..runs import draw_run

    folder = options.output_dir or options.run_dir / "figures"
    paths = draw_run(options.run_dir, folder, options.formats)
    print(json.dumps([str(path) for path in paths], indent=1) if options.json else f"{len(paths)} files in {folder}")
