"""The optimizer and the learning-rate schedule that training arguments ask for."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from .training_args import JEIDNNTrainingArguments


def build_optimizer(
    args: JEIDNNTrainingArguments, heads: Sequence[nn.Parameter], gates: Sequence[nn.Parameter]
) -> torch.optim.Optimizer:
    """Adam or AdamW, fused, with a group of parameters of the inference modules and one of the gates."""
    groups = [
        {"params": list(heads), "lr": _first_given(args.head_learning_rate, args.learning_rate)},
        {"params": list(gates), "lr": _first_given(args.gate_learning_rate, args.learning_rate)},
    ]
    optimizer = torch.optim.Adam if args.optimizer == "adam" else torch.optim.AdamW
    return optimizer(
        groups, weight_decay=args.weight_decay, betas=(args.adam_beta1, args.adam_beta2), eps=args.adam_epsilon,
        fused=all(group["params"][0].is_floating_point() for group in groups),
    )  # fmt: skip


def build_schedule(
    args: JEIDNNTrainingArguments, optimizer: torch.optim.Optimizer, steps: int
) -> torch.optim.lr_scheduler.LRScheduler:
    """Constant, or one cycle of ``steps`` whose peaks are the groups' rates; both are linear in those."""
    if args.schedule == "one_cycle":
        peaks = [group["lr"] for group in optimizer.param_groups]
        return torch.optim.lr_scheduler.OneCycleLR(optimizer, peaks, total_steps=steps)
    return torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1.0, total_iters=0)


def _first_given(*values):
    """The first that is not None."""
    return next(value for value in values if value is not None)
