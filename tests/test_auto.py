"""Auto classes, pipelines and prediction sets of a saved model."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys

import pytest
import torch
from transformers import AutoConfig, AutoImageProcessor, AutoModelForImageClassification, pipeline

from jeidnn_hf import (
    EarlyExitImageClassificationPipeline,
    JEIDNNConfig,
    JEIDNNForImageClassification,
    JEIDNNImageProcessor,
    OperatingPoint,
)
from jeidnn_hf.conformal import ConformalScore
from small_models import NAMES, operating_point, pictures, pixels, record, small_model

COUNT = 30


@pytest.fixture(scope="module")
def model():
    model = small_model()
    model.operating_point = operating_point(model)
    return model


@pytest.fixture(scope="module")
def folder(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    model.save_pretrained(folder)
    return str(folder)


@pytest.fixture
def values(model):
    return pixels(model, COUNT, seed=7)


@pytest.fixture
def everything(model, values):
    with torch.no_grad():
        return model(values, output_all_exits=True)


# ---- registration

REGISTERED = """
from transformers import AutoConfig, AutoImageProcessor, AutoModelForImageClassification, pipeline
from transformers.pipelines import PIPELINE_REGISTRY
from jeidnn_hf import JEIDNNConfig, JEIDNNForImageClassification, JEIDNNImageProcessor
assert type(AutoConfig.for_model("jeidnn")) is JEIDNNConfig
assert AutoModelForImageClassification._model_mapping[JEIDNNConfig] is JEIDNNForImageClassification
from transformers.models.auto.image_processing_auto import IMAGE_PROCESSOR_MAPPING
assert JEIDNNImageProcessor in IMAGE_PROCESSOR_MAPPING[JEIDNNConfig].values()
assert "early-exit-image-classification" in PIPELINE_REGISTRY.get_supported_tasks()
"""


@pytest.mark.parametrize(
    "first",
    [
        "import jeidnn_hf; from transformers import Trainer",
        "from transformers import AutoConfig, pipeline; import jeidnn_hf",
        "from jeidnn_hf import EarlyExitImageClassificationPipeline",
    ],
)
def test_registered_in_whatever_order_things_are_imported(first):
    done = subprocess.run([sys.executable, "-c", first + REGISTERED], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


def test_the_import_alone_is_light():
    heavy = {"torch", "transformers", "timm", "numpy", "datasets"}
    code = f"import jeidnn_hf, sys; print(sorted({heavy} & sys.modules.keys()))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == "[]", done.stderr


# ---- Auto classes


def test_auto_classes_load_a_folder(model, folder, values, everything):
    config, loaded = AutoConfig.from_pretrained(folder), AutoModelForImageClassification.from_pretrained(folder)
    processor = AutoImageProcessor.from_pretrained(folder)
    assert (type(config), type(loaded)) == (JEIDNNConfig, JEIDNNForImageClassification)
    assert type(processor) is JEIDNNImageProcessor and config.id2label == dict(enumerate(NAMES))
    assert torch.equal(processor(pictures(COUNT, seed=7))["pixel_values"], values)
    with torch.no_grad():
        again = loaded(values, output_all_exits=True)
    assert torch.equal(again.all_logits, everything.all_logits) and torch.equal(again.exit_index, everything.exit_index)
    assert loaded.operating_point == model.operating_point


# ---- pipelines


def test_image_classification_is_the_softmax_at_the_exit_taken(folder, everything):
    answers = pipeline("image-classification", model=folder)(pictures(COUNT, seed=7), batch_size=8, top_k=len(NAMES))
    scores = torch.tensor([[{a["label"]: a["score"] for a in answer}[name] for name in NAMES] for answer in answers])
    torch.testing.assert_close(scores, everything.logits.softmax(-1), rtol=0, atol=1e-5)


def test_a_batch_really_exits_early(folder, everything, monkeypatch):
    classify = pipeline("early-exit-image-classification", model=folder)
    rows, stage = {}, classify.model.backbone.stage

    def counted(l, state):
        rows[l] = rows.get(l, 0) + len(state)
        return stage(l, state)

    monkeypatch.setattr(classify.model.backbone, "stage", counted)
    classify(pictures(COUNT, seed=7), batch_size=10)
    exits = everything.exit_index
    assert rows == {l: int((exits >= l).sum()) for l in range(int(exits.max()) + 1)}
    assert rows[0] == COUNT > rows[1] > rows[2] > 0


@pytest.mark.parametrize("batch_size", [1, 10])
def test_the_pipeline_tells_exit_cost_and_set(model, folder, everything, batch_size):
    classify = pipeline("early-exit-image-classification", model=folder, alpha=0.1, method="general")
    assert type(classify) is EarlyExitImageClassificationPipeline
    point, exits = model.operating_point, everything.exit_index
    assert len(exits.unique()) >= 3
    probs = point.probabilities(everything.all_logits)
    sets = point.prediction_sets(probs, exits, 0.1, "general")
    assert 1 < float(sets.sum(1).double().mean()) < len(NAMES)
    answers = classify(pictures(COUNT, seed=7), batch_size=batch_size, top_k=3)
    for i, (answer, l) in enumerate(zip(answers, exits.tolist(), strict=True)):
        ranked = probs[i, l].argsort(descending=True).tolist()
        assert answer["exit"] == l + 1
        assert answer["mul_adds"] == model.costs.total[l]
        assert answer["normalised_mul_adds"] == pytest.approx(model.costs.normalised[l])
        assert [p["label"] for p in answer["predictions"]] == [NAMES[k] for k in ranked[:3]]
        assert [p["score"] for p in answer["predictions"]] == pytest.approx(probs[i, l, ranked[:3]].tolist(), abs=1e-5)
        assert answer["prediction_set"] == [NAMES[k] for k in ranked if sets[i, k]]


def test_without_alpha_there_is_no_set(folder):
    classify = pipeline("early-exit-image-classification", model=folder)
    answer = classify(pictures(1)[0])
    assert answer.keys() == {"predictions", "exit", "mul_adds", "normalised_mul_adds"}
    assert len(answer["predictions"]) == 5 and sum(p["score"] for p in answer["predictions"]) == pytest.approx(1)
    assert "prediction_set" in classify(pictures(1)[0], alpha=0.05)


# ---- prediction sets


@pytest.mark.parametrize("alpha", [0.05, 0.1])
@pytest.mark.parametrize("method", ["grouped", "strict"])
def test_predict_sets_are_those_of_the_operating_point(model, folder, values, everything, alpha, method):
    loaded = AutoModelForImageClassification.from_pretrained(folder)
    found = loaded.predict_sets(values, alpha=alpha, method=method)
    point, probs = model.operating_point, model.operating_point.probabilities(everything.all_logits)
    assert torch.equal(found.sets, point.prediction_sets(probs, everything.exit_index, alpha, method))
    assert found.sets.shape == (COUNT, len(NAMES)) and found.sets.dtype is torch.bool
    taken = probs[torch.arange(COUNT), everything.exit_index]
    torch.testing.assert_close(found.probabilities, taken, rtol=0, atol=1e-5)
    assert torch.equal(found.exit_index, everything.exit_index) and torch.equal(found.mul_adds, everything.mul_adds)


def test_randomised_scores_draw_anew_for_each_image(values):
    model = small_model()
    model.operating_point = operating_point(model, ConformalScore("aps"))
    same_image = values[:1].expand(COUNT, -1, -1, -1)
    torch.manual_seed(3)
    first = model.predict_sets(same_image, alpha=0.1).sets
    second = model.predict_sets(same_image, alpha=0.1).sets
    assert len(first.unique(dim=0)) > 1 and not torch.equal(first, second)
    torch.manual_seed(3)
    assert torch.equal(model.predict_sets(same_image, alpha=0.1).sets, first)
    model.operating_point = operating_point(model, ConformalScore("aps", seed=None))
    assert len(model.predict_sets(same_image, alpha=0.1).sets.unique(dim=0)) == 1


def test_sets_are_refused_where_they_would_not_hold(model, values):
    plain = small_model()
    with pytest.raises(ValueError, match="^Expected an operating point, but got None"):
        plain.predict_sets(values)
    with pytest.raises(ValueError, match=r"^Expected a calibrated alpha among \[0.01, 0.05, 0.1\], but got 0.2"):
        model.predict_sets(values, alpha=0.2)
    with pytest.raises(ValueError, match="^Expected a calibrated method among"):
        model.predict_sets(values, method="mondrian")


def test_an_operating_point_holds_at_its_lambda(values):
    torch.manual_seed(0)
    options = {"recipe": "default", "image_size": 32, "num_labels": len(NAMES), "exit_stages": [0, 2, 5]}
    model = JEIDNNForImageClassification(JEIDNNConfig(backbone="test_vit", native_head=False, **options)).eval()
    model.set_lambda(0.3)
    model.operating_point = operating_point(model)
    assert model.predict_sets(values).sets.shape == (COUNT, len(NAMES))
    model.set_lambda(1.0)
    with pytest.raises(ValueError, match="^Expected the lambda of the operating point, 0.3, but got 1; set_lambda to"):
        model.predict_sets(values)
    model.operating_point = dataclasses.replace(model.operating_point, lam=None)
    with pytest.raises(ValueError, match="^Expected the lambda of the operating point, None, but got 1"):
        model.predict_sets(values)
    with torch.no_grad():
        output = model(values)
    probs = model.operating_point.probabilities(model(values, output_all_exits=True).all_logits)
    taken = probs[torch.arange(COUNT), output.exit_index]
    torch.testing.assert_close(model.probabilities(output), taken, rtol=0, atol=1e-5)


def test_an_operating_point_of_another_network_is_refused(model, folder, tmp_path):
    point, own = model.operating_point, small_model(exit_stages=[0, 5])
    with pytest.raises(ValueError, match="^Expected an operating point of 2 exits, but got one of "):
        own.operating_point = point
    own.config.backbone_fingerprint = "a" * 64
    with pytest.raises(ValueError, match="^Expected an operating point of the backbone a{12}, but got one of b{12};"):
        own.operating_point = dataclasses.replace(operating_point(own), backbone="b" * 64)
    assert own.operating_point is None
    small_model().save_pretrained(tmp_path)
    assert JEIDNNForImageClassification.from_pretrained(tmp_path).operating_point is None
    (tmp_path / "calibration.json").write_text("{", encoding="utf-8")
    with pytest.raises(ValueError, match="^Expected an operating point at .*calibration.json"):
        AutoModelForImageClassification.from_pretrained(tmp_path)


def test_uncalibrated_probabilities_are_the_softmax(values):
    model = small_model()
    with torch.no_grad():
        output = model(values)
    torch.testing.assert_close(model.probabilities(output), output.logits.softmax(-1))
    model.operating_point = OperatingPoint.fit(model.policy, record(model, "validation", 1), lam=1.0, min_group=10)
    with pytest.raises(ValueError, match="^Expected a calibrated method among"):
        model.predict_sets(values)
    assert not torch.allclose(model.probabilities(output), output.logits.softmax(-1), atol=1e-3)


def test_the_file_beside_the_weights_is_the_operating_point(model, folder):
    assert OperatingPoint.load(folder) == model.operating_point
    saved = json.loads(open(f"{folder}/preprocessor_config.json", encoding="utf-8").read())
    assert saved.pop("image_processor_type") == "JEIDNNImageProcessor" and saved == model.config.preprocessing
