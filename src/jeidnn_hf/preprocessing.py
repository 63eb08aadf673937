"""How a picture becomes the tensor that a backbone wants, at training and at evaluation; the same in every script."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import PIL.Image
import torch
from torch import Tensor

from .backbones.loading import pretrained_cfg
from .splits import JsonDataclass, sha256_of

if TYPE_CHECKING:
    from .configuration_jeidnn import JEIDNNConfig

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
    def of_config(cls, config: JEIDNNConfig) -> Self:
        """What ``config.preprocessing`` says: all fields, or changes of what ``of_backbone`` gives.

        ``size`` and ``channels`` are the config's ``image_size`` and ``num_channels`` in any case. A ValueError where
        that is no preprocessing.
        """
        said, size, channels = config.preprocessing or {}, config.image_size, config.num_channels
        if not isinstance(said, Mapping):
            raise ValueError(f"Expected preprocessing as a dict, but got {said!r}.")
        if not said.keys() >= {"crop_pct", "interpolation", "mean", "std"}:
            return cls.of_backbone(config.backbone, size, channels, said)
        try:
            return cls.from_dict({**said, "size": size, "channels": channels})
        except TypeError as error:
            raise ValueError(f"Expected the fields of Preprocessing, but got {dict(said)}: {error}.") from error

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

    def to_dict(self) -> dict[str, Any]:
        """As JSON gives it back."""
        return {**super().to_dict(), "mean": list(self.mean), "std": list(self.std)}

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
