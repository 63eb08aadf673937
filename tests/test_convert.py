"""Checkpoints of the T2T-ViT authors and of the original JEI-DNN code become ours."""

import pytest
import torch

from jeidnn_hf import JEIDNNForImageClassification
from jeidnn_hf.backbones import build_model
from jeidnn_hf.backbones.loading import read_state_dict
from jeidnn_hf.cli import main
from jeidnn_hf.convert import convert
from jeidnn_hf.exits import exit_decision, exit_probability, uncertainty_statistics


@pytest.fixture(scope="module")
def network():
    """Random, with weights large enough that pictures differ by the time they reach the class token."""
    torch.manual_seed(0)
    model = build_model("t2t_vit_7", num_classes=10, image_size=32).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 2:
                parameter.normal_(std=(0.25 if "kqv" in name else 1.5) * parameter.shape[1] ** -0.5)
    return model


@pytest.fixture(scope="module")
def exits():
    """As the original code stores them: heads and gates of blocks 0..5, statistics in its own order."""
    generator = torch.Generator().manual_seed(1)
    state = {}
    for l in range(6):
        state[f"intermediate_heads.{l}.weight"] = 0.08 * torch.randn(10, 256, generator=generator)
        state[f"intermediate_heads.{l}.bias"] = torch.randn(10, generator=generator)
        state[f"gates.{l}.linear.weight"] = 3 * torch.randn(1, 4, generator=generator)
        state[f"gates.{l}.linear.bias"] = torch.randn(1, generator=generator) - 1
    return state


@pytest.mark.parametrize("wrap", [dict, lambda s: {"state_dict_ema": s, "epoch": 3}, lambda s: {"net": s, "acc": 0.9}])
def test_a_t2t_checkpoint_becomes_a_backbone(network, tmp_path, wrap):
    prefix = "module." if wrap is not dict else ""
    torch.save(wrap({prefix + key: value for key, value in network.state_dict().items()}), tmp_path / "t2t.pth")
    assert "10 classes, 32 px" in convert(tmp_path / "t2t.pth", tmp_path / "out", "t2t_vit_7")
    written = str(tmp_path / "out" / "backbone.safetensors")
    model = build_model("t2t_vit_7", num_classes=10, image_size=32, weights=written)
    pixels = torch.randn(3, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(model.eval()(pixels), network(pixels))
    assert not (tmp_path / "out" / "config.json").exists()


def test_a_jeidnn_checkpoint_becomes_a_model_that_leaves_where_the_original_does(network, exits, tmp_path, capsys):
    pixels, logits, gates, exits = torch.randn(40, 3, 32, 32), [], [], dict(exits)
    with torch.no_grad():
        tokens = network.embed(pixels)
        for l in range(6):
            tokens = network.blocks[l](tokens)
            head = exits[f"intermediate_heads.{l}.weight"], exits[f"intermediate_heads.{l}.bias"]
            logits.append(network.norm(tokens)[:, 0] @ head[0].T + head[1])
            top, entropy, power_entropy, margin = uncertainty_statistics(logits[-1].softmax(-1)).unbind(-1)
            gate = torch.stack([top, entropy, margin, power_entropy], -1) @ exits[f"gates.{l}.linear.weight"][0]
            exits[f"gates.{l}.linear.bias"] = -gate.quantile(0.8, keepdim=True)  # a fifth of the pictures pass 0.5
            gates.append(gate + exits[f"gates.{l}.linear.bias"])
        logits.append(network(pixels))
    chosen = exit_decision(exit_probability(torch.stack(gates, 1).sigmoid()))
    assert len(chosen.unique()) > 2

    state = {f"module.{key}": value for key, value in {**network.state_dict(), **exits}.items()}
    torch.save({"net": state}, tmp_path / "jei.pth")
    command = ["convert", str(tmp_path / "jei.pth"), str(tmp_path / "out"), "--backbone", "t2t_vit_7", "--lam", "0.7"]
    assert main(command) == 0
    assert "lambda 0.7" in capsys.readouterr().out
    model = JEIDNNForImageClassification.from_pretrained(tmp_path / "out")
    assert model.config.lam == 0.7 and model.config.recipe == "paper"
    assert "backbone.model.head.weight" not in read_state_dict(tmp_path / "out" / "model.safetensors")
    with torch.no_grad():
        output = model(pixels)
    assert torch.equal(output.exit_index, chosen)
    expected = torch.stack(logits, 1)[torch.arange(40), chosen]
    torch.testing.assert_close(output.logits, expected, rtol=1e-4, atol=1e-4)


def test_what_cannot_be_converted(network, exits, tmp_path):
    torch.save({**network.state_dict(), **exits}, tmp_path / "jei.pth")
    with pytest.raises(ValueError, match="Expected the lambda that this JEI-DNN checkpoint was trained with"):
        convert(tmp_path / "jei.pth", tmp_path / "out", "t2t_vit_7")
    lacking = {k: v for k, v in exits.items() if k != "gates.3.linear.bias"}
    torch.save({**network.state_dict(), **lacking}, tmp_path / "lacking.pth")
    with pytest.raises(ValueError, match="Expected 6 gates in the checkpoint, but there is no 'gates.3.linear.bias'"):
        convert(tmp_path / "lacking.pth", tmp_path / "out", "t2t_vit_7", lam=1.0)
    torch.save({"foo.weight": torch.zeros(3)}, tmp_path / "other.pth")
    with pytest.raises(ValueError, match=r"Expected a T2T-ViT checkpoint with 'pos_embed', but got .*foo.weight"):
        convert(tmp_path / "other.pth", tmp_path / "out", "t2t_vit_7")
    with pytest.raises(ValueError, match=r"Expected the tensors of T2TViT .*, but these differ: blocks.10"):
        convert(tmp_path / "jei.pth", tmp_path / "out", "t2t_vit_14", lam=1.0)
