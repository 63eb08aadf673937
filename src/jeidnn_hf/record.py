"""The ExitRecord: what every exit answered on a set of images. All that looks at results takes it and nothing else."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from functools import cached_property
from operator import itemgetter
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.utils.data import Dataset

from .calibration import fit_temperatures
from .costs import ExitCosts
from .files import written_whole
from .gates import ExitPolicy
from .processes import gathered, rank_and_number
from .splits import SplitInfo


@torch.inference_mode()
def collect_logits(model, images: Dataset, batch_size: int = 512, members: bool = False) -> tuple[Tensor, Tensor]:
    """Logits ``(N, L, K)`` of all exits and labels ``(N,)`` on a data set of pixels or cached features, on the CPU.

    Processes that train together take turns at the batches and all get all answers, those of one process to the bit,
    so all of them have to call this.

    ``members``: the IMs' own logits, before ensemble and boosting.
    """
    answer = model.heads.members if members else model.heads
    rank, processes = rank_and_number()
    pieces, device = [], model.device
    for start in range(rank * batch_size, len(images), processes * batch_size):
        batch = images.__getitems__(range(start, min(start + batch_size, len(images))))
        if "exit_features" in batch:
            features = model.split_features(batch["exit_features"].to(device))
        else:
            features = model.backbone(batch["pixel_values"].to(device))
        pieces.append((start, answer(features).cpu(), batch["labels"]))
    pieces = sorted(sum(gathered(pieces), []), key=itemgetter(0))
    _, logits, labels = zip(*pieces, strict=True)
    return torch.cat(logits), torch.cat(labels)


@dataclass
class ExitRecord:
    """Answers of all exits on one split.

    Args:
        logits: ``(N, L, K)``.
        labels: ``(N,)``.
        costs: the model's cost table, in Mul-Adds.
        split: which images these are.
        backbone: fingerprint of the backbone that made them, if it has one.
        index: row numbers of the images in their source, ``(N,)``.
    """

    logits: Tensor
    labels: Tensor
    costs: ExitCosts
    split: SplitInfo
    backbone: str | None = None
    index: Tensor | None = None

    def __post_init__(self):
        if self.logits.dim() != 3 or self.labels.shape != self.logits.shape[:1] or not len(self.labels):
            raise ValueError(
                f"Expected logits (N, L, K) and labels (N,) with N > 0, but got {tuple(self.logits.shape)} and "
                f"{tuple(self.labels.shape)}."
            )
        if not self.logits.is_floating_point() or self.labels.dtype is not torch.int64:
            got = f"{self.logits.dtype} and {self.labels.dtype}"
            raise ValueError(f"Expected floating-point logits and integer labels (int64), but got {got}.")
        if not 0 <= int(self.labels.min()) <= int(self.labels.max()) < self.logits.shape[2]:
            raise ValueError(
                f"Expected labels in 0..{self.logits.shape[2] - 1}, but got {int(self.labels.min())} to "
                f"{int(self.labels.max())}."
            )
        if self.logits.shape[1] != len(self.costs.total):
            raise ValueError(f"Expected costs of {self.logits.shape[1]} exits, but got {len(self.costs.total)}.")
        if self.index is not None and self.index.shape != self.labels.shape:
            raise ValueError(f"Expected an index {tuple(self.labels.shape)}, but got {tuple(self.index.shape)}.")
        if not torch.isfinite(self.logits).all():
            raise ValueError("Expected logits without NaN or infinity, but got some.")

    @property
    def normalised_costs(self) -> Tensor:
        """IC^l as a share of the bare backbone's Mul-Adds, ``(L,)``."""
        return torch.tensor(self.costs.normalised, dtype=self.logits.dtype, device=self.logits.device)

    @cached_property
    def temperatures(self) -> Tensor:
        """One per exit, ``(L,)``, by likelihood on these answers; no policy or lambda has a part in them."""
        return fit_temperatures(self.logits, self.labels)

    @property
    def num_exits(self) -> int:
        return self.logits.shape[1]

    def under(self, policy: ExitPolicy) -> ExitRecord:
        """The same answers, at the costs that they have where this policy decides."""
        record = replace(self, costs=self.costs.under(policy, self.logits.shape[2]))
        record.__dict__["temperatures"] = self.temperatures
        return record

    def exits_taken(self, policy: ExitPolicy, lam: float | None = None) -> Tensor:
        """The exit that a policy, on whatever device it is, takes for each image, ``(N,)`` in 0..L-1."""
        return policy.decide(self.logits.to(policy.device), lam).to(self.logits.device)

    @classmethod
    def of(cls, model, images: Dataset, split: SplitInfo, batch_size: int = 512) -> ExitRecord:
        """Evaluates every exit of a model on a data set of pixels or of cached features, see ``collect_logits``."""
        logits, labels = collect_logits(model, images, batch_size)
        return cls(logits, labels, model.costs, split, model.config.backbone_fingerprint, images.index)

    def save(self, folder: str | Path) -> None:
        """Writes ``record.safetensors`` and ``record.json``."""
        tensors = {"logits": self.logits.contiguous(), "labels": self.labels.contiguous()}
        if self.index is not None:
            tensors["index"] = self.index.contiguous()
        described = {"costs": self.costs.to_dict(), "split": self.split.to_dict(), "backbone": self.backbone}
        with written_whole(folder) as temporary:
            save_file(tensors, temporary / "record.safetensors")
            (temporary / "record.json").write_text(json.dumps(described, indent=1), encoding="utf-8")

    @classmethod
    def load(cls, folder: str | Path) -> ExitRecord:
        """Reads what ``save`` wrote; a ValueError where it cannot."""
        folder = Path(folder)
        try:
            tensors = load_file(folder / "record.safetensors")
            described = json.loads((folder / "record.json").read_text(encoding="utf-8"))
            costs, split = ExitCosts.from_dict(described["costs"]), SplitInfo.from_dict(described["split"])
            return cls(tensors["logits"], tensors["labels"], costs, split, described["backbone"], tensors.get("index"))
        except Exception as error:
            raise ValueError(f"Expected an ExitRecord in {str(folder)!r}, but it cannot be read: {error}") from error


def check_comparable(first: ExitRecord, second: ExitRecord) -> None:
    """A ValueError where two records are not of one network: exits, classes, backbone, data set."""
    compared = {
        "dataset": (first.split.dataset, second.split.dataset),
        "backbone": (first.backbone, second.backbone),
        "exits and classes": (tuple(first.logits.shape[1:]), tuple(second.logits.shape[1:])),
    }
    for what, (one, other) in compared.items():
        if one != other:
            raise ValueError(
                f"Expected {first.split.role} and {second.split.role} records of the same {what}, "
                f"but got {one} and {other}."
            )


def check_disjoint(held_out: ExitRecord, other: ExitRecord) -> None:
    """A ValueError where ``held_out`` was trained on, or shares images with ``other``, or is of another network."""
    check_comparable(held_out, other)
    if held_out.split.role == "train":
        raise ValueError("Expected a record of held-out images, but got one of the role 'train'.")
    if held_out.split.source != other.split.source:
        return
    if held_out.index is None or other.index is None:
        shared = held_out.split.size if held_out.split.sha256 == other.split.sha256 else 0
    else:
        shared = int(torch.isin(held_out.index, other.index).sum())
    if shared:
        raise ValueError(
            f"Expected {held_out.split.role} and {other.split.role} records without a common image, but got {shared} "
            f"images of {held_out.split.source!r} in both."
        )
