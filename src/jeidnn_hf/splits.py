"""Which images play which role: disjoint, stratified, seeded index sets with hashes, saved as JSON.

Roles: ``train``; ``validation`` (early stopping, thresholds, temperatures, gates that want held-out data);
``calibration`` (conformal sets and certificates, touched once); ``test``.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np

from .files import write_text

ROLES = ("train", "validation", "calibration", "test")


def sha256_of(values: Any) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


class JsonDataclass:
    """A dataclass that goes to JSON and back."""

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        return cls(**values)


@dataclass(frozen=True)
class SplitInfo(JsonDataclass):
    """Identity of a set of images: ``size`` rows of ``source`` in the given ``role``; ``sha256`` tells which rows."""

    dataset: str
    role: str
    source: str
    size: int
    sha256: str


@dataclass(eq=False)
class Splits:
    """Role -> (source split, int64 row numbers ``(N,)``). ValueError for an unknown role or a row that comes twice."""

    dataset: str
    seed: int
    roles: dict[str, tuple[str, np.ndarray]]

    def __post_init__(self) -> None:
        if unknown := sorted(set(self.roles) - set(ROLES)):
            raise ValueError(f"Expected roles among {ROLES}, but got {unknown}.")
        self.roles = {role: (source, np.asarray(rows, dtype=np.int64)) for role, (source, rows) in self.roles.items()}
        for source in {source for source, _ in self.roles.values()}:
            rows = np.sort(np.concatenate([rows for name, rows in self.roles.values() if name == source]))
            for row in rows[1:][rows[1:] == rows[:-1]]:
                raise ValueError(f"Expected disjoint roles, but got row {row} of {source!r} twice.")

    def info(self, role: str) -> SplitInfo:
        """Identity of one role: sha256 over data set, source and the row numbers as little-endian int64."""
        source, rows = self.roles[role]
        digest = hashlib.sha256(f"{self.dataset}\0{source}\0".encode() + rows.astype("<i8").tobytes()).hexdigest()
        return SplitInfo(self.dataset, role, source, len(rows), digest)

    def _content(self) -> dict[str, Any]:
        roles = {role: {**self.info(role).to_dict(), "indices": self.roles[role][1].tolist()} for role in self.roles}
        content = {"dataset": self.dataset, "seed": self.seed, "roles": roles}
        return {**content, "sha256": sha256_of(content)}

    def save(self, path: str | os.PathLike) -> None:
        """Writes one JSON file: the row numbers, the identity of each role and a sha256 over them all."""
        write_text(path, json.dumps(self._content()))

    @classmethod
    def load(cls, path: str | os.PathLike) -> Self:
        """Reads what ``save`` wrote; ValueError if it was changed since."""
        try:
            saved = json.loads(Path(path).read_text(encoding="utf-8"))
            roles = {role: (values["source"], values["indices"]) for role, values in saved["roles"].items()}
            splits = cls(saved["dataset"], saved["seed"], roles)
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise ValueError(f"Expected splits as saved by Splits.save, but got {error!r} from {path}.") from error
        content = splits._content()
        if content != saved:
            changed = [role for role in roles if content["roles"][role] != saved["roles"][role]] or "the file"
            raise ValueError(f"Expected {path} as it was saved, but the sha256 of {changed} does not match.")
        return splits


def make_splits(
    dataset: str,
    labels: Mapping[str, Sequence[int]],
    *,
    held_out: str = "train",
    validation: int = 2500,
    calibration: int = 2500,
    test: int | None = None,
    train: int | None = None,
    imbalance: float = 1.0,
    num_classes: int | None = None,
    seed: int = 0,
) -> Splits:
    """Gives the images their roles: disjoint, stratified by class, of exact size, row numbers ascending.

    Args:
        labels: class labels ``(N,)`` of the sources "train" and "test", and of ``held_out``; others are left alone.
            Without "test", the test images are taken from "train".
        held_out: the source of validation and calibration: "train" as in the paper, "test" for a backbone that has
            seen all training images, or a third one.
        validation: number of images.
        calibration: number of images.
        test: number of images; None for all that are left of the source of that name.
        train: likewise.
        imbalance: IF >= 1 of a long tail: of the training images, class c = 0..K-1 keeps n IF^(-c / (K-1)), rounded
            down, where n is the smallest class's number of them. The other roles are left as they are, since coverage
            needs exchangeable images.
        num_classes: K; default, one more than the largest label.

    Class counts are proportional, rounded by largest remainder, to the rows left by validation, then calibration.

    Raises:
        ValueError: too few images, a label out of range, or a class without an image in validation or train.
    """
    test_source = "test" if test is None or "test" in labels else "train"
    if not {"train", test_source, held_out} <= set(labels):
        raise ValueError(
            f"Expected labels of 'train', 'test' and held_out={held_out!r}, but got {list(labels)}; without 'test', "
            "say how many images of 'train' are for the test."
        )
    if not imbalance >= 1:
        raise ValueError(f"Expected an imbalance factor of at least 1, but got {imbalance}.")
    known = {source: np.asarray(labels[source], dtype=np.int64) for source in ("train", test_source, held_out)}
    num_classes = num_classes or 1 + max(values.max(initial=-1) for values in known.values())
    for source, values in known.items():
        check_labels(values, num_classes, f"split {source!r} of {dataset}")
    left = {source: np.arange(len(values)) for source, values in known.items()}
    sizes = {"validation": validation, "calibration": calibration, "test": test, "train": train}
    roles = {}
    for role, size in sizes.items():
        source = {"train": "train", "test": test_source}.get(role, held_out)
        rows, size = left[source], len(left[source]) if size is None else size
        if not 0 <= size <= len(rows):
            raise ValueError(f"Expected {role} in [0, {len(rows)}], what is left of {source!r}, but got {size}.")
        random = np.random.PCG64([seed, ROLES.index(role)]).random_raw(len(rows))
        positions = _stratified(known[source][rows], size, random)
        taken, left[source] = rows[positions], np.delete(rows, positions)
        if role == "train" and imbalance > 1:
            random = np.random.PCG64([seed, len(ROLES)]).random_raw(len(taken))
            taken = taken[long_tail(known[source][taken], imbalance, num_classes, random)]
        absent = np.flatnonzero(np.bincount(known[source][taken], minlength=num_classes) == 0)
        if role in ("validation", "train") and len(absent):
            raise ValueError(
                f"Expected every class among {len(taken)} images for {role}, but got none of class {absent[0]}."
            )
        roles[role] = (source, taken)
    return Splits(dataset, int(seed), {role: roles[role] for role in ROLES})


def _stratified(labels: np.ndarray, size: int, random: np.ndarray) -> np.ndarray:
    """Ascending positions of ``size`` of the labels, as many of each class as is its share."""
    counts = np.bincount(labels)
    quotas, remainders = np.divmod(size * counts, max(len(labels), 1))
    quotas[np.argsort(-remainders, kind="stable")[: size - quotas.sum()]] += 1
    return _first_of_each(labels, quotas, random)


def long_tail(labels: np.ndarray, imbalance: float, num_classes: int, random: np.ndarray) -> np.ndarray:
    """Ascending positions of the labels ``(N,)`` that a long tail keeps, see `make_splits`: in each class the smallest
    ``random`` ``(N,)``."""
    counts = np.bincount(labels, minlength=num_classes)
    profile = counts.min() * imbalance ** -np.linspace(0, 1, num_classes)
    return _first_of_each(labels, np.floor(profile + 1e-9).astype(np.int64), random)


def _first_of_each(labels: np.ndarray, quotas: np.ndarray, random: np.ndarray) -> np.ndarray:
    """Ascending positions of the labels: of each class its quota, those with the smallest ``random``."""
    counts = np.bincount(labels, minlength=len(quotas))
    by_class = np.lexsort((random, labels))
    rank = np.arange(len(labels)) - np.repeat(np.cumsum(counts) - counts, counts)
    return np.sort(by_class[rank < np.repeat(quotas, counts)])


def class_groups(counts: Sequence[int]) -> dict[str, np.ndarray]:
    """Class numbers by their training images ``(K,)``: "many" (> 100), "medium" (20 to 100) and "few" (< 20)."""
    counts = np.asarray(counts)
    groups = {"many": counts > 100, "medium": (counts >= 20) & (counts <= 100), "few": counts < 20}
    return {name: np.flatnonzero(members) for name, members in groups.items()}


def check_labels(labels: np.ndarray, num_classes: int, where: str, rows: np.ndarray | None = None) -> None:
    for i in np.flatnonzero((labels < 0) | (labels >= num_classes)):
        row = i if rows is None else rows[i]
        raise ValueError(f"Expected labels in [0, {num_classes}), but got {labels[i]} at row {row} of {where}.")
