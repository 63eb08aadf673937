"""Which method is right more often at the same cost? Curves of operating points on the same images, compared in pairs.

At a budget between two operating points a method plays one of them or the other, with the chance at which their costs
mix to the budget: every image then is right with some probability, also between points, and two methods can be paired
image by image. Which points count is decided on held-out images, not on those that the curve is measured on, and not
by differences that are within chance there: a budget is to be spent unless spending it does harm.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from .files import written_whole


@dataclass
class Curve:
    """One method, trained with one seed, at P operating points.

    Args:
        held_out_costs: mean normalised Mul-Adds on validation images, ``(P,)``.
        held_out_accuracies: likewise the accuracies.
        costs: mean normalised Mul-Adds on the images that it is judged by, ``(P,)``.
        right: whether an image is classified right, ``(P, N)`` bool.
        measures: further numbers of each point on such images, such as its ECE, name -> ``(P,)``.
        held_out_images: how many; infinitely many leave nothing to chance.

    Raises:
        ValueError: no points, or tensors of other shapes.
    """

    held_out_costs: Tensor
    held_out_accuracies: Tensor
    costs: Tensor
    right: Tensor
    measures: dict[str, Tensor] = field(default_factory=dict)
    held_out_images: float = math.inf

    def __post_init__(self) -> None:
        points = self.right.shape[:1]
        each = [self.held_out_costs, self.held_out_accuracies, self.costs, *self.measures.values()]
        if self.right.dim() != 2 or not self.right.numel() or any(tensor.shape != points for tensor in each):
            shapes = [tuple(tensor.shape) for tensor in (*each, self.right)]
            raise ValueError(f"Expected (P,) numbers and (P, N) answers of at least one point, but got {shapes}.")

    def frontier(self) -> Tensor:
        """The points, in order of cost, but for those that a cheaper one beats on the held-out images by more than the
        standard error of a difference, sqrt(2 a (1 - a) / images) with a the cheaper one's accuracy."""
        order = torch.argsort(self.held_out_costs, stable=True)
        accuracies = self.held_out_accuracies[order]
        before = torch.cat([accuracies.new_zeros(1), accuracies.cummax(0).values[:-1]])
        chance = (2 * before * (1 - before) / self.held_out_images).sqrt()
        kept = order[accuracies >= before - chance]
        return kept[torch.argsort(self.costs[kept], stable=True)]

    def weights(self, budgets: Sequence[float]) -> Tensor:
        """How often each point is played at each budget, ``(B, P)`` float64: at most two neighbours of the frontier.

        Above the dearest point that one is played always; a budget below the cheapest has a row of NaN.
        """
        points = self.frontier()
        costs = self.costs[points].double()
        weights = torch.zeros(len(budgets), len(self.costs), dtype=torch.float64)
        for row, budget in zip(weights, budgets, strict=True):
            right = int(torch.searchsorted(costs, budget, right=True))
            if right == 0:
                row.fill_(torch.nan)
            elif right == len(costs):
                row[points[-1]] = 1
            else:
                share = (budget - costs[right - 1]) / (costs[right] - costs[right - 1])
                row[points[right - 1]], row[points[right]] = 1 - share, share
        return weights

    def right_at(self, budgets: Sequence[float]) -> Tensor:
        """Chance of each image to be right at each budget, ``(B, N)`` float64; NaN below the cheapest point."""
        return self.weights(budgets) @ self.right.double()

    def measure_at(self, name: str, budgets: Sequence[float]) -> Tensor:
        """A measure of the points mixed as they are played, ``(B,)``."""
        return self.weights(budgets) @ self.measures[name].double()

    def save(self, path: str | Path) -> None:
        """Writes one safetensors file, whole or not at all."""
        path = Path(path)
        tensors = {name: getattr(self, name) for name in ("held_out_costs", "held_out_accuracies", "costs", "right")}
        tensors |= {f"measures.{name}": tensor for name, tensor in self.measures.items()}
        tensors["held_out_images"] = torch.tensor(self.held_out_images, dtype=torch.float64)
        path.parent.mkdir(parents=True, exist_ok=True)
        with written_whole(path.parent) as temporary:
            save_file({name: tensor.clone().contiguous() for name, tensor in tensors.items()}, temporary / path.name)

    @classmethod
    def load(cls, path: str | Path) -> Curve:
        """Reads what ``save`` wrote; a ValueError where it cannot."""
        try:
            with safe_open(path, framework="pt") as file:
                tensors = {name: file.get_tensor(name) for name in file.keys()}
            measures = {name: tensors.pop(name) for name in list(tensors) if name.startswith("measures.")}
            measures = {name.partition(".")[2]: value for name, value in measures.items()}
            return cls(**tensors | {"held_out_images": float(tensors["held_out_images"])}, measures=measures)
        except Exception as error:
            raise ValueError(f"Expected a curve at {str(path)!r}, but got: {error}; remove the file.") from error


Methods = Mapping[str, Sequence[Curve]]
"""Name of a method -> one curve per seed, all on the same images."""


def accuracy_table(methods: Methods, budgets: Sequence[float]) -> dict[str, list[float]]:
    """Mean over seeds of the accuracy at each budget; NaN below a method's cheapest point."""
    return {name: _mean_right(curves, budgets).mean(1).tolist() for name, curves in methods.items()}


def measure_table(methods: Methods, measure: str, budgets: Sequence[float]) -> dict[str, list[float]]:
    """Likewise of a measure that all curves have."""
    return {
        name: torch.stack([curve.measure_at(measure, budgets) for curve in curves]).mean(0).tolist()
        for name, curves in methods.items()
    }


def area_above(methods: Methods, floor: float, steps: int = 200) -> dict[str, float]:
    """``integral max(0, accuracy(b) - floor) db`` over budgets b in [0, 1], mean over seeds of the accuracy."""
    budgets = np.linspace(0, 1, steps + 1).tolist()
    areas = {}
    for name, accuracies in accuracy_table(methods, budgets).items():
        above = np.clip(np.nan_to_num(np.array(accuracies), nan=0.0) - floor, 0, None)
        areas[name] = float(((above[1:] + above[:-1]) / 2).mean())
    return areas


@dataclass
class Difference:
    """Accuracy of a method minus a reference's at each budget, and its paired bootstrap interval, ``(B,)`` each."""

    mean: list[float]
    low: list[float]
    high: list[float]


def paired_differences(
    methods: Methods,
    reference: str,
    budgets: Sequence[float],
    *,
    confidence: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> dict[str, Difference]:
    """Every other method against a reference, on the same images resampled with replacement.

    The seeds of a method are averaged image by image: the interval is of the images, for these trainings.

    Raises:
        ValueError: an unknown reference; curves on different numbers of images.
    """
    if reference not in methods:
        raise ValueError(f"Expected a reference among {list(methods)}, but got {reference!r}.")
    sizes = {curve.right.shape[1] for curves in methods.values() for curve in curves}
    if len(sizes) > 1:
        raise ValueError(f"Expected curves on the same images, but got {sorted(sizes)} of them.")
    (size,) = sizes
    counts = np.random.default_rng(seed).multinomial(size, np.full(size, 1 / size), resamples)
    shares = torch.from_numpy(counts / size)  # of each image in each resample
    tail = (1 - confidence) / 2
    base, found = _mean_right(methods[reference], budgets), {}
    for name, curves in methods.items():
        if name == reference:
            continue
        difference = _mean_right(curves, budgets) - base
        resampled = shares @ difference.T
        low, high = torch.quantile(resampled, torch.tensor([tail, 1 - tail], dtype=torch.float64), dim=0)
        found[name] = Difference(difference.mean(1).tolist(), low.tolist(), high.tolist())
    return found


def verdict(difference: Difference) -> list[str]:
    """At each budget ``better``, ``worse`` or ``tie`` of the method against the reference, or ``-`` off a curve."""

    def one(low: float, high: float) -> str:
        if np.isnan(low):
            return "-"
        return "better" if low > 0 else "worse" if high < 0 else "tie"

    return [one(*ends) for ends in zip(difference.low, difference.high, strict=True)]


def _mean_right(curves: Sequence[Curve], budgets: Sequence[float]) -> Tensor:
    return torch.stack([curve.right_at(budgets) for curve in curves]).mean(0)
