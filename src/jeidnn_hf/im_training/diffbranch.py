"""DiffBranch (Scardapane, Comminiello, Scarpiniti, Baccarelli, Uncini, "Differentiable branching in deep networks for
fast inference", ICASSP 2020): gates and IMs jointly, by back-propagation through the soft mixture of all exits::

    pi_l = g^l prod_{j<l} (1 - g^j),    L = mean_i [-log sum_l pi_l p^l[y] + lambda sum_l pi_l IC^l]

As JEI-DNN's authors compare it (App. 9.13): their IMs, gates and warm-up; every step after that moves both.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ..exits import exit_log_distribution
from ..gates import Lambda
from ..objectives import expected_cost, mixture_cost, task_cost
from .base import Phase
from .jeidnn import scaled_cost
from .plain import Plain

MIXTURES = ("probabilities", "losses")


class DiffBranch(Plain):
    """``mixture="probabilities"``: -log of a mixture, as published. ``"losses"``: the mixture of -log, JEI-DNN's Eq. 6
    with its full gradient. A range of lambdas is served as `JEIDNN` does."""

    trains_gates = True
    turns = (Phase.JOINT,)

    @classmethod
    def check(cls, config) -> None:
        super().check(config)
        if config.gate_form != "stick":
            raise ValueError(
                f"Expected gate_form='stick' for im_training='diffbranch', but got {config.gate_form!r}; "
                "set it when the model is built."
            )

    def loss(self, model, features: Sequence[Tensor], labels: Tensor, phase: Phase, lam: Lambda) -> Tensor:
        if phase is Phase.WARMUP:
            return super().loss(model, features, labels, phase, lam)
        logits = model.heads.members(features)
        task, log_distribution = task_cost(logits, labels), exit_log_distribution(model.policy.gate_logits(logits, lam))
        if self.args.mixture == "probabilities":
            task = mixture_cost(task, log_distribution)[:, None]
        return expected_cost(scaled_cost(task, model.normalised_costs, lam, model.config), log_distribution.exp())
