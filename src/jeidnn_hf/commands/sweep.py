"""``jeidnn sweep``."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from .train import parse_overrides

HELP = "train many lambdas, seeds and learning rates at once, at the cost of little more than one"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = "Any key of the file has an option of its own, such as --sweep.lambdas '[0.1, 1]'."
    parser.add_argument("config", type=Path, help="file with data, model, training and sweep")
    parser.add_argument("--output_dir", type=Path, help="instead of the file's")
    parser.set_defaults(parse_rest=parse_overrides)


def run(options: argparse.Namespace) -> None:
    from ..run_config import read_run_config
    from ..sweep import REPORT_NAME, SweepConfig, sweep, to_table

    config = read_run_config(options.config, SweepConfig, options.output_dir, options.rest)
    try:
        rows = sweep(config, quiet=options.json)
    except KeyboardInterrupt:
        raise ValueError("Interrupted; the same command goes on from the last epoch that was completed.") from None
    if options.json:
        print(json.dumps(rows, indent=1))
        return
    print(to_table(rows))
    print(f"written: {Path(config['output_dir']) / REPORT_NAME}")
