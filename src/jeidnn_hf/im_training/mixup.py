"""Mixup (Zhang, Cisse, Dauphin, Lopez-Paz, "mixup: Beyond Empirical Risk Minimization", ICLR 2018) of exit features.

A frozen backbone knows its training images by heart, and IMs trained plainly overfit what it makes of them. Here they
see two images at once, in the same shares at all exits, and learn the labels in those shares::

    z~^l_i = s z^l_i + (1 - s) z^l_j,    loss = sum_l mean_i [s CE(y_i, o~^l_i) + (1 - s) CE(y_j, o~^l_i)]

j is the row before i in the batch, and s ~ Beta(alpha, alpha) is drawn once a step.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from torch import Tensor

from ..gates import Lambda
from ..objectives import task_cost
from .base import Phase
from .plain import Plain


class Mixup(Plain):
    """``mixup_alpha`` is alpha. At 0 every s is 1, and this is `Plain`."""

    def read(self, features: Sequence[Tensor]) -> list[Tensor]:
        return [mix(z, self.share) for z in features]

    def loss(self, model, features: Sequence[Tensor], labels: Tensor, phase: Phase, lam: Lambda) -> Tensor:
        logits, share = model.heads.members(features), self.share
        own, other = (task_cost(logits, y) for y in (labels, labels.roll(1)))
        return self.weighted(share * own + (1 - share) * other)

    @property
    def share(self) -> float:
        """s of the coming step: of the step and the seed of the data alone, so a resumed run draws the same."""
        alpha, seed = self.args.mixup_alpha, self.args.seed if self.args.data_seed is None else self.args.data_seed
        return np.random.default_rng([seed, self.step]).beta(alpha, alpha) if alpha else 1.0


def mix(z: Tensor, share: float) -> Tensor:
    """``share`` of each row and ``1 - share`` of the row before it, of the last for the first."""
    return z.roll(1, 0).lerp(z, share)
