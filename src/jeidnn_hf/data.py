"""How images become tensors, as a backbone wants them.

    sources = load_source("cifar10")
    source, indices = split_source("cifar10", sources).roles["validation"]
    view = ImageView(sources[source], indices, Preprocessing.of_backbone("t2t_vit_7"))

An image is named by its source split and its row number there, its ``index``. Roles, augmentation and caches all use
that name, so the same numbers come out with or without a feature cache, in any batch order and in any worker.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import PIL.Image
import torch
from torch import Tensor

from .preprocessing import Preprocessing
from .sources import Source, StreamedRows, read_labels
from .splits import check_labels


class ImageView(torch.utils.data.Dataset):
    """The images of one role as tensors: row r is image ``indices[r % N]`` in view ``views[r // N]``.

    Args:
        dataset: one source split of ``sources.load_source``; a streamed one gives its images in ascending order only.
        indices: row numbers in it, ``(N,)``.
        views: see ``Preprocessing``; with V views the length is N V.
        seed: see ``Preprocessing``.

    Raises:
        ValueError: no images, or a row number or label out of range; while reading, a picture that does not decode.
    """

    def __init__(
        self,
        dataset: Source,
        indices: Sequence[int],
        preprocessing: Preprocessing,
        *,
        views: Sequence[int | None] = (None,),
        seed: int = 0,
    ) -> None:
        self.indices, self.views = np.asarray(indices, dtype=np.int64), tuple(views)
        self.preprocessing, self.seed = preprocessing, seed
        if not len(self):
            raise ValueError(f"Expected images and views, but got {len(self.indices)} images in views {self.views}.")
        for row in self.indices[(self.indices < 0) | (self.indices >= len(dataset))]:
            raise ValueError(f"Expected row numbers in [0, {len(dataset)}), but got {row}.")
        labels = read_labels(dataset)[self.indices]
        check_labels(labels, dataset.features["label"].num_classes, "the data set", self.indices)
        self._labels = torch.from_numpy(labels)
        self._encoded = dataset
        if not isinstance(dataset, StreamedRows):
            self._encoded = dataset.with_format(None).cast_column("image", datasets.Image(decode=False))

    @property
    def labels(self) -> Tensor:
        """Class label of each row, int64 ``(len(self),)``; decodes no image."""
        return self._labels.repeat(len(self.views))

    @property
    def index(self) -> Tensor:
        """Row number of each row in the source, int64 ``(len(self),)``."""
        return torch.from_numpy(self.indices).repeat(len(self.views))

    def content_hash(self, probes: int = 64) -> str:
        """sha256 of the labels and of the encoded bytes of ``probes`` pictures spread over the rows, or of the first.

        It tells two sources apart whose row numbers are the same (another order, another version), at little cost; the
        first pictures are those that a streamed source has at hand.
        """
        count = min(probes, len(self.indices))
        spread = np.linspace(0, len(self.indices) - 1, count).astype(np.int64)
        rows = self.indices[range(count) if isinstance(self._encoded, StreamedRows) else spread]
        digest = hashlib.sha256(self._labels.numpy().astype("<i8").tobytes())
        for row, value in zip(rows, self._encoded[rows]["image"], strict=True):
            if value is None:
                _decode(value, row)
            digest.update(value["bytes"] or Path(value["path"]).read_bytes())
        return digest.hexdigest()

    def __len__(self) -> int:
        return len(self.indices) * len(self.views)

    def __getitem__(self, row: int) -> dict[str, Tensor]:
        return {name: values[0] for name, values in self.__getitems__([row]).items()}

    def __getitems__(self, rows: Sequence[int]) -> dict[str, Tensor]:
        """A batch: ``pixel_values (B, C, H, W)`` float32, ``labels (B,)`` and ``index (B,)`` int64."""
        wanted = np.asarray(rows, dtype=np.int64)
        for row in wanted[(wanted < -len(self)) | (wanted >= len(self))]:
            raise IndexError(f"Expected a row in [0, {len(self)}), but got {row}.")
        blocks, positions = np.divmod(wanted % len(self), len(self.indices))
        index = self.indices[positions]
        images = [_decode(value, row) for value, row in zip(self._encoded[index]["image"], index, strict=True)]
        pixel_values = torch.empty(len(images), self.preprocessing.channels, *[self.preprocessing.size] * 2)
        for block in np.unique(blocks):
            here = np.flatnonzero(blocks == block)
            options = {"index": index[here], "view": self.views[block], "seed": self.seed}
            pixel_values[here] = self.preprocessing([images[i] for i in here], **options)
        return {"pixel_values": pixel_values, "labels": self._labels[positions], "index": torch.from_numpy(index)}


def _decode(value: dict[str, Any] | None, row: int) -> PIL.Image.Image:
    try:
        if value is None:
            raise ValueError("an empty cell")
        return datasets.Image().decode_example(value)
    except Exception as error:
        raise ValueError(f"Expected a readable picture, but got {error!r} at row {row} of the data set.") from error


def collate(batch: dict[str, Tensor] | Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """One batch from a list of examples; a batch ready made by ``ImageView`` passes through."""
    return batch if isinstance(batch, dict) else {name: torch.stack([x[name] for x in batch]) for name in batch[0]}
