"""Early exit under autocast and torch.compile, and how often it asks the device."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from jeidnn_hf import JEIDNNConfig, JEIDNNForImageClassification, early_exit

PICTURES = torch.randn(16, 3, 32, 32, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    model = JEIDNNForImageClassification(JEIDNNConfig(backbone="resnet20_cifar", num_labels=10)).eval()
    with torch.no_grad():
        leaving = model(PICTURES, output_all_exits=True)
        for l in range(8):  # the gate of each exit opens for about a third of the images
            logits = model.policy.gate_logits(leaving.all_logits, model.config.current_lam)[:, l]
            model.policy.gates.bias[l] -= logits.quantile(0.66)
        assert len(model(PICTURES).exit_index.unique()) > 4
    return model


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.no_grad()
def test_autocast(model, dtype):
    """Random exits differ less in what they answer than such types can tell, so the gates are as good as hard here."""
    biases = model.policy.gates.bias.clone()
    model.policy.gates.bias.copy_(torch.tensor([-30.0, -30, -30, 30, -30, -30, -30, -30]))
    plain = model(PICTURES)
    with torch.autocast("cpu", dtype=dtype):
        early, full = model(PICTURES), model(PICTURES, output_all_exits=True)
    model.policy.gates.bias.copy_(biases)
    assert early.logits.dtype is torch.float32 and early.exit_index.eq(3).all() and full.exit_index.eq(3).all()
    torch.testing.assert_close(early.logits, full.logits, rtol=0.05, atol=0.05)
    torch.testing.assert_close(early.logits, plain.logits, rtol=0.1, atol=0.1)
    assert not early.logits.equal(plain.logits)


@torch.no_grad()
def test_autocast_of_the_papers_recipe():
    """Linear exits answer in the lower precision there; the gates read it."""
    torch.manual_seed(0)
    model = JEIDNNForImageClassification(JEIDNNConfig(backbone="resnet20_cifar", num_labels=10, recipe="paper")).eval()
    model.policy.gates.bias.copy_(torch.tensor([-30.0, -30, -30, 30, -30, -30, -30, -30]))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        early, full = model(PICTURES), model(PICTURES, output_all_exits=True)
    assert early.exit_index.eq(3).all() and full.exit_index.eq(3).all()
    torch.testing.assert_close(early.logits, full.logits, rtol=0.05, atol=0.05)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@torch.no_grad()
def test_torch_compile(model, backend):
    plain = model(PICTURES)
    compiled = torch.compile(model, backend=backend)
    for output in (compiled(PICTURES), compiled(PICTURES, output_all_exits=True)):
        assert output.exit_index.equal(plain.exit_index)
        torch.testing.assert_close(output.logits, plain.logits, rtol=1e-4, atol=1e-5)


class Asked(TorchDispatchMode):
    """Counts what makes a program wait for its device."""

    waiting = torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function in self.waiting
        return function(*args, **(kwargs or {}))

    def __enter__(self):
        self.count = 0
        return super().__enter__()


@torch.no_grad()
def test_the_device_is_asked_once_at_each_exit(model, monkeypatch):
    lists = []
    monkeypatch.setattr(early_exit, "LARGEST_BATCH", 0)
    monkeypatch.setattr(torch.Tensor, "tolist", lambda t, of=torch.Tensor.tolist: lists.append(t) or of(t))
    expected = model(PICTURES).exit_index  # what is folded once is folded now
    lists.clear()
    with Asked() as asked:
        output = model(PICTURES)
    assert output.exit_index.equal(expected) and output.exit_index.max() == 8
    assert asked.count + len(lists) == 8  # the last exit has nothing to ask

    model.set_active_exits([3, 8])
    model(PICTURES)
    lists.clear()
    with Asked() as asked:
        model(PICTURES)
    assert asked.count + len(lists) == 1
    model.set_active_exits(None)


@torch.no_grad()
def test_rows_keep_their_memory_layout(model, monkeypatch):
    from jeidnn_hf.backbones import select

    state = model.backbone.stem(PICTURES)
    assert state.is_contiguous(memory_format=torch.channels_last)
    kept = select(state, torch.tensor([3, 5]))
    assert kept.is_contiguous(memory_format=torch.channels_last) and kept.equal(state[[3, 5]])
