"""All methods on the same features: what is trained, which policies are fitted to its answers, the curves they give.

Every method is a way to train inference modules with the policies that choose its exits, and is tried on each kind of
heads. Trainings are ordinary runs (`training_runs`), so a comparison lies in an ordinary run folder; what is trained or
measured there already is not done again. Every choice is made on ``validation``; methods are judged by ``test`` and
``calibration``, and their prediction sets, whose quantiles are of the latter, by ``test`` alone.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field, replace
from itertools import product
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from .checks import check_arguments
from .compare_methods import HEADS, METHODS, POLICY_CURVES, PUBLISHED, Method
from .comparison import Curve
from .configuration_jeidnn import check_lam
from .evaluation import EvaluationReport, evaluate
from .gates import ExitPolicy
from .metrics import expected_calibration_error
from .operating_point import OperatingPoint
from .oracle import outcome
from .record import ExitRecord
from .reports import FOLDER as REPORTS
from .reports import load_curves, save_curve
from .run_config import DataSection
from .runs import ALPHAS, RunFolder
from .training_args import JEIDNNTrainingArguments
from .training_runs import prepare_runs, train_runs

FOLDER = "curves"
ALPHA = 0.05
MAX_DRAWN = 12
"""Operating points of a curve in figures."""
JUDGED_BY = ("test", "calibration")
"""The roles whose images say how accurate a point is, ``test`` first: calibration images set nothing but conformal
quantiles."""


@dataclass
class MethodSection:
    """How a method differs from one of `METHODS`.

    Args:
        like: the one that it differs from; default, that of its name.
        policies: names of `POLICY_CURVES` instead of that one's.
        model: further fields of the model.
        training: further arguments of the training.
    """

    like: str | None = None
    policies: list | None = None
    model: dict = field(default_factory=dict)
    training: JEIDNNTrainingArguments = field(default_factory=dict)


@dataclass
class CompareSection:
    """What is compared.

    Args:
        seeds: of the trainings.
        lambdas: of the methods that are trained anew for each.
        methods: names of `METHODS`; default, all. Or name -> `MethodSection`, how it differs from one of them.
        heads: of `HEADS`, name -> further ``model`` and ``training`` options; default, all as they are.
    """

    seeds: list = field(default_factory=lambda: [0, 1, 2])
    lambdas: list = field(default_factory=lambda: [0.1, 0.3, 1.0, 3.0])
    methods: list | dict | None = None
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
    """The section of a comparison, with all kinds of heads named, and ``methods`` as name -> `Method`.

    Raises:
        ValueError: unknown methods, policies or heads; a name that cannot be a run's; no seeds, or one twice; a lambda
            that is none.
    """
    section = CompareSection(**config.get("compare", {}))
    section.heads = section.heads or {name: {} for name in HEADS}
    given = section.methods or list(METHODS)
    given = given if isinstance(given, Mapping) else {name: {} for name in given}
    section.methods = {name: _method_of(name, own or {}) for name, own in given.items()}
    if unknown := sorted(section.heads.keys() - HEADS.keys()):
        raise ValueError(f"Expected heads among {list(HEADS)}, but got {unknown}.")
    if not section.seeds:
        raise ValueError("Expected one seed at least, but got none.")
    for values in (section.seeds, section.lambdas):
        if len(set(values)) < len(values):
            raise ValueError(f"Expected seeds and lambdas without a repetition, but got {values}.")
    for lam in section.lambdas:
        check_lam(lam)
    return section


def _method_of(name: str, own: Mapping[str, Any]) -> Method:
    check_arguments(f"methods.{name}", own, MethodSection)
    if not re.fullmatch(r"\w+(-(?!lam|seed)\w+)*", name):
        raise ValueError(f"Expected a method's name of words and hyphens, none of them lam or seed, but got {name!r}.")
    own = MethodSection(**own)
    known = METHODS.get(own.like or name)
    if known is None:
        raise ValueError(f"Expected methods among {list(METHODS)}, or like one of them, but got {own.like or name!r}.")
    if unknown := sorted(set(own.policies or ()) - POLICY_CURVES.keys()):
        raise ValueError(f"Expected policies of {name!r} among {list(POLICY_CURVES)}, but got {unknown}.")
    model, training = {**known.model, **own.model}, {**known.training, **own.training}
    return replace(known, policies=tuple(own.policies or known.policies), model=model, training=training)


def runs_of(section: CompareSection, kind: str, method: str, seed: int) -> dict[str, float | None]:
    """The names of the runs of one method, heads and seed, and the lambda of each where there is one per lambda."""
    if not section.methods[method].per_lambda:
        return {f"{kind}-{method}-seed{seed}": None}
    return {f"{kind}-{method}-lam{lam:g}-seed{seed}": lam for lam in section.lambdas}


def train_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """The ``run_config.TrainConfig`` of a comparison; a ValueError as of `compared`."""
    section, runs = compared(config), {}
    for (kind, own), (name, method) in product(section.heads.items(), section.methods.items()):
        own = own or {}
        when = "joint" if method.training["gates_on"] == "train" else "afterwards"
        model = {**HEADS[kind]["model"], **own.get("model", {}), **method.model}
        training = {**HEADS[kind]["training"], **HEADS[kind].get(when, {}), **own.get("training", {})}
        training |= method.training
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
    one_per_kind = {name.partition("-")[0]: name for name in missing}  # each kind of heads has features of its own
    prepare_runs(plan, list(one_per_kind.values()))
    trained = _in_processes(_train_one, [(plan, name) for name in missing], jobs)
    for _ in tqdm(trained, total=len(missing), desc="trainings", unit="run", disable=quiet):
        pass
    groups = list(product(section.heads, section.methods))
    tasks = [(str(folder), section, *group, seed) for group in groups for seed in section.seeds]
    for _ in tqdm(_in_processes(_measure_one, tasks, jobs), total=len(tasks), desc="curves", disable=quiet):
        pass
    return {
        (kind, method, policy): [Curve.load(curve_path(folder, kind, method, policy, seed)) for seed in section.seeds]
        for kind, method in groups
        for policy in section.methods[method].policies
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
    policies = section.methods[method].policies
    missing = [p for p in policies if not curve_path(folder, kind, method, p, seed).exists()]
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
        is_drawn = (method, policy) in PUBLISHED or method not in METHODS and policy == policies[0]
        if seed == min(section.seeds) and is_drawn:
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
    held_out = outcome(validation, validation.exits_taken(policy, lam))
    logits, labels = (
        torch.cat([getattr(records[role], what) for role in JUDGED_BY]) for what in ("logits", "labels")
    )
    judged = replace(test, logits=logits, labels=labels, index=None)
    chosen = judged.exits_taken(policy, lam)
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
        "held_out_images": len(validation.labels),
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
    (images,) = {point["held_out_images"] for point in points}

    def column(values: Iterable[float]) -> Tensor:
        return torch.tensor(list(values), dtype=torch.float64)

    return Curve(
        **{name: column(p[name] for p in points) for name in ("held_out_costs", "held_out_accuracies", "costs")},
        right=torch.stack([point["right"] for point in points]),
        measures={name: column(p["measures"][name] for p in points) for name in points[0]["measures"]},
        held_out_images=images,
    )
