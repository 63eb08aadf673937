"""``jeidnn evaluate``."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

HELP = "evaluate every model of a run folder on its test images"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run_dir", type=Path, help="output_dir of jeidnn train")
    parser.add_argument("--num-lambdas", type=int, default=20, help="of a checkpoint for a range of lambdas")
    parser.add_argument("--speed-images", type=int, default=0, help="images to time with and without early exit")


def run(options: argparse.Namespace) -> None:
    from ..runs import budget_table, evaluate_run

    summary = evaluate_run(
        options.run_dir, num_lambdas=options.num_lambdas, speed_images=options.speed_images, quiet=options.json
    )
    if options.json:
        print(json.dumps(summary, indent=1))
        return
    print(f"{summary['dataset']}: test accuracy (%) at a share of the backbone's Mul-Adds, by interpolation\n")
    print(budget_table(summary))
    for name, speed in summary["speed"].items():
        print(
            "{name}, lambda {lam:.4g}: {early:.0f} images/s with early exit, {full:.0f} without; {mul_adds:.3f} of the "
            "Mul-Adds; same exits and classes: {agree:.4f}".format(name=name, **speed)
        )
    print(f"\nwritten: {options.run_dir / 'reports'}, {options.run_dir / 'evaluation.json'}")
