"""How sure an exit is, from its probabilities."""

from __future__ import annotations

import math

from torch import Tensor

from ..exits import entropy

MEASURES = ("max_probability", "entropy", "margin")


def confidence(probs: Tensor, measure: str = "max_probability") -> Tensor:
    """Probabilities ``(..., K)`` to a confidence in [0, 1], ``(...,)``.

    ``max_probability``: max p. ``entropy``: 1 - H(p) / log K (BranchyNet, Teerapittayanon et al. 2016). ``margin``:
    p_(1) - p_(2).
    """
    if measure == "max_probability":
        return probs.amax(-1)
    if measure == "entropy":
        return 1 - entropy(probs) / math.log(probs.shape[-1])
    if measure == "margin":
        top = probs.topk(2, dim=-1).values
        return top[..., 0] - top[..., 1]
    raise ValueError(f"Expected a measure among {MEASURES}, but got {measure!r}.")
