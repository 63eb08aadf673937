"""The demo: a tiny ViT learns scikit-learn's 8 x 8 digits, is frozen, and gets exits by both recipes. No network."""

from __future__ import annotations

import contextlib
import io
from pathlib import Path

import datasets
import numpy as np
import PIL.Image
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from tqdm.auto import tqdm
from transformers import set_seed
from transformers.utils.logging import disable_progress_bar

from .backbones import build_model
from .data import ImageView, Preprocessing
from .evaluation import EvaluationReport, evaluate
from .feature_cache import CachedFeatures, cached_role
from .modeling_jeidnn import JEIDNNForImageClassification
from .plots import plot_frontier
from .record import ExitRecord
from .splits import Splits, make_splits
from .trainer import JEIDNNTrainer
from .training_args import JEIDNNTrainingArguments

BACKBONE = "vit_tiny_patch16_224"
BACKBONE_KWARGS = {"patch_size": 2, "embed_dim": 48, "depth": 6, "num_heads": 3}
PREPROCESSING = Preprocessing(8, 1.0, "bilinear", (0.3,), (0.35,), channels=1)
PAPER_LAMBDAS = (0.1, 0.5, 2.0)
DEFAULT_LAMBDAS = (0.003, 0.01, 0.03, 0.3)


def run_demo(output_dir: str | Path, seed: int = 0, quiet: bool = False, epochs: int = 40) -> list[dict]:
    """Trains, evaluates, prints the frontier table and writes ``frontier.png``; returns the table's rows.

    ``epochs``: of the backbone, and of the exits.
    """
    output_dir = Path(output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    set_seed(seed)
    sources = load_digits()
    labels = {name: np.asarray(rows["label"]) for name, rows in sources.items()}
    splits = make_splits("digits", labels, held_out="test", validation=250, calibration=50, num_classes=10, seed=seed)
    splits.save(output_dir / "splits.json")
    disable_progress_bar()
    weights = output_dir / "backbone.safetensors"
    train_backbone(sources, splits, weights, epochs=epochs, quiet=quiet)

    curves: dict[str, list[EvaluationReport]] = {"paper": [], "default": []}
    for lam in tqdm(PAPER_LAMBDAS, desc="paper's recipe, one training per lambda", disable=quiet):
        folder = output_dir / f"paper-lam{lam:g}"
        model, record = _train_exits("paper", weights, sources, splits, folder, seed, epochs, lam=lam)
        curves["paper"].append(evaluate(record, model.policy, lam))
    if not quiet:
        print("default recipe, one training for every lambda")
    model, record = _train_exits("default", weights, sources, splits, output_dir / "default", seed, epochs)
    curves["default"] = [evaluate(record, model.policy, lam) for lam in DEFAULT_LAMBDAS]

    accuracy = float((record_native(sources, splits, model) == record.labels).float().mean())
    rows = [{"recipe": "frozen backbone", "lambda": None, "accuracy": accuracy, "mul_adds": 1.0, "share_by_exit": None}]
    for recipe, reports in curves.items():
        for report in reports:
            rows.append(
                {
                    "recipe": recipe,
                    "lambda": report.lam,
                    "accuracy": report.accuracy,
                    "mul_adds": report.normalised_mul_adds,
                    "share_by_exit": report.share_by_exit,
                }
            )
    plot_frontier(
        {"paper's recipe": curves["paper"], "default recipe": curves["default"]},
        output_dir / "frontier.png",
        backbone_accuracy=accuracy,
        title="digits, frozen ViT of 6 blocks",
    )
    if not quiet:
        print_table(rows)
        print(f"figure: {output_dir / 'frontier.png'}; models: {output_dir / 'default'}, {output_dir / 'paper-lam*'}")
    return rows


def load_digits() -> dict[str, datasets.Dataset]:
    """1,797 grey digits of 8 x 8 pixels: 1,000 to train on, 797 held out, in a fixed random order."""
    from sklearn.datasets import load_digits as sklearn_digits

    digits = sklearn_digits()
    order = np.random.default_rng(0).permutation(len(digits.target))
    pixels = (digits.images[order] * (255 / 16)).round().astype(np.uint8)
    features = datasets.Features(
        {"image": datasets.Image(), "label": datasets.ClassLabel(names=[str(d) for d in range(10)])}
    )

    def rows(part: slice) -> datasets.Dataset:
        pictures = []
        for picture in pixels[part]:
            buffer = io.BytesIO()
            PIL.Image.fromarray(picture).save(buffer, format="PNG")
            pictures.append({"bytes": buffer.getvalue(), "path": None})
        return datasets.Dataset.from_dict({"image": pictures, "label": digits.target[order][part]}, features=features)

    return {"train": rows(slice(0, 1000)), "test": rows(slice(1000, None))}


def train_backbone(sources, splits: Splits, path: Path, *, epochs: int, quiet: bool) -> None:
    """Trains the tiny ViT on the training digits with a little noise, and stores its weights."""
    model = build_model(BACKBONE, num_classes=10, image_size=8, num_channels=1, **BACKBONE_KWARGS)
    images = ImageView(sources["train"], splits.roles["train"][1], PREPROCESSING)
    batch = images.__getitems__(range(len(images)))
    pixels, labels = batch["pixel_values"], batch["labels"]
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3, weight_decay=0.05, betas=(0.9, 0.98))
    steps = epochs * (len(labels) // 50)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=steps, pct_start=0.15)
    for _ in tqdm(range(epochs), desc="backbone, epochs", disable=quiet):
        for rows in torch.randperm(len(labels)).split(50)[: len(labels) // 50]:
            noisy = pixels[rows] + 0.2 * torch.randn_like(pixels[rows])
            loss = F.cross_entropy(model(noisy), labels[rows])
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
    save_file(model.state_dict(), path)


def _train_exits(recipe: str, weights: Path, sources, splits: Splits, folder: Path, seed: int, epochs: int, **config):
    """One training; the model is saved in ``folder``. Returns it with its record of the test digits."""
    set_seed(seed)
    model = JEIDNNForImageClassification.from_backbone_pretrained(
        BACKBONE, 10, weights, recipe=recipe, image_size=8, num_channels=1, backbone_kwargs=BACKBONE_KWARGS,
        preprocessing=PREPROCESSING.to_dict(), head_dim=64, **config,
    )  # fmt: skip
    train, validation, test = (_features(model, sources, splits, r) for r in ("train", "validation", "test"))
    paper = {"warmup_epochs": max(1, epochs // 4), "bi_switch": 40}
    schedule = paper if recipe == "paper" else {"per_device_train_batch_size": 100}
    args = JEIDNNTrainingArguments(
        output_dir=str(folder / "checkpoints"), recipe=recipe, seed=seed, report_to="none", save_strategy="no",
        disable_tqdm=True, logging_strategy="no", num_train_epochs=epochs, **schedule,
    )  # fmt: skip
    trainer = JEIDNNTrainer(model, args, train, validation)
    with contextlib.redirect_stdout(io.StringIO()):
        trainer.train()
    model.save_pretrained(folder)
    return model, ExitRecord.of(model, test, splits.info("test"))


def _features(model, sources, splits: Splits, role: str) -> CachedFeatures:
    cache = Path(model.config.backbone_weights).parent / "cache"
    return cached_role(model.backbone, sources, splits, role, PREPROCESSING, cache, dtype=torch.float32)


def record_native(sources, splits: Splits, model) -> torch.Tensor:
    """The frozen backbone's own predictions on the test digits, ``(N,)``."""
    width = model.backbone.exit_dims[-1]
    return _features(model, sources, splits, "test").views[0].features[:, -width:].argmax(1)


def print_table(rows: list[dict]) -> None:
    exits = len(next(row["share_by_exit"] for row in rows if row["share_by_exit"]))
    print(f"{'recipe':<16} {'lambda':>6} {'accuracy':>9} {'Mul-Adds':>9}   share of samples (%) by exit 1..{exits}")
    for row in rows:
        lam = "" if row["lambda"] is None else f"{row['lambda']:g}"
        shares = "  ".join(f"{100 * share:4.1f}" for share in row["share_by_exit"] or [])
        print(f"{row['recipe']:<16} {lam:>6} {100 * row['accuracy']:>8.2f}% {row['mul_adds']:>9.3f}   {shares}")
