"""app.py, space.py: what the page says against what the model says; its drawing, its Space, and it in a browser."""

from __future__ import annotations

import ast
import json
import os
import re
import subprocess
import sys
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from packaging.requirements import Requirement

import jeidnn_hf
from hub_client import shake
from hub_server import LocalHub
from jeidnn_hf import JEIDNNConfig, JEIDNNForImageClassification
from jeidnn_hf.cli import main
from jeidnn_hf.curve import AccuracyCostCurve
from jeidnn_hf.operating_point import OperatingPoint
from jeidnn_hf.policies import ConfidenceThreshold
from jeidnn_hf.preprocessing import Preprocessing
from jeidnn_hf.space import SDK_VERSION, space_files, space_id
from jeidnn_hf.splits import SplitInfo
from small_models import NAMES, pictures, small_model

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
gr = pytest.importorskip("gradio", reason="gradio is not installed; pip install jeidnn-hf[app]")

from jeidnn_hf import app as page  # noqa: E402
from jeidnn_hf.app_html import answer_html, curve_html, exits_html, set_html  # noqa: E402

LOW, OWN, HIGH = 0.01, 0.1, 1.0
CHROMIUM, DRIVER = Path("/usr/bin/chromium"), Path("/usr/bin/chromedriver")


@torch.no_grad()
def ranged_model() -> JEIDNNForImageClassification:
    """Gates for all lambdas. A gate's logit rises with log lambda and with the exit's confidence: at the lowest
    lambda no gate opens, at the highest the first does, and on the way the later ones open first."""
    config = JEIDNNConfig(
        backbone="test_vit", image_size=32, recipe="default", native_head=False, lam=[LOW, HIGH], current_lam=OWN,
        id2label=dict(enumerate(NAMES)), head_dim=16,
    )  # fmt: skip
    torch.manual_seed(0)
    model = shake(JEIDNNForImageClassification(config), 2)
    gates = model.policy.gates
    for parameter in gates.parameters():
        parameter.zero_()
    gates.weight[0, 0] = 0.5
    gates.slope.fill_(10.0)
    gates.bias.copy_(-torch.linspace(9, -3, len(gates.bias)))
    thresholds = {alpha: [t - 0.01 * l for l in range(6)] for alpha, t in ((0.01, 1.0), (0.05, 0.9), (0.1, 0.7))}
    images = SplitInfo("toy", "validation", "validation", 80, "0" * 64)
    temperatures = [1.5, 1.4, 1.3, 1.2, 1.1, 1.0]
    model.operating_point = OperatingPoint(OWN, temperatures, [0] * 6, images, thresholds={"grouped": thresholds})
    return model


def curve_of(model: JEIDNNForImageClassification) -> AccuracyCostCurve:
    """Invented: 90 % at the lowest lambda, 50 % at the highest."""
    costs = list(model.costs.normalised)
    shares = [costs[-1], costs[2], costs[0]]
    return AccuracyCostCurve([LOW, OWN, HIGH], [0.9, 0.8, 0.5], shares, costs, "toy", "test", 80, "0" * 64, 0.95)


@pytest.fixture(scope="module")
def ranged() -> JEIDNNForImageClassification:
    return ranged_model()


def pixels_of(model, picture) -> torch.Tensor:
    return Preprocessing.from_dict(model.config.preprocessing)([picture])


# ---- answers


def test_at_every_lambda_the_exit_is_the_one_the_model_stops_at(ranged):
    seen = set()
    for picture in pictures(6, seed=3):
        features = page.exit_features(ranged, picture)
        for lam in page.slider_lambdas(ranged)[::10]:
            answer, output = page.answer_at(ranged, features, lam), ranged(pixels_of(ranged, picture), lam=lam)
            assert answer.exit == int(output.exit_index) + 1 and answer.lam == lam
            assert answer.mul_adds == int(output.mul_adds)
            assert answer.share == pytest.approx(answer.mul_adds / ranged.costs.backbone[-1])
            label, probability = answer.exits[answer.exit - 1].top[0]
            assert label == NAMES[int(output.logits.argmax())]
            assert probability == pytest.approx(float(ranged.probabilities(output).detach().max()), abs=1e-5)
            seen.add(answer.exit)
    assert len(seen) > 2


def test_what_every_exit_thinks(ranged):
    (picture,) = pictures(1, seed=5)
    answer = page.answer_at(ranged, page.exit_features(ranged, picture), OWN)
    output = ranged(pixels_of(ranged, picture), lam=OWN, output_all_exits=True)
    assert len(answer.exits) == ranged.backbone.num_exits == 6
    for l, view in enumerate(answer.exits):
        temperature = ranged.operating_point.temperatures[l]
        expected = (output.all_logits[0, l] / temperature).softmax(0).sort(descending=True)
        assert [label for label, _ in view.top] == [NAMES[k] for k in expected.indices[:3]]
        assert [p for _, p in view.top] == pytest.approx(expected.values[:3].tolist(), abs=1e-5)
        assert view.share == pytest.approx(ranged.costs.total[l] / ranged.costs.backbone[-1])
        assert view.gate == (None if l == 5 else pytest.approx(output.gate_values[0, l].item(), abs=1e-5))


def test_a_dearer_lambda_never_costs_more_and_in_the_end_less(ranged):
    for picture in pictures(4, seed=9):
        features = page.exit_features(ranged, picture)
        lams = page.slider_lambdas(ranged)
        costs = [page.answer_at(ranged, features, lam).mul_adds for lam in lams]
        assert costs == sorted(costs, reverse=True) and costs[0] > costs[-1]


def test_moving_the_slider_does_not_run_the_backbone(ranged, monkeypatch):
    (picture,) = pictures(1)
    features = page.exit_features(ranged, picture)
    monkeypatch.setattr(ranged.backbone, "forward", lambda *_: pytest.fail("the backbone ran"))
    monkeypatch.setattr(ranged.backbone, "stage", lambda *_: pytest.fail("a stage of the backbone ran"))
    assert page.answer_at(ranged, features, LOW).exit > page.answer_at(ranged, features, HIGH).exit


def test_the_set_is_that_of_predict_sets(ranged):
    sizes, exits = set(), set()
    for picture in pictures(10, seed=11):
        features = page.exit_features(ranged, picture)
        for alpha in page.calibrated_alphas(ranged):
            answer = page.answer_at(ranged, features, OWN, alpha)
            members = answer.prediction_set
            expected = ranged.predict_sets(pixels_of(ranged, picture), alpha).sets[0]
            assert set(members) == {NAMES[k] for k in expected.nonzero().flatten().tolist()}
            sizes.add(len(members))
            exits.add(answer.exit)
    assert page.calibrated_alphas(ranged) == [0.01, 0.05, 0.1] and len(sizes) > 1 and len(exits) > 1


def test_at_another_lambda_there_is_no_set_and_it_says_where_there_is(ranged):
    (picture,) = pictures(1)
    answer = page.answer_at(ranged, page.exit_features(ranged, picture), HIGH, 0.05)
    assert answer.prediction_set is None and "calibrated at λ = 0.1" in answer.set_note


def test_without_calibration_there_are_no_sets_and_it_says_so():
    model = small_model()
    (picture,) = pictures(1)
    answer = page.answer_at(model, page.exit_features(model, picture), model.config.lam, 0.05)
    assert page.calibrated_alphas(model) == [] and answer.prediction_set is None
    assert "calibration.json" in answer.set_note and "calibration.json" in set_html(answer)
    assert answer.exit == int(model(pixels_of(model, picture)).exit_index) + 1


def test_the_slider_holds_the_models_own_lambda_and_its_ends(ranged):
    lams = page.slider_lambdas(ranged)
    assert OWN in lams and (lams[0], lams[-1]) == pytest.approx((LOW, HIGH)) and lams == sorted(lams)
    assert len(lams) > 50 and page.slider_lambdas(small_model(lam=0.3)) == [0.3]
    with pytest.raises(ValueError, match="Expected a lambda in"):
        page.answer_at(ranged, page.exit_features(ranged, pictures(1)[0]), 2 * HIGH)


# ---- what it draws


def test_labels_are_text_and_not_markup(ranged):
    answer = page.answer_at(ranged, page.exit_features(ranged, pictures(1)[0]), OWN, 0.05)
    view = replace(answer.exits[0], top=[("<b>ant</b>", 0.9), ("a & b", 0.1)])
    answer = replace(answer, exits=[view] * 6, prediction_set=["<i>eel</i>"])
    for html in (answer_html(answer), set_html(answer), exits_html(answer, "")):
        assert "<b>" not in html and "<i>eel" not in html and "&lt;" in html


def circle(html: str) -> tuple[float, float] | None:
    found = re.search(r'<circle id="jeidnn-point" cx="([\d.]+)" cy="([\d.]+)"', html)
    return found and (float(found[1]), float(found[2]))


def test_the_point_is_on_the_curve_and_moves_with_lambda(ranged):
    curve = curve_of(ranged)
    vertices = re.search(r'<polyline points="([^"]+)"', curve_html(curve, OWN))[1].split()
    vertices = [tuple(map(float, vertex.split(","))) for vertex in vertices]
    assert [circle(curve_html(curve, lam)) for lam in (LOW, OWN, HIGH)] == vertices
    (x_low, y_low), (x_own, y_own), (x_high, y_high) = vertices
    assert x_low > x_own > x_high and y_low < y_own < y_high  # y points down
    between = circle(curve_html(curve, (OWN * HIGH) ** 0.5))
    assert between == pytest.approx(((x_own + x_high) / 2, (y_own + y_high) / 2), abs=0.1)
    assert "between two points" in curve_html(curve, 0.05) and "between two points" not in curve_html(curve, OWN)


def test_without_a_curve_no_point_is_invented():
    html = curve_html(None, OWN, 0.5)
    assert "<svg" not in html and "jeidnn evaluate" in html and "jeidnn card" in html
    assert circle(html) is None


def test_the_exit_taken_is_marked_and_those_behind_it_are_grey(ranged):
    answer = page.answer_at(ranged, page.exit_features(ranged, pictures(1)[0]), OWN)
    kinds = re.findall(r'<tr class="(\w+)">', exits_html(answer, ""))
    assert kinds == ["passed"] * (answer.exit - 1) + ["taken"] + ["skipped"] * (6 - answer.exit)
    assert f"exit {answer.exit} of 6" in answer_html(answer)


# ---- where a model and its curve come from


def test_the_curve_beside_the_weights_is_loaded_and_checked(ranged, tmp_path):
    ranged.save_pretrained(tmp_path)
    model, curve = page.load(tmp_path)
    assert curve is None and model.config.current_lam == OWN
    curve_of(ranged).save(tmp_path)
    assert page.load(tmp_path)[1] == curve_of(ranged)
    replace(curve_of(ranged), exit_mul_adds=[0.5]).save(tmp_path)
    with pytest.raises(ValueError, match="^Expected a curve of this model"):
        page.load(tmp_path)


def test_a_regression_has_no_page(tmp_path):
    options = {"recipe": "paper", "native_head": False, "problem_type": "regression", "num_labels": 2}
    config = JEIDNNConfig(backbone="test_vit", image_size=32, **options)
    JEIDNNForImageClassification(config).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="one label, but .* problem_type 'regression'"):
        page.load(tmp_path)


def component(app, kind: str, **having):
    (found,) = [
        block for block in app.blocks.values()
        if block.get_block_name() == kind and all(getattr(block, k) == v for k, v in having.items())
    ]  # fmt: skip
    return found


@pytest.mark.parametrize("content", [b"<!DOCTYPE html>", None])
def test_what_is_no_picture_is_a_clear_error(ranged, tmp_path, content):
    path = tmp_path / "page.png"
    pictures(1)[0].save(path)
    path.write_bytes(content or path.read_bytes()[:200])
    box = component(page.build_app(ranged), "image")
    sent = gr.data_classes.ImageData(path=str(path), orig_name="page.png")
    with pytest.raises(gr.Error, match="Expected a picture, but 'page.png' cannot be read"):
        box.preprocess(sent)
    pictures(1)[0].save(path)
    assert box.preprocess(sent).size == pictures(1)[0].size and box.preprocess(None) is None


def test_one_lambda_has_no_slider_but_a_note():
    app = page.build_app(small_model(lam=0.3))
    assert component(app, "slider").visible is False and component(app, "dropdown").visible is False
    assert "0.3, the only one" in component(app, "markdown", elem_id="one-lam").value
    assert app.analytics_enabled is False


def test_a_range_starts_at_its_own_lambda_and_alpha(ranged):
    app = page.build_app(ranged, curve_of(ranged))
    slider = component(app, "slider")
    assert page.slider_lambdas(ranged)[slider.value] == OWN and slider.visible
    assert component(app, "dropdown").value == 0.05


# ---- the command and the Space


def test_without_gradio_the_command_is_one_line_and_status_2(capsys, monkeypatch):
    monkeypatch.setattr("jeidnn_hf.commands.app.find_spec", lambda _: None)
    with pytest.raises(SystemExit) as exit_:
        main(["app", "somewhere"])
    printed, errors = capsys.readouterr()
    assert exit_.value.code == 2 and printed == "" and errors.count("\n") == 1
    assert errors.startswith("jeidnn app: Expected gradio") and "pip install jeidnn-hf[app]" in errors


def test_no_model_is_one_line_and_status_1(capsys, tmp_path):
    assert main(["app", str(tmp_path / "absent")]) == 1
    printed, errors = capsys.readouterr()
    assert printed == "" and errors.startswith("jeidnn app: Expected") and errors.count("\n") == 1


def test_gradio_is_imported_by_nothing_else():
    source = Path(jeidnn_hf.__file__).parent
    code = {path.relative_to(source).as_posix(): path.read_text() for path in source.rglob("*.py")}

    def matching(pattern: str) -> set[str]:
        return {name for name, text in code.items() if re.search(pattern, text, re.MULTILINE)}

    assert matching(r"^\s*(import|from) gradio") == {"app.py"}
    assert matching(r"^from \.+app import") == set()
    assert matching(r"^\s+from \.+app import") == {"commands/app.py", "app_html.py"}  # the latter for its types


def test_a_space_is_named_after_its_model():
    assert space_id("org/x-any") == "org/x-any" and space_id("org/x", "lam0.1") == "org/x-lam0.1"


def test_a_space_installs_what_this_package_was_tested_with():
    (extra,) = re.findall(r'"(gradio[^"]*)"', (Path(__file__).parents[1] / "setup.py").read_text())
    assert Requirement(extra).specifier.contains(SDK_VERSION)
    assert space_files("org/x")["requirements.txt"] == f"jeidnn-hf[app]=={jeidnn_hf.__version__}\n"


@pytest.mark.slow
def test_push_space(ranged, tmp_path):
    """The model is pushed, then its Space, which another process with an empty cache runs."""
    ranged.save_pretrained(tmp_path / "model")
    curve_of(ranged).save(tmp_path / "model")
    arguments = ["push", str(tmp_path / "model"), "org/small", "--subfolder", "lam", "--revision", "v1", "--space"]
    with LocalHub() as hub:
        def run(*command: str, token: str | None = None) -> str:
            env = hub.env(tmp_path / (token or "reader"), token, GRADIO_ANALYTICS_ENABLED="False")
            done = subprocess.run([sys.executable, *command], env=env, capture_output=True, text=True, timeout=120)
            assert done.returncode == 0, done.stderr
            return done.stdout

        row = json.loads(run("-m", "jeidnn_hf.cli", *arguments, "--json", token=LocalHub.WRITE))
        assert row["space"] == f"{hub.url}/spaces/org/small-lam" and row["repo_id"] == "org/small"
        assert "lam/curve.json" in hub.repos["org/small"].tree("v1")
        files = {name: text.decode() for name, text in hub.repos["spaces/org/small-lam"].tree().items()}
        assert set(files) == {"app.py", "requirements.txt", "README.md"}
        head = yaml.safe_load(files["README.md"].split("---")[1])
        assert (head["sdk"], head["app_file"], head["models"]) == ("gradio", "app.py", ["org/small"])
        assert head["sdk_version"] == SDK_VERSION and head["python_version"] == "3.11"
        (call,) = [node for node in ast.walk(ast.parse(files["app.py"])) if isinstance(node, ast.keyword)][:1]
        assert call.arg == "revision"
        script = (
            "import runpy, gradio\n"
            "gradio.Blocks.block_thread = lambda app: print(app.title, app.is_running)\n"
            f"runpy.run_path({str(tmp_path / 'app.py')!r}, run_name='__main__')"
        )
        (tmp_path / "app.py").write_text(files["app.py"])
        assert run("-c", script).splitlines()[-1] == "org/small/lam: early exits True"
        assert any("/org/small/resolve/v1/lam/curve.json" in path for _, path in hub.requests)


def test_a_space_is_not_pushed_with_a_readers_token(tmp_path):
    script = (
        "from jeidnn_hf.space import push_space\n"
        "try: push_space('org/small')\n"
        "except OSError as error: print(error)"
    )
    with LocalHub() as hub:
        env = hub.env(tmp_path, LocalHub.READ)
        done = subprocess.run([sys.executable, "-c", script], env=env, capture_output=True, text=True, timeout=120)
        assert "403 Forbidden" in done.stdout and done.stdout.count("\n") == 1 and hub.repos == {}


# ---- in a browser


@contextmanager
def served(folder: Path):
    """The address of ``jeidnn app`` in a process of its own."""
    env = {**os.environ, "GRADIO_ANALYTICS_ENABLED": "False", "HF_HUB_OFFLINE": "1", "NO_PROXY": "127.0.0.1"}
    env["PYTHONPATH"] = str(Path(jeidnn_hf.__file__).parents[1])
    command = [sys.executable, "-m", "jeidnn_hf.cli", "app", str(folder), "--json"]
    with subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            line = process.stdout.readline()
            assert line, process.stderr.read()
            yield json.loads(line)["url"]
        finally:
            process.terminate()


@contextmanager
def browser():
    """A headless Chromium that finds nothing but 127.0.0.1."""
    webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
    options = webdriver.ChromeOptions()
    options.binary_location = str(CHROMIUM)
    for argument in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--window-size=1280,900"):
        options.add_argument(argument)
    options.add_argument("--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1")
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(str(DRIVER)))
    try:
        yield driver
    finally:
        driver.quit()


@pytest.mark.slow
@pytest.mark.browser
@pytest.mark.skipif(not (CHROMIUM.exists() and DRIVER.exists()), reason=f"no {CHROMIUM} or no {DRIVER}")
def test_in_a_browser_the_slider_moves_the_exit_and_the_point(ranged, tmp_path):
    pytest.importorskip("selenium", reason="selenium is not installed")
    from selenium.webdriver.common.keys import Keys
    from selenium.webdriver.support.ui import WebDriverWait

    ranged.save_pretrained(tmp_path / "model")
    curve_of(ranged).save(tmp_path / "model")
    picture = pictures(1, seed=2)[0].convert("RGB")
    picture.save(tmp_path / "picture.png")
    features, lams = page.exit_features(ranged, picture), page.slider_lambdas(ranged)
    (tmp_path / "page.png").write_text("<!DOCTYPE html>")
    with served(tmp_path / "model") as url, browser() as driver:
        def text(name: str) -> str | None:
            """Of an element by its id, None where there is none (yet)."""
            return driver.execute_script("return document.getElementById(arguments[0])?.textContent ?? null", name)

        def point() -> tuple[float, float]:
            found = driver.find_element("id", "jeidnn-point")
            return tuple(float(found.get_attribute(name)) for name in ("cx", "cy"))

        def upload(name: str) -> None:
            driver.find_element("css selector", "#picture input[type=file]").send_keys(str(tmp_path / name))

        wait = WebDriverWait(driver, 30)
        driver.get(url)
        wait.until(lambda _: text("jeidnn-label") == "Drop a picture")
        assert text("jeidnn-exit") is None and point() == circle(curve_html(curve_of(ranged), OWN))

        upload("page.png")
        wait.until(lambda _: "cannot be read" in driver.find_element("tag name", "body").text)
        assert text("jeidnn-exit") is None
        driver.get(url)
        wait.until(lambda _: text("jeidnn-label") == "Drop a picture")

        upload("picture.png")
        expected = page.answer_at(ranged, features, OWN, 0.05)
        wait.until(lambda _: text("jeidnn-exit") == f"exit {expected.exit} of 6")
        assert text("jeidnn-label").startswith(f"{expected.exits[expected.exit - 1].top[0][0]}, ")
        assert set(text("jeidnn-set").replace("(empty)", "")) == set("".join(expected.prediction_set))
        before = point()

        slider = driver.find_element("css selector", "#lam input[type=range]")
        for key, lam in ((Keys.END, lams[-1]), (Keys.HOME, lams[0])):
            slider.send_keys(key)
            moved = page.answer_at(ranged, features, lam)
            wait.until(lambda _, moved=moved: text("jeidnn-exit") == f"exit {moved.exit} of 6")
            wait.until(lambda _, lam=lam: point() == circle(curve_html(curve_of(ranged), lam)))
            assert moved.exit != expected.exit and point() != before
            assert "calibrated at λ = 0.1 alone" in text("jeidnn-set")
        asked = driver.execute_script("return performance.getEntriesByType('resource').map(entry => entry.name)")
        assert asked and all(name.startswith(url) for name in asked)


def test_a_model_that_leaves_without_gates_is_refused(tmp_path):
    model = small_model()
    exits = model.backbone.num_exits
    model.set_policy(ConfidenceThreshold(torch.ones(exits), 0.5))
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"^Expected a model with policy='gates', .* but .* has 'threshold'\.$"):
        page.load(tmp_path)
