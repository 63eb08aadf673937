"""How sure an exit is, from its probabilities, and what policies that go by it have in common."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor

from ..exits import entropy
from ..gates import ExitPolicy

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


class CalibratedConfidence(ExitPolicy):
    """Of policies that compare an exit's confidence, after the exit's temperature, with thresholds.

    Args:
        temperatures: ``(L,)``.
        measure: one of `MEASURES`.
    """

    def __init__(self, temperatures: Tensor, measure: str):
        super().__init__(len(temperatures))
        if measure not in MEASURES:
            raise ValueError(f"Expected a measure among {MEASURES}, but got {measure!r}.")
        self.measure = measure
        self.register_buffer("temperatures", temperatures)

    @property
    def options(self) -> dict[str, Any]:
        return {"measure": self.measure}

    def confidence(self, logits: Tensor) -> Tensor:
        """``(N, L, K)`` to calibrated confidences ``(N, L)``."""
        return confidence((logits / self.temperatures[:, None]).softmax(-1), self.measure)

    def confidence_at(self, l: int, logits: Tensor) -> Tensor:
        """The same of exit l (0-based) alone, ``(B, K)`` to ``(B,)``."""
        return confidence((logits / self.temperatures[l]).softmax(-1), self.measure)

    def mul_adds(self, num_labels: int) -> int:
        """A temperature, K, and the measure: a maximum K, an entropy 2 K, a margin K + 1."""
        of_measure = {"max_probability": num_labels, "entropy": 2 * num_labels, "margin": num_labels + 1}
        return num_labels + of_measure[self.measure]
