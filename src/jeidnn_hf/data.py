"""How images become tensors, as a backbone wants them.

    sources = load_source("cifar10")
    source, indices = split_source("cifar10", sources).roles["validation"]
    view = ImageView(sources[source], indices, Preprocessing.of_backbone("t2t_vit_7"))

An image is named by its source split and its row number there, its ``index``. Roles, augmentation and caches all use
that name, so the same numbers come out with or without a feature cache, in any batch order and in any worker.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import datasets
import numpy as np
import PIL.Image
import torch
from torch import Tensor

from .backbones import pretrained_cfg
from .sources import Source, StreamedRows, read_labels
from .splits import JsonDataclass, check_labels, sha256_of

INTERPOLATIONS = {mode.name.lower(): mode for mode in PIL.Image.Resampling}
CROP_MODES = ("center", "squash")
CFG_ENTRIES = ("input_size", "crop_pct", "interpolation", "mean", "std", "crop_mode")


def _augment(image: PIL.Image.Image, index: int, view: int, seed: int) -> PIL.Image.Image:
    """Shifts by up to an eighth of the shorter side, zeros moving in, and flips in half of the cases.

    The randomness is one block of the counter-based generator Philox with key (seed, view) and counter index.
    """
    key = np.array([seed, view], dtype=np.uint64)
    across, down, flip = np.random.Philox(key=key, counter=int(index)).random_raw(3).tolist()
    pad = min(image.size) // 8
    left, top = (number % (2 * pad + 1) - pad for number in (across, down))
    image = image.crop((left, top, left + image.width, top + image.height))
    return image.transpose(PIL.Image.Transpose.FLIP_LEFT_RIGHT) if flip % 2 else image


@dataclass(frozen=True)
class Preprocessing(JsonDataclass):
    """How a picture becomes a tensor: resize, centre crop, scale to [0, 1], normalise, as timm evaluates.

    ``size``: output side in pixels. ``crop_pct``: part of the resized side that the crop keeps, in (0, 1].
    ``interpolation``: one of INTERPOLATIONS. ``mean``, ``std``: per channel, in units of [0, 1]. ``channels``: 3 for
    RGB, 1 for grey. ``crop_mode``: "center" resizes the shorter side, "squash" both to the same length. ValueError for
    anything else.
    """

    size: int
    crop_pct: float
    interpolation: str
    mean: tuple[float, ...]
    std: tuple[float, ...]
    channels: int = 3
    crop_mode: str = "center"

    def __post_init__(self) -> None:
        for name, kind in {"size": int, "crop_pct": float, "channels": int}.items():
            object.__setattr__(self, name, kind(getattr(self, name)))
        for name in ("mean", "std"):
            object.__setattr__(self, name, tuple(float(value) for value in getattr(self, name)))
        geometry = self.size > 0 and 0 < self.crop_pct <= 1 and self.interpolation in INTERPOLATIONS
        colours = self.channels in (1, 3) and self.channels == len(self.mean) == len(self.std) and min(self.std) > 0
        if not (geometry and colours and self.crop_mode in CROP_MODES):
            raise ValueError(
                f"Expected size > 0, crop_pct in (0, 1], interpolation among {sorted(INTERPOLATIONS)}, 1 or 3 channels "
                f"and one mean and std > 0 for each, and crop_mode among {CROP_MODES}, but got {self}."
            )

    @classmethod
    def of_backbone(
        cls,
        name: str,
        image_size: int | None = None,
        channels: int | None = None,
        changes: Mapping[str, Any] | None = None,
    ) -> Self:
        """As timm evaluates the model ``name``, with the entries of its ``pretrained_cfg`` that ``changes`` has.

        A backbone wants the same images in fine-tuning, feature extraction and evaluation: ``changes`` is what their
        configs have under ``model: preprocessing``. ValueError for an unknown model or entry.
        """
        if unknown := sorted(set(changes or ()) - set(CFG_ENTRIES)):
            raise ValueError(f"Expected entries of preprocessing among {CFG_ENTRIES}, but got {unknown}.")
        return cls.from_pretrained_cfg({**pretrained_cfg(name), **(changes or {})}, image_size, channels)

    @classmethod
    def from_pretrained_cfg(
        cls, cfg: Mapping[str, Any], image_size: int | None = None, channels: int | None = None
    ) -> Self:
        """From a timm ``pretrained_cfg``, if wanted for another input size or number of channels.

        For another number of channels, the mean over the channels of the cfg stands for each. ValueError if an entry
        is missing, the input is not square, or pictures are to be padded (crop_mode "border").
        """
        if missing := [key for key in CFG_ENTRIES if key not in cfg and key != "crop_mode"]:
            raise ValueError(f"Expected a timm pretrained_cfg, but it has no {missing}.")
        cfg_channels, height, width = cfg["input_size"]
        if height != width:
            raise ValueError(f"Expected a square input, but got {height} x {width}; set input_size.")
        channels = channels or cfg_channels
        mean, std = (x if len(x) == channels else [sum(x) / len(x)] * channels for x in (cfg["mean"], cfg["std"]))
        crop_mode = cfg.get("crop_mode") or "center"
        return cls(image_size or height, cfg["crop_pct"], cfg["interpolation"], mean, std, channels, crop_mode)

    @property
    def resized_side(self) -> int:
        """Shorter side (both, of "squash") between resize and crop, in pixels; rounded down, as in timm."""
        return math.floor(self.size / self.crop_pct)

    @property
    def fingerprint(self) -> str:
        """sha256, in hex, of the canonical JSON of ``to_dict()``."""
        return sha256_of(self.to_dict())

    def __call__(
        self,
        images: Sequence[PIL.Image.Image],
        *,
        index: Sequence[int] | None = None,
        view: int | None = None,
        seed: int = 0,
    ) -> Tensor:
        """Pixel values ``(B, channels, size, size)``, float32, of B pictures of any sizes and modes.

        ``view=None`` is evaluation: no augmentation. A view >= 0 is training: before the resize each picture is
        shifted and maybe flipped, as a pure function of (``seed``, ``view``, its row number in ``index``).
        """
        images = [image.convert("RGB" if self.channels == 3 else "L") for image in images]
        if view is not None:
            if min(view, seed) < 0 or index is None or len(index) != len(images):
                got = f"view {view}, seed {seed}, {None if index is None else len(index)} for {len(images)} images"
                raise ValueError(f"Expected a view >= 0, a seed >= 0 and an index per image, but got {got}.")
            images = [_augment(image, row, view, seed) for image, row in zip(images, index, strict=True)]
        pixels = np.empty((len(images), self.size, self.size, self.channels), dtype=np.uint8)
        for row, image in enumerate(images):
            pixels[row] = np.asarray(self._fit(image)).reshape(pixels.shape[1:])
        values = torch.from_numpy(pixels).permute(0, 3, 1, 2).to(torch.float32, memory_format=torch.contiguous_format)
        mean, std = (torch.tensor(numbers).view(-1, 1, 1) for numbers in (self.mean, self.std))
        return values.div_(255).sub_(mean).div_(std)

    def _fit(self, image: PIL.Image.Image) -> PIL.Image.Image:
        width, height = (self.resized_side * side // min(image.size) for side in image.size)
        if self.crop_mode == "squash":
            width = height = self.resized_side
        if image.size != (width, height):
            image = image.resize((width, height), INTERPOLATIONS[self.interpolation])
        left, top = round((width - self.size) / 2), round((height - self.size) / 2)
        return image.crop((left, top, left + self.size, top + self.size))


class ImageView(torch.utils.data.Dataset):
    """The images of one role as tensors: row r is image ``indices[r % N]`` in view ``views[r // N]``.

    Args:
        dataset: one source split of ``sources.load_source``; a streamed one gives its images in ascending order only.
        indices: row numbers in it, ``(N,)``.
        views, seed: see ``Preprocessing``; with V views the length is N V.

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
