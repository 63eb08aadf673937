"""Networks with random weights for tests of several rooms."""

import torch
from torch import Tensor, nn


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
