"""Names of repositories; pushing saved models, each to a repository or to a folder of one; the index card over them."""

from __future__ import annotations

import re
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from huggingface_hub import CommitInfo, HfApi, ModelCard, ModelCardData, constants

from .checkpoints import one_line_errors
from .configuration_jeidnn import JEIDNNConfig, check_lam
from .costs import ExitCosts
from .curve import FILE_NAME as CURVE_NAME
from .curve import AccuracyCostCurve
from .export_code import export_code
from .model_card import CARD_NAME, FIGURE_NAME, LIBRARY_NAME, TASK, load_card
from .modeling_jeidnn import JEIDNNForImageClassification
from .operating_point import FILE_NAME as CALIBRATION_NAME
from .operating_point import OperatingPoint
from .stored import portable

SHORT_NAMES = {"t2t_vit_7": "t2t7", "t2t_vit_14": "t2t14"}
"""Backbones whose name is shortened in a repository's; the others keep theirs, which has no hyphen."""

BESIDE_THE_WEIGHTS = (CARD_NAME, FIGURE_NAME, CURVE_NAME, CALIBRATION_NAME, "preprocessor_config.json")
"""Files of a saved model that are pushed with it where there are some."""

_NAME = re.compile(
    r"jeidnn-(?P<backbone>[A-Za-z0-9_.]+)-(?P<dataset>[A-Za-z0-9_.-]+)-(?:any|lam(?P<lam>[0-9][0-9.e-]*))"
)
_MAX_LENGTH = 96  # the Hub's


class RepoName(NamedTuple):
    """What a repository's name says; ``lam`` is None for a checkpoint of a range of lambdas."""

    backbone: str
    dataset: str
    lam: float | None


def lam_name(lam: float | Sequence[float] | None) -> str:
    """``lam0.05`` for one lambda, ``any`` for a range."""
    if lam is None or isinstance(check_lam(lam), list):
        return "any"
    return "lam" + repr(float(lam)).removesuffix(".0").replace("e+", "e")


def build_repo_name(backbone: str, dataset: str, lam: float | Sequence[float] | None) -> str:
    """The name of a checkpoint's repository, such as ``jeidnn-t2t14-cifar100-lam1`` or ``jeidnn-t2t14-cifar100-any``.

    Args:
        backbone: timm model name.
        dataset: its short name, without a namespace.
        lam: lambda; a range or None for ``any``.

    Raises:
        ValueError: a name that the Hub would not take, or that `parse_repo_name` could not take apart.
    """
    name = f"jeidnn-{SHORT_NAMES.get(backbone, backbone)}-{dataset}-{lam_name(lam)}"
    if not _is_valid(name) or parse_repo_name(name)[:2] != (backbone, dataset):
        raise ValueError(
            "Expected a backbone of letters, digits, '_' and '.', a dataset of those and '-', and at most "
            f"{_MAX_LENGTH} characters in all, but got {name!r}."
        )
    return name


def parse_repo_name(name: str) -> RepoName:
    """The inverse of `build_repo_name`; the namespace before a ``/`` is left out. A ValueError for any other name."""
    match = _NAME.fullmatch(name.split("/")[-1])
    try:
        if match is None or not _is_valid(match[0]):
            raise ValueError(name)
        lam = None if match["lam"] is None else float(match["lam"])
    except ValueError:
        raise ValueError(
            f"Expected a name like jeidnn-t2t14-cifar100-lam1 or jeidnn-t2t14-cifar100-any, but got {name!r}."
        ) from None
    long_names = {short: backbone for backbone, short in SHORT_NAMES.items()}
    return RepoName(long_names.get(match["backbone"], match["backbone"]), match["dataset"], lam)


def _is_valid(name: str) -> bool:
    """Whether the Hub takes it as a repository's name."""
    return bool(_NAME.fullmatch(name)) and len(name) <= _MAX_LENGTH and not re.search(r"--|\.\.|\.git$", name)


def push_folder(
    folder: str | Path,
    repo_id: str,
    subfolder: str | None = None,
    *,
    revision: str | None = None,
    private: bool | None = None,
    push_code: bool = False,
    token: str | None = None,
) -> CommitInfo:
    """Pushes a saved model in one commit, after loading it: what does not load is not pushed.

    A backbone from a local file goes along in a file of its own. Files that the repository has already are not sent.

    Args:
        folder: where the model was saved; of its other files only `BESIDE_THE_WEIGHTS` are pushed.
        repo_id: ``org/name``; created where there is none.
        subfolder: the folder of the repository to put it in, as for `from_pretrained`.
        revision: a branch, created where there is none.
        private: for a repository created here.
        push_code: send this package's code along, for `trust_remote_code=True` where it is not installed.
        token: instead of the one logged in with.

    Raises:
        ValueError, OSError: as `from_pretrained`; and the Hub's, such as for a token that may not write.
    """
    folder = Path(folder)
    model = JEIDNNForImageClassification.from_pretrained(folder)
    if (folder / CARD_NAME).exists():
        load_card(folder)
    if (folder / CURVE_NAME).exists():
        AccuracyCostCurve.load(folder).check_is_of(model.costs)
    api = HfApi(token=token)
    with tempfile.TemporaryDirectory() as staged, one_line_errors():
        with portable(model):
            model.save_pretrained(staged)
        for name in BESIDE_THE_WEIGHTS:
            if (folder / name).exists():
                shutil.copy(folder / name, staged)
        if push_code:
            export_code(staged)
        api.create_repo(repo_id, private=private, exist_ok=True)
        if revision is not None:
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        return api.upload_folder(
            repo_id=repo_id,
            folder_path=staged,
            path_in_repo=subfolder,
            revision=revision,
            commit_message=f"Upload {folder.name}",
        )


class Place(NamedTuple):
    """Where a saved model was pushed to."""

    folder: Path
    repo_id: str
    subfolder: str | None = None


def index_card(title: str, places: Sequence[Place]) -> ModelCard:
    """The card over several checkpoints: how to load each, its lambda, exits, results and operating point."""
    rows, backbones = [], set()
    for folder, repo_id, subfolder in places:
        config = JEIDNNConfig.from_pretrained(folder)
        backbones.add(config.backbone)
        page = f"{constants.ENDPOINT}/{repo_id}" + (f"/tree/main/{subfolder}" if subfolder else "")
        arguments = f'"{repo_id}"' + (f', subfolder="{subfolder}"' if subfolder else "")
        lam = "{:g} to {:g}".format(*config.lam) if config.has_lam_range else f"{config.lam:g}"
        costs = ExitCosts.from_dict(config.mul_adds).normalised
        shown = [f"[{subfolder or repo_id.split('/')[-1]}]({page})", f"`{arguments}`"]
        rows.append([*shown, lam, str(len(costs)), f"{costs[0]:.3f}", *_results(folder), *_calibrated(folder)])
    heading = ["checkpoint", "from_pretrained(...)", "lambda", "exits", "Mul-Adds of exit 1"]
    heading += ["test accuracy", "at Mul-Adds", "calibrated at lambda", "alphas", "calibration samples"]
    table = "\n".join("| " + " | ".join(row) + " |" for row in [heading, ["---"] * len(heading), *rows])
    tags = ["jeidnn", "early-exit"]
    data = ModelCardData(library_name=LIBRARY_NAME, pipeline_tag=TASK, tags=tags)
    return ModelCard(
        f"---\n{data.to_yaml()}\n---\n\n# {title}\n\n"
        f"Early-exit image classifiers (JEI-DNN) on a frozen {' or '.join(sorted(backbones))}; load one with "
        "`JEIDNNForImageClassification.from_pretrained`. Mul-Adds are a share of the backbone's.\n\n" + table + "\n"
    )


def _results(folder: Path) -> list[str]:
    """Accuracy in percent and Mul-Adds, from the head of the card beside the model, where it has results."""
    results = (load_card(folder).data.eval_results or []) if (folder / CARD_NAME).exists() else []
    values = {result.metric_type: result.metric_value for result in results}
    accuracy, mul_adds = values.get("accuracy"), values.get("normalised_mul_adds")
    return ["-" if accuracy is None else f"{100 * accuracy:.2f}", "-" if mul_adds is None else f"{mul_adds:.3f}"]


def _calibrated(folder: Path) -> list[str]:
    """The lambda, the alphas and the number of calibration samples of a model's operating point, where it has one."""
    if not (folder / CALIBRATION_NAME).exists():
        return ["-"] * 3
    point = OperatingPoint.load(folder)
    alphas = sorted({alpha for by_alpha in point.thresholds.values() for alpha in by_alpha})
    lam = "-" if point.lam is None else f"{point.lam:g}"
    return [lam, ", ".join(f"{alpha:g}" for alpha in alphas) or "-", str(sum(point.calibration_by_exit))]
