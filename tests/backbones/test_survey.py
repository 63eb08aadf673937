"""Which of timm's modules can be cut is frozen in surveyed_modules.json, so that a release that breaks one is seen."""

import json
import os
from pathlib import Path

import pytest
import timm

from jeidnn_hf.backbones.survey import survey, survey_model

FROZEN = json.loads((Path(__file__).parent / "surveyed_modules.json").read_text())
SAMPLE = ["resnet", "vision_transformer", "convnext", "regnet", "densenet", "ghostnet", "mambaout", "rexnet", "hrnet"]


@pytest.mark.parametrize("module", SAMPLE)
def test_a_module_is_cut_as_it_was(module):
    row = survey_model(module, FROZEN[module]["model"])
    assert {"model": row.model, "kind": row.kind, "exits": row.exits} == FROZEN[module]
    assert (row.reason is None) == (row.exits > 0)


def test_most_of_timm_can_be_cut_and_every_module_was_tried():
    assert set(FROZEN) <= set(timm.list_modules())  # other tests may register more
    assert sum(row["exits"] > 0 for row in FROZEN.values()) >= 95


@pytest.mark.slow
@pytest.mark.skipif(not os.environ.get("JEIDNN_SLOW"), reason="minutes; set JEIDNN_SLOW=1")
def test_every_module_is_cut_as_it_was():
    found = {row.module: {"model": row.model, "kind": row.kind, "exits": row.exits} for row in survey()}
    assert found == FROZEN


def test_an_unknown_module():
    with pytest.raises(ValueError, match="Expected modules of timm, .* but got"):
        list(survey(["no_such_module"]))
