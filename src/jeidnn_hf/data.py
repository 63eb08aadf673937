"""Where images come from, which of them play which role, and how they become tensors.

    sources = load_source("cifar10")                                           # {"train": Dataset, "test": Dataset}
    splits = make_splits("cifar10", {name: read_labels(rows) for name, rows in sources.items()})
    source, indices = splits.roles["validation"]
    view = ImageView(sources[source], indices, Preprocessing.from_pretrained_cfg(model.pretrained_cfg))

An image is named by its source split and its row number there, its ``index``. Roles, augmentation and caches all use
that name, so the same numbers come out with or without a feature cache, in any batch order and in any worker.
"""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from glob import escape, glob
from pathlib import Path
from typing import Any, Self

import datasets
import numpy as np
import PIL.Image
import pyarrow as pa
import torch
from torch import Tensor

from .splits import JsonDataclass, check_labels, sha256_of

INTERPOLATIONS = {mode.name.lower(): mode for mode in PIL.Image.Resampling}
Paths = str | os.PathLike | Sequence[str | os.PathLike]


@dataclass(frozen=True)
class DatasetSpec:
    """A data set as the Hub stores it: columns, number of classes, side in pixels, names of its two splits."""

    name: str
    hub_id: str
    image_column: str
    label_column: str
    num_classes: int
    image_size: int
    train_split: str
    test_split: str


_ROWS = (
    DatasetSpec("cifar10", "uoft-cs/cifar10", "img", "label", 10, 32, "train", "test"),
    DatasetSpec("cifar100", "uoft-cs/cifar100", "img", "fine_label", 100, 32, "train", "test"),
)
DATASETS: dict[str, DatasetSpec] = {spec.name: spec for spec in _ROWS}


def load_source(
    name: str, *, data_files: Mapping[str, Paths] | None = None, data_dir: str | os.PathLike | None = None
) -> dict[str, datasets.Dataset]:
    """The source splits of a known data set, each with the columns ``image`` (Image) and ``label`` (ClassLabel).

    The first that is given is used, and never another: ``data_files``, from split name to parquet path(s) or glob(s);
    ``data_dir``, a folder of ``train-*.parquet``, ``test-*.parquet``; the environment variable ``JEIDNN_DATA_DIR``, a
    folder holding one such folder per data set name; the Hub. Splits are named as on the Hub, here and in files; its
    train and test split become "train" and "test", further ones keep their names. Shards are read in name order.

    Raises:
        ValueError: unknown name, files or columns not found, other classes than expected, or a label out of range.
    """
    if name not in DATASETS:
        raise ValueError(f"Expected a data set among {sorted(DATASETS)}, but got {name!r}.")
    spec = DATASETS[name]
    if data_files is None and data_dir is None and (root := os.environ.get("JEIDNN_DATA_DIR")):
        data_dir = Path(root, name)
    if data_files is None and data_dir is None:
        loaded = datasets.load_dataset(spec.hub_id)
    else:
        files = _find_files(spec, data_files, data_dir)
        try:
            loaded = datasets.load_dataset("parquet", data_files=files)
        except (datasets.exceptions.DatasetGenerationError, pa.ArrowInvalid) as error:
            cause = " ".join(repr(error.__cause__ or error).split())
            raise ValueError(f"Expected readable parquet files, but got {cause} from {files}.") from error
    splits = {**loaded, "train": loaded[spec.train_split], "test": loaded[spec.test_split]}
    return {split: _standardise(spec, split, rows) for split, rows in splits.items()}


def _find_files(
    spec: DatasetSpec, data_files: Mapping[str, Paths] | None, data_dir: str | os.PathLike | None
) -> dict[str, list[str]]:
    required = dict.fromkeys((spec.train_split, spec.test_split), ())
    if data_files is None:
        found = sorted(path.name.partition("-")[0] for path in Path(data_dir).glob("*-*.parquet"))
        data_files = {split: f"{escape(os.fspath(data_dir))}/{split}-*.parquet" for split in (*required, *found)}
    files = {}
    for split, patterns in {**required, **data_files}.items():
        patterns = [patterns] if isinstance(patterns, str | os.PathLike) else patterns
        files[split] = [escape(path) for pattern in patterns for path in sorted(glob(os.fspath(pattern)))]
        if not files[split]:
            sought = [os.fspath(pattern) for pattern in patterns]
            raise ValueError(f"Expected parquet files for split {split!r} of {spec.name}, but found none at {sought}.")
    return files


def _standardise(spec: DatasetSpec, split: str, rows: datasets.Dataset) -> datasets.Dataset:
    where, wanted = f"split {split!r} of {spec.name}", [spec.image_column, spec.label_column]
    if not set(wanted) <= set(rows.column_names):
        raise ValueError(f"Expected columns {wanted} in {where}, but found {rows.column_names}.")
    rows = rows.select_columns(wanted).rename_columns(dict(zip(wanted, ("image", "label"), strict=True)))
    rows = rows.cast_column("image", datasets.Image())
    check_labels(read_labels(rows), spec.num_classes, where)
    if not isinstance(rows.features["label"], datasets.ClassLabel):
        rows = rows.cast_column("label", datasets.ClassLabel(num_classes=spec.num_classes))
    if (classes := rows.features["label"].num_classes) != spec.num_classes:
        raise ValueError(f"Expected {spec.num_classes} classes in {where}, but got {classes}.")
    return rows


def read_labels(dataset: datasets.Dataset) -> np.ndarray:
    """The ``label`` column, int64 ``(N,)``, -1 where it is empty; reads no image. ValueError if not of integers."""
    column = dataset.select_columns("label").with_format("arrow")[:]["label"]
    if not pa.types.is_integer(column.type):
        raise ValueError(f"Expected integer class labels, but got a label column of type {column.type}.")
    return column.fill_null(-1).to_numpy().astype(np.int64)


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
    RGB, 1 for grey. ValueError for anything else.
    """

    size: int
    crop_pct: float
    interpolation: str
    mean: tuple[float, ...]
    std: tuple[float, ...]
    channels: int = 3

    def __post_init__(self) -> None:
        for name, kind in {"size": int, "crop_pct": float, "channels": int}.items():
            object.__setattr__(self, name, kind(getattr(self, name)))
        for name in ("mean", "std"):
            object.__setattr__(self, name, tuple(float(value) for value in getattr(self, name)))
        geometry = self.size > 0 and 0 < self.crop_pct <= 1 and self.interpolation in INTERPOLATIONS
        colours = self.channels in (1, 3) and self.channels == len(self.mean) == len(self.std) and min(self.std) > 0
        if not (geometry and colours):
            raise ValueError(
                f"Expected size > 0, crop_pct in (0, 1], interpolation among {sorted(INTERPOLATIONS)}, 1 or 3 channels "
                f"and one mean and std > 0 for each, but got {self}."
            )

    @classmethod
    def from_pretrained_cfg(
        cls, cfg: Mapping[str, Any], image_size: int | None = None, channels: int | None = None
    ) -> Self:
        """From a timm ``pretrained_cfg``, if wanted for another input size or number of channels.

        For another number of channels, the mean over the channels of the cfg stands for each. ValueError if an entry
        is missing, the input is not square, or the crop is not a centre crop.
        """
        if missing := [key for key in ("input_size", "crop_pct", "interpolation", "mean", "std") if key not in cfg]:
            raise ValueError(f"Expected a timm pretrained_cfg, but it has no {missing}.")
        cfg_channels, height, width = cfg["input_size"]
        if height != width or cfg.get("crop_mode") not in (None, "center"):
            raise ValueError(
                f"Expected a square input and crop_mode 'center' (on square pictures all modes agree), but got "
                f"{height} x {width} and {cfg.get('crop_mode')!r}: set these entries of the cfg."
            )
        channels = channels or cfg_channels
        mean, std = (x if len(x) == channels else [sum(x) / len(x)] * channels for x in (cfg["mean"], cfg["std"]))
        return cls(image_size or height, cfg["crop_pct"], cfg["interpolation"], mean, std, channels)

    @property
    def resized_side(self) -> int:
        """Shorter side between resize and crop, in pixels; rounded down, as in timm."""
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
        if image.size != (width, height):
            image = image.resize((width, height), INTERPOLATIONS[self.interpolation])
        left, top = round((width - self.size) / 2), round((height - self.size) / 2)
        return image.crop((left, top, left + self.size, top + self.size))


class ImageView(torch.utils.data.Dataset):
    """The images of one role as tensors: row r is image ``indices[r % N]`` in view ``views[r // N]``.

    Args:
        dataset: one source split of ``load_source``.
        indices: row numbers in it, ``(N,)``.
        views, seed: see ``Preprocessing``; with V views the length is N V.

    Raises:
        ValueError: no images, or a row number or label out of range; while reading, a picture that does not decode.
    """

    def __init__(
        self,
        dataset: datasets.Dataset,
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
        """sha256 of the labels and of the encoded bytes of ``probes`` pictures spread over the rows.

        It tells two sources apart whose row numbers are the same (another order, another version), at little cost.
        """
        rows = self.indices[np.linspace(0, len(self.indices) - 1, min(probes, len(self.indices))).astype(np.int64)]
        digest = hashlib.sha256(self._labels.numpy().astype("<i8").tobytes())
        for row, value in zip(rows, self._encoded[rows]["image"], strict=True):
            if value is None:
                _decode(value, row)
            digest.update(value["bytes"] or str(value["path"]).encode())
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
