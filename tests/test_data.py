"""data.py: pictures to tensors, as timm makes them; views of a data set."""

from __future__ import annotations

import json

import datasets
import numpy as np
import PIL.Image
import pytest
import timm.data
import torch
from torch.utils.data import DataLoader

from jeidnn_hf.backbones import pretrained_cfg
from jeidnn_hf.data import ImageView, Preprocessing, collate
from jeidnn_hf.sources import load_source
from stand_ins import encoded, picture, write_folder

PLAIN = Preprocessing(32, 1.0, "bicubic", (0.0,) * 3, (1.0,) * 3)
CFG = {
    "input_size": (3, 24, 24), "crop_pct": 0.9, "interpolation": "bicubic", "crop_mode": "center",
    "mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225),
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp("data") / "cifar10")


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.getbasetemp() / "cache")
    monkeypatch.delenv("JEIDNN_DATA_DIR", raising=False)


@pytest.fixture
def train(folder):
    return load_source("cifar10", data_dir=folder)["train"]


# ---- tensors


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize(("width", "height"), [(40, 50), (50, 40), (33, 71), (24, 24), (26, 26), (32, 32)])
@pytest.mark.parametrize("crop_pct", [1.0, 0.95, 0.9, 0.875])
@pytest.mark.parametrize("crop_mode", ["center", "squash"])
def test_evaluation_is_timm_evaluation(width, height, crop_pct, interpolation, crop_mode):
    cfg = {**CFG, "crop_pct": crop_pct, "interpolation": interpolation, "crop_mode": crop_mode}
    reference = timm.data.create_transform(**cfg, is_training=False)
    image = picture(5, width, height)
    torch.testing.assert_close(Preprocessing.from_pretrained_cfg(cfg)([image])[0], reference(image), atol=1e-6, rtol=0)


def test_no_resampling_at_the_target_geometry():
    image = picture(1)
    pixels = PLAIN([image])
    assert pixels.shape == (1, 3, 32, 32) and pixels.dtype == torch.float32 and pixels.is_contiguous()
    assert np.array_equal((pixels[0] * 255).round().numpy(), np.asarray(image).transpose(2, 0, 1))


def test_channels_and_picture_modes():
    grey = Preprocessing.from_pretrained_cfg(CFG, image_size=32, channels=1)
    assert grey.mean == pytest.approx([0.449]) and grey.std == pytest.approx([0.226]) and grey.size == 32
    assert grey([picture(0), picture(0, mode="L")]).shape == (2, 1, 32, 32)
    grey_cfg = {**CFG, "input_size": (1, 24, 24), "mean": (0.5,), "std": (0.5,)}
    rgb = Preprocessing.from_pretrained_cfg(grey_cfg, channels=3)
    assert rgb.mean == (0.5, 0.5, 0.5)
    pixels = rgb([picture(0, mode="L")])
    assert torch.equal(pixels[:, 0], pixels[:, 1])
    assert rgb([]).shape == (0, 3, 24, 24)


def test_preprocessing_round_trip_and_fingerprint():
    a = Preprocessing.from_pretrained_cfg(CFG)
    b = Preprocessing.from_dict(json.loads(json.dumps(a.to_dict())))
    assert a == b and hash(a) == hash(b) and a.fingerprint == b.fingerprint and len(a.fingerprint) == 64
    assert a.fingerprint != Preprocessing.from_pretrained_cfg(CFG, image_size=32).fingerprint
    assert a.resized_side == 26


@pytest.mark.parametrize(
    "change",
    [
        {"size": 0}, {"crop_pct": 1.2}, {"interpolation": "cubic"}, {"channels": 2}, {"mean": (0, 0)},
        {"std": (0, 1, 1)}, {"crop_mode": "border"},
    ],
)
def test_preprocessing_refuses(change):
    with pytest.raises(ValueError, match="^Expected size"):
        Preprocessing(**{**PLAIN.to_dict(), **change})


def test_pretrained_cfg_refuses():
    with pytest.raises(ValueError, match="crop_pct"):
        Preprocessing.from_pretrained_cfg({key: value for key, value in CFG.items() if key != "crop_pct"})
    with pytest.raises(ValueError, match="'border'"):
        Preprocessing.from_pretrained_cfg({**CFG, "crop_mode": "border"})
    with pytest.raises(ValueError, match="24 x 32"):
        Preprocessing.from_pretrained_cfg({**CFG, "input_size": (3, 24, 32)})


@pytest.mark.parametrize(
    ("name", "size", "resized"),
    [("t2t_vit_7", 224, 248), ("resnet56_cifar", 32, 32), ("tf_efficientnet_lite0", 224, 256)],
)
def test_a_backbone_has_its_own_preprocessing(name, size, resized):
    cfg = pretrained_cfg(name)
    own = Preprocessing.of_backbone(name)
    assert own == Preprocessing.from_pretrained_cfg(cfg) and (own.size, own.resized_side) == (size, resized)
    image = picture(3)
    reference = timm.data.create_transform(**timm.data.resolve_data_config(pretrained_cfg=cfg), is_training=False)
    torch.testing.assert_close(own([image])[0], reference(image), atol=1e-6, rtol=0)
    changes = {"crop_pct": 1.0, "interpolation": "bilinear"}
    changed = Preprocessing.of_backbone(name, 96, 1, changes)
    assert (changed.size, changed.resized_side, changed.interpolation, changed.channels) == (96, 96, "bilinear", 1)
    assert changed == Preprocessing.from_pretrained_cfg({**cfg, **changes}, 96, 1)
    with pytest.raises(ValueError, match=r"entries of preprocessing among .*, but got \['crop'\]"):
        Preprocessing.of_backbone(name, changes={"crop": 1.0})


def test_augmentation_is_a_pure_function_of_seed_view_and_index():
    images = [picture(i) for i in range(20)]
    index = np.arange(100, 120)
    whole = PLAIN(images, index=index, view=1, seed=7)
    order = np.random.default_rng(0).permutation(20)
    assert torch.equal(PLAIN([images[i] for i in order], index=index[order], view=1, seed=7), whole[order])
    singles = [PLAIN([image], index=[i], view=1, seed=7) for image, i in zip(images, index, strict=True)]
    assert torch.equal(torch.cat(singles), whole)
    for other in ({"view": 2, "seed": 7}, {"view": 1, "seed": 8}, {"view": 7, "seed": 1}):
        assert not torch.equal(PLAIN(images, index=index, **other), whole)
    assert not torch.equal(PLAIN(images, index=index + 1, view=1, seed=7), whole)
    assert torch.equal(PLAIN(images, index=index), PLAIN(images))
    for wrong in ({"index": None}, {"index": [1]}, {"view": -1}, {"seed": -1}):
        with pytest.raises(ValueError, match="Expected a view"):
            PLAIN(images, **{"index": index, "view": 0, **wrong})


def test_augmentation_shifts_by_four_pixels_and_flips_half():
    x, y = np.meshgrid(np.arange(100, 132), np.arange(100, 132))
    image = PIL.Image.fromarray(np.stack([x, y, x * 0], axis=-1).astype(np.uint8))
    pinned = PLAIN([image] * 3, index=[0, 1, 49999], view=1, seed=2)[:, :2, 16, 16] * 255
    assert pinned.round().tolist() == [[116, 112], [117, 120], [118, 112]]
    count = 3000
    out = (PLAIN([image] * count, index=range(count), view=0) * 255).round().int()
    flipped = out[:, 0, 16, 17] < out[:, 0, 16, 16]
    across = torch.where(flipped, out[:, 0, 16, 15], out[:, 0, 16, 16]) - 116
    down = out[:, 1, 16, 16] - 116
    assert abs(flipped.float().mean() - 0.5) < 0.04
    for shift in (across, down):
        assert (torch.bincount(shift + 4, minlength=9).float() * 9 / count - 1).abs().max() < 0.25
        assert shift.min() == -4 and shift.max() == 4
    joint = torch.stack([across, down, flipped]).float()
    assert (torch.corrcoef(joint) - torch.eye(3)).abs().max() < 0.08
    upwards = int((down == 4).nonzero()[0])
    assert (out[upwards, :, -4:] == 0).all() and (out[upwards, 1, :-4].max(dim=1).values > 0).all()


def test_larger_pictures_are_augmented_before_the_resize():
    out = Preprocessing(24, 1.0, "bilinear", (0.0,) * 3, (1.0,) * 3)([picture(0, 64, 48)] * 4, index=range(4), view=0)
    assert out.shape == (4, 3, 24, 24) and not torch.equal(out[0], out[1])


def test_batches_equal_single_examples(train):
    view = ImageView(train, [5, 250, 17, 40], PLAIN, views=(None, 0, 3), seed=1)
    assert len(view) == 12
    rows = [11, 0, 4, 4, 8, -1]
    batch = view.__getitems__(rows)
    assert batch["index"].tolist() == [40, 5, 5, 5, 5, 40] and batch["index"].dtype == torch.int64
    assert batch["labels"].tolist() == [0, 5, 5, 5, 5, 0] == view.labels[rows].tolist()
    assert batch["pixel_values"].dtype == torch.float32
    single = collate([view[row] for row in rows])
    assert single.keys() == batch.keys() and all(torch.equal(single[name], batch[name]) for name in batch)
    assert single["labels"].shape == (6,) and collate(batch) is batch
    for row, name in ((1, None), (4, 0), (8, 3)):
        image = picture(view.indices[row % 4])
        expected = PLAIN([image], index=[view.indices[row % 4]], view=name, seed=1)
        assert torch.equal(view[row]["pixel_values"], expected[0])
    with pytest.raises(IndexError):
        view[12]


@pytest.mark.parametrize("workers", [0, 2])
def test_loader_gives_the_same_numbers_in_any_order(train, workers):
    view = ImageView(train, np.arange(40, 80), PLAIN, views=(0, 1))
    reference = view.__getitems__(range(80))
    assert torch.equal(reference["labels"], view.labels)
    seen = 0
    for batch in DataLoader(view, batch_size=13, shuffle=True, num_workers=workers, collate_fn=collate):
        for block in (0, 1):
            rows = batch["index"] - 40 + 40 * block
            equal = (batch["pixel_values"] == reference["pixel_values"][rows]).flatten(1).all(1)
            seen += int(equal.sum())
    assert seen == 80


def test_labels_decode_no_image(train, monkeypatch):
    monkeypatch.setattr(datasets.Image, "decode_example", None)
    assert ImageView(train, [3, 14], PLAIN).labels.tolist() == [3, 4]


def test_view_errors(train):
    for indices, views in (([], (None,)), ([1], ())):
        with pytest.raises(ValueError, match="Expected images and views"):
            ImageView(train, indices, PLAIN, views=views)
    for row in (-1, 300):
        with pytest.raises(ValueError, match=rf"row numbers in \[0, 300\), but got {row}"):
            ImageView(train, [0, row], PLAIN)
    cells = [{"bytes": cell, "path": None} for cell in (encoded(picture(0)), encoded(picture(1))[:200], b"\0junk")]
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(num_classes=10)})
    broken = datasets.Dataset.from_dict({"image": [*cells, None], "label": [0, 1, 2, 3]}, features=features)
    view = ImageView(broken, [3, 2, 1, 0], PLAIN)
    assert view[3]["pixel_values"].shape == (3, 32, 32)
    for position, row in ((0, 3), (1, 2), (2, 1)):
        with pytest.raises(ValueError, match=f"Expected a readable picture, but got .* at row {row}"):
            view.__getitems__([3, position])
    wrong = datasets.Dataset.from_dict({"image": [None] * 2, "label": [0, -1]}, features=features)
    with pytest.raises(ValueError, match=r"\[0, 10\), but got -1 at row 1"):
        ImageView(wrong, [1], PLAIN)
