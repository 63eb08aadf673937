"""Plain training: the cross-entropies of all exits, and nothing between them. The warm-up of JEI-DNN is the same."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ..gates import Lambda
from ..objectives import task_cost, warmup_loss
from .base import IMTraining, Phase


class Plain(IMTraining):
    """``warmup_weighting="position"`` weighs exit l by L - l (Eq. 17), ``"uniform"`` all alike."""

    def loss(self, model, features: Sequence[Tensor], labels: Tensor, phase: Phase, lam: Lambda) -> Tensor:
        return self.weighted(task_cost(model.heads.members(features), labels))

    def weighted(self, task: Tensor) -> Tensor:
        """Cross-entropies ``(B, L)`` to the loss."""
        return warmup_loss(task) if self.args.warmup_weighting == "position" else task.mean(0).sum()
