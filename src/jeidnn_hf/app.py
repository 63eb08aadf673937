"""A page to look at: where a picture leaves, what every exit thinks of it, and what moving lambda changes.

Needs gradio (``pip install jeidnn-hf[app]``), which nothing else imports. The backbone runs once per picture, to its
last exit; what lambda and alpha change is then told by heads and gates alone, from the exit features.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gradio as gr
import PIL.Image
import torch
from torch import Tensor

from .app_html import answer_html, curve_html, exits_html, set_html
from .checkpoints import fetch
from .curve import FILE_NAME as CURVE_NAME
from .curve import AccuracyCostCurve
from .modeling_jeidnn import JEIDNNForImageClassification
from .preprocessing import Preprocessing
from .runs import curve_in_run, lambdas

METHOD = "grouped"
"""The conformal method whose sets are shown."""
TOP = 3
NUM_LAMBDAS = 60
"""Of the slider, besides the model's own."""


@dataclass(frozen=True)
class ExitView:
    """One exit's view of a picture.

    Args:
        top: the likeliest classes, with their probabilities after the exit's temperature if there is one.
        gate: g^l; None at the last exit, which has none.
        share: what it costs to leave here, as a share of the backbone's Mul-Adds.
    """

    top: list[tuple[str, float]]
    gate: float | None
    share: float


@dataclass(frozen=True)
class Answer:
    """What the page says of one picture at one lambda.

    Args:
        exit: the one taken, from 1.
        exits: of all L, also those behind the one taken.
        mul_adds: spent.
        backbone_mul_adds: of the bare backbone.
        prediction_set: labels, the likeliest first; None where there is none.
        set_note: what the set promises, or why there is none.
    """

    lam: float
    exit: int
    exits: list[ExitView]
    mul_adds: int
    backbone_mul_adds: int
    prediction_set: list[str] | None
    set_note: str

    @property
    def share(self) -> float:
        """Spent, as a share of the backbone's Mul-Adds."""
        return self.mul_adds / self.backbone_mul_adds


@torch.inference_mode()
def exit_features(model: JEIDNNForImageClassification, picture: PIL.Image.Image) -> list[Tensor]:
    """The features of every exit, ``(1, d_l)`` each: the one pass of the backbone that a picture needs."""
    pixels = Preprocessing.from_dict(model.config.preprocessing)([picture])
    return list(model.backbone(pixels.to(model.device, model.dtype)))


@torch.inference_mode()
def answer_at(
    model: JEIDNNForImageClassification, features: Sequence[Tensor], lam: float, alpha: float | None = None
) -> Answer:
    """What the model says at one lambda, and the prediction set at one alpha if it is calibrated for both.

    A ValueError for a lambda out of range.
    """
    output = model(exit_features=features, lam=lam, return_dict=True)
    point, names = model.operating_point, model.config.id2label
    logits = output.all_logits
    probabilities = (logits.softmax(-1) if point is None else point.probabilities(logits))[0].float().cpu()
    gates = [*output.gate_values[0].tolist(), None]
    views = []
    for row, gate, share in zip(probabilities, gates, model.exit_costs().normalised, strict=True):
        values, classes = row.topk(min(TOP, len(row)))
        top = [(names[k], p) for k, p in zip(classes.tolist(), values.tolist(), strict=True)]
        views.append(ExitView(top, gate, share))
    taken = int(output.exit_index[0])
    members, note = None, _why_no_set(model, lam, alpha)
    if note is None:
        in_set = model.sets_of(output, alpha, METHOD)[0].cpu()
        order = probabilities[taken].argsort(descending=True, stable=True).tolist()
        members = [names[k] for k in order if in_set[k]]
        note = f"Sets like this hold the true class of at least {1 - alpha:.1%} of pictures like the calibration's."
    return Answer(lam, taken + 1, views, int(output.mul_adds[0]), model.exit_costs().backbone[-1], members, note)


def calibrated_alphas(model: JEIDNNForImageClassification) -> list[float]:
    """Those of the model's ``calibration.json``, rising; none where it has no sets."""
    point = model.operating_point
    return sorted(point.thresholds.get(METHOD, ())) if point is not None else []


def _why_no_set(model: JEIDNNForImageClassification, lam: float, alpha: float | None) -> str | None:
    if not calibrated_alphas(model):
        return "No prediction sets: the model has no calibration.json with thresholds beside its weights."
    if alpha is None:
        return "No alpha is chosen."
    if not model.has_sets(alpha, METHOD, lam):
        return f"No prediction set here: the sets are calibrated at λ = {model.operating_point.lam:.4g} alone."
    return None


def slider_lambdas(model: JEIDNNForImageClassification) -> list[float]:
    """What the slider can be set to, rising: spread over the trained range in logarithm, and the model's own lambda and
    that of its prediction sets among them."""
    config, point = model.config, model.operating_point
    calibrated = [] if point is None or point.lam is None else [config.check_lam_in_range(point.lam)]
    return sorted({*lambdas(config, NUM_LAMBDAS), *calibrated})


def load(
    name: str | Path, revision: str = "main", subfolder: str = ""
) -> tuple[JEIDNNForImageClassification, AccuracyCostCurve | None]:
    """A saved model, of a folder or of the Hub, and its curve: the ``curve.json`` beside it, else from its run folder.

    Raises:
        ValueError, OSError: as `from_pretrained`; a model of several labels or of numbers, or without gates; a curve of
            another model.
    """
    where = {"revision": revision, "subfolder": subfolder}
    model = JEIDNNForImageClassification.from_pretrained(name, **where)
    if not model.config.has_classes or model.config.preprocessing is None:
        got = f"problem_type {model.config.problem_type!r}" if model.config.preprocessing else "no preprocessing"
        raise ValueError(f"Expected a model that gives pictures one label, but {str(name)!r} has {got}.")
    if model.config.policy != "gates":
        got = model.config.policy
        raise ValueError(f"Expected a model with policy='gates', whose values it shows, but {str(name)!r} has {got!r}.")
    if torch.accelerator.is_available():
        model.to(torch.accelerator.current_accelerator())
    path = fetch(name, CURVE_NAME, where)
    folder = Path(name, subfolder)
    curve = AccuracyCostCurve.load(Path(path).parent) if path else curve_in_run(folder) if folder.is_dir() else None
    if curve is not None:
        curve.check_is_of(model.costs)
    return model, curve


def clear_about_pictures(read: Callable[[Any], PIL.Image.Image | None]) -> Callable[[Any], PIL.Image.Image | None]:
    """``gr.Image.preprocess``, but what is no picture, or only half of one, is a ``gr.Error`` that says so.

    A subclass would do, were it not that gradio writes a file of types beside its code.
    """

    def preprocess(payload: Any) -> PIL.Image.Image | None:
        try:
            picture = read(payload)
            if picture is not None:
                picture.load()
            return picture
        except (OSError, ValueError, SyntaxError, PIL.Image.DecompressionBombError) as error:
            name = payload.orig_name or "it"
            raise gr.Error(f"Expected a picture, but {name!r} cannot be read as one; try a PNG or a JPEG.") from error

    return preprocess


def build_app(
    model: JEIDNNForImageClassification, curve: AccuracyCostCurve | None = None, name: str = "JEI-DNN"
) -> gr.Blocks:
    """The page of one model; without a curve it says how to get one."""
    config, lams, alphas = model.config, slider_lambdas(model), calibrated_alphas(model)
    start = lams.index(min(lams, key=lambda lam: abs(lam - config.current_lam)))
    gates = _gates_in_words(model)

    def shown(features: list[Tensor] | None, position: float, alpha: float | None) -> tuple[str, str, str, str]:
        lam = lams[int(position)]
        answer = None if features is None else answer_at(model, features, lam, alpha)
        curve_at = curve_html(curve, lam, answer and answer.share)
        return answer_html(answer), curve_at, set_html(answer), exits_html(answer, gates)

    def see(picture: PIL.Image.Image | None, position: float, alpha: float | None):
        features = None if picture is None else exit_features(model, picture)
        return features, *shown(features, position, alpha)

    with gr.Blocks(title=f"{name}: early exits", analytics_enabled=False, fill_width=True) as app:
        gr.Markdown(f"## {name}\n{len(model.costs.total)} exits on a frozen `{config.backbone}`; each picture leaves "
                    "at the first exit whose gate opens, and the blocks behind it do not run.")  # fmt: skip
        features = gr.State()
        with gr.Row():
            with gr.Column(scale=3, min_width=260):
                picture = gr.Image(type="pil", image_mode=None, label="picture", height=250, elem_id="picture")
                picture.preprocess = clear_about_pictures(picture.preprocess)
                position = gr.Slider(
                    0, max(len(lams) - 1, 1), start, step=1, elem_id="lam",
                    label="price of computation, λ", buttons=["reset"], visible=len(lams) > 1,
                    info=f"from {lams[0]:.4g}: pictures go deep, to {lams[-1]:.4g}: they leave early",
                )  # fmt: skip
                if len(lams) == 1:
                    gr.Markdown(f"λ is {lams[0]:.4g}, the only one this model was trained for.", elem_id="one-lam")
                alpha = gr.Dropdown(
                    [(f"{alpha:g}", alpha) for alpha in alphas], value=_default_alpha(alphas), elem_id="alpha",
                    label="prediction set, α", info="share of pictures that it may miss", visible=bool(alphas),
                )  # fmt: skip
                prediction_set = gr.HTML(apply_default_css=False)
            with gr.Column(scale=5, min_width=360):
                answer = gr.HTML(answer_html(None), apply_default_css=False)
                drawn = gr.HTML(curve_html(curve, lams[start]), apply_default_css=False)
            with gr.Column(scale=6, min_width=360):
                exits = gr.HTML(apply_default_css=False)
        views = [answer, drawn, prediction_set, exits]
        quiet = {"show_progress": "hidden", "trigger_mode": "always_last", "api_visibility": "private"}
        picture.change(see, [picture, position, alpha], [features, *views], **quiet)
        gr.on([position.change, alpha.change], shown, [features, position, alpha], views, **quiet)
    return app


def serve(
    name: str | Path, revision: str = "main", subfolder: str = "", host: str | None = None, port: int | None = None
) -> gr.Blocks:
    """Loads a model and serves its page, at ``local_url``, while the process runs: ``block_thread()`` waits.

    Args:
        host: by default gradio's, ``GRADIO_SERVER_NAME`` or 127.0.0.1.
        port: by default the first free one from 7860.

    Raises:
        ValueError, OSError: as `load`; a port that is taken.
    """
    model, curve = load(name, revision, subfolder)
    shown = Path(name).resolve().name if Path(name).is_dir() else str(name)
    app = build_app(model, curve, f"{shown}/{subfolder}" if subfolder else shown)
    bold = gr.themes.LocalFont("Source Sans Pro", weights=(400, 700))  # gradio's own choice, 600, lacks letters
    app.launch(
        server_name=host, server_port=port, theme=gr.themes.Default(font=(bold, "system-ui", "sans-serif")),
        footer_links=[], ssr_mode=False, quiet=True, prevent_thread_lock=True,
    )  # fmt: skip
    return app


def _default_alpha(alphas: Sequence[float]) -> float | None:
    return min(alphas, key=lambda alpha: abs(alpha - 0.05), default=None)


def _gates_in_words(model: JEIDNNForImageClassification) -> str:
    config = model.config
    if (config.exit_rule, config.gate_form) == ("conditional", "stick"):
        return f"A picture leaves at the first gate above {config.exit_threshold:g}"
    return f"The gates decide by the rule {config.exit_rule!r} of form {config.gate_form!r}"
