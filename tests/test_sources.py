"""sources.py: data sets from files, folders and the Hub's stand-ins, in memory and streamed; the paper's splits."""

from __future__ import annotations

import os

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from torch.utils.data import DataLoader

from jeidnn_hf.backbones import build_model, staged_backbone
from jeidnn_hf.data import ImageView, Preprocessing, collate
from jeidnn_hf.feature_cache import cached_role
from jeidnn_hf.sources import DATASETS, StreamedRows, load_source, read_labels, source_options, split_source
from stand_ins import COUNTS, picture, write_folder, write_parquet

PLAIN = Preprocessing(32, 1.0, "bicubic", (0.0,) * 3, (1.0,) * 3)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("data")
    write_folder(root / "cifar10")
    write_folder(root / "cifar100", classes=100, label="fine_label")
    write_folder(root / "svhn", image="image")
    write_parquet(root / "svhn" / "extra-00000-of-00001.parquet", 20, 10, image="image")
    options = {"classes": 1000, "image": "image", "side": 8, "group": 100}
    for shard in (0, 1):
        name, labels = f"train-0000{shard}-of-00002.parquet", np.random.default_rng(shard).permutation(1000)
        write_parquet(root / "imagenet" / name, 1000, labels=labels, offset=1000 * shard, **options)
    write_parquet(root / "imagenet" / "validation-00000-of-00001.parquet", 1000, offset=5000, **options)
    write_parquet(root / "imagenet" / "test-00000-of-00001.parquet", 4, labels=[-1] * 4, **options)
    return root


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.getbasetemp() / "cache")
    monkeypatch.delenv("JEIDNN_DATA_DIR", raising=False)


def labelled(**labels):
    """Sources that have labels only, of known sizes."""
    features = {
        split: datasets.Features({"label": datasets.ClassLabel(num_classes=int(max(values)) + 1)})
        for split, values in labels.items()
    }
    return {
        split: datasets.Dataset(pa.table({"label": values}).cast(features[split].arrow_schema))
        for split, values in labels.items()
    }


def sizes(splits):
    return [splits.info(role).size for role in ("train", "validation", "calibration", "test")]


# ---- known data sets


@pytest.mark.parametrize(
    ("name", "classes"), [("cifar10", 10), ("cifar100", 100), ("cifar100-lt", 100), ("svhn", 10), ("imagenet", 1000)]
)
@pytest.mark.parametrize("streaming", [False, True])
def test_environment_variable_names_the_folder(root, monkeypatch, name, classes, streaming):
    monkeypatch.setenv("JEIDNN_DATA_DIR", str(root))
    before = sorted(root.rglob("*"))
    source = load_source(name, streaming=streaming)
    counts = {"imagenet": {"train": 2000, "test": 1000}, "svhn": {**COUNTS, "extra": 20}}.get(name, COUNTS)
    assert {split: len(rows) for split, rows in source.items()} == counts
    for rows in source.values():
        assert isinstance(rows, StreamedRows if streaming else datasets.Dataset)
        assert list(rows.features) == ["image", "label"] and isinstance(rows.features["image"], datasets.Image)
        assert rows.features["label"].names == [f"class {k}" for k in range(classes)]
    assert read_labels(source["test"]).tolist() == [i % classes for i in range(counts["test"])]
    side, offset = (8, 5000) if name == "imagenet" else (32, 0)
    pixels = ImageView(source["test"], [3, 150], PLAIN).__getitems__([0, 1])["pixel_values"]
    assert torch.equal(pixels, PLAIN([picture(offset + 3, side, side), picture(offset + 150, side, side)]))
    assert sorted(root.rglob("*")) == before


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("style", ["struct", "binary"])
def test_files_without_hub_metadata(tmp_path, style, streaming):
    folder = write_folder(tmp_path / "raw [1]", style=style)
    for name, columns in (("cifar10", {}), ("mine", {}), ("mine", {"image_column": "img", "label_column": "label"})):
        rows = load_source(name, data_dir=str(folder), streaming=streaming, **columns)["train"]
        assert rows.features["label"].num_classes == 10
        example = ImageView(rows, [7], PLAIN)[0]
        assert torch.equal(example["pixel_values"], PLAIN([picture(7)])[0]) and example["labels"] == 7


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

    def load_dataset(path, name=None, **options):
        asked.append((path, name))
        folder = root / next(key for key, spec in DATASETS.items() if spec.hub_id == path)
        stored = [split for split in ("train", "validation", "test") if list(folder.glob(f"{split}-*"))]
        files = {split: str(folder / f"{split}-*.parquet") for split in stored}
        return real("parquet", data_files=files, **options)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    hub = {
        "cifar10": ("uoft-cs/cifar10", None), "cifar100-lt": ("uoft-cs/cifar100", None),
        "svhn": ("ufldl-stanford/svhn", "cropped_digits"), "imagenet": ("ILSVRC/imagenet-1k", None),
    }  # fmt: skip
    for name, place in hub.items():
        for streaming in (False, True):
            asked.clear()
            assert set(load_source(name, streaming=streaming)) == {"train", "test"} and set(asked) == {place}
    monkeypatch.setenv("JEIDNN_DATA_DIR", str(root / "elsewhere"))
    asked.clear()
    for name, folder in (("cifar10", "cifar10"), ("cifar100-lt", "cifar100"), ("org/pets", "org/pets")):
        with pytest.raises(ValueError, match=f"elsewhere/{folder}/train-"):
            load_source(name)
    assert not asked


# ---- any other data set


@pytest.mark.parametrize("streaming", [False, True])
def test_any_data_set_of_the_hub(tmp_path, monkeypatch, streaming):
    monkeypatch.chdir(tmp_path)  # where datasets looks for org/name before it asks the Hub
    for split, count, offset in (("train", 30, 0), ("validation", 12, 90)):
        path = tmp_path / f"org/pets/data/{split}-00000-of-00001.parquet"
        write_parquet(path, count, 3, "breed", image="photo", offset=offset)
    source = load_source("org/pets", streaming=streaming)
    assert {split: len(rows) for split, rows in source.items()} == {"train": 30, "test": 12}
    example = ImageView(source["test"], [7], PLAIN)[0]
    assert torch.equal(example["pixel_values"], PLAIN([picture(97)])[0]) and example["labels"] == 1
    splits = split_source("org/pets", source, validation=6, calibration=3)
    assert sizes(splits) == [21, 6, 3, 12] and splits.roles["test"][0] == "test"
    with pytest.raises(ValueError, match=r"\['train', 'test'\] of org/pets, but \['test'\]"):
        load_source("org/pets", streaming=streaming, test_split="test")
    swapped = load_source("org/pets", streaming=streaming, train_split="validation", test_split="train")
    assert {split: len(rows) for split, rows in swapped.items()} == {"train": 12, "test": 30}


def test_columns_are_found_or_asked_for(tmp_path, root):
    files = {split: root / "cifar100" / f"{split}-00000-of-00001.parquet" for split in COUNTS}
    with pytest.raises(ValueError, match=r"type ClassLabel .* but found \['fine_label', 'coarse_label'\]; set label"):
        load_source("mine", data_files=files)
    coarse = load_source("mine", data_files=files, label_column="coarse_label")
    assert coarse["train"].features["label"].num_classes == 20 and read_labels(coarse["train"])[47] == 9
    with pytest.raises(ValueError, match=r"column 'pic' in split 'train' of mine, but found \['img', .*set image"):
        load_source("mine", data_files=files, image_column="pic", label_column="fine_label")
    write_parquet(tmp_path / "train-0.parquet", 4, 4, image="blob", style="binary")
    with pytest.raises(ValueError, match=r"type Image or named image or img in .*, but found \['blob', 'label'\]"):
        load_source("mine", data_dir=tmp_path)
    assert load_source("mine", data_dir=tmp_path, image_column="blob").keys() == {"train"}


def test_folders_of_pictures(tmp_path):
    number = 0
    for split, count in (("train", 6), ("val", 2)):
        for name in ("ant", "bee", "cat"):
            (tmp_path / "mine" / split / name).mkdir(parents=True)
            for i in range(count):
                picture(number, 40, 36).save(tmp_path / "mine" / split / name / f"{i}.png")
                number += 1
    source = load_source("mine", data_dir=tmp_path / "mine")
    assert {split: len(rows) for split, rows in source.items()} == {"train": 18, "test": 6}
    assert source["train"].features["label"].names == ["ant", "bee", "cat"]
    view = ImageView(source["test"], range(6), PLAIN)
    batch = view.__getitems__(range(6))
    assert batch["labels"].tolist() == [0, 0, 1, 1, 2, 2]
    assert torch.equal(batch["pixel_values"], PLAIN([picture(18 + i, 40, 36) for i in range(6)]))
    before = view.content_hash()
    picture(99, 40, 36).save(tmp_path / "mine" / "val" / "ant" / "0.png")
    assert ImageView(load_source("mine", data_dir=tmp_path / "mine")["test"], range(6), PLAIN).content_hash() != before
    alone = load_source("mine", data_dir=tmp_path / "mine" / "train")
    assert alone.keys() == {"train"}
    assert sizes(split_source("mine", alone, validation=3, calibration=3, test=6)) == [6, 3, 3, 6]
    with pytest.raises(ValueError, match=r"'test' and held_out='train', but got \['train'\]"):
        split_source("mine", alone, validation=3, calibration=3)
    with pytest.raises(ValueError, match="Expected parquet files to stream, but got others: imagefolder"):
        load_source("mine", data_dir=tmp_path / "mine", streaming=True)
    with pytest.raises(ValueError, match="Expected 10 classes in split 'train' of cifar10, but got 3"):
        load_source("cifar10", data_dir=tmp_path / "mine", test_split="validation")


def test_source_errors(root, tmp_path):
    with pytest.raises(ValueError, match=r"among \['cifar10', 'cifar100'.*\], a Hub id .*, but got 'cifar11'"):
        load_source("cifar11")
    with pytest.raises(ValueError, match="data set org/none at 'org/none', but it cannot be had: .*JEIDNN_DATA_DIR"):
        load_source("org/none")
    (tmp_path / "empty" / "folder").mkdir(parents=True)
    with pytest.raises(ValueError, match="data set mine at '.*/empty', but it cannot be had"):
        load_source("mine", data_dir=tmp_path / "empty")
    with pytest.raises(ValueError, match=r"split 'test' of cifar10.*none at \[\]"):
        load_source("cifar10", data_files={"train": str(root / "cifar10" / "train-*.parquet")})
    with pytest.raises(ValueError, match=r"split 'validation' of imagenet.*none at \[.*validation-\*\.parquet"):
        load_source("imagenet", data_dir=root / "cifar10")
    with pytest.raises(ValueError, match=r"none at \['.*no-\*\.parquet'\]"):
        load_source("cifar10", data_files={"train": str(root / "no-*.parquet"), "test": "x"})
    bad = tmp_path / "bad.parquet"
    good = root / "cifar10" / "test-00000-of-00001.parquet"
    for streaming in (False, True):
        with pytest.raises(ValueError, match=r"column 'fine_label'.*split 'train' of cifar100.*\['img', 'label'\]"):
            load_source("cifar100", data_dir=root / "cifar10", streaming=streaming)
        for style in ("hub", "struct"):
            for label in (12, -1, None):
                write_parquet(bad, 4, 10, style=style, labels=[0, 1, label, 3])
                with pytest.raises(ValueError, match=r"\[0, 10\), but got (12|-1) at row 2 of split 'train' of"):
                    load_source("cifar10", data_files={"train": bad, "test": good}, streaming=streaming)
        bad.write_bytes(good.read_bytes()[:1000])
        with pytest.raises(ValueError, match="Expected readable parquet files, but got .*bad.parquet"):
            load_source("cifar10", data_files={"train": bad, "test": good}, streaming=streaming)
        write_parquet(bad, 4, 4)
        with pytest.raises(ValueError, match="Expected 10 classes in split 'train' of cifar10, but got 4"):
            load_source("cifar10", data_files={"train": bad, "test": bad}, streaming=streaming)
    write_parquet(bad, 0, 10)
    with pytest.raises(ValueError, match="Expected readable parquet files, but got .*bad.parquet"):
        load_source("cifar10", data_files={"train": bad, "test": good})
    with pytest.raises(ValueError, match="label column of type string"):
        read_labels(datasets.Dataset.from_dict({"label": ["cat"]}))


def test_source_options_are_those_of_load_source():
    data = {"dataset": "cifar10", "data_dir": "here", "streaming": True, "views": 2, "splits": {}, "cache_dir": "there"}
    assert source_options(data) == {"data_dir": "here", "streaming": True}


# ---- streaming


def test_a_streamed_role_has_the_features_of_the_memory_mapped_one(root, tmp_path):
    torch.manual_seed(0)
    backbone = staged_backbone(build_model("resnet20_cifar", num_classes=5), exit_stages=[2, 8], image_size=16)
    mapped, streamed = (load_source("imagenet", data_dir=root / "imagenet", streaming=on) for on in (False, True))
    splits = split_source("imagenet", streamed, validation=1000, calibration=0, train=1000, test=30)
    assert all(
        split_source("imagenet", mapped, validation=1000, calibration=0, train=1000, test=30).info(role)
        == splits.info(role)
        for role in splits.roles
    )
    splits.roles["train"] = ("train", splits.roles["train"][1][::9])
    preprocessing = Preprocessing(16, 1.0, "bicubic", (0.5,) * 3, (0.2,) * 3)
    for role, views in (("test", (None,)), ("train", (0, 1))):
        a, b = (
            cached_role(backbone, source, splits, role, preprocessing, tmp_path / name, views=views)
            for name, source in (("mapped", mapped), ("streamed", streamed))
        )
        for x, y in zip(a.views, b.views, strict=True):
            assert torch.equal(x.features, y.features) and x.features.float().std() > 0.1
            assert torch.equal(x.labels, y.labels) and torch.equal(x.index, y.index)
    source = streamed["train"]
    assert len(source._table) <= 256 and source._start + len(source._table) > splits.roles["train"][1][-1]


def test_a_stream_goes_forward_starts_again_and_refuses_disorder(root):
    rows = load_source("imagenet", data_dir=root / "imagenet", streaming=True)["train"]
    view = ImageView(rows, np.arange(0, 2000, 3), PLAIN)
    for wanted in ([0, 1, 1, 90], [400, 666], [2, 399]):
        batch = view.__getitems__(wanted)
        assert torch.equal(batch["pixel_values"], PLAIN([picture(3 * row, 8, 8) for row in wanted]))
    with pytest.raises(ValueError, match="Expected ascending rows of a streamed source"):
        next(iter(DataLoader(view, batch_size=16, shuffle=True, collate_fn=collate)))
    hashes = {ImageView(rows, indices, PLAIN).content_hash() for indices in (range(100), range(100), range(1, 101))}
    assert len(hashes) == 2


def test_labels_are_read_without_the_pictures(root, tmp_path):
    files = {}
    for split in ("train", "validation"):
        files[split] = tmp_path / f"{split}.parquet"
        content = bytearray((root / "imagenet" / "validation-00000-of-00001.parquet").read_bytes())
        metadata = pq.read_metadata(root / "imagenet" / "validation-00000-of-00001.parquet")
        for group in range(metadata.num_row_groups):
            column = metadata.row_group(group).column(0)
            assert column.path_in_schema == "image.bytes"
            start = min(filter(None, (column.dictionary_page_offset, column.data_page_offset)))
            content[start : start + column.total_compressed_size] = b"\xff" * column.total_compressed_size
        files[split].write_bytes(content)
    source = load_source("imagenet", data_files=files, streaming=True)
    assert read_labels(source["train"]).tolist() == list(range(1000))
    with pytest.raises(OSError):
        source["train"][[0]]


# ---- the paper's splits


def test_the_papers_splits():
    cifar = {"train": np.arange(50_000) % 100, "test": np.arange(10_000) % 100}
    tens = {name: values % 10 for name, values in cifar.items()}
    svhn = {
        "train": np.repeat(np.arange(10), [4948, 13861, 10585, 8497, 7458, 6882, 5727, 5595, 5045, 4659]),
        "test": np.repeat(np.arange(10), [1744, 5099, 4149, 2882, 2523, 2384, 1977, 2019, 1660, 1595]),
    }
    imagenet = {"train": np.arange(1_281_167) % 1000, "test": np.arange(50_000) % 1000}
    expected = {
        "cifar10": (tens, [45_000, 2500, 2500, 10_000]),
        "cifar100": (cifar, [45_000, 2500, 2500, 10_000]),
        "svhn": (svhn, [68_257, 2500, 2500, 26_032]),
        "imagenet": (imagenet, [1_231_167, 25_000, 25_000, 50_000]),
    }
    for name, (labels, wanted) in expected.items():
        splits = split_source(name, labelled(**labels))
        assert sizes(splits) == wanted and splits.dataset == name
        rows = np.concatenate([splits.roles[role][1] for role in ("train", "validation", "calibration")])
        assert np.array_equal(np.sort(rows), np.arange(len(labels["train"])))
        for role in ("validation", "calibration"):
            counts, whole = np.bincount(labels["train"][splits.roles[role][1]]), np.bincount(labels["train"])
            assert abs(counts - whole * len(splits.roles[role][1]) / len(labels["train"])).max() < 1.01
    fewer = split_source("svhn", labelled(**svhn), validation=100, calibration=50, seed=3)
    assert sizes(fewer) == [73_107, 100, 50, 26_032] and fewer.seed == 3


def test_long_tailed_cifar100():
    labels = {"train": np.random.default_rng(0).permutation(50_000) % 100, "test": np.arange(10_000) % 100}
    splits, balanced = (split_source(name, labelled(**labels)) for name in ("cifar100-lt", "cifar100"))
    counts = np.bincount(labels["train"][splits.roles["train"][1]])
    assert counts.tolist() == [int(450 * 100 ** (-c / 99)) for c in range(100)]
    for role, per_class in (("validation", 25), ("calibration", 25), ("test", 100)):
        source, rows = splits.roles[role]
        assert np.array_equal(rows, balanced.roles[role][1])
        assert set(np.bincount(labels[source][rows])) == {per_class}
    assert set(splits.roles["train"][1]) < set(balanced.roles["train"][1])
    other = split_source("cifar100-lt", labelled(**labels), seed=1)
    assert not np.array_equal(other.roles["train"][1], splits.roles["train"][1])
    whole = split_source("cifar100-lt", labelled(**labels), held_out="test")
    assert whole.info("train").size == 10_847  # as everywhere in the literature at imbalance 100
    assert split_source("cifar100-lt", labelled(**labels), imbalance=10, held_out="test").info("train").size == 19_573


# ---- the real files

REAL = os.environ.get("JEIDNN_DATA_DIR")
real_files = pytest.mark.skipif(not REAL, reason="JEIDNN_DATA_DIR does not name a folder of real data sets")


@real_files
@pytest.mark.parametrize(("name", "held_out"), [("cifar10", "train"), ("cifar10", "test"), ("cifar100", "train")])
def test_real_files(name, held_out):
    source = load_source(name, data_dir=os.path.join(REAL, name))
    labels = {split: read_labels(rows) for split, rows in source.items()}
    splits = split_source(name, source, held_out=held_out)
    for role in ("validation", "calibration"):
        split, indices = splits.roles[role]
        per_class = 2500 // DATASETS[name].num_classes
        assert split == held_out and set(np.bincount(labels[split][indices])) == {per_class}
    split, indices = splits.roles["validation"]
    view = ImageView(source[split], indices, PLAIN, views=(None, 0))
    batch = view.__getitems__(range(100))
    assert torch.equal(batch["labels"], view.labels[:100]) and 0.3 < batch["pixel_values"].mean() < 0.6


@real_files
def test_real_long_tail_with_its_own_validation_file(monkeypatch):
    monkeypatch.setenv("JEIDNN_DATA_DIR", REAL)
    mapped, streamed = (load_source("cifar100-lt", streaming=streaming) for streaming in (False, True))
    if "validation" not in mapped:
        pytest.skip("JEIDNN_DATA_DIR has no validation file of CIFAR-100")
    size = len(mapped["validation"]) // 2
    splits = split_source("cifar100-lt", mapped, held_out="validation", validation=size, calibration=size)
    train = read_labels(mapped["train"])
    most = np.bincount(train).min()
    counts = np.bincount(train[splits.roles["train"][1]])
    assert counts.tolist() == [int(most * 100 ** (-c / 99)) for c in range(100)]
    for role in ("validation", "calibration", "test"):
        split, rows = splits.roles[role]
        assert split == ("test" if role == "test" else "validation")
        assert len(set(np.bincount(read_labels(mapped[split])[rows]))) == 1
    _, rows = splits.roles["train"]
    batches = [ImageView(source["train"], rows[:300], PLAIN).__getitems__(range(300)) for source in (mapped, streamed)]
    for name in batches[0]:
        assert torch.equal(batches[0][name], batches[1][name])
