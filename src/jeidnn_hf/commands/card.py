"""``jeidnn card``."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

HELP = "write the model card of a saved model, README.md, frontier.png and curve.json"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model_dir", type=Path, help="in an evaluated run folder, for the results")
    parser.add_argument("--output_dir", type=Path, help="default: MODEL_DIR")
    parser.add_argument("--repo-id", help="org/name, for the code that the card shows; default: MODEL_DIR")
    parser.add_argument("--license", help="id of the Hub, such as apache-2.0; default: that of timm's weights")


def run(options: argparse.Namespace) -> None:
    from ..runs import write_card_of

    paths = write_card_of(options.model_dir, options.output_dir, repo_id=options.repo_id, license=options.license)
    if options.json:
        print(json.dumps([str(path) for path in paths], indent=1))
        return
    print(f"written: {', '.join(map(str, paths))}")
    if len(paths) == 1:
        print("without results: there are no reports of this model; `jeidnn evaluate` makes them for a run folder")
