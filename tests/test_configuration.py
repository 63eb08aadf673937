"""JEIDNNConfig: recipes, checks, and its way through JSON."""

from __future__ import annotations

import json
import math

import pytest

from jeidnn_hf import JEIDNNConfig
from jeidnn_hf.configuration_jeidnn import FORMAT_VERSION, RECIPES, check_lam

RECIPE_FIELDS = {
    "paper": ("plain", "linear", False, False, "linear", "min", "cross_entropy", 1.0),
    "default": ("rich", "recurrent", True, True, "shared", "stick", "error", [0.003, 3.0]),
}
FIELDS = (
    "exit_pooling", "exit_head", "ensemble", "standardize_features", "gate", "gate_form", "task_cost", "lam",
)  # fmt: skip


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_fills_what_is_left_open(recipe):
    config = JEIDNNConfig(recipe=recipe)
    assert tuple(getattr(config, field) for field in FIELDS) == RECIPE_FIELDS[recipe]
    assert (config.exit_rule, config.exit_threshold, config.native_head) == ("conditional", 0.5, True)


def test_the_recipe_is_default_unless_said():
    assert JEIDNNConfig().recipe == "default"
    assert JEIDNNConfig().to_dict() == JEIDNNConfig(recipe="default").to_dict()


def test_a_recipe_leaves_what_was_said():
    config = JEIDNNConfig(recipe="default", ensemble=False, exit_head="mlp", lam=0.0, exit_pooling=["avg1"])
    assert (config.ensemble, config.exit_head, config.lam, config.exit_pooling) == (False, "mlp", 0.0, ["avg1"])
    assert (config.gate, config.gate_form, config.standardize_features) == ("shared", "stick", True)
    config = JEIDNNConfig(recipe="paper", ensemble=True, gate_form="cumulative")
    assert (config.ensemble, config.gate_form, config.exit_head) == (True, "cumulative", "linear")


def test_recipes_do_not_share_their_lists():
    config = JEIDNNConfig()
    config.lam[0] = 1.0
    assert JEIDNNConfig().lam == [0.003, 3.0] == RECIPES["default"]["lam"]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"recipe": "paper"},
        {"recipe": "paper", "lam": 0, "num_labels": 7},
        {"lam": (0.1, 2), "current_lam": 0.5, "id2label": {0: "cat", 1: "dog", 2: "eel"}},
        {
            "backbone": "test_vit",
            "backbone_weights": "w.safetensors",
            "backbone_fingerprint": "ab" * 32,
            "save_backbone": True,
            "image_size": 32,
            "num_channels": 1,
            "native_head": False,
            "exit_stages": [1, 5],
            "exit_pooling": [["cls", "avg2"]],
            "head_dim": 9,
            "ensemble": False,
            "cascade": True,
            "boosting": 0.5,
            "exit_rule": "median",
            "exit_threshold": 0.25,
            "mul_adds": {"backbone": [10, 20], "pooling": [0, 0], "heads": [1, 1], "gates": [2, 2]},
        },
    ],
)
def test_round_trip_through_json(options, tmp_path):
    config = JEIDNNConfig(**options)
    config.save_pretrained(tmp_path)
    again = JEIDNNConfig.from_pretrained(tmp_path)
    assert again.to_dict() == config.to_dict() and type(again) is JEIDNNConfig
    raw = json.loads((tmp_path / "config.json").read_text())
    assert raw["model_type"] == "jeidnn" and raw["format_version"] == FORMAT_VERSION == 2
    for field, value in options.items():
        if field not in ("id2label", "num_labels", "lam"):
            assert getattr(again, field) == value == raw[field]
    assert again.num_labels == config.num_labels and again.id2label == config.id2label
    assert again.lam == config.lam and again.current_lam == config.current_lam


def test_the_file_says_what_the_recipe_meant_then(tmp_path, monkeypatch):
    """A later change of a recipe does not change a saved model."""
    JEIDNNConfig(recipe="paper").save_pretrained(tmp_path)
    monkeypatch.setitem(RECIPES["paper"], "exit_head", "mlp")
    assert JEIDNNConfig(recipe="paper").exit_head == "mlp"
    assert JEIDNNConfig.from_pretrained(tmp_path).exit_head == "linear"


def test_exits_of_before_the_default_recipe_boosted_them_are_not(tmp_path):
    JEIDNNConfig().save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"format_version": 1, "boosting": None}))
    old = JEIDNNConfig.from_pretrained(tmp_path)
    assert (old.boosting, old.format_version, JEIDNNConfig().boosting) == (0.0, 2, "auto")


@pytest.mark.parametrize("version", [FORMAT_VERSION + 1, 99, "2", None, 1.5])
def test_a_newer_format_is_refused(tmp_path, version):
    JEIDNNConfig().save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"format_version": version}))
    with pytest.raises(ValueError, match=rf"^Expected a config of format 2 or older, but got {version!r}; update "):
        JEIDNNConfig.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"recipe": "papers"}, r"^Expected recipe to be one of \('paper', 'default'\), but got 'papers'\.$"),
        ({"exit_head": "conv"}, r"^Expected exit_head to be one of \('linear', .*'recurrent'\), but got 'conv'\.$"),
        ({"gate": "deep"}, r"^Expected gate to be one of \('linear', 'shared'\), but got 'deep'\.$"),
        ({"gate_form": "max"}, r"^Expected gate_form to be one of \('min', 'cumulative', 'stick'\), but got 'max'\.$"),
        ({"exit_rule": "mean"}, r"^Expected exit_rule to be one of \('conditional', .*'sample'\), but got 'mean'\.$"),
        ({"task_cost": "hinge"}, r"^Expected task_cost to be one of \('cross_.*'brier'\), but got 'hinge'\.$"),
        ({"head_dim": 0}, r"^Expected head_dim to be a positive integer, but got 0\.$"),
        ({"head_dim": 2.0}, r"^Expected head_dim to be a positive integer, but got 2\.0\.$"),
        ({"num_channels": -1}, r"^Expected num_channels to be a positive integer, but got -1\.$"),
        ({"image_size": 0}, r"^Expected image_size to be a positive integer, but got 0\.$"),
        ({"image_size": "32"}, r"^Expected image_size to be a positive integer, but got '32'\.$"),
        ({"image_size": (32, 32)}, r"^Expected image_size to be a positive integer, but got \(32, 32\)\.$"),
        ({"exit_threshold": 1.0}, r"^Expected exit_threshold in \[0, 1\), but got 1\.0\.$"),
        ({"exit_threshold": -0.1}, r"^Expected exit_threshold in \[0, 1\), but got -0\.1\.$"),
        ({"exit_threshold": math.nan}, r"^Expected exit_threshold in \[0, 1\), but got nan\.$"),
        ({"exit_threshold": "0.5"}, r"^Expected exit_threshold in \[0, 1\), but got '0\.5'\.$"),
        ({"num_labels": 1}, r"^Expected num_labels of at least 2, but got 1\.$"),
        ({"num_labels": 0}, r"^Expected num_labels of at least 2, but got 0\.$"),
        ({"id2label": {0: "cat"}}, r"^Expected num_labels of at least 2, but got 1\.$"),
        ({"problem_type": "ranking"}, r"^Expected problem_type to be one of \(.*'regression'\), but got 'ranking'\.$"),
        (
            {"problem_type": "regression"},
            r"^Expected ensemble=False for problem_type='regression', but got ensemble=True; it combines ",
        ),
        (
            {"problem_type": "regression", "recipe": "paper", "num_labels": 0},
            r"^Expected num_labels of at least 1, but got 0\.$",
        ),
        *(
            ({"boosting": value}, rf"^Expected boosting in \[0, 1\], or 'auto', but got {value!r}\.$")
            for value in (-0.1, 1.5, math.nan, "0.5")
        ),
        ({"boosting": True}, r"^Expected boosting to be float \| str \| None, but got True\.$"),
        ({"cascade": 1}, r"^Expected cascade to be bool, but got 1\.$"),
        (
            {"problem_type": "regression", "recipe": "paper", "num_labels": 1, "cascade": True},
            r"^Expected cascade=False for num_labels=1, but got cascade=True; it normalises",
        ),
        (
            {"num_labels": 3, "id2label": {0: "cat", 1: "dog"}},
            r"^Expected as many id2label entries as num_labels=3, but got 2\.$",
        ),
    ],
)
def test_mistakes_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        JEIDNNConfig(**options)


@pytest.mark.parametrize("num_labels", [2.5, "10"])
def test_num_labels_must_be_an_integer(num_labels):
    with pytest.raises(ValueError, match="Expected num_labels"):
        JEIDNNConfig(num_labels=num_labels)


def test_labels():
    assert JEIDNNConfig(num_labels=10).num_labels == 10
    config = JEIDNNConfig(num_labels=2, id2label={0: "cat", 1: "dog"})
    assert config.num_labels == 2 and config.id2label == {0: "cat", 1: "dog"}
    assert JEIDNNConfig(id2label={0: "a", 1: "b", 2: "c"}).num_labels == 3


def test_problem_types():
    assert JEIDNNConfig().has_classes and JEIDNNConfig(problem_type="single_label_classification").has_classes
    for problem_type in ("regression", "multi_label_classification"):
        config = JEIDNNConfig(recipe="paper", problem_type=problem_type, num_labels=1)
        assert config.num_labels == 1 and not config.has_classes
        assert not JEIDNNConfig(problem_type=problem_type, ensemble=False).has_classes


@pytest.mark.parametrize(
    ("given", "names"),
    [
        ({}, ["cat", "dog"]),
        ({"num_labels": 2}, ["cat", "dog"]),
        ({"num_labels": 3}, ["LABEL_0", "LABEL_1", "LABEL_2"]),
        ({"id2label": {0: "x", 1: "y", 2: "z"}}, ["x", "y", "z"]),
        ({"id2label": {0: "x", 1: "y", 2: "z"}, "num_labels": 3}, ["x", "y", "z"]),
    ],
)
def test_labels_given_anew_replace_those_of_the_file(given, names, tmp_path):
    JEIDNNConfig(id2label={0: "cat", 1: "dog"}).save_pretrained(tmp_path)
    config = JEIDNNConfig.from_pretrained(tmp_path, **given)
    assert config.id2label == dict(enumerate(names)) and config.num_labels == len(names)
    if given.keys() - {"num_labels"} or len(names) == 3:
        assert config.label2id == {name: i for i, name in enumerate(names)}
    if "id2label" in given:
        with pytest.raises(ValueError, match=r"^Expected as many id2label entries as num_labels=4, but got 3\.$"):
            JEIDNNConfig.from_pretrained(tmp_path, **given | {"num_labels": 4})


# Lambda


@pytest.mark.parametrize("lam", [-1, -1e-9, math.nan, math.inf, -math.inf, True, False, "1", None, [True, 2], [1, "2"]])
def test_lambda_must_be_a_finite_number_and_not_negative(lam):
    with pytest.raises(ValueError, match=r"^Expected lambda to be finite and not negative, but got .*\.$"):
        check_lam(lam)
    if lam is not None:
        with pytest.raises(ValueError, match=r"^Expected lambda to be finite and not negative, but got .*\.$"):
            JEIDNNConfig(lam=lam)


@pytest.mark.parametrize("lam", [[3.0, 0.003], [1, 1], [0, 1], [1], [], [0.1, 1, 2], [math.nan, 1], [0.1, math.inf]])
def test_a_range_must_rise_from_above_zero(lam):
    with pytest.raises(ValueError, match=r"^Expected (a range of lambdas \[low, high\] with 0 < low < high|lambda)"):
        JEIDNNConfig(lam=lam)


def test_a_range_needs_gates_that_take_lambda():
    message = r"^Expected gate='shared' for a range of lambdas \[0\.1, 1\.0\], but got gate='linear'\.$"
    with pytest.raises(ValueError, match=message):
        JEIDNNConfig(recipe="paper", lam=[0.1, 1.0])
    config = JEIDNNConfig(recipe="paper", lam=[0.1, 1.0], gate="shared")
    assert config.has_lam_range and config.lam_range == (0.1, 1.0)
    assert JEIDNNConfig(gate="linear", lam=2).lam == 2.0


@pytest.mark.parametrize("lam", [0, 1, 2.5, 1e-12, 1e6])
def test_one_lambda_is_a_float_and_the_one_in_use(lam):
    config = JEIDNNConfig(lam=lam)
    assert type(config.lam) is float and config.lam == config.current_lam == lam
    assert not config.has_lam_range and config.lam_range == ((lam or 1.0),) * 2


@pytest.mark.parametrize("lam", [[1, 100], (0.5, 2), [1e-3, 10.0], [0.003, 3.0]])
def test_a_range_starts_at_its_middle_in_logarithm(lam):
    config = JEIDNNConfig(lam=lam)
    assert config.lam == [float(lam[0]), float(lam[1])] and config.has_lam_range
    assert math.log(config.current_lam) == pytest.approx((math.log(lam[0]) + math.log(lam[1])) / 2)


def test_the_lambda_in_use_lies_in_the_range():
    for lam in (0.1, 0.5, 2, 2 * (1 + 1e-7), 0.1 * (1 - 1e-7)):
        assert JEIDNNConfig(lam=[0.1, 2], current_lam=lam).current_lam == lam
    for lam in (0.0999, 2.001, 0):
        with pytest.raises(ValueError, match=rf"^Expected a lambda in \[0\.1, 2\], but got {lam:g}\.$"):
            JEIDNNConfig(lam=[0.1, 2], current_lam=lam)
    with pytest.raises(ValueError, match=r"^Expected a lambda of 1, the only one trained, but got 2\.$"):
        JEIDNNConfig(lam=1, current_lam=2)
    with pytest.raises(ValueError, match=r"^Expected one lambda, but got the range \[0\.2, 1\.0\]\.$"):
        JEIDNNConfig(lam=[0.1, 2], current_lam=[0.2, 1])
    with pytest.raises(ValueError, match=r"^Expected lambda to be finite and not negative, but got nan\.$"):
        JEIDNNConfig(lam=[0.1, 2], current_lam=math.nan)
