"""Conformal prediction sets for early exits (App. 9.3).

A *score* says how strange a class is to a prediction (``ConformalScore``); a *method* says which calibration samples
set the threshold of an exit (``fit_thresholds``); a set holds the classes whose score at the exit taken is at most its
threshold. With exchangeable data and the finite-sample quantile, ``general``, ``strict`` and ``grouped`` cover the true
class with probability at least 1 - alpha, the last two also among the samples of each exit or group; but where no
calibration sample leaves, strict's sets are the paper's empty ones and the statement is void. ``ims`` calibrates on
samples that will not leave there, and ``gated`` falls back on the size of its own groups: neither has a guarantee. None
has one class by class: a class may be absent from the calibration data, and its coverage is reported, not promised.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np
import torch
from torch import Tensor

METHODS = ("general", "ims", "strict", "gated", "grouped")
SCORES = ("lac", "aps", "raps")
QUANTILES = ("finite_sample", "plain")


@dataclass(frozen=True)
class ConformalScore:
    """The score s(x, y) from class probabilities ``p_(1) >= p_(2) >= ...``, r the rank of y, u uniform in [0, 1].

    ``lac`` (Sadinle et al. 2019): ``1 - p_y``.
    ``aps`` (Romano et al. 2020): ``p_(1) + ... + p_(r-1) + u p_(r)``.
    ``raps`` (Angelopoulos et al. 2021): as aps, ``+ penalty max(0, r - free_ranks)``.

    Args:
        name: one of SCORES.
        free_ranks: of raps; to be chosen on other data than the calibration set's, see ``choose_raps``.
        penalty: of raps, likewise.
        seed: of u, one draw per sample, which coverage is a statement over too: another seed for each repetition of an
            experiment. None: u = 1, which covers more and depends on no draw.
    """

    name: str = "lac"
    free_ranks: int = 1
    penalty: float = 0.0
    seed: int | None = 0

    def __post_init__(self) -> None:
        if self.name not in SCORES:
            raise ValueError(f"Expected a conformal score among {SCORES}, but got {self.name!r}.")
        if self.free_ranks < 0 or not 0 <= self.penalty < math.inf:
            got = f"{self.free_ranks} and {self.penalty}"
            raise ValueError(f"Expected free_ranks >= 0 and a penalty >= 0, but got {got}.")

    def __call__(self, probs: Tensor, stream: int = 0) -> Tensor:
        """Scores of all classes, float64: ``(N, K)`` or ``(N, L, K)`` to the same shape.

        The u of row i is the same at every exit, and independent between streams: 0 for the samples that get sets,
        1 for calibration, 2 for ``choose_raps``.

        Raises:
            ValueError: NaN or infinity.
        """
        if not torch.isfinite(probs).all():
            raise ValueError("Expected probabilities without NaN or infinity, but got some.")
        probs = probs.double()
        if self.name == "lac":
            return 1 - probs
        ranked, order = probs.sort(dim=-1, descending=True, stable=True)
        scores = ranked.cumsum(-1) - (1 - self._uniforms(probs, stream)) * ranked
        if self.name == "raps":
            rank = torch.arange(1, probs.shape[-1] + 1, dtype=probs.dtype, device=probs.device)
            scores = scores + self.penalty * (rank - self.free_ranks).clamp_min(0)
        return torch.empty_like(scores).scatter_(-1, order, scores)

    def _uniforms(self, probs: Tensor, stream: int) -> Tensor:
        draws = np.ones(len(probs))
        if self.seed is not None:
            draws = np.random.default_rng([self.seed, stream]).random(len(probs))
        return torch.from_numpy(draws).to(probs.device).reshape(-1, *[1] * (probs.dim() - 1))

    def to_dict(self) -> dict:
        return asdict(self)


def choose_raps(probs: Tensor, labels: Tensor, alpha: float, seed: int = 0) -> ConformalScore:
    """The raps score of the smallest sets on held-out data ``(N, K)`` that is not the calibration set.

    ``free_ranks`` is the 1 - alpha quantile of the true classes' ranks; ``penalty`` is searched for, one half of the
    data setting the threshold and the other measuring the sets.
    """
    check_alpha(alpha)
    if len(labels) < 2:
        raise ValueError(f"Expected at least 2 samples to choose raps on, but got {len(labels)}.")
    ranks = (probs > probs.gather(1, labels[:, None])).sum(1) + 1
    free = int(ranks.double().quantile(1 - alpha, interpolation="higher"))
    halves = np.array_split(np.random.default_rng(seed).permutation(len(labels)), 2)
    first, second = (torch.from_numpy(half).to(probs.device) for half in halves)
    best, smallest = None, math.inf
    for penalty in (0.001, 0.01, 0.03, 0.1, 0.3):
        score = ConformalScore("raps", free, penalty, seed)
        scores = score(probs, stream=2)
        threshold = conformal_quantile(scores[first].gather(1, labels[first, None]).squeeze(1), alpha)
        size = float((scores[second] <= threshold).sum(1).double().mean())
        if size < smallest:
            best, smallest = score, size
    return best


def conformal_quantile(scores: Tensor, alpha: float, kind: str = "finite_sample") -> float:
    """The k-th smallest of n scores ``(n,)``; +infinity where k > n.

    ``finite_sample``: k = ceil((n + 1)(1 - alpha)). ``plain``: k = ceil(n (1 - alpha)), the percentile of Section 3,
    whose sets cover a little less than 1 - alpha.
    """
    check_alpha(alpha)
    if kind not in QUANTILES:
        raise ValueError(f"Expected a quantile among {QUANTILES}, but got {kind!r}.")
    k = math.ceil((len(scores) + (kind == "finite_sample")) * (1 - alpha) - 1e-9)
    return float(scores.double().kthvalue(k).values) if 0 < k <= len(scores) else math.inf


def fit_thresholds(
    probs: Tensor,
    labels: Tensor,
    chosen: Tensor,
    alpha: float,
    method: str = "gated",
    *,
    score: ConformalScore | None = None,
    quantile: str = "finite_sample",
    groups: Sequence[int] | None = None,
    min_samples: int = 20,
) -> Tensor:
    """Thresholds of all exits, ``(L,)`` float64, from calibration data.

    ``general``: one, from the scores at the exits taken. ``ims``: one per exit, from everybody's scores there.
    ``strict``: one per exit, from those who leave there; 0 where nobody does. ``gated``: as strict, but the general one
    where fewer than ``min_samples`` leave. ``grouped``: one per group of exits, from those who leave in the group.

    Args:
        probs: class probabilities of every exit, ``(N, L, K)``; labels ``(N,)``; chosen exits ``(N,)``.
        alpha: in (0, 1), the share of true classes that may be missed.
        score: default lac.
        groups: of ``grouped``, the group of each exit, chosen on other data: ``exit_groups``.

    Raises:
        ValueError: no calibration data, NaN, alpha or method out of range, no groups.
    """
    check_alpha(alpha)
    check_method(method)
    if not len(labels):
        raise ValueError("Expected calibration data, but got none.")
    scores = true_scores(probs, labels, score or ConformalScore())
    return thresholds_of_scores(
        scores, chosen, alpha, method, quantile=quantile, groups=groups, min_samples=min_samples
    )


def true_scores(probs: Tensor, labels: Tensor, score: ConformalScore) -> Tensor:
    """Scores of the true classes of a calibration set at every exit, ``(N, L)``."""
    return torch.cat([score(answers, stream=1).gather(1, labels[:, None]) for answers in probs.unbind(1)], dim=1)


def thresholds_of_scores(
    scores: Tensor,
    chosen: Tensor,
    alpha: float,
    method: str,
    *,
    quantile: str = "finite_sample",
    groups: Sequence[int] | None = None,
    min_samples: int = 20,
) -> Tensor:
    """``fit_thresholds`` from the scores of the true classes ``(N, L)``."""
    taken = scores.gather(1, chosen[:, None]).squeeze(1)
    general = conformal_quantile(taken, alpha, quantile)
    if method == "grouped":
        if groups is None or len(groups) != scores.shape[1]:
            raise ValueError(f"Expected the group of each of {scores.shape[1]} exits, but got {groups}.")
        groups = torch.as_tensor(groups, device=scores.device)
        of_group = [taken[groups[chosen] == g] for g in range(int(groups.max()) + 1)]
        by_group = [conformal_quantile(s, alpha, quantile) for s in of_group]
        thresholds = [by_group[g] for g in groups.tolist()]
    elif method == "general":
        thresholds = [general] * scores.shape[1]
    elif method == "ims":
        thresholds = [conformal_quantile(column, alpha, quantile) for column in scores.unbind(1)]
    else:
        least = min_samples if method == "gated" else 1
        instead = general if method == "gated" else 0.0
        leaving = [taken[chosen == l] for l in range(scores.shape[1])]
        thresholds = [conformal_quantile(s, alpha, quantile) if len(s) >= least else instead for s in leaving]
    return torch.tensor(thresholds, dtype=torch.float64, device=scores.device)


def exit_groups(chosen: Tensor, num_exits: int, min_samples: int = 100) -> list[int]:
    """Merges neighbouring exits until ``min_samples`` of the given samples leave in each group: ``(L,)`` group numbers.

    To be called on validation data, so that the groups are fixed before calibration. 99 samples are the least for a
    finite threshold at alpha .01, 19 at .05.
    """
    counts = torch.bincount(chosen, minlength=num_exits).tolist()
    groups, group, filled = [], 0, 0
    for count in counts:
        if filled >= min_samples:
            group, filled = group + 1, 0
        groups.append(group)
        filled += count
    if filled < min_samples and group:
        groups = [min(g, group - 1) for g in groups]
    return groups


def prediction_sets(
    probs: Tensor, chosen: Tensor, thresholds: Tensor, score: ConformalScore | None = None
) -> Tensor:
    """``{k : s(x, k) <= threshold of the exit taken}`` as a mask ``(N, K)``; probs ``(N, L, K)``, chosen ``(N,)``."""
    taken = probs[torch.arange(len(chosen), device=probs.device), chosen]
    return (score or ConformalScore())(taken) <= thresholds[chosen][:, None]


def coverage_and_inefficiency(sets: Tensor, labels: Tensor) -> tuple[float, float]:
    """Share of the true classes in the sets, and the mean size of a set (Eq. 2)."""
    covered = sets.gather(1, labels[:, None]).double().mean()
    return float(covered), float(sets.sum(1).double().mean())


def check_alpha(alpha: float) -> None:
    if not 0 < alpha < 1:
        raise ValueError(f"Expected alpha in (0, 1), but got {alpha!r}.")


def check_method(method: str) -> None:
    if method not in METHODS:
        raise ValueError(f"Expected a conformal method among {METHODS}, but got {method!r}.")
