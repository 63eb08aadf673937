"""The interface of a way to train inference modules (IMs): the loss of one optimizer step."""

from __future__ import annotations

from collections.abc import Sequence
from enum import IntEnum
from typing import TYPE_CHECKING

from torch import Tensor, nn

from ..gates import Lambda

if TYPE_CHECKING:
    from ..configuration_jeidnn import JEIDNNConfig
    from ..modeling_jeidnn import JEIDNNForImageClassification
    from ..training_args import JEIDNNTrainingArguments


class Phase(IntEnum):
    """Whose parameters a step moves."""

    WARMUP = 0
    GATE = 1
    IM = 2
    JOINT = 3


class IMTraining(nn.Module):
    """A way to train IMs. `JEIDNNTrainer` asks it for the loss of each step; parameters and buffers of its own are
    saved in the trainer's checkpoints.

    Args:
        args: those of the trainer.
        num_exits: L of the model.
        native_head: whether the last exit is the backbone's own classifier, which no one trains.

    ``trains_gates``: whether the loss moves the gates too; else they are fitted afterwards, on held-out answers.
    ``turns``: the phases at which steps take turns after the warm-up; where there are none, every step is one of it.
    ``step``, ``learning_rate``: the number of the coming step, from 0, and the rate of the IMs in it; the trainer sets
    both.
    ``boosts``: whether IMs of a model with ``boosting`` can be trained so, each to add to the answers before; else
    every IM is trained as if it answered alone.
    """

    trains_gates = False
    boosts = False
    turns: tuple[Phase, ...] = ()
    step: int
    learning_rate: float

    def __init__(self, args: JEIDNNTrainingArguments, num_exits: int, native_head: bool = True):
        super().__init__()
        self.args, self.num_exits, self.native_head = args, num_exits, native_head

    @classmethod
    def check(cls, config: JEIDNNConfig) -> None:
        """A ValueError where a model of this config cannot be trained so."""
        if config.boosting and not cls.boosts:
            raise ValueError(
                f"Expected im_training='boosted' or 'soft_targets' for boosting={config.boosting!r}, but got "
                f"{cls.__name__}, which trains every IM as if it answered alone; or build it with boosting=0."
            )

    def objective(
        self, model: JEIDNNForImageClassification, features: Sequence[Tensor], labels: Tensor, phase: Phase, lam: Lambda
    ) -> Tensor:
        """The loss of one step, from the features as they come; arguments as of `loss`."""
        return self.loss(model, self.read(features), labels, phase=phase, lam=lam)

    def read(self, features: Sequence[Tensor]) -> Sequence[Tensor]:
        """What the IMs read in the coming step in the place of the features of a batch: by default, these."""
        return features

    def loss(
        self, model: JEIDNNForImageClassification, features: Sequence[Tensor], labels: Tensor, phase: Phase, lam: Lambda
    ) -> Tensor:
        """A scalar. A step of the warm-up reads no lambda.

        Args:
            model: the one that is trained.
            features: of every exit, ``(B, d_l)``, as `read` gives them.
            labels: ``(B,)``.
            lam: of the costs, a number or ``(B,)``.
        """
        raise NotImplementedError
