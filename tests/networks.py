"""Networks with random weights for tests of several rooms."""

import torch
from torch import Tensor, nn

from jeidnn_hf.backbones import select


@torch.no_grad()
def spread_out(model: nn.Module, images: Tensor | None = None) -> nn.Module:
    """Random parameters of a size that keeps images apart: zeros and tiny layer scales would hide mistakes.

    ``images``: what batch normalisations take their statistics from, which are random without.
    """
    torch.manual_seed(0)
    for parameter in model.parameters():
        if parameter.dim() < 2:
            centre = 1.0 if parameter.numel() and parameter.max() > 0 else 0.0
            parameter.copy_(centre + 0.2 * torch.randn(parameter.shape))
        else:
            parameter.normal_(0, ((2 if parameter.dim() == 4 else 1) / parameter[0].numel()) ** 0.5)
    norms = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    for norm in norms:
        norm.running_mean.normal_(0, 0.1)
        norm.running_var.uniform_(0.5, 1.5)
        norm.momentum = 1.0
        norm.train(images is not None)
    if images is not None:
        model(images)
    for norm in norms:
        norm.eval()
    return model


def images_of(size: int, batch: int = 4) -> Tensor:
    return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(1))


def assert_close(found: Tensor, expected: Tensor, share: float) -> None:
    """To a share of the largest expected value."""
    assert found.shape == expected.shape
    assert (found - expected).abs().max() <= share * expected.abs().max()


@torch.no_grad()
def assert_surviving_rows_go_on(backbone, x: Tensor, close) -> None:
    """Four, then two of six images stay; ``close(found, expected)`` compares the features of those still there."""
    full, middle = backbone(x), backbone.num_exits // 2
    state, rows = backbone.stem(x), torch.arange(6)
    for l in range(backbone.num_exits):
        state = backbone.stage(l, state)
        close(backbone.exit_feature(l, state), full[l][rows])
        if l in (0, middle):
            stay = torch.tensor([4, 1, 0, 5] if l == 0 else [2, 0])
            state, rows = select((state, rows), stay)
    assert rows.tolist() == [0, 4]
