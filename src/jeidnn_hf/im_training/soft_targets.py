"""Training on soft targets, the default recipe's: mixed, and for the early exits taught by the later ones.

A frozen backbone knows its training images by heart, and IMs trained plainly overfit what it makes of them. Two known
remedies, in one loss::

    z~^l_i = s z^l_i + (1 - s) z^l_j                                   what IM l reads
    CE_l = mean_i [s CE(y_i, o^l_i) + (1 - s) CE(y_j, o^l_i)]          its answer o^l against the labels, boosted or not
    loss = sum_{l <= L/2} [(1 - g) CE_l + g T^2 KL(softmax(t / T) || softmax(o^l / T))] + sum_{l > L/2} CE_l

Mixup (Zhang et al., ICLR 2018): j is the row beside i; s ~ Beta(alpha, alpha), one draw a step, for all exits.
Self-distillation: the early half of the trained exits also learns from t, the mean log-probabilities of the late half.
Label smoothing is no third: it makes right and wrong answers alike in confidence, which is what gates go by.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from ..gates import Lambda
from ..objectives import task_cost
from .base import Phase
from .imta import distillation
from .plain import Plain


class SoftTargets(Plain):
    """``soft_mixup`` is alpha, ``soft_teaching`` g, ``soft_temperature`` T. With the first two at 0 this is `Plain`."""

    boosts = True

    def read(self, features: Sequence[Tensor]) -> list[Tensor]:
        return [mix(z, self.share) for z in features]

    def loss(self, model, features: Sequence[Tensor], labels: Tensor, phase: Phase, lam: Lambda) -> Tensor:
        logits, share = model.heads.boosted(model.heads.members(features)), self.share
        own, other = (task_cost(logits, y) for y in (labels, beside(labels)))
        task = share * own + (1 - share) * other
        trained, teaching = self.num_exits - self.native_head, self.args.soft_teaching
        early = trained // 2
        teacher = logits[:, early:trained].log_softmax(-1).mean(1, keepdim=True)
        taught = distillation(logits[:, :early], teacher, self.args.soft_temperature)
        return self.weighted(torch.cat([(1 - teaching) * task[:, :early] + teaching * taught, task[:, early:]], dim=1))

    @property
    def share(self) -> float:
        """s of the coming step: of the step and the seed of the data alone, so a resumed run draws the same."""
        alpha = self.args.soft_mixup
        return np.random.default_rng([self.args.order_seed, self.step]).beta(alpha, alpha) if alpha else 1.0


def mix(z: Tensor, share: float) -> Tensor:
    """``share`` of each row and ``1 - share`` of the one beside it."""
    return beside(z).lerp(z, share)


def beside(rows: Tensor) -> Tensor:
    """Rows 2, 1, 4, 3, ... of 1, 2, 3, 4, ...: pairs that stay together when processes share a batch. A last one that
    is alone is beside itself."""
    numbers = torch.arange(len(rows), device=rows.device)
    return rows[(numbers ^ 1).clamp_max(len(rows) - 1)]
