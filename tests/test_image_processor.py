"""JEIDNNImageProcessor: the pixels of Preprocessing, for any picture, also after a round trip through its file."""

from __future__ import annotations

import json

import numpy as np
import PIL.Image
import pytest
import torch
from torch import Tensor
from transformers import AutoImageProcessor

from jeidnn_hf import JEIDNNConfig, JEIDNNForImageClassification, JEIDNNImageProcessor
from jeidnn_hf.backbones import pretrained_cfg
from jeidnn_hf.preprocessing import Preprocessing
from small_models import pictures

RGB = {"size": 32, "crop_pct": 0.9, "interpolation": "bicubic", "mean": [0.5, 0.4, 0.3], "std": [0.2, 0.3, 0.25]}
GREY = {**RGB, "size": 21, "interpolation": "bilinear", "mean": [0.3], "std": [0.35], "channels": 1}


def odd(mode: str) -> list[PIL.Image.Image]:
    """Larger and smaller than the crop, wide and tall."""
    random = np.random.default_rng(3)
    sizes = [(101, 67), (33, 90), (17, 23), (32, 32), (36, 35)]
    noise = [PIL.Image.fromarray(random.integers(0, 256, (h, w, 4), dtype=np.uint8), "RGBA") for w, h in sizes]
    return [image if mode == "RGBA" else image.convert("RGB").convert(mode) for image in noise]


def by_hand(image: PIL.Image.Image, size: int, crop_pct: float, interpolation: str, mean, std, channels=3) -> Tensor:
    image = image.convert("L" if channels == 1 else "RGB")
    side, shorter = int(size / crop_pct), min(image.size)
    width, height = (side * length // shorter for length in image.size)
    image = image.resize((width, height), getattr(PIL.Image, interpolation.upper()))
    left, top = (round((length - size) / 2) for length in image.size)
    array = np.asarray(image, dtype=np.float64).reshape(image.height, image.width, channels)
    array = (array[top : top + size, left : left + size] / 255 - mean) / std
    return torch.from_numpy(array.transpose(2, 0, 1))


@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA", "P", "CMYK"])
@pytest.mark.parametrize("fields", [RGB, GREY], ids=["rgb", "grey"])
def test_the_pixels_are_those_of_preprocessing(mode, fields, tmp_path):
    JEIDNNImageProcessor(**fields).save_pretrained(tmp_path)
    loaded = AutoImageProcessor.from_pretrained(tmp_path)
    assert type(loaded) is JEIDNNImageProcessor and loaded.preprocessing == Preprocessing(**fields)
    values = loaded(odd(mode), return_tensors="pt")["pixel_values"]
    assert values.dtype is torch.float32 and values.shape == (5, fields.get("channels", 3), *[fields["size"]] * 2)
    torch.testing.assert_close(values, Preprocessing(**fields)(odd(mode)), rtol=0, atol=1e-6)
    expected = torch.stack([by_hand(image, **fields) for image in odd(mode)])
    torch.testing.assert_close(values.double(), expected, rtol=0, atol=1e-6)


def test_what_a_picture_may_be():
    processor, image = JEIDNNImageProcessor(**RGB), odd("RGB")[0]
    expected = processor(image)["pixel_values"]
    array = np.asarray(image)
    tensor = torch.from_numpy(array.copy()).permute(2, 0, 1)
    for same in (array, array[None], [array], tensor, tensor.numpy()):
        assert torch.equal(processor(same)["pixel_values"], expected)
    grey = np.asarray(odd("L")[0])
    for same in (grey, grey[..., None], grey[None]):
        assert torch.equal(processor([same])["pixel_values"], processor(odd("L")[0])["pixel_values"])
    as_numpy = processor(image, return_tensors="np")["pixel_values"]
    assert isinstance(as_numpy, np.ndarray) and np.array_equal(as_numpy, expected.numpy())
    for wrong in ("cat.png", array / 255, np.zeros(5, np.uint8), None):
        with pytest.raises(ValueError, match="^Expected a picture of PIL or an array of uint8, but got "):
            processor([wrong])
    with pytest.raises(ValueError, match="crop_pct"):
        JEIDNNImageProcessor(**{**RGB, "crop_pct": 1.5})


def model(backbone: str = "test_vit", **options) -> JEIDNNForImageClassification:
    return JEIDNNForImageClassification(JEIDNNConfig(backbone=backbone, num_labels=5, recipe="paper", **options))


def test_a_model_knows_its_pictures(tmp_path):
    cfg = pretrained_cfg("test_vit")
    plain = model()
    assert plain.config.preprocessing == Preprocessing.from_pretrained_cfg(cfg).to_dict()
    assert plain.config.preprocessing["size"] == 160 and plain.config.preprocessing["crop_pct"] == cfg["crop_pct"] < 1
    changed = model(image_size=64, preprocessing={"crop_pct": 1.0, "mean": (0.1, 0.2, 0.3)})
    said = changed.config.preprocessing
    assert (said["size"], said["crop_pct"], said["mean"], said["std"]) == (64, 1.0, [0.1, 0.2, 0.3], list(cfg["std"]))
    changed.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "preprocessor_config.json").read_text())["crop_pct"] == 1.0
    processor = AutoImageProcessor.from_pretrained(tmp_path)
    images = pictures(3)
    assert torch.equal(processor(images)["pixel_values"], Preprocessing.from_dict(said)(images))
    loaded = JEIDNNForImageClassification.from_pretrained(tmp_path)
    assert loaded.config.preprocessing == said
    model(backbone="test_resnet", image_size=64).save_pretrained(tmp_path / "convnet")
    other = JEIDNNForImageClassification.from_pretrained(tmp_path / "convnet", image_size=32)
    assert other.config.preprocessing["size"] == 32


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ({"crop": 1.0}, "^Expected entries of preprocessing among"),
        ({**RGB, "crop": 1.0}, "^Expected the fields of Preprocessing, but got"),
        ({**GREY, "size": 160}, "1 or 3 channels"),
        ({"crop_pct": 0.0}, "crop_pct in"),
        ([1], "^Expected preprocessing to be dict"),
    ],
)
def test_what_is_no_preprocessing_is_refused(said, message):
    with pytest.raises(ValueError, match=message):
        model(preprocessing=said)


def test_pictures_that_preprocessing_cannot_make_are_left_open(tmp_path):
    five = model(num_channels=5)
    five.save_pretrained(tmp_path)
    assert five.config.preprocessing is None and not (tmp_path / "preprocessor_config.json").exists()
