"""Transfer-learns a timm model on a data set, the step before its exits are trained.

    python examples/finetune_backbone.py --config examples/configs/finetune_cifar100_lite0.yaml

The validation role is held out from training and chooses the best epoch; an interrupted run goes on where it stopped.
Writes ``backbone.safetensors`` and ``backbone.json`` (accuracy, fingerprint, what it was trained with).
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from timm.data import Mixup
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments, set_seed

from jeidnn_hf.backbones import build_model, fingerprint
from jeidnn_hf.cli import exit_status
from jeidnn_hf.data import ImageView, Preprocessing, collate
from jeidnn_hf.files import written_whole
from jeidnn_hf.run_config import DataSection, load_data, read_run_config
from jeidnn_hf.trainer import last_checkpoint


class Classifier(nn.Module):
    """A timm model that answers as the Trainer wants: loss and logits."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, pixel_values: Tensor, labels: Tensor) -> dict[str, Tensor]:
        # 1.5 times as many images a second of a depthwise convnet on a CPU
        logits = self.model(pixel_values.contiguous(memory_format=torch.channels_last))
        return {"loss": F.cross_entropy(logits, labels), "logits": logits}


class FreshViews(torch.utils.data.Dataset):
    """Training images, each batch in an augmented view that is new."""

    def __init__(self, images: ImageView):
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def __getitems__(self, rows: list[int]) -> dict[str, Tensor]:
        self.images.views = (int(torch.randint(2**31, ())),)
        return self.images.__getitems__(rows)


class FineTuner(Trainer):
    """The Trainer with SGD or AdamW, and mixup in training."""

    def __init__(self, *args, sgd: bool, mixup: Mixup | None, **kwargs):
        super().__init__(*args, **kwargs)
        self.sgd, self.mixup = sgd, mixup

    def create_optimizer(self, model=None):
        options = {"lr": self.args.learning_rate, "weight_decay": self.args.weight_decay}
        kind = torch.optim.SGD if self.sgd else torch.optim.AdamW
        self.optimizer = kind(self.model.parameters(), **options, **({"momentum": 0.9} if self.sgd else {}))
        return self.optimizer

    def _prepare_inputs(self, inputs):
        inputs = super()._prepare_inputs({key: inputs[key] for key in ("pixel_values", "labels")})
        if self.mixup is not None and self.model.training and len(inputs["labels"]) % 2 == 0:
            inputs["pixel_values"], inputs["labels"] = self.mixup(inputs["pixel_values"], inputs["labels"])
        return inputs


def accuracy_of(answers) -> float:
    return float(np.mean(answers.predictions.argmax(-1) == answers.label_ids))


@dataclass
class ModelSection:
    backbone: str
    weights: str | None  # null: random, to train from scratch
    image_size: int | None = None
    preprocessing: dict = field(default_factory=dict)
    optimizer: Literal["adamw", "sgd"] = "adamw"
    mixup: float = 0.0


@dataclass
class FinetuneConfig:
    output_dir: str
    data: DataSection
    model: ModelSection
    training: TrainingArguments


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, required=True)
    parser.add_argument("--output_dir", type=Path, help="instead of the config's")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    options = parser.parse_args(argv)
    return exit_status("finetune_backbone.py", lambda: finetune(options), debug=options.debug)


def finetune(options: argparse.Namespace) -> None:
    config = read_run_config(options.config, FinetuneConfig, options.output_dir)
    output_dir = Path(config["output_dir"])
    data, choice = config["data"], config["model"]
    sources, splits = load_data(data)
    num_classes = sources["train"].features["label"].num_classes

    set_seed(config["training"].get("seed", 42))
    name, side = choice["backbone"], choice.get("image_size")
    model = build_model(name, num_classes=0, image_size=side, weights=choice["weights"])
    model.reset_classifier(num_classes)
    preprocessing = Preprocessing.of_backbone(name, side, changes=choice.get("preprocessing"))
    images = {
        role: ImageView(sources[source], rows, preprocessing) for role, (source, rows) in splits.roles.items()
    }  # fmt: skip

    defaults = {
        "output_dir": str(output_dir / "checkpoints"), "remove_unused_columns": False, "eval_strategy": "epoch",
        "save_strategy": "epoch", "save_total_limit": 2, "load_best_model_at_end": True,
        "metric_for_best_model": "accuracy", "lr_scheduler_type": "cosine", "report_to": "none",
        "dataloader_pin_memory": torch.cuda.is_available(), "label_names": ["labels"],
    }  # fmt: skip
    args = TrainingArguments(**{**defaults, **config["training"]})
    mixup = Mixup(mixup_alpha=choice["mixup"], num_classes=num_classes) if choice.get("mixup") else None
    trainer = FineTuner(
        Classifier(model), args, train_dataset=FreshViews(images["train"]), eval_dataset=images["validation"],
        data_collator=collate, compute_metrics=lambda p: {"accuracy": accuracy_of(p)},
        sgd=choice.get("optimizer", "adamw") == "sgd", mixup=mixup,
    )  # fmt: skip
    trainer.train(resume_from_checkpoint=last_checkpoint(args.output_dir))

    predictions = trainer.predict(images["test"])
    accuracy = accuracy_of(predictions)
    state = {key: value.detach().cpu().contiguous() for key, value in model.state_dict().items()}
    report = {
        "backbone": name, "fingerprint": fingerprint(state), "validation_accuracy": trainer.state.best_metric,
        "test_accuracy": accuracy, "preprocessing": preprocessing.to_dict(), "config": config,
    }  # fmt: skip
    with written_whole(output_dir) as temporary:
        save_file(state, temporary / "backbone.safetensors")
        (temporary / "backbone.json").write_text(json.dumps(report, indent=1))
    print(f"{name}: validation accuracy {trainer.state.best_metric:.4f}, test {accuracy:.4f}; {output_dir}")


if __name__ == "__main__":
    sys.exit(main())
