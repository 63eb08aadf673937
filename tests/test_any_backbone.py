"""The whole model on one network of every family, and on networks that are only traced, with random weights."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

from jeidnn_hf import JEIDNNConfig, JEIDNNForImageClassification, JEIDNNTrainer, JEIDNNTrainingArguments
from jeidnn_hf.backbones.staged import _FAMILIES
from jeidnn_hf.backbones.timm_generic import TracedBackbone
from jeidnn_hf.exits import exit_mass
from jeidnn_hf.modeling_jeidnn import JEIDNNOutput
from jeidnn_hf.trainer import Phase
from networks import spread_out

SMALL_SWIN = {"depths": (1, 1, 2, 1), "embed_dim": 24, "num_heads": (1, 2, 3, 6)}
FAMILIES = {  # timm's class: model, image size, options
    "VisionTransformer": ("test_vit", 32, {}),
    "VisionTransformerDistilled": ("deit_tiny_distilled_patch16_224", 48, {"depth": 3}),
    "Eva": ("eva02_tiny_patch14_224", 56, {"depth": 3}),
    "Beit": ("beit_base_patch16_224", 48, {"depth": 3, "embed_dim": 96, "num_heads": 3}),
    "Hiera": ("hiera_tiny_224", 64, {"stages": (1, 1, 1, 1), "embed_dim": 24}),
    "SwinTransformer": ("swin_tiny_patch4_window7_224", 56, SMALL_SWIN),
    "ResNet": ("test_resnet", 32, {}),
    "MobileNetV3": ("mobilenetv3_small_050", 64, {}),
    "EfficientNet": ("test_efficientnet", 32, {}),
    "ConvNeXt": ("test_convnext", 32, {}),
    "RepVit": ("repvit_m0_9", 32, {"depth": (1, 1, 1, 1)}),
    "EfficientFormerV2": ("efficientformerv2_s0", 64, {"depths": (1, 1, 1, 2)}),
    "ByobNet": ("test_byobnet", 32, {}),
    "RegNet": ("regnetx_002", 32, {}),
    "T2TViT": ("t2t_vit_7", 32, {"depth": 3, "embed_dim": 64}),
    "CifarResNet": ("resnet20_cifar", 16, {}),
}
TRACED = {
    "densenet": ("densenet121", 64, {"growth_rate": 8, "block_config": (2, 2, 2, 2)}),
    "edgenext": ("edgenext_xx_small", 64, {}),
    "ghostnet": ("ghostnet_050", 64, {}),
    "starnet": ("starnet_s050", 64, {}),
    "mambaout": ("test_mambaout", 64, {}),
    "vit_relpos": ("test_vit_relpos", 64, {}),
    "xcit": ("xcit_nano_12_p8_224", 32, {"depth": 3}),
    "swinv2": ("swinv2_tiny_window8_256", 64, SMALL_SWIN | {"window_size": 4}),  # maps with the channels last
    "twins": ("twins_svt_small", 32, {"depths": (1, 1, 1, 1)}),
    "pit": ("pit_ti_224", 64, {}),  # a map and a class token
    "tnt": ("tnt_s_legacy_patch16_224", 32, {"depth": 3}),  # 16 rows of inner tokens an image
    "hrnet": ("hrnet_w18_small", 64, {}),  # two to four maps at a time
    "coat": ("coat_tiny", 64, {"serial_depths": (1, 1, 1, 1), "parallel_depth": 1}),  # shares parameters
    "efficientvim": ("efficientvim_m1", 64, {}),  # every stage's hidden state goes to the head
}
NETWORKS = FAMILIES | TRACED
BATCH = 24
VIEWS = {cls.__name__: view for cls, view in _FAMILIES.items() if cls.__module__.startswith(("timm.", "jeidnn_hf."))}


def make(network: str, recipe: str) -> JEIDNNForImageClassification:
    """Rich exits on a network whose images differ all the way through; no gate is set yet."""
    name, size, options = NETWORKS[network]
    torch.manual_seed(0)
    model = JEIDNNForImageClassification(
        JEIDNNConfig(
            backbone=name, num_labels=7, image_size=size, recipe=recipe, head_dim=16, backbone_kwargs=options or None
        )
    )
    spread_out(model.backbone.model, images(network))
    return model.eval()


@pytest.fixture(scope="module", params=[f"{n}-{r}" for n in NETWORKS for r in ("paper", "default")])
@torch.no_grad()
def ready(request) -> tuple[JEIDNNForImageClassification, Tensor, JEIDNNOutput]:
    """A model with gates that let some images out at every exit, the images, and what all its exits say of them."""
    network, recipe = request.param.split("-")
    model, x = make(network, recipe), images(network)
    assert type(model.backbone) is (VIEWS[network] if network in FAMILIES else TracedBackbone)
    features = model.backbone(x)
    means, stds = zip(*((z.mean(0), z.std(0)) for z in features[:-1]), strict=True)
    if model.heads.norms is not None:
        model.heads.set_feature_statistics(means, stds)
    else:
        for head, mean, std in zip(model.heads.modules_by_exit, means, stds, strict=True):
            head.weight.normal_().div_(std.norm() + 1e-12)
            head.bias.copy_(-head.weight @ mean)
    if model.heads.ensemble is not None:
        model.heads.ensemble.weight.copy_(torch.rand_like(model.heads.ensemble.weight) + 0.2)
    set_gates(model, model.heads(features))
    return model, x, model(x, output_all_exits=True)


def images(network: str, batch: int = BATCH) -> Tensor:
    size = NETWORKS[network][1]
    return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(1))


def set_gates(model: JEIDNNForImageClassification, logits: Tensor) -> None:
    """Biases that let a share of those who come to an exit out, the cut in the widest gap between two images."""
    policy, remaining = model.policy, torch.ones(len(logits))
    here = torch.ones(len(logits), dtype=torch.bool)
    for l, gate in enumerate(policy.gate_logits(logits, model.config.current_lam).unbind(1)):
        opens_at = (remaining / 2).logit() if policy.form == "min" else 0.0  # where P(E^l) is 0.5
        ranked = (gate - opens_at)[here].sort(descending=True).values
        window = max(1, 2 * len(ranked) // (policy.num_exits - l + 1))
        widest = int((ranked[:window] - ranked[1 : window + 1]).argmax())
        cut = (ranked[widest] + ranked[widest + 1]) / 2
        policy.gates.bias[l] -= cut
        here &= gate - opens_at < cut
        remaining -= exit_mass((gate - cut).sigmoid(), remaining, policy.form)


@contextmanager
def rows_seen(model: JEIDNNForImageClassification) -> Iterator[list[tuple[int, int]]]:
    """(exit, rows of every tensor in the state) of each stage that runs meanwhile."""
    seen, stage = [], model.backbone.stage

    def counting(l: int, state):
        (rows,) = {len(tensor) for tensor in (state if isinstance(state, tuple) else (state,))}
        seen.append((l, rows))
        return stage(l, state)

    model.backbone.stage = counting
    try:
        yield seen
    finally:
        del model.backbone.stage


def assert_same_answers(early: JEIDNNOutput, full: JEIDNNOutput, rows: slice = slice(None)) -> None:
    assert torch.equal(early.exit_index, full.exit_index[rows])
    assert torch.equal(early.logits.argmax(-1), full.logits[rows].argmax(-1))
    assert torch.equal(early.mul_adds, full.mul_adds[rows])
    assert (early.logits - full.logits[rows]).abs().max() <= 1e-4 * full.logits.abs().max()


def test_every_family_is_here():
    assert VIEWS.keys() == FAMILIES.keys()


@torch.no_grad()
def test_leaving_early_says_the_same_and_costs_only_the_rows_that_stay(ready):
    model, x, full = ready
    exits = model.backbone.num_exits
    assert full.logits.std(0).min() > 1e-3 * full.logits.abs().max()  # the images differ in their answers
    assert (full.exit_index.bincount(minlength=exits) > 0).all()
    with rows_seen(model) as seen:
        early = model(x)
    assert_same_answers(early, full)
    assert seen == [(l, int((full.exit_index >= l).sum())) for l in range(exits)]

    for row in (0, int(full.exit_index.argmax())):  # alone
        with rows_seen(model) as seen:
            early = model(x[row : row + 1])
        assert_same_answers(early, full, slice(row, row + 1))
        assert seen == [(l, 1) for l in range(int(full.exit_index[row]) + 1)]

    bias = model.policy.gates.bias.clone()
    for all_leave, stages in ((True, 1), (False, exits)):
        model.policy.gates.bias.copy_(bias + (1000 if all_leave else -1000))
        with rows_seen(model) as seen:
            early = model(x)
        model.policy.gates.bias.copy_(bias)
        assert early.exit_index.tolist() == [stages - 1] * BATCH
        assert seen == [(l, BATCH) for l in range(stages)]
        torch.testing.assert_close(early.logits, full.all_logits[:, stages - 1])


@torch.no_grad()
def test_a_checkpoint_is_the_model_to_the_bit(ready, tmp_path):
    model, x, _ = ready
    model.save_pretrained(tmp_path)
    loaded = JEIDNNForImageClassification.from_pretrained(tmp_path)
    for kind in ("named_parameters", "named_buffers"):
        expected, found = (dict(getattr(m, kind)(remove_duplicate=False)) for m in (model, loaded))
        assert found.keys() == expected.keys()
        assert [key for key in found if not torch.equal(found[key], expected[key])] == []
    for batch in (1, 5, BATCH):
        for every in (None, True):
            expected, found = (m(x[:batch], output_all_exits=every) for m in (model, loaded))
            assert found.keys() == expected.keys()
            assert [key for key in found if not torch.equal(found[key], expected[key])] == []


class Pixels(torch.utils.data.Dataset):
    """Random images with labels 0..6 in turn."""

    def __init__(self, network: str, rows: int):
        self.pixels, self.labels = images(network, rows), torch.arange(rows) % 7

    def __len__(self) -> int:
        return len(self.labels)

    def __getitems__(self, rows) -> dict[str, Tensor]:
        rows = torch.as_tensor(rows)
        return {"pixel_values": self.pixels[rows], "labels": self.labels[rows]}


@pytest.mark.parametrize("network", NETWORKS)
def test_training_leaves_the_backbone_as_it_was_to_the_bit(network, tmp_path, monkeypatch):
    model, phases = make(network, "paper"), []
    before = {name: tensor.clone() for name, tensor in tensors(model)}
    args = JEIDNNTrainingArguments(
        output_dir=str(tmp_path), recipe="paper", num_train_epochs=3, warmup_epochs=1, bi_switch=1, seed=1,
        per_device_train_batch_size=7, report_to="none", disable_tqdm=True, save_strategy="no", logging_strategy="no",
        use_cpu=True,
    )  # fmt: skip
    trainer = JEIDNNTrainer(model, args, Pixels(network, 14), Pixels(network, 7))
    loss = trainer.im_training.loss
    monkeypatch.setattr(
        trainer.im_training, "loss", lambda *rest, phase, lam: (phases.append(phase), loss(*rest, phase, lam))[1]
    )
    trainer.train()
    trainer.evaluate()
    assert phases == [Phase.WARMUP] * 2 + [Phase.GATE, Phase.IM] * 2
    moved = {name.split(".")[0] for name, tensor in tensors(model) if not torch.equal(tensor, before[name])}
    assert moved == {"heads", "policy"}


def tensors(model: JEIDNNForImageClassification) -> list[tuple[str, Tensor]]:
    return [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
