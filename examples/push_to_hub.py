"""Pushes what ``train.py`` saved in a folder: a repository per lambda, or one with a folder per lambda, and an index.

    python examples/push_to_hub.py runs/cifar10_t2t_vit_7 --org my-org
    python examples/push_to_hub.py runs/cifar10_t2t_vit_7 --org my-org --one-repo

The first makes ``my-org/jeidnn-t2t7-cifar10-lam1`` and so on; the second ``my-org/jeidnn-t2t7-cifar10`` with folders
``lam1`` and so on, for ``from_pretrained(..., subfolder="lam1")``. Either way ``my-org/jeidnn-t2t7-cifar10`` has the
index card. Log in first (``hf auth login``) or set ``HF_TOKEN``.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import yaml
from huggingface_hub import HfApi

from jeidnn_hf import JEIDNNConfig
from jeidnn_hf.hub import Place, build_repo_name, index_card, lam_name, push_folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="output_dir of train.py")
    parser.add_argument("--org", required=True, help="organization or user")
    parser.add_argument("--one-repo", action="store_true", help="one repository with a folder per lambda")
    parser.add_argument("--only", metavar="RUN", nargs="+", help="only these runs")
    parser.add_argument("--dataset", help="its short name; default: that of the folder's config.yaml")
    parser.add_argument("--revision", help="branch to push to")
    parser.add_argument("--private", action="store_true", help="make new repositories private")
    parser.add_argument("--push-code", action="store_true", help="send the code along, for trust_remote_code=True")
    options = parser.parse_args()
    try:
        push_runs(options)
    except (ValueError, OSError) as error:
        sys.exit(f"push_to_hub.py: {' '.join(str(error).split())}")


def push_runs(options: argparse.Namespace) -> None:
    names = options.only or sorted(path.parent.name for path in options.folder.glob("*/model.safetensors"))
    if not names:
        raise ValueError(f"Expected saved models in {options.folder}, but found none; run train.py first.")
    dataset = options.dataset
    if dataset is None:
        dataset = yaml.safe_load((options.folder / "config.yaml").read_text())["data"]["dataset"].split("/")[-1]
    configs = {name: JEIDNNConfig.from_pretrained(options.folder / name) for name in names}
    repos = {name: build_repo_name(config.backbone, dataset, config.lam) for name, config in configs.items()}
    if len(set(repos.values())) < len(repos):
        raise ValueError(f"Expected one run per lambda, but got {repos}; choose by --only.")
    roots = {repo.removesuffix(f"-{lam_name(configs[name].lam)}") for name, repo in repos.items()}
    if len(roots) > 1:
        raise ValueError(f"Expected runs of one backbone, but got {sorted(roots)}; choose by --only.")
    root = f"{options.org}/{roots.pop()}"

    places = []
    for name, repo in repos.items():
        folder = options.folder / name
        place = (
            Place(folder, root, lam_name(configs[name].lam))
            if options.one_repo
            else Place(folder, f"{options.org}/{repo}")
        )
        push_folder(
            *place, revision=options.revision, private=options.private or None, push_code=options.push_code
        )
        places.append(place)
        print(f"{name}: pushed to {place.repo_id}" + (f", folder {place.subfolder}" if place.subfolder else ""))
    card = index_card(root.split("/")[-1], places)
    api = HfApi()
    api.create_repo(root, private=options.private or None, exist_ok=True)
    if options.revision is not None:
        api.create_branch(root, branch=options.revision, exist_ok=True)
    card.push_to_hub(root, revision=options.revision, commit_message="Upload index card")
    print(f"index: {root}")


if __name__ == "__main__":
    main()
