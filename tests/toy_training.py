"""A small network and random features of four classes, for tests of trainings."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.data import Dataset
from transformers import TrainerCallback, set_seed

from jeidnn_hf import JEIDNNConfig, JEIDNNForImageClassification, JEIDNNTrainer, JEIDNNTrainingArguments

CLASSES = 4


def toy_model(**options) -> JEIDNNForImageClassification:
    """Four exits with linear IMs; the first features tell the classes least."""
    set_seed(0)
    config = JEIDNNConfig(
        backbone="resnet20_cifar", num_labels=CLASSES, image_size=16, exit_stages=[1, 4, 6, 8],
        **{"recipe": "paper", "lam": 0.5, "head_dim": 8, **options},
    )  # fmt: skip
    return JEIDNNForImageClassification(config)


class ToyFeatures(Dataset):
    def __init__(self, exit_dims: tuple[int, ...], samples: int, seed: int):
        random = torch.Generator().manual_seed(seed)
        centres = torch.randn(CLASSES, sum(exit_dims), generator=torch.Generator().manual_seed(99))
        signal = torch.cat([torch.full((d,), 0.2 + 0.2 * l) for l, d in enumerate(exit_dims)])
        self.labels = torch.arange(samples) % CLASSES
        self.features = signal * centres[self.labels] + torch.randn(samples, sum(exit_dims), generator=random)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitems__(self, rows) -> dict[str, Tensor]:
        rows = torch.as_tensor(rows)
        return {"exit_features": self.features[rows], "labels": self.labels[rows], "index": rows}


def toy_trainer(model, folder, callbacks=None, **options) -> JEIDNNTrainer:
    """Ten steps in two epochs."""
    defaults = {
        "im_training": "plain", "num_train_epochs": 2, "per_device_train_batch_size": 32, "gate_steps": 5, "seed": 1,
        "report_to": "none", "disable_tqdm": True, "save_strategy": "no", "use_cpu": True, "learning_rate": 0.02,
    }  # fmt: skip
    args = JEIDNNTrainingArguments(output_dir=str(folder), **{**defaults, **options})
    train, validation = (ToyFeatures(model.backbone.exit_dims, n, seed) for seed, n in enumerate([160, 80]))
    return JEIDNNTrainer(model, args, train, validation, callbacks=callbacks)


def trained(folder, model_options=None, resume: str | None = None, **options) -> dict[str, Tensor]:
    """What the exits and gates have become."""
    model = toy_model(**model_options or {})
    toy_trainer(model, folder, **options).train(resume_from_checkpoint=resume)
    return exit_state(model)


def batch_of(model, samples: int = 24) -> tuple[tuple[Tensor, ...], Tensor]:
    """Features of every exit, and labels."""
    data = ToyFeatures(model.backbone.exit_dims, samples, seed=7)
    return model.split_features(data.features), data.labels


def exit_state(model) -> dict[str, Tensor]:
    return {k: v.clone() for k, v in model.state_dict().items() if not k.startswith("backbone.")}


def differing(a: dict[str, Tensor], b: dict[str, Tensor]) -> list[str]:
    assert a.keys() == b.keys()
    return [name for name in a if not torch.equal(a[name], b[name])]


class StopAtSave(TrainerCallback):
    def on_save(self, args, state, control, **kwargs):
        control.should_training_stop = True
