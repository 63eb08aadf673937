"""``jeidnn convert``."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

HELP = "convert a checkpoint of T2T-ViT or of the original JEI-DNN code"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", type=Path, help="torch file")
    parser.add_argument("output_dir", type=Path)
    parser.add_argument("--backbone", required=True, help="t2t_vit_7 or t2t_vit_14")
    parser.add_argument("--lam", type=float, help="lambda of a JEI-DNN checkpoint")


def run(options: argparse.Namespace) -> None:
    from ..convert import convert

    done = convert(options.source, options.output_dir, options.backbone, options.lam)
    print(json.dumps({"done": done}) if options.json else done)
