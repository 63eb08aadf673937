"""``jeidnn demo``."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

HELP = "train, evaluate and plot a small early-exit network on the digits"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--output_dir", type=Path, default=Path("demo_output"))
    parser.add_argument("--seed", type=int, default=0)


def run(options: argparse.Namespace) -> None:
    from ..demo import run_demo

    rows = run_demo(options.output_dir, seed=options.seed, quiet=options.json)
    if options.json:
        print(json.dumps(rows, indent=1))
