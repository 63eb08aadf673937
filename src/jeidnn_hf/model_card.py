"""The card of a checkpoint: ``README.md``, whose numbers come from its reports, and its curve, as the drawing
``frontier.png`` and as the numbers of ``curve.json``."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from inspect import get_annotations
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData

from . import tables
from .backbones import pretrained_cfg
from .backbones.loading import HUB_WEIGHTS
from .configuration_jeidnn import JEIDNNConfig
from .costs import ExitCosts
from .curve import FILE_NAME as CURVE_NAME
from .curve import AccuracyCostCurve
from .evaluation import EvaluationReport
from .files import written_whole
from .modeling_jeidnn import resolve_preprocessing
from .operating_point import ALPHAS, OperatingPoint
from .plots import plot_frontier
from .sources import DATASETS
from .training_args import TRAINING_RECIPES, JEIDNNTrainingArguments

CARD_NAME = "README.md"
FIGURE_NAME = "frontier.png"
LIBRARY_NAME = "jeidnn-hf"
TASK = "image-classification"
TAGS = ("early-exit", "conformal-prediction", "jei-dnn", "timm")
SETS = "grouped"
"""The conformal method whose sets a card reports."""

_STUB = "This model card has been automatically generated."
_TEMPLATE = Path(__file__).parent / "templates" / "model_card.md.jinja"
_PLUMBING = {"remove_unused_columns", "logging_nan_inf_filter", "dataloader_pin_memory"}
SETTINGS = (*(name for name in get_annotations(JEIDNNTrainingArguments) if name not in _PLUMBING), "seed")
"""The training arguments that a card shows."""


def write_card(
    folder: str | Path,
    reports: Sequence[EvaluationReport] = (),
    point: OperatingPoint | None = None,
    *,
    output_dir: str | Path | None = None,
    others: Mapping[str, Sequence[EvaluationReport]] | None = None,
    backbone_accuracy: float | None = None,
    config: JEIDNNConfig | None = None,
    name: str | None = None,
    **options: Any,
) -> list[Path]:
    """Writes the card of a saved model and, where there are reports, its figure and curve; returns the files.

    All are written or none is.

    Args:
        folder: of the saved model.
        reports: see `build_card`.
        point: see `build_card`.
        output_dir: where to write; by default into ``folder``.
        others: further curves for the figure, method -> reports on the same images.
        backbone_accuracy: of the frozen backbone with its own classifier, a fraction, for the figure.
        config: by default the saved one.
        name: by default that of the repository, or of the folder.
        options: as of `build_card`.

    Raises:
        ValueError: as `build_card`; reports on different images.
        WriteError: a folder that cannot be written to.
        ImportError: reports to draw, but matplotlib is not installed.
    """
    config = JEIDNNConfig.from_pretrained(folder) if config is None else config
    name = name or (options.get("repo_id") or Path(folder).resolve().name).split("/")[-1]
    card = build_card(config, name, reports, point, folder=folder, **options)
    output_dir = Path(output_dir or folder)
    with written_whole(output_dir) as temporary:
        (temporary / CARD_NAME).write_text(str(card), encoding="utf-8")
        if reports:
            curves = {name: reports, **(others or {})}
            plot_frontier(curves, temporary / FIGURE_NAME, backbone_accuracy=backbone_accuracy, title=_images(reports))
            AccuracyCostCurve.of_reports(reports, backbone_accuracy).save(temporary)
    return [output_dir / file for file in ([CARD_NAME, FIGURE_NAME, CURVE_NAME] if reports else [CARD_NAME])]


def build_card(
    config: JEIDNNConfig,
    name: str,
    reports: Sequence[EvaluationReport] = (),
    point: OperatingPoint | None = None,
    *,
    folder: str | Path | None = None,
    repo_id: str | None = None,
    dataset: str | None = None,
    training: Mapping[str, Any] | None = None,
    license: str | None = None,
    tags: Sequence[str] | str = (),
) -> ModelCard:
    """The card of a checkpoint.

    The results in its head are those at the evaluated lambda nearest to the checkpoint's own; each says at which.

    Args:
        config: with its cost table, as of every saved model.
        name: of the checkpoint.
        reports: of the checkpoint's own gates, one per lambda.
        point: the checkpoint's operating point, with the conformal thresholds.
        folder: where it can be loaded from, for the code that the card shows.
        repo_id: instead of the folder there.
        dataset: its short name or id of the Hub; by default that of the reports or of the operating point.
        training: settings to show, see `training_settings`.
        license: by default timm's for the backbone's weights, where they are of timm.
        tags: besides `TAGS`.

    Raises:
        ValueError: reports or an operating point of another model, or of no lambda; values that are not finite.
    """
    _check_of_this_model(config, reports, point)
    reports = sorted(reports, key=lambda report: report.lam)
    own = min(reports, key=lambda report: abs(_log(report.lam) - _log(config.current_lam)), default=None)
    if dataset is None:
        dataset = own.dataset if own else point.validation.dataset if point else None
    is_timm = config.backbone_weights == HUB_WEIGHTS
    cfg = pretrained_cfg(config.backbone) if is_timm else {}
    results = eval_results(own) if own else []
    data = ModelCardData(
        model_name=name,
        library_name=LIBRARY_NAME,
        pipeline_tag=TASK,
        license=license or cfg.get("license"),
        base_model=cfg.get("hf_hub_id"),
        datasets=[_hub_id(dataset)] if dataset and "/" in _hub_id(dataset) else None,
        tags=[*TAGS, *([tags] if isinstance(tags, str) else tags)],
        metrics=list(dict.fromkeys(result.metric_type for result in results)) or None,
        eval_results=results or None,
    )
    thresholds = (point.thresholds if point else {}).get(SETS, {})
    return ModelCard.from_template(
        data,
        template_path=str(_TEMPLATE),
        name=name,
        config=config,
        costs=ExitCosts.from_dict(config.mul_adds),
        num_classes=config.num_labels,
        dataset=dataset,
        source=json.dumps(str(repo_id or folder or name)),
        preprocessing=resolve_preprocessing(config),
        report=own,
        is_at_own_lam=own is not None and _is_own(config, own.lam),
        images=_images(reports) if reports else None,
        sets=[found for found in own.sets if found.method == SETS and found.alpha in ALPHAS] if own else [],
        exits_table=tables.exits_table(replace(own, sets=[])) if own else None,
        lambdas_table=tables.lambdas_table(reports) if len(reports) > 1 else None,
        figure=FIGURE_NAME if reports else None,
        point=point if thresholds else None,
        point_lam=point and _lam_of(config, point),
        point_is_at_own_lam=point is not None and _is_own(config, _lam_of(config, point)),
        method=SETS,
        snippet_alpha=0.05 if 0.05 in thresholds else next(iter(thresholds), None),
        thresholds_table=tables.thresholds_table(point, ALPHAS, SETS) if thresholds else None,
        settings_table=tables.markdown_table(["setting", "value"], [[k, str(v)] for k, v in (training or {}).items()])
        if training
        else None,
    )


def replace_stub(folder: str | Path, repo_id: str, config: JEIDNNConfig, point: OperatingPoint | None) -> None:
    """Puts our card in the place of the one that transformers makes up for a repository without a card."""
    stub = load_card(folder)
    if _STUB in stub.content:
        name, tags = repo_id.split("/")[-1], stub.data.tags or ()
        write_card(folder, point=point, config=config, name=name, repo_id=repo_id, tags=tags)


def load_card(path: str | Path) -> ModelCard:
    """The card in a folder, or in a file; a ValueError of one line where its head cannot be read."""
    path = Path(path)
    path = path / CARD_NAME if path.is_dir() else path
    try:
        return ModelCard.load(path)
    except (yaml.YAMLError, ValueError, TypeError, AttributeError) as error:  # of huggingface_hub, by what it finds
        raise ValueError(
            f"Expected a model card with a head of valid YAML at {str(path)!r}, but got: "
            f"{' '.join(str(error).split())}; mend it, or write it again with `jeidnn card`."
        ) from error


def eval_results(report: EvaluationReport) -> list[EvalResult]:
    """A report as the entries of a model-index: plain floats, each with the lambda, and alpha and method of sets."""
    images = {
        "dataset_type": _hub_id(report.dataset),
        "dataset_name": report.dataset,
        "dataset_config": DATASETS[report.dataset].hub_config if report.dataset in DATASETS else None,
        "dataset_split": report.role,
        "dataset_args": {"num_samples": report.num_samples, "sha256": report.split_sha256},
    }

    def result(kind: str, name: str, value: float, **args: Any) -> EvalResult:
        if not math.isfinite(value):
            raise ValueError(f"Expected a finite {kind} in the report, but got {value}; evaluate again.")
        args = {"lam": float(report.lam), **args}
        return EvalResult(
            TASK, metric_type=kind, metric_name=name, metric_value=float(value), metric_args=args,
            task_name="Image Classification", **images,
        )  # fmt: skip

    found = [
        result("accuracy", "Accuracy", report.accuracy),
        result("normalised_mul_adds", "Mul-Adds, share of the backbone's", report.normalised_mul_adds),
        result("ece", "Expected calibration error", report.ece),
    ]
    for sets in report.sets:
        if sets.method == SETS and sets.alpha in ALPHAS:
            asked = {"alpha": sets.alpha, "method": SETS}
            found.append(result("coverage", f"Coverage, alpha {sets.alpha:g}", sets.coverage, **asked))
            found.append(result("inefficiency", f"Mean set size, alpha {sets.alpha:g}", sets.inefficiency, **asked))
    return found


def training_settings(given: Mapping[str, Any]) -> dict[str, Any]:
    """Of training arguments, those of `SETTINGS`; the recipe's where they are not given."""
    recipe = given.get("recipe", "default")
    all_of_them = {"recipe": recipe, **TRAINING_RECIPES[recipe], **given}
    return {name: all_of_them[name] for name in SETTINGS if all_of_them.get(name) is not None}


def _check_of_this_model(
    config: JEIDNNConfig, reports: Sequence[EvaluationReport], point: OperatingPoint | None
) -> None:
    costs = ExitCosts.from_dict(config.mul_adds)
    for report in reports:
        costs.check_same(report.exit_mul_adds, "a report")
    if point is not None and len(point.temperatures) != (exits := len(costs.total)):
        got = len(point.temperatures)
        raise ValueError(f"Expected an operating point of this model's {exits} exits, but got one of {got}.")
    if point is not None and None not in (own := {point.backbone, config.backbone_fingerprint}) and len(own) > 1:
        expected = config.backbone_fingerprint
        raise ValueError(f"Expected an operating point of backbone {expected}, but got one of {point.backbone}.")
    for lam in [*(report.lam for report in reports), *([_lam_of(config, point)] if point else [])]:
        if lam is None:
            raise ValueError("Expected results of the checkpoint's own gates, but got some of a policy without lambda.")
        config.check_lam_in_range(lam)


def _lam_of(config: JEIDNNConfig, point: OperatingPoint) -> float | None:
    """Of a checkpoint of one lambda, that one where the point names none."""
    return config.lam if point.lam is None and not config.has_lam_range else point.lam


def _is_own(config: JEIDNNConfig, lam: float) -> bool:
    return math.isclose(lam, config.current_lam, rel_tol=1e-6)


def _hub_id(dataset: str) -> str:
    return DATASETS[dataset].hub_id if dataset in DATASETS else dataset


def _images(reports: Sequence[EvaluationReport]) -> str:
    return f"{reports[0].num_samples:,} {reports[0].role} images of {reports[0].dataset}"


def _log(lam: float) -> float:
    return math.log(max(lam, 1e-12))
