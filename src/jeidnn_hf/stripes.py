"""A task that needs no download: pictures of stripes, level or upright, some too faint to tell."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class Stripes(torch.utils.data.Dataset):
    """``count`` pictures, 3 x 16 x 16, of class 0 (level) or 1 (upright) in equal parts, their contrast by chance.

    Attributes:
        pixel_values: ``(N, 3, 16, 16)``.
        labels: ``(N,)``.
    """

    def __init__(self, count: int, seed: int = 0):
        random = torch.Generator().manual_seed(seed)
        self.labels = torch.arange(count) % 2
        phase = 6.28 * torch.rand(count, 1, 1, 1, generator=random)
        level = torch.sin(torch.linspace(0, 19, 16)[:, None] + phase).expand(-1, 3, 16, 16)
        waves = torch.where(self.labels.bool()[:, None, None, None], level.mT, level)
        noise = torch.randn(count, 3, 16, 16, generator=random)
        self.pixel_values = waves * torch.randn(count, 3, 1, 1, generator=random) + 0.7 * noise

    def __len__(self) -> int:
        return len(self.labels)

    def __getitems__(self, rows: Sequence[int]) -> dict[str, Tensor]:
        rows = torch.as_tensor(rows)
        return {"pixel_values": self.pixel_values[rows], "labels": self.labels[rows], "index": rows}
