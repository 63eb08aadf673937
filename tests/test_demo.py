"""The demo from end to end, with little training: its table, its figure, and the models that it leaves behind."""

import numpy as np
import PIL.Image
import pytest
import torch

from jeidnn_hf import JEIDNNForImageClassification
from jeidnn_hf.demo import DEFAULT_LAMBDAS, PAPER_LAMBDAS, PREPROCESSING, load_digits, run_demo
from jeidnn_hf.splits import Splits


def test_the_demo_prints_a_frontier_for_both_recipes_and_its_models_load(tmp_path, capsys):
    rows = run_demo(tmp_path, epochs=2)
    printed = capsys.readouterr().out
    assert [row["recipe"] for row in rows] == ["frozen backbone", *["paper"] * 3, *["default"] * len(DEFAULT_LAMBDAS)]
    for row in rows[1:]:
        assert 0 <= row["accuracy"] <= 1 and 0 < row["mul_adds"] <= 1.2
        assert len(row["share_by_exit"]) == 6 and sum(row["share_by_exit"]) == pytest.approx(1)
        assert f"{100 * row['accuracy']:.2f}%" in printed
    figure = PIL.Image.open(tmp_path / "frontier.png")
    assert np.asarray(figure.convert("L")).std() > 5

    splits, sources = Splits.load(tmp_path / "splits.json"), load_digits()
    source, test = splits.roles["test"]
    pixels = PREPROCESSING([sources[source][int(row)]["image"] for row in test])
    labels = torch.tensor(sources[source]["label"])[torch.from_numpy(test)]
    for folder, row in ((f"paper-lam{PAPER_LAMBDAS[1]:g}", rows[2]), ("default", rows[-1])):
        model = JEIDNNForImageClassification.from_pretrained(tmp_path / folder)
        with torch.inference_mode():
            output = model(pixels, lam=row["lambda"])
        assert float((output.logits.argmax(-1) == labels).double().mean()) == pytest.approx(row["accuracy"], abs=0.005)
        spent = float(output.mul_adds.double().mean()) / model.costs.backbone[-1]
        assert spent == pytest.approx(row["mul_adds"], rel=0.02)


def test_digits_are_a_fixed_division():
    first, second = load_digits(), load_digits()
    assert {name: len(rows) for name, rows in first.items()} == {"train": 1000, "test": 797}
    assert first["train"]["label"] == second["train"]["label"]
    assert np.asarray(first["test"][0]["image"]).shape == (8, 8)
