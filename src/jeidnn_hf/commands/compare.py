"""``jeidnn compare``."""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path

from .train import parse_overrides

HELP = "train and measure all methods on the same features, and say which wins"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = "Any key of the file has an option of its own, such as --compare.seeds '[0]' or --data.views 2."
    parser.add_argument("config", type=Path, help="file with data, model and compare")
    parser.add_argument("--output_dir", type=Path, help="instead of the file's")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes at once; default, one per core")
    parser.add_argument("--no_figures", action="store_true", help="write the tables only")
    parser.add_argument(
        "--reproduce", action="store_true", help="also measure what the published comparison did otherwise"
    )
    parser.set_defaults(parse_rest=parse_overrides)


def run(options: argparse.Namespace) -> None:
    from ..compare import JUDGED_BY, CompareConfig, compare, draw_comparison, plain_runs
    from ..comparison_report import summarise, to_markdown
    from ..files import write_text
    from ..run_config import read_run_config
    from ..runs import RunFolder

    if options.jobs < 1:
        raise ValueError(f"Expected --jobs of at least 1, but got {options.jobs}.")
    config = read_run_config(options.config, CompareConfig, options.output_dir, options.rest)
    plain = plain_runs(config) if options.reproduce else []
    curves = compare(config, options.jobs, quiet=options.json)
    run = RunFolder(config["output_dir"])
    backbone = run.native_accuracy(run.model(run.names[0]), *JUDGED_BY)
    summary = summarise(curves, backbone)
    write_text(run.folder / "comparison.json", json.dumps(summary, indent=1))
    page = to_markdown(summary, f"{config['data']['dataset']} on {config['model']['backbone']}")
    write_text(run.folder / "comparison.md", page)
    files = [] if options.no_figures else draw_comparison(run.folder, backbone)
    if options.reproduce:
        from ..reproduction import reproduce
        from ..reproduction import to_markdown as reproduction_page

        rows = reproduce(run.folder, *plain)
        write_text(run.folder / "reproduction.json", json.dumps(rows, indent=1))
        write_text(run.folder / "reproduction.md", reproduction_page(rows))
        files.append(run.folder / "reproduction.md")
    if options.json:
        print(json.dumps(summary, indent=1))
        return
    print(page)
    print(f"written: {run.folder / 'comparison.md'}, {run.folder / 'comparison.json'}", *files[-1:], sep="\n")
