"""What ``test_hub.py`` runs in processes of their own: ``hub_client.py ROLE FOLDER [ARGUMENT]``, see `main`."""

from __future__ import annotations

import json
import runpy
import sys
import time
from pathlib import Path

import datasets
import numpy as np
import torch
from safetensors.torch import load_file, save_file
from transformers import pipeline

from jeidnn_hf import JEIDNNConfig, JEIDNNForImageClassification, JEIDNNTrainer, JEIDNNTrainingArguments
from jeidnn_hf.data import ImageView, Preprocessing
from jeidnn_hf.operating_point import OperatingPoint
from jeidnn_hf.splits import SplitInfo
from small_models import pictures

EXAMPLE = Path(__file__).parents[1] / "examples" / "push_to_hub.py"
CIFAR = {"backbone": "resnet20_cifar", "num_labels": 10, "recipe": "paper", "exit_stages": [1, 4, 8]}
VIT, ANY, TRAINED = "org/jeidnn-test_vit-digits-lam1", "org/jeidnn-resnet20_cifar-digits-any", "org/trained"
RUNS = "org/jeidnn-resnet20_cifar-digits"
LOADS = {
    "vit": (VIT, {}),
    "vit-v2": (VIT, {"revision": "v2"}),
    "any": (ANY, {}),
    "folder-lam0.1": (RUNS, {"subfolder": "lam0.1"}),
    "folder-lam2": (RUNS, {"subfolder": "lam2"}),
    "repo-lam2": (f"{RUNS}-lam2", {}),
    "trained": (TRAINED, {}),
}


def main() -> None:
    role, folder, *arguments = sys.argv[1:]
    torch.set_num_threads(1)
    globals()[role](Path(folder), *arguments)


@torch.no_grad()
def shake(model: JEIDNNForImageClassification, seed: int) -> JEIDNNForImageClassification:
    """Exits and gates as if trained: different for every seed."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.heads.parameters():
        parameter.normal_(0, 0.3, generator=generator)
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.policy.parameters():
        scale = 4 if parameter.dim() < 2 else 4 / parameter.shape[-1] ** 0.5
        parameter.normal_(0, scale, generator=generator)
    if model.config.gate == "shared":  # half of what is noise leaves at every exit, at the least lambda
        gates, side = model.policy.gates, model.config.image_size
        gates.weight.mul_(5), gates.slope.mul_(0.1), gates.curvature.mul_(0.1)
        noise = torch.randn(24, 3, side, side, generator=generator)
        logits = model.eval()(noise, output_all_exits=True).all_logits
        gates.bias -= model.policy.gate_logits(logits, model.config.lam[0]).median(0).values
    return model.eval()


@torch.no_grad()
def answers(model: JEIDNNForImageClassification) -> dict[str, torch.Tensor]:
    size = model.config.image_size
    noise = torch.randn(24, 3, size, size, generator=torch.Generator().manual_seed(0))
    output = model(noise * torch.logspace(-1, 1, 24)[:, None, None, None])  # unlike pictures leave at unlike exits
    return {"logits": output.logits, "exit_index": output.exit_index, "mul_adds": output.mul_adds}


def all_answers(models: dict[str, JEIDNNForImageClassification]) -> dict[str, torch.Tensor]:
    found = {f"{key}/{name}": value for key, model in models.items() for name, value in answers(model).items()}
    low, high = models["any"].config.lam
    for lam in (low, high):
        models["any"].set_lambda(lam)
        found |= {f"any-{lam:g}/{name}": value for name, value in answers(models["any"]).items()}
    return found


def push(folder: Path, weights: str) -> None:
    """Pushes in all ways, and saves what the models answer."""
    models = {}
    build = JEIDNNForImageClassification.from_backbone_pretrained
    models["vit"] = shake(build("test_vit", recipe="paper"), 0)
    models["vit"].push_to_hub(VIT)
    models["vit-v2"] = shake(build("test_vit", recipe="paper"), 1)
    models["vit-v2"].push_to_hub(VIT, revision="v2")

    models["any"] = shake(build(**CIFAR | {"recipe": "default", "lam": [0.1, 10.0]}, weights=weights), 3)
    models["any"].push_to_hub(ANY)
    shake(models["any"], 4).push_to_hub(ANY)  # only heads and gates have changed
    models["any"].push_to_hub(ANY)  # nothing has
    assert models["any"].config.backbone_weights == weights

    runs = folder / "runs"
    for lam in (0.1, 2.0):
        models[f"folder-lam{lam:g}"] = model = shake(build(**CIFAR, lam=lam, weights=weights), int(10 * lam))
        model.save_pretrained(runs / f"paper-{lam}")
        (runs / f"paper-{lam}" / "checkpoints").mkdir()
        (runs / f"paper-{lam}" / "checkpoints" / "optimizer.pt").write_bytes(b"a pickle")
    models["repo-lam2"] = models["folder-lam2"]
    split = SplitInfo(dataset="digits", role="validation", source="test", size=40, sha256="0" * 64)
    point = OperatingPoint(2.0, [1.0] * 3, [0] * 3, split, thresholds={"general": {0.05: [0.5] * 3}})
    point.calibration_by_exit = [10, 20, 30]
    point.save(runs / "paper-2.0")
    (runs / "config.yaml").write_text("data: {dataset: someone/digits}\n")
    for more in ([], ["--one-repo"]):
        sys.argv = [str(EXAMPLE), str(runs), "--org", "org", *more]
        runpy.run_path(str(EXAMPLE), run_name="__main__")

    (folder / "pipeline.json").write_text(json.dumps(classify(str(runs / "paper-2.0"))))
    models["trained"] = train(folder / "trained", weights)
    save_file(all_answers(models), folder / "answers.safetensors")


def classify(name: str) -> list[dict]:
    """Labels, exits and sets of pictures."""
    classifier = pipeline("early-exit-image-classification", model=name, alpha=0.05, method="general")
    return classifier(pictures(12), batch_size=5)


def train(folder: Path, weights: str) -> JEIDNNForImageClassification:
    pixels = np.random.default_rng(0).integers(0, 255, (40, 32, 32, 3), dtype=np.uint8)
    source = datasets.Dataset.from_dict(
        {"image": list(pixels), "label": [i % 10 for i in range(40)]},
        features=datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(num_classes=10)}),
    )
    view = ImageView(source, range(40), Preprocessing(32, 1.0, "bilinear", (0.5,) * 3, (0.25,) * 3))
    model = JEIDNNForImageClassification.from_backbone_pretrained(**CIFAR, weights=weights)
    arguments = JEIDNNTrainingArguments(
        str(folder), recipe="paper", num_train_epochs=2, warmup_epochs=1, per_device_train_batch_size=20,
        push_to_hub=True, hub_model_id=TRAINED, hub_always_push=True, save_strategy="epoch", use_cpu=True,
        report_to="none", disable_tqdm=True,
    )  # fmt: skip
    trainer = JEIDNNTrainer(model, arguments, view, view)
    trainer.train()
    trainer.push_to_hub()
    return model.eval()


def pull(folder: Path) -> None:
    """Loads all by id; fails where an answer is another than the pusher's."""
    load = JEIDNNForImageClassification.from_pretrained
    models = {key: load(name, **where) for key, (name, where) in LOADS.items()}
    expected, found = load_file(folder / "answers.safetensors"), all_answers(models)
    assert expected.keys() == found.keys()
    for key, value in expected.items():
        assert torch.equal(found[key], value), key
    assert classify(f"{RUNS}-lam2") == json.loads((folder / "pipeline.json").read_text())
    assert JEIDNNConfig.from_pretrained(VIT).backbone_weights == "timm"
    models["any"].save_pretrained(folder / "again")
    again = load(folder / "again")
    assert torch.equal(answers(again)["logits"], answers(models["any"])["logits"])


def faults(folder: Path, cases: str) -> None:
    """Loads or pushes, as each case says; writes what was raised, and after how long."""
    raised = {}
    for case, (call, arguments, options) in json.loads(cases).items():
        start = time.perf_counter()
        try:
            if call == "load":
                JEIDNNForImageClassification.from_pretrained(*arguments, **options)
            else:
                shake(JEIDNNForImageClassification(JEIDNNConfig(**CIFAR)), 0).push_to_hub(*arguments, **options)
            raised[case] = None
        except Exception as error:
            kinds = [kind.__name__ for kind in type(error).__mro__]
            raised[case] = {"kinds": kinds, "text": str(error), "seconds": time.perf_counter() - start}
    (folder / "raised.json").write_text(json.dumps(raised))


if __name__ == "__main__":
    main()
