"""``jeidnn push``; ``examples/push_to_hub.py`` pushes all runs of a folder."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

HELP = "push a saved model to the Hub"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", type=Path, help="where the model was saved")
    parser.add_argument("repo_id", help="org/name; created where there is none")
    parser.add_argument("--subfolder", help="folder of the repository to put it in")
    parser.add_argument("--revision", help="branch to push to")
    parser.add_argument("--private", action="store_true", help="make a new repository private")
    parser.add_argument("--push-code", action="store_true", help="send the code along, for trust_remote_code=True")


def run(options: argparse.Namespace) -> None:
    from transformers.utils.logging import disable_progress_bar

    from ..hub import push_folder

    disable_progress_bar()
    commit = push_folder(
        options.folder,
        options.repo_id,
        options.subfolder,
        revision=options.revision,
        private=options.private or None,
        push_code=options.push_code,
    )
    row = {"repo_id": options.repo_id, "subfolder": options.subfolder, "commit": commit.oid, "url": commit.commit_url}
    print(json.dumps(row, indent=1) if options.json else f"{options.folder}: pushed to {commit.commit_url}")
