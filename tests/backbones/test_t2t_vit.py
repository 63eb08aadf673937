"""T2T-ViT against the authors' code: recorded forwards with reproducible weights, and the checkpoint layout."""

from __future__ import annotations

import zlib
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from torch.nn import functional as F

from jeidnn_hf.backbones.t2t_vit import T2TViT, TokenPerformer, sinusoid_positions
from jeidnn_hf.exits import uncertainty_statistics

GOLDENS = Path(__file__).parents[1] / "goldens"
LAYOUT = np.load(GOLDENS / "t2t_state_keys.npz")
CASES = pytest.mark.parametrize(
    ("file", "name", "img_size"),
    [
        ("t2t7_forward_img32", "t2t_vit_7", 32),
        ("t2t7_forward", "t2t_vit_7", 224),
        ("t2t14_forward", "t2t_vit_14", 224),
    ],
)


def golden_values(name: str, shape: tuple[int, ...]) -> torch.Tensor:
    """The value of one named weight in the recorded forwards (float32)."""
    x = np.random.RandomState(zlib.crc32(name.encode())).standard_normal(int(np.prod(shape))).reshape(shape)
    layer = name.split(".")[-2] if "." in name else name
    if name.startswith("gates."):
        pass
    elif layer.startswith("norm"):
        x = 0.1 * x + name.endswith("weight")
    elif layer == "cls_token":
        x *= 0.5
    elif name.endswith(".w"):
        x *= 0.7
    elif name.endswith(".bias"):
        x *= 0.02
    else:
        x *= {"kqv": 0.25, "qkv": 1.5}.get(layer, 1.0) / shape[-1] ** 0.5
    return torch.from_numpy(x).float()


def golden_model(name: str, num_classes: int, img_size: int) -> T2TViT:
    model = timm.create_model(name, num_classes=num_classes, img_size=img_size).eval()
    for key, tensor in model.state_dict().items():
        if key != "pos_embed":
            tensor.copy_(golden_values(key, tuple(tensor.shape)))
    return model


def golden_images(img_size: int) -> torch.Tensor:
    return torch.from_numpy(np.random.RandomState(12345).standard_normal((2, 3, img_size, img_size))).float()


@CASES
@torch.no_grad()
def test_every_exit_matches_the_official_forward(file, name, img_size):
    golden = np.load(GOLDENS / f"{file}.npz")
    num_exits, batch, num_classes = golden["exit_logits"].shape
    model, images = golden_model(name, num_classes, img_size), golden_images(img_size)
    np.testing.assert_array_equal(images.flatten()[:8], golden["input_first8"])
    assert len(model.blocks) == num_exits

    tokens = model.tokens_to_token(images)
    assert tokens.shape == (batch, model.grid_size[0] * model.grid_size[1], model.embed_dim)
    np.testing.assert_allclose(tokens.mean(1), golden["tokens_to_token_mean"], atol=2e-5)

    hidden, logits = model.embed(images), []
    for level, block in enumerate(model.blocks):
        hidden = block(hidden)
        features = model.forward_head(model.norm(hidden), pre_logits=True)
        if level < num_exits - 1:
            weight = golden_values(f"intermediate_heads.{level}.weight", (num_classes, model.embed_dim))
            logits.append(F.linear(features, weight, golden_values(f"intermediate_heads.{level}.bias", (num_classes,))))
    logits.append(model(images))
    np.testing.assert_allclose(torch.stack(logits), golden["exit_logits"], atol=2e-5)


@CASES
def test_position_table_matches_the_official_one(file, name, img_size):
    golden, model = np.load(GOLDENS / f"{file}.npz"), timm.create_model(name, img_size=img_size)
    np.testing.assert_allclose(model.pos_embed.double().sum(), golden["pos_embed_sum"], atol=1e-3)
    np.testing.assert_allclose(model.pos_embed[0, :2, :4], golden["pos_embed_first4"], atol=1e-7)
    assert not model.pos_embed.requires_grad


def test_spot_values_of_the_golden_weights():
    model = golden_model("t2t_vit_7", 10, 32)
    np.testing.assert_allclose(model.cls_token.detach()[0, 0, :3], [0.97191948, -0.06576807, -0.37717295], atol=1e-8)
    qkv = model.blocks[0].attn.qkv.weight.detach().flatten()[:3]
    np.testing.assert_allclose(qkv, [0.10342627, 0.11603328, -0.04126350], atol=1e-8)


@pytest.mark.parametrize("file", ["t2t7_forward", "t2t14_forward", "t2t7_forward_img32"])
def test_gates_on_the_recorded_logits(file):
    golden = np.load(GOLDENS / f"{file}.npz")
    statistics = uncertainty_statistics(torch.from_numpy(golden["exit_logits"][:-1]).double().softmax(-1))
    for level, expected in enumerate(golden["gate_logits_f64"]):
        weight = golden_values(f"gates.{level}.linear.weight", (1, 4))[0, [0, 1, 3, 2]].double()
        bias = golden_values(f"gates.{level}.linear.bias", (1,)).double()
        np.testing.assert_allclose(statistics[level] @ weight + bias, expected, atol=1e-10)


@pytest.mark.parametrize(("name", "num_classes"), [("t2t_vit_7", 10), ("t2t_vit_14", 100)])
def test_state_dict_layout_is_upstreams(name, num_classes):
    model = timm.create_model(name, num_classes=num_classes)
    layout = {f"{key} {'x'.join(map(str, tensor.shape))}" for key, tensor in model.state_dict().items()}
    assert layout == set(LAYOUT[name].tolist())
    assert all(block.attn.qkv.bias is None for block in model.blocks)
    assert {key for key, _ in model.named_buffers()} == {
        "pos_embed", "tokens_to_token.attention1.w", "tokens_to_token.attention2.w"
    }  # fmt: skip


def test_performer_is_the_explicit_kernel_average():
    torch.manual_seed(0)
    layer, x = TokenPerformer(10, dim=8, num_features=16).double(), torch.randn(2, 5, 10).double()
    torch.nn.init.orthogonal_(layer.w)
    torch.nn.init.constant_(layer.kqv.bias, 1.5)  # kernel values near 1e-8: both the scale and the epsilon count
    k, q, v = layer.kqv(layer.norm1(x)).split(8, dim=-1)

    def phi(u):
        return torch.exp(layer.w @ u - u.dot(u) / 2) / 4

    rows = []
    for b in range(2):
        for i in range(5):
            scores = torch.stack([phi(q[b, i]).dot(phi(k[b, t])) for t in range(5)])
            rows.append(scores @ v[b] / (scores.sum() + 1e-8))
    out = v + layer.proj(torch.stack(rows).view(2, 5, 8))
    torch.testing.assert_close(layer(x), out + layer.mlp(layer.norm2(out)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_performer_stays_finite_when_its_kernel_underflows(dtype):
    layer = TokenPerformer(10, dim=8, num_features=16).to(dtype)
    torch.nn.init.constant_(layer.kqv.bias, 30.0)
    torch.nn.init.ones_(layer.w)
    assert layer(torch.zeros(1, 4, 10, dtype=dtype)).isfinite().all()


def test_registered_with_timm():
    assert {"t2t_vit_7", "t2t_vit_14"} <= set(timm.list_models("t2t*"))
    config = timm.data.resolve_data_config(model=timm.create_model("t2t_vit_7"))
    assert (config["input_size"], config["interpolation"], config["crop_pct"]) == ((3, 224, 224), "bicubic", 0.9)
    assert (config["mean"], config["std"]) == ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    assert timm.create_model("t2t_vit_7").num_classes == 1000


def test_classifier_can_be_replaced_and_removed():
    model, images = timm.create_model("t2t_vit_7", num_classes=10, img_size=32).eval(), torch.rand(2, 3, 32, 32)
    features = model.forward_head(model.forward_features(images), pre_logits=True)
    assert features.shape == (2, model.num_features) == (2, 256)
    torch.testing.assert_close(model(images), model.get_classifier()(features))
    model.double().reset_classifier(4)
    assert model(images.double()).shape == (2, model.num_classes) == (2, 4)
    model.float().reset_classifier(0)
    torch.testing.assert_close(model(images), features)
    with pytest.raises(ValueError, match="Expected global_pool to be 'token' but got 'avg'"):
        model.reset_classifier(4, "avg")


def test_meta_construction_then_initialisation():
    with torch.device("meta"):
        model = timm.create_model("t2t_vit_7", num_classes=10, img_size=(32, 48))
        assert sinusoid_positions(2, 4).device.type == "cpu"
    assert {tensor.device.type for tensor in model.state_dict().values()} == {"meta"}
    model.to_empty(device="cpu").init_weights()
    assert model.grid_size == (2, 3)
    torch.testing.assert_close(model.pos_embed[0, 5, 101], torch.tensor(5 / 10000 ** (100 / 256)).cos())
    w = model.tokens_to_token.attention2.w
    torch.testing.assert_close(w @ w.t(), 32 * torch.eye(32), atol=1e-4, rtol=0)
    assert model(torch.rand(1, 3, 32, 48)).isfinite().all()


@torch.no_grad()
def test_exports_with_a_dynamic_batch():
    model, images = T2TViT(img_size=32, num_classes=10, depth=1).eval(), torch.rand(3, 3, 32, 32)
    program = torch.export.export(model, (images,), dynamic_shapes=({0: torch.export.Dim("batch", min=2)},))
    torch.testing.assert_close(program.module()(images[:2]), model(images[:2]))


def test_position_table_keeps_float64_accuracy_under_another_default_dtype():
    torch.set_default_dtype(torch.bfloat16)
    try:
        model = timm.create_model("t2t_vit_7", num_classes=10, img_size=64)
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(model.pos_embed, sinusoid_positions(17, 256).bfloat16())


def test_depth_of_drop_path_and_training_gradients():
    model = timm.create_model("t2t_vit_7", num_classes=3, img_size=32, drop_path_rate=0.6, drop_rate=0.5)
    rates = [getattr(block.drop_path1, "drop_prob", 0.0) for block in model.blocks]
    assert rates == pytest.approx([0.1 * level for level in range(7)])
    model.eval()(torch.rand(2, 3, 32, 32)).sum().backward()
    assert all(p.grad is not None for p in model.parameters())


def test_checkpoint_of_another_image_size_and_class_count_loads(tmp_path):
    source = timm.create_model("t2t_vit_7", num_classes=10, img_size=64)
    torch.save({"state_dict_ema": source.state_dict()}, tmp_path / "weights.pth")
    overlay = {"file": str(tmp_path / "weights.pth"), "num_classes": 10}
    kwargs = {"pretrained": True, "pretrained_cfg_overlay": overlay, "img_size": 32}
    same = timm.create_model("t2t_vit_7", num_classes=10, **kwargs)
    assert torch.equal(same.head.weight, source.head.weight)
    assert torch.equal(same.pos_embed[:, 0], source.pos_embed[:, 0])
    assert not torch.equal(same.pos_embed, sinusoid_positions(5, 256).float())
    other = timm.create_model("t2t_vit_7", num_classes=4, **kwargs)
    assert torch.equal(other.blocks[6].mlp.fc2.weight, source.blocks[6].mlp.fc2.weight)
    assert other.head.weight.shape == (4, 256)


@pytest.mark.parametrize("img_size", [33, 0, (32, 40)])
def test_image_size_must_be_whole_patches(img_size):
    with pytest.raises(ValueError, match="Expected img_size to be a positive multiple of 16 but got"):
        T2TViT(img_size=img_size)


@pytest.mark.parametrize("shape", [(2, 3, 48, 32), (2, 1, 32, 32), (3, 32, 32)])
def test_input_must_have_the_configured_shape(shape):
    model = T2TViT(img_size=32, depth=1)
    with pytest.raises(ValueError, match=r"Expected images of shape \(batch, 3, 32, 32\) but got \("):
        model(torch.zeros(shape))
