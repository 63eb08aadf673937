"""data.py: sources and tensors, on small stand-in parquet files in the Hub's own schemas."""

from __future__ import annotations

import io
import json
import os

import datasets
import numpy as np
import PIL.Image
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import timm.data
import torch
from torch.utils.data import DataLoader

from jeidnn_hf import data
from jeidnn_hf.data import ImageView, Preprocessing, collate, load_source, read_labels
from jeidnn_hf.splits import make_splits

PLAIN = Preprocessing(32, 1.0, "bicubic", (0.0,) * 3, (1.0,) * 3)
CFG = {
    "input_size": (3, 24, 24), "crop_pct": 0.9, "interpolation": "bicubic", "crop_mode": "center",
    "mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225),
}  # fmt: skip
COUNTS = {"train": 300, "test": 200}


def picture(seed: int, width: int = 32, height: int = 32, mode: str = "RGB") -> PIL.Image.Image:
    noise = np.random.default_rng(seed).integers(0, 256, (height // 4 + 1, width // 4 + 1, 3), dtype=np.uint8)
    return PIL.Image.fromarray(noise).resize((width, height), PIL.Image.Resampling.BILINEAR).convert(mode)


def encoded(image: PIL.Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def write_parquet(path, count, classes, label="label", style="hub", offset=0, labels=None, image="img"):
    """``style``: hub (with the Hub's feature metadata), struct (bytes and path) or binary, both without metadata."""
    cells = [encoded(picture(offset + i)) for i in range(count)]
    labels = [i % classes for i in range(count)] if labels is None else labels
    structs = [{"bytes": cell, "path": None} for cell in cells]
    columns = {image: cells if style == "binary" else structs, label: labels}
    if label == "fine_label":
        columns["coarse_label"] = [x // 5 for x in labels]
    kind = pa.binary() if style == "binary" else pa.struct({"bytes": pa.binary(), "path": pa.string()})
    names = {image: kind} | {name: pa.int64() for name in columns if name != image}
    table = pa.table({name: pa.array(columns[name], kind) for name, kind in names.items()})
    if style == "hub":
        hub = {image: datasets.Image(), label: datasets.ClassLabel(names=[f"class {k}" for k in range(classes)])}
        if label == "fine_label":
            hub["coarse_label"] = datasets.ClassLabel(num_classes=20)
        table = table.cast(datasets.Features(hub).arrow_schema)
    pq.write_table(table, path)


def write_folder(folder, classes=10, label="label", style="hub"):
    folder.mkdir(parents=True)
    for split, count in COUNTS.items():
        write_parquet(folder / f"{split}-00000-of-00001.parquet", count, classes, label, style)
    return folder


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("data")
    write_folder(root / "cifar10")
    write_folder(root / "cifar100", classes=100, label="fine_label")
    return root


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.getbasetemp() / "cache")
    monkeypatch.delenv("JEIDNN_DATA_DIR", raising=False)


@pytest.fixture
def train(root):
    return load_source("cifar10", data_dir=root / "cifar10")["train"]


# ---- sources


@pytest.mark.parametrize(("name", "classes"), [("cifar10", 10), ("cifar100", 100)])
def test_environment_variable_names_the_folder(root, monkeypatch, name, classes):
    monkeypatch.setenv("JEIDNN_DATA_DIR", str(root))
    before = sorted(root.rglob("*"))
    source = load_source(name)
    assert {split: len(rows) for split, rows in source.items()} == COUNTS
    for rows in source.values():
        assert rows.column_names == ["image", "label"]
        assert isinstance(rows.features["image"], datasets.Image)
        assert rows.features["label"].names == [f"class {k}" for k in range(classes)]
    assert source["train"][3]["image"].tobytes() == picture(3).tobytes()
    assert read_labels(source["test"]).tolist() == [i % classes for i in range(COUNTS["test"])]
    assert sorted(root.rglob("*")) == before


@pytest.mark.parametrize("style", ["struct", "binary"])
def test_files_without_hub_metadata(tmp_path, style):
    folder = write_folder(tmp_path / "raw [1]", style=style)
    rows = load_source("cifar10", data_dir=str(folder))["train"]
    assert rows.features["label"].num_classes == 10
    assert rows[7]["image"].tobytes() == picture(7).tobytes() and rows[7]["label"] == 7


def test_data_files_win_shards_are_in_name_order_and_other_splits_stay(root, tmp_path, monkeypatch):
    monkeypatch.setenv("JEIDNN_DATA_DIR", "/nowhere")
    for shard in (1, 0):
        write_parquet(tmp_path / f"train-0000{shard}-of-00002.parquet", 20, 10, offset=20 * shard)
    files = {"train": tmp_path / "train-*.parquet", "test": [root / "cifar10" / "test-00000-of-00001.parquet"]}
    source = load_source("cifar10", data_files={**files, "validation": str(tmp_path / "train-00001*")}, data_dir="/no")
    assert {split: len(rows) for split, rows in source.items()} == {"train": 40, "test": 200, "validation": 20}
    for row in (0, 19, 20, 39):
        assert source["train"][row]["image"].tobytes() == picture(row).tobytes()


def test_hub_is_used_only_when_nothing_local_is_named(root, monkeypatch):
    asked = []
    real = datasets.load_dataset

    def load_dataset(path, **options):
        asked.append(path)
        return real("parquet", data_files={s: str(root / "cifar10" / f"{s}-*.parquet") for s in COUNTS})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert set(load_source("cifar10")) == {"train", "test"} and asked == ["uoft-cs/cifar10"]
    monkeypatch.setenv("JEIDNN_DATA_DIR", str(root / "elsewhere"))
    with pytest.raises(ValueError, match="elsewhere/cifar10/train-"):
        load_source("cifar10")
    assert asked == ["uoft-cs/cifar10"]


def test_source_errors(root, tmp_path):
    with pytest.raises(ValueError, match=r"among \['cifar10', 'cifar100'.*\], but got 'cifar11'"):
        load_source("cifar11")
    with pytest.raises(ValueError, match=r"split 'test' of cifar10.*none at \[\]"):
        load_source("cifar10", data_files={"train": str(root / "cifar10" / "train-*.parquet")})
    with pytest.raises(ValueError, match=r"none at \['.*no-\*\.parquet'\]"):
        load_source("cifar10", data_files={"train": str(root / "no-*.parquet"), "test": "x"})
    with pytest.raises(ValueError, match=r"\['img', 'fine_label'\].*split 'train' of cifar100.*\['img', 'label'\]"):
        load_source("cifar100", data_dir=root / "cifar10")
    bad = tmp_path / "bad.parquet"
    good = root / "cifar10" / "test-00000-of-00001.parquet"
    for style in ("hub", "struct"):
        for label in (12, -1, None):
            write_parquet(bad, 4, 10, style=style, labels=[0, 1, label, 3])
            with pytest.raises(ValueError, match=r"\[0, 10\), but got (12|-1) at row 2 of split 'train' of cifar10"):
                load_source("cifar10", data_files={"train": bad, "test": good})
    write_parquet(bad, 0, 10)
    with pytest.raises(ValueError, match="Expected readable parquet files, but got .*bad.parquet"):
        load_source("cifar10", data_files={"train": bad, "test": good})
    bad.write_bytes(good.read_bytes()[:1000])
    with pytest.raises(ValueError, match="(?i)parquet"):
        load_source("cifar10", data_files={"train": bad, "test": good})
    write_parquet(bad, 4, 4)
    with pytest.raises(ValueError, match="Expected 10 classes in split 'train' of cifar10, but got 4"):
        load_source("cifar10", data_files={"train": bad, "test": bad})
    with pytest.raises(ValueError, match="label column of type string"):
        read_labels(datasets.Dataset.from_dict({"label": ["cat"]}))


# ---- tensors


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize(("width", "height"), [(40, 50), (50, 40), (33, 71), (24, 24), (26, 26), (32, 32)])
@pytest.mark.parametrize("crop_pct", [1.0, 0.95, 0.9, 0.875])
def test_evaluation_is_timm_evaluation(width, height, crop_pct, interpolation):
    cfg = {**CFG, "crop_pct": crop_pct, "interpolation": interpolation}
    reference = timm.data.create_transform(
        **{key: cfg[key] for key in ("input_size", "crop_pct", "interpolation", "mean", "std")}, is_training=False
    )
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
    [{"size": 0}, {"crop_pct": 1.2}, {"interpolation": "cubic"}, {"channels": 2}, {"mean": (0, 0)}, {"std": (0, 1, 1)}],
)
def test_preprocessing_refuses(change):
    with pytest.raises(ValueError, match="^Expected size"):
        Preprocessing(**{**PLAIN.to_dict(), **change})


def test_pretrained_cfg_refuses():
    with pytest.raises(ValueError, match="crop_pct"):
        Preprocessing.from_pretrained_cfg({key: value for key, value in CFG.items() if key != "crop_pct"})
    with pytest.raises(ValueError, match="'squash'"):
        Preprocessing.from_pretrained_cfg({**CFG, "crop_mode": "squash"})
    with pytest.raises(ValueError, match="24 x 32"):
        Preprocessing.from_pretrained_cfg({**CFG, "input_size": (3, 24, 32)})


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


# ---- the real files

REAL = os.environ.get("JEIDNN_DATA_DIR")


@pytest.mark.skipif(not REAL, reason="JEIDNN_DATA_DIR does not name a folder of real data sets")
@pytest.mark.parametrize(("name", "held_out"), [("cifar10", "train"), ("cifar10", "test"), ("cifar100", "train")])
def test_real_files(name, held_out):
    source = load_source(name, data_dir=os.path.join(REAL, name))
    labels = {split: read_labels(rows) for split, rows in source.items()}
    splits = make_splits(name, labels, held_out=held_out)
    for role in ("validation", "calibration"):
        split, indices = splits.roles[role]
        per_class = 2500 // data.DATASETS[name].num_classes
        assert split == held_out and set(np.bincount(labels[split][indices])) == {per_class}
    split, indices = splits.roles["validation"]
    view = ImageView(source[split], indices, PLAIN, views=(None, 0))
    batch = view.__getitems__(range(100))
    assert torch.equal(batch["labels"], view.labels[:100]) and 0.3 < batch["pixel_values"].mean() < 0.6
