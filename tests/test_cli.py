"""cli.py and commands/: cost tables, predictions, errors in one line, and help without waiting for torch."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from importlib.metadata import entry_points, version
from pathlib import Path

import PIL.Image
import pytest

import jeidnn_hf
from hub_server import LocalHub
from jeidnn_hf import JEIDNNForImageClassification
from jeidnn_hf.cli import COMMANDS, main
from jeidnn_hf.commands.doctor import package_rows
from jeidnn_hf.preprocessing import Preprocessing
from small_models import operating_point, pictures, small_model

TABLE_2 = [414.3, 538.2, 662.1, 786, 909.9, 1034, 1158]  # millions, as printed
TABLE_2_SHARES = [0.358, 0.465, 0.572, 0.679, 0.786, 0.893, 1.0]
TABLE_3 = [626.2, 947.7, 1269, None, 1912, 2233, 2555, 2876, 3198, 3519, 3841, 4162, 4483, 4805]  # the fourth is 1590.5
HEADER = ["exit", "backbone", "+ pooling", "+ heads", "+ gates", "total", "share"]


def rows_of(printed: str) -> list[list[float]]:
    return [[float(cell.replace(",", "")) for cell in line.split()] for line in printed.splitlines()[2:]]


def to_four_digits(count: float) -> float:
    return float(f"{count / 1e6:.4g}")


def test_costs_prints_table_2(capsys):
    assert main(["costs", "--backbone", "t2t_vit_7", "--num-classes", "10"]) == 0
    printed, errors = capsys.readouterr()
    assert errors == ""
    title, header, *_ = printed.splitlines()
    assert title.startswith("t2t_vit_7, 10 classes, 224 px") and "Mul-Adds" in title
    places = [header.index(name) for name in HEADER]
    assert places == sorted(places)
    rows = rows_of(printed)
    assert [row[0] for row in rows] == [1, 2, 3, 4, 5, 6, 7]
    assert [to_four_digits(row[1]) for row in rows] == TABLE_2
    assert [to_four_digits(row[5]) for row in rows] == TABLE_2
    assert [row[6] for row in rows] == pytest.approx(TABLE_2_SHARES, abs=1e-3)
    assert [row[3] for row in rows] == [2570 * min(l, 6) for l in range(1, 8)]
    assert [row[4] for row in rows] == [96 * min(l, 6) for l in range(1, 8)]
    assert all(row[2] == 0 and row[5] == row[1] + row[3] + row[4] for row in rows)


def test_costs_as_json_is_table_3(capsys):
    assert main(["costs", "--backbone", "t2t_vit_14", "--num-classes", "100", "--json"]) == 0
    printed, errors = capsys.readouterr()
    table = json.loads(printed)
    assert errors == "" and table["num_classes"] == 100
    columns = ["backbone", "pooling", "heads", "gates", "total", "normalised"]
    assert all(len(table[name]) == 14 for name in columns)
    counts = [(to_four_digits(count), cell) for count, cell in zip(table["backbone"], TABLE_3, strict=True) if cell]
    assert [found for found, _ in counts] == pytest.approx([cell for _, cell in counts], rel=2e-4)
    assert table["heads"] == [38500 * min(l, 13) for l in range(1, 15)]
    assert table["gates"] == [906 * min(l, 13) for l in range(1, 15)]
    parts = zip(*(table[name] for name in columns[:4]), strict=True)
    assert table["total"] == [sum(row) for row in parts] and table["pooling"] == [0] * 14
    assert table["normalised"] == pytest.approx([count / table["backbone"][-1] for count in table["total"]])
    assert [table["normalised"][l] for l in (0, 13)] == pytest.approx([0.1303, 1.0001], abs=1e-4)


def test_json_names_the_network_it_is_of(capsys):
    main(["costs", "--backbone", "resnet20_cifar", "--num-classes", "7", "--json"])
    table = json.loads(capsys.readouterr().out)
    assert "resnet20_cifar" in [value for value in table.values() if isinstance(value, str)]
    assert isinstance(table["backbone"], list)


def test_image_size_and_recipe_are_passed_on(capsys):
    small, large = ["--image-size", "32"], ["--image-size", "64"]
    tables = {}
    for name, options in {"32": small, "64": large, "rich": [*small, "--recipe", "default"]}.items():
        assert main(["costs", "--backbone", "resnet20_cifar", "--num-classes", "10", *options]) == 0
        tables[name] = rows_of(capsys.readouterr().out)
    assert len(tables["32"]) == len(tables["64"]) == len(tables["rich"]) == 9
    stem_and_block = 16 * (27 + 2) + 2 * 16 * (9 * 16 + 2)  # per pixel: convolutions, and 2 for a BatchNorm
    assert tables["32"][0][1] == 32 * 32 * stem_and_block and tables["64"][0][1] == 64 * 64 * stem_and_block
    assert tables["rich"][0][1] == tables["32"][0][1] and tables["rich"][-1][5] > tables["32"][-1][5]
    assert tables["rich"][0][2] == 2 * tables["32"][0][2] == 2 * 16 * 32 * 32  # avg4 and max2 against avg1


def assert_one_line(capsys, *parts: str, command: str = "costs") -> None:
    printed, errors = capsys.readouterr()
    assert printed == "" and errors.startswith(f"jeidnn {command}: Expected ") and errors.count("\n") == 1, errors
    assert "Traceback" not in errors and all(part in errors for part in parts)


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        (["--backbone", "vit_huge_of_mine"], ["'vit_huge_of_mine'", "names like it"]),
        (["--backbone", "squeezenet"], ["squeezenet"]),
        (["--backbone", "resnet20_cifar", "--recipe", "mine"], ["recipe", "'mine'"]),
        (["--backbone", "resnet20_cifar", "--num-classes", "1"], ["num_labels", "got 1"]),
        (["--backbone", "resnet20_cifar", "--image-size", "0"], ["image_size", "got 0"]),
        (["--backbone", "vit_tiny_patch16_224", "--image-size", "8"], ["image_size", "8 px"]),
    ],
)
def test_an_error_is_one_line_and_status_1(capsys, options, parts):
    assert main(["costs", "--num-classes", "10", *options]) == 1
    assert_one_line(capsys, *parts)


def test_an_error_of_several_lines_is_one_line_too(capsys, monkeypatch):
    def fails(**_):
        raise OSError("Expected a\n  connection\n")

    monkeypatch.setattr("jeidnn_hf.configuration_jeidnn.JEIDNNConfig", fails)
    assert main(["costs", "--backbone", "x", "--num-classes", "10"]) == 1
    assert capsys.readouterr().err == "jeidnn costs: Expected a connection\n"


def test_debug_shows_the_traceback(capsys):
    with pytest.raises(ValueError, match="timm model"):
        main(["costs", "--backbone", "nope", "--num-classes", "10", "--debug"])


@pytest.mark.parametrize(
    "arguments",
    [[], ["prices"], ["costs"], ["costs", "--backbone", "x"], ["costs", "--backbone", "x", "--num-classes", "ten"],
     ["costs", "--backbone", "x", "--num-classes", "10", "--colour"]],
)  # fmt: skip
def test_wrong_usage_is_status_2(capsys, arguments):
    with pytest.raises(SystemExit) as exit_:
        main(arguments)
    assert exit_.value.code == 2 and "usage: jeidnn" in capsys.readouterr().err


# ---- predict


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    """A calibrated model, one that is not, five pictures in a folder and one below it, and what is no picture."""
    folder = tmp_path_factory.mktemp("predict")
    model = small_model()
    model.save_pretrained(folder / "uncalibrated")
    model.operating_point = operating_point(model)
    model.save_pretrained(folder / "model")
    (folder / "pictures" / "more").mkdir(parents=True)
    for i, picture in enumerate(pictures(6, seed=7)):
        picture.save(folder / "pictures" / ("more/5.JPG" if i == 5 else f"{i}.png"))
    (folder / "pictures" / "notes.txt").write_text("not looked at")
    (folder / "empty").mkdir()
    (folder / "page.png").write_text("<!DOCTYPE html>")
    content = (folder / "pictures" / "0.png").read_bytes()
    (folder / "half.png").write_bytes(content[: len(content) // 2])
    return folder


def predict(capsys, *arguments) -> list[dict]:
    assert main(["predict", *map(str, arguments), "--json"]) == 0
    printed, errors = capsys.readouterr()
    assert errors == ""
    return json.loads(printed)


def test_predict_says_what_the_model_says(saved, capsys):
    rows = predict(capsys, saved / "model", saved / "pictures", "--alpha", 0.1, "--batch-size", 4)
    paths = [saved / "pictures" / name for name in ("0.png", "1.png", "2.png", "3.png", "4.png", "more/5.JPG")]
    assert [row["image"] for row in rows] == list(map(str, paths))
    model = JEIDNNForImageClassification.from_pretrained(saved / "model")
    preprocessing, names = Preprocessing.from_dict(model.config.preprocessing), model.config.id2label
    for path, row in zip(paths, rows, strict=True):
        with PIL.Image.open(path) as picture:
            answer = model.predict_sets(preprocessing([picture]), 0.1)
        (exit_index,) = answer.exit_index.tolist()
        temperature = model.operating_point.temperatures[exit_index]
        confidence, label = (answer.logits[0] / temperature).softmax(0).max(0)
        assert row["label"] == names[int(label)] and row["confidence"] == pytest.approx(float(confidence), abs=1e-6)
        assert (row["exit"], row["exits"]) == (exit_index + 1, 6)
        assert set(row["prediction_set"]) == {names[k] for k in answer.sets[0].nonzero().flatten().tolist()}
        assert row["mul_adds"] == model.costs.total[exit_index]
        assert row["normalised_mul_adds"] == pytest.approx(model.costs.normalised[exit_index])
    assert len({row["exit"] for row in rows}) > 1


def test_predict_in_words(saved, capsys):
    path = saved / "pictures" / "0.png"
    (row,) = predict(capsys, saved / "model", path)
    assert main(["predict", str(saved / "model"), str(path)]) == 0
    printed, errors = capsys.readouterr()
    assert errors == "" and printed == (
        f"{path}: {row['label']} {row['confidence']:.4f}, exit {row['exit']} of 6, {row['mul_adds']:,} Mul-Adds "
        f"({row['normalised_mul_adds']:.3f})  {{{', '.join(row['prediction_set'])}}}\n"
    )


def test_predict_without_calibration_has_no_sets(saved, capsys):
    path = saved / "pictures" / "0.png"
    (row,) = predict(capsys, saved / "uncalibrated", path)
    assert row["prediction_set"] is None
    assert main(["predict", str(saved / "uncalibrated"), str(path), "--alpha", "0.1"]) == 1
    assert_one_line(capsys, "operating point", command="predict")


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["model", "page.png"], ["readable picture", "page.png"]),
        (["model", "half.png"], ["readable picture", "half.png"]),
        (["model", "empty"], ["pictures in the folder", "empty"]),
        (["model", "absent.png"], ["no", "absent.png"]),
        (["absent", "pictures"], ["absent"]),
        (["empty", "pictures"], ["config.json", "empty"]),
        (["org/absent", "pictures"], ["org/absent"]),
        (["model", "pictures", "--alpha", "0.07"], ["alpha", "0.07"]),
        (["model", "pictures", "--lam", "30"], ["lambda", "30"]),
        (["model", "pictures", "--batch-size", "0"], ["batch-size", "0"]),
    ],
)
def test_predict_says_in_one_line_what_is_wrong(saved, capsys, monkeypatch, arguments, parts):
    monkeypatch.chdir(saved)
    assert main(["predict", *arguments]) == 1
    assert_one_line(capsys, *parts, command="predict")


# ---- push, doctor


def test_push(saved, tmp_path, capsys):
    """In a process whose token may write, and then may not."""
    arguments = ["push", str(saved / "model"), "org/small", "--subfolder", "lam1", "--json"]
    script = (
        "import os; from jeidnn_hf.cli import main\n"
        f"first = main({arguments})\n"
        f"os.environ['HF_TOKEN'] = {LocalHub.READ!r}\n"
        f"print(); print([first, main({arguments})])"
    )
    with LocalHub() as hub:
        answer = python("-c", script, env=hub.env(tmp_path, token=LocalHub.WRITE))
        assert answer.returncode == 0 and "Traceback" not in answer.stderr, answer.stderr
        *printed, status = answer.stdout.splitlines()
        row, repo = json.loads("".join(printed)), hub.repos["org/small"]
    assert status == "[0, 1]"
    assert (row["repo_id"], row["subfolder"], row["commit"]) == ("org/small", "lam1", repo.sha("main"))
    assert {f"lam1/{name}" for name in ("config.json", "model.safetensors", "calibration.json")} <= repo.tree().keys()
    assert answer.stderr.splitlines()[-1].startswith("jeidnn push: ") and "403" in answer.stderr
    assert main(["push", str(tmp_path / "absent"), "org/small"]) == 1
    assert_one_line(capsys, "absent", command="push")


def test_doctor_finds_what_is_there(capsys, monkeypatch, tmp_path):
    (tmp_path / "cifar10").mkdir()
    monkeypatch.setenv("JEIDNN_DATA_DIR", str(tmp_path))
    monkeypatch.setenv("JEIDNN_WEIGHTS_DIR", str(tmp_path / "absent"))
    assert main(["doctor", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    installed = {row["package"]: row for row in found["packages"]}
    assert installed["torch"]["installed"] == version("torch") and installed["torch"]["ok"]
    assert "pytest" not in installed and installed["timm"]["required"]
    assert found["folders"]["JEIDNN_DATA_DIR"] == {"path": str(tmp_path), "holds": ["cifar10"]}
    assert found["folders"]["JEIDNN_WEIGHTS_DIR"]["holds"] is None
    assert found["devices"][0].startswith("cpu") and set(found["caches"]) == {"hub", "datasets"}
    assert set(found["offline"]) == {"HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"}
    assert main(["doctor"]) == 0
    printed = capsys.readouterr().out
    assert f"JEIDNN_DATA_DIR: {tmp_path} (cifar10)" in printed and "absent (no such folder)" in printed


def test_doctor_compares_versions_with_ranges():
    rows = package_rows(["torch>=2.9,<3", "numpy>=99", "no-such-package-of-ours>=1", "jinja2>=3; extra == 'hub'"])
    assert [(row["package"], row["ok"]) for row in rows] == [
        ("torch", True), ("numpy", False), ("no-such-package-of-ours", False)
    ]  # fmt: skip
    assert rows[2]["installed"] is None and rows[1]["required"] == ">=99"


def test_doctor_fails_where_a_package_is_wrong(capsys, monkeypatch):
    monkeypatch.setattr("jeidnn_hf.commands.doctor.requires", lambda _: ["torch>=2.9", "numpy>=99"])
    assert main(["doctor"]) == 1
    printed, errors = capsys.readouterr()
    assert errors.startswith("jeidnn doctor: Expected ") and "numpy" in errors and "torch" not in errors
    assert f"WRONG  numpy            {version('numpy')}" in printed


def test_version(capsys):
    with pytest.raises(SystemExit) as exit_:
        main(["--version"])
    assert exit_.value.code == 0 and capsys.readouterr().out == f"jeidnn-hf {jeidnn_hf.__version__}\n"


def test_the_command_is_installed():
    (script,) = [point for point in entry_points(group="console_scripts") if point.name == "jeidnn"]
    assert script.load() is main


# ---- processes of their own


def python(*arguments: str, env: dict[str, str] | None = None) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, timeout=120, env=env or dict(os.environ)
    )


def test_help_does_not_wait_for_torch():
    asked = [["--help"], ["--version"], *([name, "--help"] for name in COMMANDS)]
    script = (
        "import sys; from jeidnn_hf.cli import main\n"
        f"for arguments in {asked}:\n"
        "    try: main(arguments)\n"
        "    except SystemExit as end: print('status', end.code)\n"
        "print(sorted({'torch', 'timm', 'transformers', 'datasets', 'numpy', 'PIL', 'gradio'} & set(sys.modules)))"
    )
    answer = python("-c", script)
    assert answer.returncode == 0 and answer.stderr == ""
    assert answer.stdout.splitlines()[-1] == "[]" and answer.stdout.count("status 0\n") == len(asked)
    assert all(f"usage: jeidnn {name} " in answer.stdout for name in COMMANDS)


def test_help_takes_less_than_a_second():
    times = []
    for _ in range(3):  # the best of three: the machine may be busy
        start = time.perf_counter()
        answer = python("-m", "jeidnn_hf.cli", "--help")
        times.append(time.perf_counter() - start)
    assert answer.returncode == 0 and "usage: jeidnn" in answer.stdout and "costs" in answer.stdout
    assert min(times) < 1


def test_an_unknown_backbone_in_a_process_of_its_own():
    """Nothing else comes on stderr either, such as warnings of the libraries on import."""
    answer = python("-m", "jeidnn_hf.cli", "costs", "--backbone", "nope", "--num-classes", "10")
    assert answer.returncode == 1 and answer.stdout == ""
    assert answer.stderr.startswith("jeidnn costs: Expected the name of a timm model, but got 'nope'")
    assert answer.stderr.count("\n") == 1
