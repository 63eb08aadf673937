"""What can be compared: ways to train inference modules, the policies tried on their answers, two kinds of heads."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from .gates import ExitPolicy
from .policies import ConfidenceThreshold, EENetScheduler, LearnedGates, Patience, QuotaThresholds, RandomExits
from .policies.learned import LAMBDAS
from .policies.quota import PUBLISHED_RATIOS
from .record import ExitRecord


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
_ALONE = {"boosting": 0.0}  # trained as if every exit answered alone
_PAPERS_GATES = {**_ALONE, "gate": "linear", "gate_form": "min", "task_cost": "cross_entropy"}

METHODS: dict[str, Method] = {
    "plain": Method(
        ("gates", "threshold", "threshold-entropy", "threshold-margin", "quota", "patience", "eenet", "random"),
        _ALONE,
        {"im_training": "plain", **_AFTERWARDS},
    ),
    "soft_targets": Method(("gates", "threshold"), training={"im_training": "soft_targets", **_AFTERWARDS}),
    "boosted": Method(
        ("quota", "gates"), {"boosting": 0.5, "ensemble": False}, {"im_training": "boosted", **_AFTERWARDS}
    ),
    "l2w_den": Method(("quota", "gates"), _ALONE, {"im_training": "l2w_den", **_AFTERWARDS}),
    "imta": Method(("quota", "gates"), _ALONE, {"im_training": "imta", **_AFTERWARDS}),
    "ztw": Method(
        ("threshold", "gates"), {**_ALONE, "cascade": True, "ensemble": True}, {"im_training": "plain", **_AFTERWARDS}
    ),
    "diffbranch": Method(
        ("own",), {**_PAPERS_GATES, "gate_form": "stick"}, {"im_training": "diffbranch", **_JOINT}, per_lambda=True
    ),
    "jeidnn": Method(("own",), _PAPERS_GATES, {"im_training": "jeidnn", **_JOINT}, per_lambda=True),
    "jeidnn-any": Method(
        ("own", "gates"),
        {**_ALONE, "gate": "shared", "gate_form": "cumulative", "exit_rule": "median", "lam": list(LAMBDAS)},
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
"""Of each way to train, the policy that it was published with, or ours: what figures show; of others, the first."""

DEFAULT = ("default", "soft_targets", "gates")
PAPER = ("paper", "jeidnn", "own")

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
