"""`JEIDNNTrainingArguments`: the arguments of transformers' Trainer, with the defaults of each recipe."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import TrainingArguments
from transformers.integrations import get_available_reporting_integrations

from .im_training import IM_TRAININGS
from .im_training.diffbranch import MIXTURES
from .im_training.l2w_den import CENTERS
from .objectives import GATE_TARGETS, IM_WEIGHTS

TRAINING_RECIPES: dict[str, dict[str, Any]] = {
    "paper": {
        "num_train_epochs": 15,
        "per_device_train_batch_size": 64,
        "learning_rate": 0.01,
        "weight_decay": 5e-4,
        "optimizer": "adam",
        "schedule": "constant",
        "warmup_weighting": "position",
        "im_training": "jeidnn",
        "gates_on": "train",
        "gate_objective": "surrogate",
    },
    "default": {
        "num_train_epochs": 6,
        "per_device_train_batch_size": 512,
        "learning_rate": 2e-3,
        "weight_decay": 0.01,
        "optimizer": "adamw",
        "schedule": "one_cycle",
        "warmup_weighting": "uniform",
        "im_training": "soft_targets",
        "gates_on": "validation",
        "gate_objective": "expected_cost",
    },
}
"""What a recipe puts in the arguments that are left None."""

_CHOICES = {
    "recipe": tuple(TRAINING_RECIPES),
    "optimizer": ("adam", "adamw"),
    "schedule": ("constant", "one_cycle"),
    "warmup_weighting": ("position", "uniform"),
    "im_training": tuple(IM_TRAININGS),
    "gates_on": ("train", "validation"),
    "gate_objective": ("surrogate", "expected_cost"),
    "gate_targets": GATE_TARGETS,
    "im_weights": IM_WEIGHTS,
    "mixture": MIXTURES,
    "l2w_center": CENTERS,
}


@dataclass
class JEIDNNTrainingArguments(TrainingArguments):
    """Arguments of `JEIDNNTrainer`; those left None are the recipe's."""

    recipe: str = field(default="default", metadata={"help": "paper or default."})
    num_train_epochs: float | None = field(default=None, metadata={"help": "E; an epoch passes all cached views."})
    per_device_train_batch_size: int | None = field(default=None)
    learning_rate: float | None = field(default=None)
    weight_decay: float | None = field(default=None, metadata={"help": "Coupled for adam, decoupled for adamw."})
    max_grad_norm: float = field(default=0.0, metadata={"help": "0: gradients are not clipped."})
    head_learning_rate: float | None = field(default=None, metadata={"help": "Default: learning_rate."})
    gate_learning_rate: float | None = field(default=None, metadata={"help": "Default: learning_rate."})
    optimizer: str | None = field(default=None, metadata={"help": "adam or adamw."})
    schedule: str | None = field(default=None, metadata={"help": "constant or one_cycle."})
    warmup_epochs: int | None = field(
        default=None, metadata={"help": "Epochs in which the IMs alone are trained. Default: a third of the epochs."}
    )
    warmup_weighting: str | None = field(default=None, metadata={"help": "position: exit l times L - l, Eq. 17."})
    bi_switch: int = field(default=200, metadata={"help": "Optimizer steps between two changes of phase."})
    im_training: str | None = field(default=None, metadata={"help": "How IMs are trained, see im_training."})
    gates_on: str | None = field(
        default=None, metadata={"help": "train: with the IMs, as the paper. validation: after the IMs, there."}
    )
    gate_objective: str | None = field(default=None, metadata={"help": "surrogate (Eq. 16) or expected_cost (Eq. 6)."})
    gate_targets: str = field(default="subsequent", metadata={"help": "subsequent (Eq. 31) or if_min (App. 9.15)."})
    imbalance_low: float = field(default=0.2, metadata={"help": "Smallest weight of a gate's positives."})
    imbalance_high: float = field(default=5.0, metadata={"help": "Largest weight of a gate's positives."})
    full_gradient: bool = field(default=False, metadata={"help": "JEI-DNN-FULL, Eq. 28-29."})
    im_weights: str = field(
        default="exit_distribution", metadata={"help": "jeidnn: as Eq. 14, or cancelling, as the published code."}
    )
    mixture: str = field(default="probabilities", metadata={"help": "diffbranch: what is mixed; or losses, Eq. 6."})
    l2w_epsilon: float = field(default=0.8, metadata={"help": "l2w_den: how far weights can be from 1."})
    l2w_center: str = field(default="col", metadata={"help": "l2w_den: where weights average 1, col or mat."})
    l2w_interval: int = field(default=1, metadata={"help": "l2w_den: batches from one meta step to the next."})
    l2w_ratio: float = field(default=0.75, metadata={"help": "l2w_den: p, as exit l is meant for a share ~ p^l."})
    soft_mixup: float = field(default=0.2, metadata={"help": "soft_targets: alpha, of two images' shares; 0: one."})
    soft_teaching: float = field(default=0.5, metadata={"help": "soft_targets: g, the share of late exits' answers."})
    soft_temperature: float = field(default=2.0, metadata={"help": "soft_targets: T of early and late exits' answers."})
    distillation_weight: float = field(default=0.1, metadata={"help": "imta: gamma, the share of the distillation."})
    distillation_temperature: float = field(default=1.0, metadata={"help": "imta: T of student and teacher."})
    gate_steps: int = field(default=400, metadata={"help": "Full-batch steps of the gates fitted on validation."})
    ensemble_pull: float = field(default=0.3, metadata={"help": "Pull of the ensemble towards the identity."})
    early_stopping_patience: int | None = field(
        default=None, metadata={"help": "Epochs without a better validation cost before training stops; None: never."}
    )
    remove_unused_columns: bool | None = field(default=False)
    logging_nan_inf_filter: bool = field(default=False)
    dataloader_pin_memory: bool = field(default=torch.cuda.is_available())

    def __post_init__(self):
        for name, allowed in _CHOICES.items():
            value = getattr(self, name)
            if value not in allowed and not (value is None and name in TRAINING_RECIPES["paper"]):
                raise ValueError(f"Expected {name} to be one of {allowed}, but got {value!r}.")
        for name, value in TRAINING_RECIPES[self.recipe].items():
            if getattr(self, name) is None:
                setattr(self, name, value)
        if self.gates_on == "train" and not IM_TRAININGS[self.im_training].trains_gates:
            raise ValueError(f"Expected gates_on='validation', but got 'train': {self.im_training} trains no gates.")
        if self.warmup_epochs is None:
            self.warmup_epochs = max(1, round(self.num_train_epochs / 3))
        if not 0 <= self.soft_mixup < math.inf:
            raise ValueError(f"Expected soft_mixup to be finite and not negative, but got {self.soft_mixup}.")
        for name in ("distillation_weight", "soft_teaching"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"Expected {name} in [0, 1], but got {getattr(self, name)}.")
        for name in ("bi_switch", "gate_steps", "num_train_epochs", "distillation_temperature", "soft_temperature"):
            if not getattr(self, name) > 0:
                raise ValueError(f"Expected {name} to be positive, but got {getattr(self, name)}.")
        if not (self.l2w_epsilon >= 0 and self.l2w_ratio > 0 and self.l2w_interval >= 1):
            got = f"{self.l2w_epsilon}, {self.l2w_ratio}, {self.l2w_interval}"
            raise ValueError(f"Expected l2w_epsilon >= 0, l2w_ratio > 0 and l2w_interval >= 1, but got {got}.")
        if self.warmup_epochs < 0:
            raise ValueError(f"Expected warmup_epochs not to be negative, but got {self.warmup_epochs}.")
        if not 0 <= self.imbalance_low <= self.imbalance_high:
            raise ValueError(
                f"Expected 0 <= imbalance_low <= imbalance_high, but got {self.imbalance_low}, {self.imbalance_high}."
            )
        self.use_cpu = self.use_cpu or not torch.accelerator.is_available()  # else torchrun's processes stay strangers
        super().__post_init__()
        installed = get_available_reporting_integrations()
        if absent := [name for name in self.report_to if name not in installed]:
            raise ValueError(f"Expected report_to among {installed}, which are installed, but got {absent}.")

    @property
    def order_seed(self) -> int:
        """That of the order of the data, and of what is drawn batch by batch: ``data_seed``, or ``seed``."""
        return self.seed if self.data_seed is None else self.data_seed
