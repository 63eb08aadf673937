"""``jeidnn backbones``."""

from __future__ import annotations

import argparse
import json

HELP = "list which of timm's networks can be cut at their exits"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--module", nargs="+", help="only these modules of timm; trying all takes minutes")


def run(options: argparse.Namespace) -> None:
    import dataclasses

    from ..backbones.survey import survey

    rows = []
    for row in survey(options.module):
        rows.append(row)
        if not options.json:
            what = row.reason or row.view
            print(f"{row.module:<24} {row.model:<40} {row.kind:<8} {row.exits:>3}  {what}", flush=True)
    if options.json:
        print(json.dumps([dataclasses.asdict(row) for row in rows], indent=1))
    else:
        print(f"{sum(row.exits > 0 for row in rows)} of {len(rows)} can be cut at their exits.")
