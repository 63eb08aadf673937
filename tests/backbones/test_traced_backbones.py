"""Networks without a family of their own: cut by tracing, early exits on them, and a refusal with its reason."""

import pytest
import torch

from jeidnn_hf import JEIDNNConfig, JEIDNNForImageClassification
from jeidnn_hf.backbones import build_model, select, staged_backbone
from jeidnn_hf.backbones.timm_generic import TracedBackbone

MODELS = {  # image side
    "densenet121": 64,
    "vgg11": 32,
    "test_mambaout": 64,
    "rexnet_100": 64,
    "edgenext_xx_small": 64,
    "ghostnet_100": 64,
    "inception_v3": 96,
    "dla34": 64,
    "focalnet_tiny_srf": 64,
    "mixer_s32_224": 224,
    "pvt_v2_b0": 64,
    "test_nfnet": 64,
}


@pytest.mark.parametrize("name", MODELS)
def test_the_stages_chained_are_the_network_and_rows_can_leave(name):
    side = MODELS[name]
    torch.manual_seed(0)
    backbone = staged_backbone(build_model(name, num_classes=7, image_size=side), image_size=side)
    assert isinstance(backbone, TracedBackbone) and backbone.num_exits >= 4
    pixels = torch.randn(4, 3, side, side)
    before = {key: value.clone() for key, value in backbone.state_dict().items()}
    with torch.inference_mode():
        expected, features = backbone.train().model(pixels), backbone(pixels)
        torch.testing.assert_close(features[-1], expected, rtol=1e-5, atol=1e-5)
        assert [z.shape[1] for z in features] == list(backbone.exit_dims)
        state = backbone.stem(pixels)
        for l in range(backbone.num_exits):
            state = backbone.stage(l, state)
            if l in (0, backbone.num_exits // 2):
                state = select(state, torch.tensor([0, 2, 3]) if l == 0 else torch.tensor([1, 2]))
        survivors = backbone.exit_feature(backbone.num_exits - 1, state)
    torch.testing.assert_close(survivors, expected[2:], rtol=1e-3, atol=1e-4 * float(expected.abs().max()))
    assert all(torch.equal(before[key], value) for key, value in backbone.state_dict().items())


@pytest.mark.parametrize("name", ["densenet121", "test_mambaout", "edgenext_xx_small", "rexnet_100"])
def test_a_model_on_it_exits_early_and_comes_back_from_disk(name, tmp_path):
    torch.manual_seed(0)
    options = {"recipe": "paper", "gate_form": "stick", "exit_pooling": ["avg1"]}
    model = JEIDNNForImageClassification(JEIDNNConfig(backbone=name, num_labels=7, image_size=MODELS[name], **options))
    model, pixels = model.eval(), torch.randn(24, 3, MODELS[name], MODELS[name])
    with torch.inference_mode():
        model.policy.gates.weight *= 1000
        gates = model.policy.gate_logits(model(pixels, output_all_exits=True).all_logits, model.config.lam)
        model.policy.gates.bias -= gates.quantile(0.7, dim=0)  # at each exit a third of the pictures pass 0.5
        every = model(pixels, output_all_exits=True)
        seen, stage = [], model.backbone.stage
        model.backbone.stage = lambda l, state: (seen.append(len(state[0])), stage(l, state))[1]
        early = model(pixels)
        del model.backbone.stage
    assert len(every.exit_index.unique()) > 2
    assert torch.equal(early.exit_index, every.exit_index)
    torch.testing.assert_close(early.logits, every.logits, rtol=1e-3, atol=1e-4)
    staying = [int((every.exit_index >= l).sum()) for l in range(model.backbone.num_exits)]
    assert seen == [count for count in staying if count]
    model.save_pretrained(tmp_path)
    again = JEIDNNForImageClassification.from_pretrained(tmp_path)
    with torch.inference_mode():
        torch.testing.assert_close(again(pixels).logits, early.logits, rtol=1e-6, atol=1e-6)
    for (key, value), (_, other) in zip(model.named_buffers(), again.named_buffers(), strict=True):
        assert torch.equal(value, other), key


class Plain(torch.nn.Module):
    """A network without blocks."""

    num_classes = 7

    def __init__(self):
        super().__init__()
        self.conv, self.head = torch.nn.Conv2d(3, 8, 3, padding=1), torch.nn.Linear(8, 7)

    def forward_features(self, x):
        return self.conv(x)

    def forward(self, x):
        return self.head(self.forward_features(x).mean((2, 3)))


def test_a_network_that_cannot_be_cut_is_refused_with_the_reason():
    with pytest.raises(ValueError, match=r"^Expected a network that can lose samples on its way, but got Plain: .+\.$"):
        staged_backbone(Plain(), image_size=32)
