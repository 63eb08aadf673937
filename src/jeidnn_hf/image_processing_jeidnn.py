"""`JEIDNNImageProcessor`: the backbone's own preprocessing, as transformers saves and loads it."""

from __future__ import annotations

from typing import Any

import numpy as np
import PIL.Image
from transformers import BaseImageProcessor, BatchFeature

from .preprocessing import Preprocessing


class JEIDNNImageProcessor(BaseImageProcessor):
    """`preprocessing.Preprocessing` for transformers: the very pixels that the exits were trained on.

    transformers' own processors resize tensors, and round the sides of the resized picture and of the crop otherwise.

    Args:
        size: side of the output in pixels; of this and the others see `Preprocessing`.
        crop_pct: part of the resized side that the crop keeps.
        interpolation: how it is resized.
        mean: per channel.
        std: per channel.
        channels: 3 for RGB, 1 for grey.
        crop_mode: "center" or "squash".

    Raises:
        ValueError: where one is out of range.
    """

    model_input_names = ["pixel_values"]

    def __init__(
        self,
        size: int = 224,
        crop_pct: float = 0.875,
        interpolation: str = "bicubic",
        mean: tuple[float, ...] = (0.485, 0.456, 0.406),
        std: tuple[float, ...] = (0.229, 0.224, 0.225),
        channels: int = 3,
        crop_mode: str = "center",
        **kwargs: Any,
    ):
        super().__init__(**kwargs)
        vars(self).update(Preprocessing(size, crop_pct, interpolation, mean, std, channels, crop_mode).to_dict())

    def preprocess(self, images: Any, return_tensors: str | None = "pt") -> BatchFeature:
        """`pixel_values` `(B, channels, size, size)`, float32.

        Args:
            images: one picture or a list of them: of PIL in any mode, or uint8 arrays or tensors, `(H, W)`, `(H, W, C)`
                or `(C, H, W)`.

        Raises:
            ValueError: something else.
        """
        images = list(images) if isinstance(images, list | tuple) or getattr(images, "ndim", 0) == 4 else [images]
        pixel_values = self.preprocessing([_picture(image) for image in images])
        return BatchFeature({"pixel_values": pixel_values}, tensor_type=return_tensors)

    @property
    def preprocessing(self) -> Preprocessing:
        return Preprocessing(*(getattr(self, field) for field in Preprocessing.__dataclass_fields__))


def _picture(image: Any) -> PIL.Image.Image:
    if isinstance(image, PIL.Image.Image):
        return image
    pixels = np.asarray(image)
    if pixels.dtype != np.uint8 or pixels.ndim not in (2, 3):
        got = f"{pixels.dtype} {pixels.shape}" if pixels.ndim else repr(image)
        raise ValueError(f"Expected a picture of PIL or an array of uint8, but got {got}; open or rescale it first.")
    if pixels.ndim == 3 and pixels.shape[-1] not in (1, 3, 4):
        pixels = pixels.transpose(1, 2, 0)
    return PIL.Image.fromarray(pixels.squeeze(-1) if pixels.shape[-1] == 1 and pixels.ndim == 3 else pixels)
