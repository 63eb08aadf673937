"""Records on which the best policy is known."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from jeidnn_hf import ExitRecord
from jeidnn_hf.costs import ExitCosts
from jeidnn_hf.splits import SplitInfo


def record_with(logits: Tensor, labels: Tensor) -> ExitRecord:
    """Logits ``(N, L, K)``; exits cost 1, 2, .. L."""
    exits = logits.shape[1]
    backbone, zeros = tuple(range(1, exits + 1)), (0,) * exits
    split = SplitInfo("toy", "validation", "train", len(labels), "0" * 64)
    return ExitRecord(logits, labels, ExitCosts(backbone, zeros, zeros, zeros), split)


def noise(samples: int = 80, exits: int = 4, classes: int = 5, seed: int = 0) -> ExitRecord:
    random = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(samples, exits, classes, generator=random)
    return record_with(logits, torch.randint(classes, (samples,), generator=random))


def easy_and_hard(samples: int = 400, exits: int = 2, seed: int = 0) -> tuple[ExitRecord, Tensor]:
    """Three in five samples are easy: right at every exit, and about 0.95 sure. The others give another wrong answer at
    every exit but the last, about 0.6 sure, and are right there. A record, and who is easy, ``(N,)``."""
    random, classes = torch.Generator().manual_seed(seed), exits + 2
    labels = torch.randint(classes, (samples,), generator=random)
    easy = torch.arange(samples) % 5 < 3
    off_by = torch.arange(exits - 1, -1, -1)
    answers = (labels[:, None] + torch.where(easy[:, None], 0, off_by)) % classes
    sure = torch.where(easy[:, None] | (off_by == 0), 0.95, 0.6)
    sure = sure + 0.02 * (torch.rand(samples, exits, generator=random) - 0.5)
    probs = torch.where(F.one_hot(answers, classes) > 0, sure[..., None], (1 - sure[..., None]) / (classes - 1))
    return record_with(probs.log(), labels), easy


def cost_of(record: ExitRecord, exit_index: Tensor) -> float:
    return float((exit_index.double() + 1).mean()) / record.num_exits


def accuracy_of(record: ExitRecord, exit_index: Tensor) -> float:
    right = [int(row[l].argmax()) == int(y) for row, l, y in zip(record.logits, exit_index, record.labels, strict=True)]
    return sum(right) / len(right)
