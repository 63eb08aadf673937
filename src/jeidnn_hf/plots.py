"""Figures, as functions of reports only. Needs matplotlib (``pip install jeidnn-hf[plots]``)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from .evaluation import EvaluationReport

# Okabe-Ito: distinct for every common colour vision, and told apart in grey by marker and line style too.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
LINES = ("-", "--", "-.", ":", "-", "--", "-.")


def plot_frontier(
    curves: Mapping[str, Sequence[EvaluationReport]],
    path: str | Path,
    *,
    backbone_accuracy: float,
    title: str = "",
) -> None:
    """Accuracy against normalised Mul-Adds, one curve per method (the kind of Figure 2); PNG or SVG by the suffix."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6.4, 4.4), layout="constrained")
    for i, (name, reports) in enumerate(curves.items()):
        points = sorted((r.normalised_mul_adds, 100 * r.accuracy) for r in reports)
        style = {"color": COLOURS[i % 7], "marker": MARKERS[i % 7], "linestyle": LINES[i % 7]}
        every = max(1, len(points) // 12)
        axes.plot(*zip(*points, strict=True), label=name, markersize=4.5, markevery=every, linewidth=1.4, **style)
    axes.axhline(100 * backbone_accuracy, color="0.4", linewidth=1, linestyle=(0, (1, 1)), label="frozen backbone")
    axes.set(xlabel="mean Mul-Adds per image (share of the backbone's)", ylabel="test accuracy (%)", title=title)
    axes.grid(color="0.9")
    axes.legend(frameon=False, loc="lower right")
    figure.savefig(path, dpi=160)
    plt.close(figure)
