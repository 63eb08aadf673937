"""All methods on the same features: what is trained, which policies are fitted to its answers, the curves they give.

Every method is a way to train inference modules with the policies that choose its exits, and is tried on each kind of
heads. Trainings are ordinary runs (`training_runs`), so a comparison lies in an ordinary run folder; what is trained or
measured there already is not done again. Every choice is made on ``validation``; ``test`` is only measured.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm.auto import tqdm

from .comparison import Curve
from .configuration_jeidnn import RECIPES, check_lam
from .conformal import prediction_sets
from .evaluation import EvaluationReport, evaluate
from .gates import ExitPolicy
from .metrics import expected_calibration_error
from .operating_point import OperatingPoint
from .policies import ConfidenceThreshold, EENetScheduler, LearnedGates, Patience, QuotaThresholds, RandomExits
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
LAM_RANGE = tuple(RECIPES["default"]["lam"])


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
        {"gate": "shared", "gate_form": "cumulative", "exit_rule": "median", "lam": list(LAM_RANGE)},
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
    ("plain", "gates"), ("plain", "threshold"), ("boosted", "quota"), ("l2w_den", "quota"), ("imta", "quota"),
    ("ztw", "threshold"), ("diffbranch", "own"), ("jeidnn", "own"), ("jeidnn-any", "own"),
}  # fmt: skip
"""Of each way to train, the policy that it was published with, or ours: what figures show."""

DEFAULT = ("default", "plain", "gates")
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


def train_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """The ``run_config.TrainConfig`` of a comparison: a run per heads, method, lambda and seed.

    Raises:
        ValueError: unknown methods or heads; no seeds, or one twice; a lambda that is none.
    """
    section = {**CompareSection().__dict__, **config.get("compare", {})}
    heads = section["heads"] or {name: {} for name in HEADS}
    methods = section["methods"] or list(METHODS)
    for what, given, known in (("heads", heads, HEADS), ("methods", methods, METHODS)):
        if unknown := sorted(set(given) - known.keys()):
            raise ValueError(f"Expected {what} among {list(known)}, but got {unknown}.")
    if not section["seeds"]:
        raise ValueError("Expected one seed at least, but got none.")
    for values in (section["seeds"], section["lambdas"]):
        if len(set(values)) < len(values):
            raise ValueError(f"Expected seeds and lambdas without a repetition, but got {values}.")
    for lam in section["lambdas"]:
        check_lam(lam)
    runs = {}
    for kind, own in heads.items():
        for name in methods:
            method = METHODS[name]
            when = "joint" if method.training["gates_on"] == "train" else "afterwards"
            model = {**HEADS[kind]["model"], **method.model, **(own or {}).get("model", {})}
            training = {**HEADS[kind]["training"], **HEADS[kind].get(when, {}), **method.training}
            training |= (own or {}).get("training", {})
            for seed in section["seeds"]:
                for lam in section["lambdas"] if method.per_lambda else [None]:
                    where = f"{kind}-{name}" + ("" if lam is None else f"-lam{lam:g}") + f"-seed{seed}"
                    lams = {} if lam is None else {"lam": lam}
                    runs[where] = {"model": {**model, **lams}, "training": {**training, "seed": seed}}
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
    plan = train_config(config)
    folder = Path(plan["output_dir"])
    names = [name for name in plan["runs"] if not (folder / name / "model.safetensors").exists()]
    first = {name.split("-")[0]: name for name in reversed(names)}  # of each kind of heads: it fills the cache
    early = [name for name in names if name in first.values()]
    with tqdm(total=len(names), desc="trainings", unit="run", disable=quiet) as bar:
        for name in early:
            train_runs(plan, [name], quiet=True)
            bar.update()
        rest = [name for name in names if name not in early]
        for _ in _in_processes(_train_one, [(plan, name) for name in rest], jobs):
            bar.update()
    if not names:
        train_runs(plan, [next(iter(plan["runs"]))], quiet=True)  # writes down the plan
    section = {**CompareSection().__dict__, **config.get("compare", {})}
    seeds = section["seeds"]
    tasks = [(str(folder), plan, seeds, *group, seed) for group in _groups(plan) for seed in seeds]
    for _ in tqdm(_in_processes(_measure_one, tasks, jobs), total=len(tasks), desc="curves", disable=quiet):
        pass
    curves: dict[tuple[str, str, str], list[Curve]] = {}
    for kind, method in _groups(plan):
        for policy in METHODS[method].policies:
            curves[kind, method, policy] = [
                Curve.load(curve_path(folder, kind, method, policy, seed)) for seed in seeds
            ]
    return curves


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
    seeds = {**CompareSection().__dict__, **config.get("compare", {})}["seeds"]
    names = [f"{kind}-plain-seed{min(seeds)}" for kind, method in _groups(train_config(config)) if method == "plain"]
    if not names:
        raise ValueError(
            "Expected the method 'plain', on which the published comparison is reproduced, but got others."
        )
    return names


def curve_path(folder: str | Path, kind: str, method: str, policy: str, seed: int) -> Path:
    return Path(folder, FOLDER, f"{kind}.{method}.{policy}.seed{seed}.safetensors")


def _groups(plan: Mapping[str, Any]) -> list[tuple[str, str]]:
    """(heads, method) of the runs."""
    kinds = {kind: None for kind in (name.split("-")[0] for name in plan["runs"])}
    return [
        (kind, method) for kind in kinds for method in METHODS
        if any(_is_of(name, kind, method) for name in plan["runs"])
    ]  # fmt: skip


def _is_of(run: str, kind: str, method: str, seed: int | None = None) -> bool:
    start, tail = f"{kind}-{method}-", "" if seed is None else f"seed{seed}"
    return run.startswith((f"{start}lam", f"{start}seed")) and (seed is None or run.endswith(f"-{tail}"))


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
    folder, plan, seeds, kind, method, seed = task
    missing = [p for p in METHODS[method].policies if not curve_path(folder, kind, method, p, seed).exists()]
    if not missing:
        return
    run = RunFolder(Path(folder))
    names = [name for name in plan["runs"] if _is_of(name, kind, method, seed)]
    models = {name: run.model(name) for name in names}
    records = {name: run.records(name, models[name]) for name in names}
    for policy in missing:
        points = [
            (own, lam, records[name])
            for name in names
            for own, lam in POLICY_CURVES[policy](models[name], records[name]["validation"])
        ]
        curve = curve_of([measure(*point) for point in points])
        if seed == min(seeds) and (method, policy) in PUBLISHED:
            drawn = curve.frontier()
            drawn = drawn[torch.linspace(0, len(drawn) - 1, min(len(drawn), MAX_DRAWN)).round().long()]
            reports = [report(*points[i]) for i in drawn.tolist()]
            path = Path(folder, kind, REPORTS, f"{method}.{policy}.json")
            save_curve(path, f"{method} + {policy}", seed, reports)
        curve.save(curve_path(folder, kind, method, policy, seed))


@torch.inference_mode()
def measure(policy: ExitPolicy, lam: float | None, records: Mapping[str, ExitRecord]) -> dict[str, Any]:
    """One operating point: its cost and accuracy on validation and test, and on test its calibration and sets."""
    torch.manual_seed(0)  # of policies that draw
    validation, calibration, test = (records[role].under(policy) for role in ("validation", "calibration", "test"))
    policy.check_exits(test.num_exits)
    held_out, chosen = policy.decide(validation.logits, lam), policy.decide(test.logits, lam)
    rows, held_out_rows = torch.arange(len(chosen)), torch.arange(len(held_out))
    logits = test.logits[rows, chosen]
    probs = (logits / validation.temperatures[chosen, None]).softmax(-1)
    point = OperatingPoint.fit(policy, validation, calibration, lam=lam, alphas=[ALPHA], methods=["grouped"])
    thresholds = probs.new_tensor(point.thresholds_at(ALPHA), dtype=torch.float64)
    sets = prediction_sets(probs[:, None].expand(-1, test.num_exits, -1), chosen, thresholds, point.score)
    right = logits.argmax(-1) == test.labels
    held_out_right = validation.logits[held_out_rows, held_out].argmax(-1) == validation.labels
    return {
        "held_out_costs": validation.normalised_costs[held_out].double().mean(),
        "held_out_accuracies": held_out_right.double().mean(),
        "costs": test.normalised_costs[chosen].double().mean(),
        "right": right,
        "measures": {
            "ece": expected_calibration_error(probs, test.labels),
            "inefficiency": sets.sum(1).double().mean(),
            "coverage": sets[rows, test.labels].double().mean(),
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
    stacked = {
        name: torch.stack([point[name] for point in points])
        for name in ("held_out_costs", "held_out_accuracies", "costs", "right")
    }
    names = points[0]["measures"]
    return Curve(**stacked, measures={name: torch.stack([p["measures"][name] for p in points]) for name in names})


Points = list[tuple[ExitPolicy, float | None]]


def _budgets(record: ExitRecord, count: int) -> list[float]:
    costs = record.costs.normalised
    return np.linspace(costs[0] + 0.02, min(1.0, costs[-1]), count).tolist()


def _own(model, record: ExitRecord) -> Points:
    config = model.config
    lams = np.geomspace(*config.lam, 24).tolist() if config.has_lam_range else [config.lam]
    return [(model.policy, lam) for lam in lams]


def _gates(model, record: ExitRecord) -> Points:
    policy = LearnedGates.fit(record, lam=LAM_RANGE)
    return [(policy, lam) for lam in np.geomspace(*LAM_RANGE, 24).tolist()]


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
    "quota": lambda model, record: [(QuotaThresholds.of_ratio(record, p / 20), None) for p in range(1, 40)],
    "patience": lambda model, record: [(Patience(record.num_exits, p), None) for p in range(record.num_exits)],
    "eenet": lambda model, record: [(EENetScheduler.fit(record, budget=b), None) for b in _budgets(record, 8)],
    "random": lambda model, record: [(RandomExits.fit(record, budget=b), None) for b in _budgets(record, 12)],
}
"""Name -> the operating points of a policy, fitted on validation answers, as (policy, lambda)."""
