"""record.py: what every exit answered, from pixels or from cached features, saved and read back."""

from __future__ import annotations

import io
import json
import math

import datasets
import numpy as np
import PIL.Image
import pytest
import torch
from safetensors.torch import load_file, save_file

from jeidnn_hf import ExitRecord, JEIDNNConfig, JEIDNNForImageClassification
from jeidnn_hf.costs import ExitCosts
from jeidnn_hf.data import ImageView, Preprocessing
from jeidnn_hf.feature_cache import CachedFeatures, cache_features
from jeidnn_hf.record import check_comparable, check_disjoint, collect_logits
from jeidnn_hf.splits import SplitInfo

COSTS = ExitCosts(backbone=(40, 100, 200), pooling=(1, 2, 2), heads=(5, 10, 15), gates=(2, 4, 4))
PLAIN = Preprocessing(32, 1.0, "bicubic", (0.5,) * 3, (0.25,) * 3)


def split_of(size: int) -> SplitInfo:
    return SplitInfo("toy", "test", "test", size, "f" * 64)


def record_of(size: int = 6, classes: int = 4, seed: int = 0, **options) -> ExitRecord:
    random = torch.Generator().manual_seed(seed)
    logits = torch.randn(size, 3, classes, generator=random)
    return ExitRecord(logits, torch.arange(size) % classes, COSTS, split_of(size), **options)


@pytest.fixture(scope="module")
def images() -> ImageView:
    random, cells = np.random.default_rng(0), []
    for _ in range(20):
        buffer = io.BytesIO()
        PIL.Image.fromarray(random.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(buffer, "PNG")
        cells.append({"bytes": buffer.getvalue(), "path": None})
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(num_classes=4)})
    source = datasets.Dataset.from_dict({"image": cells, "label": [i % 4 for i in range(20)]}, features=features)
    return ImageView(source, [*range(3, 20), 0], PLAIN)


def model_of(stages=(2, 5, 8), **config) -> JEIDNNForImageClassification:
    """A network all of whose parts matter: statistics, ensemble and temperatures are not the identity."""
    torch.manual_seed(0)
    config = {"backbone": "resnet20_cifar", "num_labels": 4, "exit_stages": list(stages), "head_dim": 16} | config
    model = JEIDNNForImageClassification(JEIDNNConfig(**config))
    with torch.no_grad():
        for norm in model.heads.norms or ():
            norm.mean.normal_(std=0.1)
            norm.std.uniform_(0.5, 2)
        if model.heads.ensemble is not None:
            for tensor in (model.heads.ensemble.weight, model.heads.ensemble.bias):
                tensor.add_(0.2 * torch.randn_like(tensor))
            model.heads.ensemble.temperature.uniform_(0.5, 2)
    return model.eval()


# ---- of a model


@pytest.mark.parametrize("recipe", ["paper", "default"])
def test_cached_features_answer_as_pixels_do(images, recipe, tmp_path):
    model = model_of(recipe=recipe)
    cached = CachedFeatures([cache_features(model.backbone, images, "s", tmp_path, dtype=torch.float32)])
    record = ExitRecord.of(model, images, split_of(18))
    assert torch.equal(record.labels, images.labels) and record.labels.dtype == torch.int64
    with torch.no_grad():
        output = model(images.__getitems__(range(18))["pixel_values"], output_all_exits=True)
    torch.testing.assert_close(record.logits, output.all_logits, rtol=1e-5, atol=1e-6)
    assert record.logits.std(0).amin() > 1e-3  # the pictures matter
    for batch_size in (18, 7, 1):
        other = ExitRecord.of(model, cached, split_of(18), batch_size)
        torch.testing.assert_close(other.logits, record.logits, rtol=0, atol=1e-4)
        assert torch.equal(other.labels, record.labels)
    assert record.costs == model.costs and record.split == split_of(18) and record.num_exits == 3
    assert record.index.tolist() == other.index.tolist() == [*range(3, 20), 0]
    assert record.backbone is model.config.backbone_fingerprint is None
    model.config.backbone_fingerprint = "a" * 64
    assert ExitRecord.of(model, cached, split_of(18)).backbone == "a" * 64


def test_several_views_are_several_answers(images, tmp_path):
    model = model_of()
    view = cache_features(model.backbone, images, "s", tmp_path, dtype=torch.float32)
    record = ExitRecord.of(model, CachedFeatures([view, view]), split_of(36), batch_size=13)
    assert record.logits.shape == (36, 3, 4) and torch.equal(record.labels, images.labels.repeat(2))
    assert record.index.tolist() == [*range(3, 20), 0] * 2
    torch.testing.assert_close(record.logits[:18], record.logits[18:], rtol=1e-5, atol=1e-6)


def test_members_are_the_answers_before_boosting_and_ensemble(images):
    model = model_of(recipe="default")
    members, labels = collect_logits(model, images, members=True)
    answers, _ = collect_logits(model, images, batch_size=5)
    assert torch.equal(labels, images.labels)
    with torch.no_grad():
        boosted = [members[:, 0]]
        for l in (1, 2):
            boosted.append(members[:, l] + model.config.boosting * boosted[-1])
        log_probs = (torch.stack(boosted, dim=1) / model.heads.ensemble.temperature[:, None]).log_softmax(-1)
        for l in range(3):
            weights = model.heads.ensemble.weight[l, : l + 1]
            expected = sum(w * log_probs[:, j] for j, w in enumerate(weights)) + model.heads.ensemble.bias[l]
            torch.testing.assert_close(answers[:, l], expected, rtol=1e-5, atol=1e-5)
    assert (members - answers).abs().max() > 0.1
    plain = model_of(recipe="paper")
    assert torch.equal(collect_logits(plain, images)[0], collect_logits(plain, images, members=True)[0])


def test_a_record_leaves_no_graph_and_can_be_fitted_on(images):
    record = ExitRecord.of(model_of(recipe="paper"), images, split_of(18))
    assert not record.logits.requires_grad
    scale = torch.ones(3, 1, requires_grad=True)
    loss = torch.nn.functional.cross_entropy((record.logits.double() * scale).flatten(0, 1), record.labels.repeat(3))
    loss.backward()
    assert scale.grad.abs().sum() > 0


def test_a_network_whose_only_exit_is_its_own_classifier(images):
    model = model_of(stages=[8], recipe="paper")
    record = ExitRecord.of(model, images, split_of(18))
    with torch.no_grad():
        (expected,) = model.backbone(images.__getitems__(range(18))["pixel_values"])
    torch.testing.assert_close(record.logits[:, 0], expected, rtol=1e-5, atol=1e-6)


# ---- costs and checks


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_costs_are_shares_of_the_bare_backbone(dtype):
    record = record_of()
    record.logits = record.logits.to(dtype)
    assert record.normalised_costs.dtype == dtype
    assert record.normalised_costs.tolist() == pytest.approx([48 / 200, 116 / 200, 221 / 200], rel=1e-7)


@pytest.mark.parametrize("wrong", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("place", [(0, 0, 0), (5, 2, 3)])
def test_logits_that_are_not_numbers_are_refused(wrong, place):
    logits = record_of().logits.clone()
    logits[place] = wrong
    with pytest.raises(ValueError, match="Expected logits without NaN or infinity"):
        ExitRecord(logits, torch.zeros(6, dtype=torch.int64), COSTS, split_of(6))


@pytest.mark.parametrize(
    ("logits", "labels"),
    [((6, 4), (6,)), ((6, 3, 4, 1), (6,)), ((6, 3, 4), (5,)), ((6, 3, 4), (6, 1)), ((6, 3, 4), ()), ((0, 3, 4), (0,))],
)
def test_wrong_shapes_and_no_images_are_refused(logits, labels):
    message = rf"^Expected logits \(N, L, K\) and labels \(N,\) with N > 0, but got \({str(logits)[1:-1]}\) and .*\.$"
    with pytest.raises(ValueError, match=message):
        ExitRecord(torch.zeros(logits), torch.zeros(labels, dtype=torch.int64), COSTS, split_of(6))


@pytest.mark.parametrize("label", [-1, 4])
def test_labels_out_of_range_are_refused(label):
    labels = torch.tensor([0, 1, 2, 3, 0, label])
    with pytest.raises(ValueError, match=f"^Expected labels in 0..3, but got {min(label, 0)} to {max(label, 3)}.$"):
        ExitRecord(torch.zeros(6, 3, 4), labels, COSTS, split_of(6))


def test_an_index_of_other_images_is_refused():
    with pytest.raises(ValueError, match=r"^Expected an index \(6,\), but got \(5,\).$"):
        record_of(index=torch.arange(5))


@pytest.mark.parametrize("exits", [1, 2, 4])
def test_costs_of_other_exits_are_refused(exits):
    with pytest.raises(ValueError, match=f"Expected costs of {exits} exits, but got 3"):
        ExitRecord(torch.zeros(6, exits, 4), torch.zeros(6, dtype=torch.int64), COSTS, split_of(6))


# ---- two records of one network


def record_as(role: str, rows, source: str = "s", dataset: str = "toy", sha256: str = "a", **options) -> ExitRecord:
    split = SplitInfo(dataset, role, source, len(rows), sha256 * 64)
    return ExitRecord(torch.zeros(len(rows), 3, 4), torch.zeros(len(rows), dtype=torch.int64), COSTS, split, **options)


def indexed(role: str, rows, **options) -> ExitRecord:
    return record_as(role, rows, index=torch.tensor(rows), **options)


def test_records_of_other_networks_are_not_comparable():
    first = record_as("test", range(5), backbone="b" * 64)
    check_comparable(first, record_as("validation", range(9), backbone="b" * 64, sha256="c"))
    with pytest.raises(ValueError, match="^Expected test and validation .* same dataset, but got toy and d"):
        check_comparable(first, record_as("validation", range(5), dataset="d", backbone="b" * 64))
    with pytest.raises(ValueError, match=f"records of the same backbone, but got {'b' * 64} and {'c' * 64}"):
        check_comparable(first, record_as("test", range(5), backbone="c" * 64))
    with pytest.raises(ValueError, match=f"records of the same backbone, but got {'b' * 64} and None"):
        check_comparable(first, record_as("test", range(5)))
    other = record_as("test", range(5), backbone="b" * 64)
    other.logits = torch.zeros(5, 3, 7)
    with pytest.raises(ValueError, match=r"same exits and classes, but got \(3, 4\) and \(3, 7\)"):
        check_comparable(first, other)


def test_images_in_two_records_are_refused():
    check_disjoint(indexed("test", [0, 1, 2]), indexed("calibration", [3, 4]))
    check_disjoint(indexed("test", [0, 1]), indexed("validation", [0, 1], source="other"))  # rows of another file
    for role in ("train", "validation", "calibration"):
        with pytest.raises(ValueError, match=f"^Expected test and {role} records without .*, but got 2 images"):
            check_disjoint(indexed("test", [0, 1, 2]), indexed(role, [5, 2, 0, 2], sha256="c"))
    with pytest.raises(ValueError, match="calibration and train records .*, but got 1 images of 's'"):
        check_disjoint(indexed("calibration", [7, 8]), indexed("train", range(8)[1:], sha256="c"))
    with pytest.raises(ValueError, match="^Expected a record of held-out images, but got one of the role 'train'.$"):
        check_disjoint(indexed("train", [0, 1]), indexed("test", [2]))
    with pytest.raises(ValueError, match="of the same backbone"):
        check_disjoint(indexed("test", [0]), indexed("calibration", [1], backbone="c" * 64))


def test_without_row_numbers_the_hash_of_the_split_tells():
    check_disjoint(record_as("test", range(4)), record_as("calibration", range(4), sha256="c"))
    with pytest.raises(ValueError, match="without a common image, but got 4 images of 's' in both"):
        check_disjoint(record_as("test", range(4)), indexed("calibration", [0, 1, 2, 3]))


# ---- files


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("backbone", [None, "b" * 64])
def test_a_record_comes_back_bit_for_bit(tmp_path, dtype, backbone):
    record = record_of(backbone=backbone, index=torch.tensor([9, 8, 7, 3, 2, 1]) if backbone else None)
    record.logits = record.logits.to(dtype)
    record.save(tmp_path / "deep" / "folder")
    loaded = ExitRecord.load(str(tmp_path / "deep" / "folder"))
    assert torch.equal(loaded.logits, record.logits) and loaded.logits.dtype == dtype
    assert torch.equal(loaded.labels, record.labels) and loaded.labels.dtype == torch.int64
    assert loaded.costs == COSTS and loaded.split == record.split and loaded.backbone == backbone
    assert loaded.index is None if backbone is None else torch.equal(loaded.index, record.index)


def test_a_record_is_safetensors_and_json(tmp_path):
    record = record_of()
    record.logits = record.logits.transpose(0, 1).contiguous().transpose(0, 1)  # not contiguous as such
    record.save(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["record.json", "record.safetensors"]
    tensors = load_file(tmp_path / "record.safetensors")
    assert torch.equal(tensors["logits"], record.logits) and torch.equal(tensors["labels"], record.labels)
    described = json.loads((tmp_path / "record.json").read_text())
    assert described["costs"]["backbone"] == [40, 100, 200] and described["split"]["sha256"] == "f" * 64
    record_of(5, seed=1).save(tmp_path)
    assert len(ExitRecord.load(tmp_path).labels) == 5


def test_a_broken_folder_is_refused(tmp_path):
    def breaks(change):
        record_of().save(tmp_path)
        change()
        with pytest.raises(ValueError, match=f"^Expected an ExitRecord in '{tmp_path}', but it cannot be read: "):
            ExitRecord.load(tmp_path)

    table, answers = tmp_path / "record.json", tmp_path / "record.safetensors"

    def edit(change):
        content = json.loads(table.read_text())
        change(content)
        table.write_text(json.dumps(content))

    def answer(**changed):
        save_file({"logits": record_of().logits, "labels": record_of().labels} | changed, answers)

    breaks(table.unlink)
    breaks(answers.unlink)
    breaks(lambda: table.write_text(table.read_text()[:50]))
    breaks(lambda: answers.write_bytes(answers.read_bytes()[:-8]))
    breaks(lambda: answers.write_bytes(b""))
    breaks(lambda: edit(lambda content: content.pop("costs")))
    breaks(lambda: edit(lambda content: content.pop("backbone")))
    breaks(lambda: edit(lambda content: content["split"].pop("role")))
    breaks(lambda: edit(lambda content: content["costs"].update(gates=[1, 2])))
    breaks(lambda: edit(lambda content: content["costs"].update({name: [1, 2] for name in content["costs"]})))
    breaks(lambda: answer(labels=torch.arange(5)))
    breaks(lambda: answer(logits=torch.full((6, 3, 4), math.nan)))
    with pytest.raises(ValueError, match="Expected an ExitRecord in '.*nowhere'"):
        ExitRecord.load(tmp_path / "nowhere")
