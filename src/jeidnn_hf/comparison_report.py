"""What a comparison says: tables of accuracy and paired differences, who wins, and whether the default recipe does."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from .compare_methods import DEFAULT, PAPER
from .comparison import (
    Curve,
    Difference,
    accuracy_table,
    area_above,
    measure_table,
    paired_differences,
    verdict,
)
from .runs import BUDGETS
from .tables import markdown_table

NOT_WORSE = -0.002
"""How far the lower bound of the default recipe's lead may be below 0 where it counts as not beaten."""
SHARE_THAT_COUNTS = 0.8
"""Of the backbone's accuracy: below it a method is of no use."""

Key = tuple[str, str, str]
Compared = Mapping[Key, Sequence[Curve]]


def name_of(key: Key) -> str:
    """``default heads: plain + gates``"""
    return f"{key[0]} heads: {key[1]} + {key[2]}"


def summarise(curves: Compared, backbone_accuracy: float, budgets: Sequence[float] = BUDGETS) -> dict[str, Any]:
    """Everything as plain numbers, for JSON: fractions, None where a method does not reach a budget.

    Args:
        curves: as ``compare.compare`` gives them.
        backbone_accuracy: of the frozen backbone on the images that methods are judged by.
    """
    methods = {name_of(key): found for key, found in curves.items()}
    floor = SHARE_THAT_COUNTS * backbone_accuracy
    accuracy = accuracy_table(methods, budgets)
    measures = {name: measure_table(methods, name, budgets) for name in ("ece", "inefficiency", "coverage")}
    area = area_above(methods, floor)
    by_seed = {
        name: [accuracy_table({name: [curve]}, budgets)[name] for curve in found] for name, found in methods.items()
    }
    differences, claims = {}, {}
    for kind in dict.fromkeys(key[0] for key in curves):
        group = {name_of(key): found for key, found in curves.items() if key[0] == kind}
        for title, (_, *policy) in (("default recipe's policy", DEFAULT), ("paper's recipe", PAPER)):
            reference = name_of((kind, *policy))
            if reference not in group:
                continue
            found = paired_differences(group, reference, budgets)
            differences[f"{kind} heads, against the {title}"] = {
                name: _plain(difference) for name, difference in found.items()
            }
            if tuple(policy) == DEFAULT[1:]:
                claims[kind] = _claim(found, [value > floor for value in accuracy[reference]])
    recipes = {name_of(key): curves[key] for key in (DEFAULT, PAPER) if key in curves}
    if len(recipes) == 2:
        found = paired_differences(recipes, name_of(PAPER), budgets)[name_of(DEFAULT)]
        own = "the default recipe against the paper's, each with its own heads"
        differences[own] = {name_of(DEFAULT): _plain(found)}
    return {
        "budgets": list(budgets),
        "backbone_accuracy": backbone_accuracy,
        "images": next(iter(curves.values()))[0].right.shape[1],
        "seeds": {name: len(found) for name, found in methods.items()},
        "accuracy": {name: _nones(values) for name, values in accuracy.items()},
        "accuracy_by_seed": {name: [_nones(values) for values in rows] for name, rows in by_seed.items()},
        "area_above_80_percent": area,
        **{name: {method: _nones(v) for method, v in table.items()} for name, table in measures.items()},
        "differences": differences,
        "default_recipe": claims,
    }


def _claim(differences: Mapping[str, Difference], counts: Sequence[bool]) -> dict[str, Any]:
    """The least and the largest lower bound of the default policy's lead over each other method, at the budgets that
    count; ``differences`` are the others' from it."""
    rows = {}
    for name, difference in differences.items():
        lows = [-high for high, use in zip(difference.high, counts, strict=True) if use and not math.isnan(high)]
        if lows:
            rows[name] = {"least_lower_bound": min(lows), "largest_lower_bound": max(lows)}
    return {
        "leads": rows,
        "not_beaten": all(row["least_lower_bound"] >= NOT_WORSE for row in rows.values()),
        "ahead_somewhere": [name for name, row in rows.items() if row["largest_lower_bound"] > 0],
    }


def to_markdown(summary: Mapping[str, Any], title: str) -> str:
    """The page of a comparison."""
    heading = ["method", *(f"{budget:g}" for budget in summary["budgets"])]
    seeds = sorted(set(summary["seeds"].values()))
    page = [
        f"# {title}", "",
        f"Accuracy (%) on {summary['images']:,} images of test and calibration at a share of the backbone's Mul-Adds, "
        f"mean of {', '.join(map(str, seeds))} seeds; between two operating points by playing one or the other. "
        f"Backbone: {100 * summary['backbone_accuracy']:.2f} at 1.0. Area: integral over the Mul-Adds of the accuracy "
        "above 80 % of the backbone's, in points.", "",
        markdown_table(
            [*heading, "area"],
            [
                [name, *_cells(values, 100), f"{100 * summary['area_above_80_percent'][name]:.2f}"]
                for name, values in summary["accuracy"].items()
            ],
        ),
    ]  # fmt: skip
    for measure, words, scale in (
        ("ece", "Expected calibration error (%) at the same Mul-Adds", 100),
        ("inefficiency", "Mean size of the conformal sets (grouped, alpha 0.05) at the same Mul-Adds", 1),
        ("coverage", "Coverage (%) of these sets", 100),
    ):
        rows = [[name, *_cells(values, scale)] for name, values in summary[measure].items()]
        page += [f"## {words}", "", markdown_table(heading, rows)]
    for words, rows in summary["differences"].items():
        page += [
            f"## Difference in points, {words}", "", "Paired 95 % bootstrap interval; bold where it leaves out 0.", "",
            markdown_table(heading, [[name, *_intervals(row)] for name, row in rows.items()]),
        ]  # fmt: skip
    for kind, claim in summary["default_recipe"].items():
        rows = [
            [name, *(f"{100 * row[end]:+.2f}" for end in ("least_lower_bound", "largest_lower_bound"))]
            for name, row in claim["leads"].items()
        ]
        page += [
            f"## Is the default recipe's policy beaten? ({kind} heads)", "",
            "Lower 95 % bound, in points, of its lead where its accuracy is above 80 % of the backbone's. "
            f"At least -0.2 everywhere: {'yes' if claim['not_beaten'] else 'no'}.", "",
            markdown_table(["against", "least", "largest"], rows),
        ]  # fmt: skip
    return "\n".join(page)


def _plain(difference: Difference) -> dict[str, Any]:
    ends = {name: _nones(getattr(difference, name)) for name in ("mean", "low", "high")}
    return {**ends, "verdict": verdict(difference)}


def _nones(values: Sequence[float]) -> list[float | None]:
    return [None if math.isnan(value) else value for value in values]


def _cells(values: Sequence[float | None], scale: float) -> list[str]:
    return ["-" if value is None else f"{scale * value:.2f}" for value in values]


def _intervals(row: Mapping[str, Any]) -> list[str]:
    cells = []
    for mean, low, high, word in zip(row["mean"], row["low"], row["high"], row["verdict"], strict=True):
        text = "-" if mean is None else f"{100 * mean:+.2f} [{100 * low:+.2f}, {100 * high:+.2f}]"
        cells.append(f"**{text}**" if word in ("better", "worse") else text)
    return cells
