"""What the published comparison did otherwise, one switch at a time: each quantity as published, and done right.

A switch takes the held-out records of one trained model (role -> `ExitRecord`) and gives rows of ``switch``,
``quantity``, ``published``, ``right``. Where it needs exits, quota thresholds choose them, fitted on validation to half
of the Mul-Adds.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from .compare import curve_of, measure
from .gates import ExitPolicy
from .metrics import bootstrap_interval, disjoint_subsets, expected_calibration_error
from .policies import QuotaThresholds
from .policies.quota import PUBLISHED_RATIOS, quotas
from .record import ExitRecord
from .runs import RunFolder
from .splits import long_tail
from .tables import markdown_table

Records = Mapping[str, ExitRecord]
Trained = tuple[ExitPolicy, float | None, Records]
"""Of a trained model its policy, lambda and records."""
Row = dict[str, Any]

BUDGET = 0.5
BUDGETS = (0.5, 0.7, 0.9)
PARTS = 10
BATCH = 64
CANCELLING = "-cancelling"
"""How the name of a run ends that is another, but for ``im_weights="cancelling"``."""

PUBLISHED_COSTS = (0.409, 0.506, 0.603, 0.700, 0.797, 0.894, 1.0)
"""Of T2T-ViT-7's exits in the unit of the published curves: a linear layer counted once, not once per token."""
COSTS = (0.358, 0.465, 0.572, 0.679, 0.786, 0.893, 1.0)
"""The same exits in Mul-Adds."""


def double_softmax(records: Records) -> list[Row]:
    """Probabilities taken for logits: temperatures are fitted to them, and they go through a second softmax.

    The exits are those of the true logits. The published temperatures stopped near where they started (`short_search`);
    a search to the end gets some of the calibration back.
    """
    policy = _quota_policy(records)
    right = measure(policy, None, records)["measures"]
    softened = {role: replace(record, logits=record.logits.double().softmax(-1)) for role, record in records.items()}
    on_probabilities = _OnProbabilities(policy.temperatures, policy.thresholds)
    searched = measure(on_probabilities, None, softened)["measures"]
    validation = softened["validation"]
    validation.__dict__["temperatures"] = short_search(validation.logits, validation.labels)
    published = measure(on_probabilities, None, softened)["measures"]
    cap = confidence_cap(float(validation.temperatures.min()), validation.logits.shape[2])
    return [
        _row("double softmax", "ECE", published["ece"], right["ece"]),
        _row("double softmax", "classes in a 95 % set", published["inefficiency"], right["inefficiency"]),
        _row("double softmax", "confidence, at most", cap, 1.0),
        _row("double softmax, temperatures searched to the end", "ECE", searched["ece"], right["ece"]),
    ]


class _OnProbabilities(QuotaThresholds):
    """Decides from probabilities as the policy does from the logits that they are the softmax of."""

    def confidence(self, logits: Tensor) -> Tensor:
        return super().confidence(logits.log())


def confidence_cap(temperature: float, num_classes: int) -> float:
    """``e^(1/T) / (e^(1/T) + K - 1)``: the highest confidence of a softmax of probabilities over T."""
    return 1 / (1 + (num_classes - 1) * math.exp(-1 / temperature))


def short_search(logits: Tensor, labels: Tensor) -> Tensor:
    """The published search of a temperature, ``(N, L, K)`` to ``(L,)``: 50 steps of LBFGS of rate 0.01 from 1.5."""
    found = []
    for answers in logits.unbind(1):
        temperature = torch.tensor(1.5, dtype=logits.dtype, requires_grad=True)
        search = torch.optim.LBFGS([temperature], lr=0.01, max_iter=50)

        def loss(answers=answers, temperature=temperature, search=search) -> Tensor:
            search.zero_grad()
            value = F.cross_entropy(answers / temperature, labels)
            value.backward()
            return value

        search.step(loss)
        found.append(temperature.detach())
    return torch.stack(found)


def no_last_quota(records: Records) -> list[Row]:
    """Quotas over the first L-1 exits, of the ratios p/15, against p/20 over all L: no one is meant for the last."""
    exits = records["test"].num_exits
    shares = {
        "published": [torch.cat([quotas(math.log(p / 15), exits - 1), torch.zeros(1)]) for p in range(1, 40)],
        "right": [quotas(math.log(ratio), exits) for ratio in PUBLISHED_RATIOS],
    }
    curves = {
        how: curve_of([measure(QuotaThresholds.of_quotas(records["validation"], s), None, records) for s in each])
        for how, each in shares.items()
    }
    rows = [_row("no quota for the last exit", "highest cost", *(curve.costs.max() for curve in curves.values()))]
    accuracies = [curve.right_at(BUDGETS).mean(1) for curve in curves.values()]
    for budget, published, right in zip(BUDGETS, *accuracies, strict=True):
        rows.append(_row("no quota for the last exit", f"accuracy at {budget:g}", published, right))
    return rows


def nested_prefixes(records: Records) -> list[Row]:
    """Ten "trials" that each hold the one before, against ten disjoint subsets: how wide the 95 % interval is."""
    found = _answers(records)
    sets = prefixes(len(found.right)), disjoint_subsets(len(found.right), PARTS)
    rows = []
    for quantity, values in (("accuracy", found.right), ("cost", found.costs)):
        widths = [float(np.diff(bootstrap_interval([values[i].mean() for i in each]))[0]) for each in sets]
        rows.append(_row("nested prefixes", f"interval width, {quantity}", *widths))
    return rows


def prefixes(count: int) -> list[Tensor]:
    """The first tenth of 0..count-1, the first two tenths, and so on to all."""
    return [torch.arange(count * i // PARTS) for i in range(1, PARTS + 1)]


def class_sorted(records: Records) -> list[Row]:
    """A long-tailed test set in order of class, frequent ones first: the mean accuracy of its nested prefixes, against
    that of the whole and that of the balanced test set."""
    right = _answers(records).right
    rows = class_sorted_tail(records["test"].labels, records["test"].logits.shape[2])
    mean_of_prefixes = torch.stack([right[rows[i]].mean() for i in prefixes(len(rows))]).mean()
    name = "long tail, class by class"
    return [
        _row(name, "accuracy, against the whole set", mean_of_prefixes, right[rows].mean()),
        _row(name, "accuracy, against the balanced set", mean_of_prefixes, right.mean()),
    ]


def class_sorted_tail(labels: Tensor, num_classes: int, imbalance: float = 100.0) -> Tensor:
    """Rows of a long-tailed test set, the classes one after the other: of class c the first
    ``n imbalance^(-c / (K-1))``, rounded down, where n is the smallest class's number of rows."""
    labels = labels.numpy()
    rows = long_tail(labels, imbalance, num_classes, np.arange(len(labels)))
    return torch.from_numpy(rows[np.argsort(labels[rows], kind="stable")])


def ece_of_batches(records: Records) -> list[Row]:
    """How JEI-DNN's own ECE was taken: its mean over batches of 64, and without temperatures."""
    found, labels = _answers(records), records["test"].labels
    temperatures = records["validation"].temperatures[found.chosen, None]
    plain, calibrated = found.logits.softmax(-1), (found.logits / temperatures).softmax(-1)
    batches = zip(calibrated.split(BATCH), labels.split(BATCH), strict=True)
    by_batch = torch.stack([expected_calibration_error(*batch) for batch in batches]).mean()
    whole = expected_calibration_error(calibrated, labels)
    return [
        _row("mean over batches of 64", "ECE", by_batch, whole),
        _row("no temperatures", "ECE", expected_calibration_error(plain, labels), whole),
    ]


def counter() -> list[Row]:
    """Where on the axis of costs each exit of T2T-ViT-7 stands; no record is needed."""
    each = enumerate(zip(PUBLISHED_COSTS, COSTS, strict=True), start=1)
    return [_row("counter of Mul-Adds", f"cost of exit {l}", *costs) for l, costs in each]


def cancelling_weights(published: Trained, right: Trained) -> list[Row]:
    """Weights of the IMs' loss that cancel, against those of Eq. 14: two models, each with its own gates."""
    points = [measure(*model) for model in (published, right)]
    name = "weights that cancel"
    return [
        _row(name, "accuracy", *(point["right"].double().mean() for point in points)),
        _row(name, "cost", *(point["costs"] for point in points)),
        _row(name, "ECE", *(point["measures"]["ece"] for point in points)),
    ]


SWITCHES = (double_softmax, no_last_quota, nested_prefixes, class_sorted, ece_of_batches)
"""Those that records alone suffice for."""


def reproduce(folder: str | Path, *names: str) -> list[Row]:
    """All switches on models of a run folder, ``model`` added to each row; `cancelling_weights` on every model that has
    a twin whose name ends with `CANCELLING`.

    Raises:
        ValueError: no run folder, or no model of a name.
    """
    run = RunFolder(Path(folder))
    if unknown := sorted(set(names) - set(run.names)):
        raise ValueError(f"Expected models among {run.names}, but got {unknown}.")
    rows = []
    for name in names:
        records = run.records(name)
        rows += [{"model": name, **row} for switch in SWITCHES for row in switch(records)]
    for twin in run.names:
        name = twin.removesuffix(CANCELLING)
        if twin != name and name in run.names:
            models = {each: run.model(each) for each in (twin, name)}
            trained = [(model.policy, model.config.current_lam, run.records(each)) for each, model in models.items()]
            rows += [{"model": name, **row} for row in cancelling_weights(*trained)]
    return rows + [{"model": "T2T-ViT-7", **row} for row in counter()]


def to_markdown(rows: Sequence[Row]) -> str:
    """One table; fractions of 1, and a dash for what a curve does not reach."""
    cells = []
    for row in rows:
        numbers = [math.nan if row[how] is None else row[how] for how in ("published", "right")]
        shown = [f"{numbers[0]:.4f}", f"{numbers[1]:.4f}", f"{numbers[0] - numbers[1]:+.4f}"]
        cells.append([row["model"], row["switch"], row["quantity"], *(x if "nan" not in x else "-" for x in shown)])
    return markdown_table(["model", "switch", "quantity", "as published", "right", "difference"], cells)


class _Answers(NamedTuple):
    """Of the test images at the exits that they take: logits ``(N, K)``, the exit, whether right, and the cost."""

    logits: Tensor
    chosen: Tensor
    right: Tensor
    costs: Tensor


def _answers(records: Records) -> _Answers:
    policy = _quota_policy(records)
    test = records["test"].under(policy)
    chosen = test.exits_taken(policy)
    logits = test.logits[torch.arange(len(chosen)), chosen]
    right = (logits.argmax(-1) == test.labels).double()
    return _Answers(logits, chosen, right, test.normalised_costs[chosen].double())


def _quota_policy(records: Records) -> QuotaThresholds:
    validation = records["validation"]
    first, last = validation.normalised_costs[[0, -1]].tolist()
    return QuotaThresholds.fit(validation, budget=BUDGET if first < BUDGET else (first + last) / 2)


def _row(switch: str, quantity: str, published: float | Tensor, right: float | Tensor) -> Row:
    numbers = [None if math.isnan(number) else float(number) for number in (published, right)]
    return {"switch": switch, "quantity": quantity, "published": numbers[0], "right": numbers[1]}
