"""splits.py: roles are disjoint, stratified, reproducible; what is saved comes back, and tampering is refused."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jeidnn_hf.splits import ROLES, SplitInfo, Splits, class_groups, make_splits


def balanced(train=1000, test=600, classes=10):
    return {"train": np.arange(train) % classes, "test": np.arange(test) % classes}


@st.composite
def uneven_labels(draw):
    counts = draw(st.lists(st.integers(5, 12), min_size=2, max_size=6))
    labels = np.random.default_rng(draw(st.integers(0, 99))).permutation(np.repeat(np.arange(len(counts)), counts))
    validation = draw(st.integers(len(labels) // 3 + 1, len(labels) // 2))
    return labels, validation, draw(st.integers(0, len(labels) // 6))


@settings(max_examples=60, deadline=None, database=None)
@given(uneven_labels(), st.sampled_from(["train", "test"]), st.integers(0, 2**40))
def test_roles_are_disjoint_exact_stratified_and_reproducible(drawn, held_out, seed):
    labels, validation, calibration = drawn
    options = {"held_out": held_out, "validation": validation, "calibration": calibration, "seed": seed}
    splits = make_splits("toy", {"train": labels, "test": labels}, **options)
    assert tuple(splits.roles) == ROLES
    held = [rows for source, rows in splits.roles.values() if source == held_out]
    assert sorted(np.concatenate(held).tolist()) == list(range(len(labels)))
    whole = splits.roles["test" if held_out == "train" else "train"]
    assert whole[0] != held_out and whole[1].tolist() == list(range(len(labels)))
    left = labels
    for role, size in (("validation", validation), ("calibration", calibration)):
        source, rows = splits.roles[role]
        assert source == held_out and rows.dtype == np.int64 and len(rows) == size
        share = size * np.bincount(left) / len(left)
        assert (np.abs(np.bincount(labels[rows], minlength=len(share)) - share) < 1).all()
        left = np.repeat(np.arange(len(share)), np.bincount(left) - np.bincount(labels[rows], minlength=len(share)))
    again = make_splits("toy", {"train": labels.tolist(), "test": labels}, **options)
    assert all(again.info(role) == splits.info(role) for role in ROLES)


def test_seed_and_data_set_are_part_of_the_identity_and_the_draw_is_pinned():
    splits = [make_splits("cifar10", balanced(), validation=100, calibration=100, seed=seed) for seed in (0, 0, 1)]
    hashes = [split.info("validation").sha256 for split in splits]
    assert hashes[0] == hashes[1] != hashes[2]
    assert hashes[0] == "7c74d3c1fc82f6e7586ae4c9448aed4efd2a1eb488bec5ebd73ac6006bcd1806"
    assert Splits("cifar100", 0, splits[0].roles).info("validation").sha256 != hashes[0]
    info = splits[0].info("validation")
    assert (info.dataset, info.role, info.source, info.size) == ("cifar10", "validation", "train", 100)
    assert SplitInfo.from_dict(json.loads(json.dumps(info.to_dict()))) == info
    assert splits[0].info("test").size == 600 and splits[0].info("train").size == 800


def test_caps_are_stratified_and_move_no_other_role():
    full = make_splits("cifar10", balanced(), held_out="test", validation=100, calibration=50)
    capped = make_splits("cifar10", balanced(), held_out="test", validation=100, calibration=50, train=55, test=30)
    for role in ("validation", "calibration"):
        assert capped.info(role) == full.info(role)
    assert capped.info("train").size == 55 and capped.info("test").size == 30 and full.info("test").size == 450
    assert np.bincount(balanced()["train"][capped.roles["train"][1]]).tolist() == [6] * 5 + [5] * 5
    assert set(capped.roles["test"][1]) <= set(full.roles["test"][1])


@settings(max_examples=40, deadline=None, database=None)
@given(uneven_labels(), st.floats(1.0, 5.0), st.integers(0, 99))
def test_a_long_tail_is_of_the_training_images_only(drawn, imbalance, seed):
    labels, validation, calibration = drawn
    options = {"held_out": "test", "validation": validation, "calibration": calibration, "seed": seed}
    sources = {"train": labels, "test": labels}
    splits, whole = make_splits("toy", sources, **options, imbalance=imbalance), make_splits("toy", sources, **options)
    assert all(splits.info(role) == whole.info(role) for role in ("validation", "calibration", "test"))
    classes, most = labels.max() + 1, np.bincount(labels).min()
    counts = np.bincount(labels[splits.roles["train"][1]], minlength=classes)
    if imbalance == 1:
        assert splits.info("train") == whole.info("train")
    else:
        for c, count in enumerate(counts):
            assert count <= most * imbalance ** (-c / (classes - 1)) + 1e-6 < count + 1 + 1e-5


def test_test_images_come_from_train_where_there_are_no_others():
    labels = {"train": np.arange(1000) % 10}
    splits = make_splits("toy", labels, validation=100, calibration=50, test=200, train=400, imbalance=4)
    used = np.concatenate([rows for _, rows in splits.roles.values()])
    assert {source for source, _ in splits.roles.values()} == {"train"} and len(np.unique(used)) == len(used)
    assert np.bincount(labels["train"][splits.roles["test"][1]]).tolist() == [20] * 10
    assert np.bincount(labels["train"][splits.roles["train"][1]]).tolist() == [40, 34, 29, 25, 21, 18, 15, 13, 11, 10]


def test_class_groups():
    groups = class_groups([500, 101, 100, 20, 19, 1, 60])
    assert {name: classes.tolist() for name, classes in groups.items()} == {
        "many": [0, 1], "medium": [2, 3, 6], "few": [4, 5]
    }  # fmt: skip
    counts = [int(500 * 100 ** (-c / 99)) for c in range(100)]  # CIFAR-100-LT: 35 / 35 / 30 in the literature
    assert [len(classes) for classes in class_groups(counts).values()] == [35, 35, 30]


def test_split_errors():
    for imbalance in (0.5, float("nan")):
        with pytest.raises(ValueError, match="imbalance factor of at least 1"):
            make_splits("cifar10", balanced(), validation=100, calibration=0, imbalance=imbalance)
    with pytest.raises(ValueError, match="among 118 images for train, but got none of class 8"):
        make_splits("cifar10", balanced(), validation=500, calibration=0, imbalance=100)
    with pytest.raises(ValueError, match="held_out='train', but got \\['train', 'validation'\\]"):
        make_splits("cifar10", {"train": [0], "validation": [0]})
    with pytest.raises(ValueError, match="held_out"):
        make_splits("cifar10", balanced(), held_out="validation")
    with pytest.raises(ValueError, match=r"calibration in \[0, 500\], what is left of 'train', but got 501"):
        make_splits("cifar10", balanced(), validation=500, calibration=501)
    with pytest.raises(ValueError, match="for validation, but got none of class 7"):
        make_splits("cifar10", balanced(), validation=7, calibration=0)
    with pytest.raises(ValueError, match="for train, but got none of class 0"):
        make_splits("cifar10", balanced(), validation=500, calibration=500)
    with pytest.raises(ValueError, match="for validation, but got none of class 9"):
        make_splits("cifar10", balanced(classes=9), validation=100, calibration=0, num_classes=10)
    with pytest.raises(ValueError, match=r"\[0, 10\), but got 10 at row 10 of split 'train' of cifar10"):
        make_splits("cifar10", balanced(classes=11), num_classes=10)
    with pytest.raises(ValueError, match="got row 3 of 'train' twice"):
        Splits("cifar10", 0, {"train": ("train", np.arange(5)), "validation": ("train", np.array([3]))})
    with pytest.raises(ValueError, match=r"got \['dev'\]"):
        Splits("cifar10", 0, {"dev": ("train", np.arange(5))})


def test_saved_splits_come_back_and_tampering_is_refused(tmp_path):
    path = tmp_path / "splits.json"
    splits = make_splits("cifar10", balanced(), validation=100, calibration=100, seed=3)
    splits.save(path)
    loaded = Splits.load(path)
    assert (loaded.dataset, loaded.seed, list(loaded.roles)) == ("cifar10", 3, list(splits.roles))
    for role, (source, rows) in splits.roles.items():
        assert loaded.roles[role][0] == source and np.array_equal(loaded.roles[role][1], rows)

    def tampered(change):
        content = json.loads(path.read_text())
        change(content)
        other = tmp_path / "tampered.json"
        other.write_text(json.dumps(content))
        return other

    def move(content):
        rows = content["roles"]
        rows["validation"]["indices"][0], rows["train"]["indices"][0] = (
            rows["train"]["indices"][0],
            rows["validation"]["indices"][0],
        )

    def swap(content):
        roles = content["roles"]
        roles["validation"], roles["calibration"] = roles["calibration"], roles["validation"]

    with pytest.raises(ValueError, match=r"sha256 of \['train', 'validation'\]"):
        Splits.load(tampered(move))
    for change in (swap, lambda x: x.update(seed=4), lambda x: x.update(dataset="cifar100"), lambda x: x.pop("sha256")):
        with pytest.raises(ValueError, match="does not match"):
            Splits.load(tampered(change))
    for change in (lambda x: x.pop("roles"), lambda x: x["roles"]["test"].pop("indices")):
        with pytest.raises(ValueError, match="Expected splits as saved"):
            Splits.load(tampered(change))
    (tmp_path / "broken.json").write_text(path.read_text()[:100])
    with pytest.raises(ValueError, match="Expected splits as saved"):
        Splits.load(tmp_path / "broken.json")
