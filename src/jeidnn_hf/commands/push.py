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
    parser.add_argument("--space", action="store_true", help="also push a Space of that name that serves `jeidnn app`")


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
    if options.space:
        from ..space import push_space

        where = {"revision": options.revision, "private": options.private or None}
        row["space"] = str(push_space(options.repo_id, options.subfolder, **where).repo_url)
    if options.json:
        print(json.dumps(row, indent=1))
        return
    print(f"{options.folder}: pushed to {commit.commit_url}")
    if options.space:
        print(f"its Space: {row['space']}")
