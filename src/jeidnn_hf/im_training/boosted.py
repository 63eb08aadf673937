"""BoostedNet (Yu, Li, Hua, Huang, Shi, "Boosted Dynamic Neural Networks", AAAI 2023): the exits as an additive model.

Exit l learns what the scaled answer before, taken as given, leaves over: ``sum_l mean CE(y, o^l + sg(alpha F^{l-1}))``
with ``F^l = o^l + alpha F^{l-1}``. The network answers with F^l, so alpha is the model's, ``config.boosting``, 0.5 as
published. An exit where the backbone keeps its classifier is boosted too, and has nothing to learn.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ..gates import Lambda
from ..objectives import task_cost
from .base import Phase
from .plain import Plain


class Boosted(Plain):
    """All exits count alike as published, with ``warmup_weighting="uniform"``. At alpha = 0 this is `Plain`.

    The paper's rescaling of gradients (see `imta`) concerns a trained backbone only.
    """

    boosts = True

    @classmethod
    def check(cls, config) -> None:
        super().check(config)
        if not config.boosting:
            raise ValueError(
                f"Expected a model with boosting for im_training='boosted', but got boosting={config.boosting!r}; "
                "build it with boosting=0.5."
            )

    def loss(self, model, features: Sequence[Tensor], labels: Tensor, phase: Phase, lam: Lambda) -> Tensor:
        return self.weighted(task_cost(model.heads.boosted(model.heads.members(features)), labels))
