"""A run folder: what ``examples/train.py`` left behind, and what evaluating it adds.

    RUN/config.yaml, RUN/splits.json        the choices, and which images play which role
    RUN/<model>/                            one saved model per run
    RUN/<model>/records/<role>-<sha>/       its answers on a role (`ExitRecord`), kept for every later question
    RUN/reports/<curve>.json                `EvaluationReport`s, see ``reports.py``
    RUN/evaluation.json                     the summary: accuracy at budgets, per method
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from tqdm.auto import tqdm

from .configuration_jeidnn import JEIDNNConfig
from .curve import AccuracyCostCurve
from .data import ImageView
from .evaluation import EvaluationReport, evaluate
from .feature_cache import CachedFeatures, cached_role
from .files import read_json, write_text
from .metrics import accuracy_at_cost
from .model_card import training_settings, write_card
from .modeling_jeidnn import JEIDNNForImageClassification
from .operating_point import FILE_NAME as CALIBRATION_NAME
from .operating_point import OperatingPoint
from .policies import ConfidenceThreshold
from .preprocessing import Preprocessing
from .record import ExitRecord
from .reports import FOLDER, Curves, load_costs, load_curves, load_logs, save_curve
from .run_config import TrainConfig, read_run_config
from .sources import Source, load_source, read_labels, source_options
from .splits import Splits, class_groups

BUDGETS = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
ALPHAS = (0.005, 0.01, 0.015, 0.02, 0.025, 0.03, 0.035, 0.04, 0.045, 0.05, 0.1)
"""The paper's steps of .005 up to .05, for its search and its Figure 5c, and .1."""
HELD_OUT = ("validation", "calibration", "test")


@dataclass
class RunFolder:
    """Read access to a run folder; a ValueError or an OSError where it is none."""

    folder: Path

    def __post_init__(self) -> None:
        self.folder = Path(self.folder)
        self.config = read_run_config(self.folder / "config.yaml", TrainConfig, self.folder)
        self.splits = Splits.load(self.folder / "splits.json")
        if not self.names:
            raise ValueError(f"Expected models that train.py saved in {str(self.folder)!r}, but found none.")

    @cached_property
    def sources(self) -> dict[str, Source]:
        return load_source(self.config["data"]["dataset"], **source_options(self.config["data"]))

    @cached_property
    def state(self) -> PartialState:
        """The processes that torchrun started: they share the passes over images, and the main one writes."""
        return PartialState(cpu=not torch.accelerator.is_available())

    @property
    def names(self) -> list[str]:
        """The models, in order of name."""
        return sorted(path.parent.name for path in self.folder.glob("*/model.safetensors"))

    def model(self, name: str) -> JEIDNNForImageClassification:
        return JEIDNNForImageClassification.from_pretrained(self.folder / name)

    def images(self, model: JEIDNNForImageClassification, role: str, limit: int | None = None) -> ImageView:
        """The pictures of a role as the model sees them."""
        source, rows = self.splits.roles[role]
        return ImageView(self.sources[source], rows[:limit], Preprocessing.from_dict(model.config.preprocessing))

    def features(self, model: JEIDNNForImageClassification, role: str) -> CachedFeatures:
        """The role's exit features in float32, from the cache or into it."""
        cache = Path(self.config["data"].get("cache_dir") or self.folder / "cache")
        preprocessing = Preprocessing.from_dict(model.config.preprocessing)
        options = {"dtype": torch.float32}
        return cached_role(model.backbone, self.sources, self.splits, role, preprocessing, cache, **options)

    def records(
        self, name: str, model: JEIDNNForImageClassification | None = None, roles: Sequence[str] = HELD_OUT
    ) -> dict[str, ExitRecord]:
        """What a model answers on the held-out roles, computed once for these weights."""
        weights = hashlib.sha256((self.folder / name / "model.safetensors").read_bytes()).hexdigest()[:12]
        folders = {role: self.folder / name / "records" / f"{role}-{weights}" for role in roles}
        missing = [role for role, folder in folders.items() if not (folder / "record.json").exists()]
        self.state.wait_for_everyone()
        for role in missing:
            model = model or self.model(name)
            record = ExitRecord.of(model, self.features(model, role), self.splits.info(role))
            if self.state.is_main_process:
                record.save(folders[role])
        self.state.wait_for_everyone()
        return {role: ExitRecord.load(folder) for role, folder in folders.items()}

    def class_groups(self) -> dict[str, list[int]]:
        """Class numbers by their number of training images, of a long-tailed data set; of another, nothing."""
        source, rows = self.splits.roles["train"]
        counts = np.bincount(read_labels(self.sources[source])[rows])
        return {name: k.tolist() for name, k in class_groups(counts).items()} if counts.max() > 2 * counts.min() else {}

    def native_accuracy(self, model: JEIDNNForImageClassification, *roles: str) -> float | None:
        """Accuracy of the frozen backbone's own classifier on roles together, by default ``test``; None where the last
        exit does not keep it."""
        if not model.backbone.native_head:
            return None
        views = [self.features(model, role).views[0] for role in roles or ("test",)]
        right = [view.features[:, -model.backbone.exit_dims[-1] :].argmax(1) == view.labels for view in views]
        return float(torch.cat(right).double().mean())


def kind_of(name: str) -> str:
    """The method that a run's name belongs to: ``paper-lam0.3`` and ``default-27-seed1`` without lambda and seed."""
    return re.sub(r"-(lam|seed)[^-]*", "", name)


def seed_of(name: str) -> int:
    found = re.search(r"-seed(\d+)", name)
    return int(found[1]) if found else 0


def evaluate_run(
    folder: str | Path,
    *,
    num_lambdas: int = 10,
    num_thresholds: int = 20,
    speed_images: int = 0,
    quiet: bool = False,
) -> dict[str, Any]:
    """Evaluates every model of a run folder on the test role, and writes reports and summary.

    A checkpoint for a range of lambdas is asked at ``num_lambdas`` of them and at its own. For every kind of exits one
    calibrated max-probability threshold over the same heads, fitted on ``validation``, is evaluated as well.

    Returns:
        The summary: ``backbone_accuracy``, ``budgets``, ``accuracy_at_budget`` per method (mean over seeds; None below
        a method's cheapest point), ``speed`` per model.

    Raises:
        ValueError: no run folder, or a part of it that is missing or changed; numbers out of range.
    """
    for name, number, least in (("num_lambdas", num_lambdas, 1), ("speed_images", speed_images, 0)):
        if number < least:
            raise ValueError(f"Expected {name} of at least {least}, but got {number}.")
    run = RunFolder(Path(folder))
    curves: dict[str, dict[int, list[EvaluationReport]]] = defaultdict(lambda: defaultdict(list))
    native, speeds = None, {}
    for name in tqdm(run.names, desc="models", disable=quiet):
        model = run.model(name)
        records = run.records(name, model)
        native = run.native_accuracy(model) if native is None else native
        config, kind, seed = model.config, kind_of(name), seed_of(name)
        lams = lambdas(config, num_lambdas)
        reports = [_evaluate(records, model.policy, lam) for lam in lams]
        if speed_images:
            half = min(reports, key=lambda report: abs(report.normalised_mul_adds - 0.5))
            speeds[name] = measure_speed(model, run.images(model, "test", speed_images), half.lam)
            half.images_per_second = {key: speeds[name][key] for key in ("early", "full")}
        curves[kind][seed] += reports
        point = OperatingPoint.fit(model.policy, records["validation"], records["calibration"], lam=config.current_lam)
        if run.state.is_main_process:
            point.save(run.folder / name)
        if curves[f"{kind} heads, threshold"][seed]:
            continue  # heads of the smallest lambda stand for their kind
        costs = records["test"].normalised_costs
        budgets = np.linspace(float(costs[0]) + 0.02, float(costs[-1]), num_thresholds).tolist()
        thresholds = [ConfidenceThreshold.fit(records["validation"], budget=budget) for budget in budgets]
        curves[f"{kind} heads, threshold"][seed] += [_evaluate(records, policy) for policy in thresholds]
    table = {method: accuracy_at_budgets(by_seed.values()) for method, by_seed in curves.items()}
    summary = {
        "dataset": run.config["data"]["dataset"],
        "backbone_accuracy": native,
        "budgets": list(BUDGETS),
        "accuracy_at_budget": table,
        "speed": speeds,
    }
    if not run.state.is_main_process:
        return summary
    for method, by_seed in curves.items():
        for seed, reports in by_seed.items():
            path = run.folder / FOLDER / f"{re.sub('[^a-z0-9.]+', '-', method)}-seed{seed}.json"
            save_curve(path, method, seed, reports)
    write_text(run.folder / "evaluation.json", json.dumps(summary, indent=1))
    return summary


def lambdas(config: JEIDNNConfig, count: int) -> list[float]:
    """Where a checkpoint is evaluated: its own lambda and, of a range, ``count`` spread over it in logarithm."""
    if not config.has_lam_range:
        return [config.lam]
    spread = np.geomspace(*config.lam, count).tolist()
    own = config.current_lam
    return sorted([own, *(lam for lam in spread if not math.isclose(lam, own, rel_tol=1e-6))])


def _evaluate(records: dict[str, ExitRecord], policy, lam: float | None = None) -> EvaluationReport:
    validation, calibration, test = (records[role] for role in HELD_OUT)
    point = OperatingPoint.fit(policy, validation, calibration, lam=lam, alphas=ALPHAS)
    return evaluate(test, policy, lam, point=point, others=(validation, calibration))


def accuracy_at_budgets(curves, budgets: Sequence[float] = BUDGETS) -> list[float | None]:
    """Mean over curves (seeds) of the accuracy at each share of the Mul-Adds; None where a curve does not reach it."""
    at = []
    for reports in curves:
        costs = torch.tensor([report.normalised_mul_adds for report in reports])
        accuracies = torch.tensor([report.accuracy for report in reports])
        at.append([accuracy_at_cost(costs, accuracies, budget) for budget in budgets])
    return [None if np.isnan(value) else float(value) for value in np.mean(at, axis=0)]


@torch.inference_mode()
def measure_speed(
    model: JEIDNNForImageClassification, images: ImageView, lam: float, batch_size: int = 64
) -> dict[str, float]:
    """Images per second from pixels, stopping early and not, the share of the Mul-Adds, and how often both agree."""
    batches = [
        images.__getitems__(range(start, min(start + batch_size, len(images))))["pixel_values"].to(model.device)
        for start in range(0, len(images), batch_size)
    ]
    answers, seconds = {}, {"early": [], "full": []}
    for _ in range(3):
        for name, all_exits in (("early", None), ("full", True)):
            started = time.perf_counter()
            answers[name] = [model(pixels, lam=lam, output_all_exits=all_exits) for pixels in batches]
            if model.device.type == "cuda":
                torch.cuda.synchronize(model.device)
            seconds[name].append(time.perf_counter() - started)
    agree, spent = [], []
    for early, full in zip(answers["early"], answers["full"], strict=True):
        same = (early.exit_index == full.exit_index) & (early.logits.argmax(-1) == full.logits.argmax(-1))
        agree.append(same)
        spent.append(early.mul_adds)
    return {
        "lam": lam,
        "early": len(images) / min(seconds["early"]),
        "full": len(images) / min(seconds["full"]),
        "mul_adds": float(torch.cat(spent).double().mean()) / model.exit_costs().backbone[-1],
        "agree": float(torch.cat(agree).float().mean()),
    }


def draw_run(folder: str | Path, output_dir: str | Path, formats: Sequence[str] = ("png", "svg")) -> list[Path]:
    """Figures, tables and their page ``figures.md`` of an evaluated run folder; returns the files."""
    from .figures import draw_figures

    folder = Path(folder)
    curves = load_curves(folder)
    summary = json.loads((folder / "evaluation.json").read_text(encoding="utf-8"))
    return draw_figures(
        curves, output_dir, formats, backbone_accuracy=summary["backbone_accuracy"], logs=load_logs(folder),
        costs=load_costs(folder), groups=RunFolder(folder).class_groups(),
    )  # fmt: skip


def write_card_of(model_dir: str | Path, output_dir: str | Path | None = None, **options: Any) -> list[Path]:
    """Writes the card of a saved model; returns the files.

    Its operating point is that beside the weights. A model in a run folder has its reports and
    settings from there, and its figure shows what the run compares it with.

    Args:
        output_dir: where to write; by default beside the weights.
        options: of `model_card.write_card`: ``repo_id``, ``license``, ...
    """
    folder = Path(model_dir)
    point = OperatingPoint.load(folder) if (folder / CALIBRATION_NAME).exists() else None
    config = JEIDNNConfig.from_pretrained(folder)
    run_dir = folder.resolve().parent
    known: dict[str, Any] = {}
    if all((run_dir / name).exists() for name in ("config.yaml", "splits.json")):
        known = _known_to_the_run(RunFolder(run_dir), folder.resolve().name, config)
    return write_card(folder, point=point, config=config, output_dir=output_dir, **{**known, **options})


def _known_to_the_run(run: RunFolder, name: str, config: JEIDNNConfig) -> dict[str, Any]:
    """Arguments of `write_card`."""
    own = run.config["runs"].get(name, {})
    images = {f"{role} images": f"{len(rows):,}" for role, (_, rows) in run.splits.roles.items()}
    settings = training_settings({**run.config.get("training", {}), **own.get("training", {})})
    known = {
        "dataset": run.config["data"]["dataset"],
        "training": {**images, "views of each training image": run.config["data"].get("views", 1), **settings},
    }
    if not (run.folder / FOLDER).exists():
        return known
    curves, kind, seed = load_curves(run.folder), kind_of(name), seed_of(name)
    reports, siblings = _own_and_other(curves, name, config)
    if not reports:
        raise ValueError(f"Expected a report of {name!r} in {str(run.folder)!r}, but got none; run `jeidnn evaluate`.")
    threshold = f"{kind} heads, threshold"
    others = {f"{kind} at other λ": siblings, threshold: curves.get(threshold, {}).get(seed, ())}
    known |= {"reports": reports, "others": {method: found for method, found in others.items() if found}}
    return known | {"backbone_accuracy": _backbone_accuracy(run.folder)}


def _own_and_other(
    curves: Curves, name: str, config: JEIDNNConfig
) -> tuple[list[EvaluationReport], list[EvaluationReport]]:
    """Of a model's kind and seed, its reports and those of its siblings, trained at other lambdas."""
    own, other = [], []
    for report in curves.get(kind_of(name), {}).get(seed_of(name), ()):
        (own if config.has_lam_range or report.lam == config.lam else other).append(report)
    return own, other


def _backbone_accuracy(run_dir: Path) -> float | None:
    path = run_dir / "evaluation.json"
    return read_json(path, "the summary of an evaluation")["backbone_accuracy"] if path.exists() else None


def curve_in_run(model_dir: str | Path) -> AccuracyCostCurve | None:
    """The accuracy-cost curve of a saved model from the reports of its run folder; None where there are none of it."""
    folder = Path(model_dir).resolve()
    if not list((folder.parent / FOLDER).glob("*.json")):
        return None
    own, _ = _own_and_other(load_curves(folder.parent), folder.name, JEIDNNConfig.from_pretrained(folder))
    return AccuracyCostCurve.of_reports(own, _backbone_accuracy(folder.parent)) if own else None


def budget_table(summary: dict[str, Any]) -> str:
    """The summary as Markdown: test accuracy in percent at a share of the backbone's Mul-Adds."""
    lines = ["| method | " + " | ".join(f"{budget:g}" for budget in summary["budgets"]) + " |"]
    lines.append("|---" * (1 + len(summary["budgets"])) + "|")
    for method, values in sorted(summary["accuracy_at_budget"].items()):
        cells = ["-" if value is None else f"{100 * value:.2f}" for value in values]
        lines.append(f"| {method} | " + " | ".join(cells) + " |")
    if summary["backbone_accuracy"] is not None:
        lines.append(f"\nfrozen backbone: {100 * summary['backbone_accuracy']:.2f} at 1.0")
    return "\n".join(lines)
