"""feature_cache.py and ImageView.content_hash: the numbers of the backbone, once, under a key that nothing escapes."""

from __future__ import annotations

import copy
import io
import json
import os
import threading
import time
import zlib
from collections import namedtuple
from pathlib import Path

import datasets
import numpy as np
import PIL.Image
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch.utils.data import DataLoader

from jeidnn_hf import JEIDNNConfig, JEIDNNForImageClassification
from jeidnn_hf.backbones import build_model, staged_backbone
from jeidnn_hf.data import ImageView, Preprocessing, collate
from jeidnn_hf.feature_cache import CachedFeatures, FeatureCache, cache_features, cache_key, cached_role
from jeidnn_hf.feature_file import FORMAT, FeatureFile
from jeidnn_hf.splits import make_splits

COUNT, CLASSES, STAGES = 40, 4, [2, 5, 8]
PLAIN = Preprocessing(32, 1.0, "bicubic", (0.5,) * 3, (0.25,) * 3)
NOISE_SIZES = ((32, 32), (40, 36), (33, 50))


class Interrupted(RuntimeError):
    pass


def pictures(count: int = COUNT, seed: int = 0, shift: int = 0) -> datasets.Dataset:
    """Random PNGs of three sizes; ``shift`` moves the labels on by that many classes."""
    random, cells = np.random.default_rng(seed), []
    for i in range(count):
        width, height = NOISE_SIZES[i % 3]
        buffer = io.BytesIO()
        PIL.Image.fromarray(random.integers(0, 256, (height, width, 3), dtype=np.uint8)).save(buffer, "PNG")
        cells.append({"bytes": buffer.getvalue(), "path": None})
    return dataset(cells, [(i + shift) % CLASSES for i in range(count)])


def dataset(cells, labels) -> datasets.Dataset:
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(num_classes=CLASSES)})
    return datasets.Dataset.from_dict({"image": cells, "label": labels}, features=features)


def images_of(source, rows=range(COUNT), preprocessing=PLAIN, **options) -> ImageView:
    return ImageView(source, list(rows), preprocessing, **options)


def backbone_of(stages=STAGES, **options):
    torch.manual_seed(0)
    model = build_model("resnet20_cifar", num_classes=CLASSES)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.running_mean.normal_(std=0.1)
                module.running_var.uniform_(0.5, 1.5)
    return staged_backbone(model, image_size=32, exit_stages=stages, **options)


@torch.no_grad()
def features_of(backbone, images: ImageView, rows=None) -> torch.Tensor:
    batch = images.__getitems__(range(len(images)) if rows is None else rows)
    return torch.cat(backbone(batch["pixel_values"]), dim=1)


@pytest.fixture(scope="module")
def source():
    return pictures()


@pytest.fixture
def backbone():
    return backbone_of()


@pytest.fixture
def calls(backbone):
    """The number of images in each forward pass of the backbone so far."""
    seen = []
    backbone.register_forward_pre_hook(lambda _, inputs: seen.append(len(inputs[0])))
    return seen


def files(folder: Path, pattern: str = "*.safetensors") -> list[str]:
    return sorted(path.name for path in folder.glob(pattern))


def path_of(folder: Path) -> Path:
    (path,) = folder.glob("*.safetensors")
    return path


# ---- the numbers


@pytest.mark.parametrize("view", [None, 0, 3])
@pytest.mark.parametrize("pooling", ["plain", "rich"])
def test_float32_is_what_the_backbone_says(source, tmp_path, view, pooling):
    backbone = backbone_of(exit_pooling=pooling)
    images = images_of(source, range(3, 20), views=(view,), seed=7)
    cache = cache_features(backbone, images, "abc", tmp_path, dtype=torch.float32, batch_size=5)
    assert cache.features.dtype == torch.float32 and len(cache) == 17
    assert cache.exit_dims == backbone.exit_dims and cache.features.shape == (17, sum(backbone.exit_dims))
    torch.testing.assert_close(cache.features, features_of(backbone, images), rtol=1e-6, atol=1e-6)
    assert cache.index.tolist() == list(range(3, 20)) and cache.labels.tolist() == [r % CLASSES for r in range(3, 20)]
    assert cache.index.dtype == cache.labels.dtype == torch.int64


@pytest.mark.parametrize("view", [None, 1])
def test_float16_is_rounded_to_nearest_and_is_the_default(source, backbone, tmp_path, view):
    images = images_of(source, range(20), views=(view,))
    cache = cache_features(backbone, images, "abc", tmp_path)
    exact = features_of(backbone, images)
    assert cache.features.dtype == torch.float16
    assert ((cache.features.float() - exact).abs() <= exact.abs() * 2**-11 + 1e-6).all()
    assert not torch.equal(cache.features.float(), exact)
    assert CachedFeatures([cache]).__getitems__([3])["exit_features"].dtype == torch.float32


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.float16, 2**-11)])
def test_a_batch_from_the_cache_is_the_batch_from_the_pixels(source, backbone, tmp_path, dtype, tolerance):
    """Training with and without the cache: the same rows give the same features, labels and index."""
    rows, views = list(range(5, 38)), (None, 0, 4)
    caches = [
        cache_features(backbone, images_of(source, rows, views=(view,), seed=3), "s", tmp_path, dtype=dtype)
        for view in views
    ]
    cached, pixels = CachedFeatures(caches), images_of(source, rows, views=views, seed=3)
    assert len(cached) == len(pixels) == 99 and torch.equal(cached.labels, pixels.labels)
    wanted = torch.randperm(99, generator=torch.Generator().manual_seed(0)).tolist() + [98, 0, 0]
    for batch in (wanted[:32], wanted[32:]):
        from_cache, from_pixels = cached.__getitems__(batch), pixels.__getitems__(batch)
        assert torch.equal(from_cache["labels"], from_pixels["labels"])
        assert torch.equal(from_cache["index"], from_pixels["index"])
        assert set(from_cache) == {"exit_features", "labels", "index"}
        expected = features_of(backbone, pixels, batch)
        torch.testing.assert_close(from_cache["exit_features"], expected, rtol=tolerance, atol=1e-6)
    per_view = [features_of(backbone, pixels, range(33 * v, 33 * v + 33)) for v in range(3)]
    assert (per_view[0] - per_view[1]).abs().max() > 0.1 < (per_view[1] - per_view[2]).abs().max()


def test_a_training_step_from_the_cache_is_the_step_from_the_pixels(source, tmp_path):
    torch.manual_seed(1)
    config = JEIDNNConfig(backbone="resnet20_cifar", num_labels=CLASSES, exit_stages=STAGES, recipe="paper")
    model = JEIDNNForImageClassification(config)
    splits = make_splits(
        "toy", {name: source["label"] for name in ("train", "test")}, validation=12, calibration=4, num_classes=CLASSES
    )
    sources, rows = {"train": source, "test": source}, splits.roles["train"][1]
    cached = cached_role(
        model.backbone, sources, splits, "train", PLAIN, tmp_path, views=(0, 1), dtype=torch.float32, seed=2
    )
    pixels = images_of(source, rows, views=(0, 1), seed=2)
    assert len(cached) == len(pixels) == 2 * len(rows) == 2 * splits.info("train").size
    results = []
    for batch in (cached.__getitems__([30, 2, 17, 0]), pixels.__getitems__([30, 2, 17, 0])):
        batch.pop("index")
        model.zero_grad()
        output = model(**batch)
        output.loss.backward()
        grads = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
        results.append((output.loss.detach(), output.all_logits.detach(), output.exit_index, grads))
    for from_cache, from_pixels in zip(*results, strict=True):
        torch.testing.assert_close(from_cache, from_pixels, rtol=1e-5, atol=1e-6)
    assert abs(results[0][0] - results[1][0]) <= 1e-6
    assert results[0][3].abs().max() > 1e-3


def test_cached_role_names_one_file_for_each_view(source, backbone, calls, tmp_path):
    splits = make_splits(
        "toy", {name: source["label"] for name in ("train", "test")}, validation=12, calibration=4, num_classes=CLASSES
    )
    other = pictures(seed=1)
    sources = {"train": source, "test": other}
    cached = cached_role(backbone, sources, splits, "validation", PLAIN, tmp_path, views=(None, 5), seed=1)
    assert len(files(tmp_path)) == 2 and sum(calls) == 24
    assert [view.key["view"] for view in cached.views] == [None, 5]
    assert [view.key["seed"] for view in cached.views] == [None, 1]
    assert {view.key["split"] for view in cached.views} == {splits.info("validation").sha256}
    assert cached.views[0].index.tolist() == splits.roles["validation"][1].tolist()
    again = cached_role(backbone, sources, splits, "validation", PLAIN, tmp_path, views=(5,), seed=1)
    assert sum(calls) == 24 and torch.equal(again.views[0].features, cached.views[1].features)
    test = cached_role(backbone, sources, splits, "test", PLAIN, tmp_path)
    assert len(files(tmp_path)) == 3 and test.views[0].features.dtype == torch.float16
    assert torch.equal(test.views[0].features, features_of(backbone, images_of(other)).half())


def test_statistics_are_those_of_all_rows(source, backbone, tmp_path):
    cache = cache_features(backbone, images_of(source), "abc", tmp_path)
    exact = cache.features.numpy().astype(np.float64)
    for chunk in (7, COUNT, 8192):
        mean, std = cache.statistics(chunk)
        assert mean.dtype == std.dtype == torch.float32
        np.testing.assert_allclose(mean.numpy(), exact.mean(0), rtol=1e-6, atol=1e-7)
        np.testing.assert_allclose(std.numpy(), exact.std(0), rtol=1e-5, atol=1e-7)
    assert std.min() > 0


def test_statistics_of_a_constant_feature_far_from_zero(tmp_path):
    features = torch.stack([torch.full((50,), 1000.3), 1000 + torch.arange(50) / 100], dim=1)
    mean, std = handmade(tmp_path / "a", features, (2,)).statistics()
    exact = features.double()
    torch.testing.assert_close(mean.double(), exact.mean(0), rtol=1e-6, atol=0)
    assert std[0] < 1e-4 and std[1] == pytest.approx(float(exact[:, 1].std(correction=0)), rel=1e-4)


# ---- the file


def test_file_is_plain_safetensors(source, backbone, tmp_path):
    cache = cache_features(backbone, images_of(source), "abc", tmp_path)
    tensors = load_file(path_of(tmp_path))
    assert sorted(tensors) == ["checksums", "features", "index", "labels"]
    for name in ("features", "index", "labels"):
        assert tensors[name].dtype == getattr(cache, name).dtype and torch.equal(tensors[name], getattr(cache, name))
    block = b"".join(tensors[name].numpy().tobytes() for name in ("features", "labels", "index"))
    assert tensors["checksums"].tolist() == [zlib.crc32(block) + 1]  # of all 40 rows
    raw = path_of(tmp_path).read_bytes()
    head = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])
    assert json.loads(head["__metadata__"]["key"]) == cache.key
    assert cache.key == cache_key(backbone, images_of(source), "abc", torch.float16)
    assert all(head[name]["data_offsets"][0] % 8 == 0 for name in tensors)
    assert sorted(path.suffix for path in tmp_path.iterdir()) == [".lock", ".safetensors"]


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="the list of memory maps is Linux's")
def test_file_is_memory_mapped(source, backbone, tmp_path):
    def mapped():
        return str(path_of(tmp_path)) in Path("/proc/self/maps").read_text()

    cache = cache_features(backbone, images_of(source), "abc", tmp_path)
    cached = CachedFeatures([cache])
    assert mapped() and cached.views[0].features.data_ptr() == cache.features.data_ptr()
    cached.__getitems__([1, 2])
    del cache, cached
    assert not mapped()


def test_a_second_call_reads_the_file(source, backbone, calls, tmp_path):
    first = cache_features(backbone, images_of(source), "abc", tmp_path, batch_size=16)
    assert calls == [16, 16, 8]
    before = path_of(tmp_path).stat().st_mtime_ns
    second = cache_features(backbone, images_of(source), "abc", tmp_path, batch_size=7)
    assert calls == [16, 16, 8] and torch.equal(first.features, second.features)
    assert path_of(tmp_path).stat().st_mtime_ns == before


def test_the_folder_is_made(source, backbone, tmp_path):
    cache_features(backbone, images_of(source, range(2)), "abc", str(tmp_path / "a" / "b"))
    assert len(files(tmp_path / "a" / "b")) == 1


def changed_weight(backbone):
    backbone.model.layer3[0].conv1.weight.data[0, 0, 0, 0] += 1e-3
    return backbone


def changed_buffer(backbone):
    backbone.model.layer1[0].bn1.running_var[3] += 1e-3
    return backbone


ROWS = range(8)
BOTH = ["avg1", "max1"]
OTHER_BACKBONES = {
    "a weight": lambda: changed_weight(backbone_of(exit_pooling=BOTH)),
    "a running variance": lambda: changed_buffer(backbone_of(exit_pooling=BOTH)),
    "exits": lambda: backbone_of([1, 5, 8], exit_pooling=BOTH),  # of the same width
    "fewer exits": lambda: backbone_of([5, 8], exit_pooling=BOTH),
    "pooling": lambda: backbone_of(exit_pooling=["max1"]),
    "order of pooling": lambda: backbone_of(exit_pooling=["max1", "avg1"]),
    "no native head": lambda: backbone_of(exit_pooling=BOTH, native_head=False),
}
OTHER_IMAGES = {
    "mean": lambda s: images_of(s, ROWS, Preprocessing(32, 1.0, "bicubic", (0.4,) * 3, (0.25,) * 3)),
    "crop": lambda s: images_of(s, ROWS, Preprocessing(32, 0.9, "bicubic", (0.5,) * 3, (0.25,) * 3)),
    "interpolation": lambda s: images_of(s, ROWS, Preprocessing(32, 1.0, "bilinear", (0.5,) * 3, (0.25,) * 3)),
    "other pictures at the same rows": lambda s: images_of(pictures(seed=1), ROWS),
    "other labels of the same pictures": lambda s: images_of(pictures(shift=1), ROWS),
    "another order": lambda s: images_of(s, reversed(ROWS)),
    "fewer": lambda s: images_of(s, range(7)),
    "view 0": lambda s: images_of(s, ROWS, views=(0,)),
    "view 1": lambda s: images_of(s, ROWS, views=(1,)),
    "seed of view 0": lambda s: images_of(s, ROWS, views=(0,), seed=1),
}


def test_whatever_changes_the_numbers_changes_the_file(source, tmp_path):
    base, images = backbone_of(exit_pooling=BOTH), images_of(source, ROWS)
    variants = [(base, images, "abc", torch.float16), (base, images, "abd", torch.float16)]
    variants += [(base, images, "abc", torch.float32)]
    variants += [(make(), images, "abc", torch.float16) for make in OTHER_BACKBONES.values()]
    variants += [(base, make(source), "abc", torch.float16) for make in OTHER_IMAGES.values()]
    names = ["base", "split", "dtype", *OTHER_BACKBONES, *OTHER_IMAGES]
    owner: dict[str, str] = {}
    for name, (backbone, view, split, dtype) in zip(names, variants, strict=True):
        before = set(files(tmp_path))
        cache = cache_features(backbone, view, split, tmp_path, dtype=dtype)
        new = set(files(tmp_path)) - before
        assert len(new) == 1, f"{name} was served from the file of another key"
        owner[new.pop()] = name
        exact = features_of(backbone, view)
        torch.testing.assert_close(cache.features.float(), exact, rtol=2**-10, atol=1e-6)
        assert torch.equal(cache.labels, view.labels)
    assert list(sorted(owner.values())) == sorted(names)


def test_a_seed_that_changes_nothing_changes_no_file(source, backbone, calls, tmp_path):
    for seed in (0, 9):
        cache_features(backbone, images_of(source, ROWS, seed=seed), "abc", tmp_path)
    cache_features(copy.deepcopy(backbone), images_of(pictures(), ROWS), "abc", tmp_path)
    assert len(files(tmp_path)) == 1 and len(calls) == 1


def test_the_same_weights_in_another_network_change_the_file(source, tmp_path):
    shape = {"num_classes": CLASSES, "image_size": 8, "patch_size": 2, "embed_dim": 48, "depth": 2}
    images, caches = images_of(source, ROWS, Preprocessing(8, 1.0, "bicubic", (0.5,) * 3, (0.25,) * 3)), []
    weights = None
    for heads in (3, 6):
        model = build_model("vit_tiny_patch16_224", num_heads=heads, **shape)
        weights = weights or model.state_dict()
        model.load_state_dict(weights)
        backbone = staged_backbone(model, image_size=8)
        caches.append(cache_features(backbone, images, "abc", tmp_path, dtype=torch.float32))
    torch.testing.assert_close(caches[1].features, features_of(backbone, images), rtol=1e-5, atol=1e-6)


def test_options_that_json_changes_are_the_same_key(source, tmp_path):
    model = build_model(
        "vit_tiny_patch16_224", num_classes=CLASSES, img_size=(8, 8), patch_size=2, embed_dim=48, depth=1
    )
    images = images_of(source, ROWS, Preprocessing(8, 1.0, "bicubic", (0.5,) * 3, (0.25,) * 3))
    assert len(cache_features(staged_backbone(model, image_size=8), images, "abc", tmp_path)) == len(ROWS)


# ---- interruptions


def interrupt_after(backbone, batches: int):
    """From then on, the backbone raises; returns the handle that takes this back."""
    left = [batches]

    def hook(*_):
        if not left[0]:
            raise Interrupted
        left[0] -= 1

    return backbone.register_forward_pre_hook(hook)


@pytest.fixture
def blocks_of_8(monkeypatch):
    """Five blocks in 40 rows."""
    monkeypatch.setitem(FORMAT, "block_rows", 8)


def test_an_interrupted_extraction_goes_on_where_it_stopped(source, backbone, calls, tmp_path, blocks_of_8, capsys):
    images = images_of(source, views=(2,))
    whole = cache_features(backbone, images, "abc", tmp_path / "whole", dtype=torch.float32, batch_size=1)
    handle = interrupt_after(backbone, 35)
    with pytest.raises(Interrupted):
        cache_features(backbone, images, "abc", tmp_path / "cut", dtype=torch.float32, batch_size=1)
    assert files(tmp_path / "cut") == []  # what is not whole does not look like a cache
    handle.remove()
    calls.clear()
    capsys.readouterr()
    cut = cache_features(backbone, images, "abc", tmp_path / "cut", dtype=torch.float32, batch_size=1)
    assert calls == [1] * 8 and "; 32 rows are there\n" in capsys.readouterr().err
    for name in ("features", "labels", "index"):
        assert torch.equal(getattr(cut, name), getattr(whole, name))
    assert path_of(tmp_path / "cut").read_bytes() == path_of(tmp_path / "whole").read_bytes()
    assert sorted(path.suffix for path in (tmp_path / "cut").iterdir()) == [".lock", ".safetensors"]


def test_an_extraction_interrupted_early_starts_again_and_batches_may_change(
    source, backbone, calls, tmp_path, blocks_of_8
):
    handle = interrupt_after(backbone, 5)
    with pytest.raises(Interrupted):
        cache_features(backbone, images_of(source), "abc", tmp_path, dtype=torch.float32, batch_size=1)
    handle.remove()
    calls.clear()
    handle = interrupt_after(backbone, 33)
    with pytest.raises(Interrupted):
        cache_features(backbone, images_of(source), "abc", tmp_path, dtype=torch.float32, batch_size=1)
    assert len(calls) == 34
    handle.remove()
    calls.clear()
    cache = cache_features(backbone, images_of(source), "abc", tmp_path, dtype=torch.float32, batch_size=5)
    assert calls == [5, 3]
    torch.testing.assert_close(cache.features, features_of(backbone, images_of(source)), rtol=1e-5, atol=1e-6)


def test_blocks_that_changed_since_they_were_written_are_made_again(source, backbone, calls, tmp_path, blocks_of_8):
    images = images_of(source)
    whole = cache_features(backbone, images, "abc", tmp_path / "whole", batch_size=8)
    handle = interrupt_after(backbone, 4)
    with pytest.raises(Interrupted):
        cache_features(backbone, images, "abc", tmp_path / "cut", batch_size=8)
    handle.remove()
    (partial,) = (tmp_path / "cut").glob("*.partial")
    left = FeatureFile(partial)
    assert left.wrong_blocks() == [4] and left.checksums[4] == 0
    change(partial, "features", 8)
    change(partial, "labels", 17)
    calls.clear()
    cache_features(backbone, images, "abc", tmp_path / "cut", batch_size=8)
    assert calls == [8] * 3
    assert path_of(tmp_path / "cut").read_bytes() == path_of(tmp_path / "whole").read_bytes()
    assert len(whole) == COUNT


@pytest.mark.parametrize("left", ["", "junk" * 99, "cut short", "another header"])
def test_what_is_left_of_something_else_is_not_believed(source, backbone, calls, tmp_path, left):
    images = images_of(source)
    cache_features(backbone, images, "abc", tmp_path / "whole")
    whole = path_of(tmp_path / "whole")
    content = left.encode()
    if left == "cut short":
        content = whole.read_bytes()[:-1]
    elif left == "another header":
        content = whole.read_bytes().replace(b"layer", b"lawer").replace(b'view\\": null', b'view\\": 1   ')
        assert content != whole.read_bytes()
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / whole.with_suffix(".partial").name).write_bytes(content)
    cache_features(backbone, images, "abc", tmp_path / "new")
    assert calls == [COUNT, COUNT] and path_of(tmp_path / "new").read_bytes() == whole.read_bytes()


def test_two_threads_at_once_extract_once(source, tmp_path):
    backbone, seen, caches = backbone_of(), [], {}
    start = threading.Barrier(2)

    def slow(*_):
        seen.append(threading.get_ident())
        time.sleep(0.02)

    def work(name):
        start.wait()
        caches[name] = cache_features(backbone, images_of(source), "abc", tmp_path, batch_size=8)

    handle = backbone.register_forward_pre_hook(slow)
    threads = [threading.Thread(target=work, args=(name,)) for name in "ab"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    handle.remove()
    assert len(seen) == 5 and len(set(seen)) == 1
    assert len(files(tmp_path)) == 1 and files(tmp_path, "*.partial") == []
    exact = features_of(backbone, images_of(source)).half()
    for name in "ab":
        assert torch.equal(caches[name].features, exact) and len(caches[name].labels) == COUNT


# ---- errors: a ValueError of one sentence


def test_broken_files_are_refused(source, backbone, tmp_path):
    cache_features(backbone, images_of(source, ROWS), "abc", tmp_path)
    path = path_of(tmp_path)
    raw = path.read_bytes()
    header = 8 + int.from_bytes(raw[:8], "little")
    broken = [raw[:-1], raw[: header - 3], raw[:5], b"", b"not a cache" * 99, b"\xff" * len(raw)]
    broken += [raw[:20] + b"\0" * 40 + raw[60:], raw + b"more"]
    for content in broken:
        path.write_bytes(content)
        message = f"^Expected a feature cache at '{path}', but it cannot be read: [^\n]*$"
        with pytest.raises(ValueError, match=message):
            FeatureCache(path)
        with pytest.raises(ValueError, match=message):
            cache_features(backbone, images_of(source, ROWS), "abc", tmp_path)
    for tensors, metadata in (({"features": torch.zeros(2, 2)}, {"key": "{}"}), ({"x": torch.zeros(2)}, None)):
        save_file(tensors, path, metadata=metadata)
        with pytest.raises(ValueError, match="Expected a feature cache"):
            FeatureCache(path)
    with pytest.raises(ValueError, match="Expected a feature cache at '.*nowhere"):
        FeatureCache(tmp_path / "nowhere")


def change(path: Path, name: str, row: int, field: int = 0) -> None:
    """Flips the lowest bit of one number of a tensor in a file."""
    raw = bytearray(path.read_bytes())
    start = 8 + int.from_bytes(raw[:8], "little")
    entry = json.loads(raw[8:start])[name]
    size = (entry["data_offsets"][1] - entry["data_offsets"][0]) // entry["shape"][0]
    raw[start + entry["data_offsets"][0] + row * size + field] ^= 1
    path.write_bytes(raw)


@pytest.mark.parametrize(
    ("name", "row", "field", "rows"),
    [
        ("features", 0, 0, "0 to 7"),
        ("features", 23, 103, "16 to 23"),  # the last byte of 52 halves
        ("labels", 24, 0, "24 to 31"),
        ("index", 38, 1, "32 to 38"),
        ("checksums", 2, 0, "16 to 23"),
    ],
)
def test_a_bit_that_flipped_on_the_disk_is_found(source, backbone, tmp_path, blocks_of_8, name, row, field, rows):
    images = images_of(source, range(39))
    cache_features(backbone, images, "abc", tmp_path)
    path = path_of(tmp_path)
    change(path, name, row, field)
    message = rf"^Expected features as they were written in '{path}', but rows {rows} differ .*; remove the file\.$"
    for again in (lambda: FeatureCache(path), lambda: cache_features(backbone, images, "abc", tmp_path)):
        with pytest.raises(ValueError, match=message):
            again()
    path.unlink()
    assert len(cache_features(backbone, images, "abc", tmp_path)) == 39


def test_a_file_is_read_through_once_in_a_process_while_it_stays_the_same(source, backbone, tmp_path, monkeypatch):
    cache_features(backbone, images_of(source), "abc", tmp_path)
    path, read, wrong_blocks = path_of(tmp_path), [], FeatureFile.wrong_blocks
    monkeypatch.setattr(FeatureFile, "wrong_blocks", lambda file: read.append(file.path) or wrong_blocks(file))
    for _ in range(3):
        FeatureCache(path)
    assert read == []
    os.utime(path, ns=(1, 1))
    for _ in range(3):
        FeatureCache(path)
    assert read == [path]


def test_a_file_of_this_format_has_checksums_of_all_its_rows(tmp_path):
    rows = torch.arange(300)
    tensors = {"features": torch.zeros(300, 5), "labels": rows, "index": rows + 1}
    key = {"key": json.dumps({"exit_dims": [2, 3], "format": FORMAT})}
    for checksums, what in (({}, "'checksums'"), ({"checksums": torch.ones(1).long()}, "1 checksums of 300 rows")):
        save_file({**tensors, **checksums}, tmp_path / "a", metadata=key)
        with pytest.raises(ValueError, match=f"cannot be read: {what}; remove the file"):
            FeatureCache(tmp_path / "a")
    save_file({**tensors, "labels": rows[:9]}, tmp_path / "a", metadata={"key": '{"exit_dims": [2, 3]}'})
    with pytest.raises(ValueError, match="do not match"):
        FeatureCache(tmp_path / "a")


def test_another_key_is_refused_by_name(source, backbone, tmp_path):
    key = cache_features(backbone, images_of(source, ROWS), "abc", tmp_path).key
    path = path_of(tmp_path)
    assert FeatureCache(path).key == FeatureCache(path, dict(key)).key == key
    for name, value in {"view": 2, "split": "abd", "exit_stages": [0, 8], "backbone": "0" * 64}.items():
        match = rf"^Expected features made with the same \['{name}'\] in '{path}', but got others; remove the file\."
        with pytest.raises(ValueError, match=match):
            FeatureCache(path, {**key, name: value})
    with pytest.raises(ValueError, match=r"the same \['seed', 'view'\]"):
        FeatureCache(path, {**key, "view": 0, "seed": 0})


def test_a_full_disk_is_refused_before_anything_is_written(source, backbone, calls, tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    need = COUNT * (sum(backbone.exit_dims) * 2 + 16)
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage(10**9, 10**9 - need, need))
    with pytest.raises(ValueError, match=r"^Expected 0\.00 GB free for the features in .*, but got 0\.00 GB\.$"):
        cache_features(backbone, images_of(source), "abc", tmp_path)  # the header does not fit
    assert calls == [] and files(tmp_path) == files(tmp_path, "*.partial") == []
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage(10**9, 0, need + 4096))
    assert len(cache_features(backbone, images_of(source), "abc", tmp_path)) == COUNT


def test_what_is_there_already_takes_no_more_room(source, backbone, calls, tmp_path, monkeypatch, blocks_of_8):
    usage = namedtuple("usage", "total used free")
    handle = interrupt_after(backbone, 3)
    with pytest.raises(Interrupted):
        cache_features(backbone, images_of(source), "abc", tmp_path, batch_size=8)
    handle.remove()
    row = sum(backbone.exit_dims) * 2 + 16
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage(10**9, 10**9, 16 * row))  # and nothing for the header
    with pytest.raises(ValueError, match=r"^Expected 0\.00 GB free for the features"):
        cache_features(backbone, images_of(source), "abc", tmp_path, batch_size=8)
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage(10**9, 10**9, 16 * row + 4096))
    assert len(cache_features(backbone, images_of(source), "abc", tmp_path, batch_size=8)) == COUNT
    assert calls == [8] * 6


def test_the_size_is_announced_before_the_first_image(source, backbone, tmp_path, capsys):
    said = []
    backbone.register_forward_pre_hook(lambda *_: said.append(capsys.readouterr().err.splitlines()[0]))
    cache_features(backbone, images_of(source), "abc", tmp_path, description="features train")
    assert said == [f"features train: 40 x 52 float16, 0.00 GB in {tmp_path}"]
    cache_features(backbone, images_of(source), "abc", tmp_path)
    assert "GB in" not in capsys.readouterr().err  # nothing is extracted


# ---- larger than memory


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="the size of a memory map is Linux's to tell")
def test_pages_of_a_large_file_do_not_stay_in_memory(tmp_path, monkeypatch):
    """32 MB are opened, summed up and read in random order; about 4 MB of them are in memory at any time."""
    rows, width, path = 4096, 4096, tmp_path / "large"
    file = FeatureFile.lay_out(path, rows, torch.float16, {"format": FORMAT, "exit_dims": [width]})
    values = torch.arange(rows, dtype=torch.float16)[:, None].expand(-1, width)
    for block in range(rows // 256):
        here = range(block * 256, block * 256 + 256)
        file.write_block(block, values[here.start : here.stop], torch.zeros(256).long(), torch.tensor(here))
    del file

    def resident() -> float:
        """Of all maps of the file, MB."""
        text = Path("/proc/self/smaps").read_text().split(str(path))[1:]
        return sum(int(part.split("Rss:")[1].split()[0]) for part in text) / 1024

    monkeypatch.setattr("jeidnn_hf.feature_file.RESIDENT_BYTES", 4 * 2**20)
    cache = FeatureCache(path)
    cached, seen = CachedFeatures([cache]), [resident()]
    mean, _ = cache.statistics(256)
    seen.append(resident())
    order = torch.randperm(rows, generator=torch.Generator().manual_seed(0))
    for wanted in order.split(16):
        assert torch.equal(cached.__getitems__(wanted)["exit_features"][:, -1], values[wanted, 0].float())
        seen.append(resident())
    assert mean[0] == values[:, 0].float().mean() and max(seen) <= 8
    monkeypatch.setattr("jeidnn_hf.feature_file.RESIDENT_BYTES", 10**9)
    cache.statistics()
    assert resident() >= 32  # what would be there


def test_several_views_in_one_file_are_refused(source, backbone, tmp_path):
    with pytest.raises(ValueError):
        cache_features(backbone, images_of(source, views=(None, 0)), "abc", tmp_path)


def test_features_beyond_float16_are_refused(source, backbone, tmp_path):
    with torch.no_grad():
        backbone.model.linear.weight.mul_(1e6)
    with pytest.raises(ValueError, match="float32"):
        cache_features(backbone, images_of(source), "abc", tmp_path)


# ---- CachedFeatures


def handmade(path: Path, features: torch.Tensor, exit_dims, index=None) -> FeatureCache:
    rows = torch.arange(len(features))
    tensors = {"features": features.contiguous(), "labels": rows % 3, "index": rows if index is None else index}
    save_file(tensors, path, metadata={"key": json.dumps({"exit_dims": exit_dims})})
    return FeatureCache(path)


@pytest.fixture(scope="module")
def numbered(tmp_path_factory):
    """Caches of 7 images in 4 views; a feature is 100 view + 10 row + column."""
    folder = tmp_path_factory.mktemp("numbered")
    caches = []
    for view in range(4):
        grid = 100 * view + 10 * torch.arange(7)[:, None] + torch.arange(5)
        caches.append(handmade(folder / str(view), grid.half(), (2, 3), index=torch.arange(7) + 50))
    return caches


@settings(max_examples=60, deadline=None, database=None, derandomize=True)
@given(st.integers(1, 4), st.data())
def test_rows_are_gathered_in_the_order_asked_for(numbered, views, data):
    cached = CachedFeatures(numbered[:views])
    rows = data.draw(st.lists(st.integers(0, 7 * views - 1), min_size=1, max_size=40))
    batch = cached.__getitems__(rows)
    assert batch["exit_features"].dtype == torch.float32
    assert batch["exit_features"].tolist() == [[100 * (r // 7) + 10 * (r % 7) + c for c in range(5)] for r in rows]
    assert batch["index"].tolist() == [r % 7 + 50 for r in rows]
    assert batch["labels"].tolist() == [r % 7 % 3 for r in rows] == cached.labels[rows].tolist()
    assert len(cached) == len(cached.labels) == 7 * views and cached.exit_dims == (2, 3)
    one = cached[rows[0]]
    assert {name: value.tolist() for name, value in one.items()} == {k: v[0].tolist() for k, v in batch.items()}


def test_a_shuffled_loader_sees_every_row_once(numbered):
    loader = DataLoader(CachedFeatures(numbered), batch_size=6, shuffle=True, collate_fn=collate)
    first = torch.cat([batch["exit_features"][:, 0] for batch in loader])
    assert sorted(first.tolist()) == sorted(100 * v + 10 * r for v in range(4) for r in range(7))
    assert first.tolist() != sorted(first.tolist())


def test_ranges_tensors_and_arrays_are_rows_too(numbered):
    cached, expected = CachedFeatures(numbered[:2]), [[0], [10], [160]]
    for rows in ([0, 1, 13], torch.tensor([0, 1, 13]), np.array([0, 1, 13])):
        assert cached.__getitems__(rows)["exit_features"][:, :1].tolist() == expected
    many = torch.arange(14).repeat(21)  # more than are read at once
    assert torch.equal(
        cached.__getitems__(many)["exit_features"], cached.__getitems__(range(14))["exit_features"].repeat(21, 1)
    )
    assert cached.__getitems__(range(6, 8))["exit_features"][:, 0].tolist() == [60, 100]


def test_views_of_different_things_are_refused(numbered, tmp_path):
    with pytest.raises(ValueError, match="at least one view"):
        CachedFeatures([])
    with pytest.raises(ValueError, match="at least one view with at least one image"):
        CachedFeatures([handmade(tmp_path / "a", torch.zeros(0, 5), (2, 3))])
    others = {
        "exits": handmade(tmp_path / "b", torch.zeros(7, 5), (3, 2), index=torch.arange(7) + 50),
        "images": handmade(tmp_path / "c", torch.zeros(7, 5), (2, 3), index=torch.arange(7) + 51),
        "order": handmade(tmp_path / "d", torch.zeros(7, 5), (2, 3), index=torch.arange(7).flip(0) + 50),
        "number": handmade(tmp_path / "e", torch.zeros(6, 5), (2, 3), index=torch.arange(6) + 50),
    }
    for other in others.values():
        with pytest.raises(ValueError, match="views of the same images and exits"):
            CachedFeatures([numbered[0], numbered[1], other])
    assert len(CachedFeatures([numbered[0], numbered[0]])) == 14


@pytest.mark.parametrize("views", [1, 2])
def test_a_row_out_of_range_is_an_index_error(numbered, views):
    cached = CachedFeatures(numbered[:views])
    for row in (7 * views, -7 * views - 1):
        with pytest.raises(IndexError):
            cached[row]


def test_rows_count_from_the_end_as_in_an_image_view(numbered):
    cached = CachedFeatures(numbered[:3])
    assert cached.__getitems__([-1, -21])["exit_features"][:, 0].tolist() == [260, 0]


# ---- ImageView.content_hash


def test_content_hash_tells_pictures_labels_and_order_apart(source, monkeypatch):
    base = images_of(source).content_hash()
    monkeypatch.setattr(datasets.Image, "decode_example", None)  # reads bytes, decodes nothing
    assert images_of(pictures()).content_hash() == base and len(base) == 64
    others = [pictures(seed=1), pictures(shift=1)]
    hashes = {images_of(other).content_hash() for other in others}
    hashes |= {images_of(source, rows).content_hash() for rows in (range(39), reversed(range(COUNT)), range(1, COUNT))}
    assert len(hashes | {base}) == 6


@pytest.mark.parametrize("row", [0, 17, COUNT - 1])
def test_content_hash_sees_one_other_picture_of_the_same_label(source, row):
    encoded = source.cast_column("image", datasets.Image(decode=False))
    cells = list(encoded["image"])
    cells[row] = cells[(row + 4) % COUNT]  # labels repeat after four
    assert images_of(dataset(cells, encoded["label"])).content_hash() != images_of(source).content_hash()


def test_content_hash_sees_every_label_but_only_some_pictures():
    """16 probes in 50 pictures: the ends are read, and the others at little more than three rows' distance."""
    cell = pictures(1).cast_column("image", datasets.Image(decode=False))[0]["image"]
    cells = [{"bytes": cell["bytes"] + bytes([i]), "path": None} for i in range(50)]
    rows, labels = range(50), [0] * 50

    def hash_of(cells, labels):
        return images_of(dataset(cells, labels), rows).content_hash(probes=16)

    base = hash_of(cells, labels)
    other = [{"bytes": cell["bytes"] + b"other", "path": None}]
    seen = [hash_of(cells[:row] + other + cells[row + 1 :], labels) != base for row in rows]
    probes = np.flatnonzero(seen)
    assert len(probes) == 16 and probes[0] == 0 and probes[-1] == 49 and np.diff(probes).max() == 4
    unseen = seen.index(False)
    assert hash_of(cells, labels[:unseen] + [1] + labels[unseen + 1 :]) != base


def test_content_hash_depends_on_nothing_else(source):
    base = images_of(source).content_hash()
    assert images_of(source, views=(None, 0, 1), seed=3).content_hash() == base
    assert images_of(source, preprocessing=Preprocessing(8, 0.5, "box", (0.0,), (1.0,), 1)).content_hash() == base
    assert images_of(source).content_hash(probes=3) != base


def test_content_hash_of_an_empty_cell_names_the_row():
    cells = [pictures(1).cast_column("image", datasets.Image(decode=False))[0]["image"], None]
    with pytest.raises(ValueError, match="Expected a readable picture, but got .* at row 1"):
        images_of(dataset(cells, [0, 1]), range(2)).content_hash()
