"""All methods on the same features: what is trained, which policies are fitted to its answers, the curves they give.

Every method is a way to train inference modules with the policies that choose its exits, and is tried on each kind of
heads. Trainings are ordinary runs (`training_runs`), so a comparison lies in an ordinary run folder; what is trained or
measured there already is not done again. Every choice is made on ``validation``; ``test`` is only measured.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field, replace
from itertools import product
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from .comparison import Curve
from .configuration_jeidnn import check_lam
from .evaluation import EvaluationReport, evaluate
from .gates import ExitPolicy
from .metrics import expected_calibration_error
from .operating_point import OperatingPoint
from .oracle import outcome
from .policies import ConfidenceThreshold, EENetScheduler, LearnedGates, Patience, QuotaThresholds, RandomExits
from .policies.learned import LAMBDAS
from .policies.quota import PUBLISHED_RATIOS
from .record import ExitRecord
from .reports import FOLDER as REPORTS
from .reports import load_curves, save_curve
from .run_config import DataSection
from .runs import ALPHAS, RunFolder
from .training_args import JEIDNNTrainingArguments
from .training_runs import train_runs

FOLDER = "curves"
ALPHA = 0.05
MAX_DRAWN = 12
"""Operating points of a curve in figures."""
JUDGED_BY = ("test", "calibration")
"""The roles whose images say how accurate a point is: calibration images set nothing but conformal quantiles."""


@dataclass(frozen=True)
class Method:
    """A way to train inference modules, and the policies that are tried on its answers.

    Args:
        policies: names of `POLICY_CURVES`.
        model: fields of the model that its runs have of their own.
        training: likewise, arguments of the training.
        per_lambda: trained anew for every lambda; each training then is one operating point.
    """

    policies: tuple[str, ...]
    model: Mapping[str, Any] = field(default_factory=dict)
    training: Mapping[str, Any] = field(default_factory=dict)
    per_lambda: bool = False


_AFTERWARDS = {"gates_on": "validation", "gate_steps": 1}  # gates come with the policies
_BY_COST = {
    "eval_strategy": "epoch", "save_strategy": "epoch", "load_best_model_at_end": True,
    "metric_for_best_model": "cost", "greater_is_better": False, "early_stopping_patience": 5, "save_total_limit": 1,
}  # fmt: skip
_JOINT = {"gates_on": "train", **_BY_COST}
_PAPERS_GATES = {"gate": "linear", "gate_form": "min", "task_cost": "cross_entropy"}

METHODS: dict[str, Method] = {
    "plain": Method(
        ("gates", "threshold", "threshold-entropy", "threshold-margin", "quota", "patience", "eenet", "random"),
        training={"im_training": "plain", **_AFTERWARDS},
    ),
    "soft_targets": Method(("gates", "threshold"), training={"im_training": "soft_targets", **_AFTERWARDS}),
    "boosted": Method(
        ("quota", "gates"), {"boosting": 0.5, "ensemble": False}, {"im_training": "boosted", **_AFTERWARDS}
    ),
    "l2w_den": Method(("quota", "gates"), training={"im_training": "l2w_den", **_AFTERWARDS}),
    "imta": Method(("quota", "gates"), training={"im_training": "imta", **_AFTERWARDS}),
    "ztw": Method(
        ("threshold", "gates"), {"cascade": True, "ensemble": True}, {"im_training": "plain", **_AFTERWARDS}
    ),
    "diffbranch": Method(
        ("own",), {**_PAPERS_GATES, "gate_form": "stick"}, {"im_training": "diffbranch", **_JOINT}, per_lambda=True
    ),
    "jeidnn": Method(("own",), _PAPERS_GATES, {"im_training": "jeidnn", **_JOINT}, per_lambda=True),
    "jeidnn-any": Method(
        ("own", "gates"),
        {"gate": "shared", "gate_form": "cumulative", "exit_rule": "median", "lam": list(LAMBDAS)},
        {"im_training": "jeidnn", **_JOINT, "gate_objective": "surrogate"},
    ),
}  # fmt: skip

HEADS: dict[str, dict[str, dict[str, Any]]] = {
    "paper": {
        "model": {"recipe": "paper"},
        "training": {"recipe": "paper", "num_train_epochs": 8, "warmup_epochs": 3},
        "afterwards": {"schedule": "one_cycle"},
    },
    "default": {
        "model": {"recipe": "default"},
        "training": {"recipe": "default"},
        "joint": {"schedule": "constant"},
    },
}
"""Kinds of heads: fields of the model and training arguments, also of those for ``joint`` trainings (of gates and IMs)
or for IMs alone, ``afterwards``. Eight epochs of two views are the paper's fifteen of one."""

PUBLISHED = {
    ("plain", "gates"), ("plain", "threshold"), ("soft_targets", "gates"), ("boosted", "quota"),
    ("l2w_den", "quota"), ("imta", "quota"), ("ztw", "threshold"), ("diffbranch", "own"), ("jeidnn", "own"),
    ("jeidnn-any", "own"),
}  # fmt: skip
"""Of each way to train, the policy that it was published with, or ours: what figures show."""

DEFAULT = ("default", "soft_targets", "gates")
PAPER = ("paper", "jeidnn", "own")


@dataclass
class CompareSection:
    """What is compared.

    Args:
        seeds: of the trainings.
        lambdas: of the methods that are trained anew for each.
        methods: of `METHODS`; default, all.
        heads: of `HEADS`, name -> further ``model`` and ``training`` options; default, all as they are.
    """

    seeds: list = field(default_factory=lambda: [0, 1, 2])
    lambdas: list = field(default_factory=lambda: [0.1, 0.3, 1.0, 3.0])
    methods: list | None = None
    heads: dict | None = None


@dataclass
class CompareConfig:
    """The file of ``jeidnn compare``; ``model``: arguments of ``from_backbone_pretrained``."""

    output_dir: str
    data: DataSection
    model: dict
    compare: CompareSection = field(default_factory=dict)
    training: JEIDNNTrainingArguments = field(default_factory=dict)


def compared(config: Mapping[str, Any]) -> CompareSection:
    """The section of a comparison, every method and kind of heads named.

    Raises:
        ValueError: unknown methods or heads; no seeds, or one twice; a lambda that is none.
    """
    section = CompareSection(**config.get("compare", {}))
    section.heads = section.heads or {name: {} for name in HEADS}
    section.methods = section.methods or list(METHODS)
    for what, given, known in (("heads", section.heads, HEADS), ("methods", section.methods, METHODS)):
        if unknown := sorted(set(given) - known.keys()):
            raise ValueError(f"Expected {what} among {list(known)}, but got {unknown}.")
    if not section.seeds:
        raise ValueError("Expected one seed at least, but got none.")
    for values in (section.seeds, section.lambdas):
        if len(set(values)) < len(values):
            raise ValueError(f"Expected seeds and lambdas without a repetition, but got {values}.")
    for lam in section.lambdas:
        check_lam(lam)
    return section


def runs_of(section: CompareSection, kind: str, method: str, seed: int) -> dict[str, float | None]:
    """The names of the runs of one method, heads and seed, and the lambda of each where there is one per lambda."""
    if not METHODS[method].per_lambda:
        return {f"{kind}-{method}-seed{seed}": None}
    return {f"{kind}-{method}-lam{lam:g}-seed{seed}": lam for lam in section.lambdas}


def train_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """The ``run_config.TrainConfig`` of a comparison; a ValueError as of `compared`."""
    section, runs = compared(config), {}
    for (kind, own), name in product(section.heads.items(), section.methods):
        method, own = METHODS[name], own or {}
        when = "joint" if method.training["gates_on"] == "train" else "afterwards"
        model = {**HEADS[kind]["model"], **method.model, **own.get("model", {})}
        training = {**HEADS[kind]["training"], **HEADS[kind].get(when, {}), **method.training}
        training |= own.get("training", {})
        for seed in section.seeds:
            for run, lam in runs_of(section, kind, name, seed).items():
                lams = {} if lam is None else {"lam": lam}
                runs[run] = {"model": {**model, **lams}, "training": {**training, "seed": seed}}
    common = {"logging_steps": 500, "save_strategy": "no", "report_to": "none", **config.get("training", {})}
    return {**{key: config[key] for key in ("output_dir", "data", "model")}, "training": common, "runs": runs}


def compare(config: Mapping[str, Any], jobs: int = 1, quiet: bool = False) -> dict[tuple[str, str, str], list[Curve]]:
    """Trains what is missing, then measures; returns the curves by (heads, method, policy), one per seed.

    Args:
        config: as ``read_run_config`` gives it for a `CompareConfig`.
        jobs: trainings and measurements at once, each in a process with its share of the cores.

    Raises:
        ValueError: as of `train_config` and ``train_runs``.
    """
    section, plan = compared(config), train_config(config)
    folder = Path(plan["output_dir"])
    missing = [name for name in plan["runs"] if not (folder / name / "model.safetensors").exists()]
    first = [next((name for name in missing if name.startswith(f"{kind}-")), None) for kind in section.heads]
    with tqdm(total=len(missing), desc="trainings", unit="run", disable=quiet) as bar:
        for name in filter(None, first):  # of each kind of heads: it fills the cache
            train_runs(plan, [name], quiet=True)
            bar.update()
        rest = [name for name in missing if name not in first]
        for _ in _in_processes(_train_one, [(plan, name) for name in rest], jobs):
            bar.update()
    if not missing:
        train_runs(plan, [next(iter(plan["runs"]))], quiet=True)  # writes down the plan
    groups = list(product(section.heads, section.methods))
    tasks = [(str(folder), section, *group, seed) for group in groups for seed in section.seeds]
    for _ in tqdm(_in_processes(_measure_one, tasks, jobs), total=len(tasks), desc="curves", disable=quiet):
        pass
    return {
        (kind, method, policy): [Curve.load(curve_path(folder, kind, method, policy, seed)) for seed in section.seeds]
        for kind, method in groups
        for policy in METHODS[method].policies
    }


def draw_comparison(folder: str | Path, backbone_accuracy: float | None) -> list[Path]:
    """Figures of the kinds of 2, 5, 9, 16 and 19 and their page, per kind of heads in ``folder/figures``; the files."""
    from .figures import draw_figures

    written = []
    for reports in sorted(Path(folder).glob(f"*/{REPORTS}")):
        kind = reports.parent
        curves = load_curves(kind)
        written += draw_figures(curves, Path(folder, "figures", kind.name), backbone_accuracy=backbone_accuracy)
    return written


def plain_runs(config: Mapping[str, Any]) -> list[str]:
    """The runs of plain training, first seed, one per kind of heads; a ValueError where there is none."""
    section = compared(config)
    if "plain" not in section.methods:
        raise ValueError(
            "Expected the method 'plain', on which the published comparison is reproduced, but got others."
        )
    return [name for kind in section.heads for name in runs_of(section, kind, "plain", min(section.seeds))]


def curve_path(folder: str | Path, kind: str, method: str, policy: str, seed: int) -> Path:
    return Path(folder, FOLDER, f"{kind}.{method}.{policy}.seed{seed}.safetensors")


def _in_processes(function, tasks: Sequence[tuple], jobs: int) -> Iterator[Any]:
    if jobs <= 1 or len(tasks) < 2:
        yield from (function(task) for task in tasks)
        return
    threads = max(1, (os.cpu_count() or 1) // jobs)
    with ProcessPoolExecutor(jobs, get_context("spawn"), torch.set_num_threads, (threads,)) as pool:
        yield from pool.map(function, tasks)


def _train_one(task: tuple[dict[str, Any], str]) -> None:
    plan, name = task
    train_runs(plan, [name], quiet=True)


def _measure_one(task: tuple) -> None:
    """Curves of all policies of one method, heads and seed, those that are not there yet."""
    folder, section, kind, method, seed = task
    missing = [p for p in METHODS[method].policies if not curve_path(folder, kind, method, p, seed).exists()]
    if not missing:
        return
    run = RunFolder(Path(folder))
    models = {name: run.model(name) for name in runs_of(section, kind, method, seed)}
    records = {name: run.records(name, model) for name, model in models.items()}
    for policy in missing:
        points = [
            (own, lam, records[name])
            for name, model in models.items()
            for own, lam in POLICY_CURVES[policy](model, records[name]["validation"])
        ]
        curve = curve_of([measure(*point) for point in points])
        if seed == min(section.seeds) and (method, policy) in PUBLISHED:
            drawn = curve.frontier()
            drawn = drawn[torch.linspace(0, len(drawn) - 1, min(len(drawn), MAX_DRAWN)).round().long()]
            reports = [report(*points[i]) for i in drawn.tolist()]
            path = Path(folder, kind, REPORTS, f"{method}.{policy}.json")
            save_curve(path, f"{method} + {policy}", seed, reports)
        curve.save(curve_path(folder, kind, method, policy, seed))


@torch.inference_mode()
def measure(policy: ExitPolicy, lam: float | None, records: Mapping[str, ExitRecord]) -> dict[str, Any]:
    """One operating point: its cost and accuracy on validation images, and on those that it is `JUDGED_BY`, there with
    its calibration error; its prediction sets on test images alone."""
    torch.manual_seed(0)  # of policies that draw
    records = {role: record.under(policy) for role, record in records.items()}
    validation, calibration, test = (records[role] for role in ("validation", "calibration", "test"))
    policy.check_exits(test.num_exits)
    held_out = outcome(validation, policy.decide(validation.logits, lam))
    logits, labels = (
        torch.cat([getattr(records[role], what) for role in JUDGED_BY]) for what in ("logits", "labels")
    )
    judged = replace(test, logits=logits, labels=labels, index=None)
    chosen = policy.decide(logits, lam)
    rows = torch.arange(len(chosen))
    logits = logits[rows, chosen]
    probs = (logits / validation.temperatures[chosen, None]).softmax(-1)
    point = OperatingPoint.fit(policy, validation, calibration, lam=lam, alphas=[ALPHA], methods=["grouped"])
    of_test = rows[: len(test.labels)]
    every_exit = probs[of_test, None].expand(-1, test.num_exits, -1)
    sets = point.prediction_sets(every_exit, chosen[of_test], ALPHA)
    return {
        "held_out_costs": held_out.normalised_mul_adds,
        "held_out_accuracies": held_out.accuracy,
        "costs": outcome(judged, chosen).normalised_mul_adds,
        "right": logits.argmax(-1) == labels,
        "measures": {
            "ece": float(expected_calibration_error(probs, labels)),
            "inefficiency": float(sets.sum(1).double().mean()),
            "coverage": float(sets[of_test, test.labels].double().mean()),
        },
    }


def report(policy: ExitPolicy, lam: float | None, records: Mapping[str, ExitRecord]) -> EvaluationReport:
    """Everything about one operating point."""
    torch.manual_seed(0)
    validation, calibration, test = (records[role].under(policy) for role in ("validation", "calibration", "test"))
    point = OperatingPoint.fit(policy, validation, calibration, lam=lam, alphas=ALPHAS)
    return evaluate(test, policy, lam, point=point, others=(validation, calibration))


def curve_of(points: Sequence[Mapping[str, Any]]) -> Curve:
    """Points, as `measure` gives them, as one curve."""

    def column(values: Iterable[float]) -> Tensor:
        return torch.tensor(list(values), dtype=torch.float64)

    return Curve(
        **{name: column(p[name] for p in points) for name in ("held_out_costs", "held_out_accuracies", "costs")},
        right=torch.stack([point["right"] for point in points]),
        measures={name: column(p["measures"][name] for p in points) for name in points[0]["measures"]},
    )


Points = list[tuple[ExitPolicy, float | None]]


def _budgets(record: ExitRecord, count: int) -> list[float]:
    costs = record.costs.normalised
    return np.linspace(costs[0] + 0.02, min(1.0, costs[-1]), count).tolist()


def _own(model, record: ExitRecord) -> Points:
    config = model.config
    lams = np.geomspace(*config.lam, 24).tolist() if config.has_lam_range else [config.lam]
    return [(model.policy, lam) for lam in lams]


def _gates(model, record: ExitRecord) -> Points:
    policy = LearnedGates.fit(record, lam=LAMBDAS)
    return [(policy, lam) for lam in np.geomspace(*LAMBDAS, 24).tolist()]


def _threshold(measure: str):
    def fit(model, record: ExitRecord) -> Points:
        return [(ConfidenceThreshold.fit(record, budget=b, measure=measure), None) for b in _budgets(record, 20)]

    return fit


POLICY_CURVES = {
    "own": _own,
    "gates": _gates,
    "threshold": _threshold("max_probability"),
    "threshold-entropy": _threshold("entropy"),
    "threshold-margin": _threshold("margin"),
    "quota": lambda model, record: [(QuotaThresholds.of_ratio(record, ratio), None) for ratio in PUBLISHED_RATIOS],
    "patience": lambda model, record: [(Patience(record.num_exits, p), None) for p in range(record.num_exits)],
    "eenet": lambda model, record: [(EENetScheduler.fit(record, budget=b), None) for b in _budgets(record, 8)],
    "random": lambda model, record: [(RandomExits.fit(record, budget=b), None) for b in _budgets(record, 12)],
}
"""Name -> the operating points of a policy, fitted on validation answers, as (policy, lambda)."""
