"""``jeidnn train``; ``examples/train.py`` is the same for torchrun and accelerate."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

HELP = "train the exits of a frozen backbone, as a YAML or JSON file says"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = (
        "Any key of the file has an option of its own, such as --training.learning_rate 0.005, --data.data_dir DIR or "
        "--runs.RUN.model.lam 3; its value is read as JSON, else as YAML."
    )
    parser.add_argument("--config", type=Path, required=True, help="file with data, model, training and runs")
    parser.add_argument("--output_dir", type=Path, help="instead of the file's")
    parser.add_argument("--only", dest="runs", metavar="RUN", nargs="+", help="only these runs")
    parser.add_argument(
        "--dry_run", action="store_true", help="two steps per run on random images and weights; nothing is kept"
    )
    parser.set_defaults(parse_rest=parse_overrides)


def run(options: argparse.Namespace) -> None:
    from ..run_config import TrainConfig, read_run_config
    from ..training_runs import dry_run, train_runs

    config = read_run_config(options.config, TrainConfig, options.output_dir, options.rest)
    rows = (dry_run if options.dry_run else train_runs)(config, options.runs, quiet=options.json)
    if options.json:
        print(json.dumps(rows, indent=1))


def parse_overrides(arguments: Sequence[str]) -> dict[str, Any]:
    """``["--training.learning_rate", "5e-3", "--data.data_dir=images"]`` to dotted keys and values.

    A value is read as JSON, else as YAML: ``null``, ``true``, ``[2, 5]``, ``{crop_pct: 1.0}``. A ValueError for an
    option without a dot or without a value, or a value without an option.
    """
    overrides, rest = {}, list(arguments)
    while rest:
        option, given, text = rest.pop(0).partition("=")
        if not option.startswith("--") or "." not in option or not all(option[2:].split(".")):
            raise ValueError(f"Expected options such as --training.learning_rate 0.005, but got {option!r}.")
        if not given:
            if not rest or rest[0].startswith("--"):
                raise ValueError(f"Expected a value after {option}, but got none.")
            text = rest.pop(0)
        overrides[option[2:]] = _value(text, option)
    return overrides


def _value(text: str, option: str) -> Any:
    import yaml

    try:
        return json.loads(text)  # YAML takes 1e-3 for a word
    except ValueError:
        pass
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(f"Expected a value in YAML after {option}, but got {text!r}.") from error
