"""Any other timm model, cut at its exits without knowing its code.

The model's own ``forward`` is recorded once and cut behind each exit module (``tracing``). The state at an exit is
every tensor that the rest still reads, skip connections included, so a stage is a plain function of the state: nothing
is suspended, hooked or shared between calls, and states can be counted, selected, joined and run again at will.

Recording patches ``nn.Module.__call__`` for as long as it lasts (torch.fx does), so construct a view while no other
thread of the process runs a network.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, fx, nn

from .staged import StagedBackbone, select, tokens_to_map
from .tracing import BATCHES, Pieces, cut_forward

CONTAINERS = ("stages", "blocks", "layers", "features", "levels", "network")
NUMBERED = ("layer", "stage", "s", "block", "serial_blocks")


class TracedBackbone(StagedBackbone):
    """The view of a timm model that has no family of its own.

    The exits are the children of its trunk (``stages``, ``blocks``, ``layer1``, ...), else the modules of its
    ``feature_info``, as far as each runs once and gives a map ``(B, C, H, W)`` or ``(B, H, W, C)`` or tokens
    ``(B, N, C)``, alone or first in a tuple. A map is square, which tells its channels; tokens are read after the
    model's final norm, where that has their width.

    The state is a tuple of batch-first tensors, what the exit reads coming first. On construction the rows that stay
    when others leave are compared with those of the whole batch.

    Raises:
        ValueError: a network that cannot be cut, or whose samples depend on each other.
    """

    def __init__(self, model: nn.Module, **options: Any):
        super().__init__(model, **options)
        if not next(model.parameters()).is_meta:
            self._check_rows()

    @property
    def exit_modules(self) -> tuple[str, ...]:
        """The module behind which each block ends."""
        return self._pieces.names

    @property
    def num_blocks(self) -> int:
        return len(self._pieces.names)

    def embed(self, pixel_values: Tensor) -> tuple[Tensor, ...]:
        return (pixel_values,)

    def block(self, i: int, state: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return self._pieces.functions[i](self, *state)

    def feature_map(self, state: tuple[Tensor, ...]) -> tuple[Tensor, Tensor | None]:
        output = state[0]
        shape = tuple(map(int, output.shape))  # numbers also where the cost counter traces
        layout = find_layout(self.model, shape)
        if layout == "nchw":
            return output, None
        if layout == "nhwc":
            return output.permute(0, 3, 1, 2), None
        tokens, side = self._final_norm(shape[2])(output), round((shape[1] - layout) ** 0.5)
        return tokens_to_map(tokens, layout, (side, side)), tokens[:, 0] if self._has_token else None

    def hidden_state(self, state: tuple[Tensor, ...]) -> Tensor:
        return state[0]

    def finish(self, state: tuple[Tensor, ...], pre_logits: bool = False) -> Tensor:
        if pre_logits == self.native_head:
            raise ValueError(f"Expected pre_logits={not self.native_head}, as the view was cut, but got {pre_logits}.")
        return self._pieces.functions[-1](self, *state)

    def _final_norm(self, width: int) -> nn.Module:
        for name in ("norm", "fc_norm"):
            norm = getattr(self.model, name, None)
            weight = getattr(norm, "weight", None)
            is_batch_norm = isinstance(norm, nn.modules.batchnorm._BatchNorm)
            if weight is not None and weight.shape == (width,) and not is_batch_norm:
                return norm
        return nn.Identity()

    @cached_property
    def _pieces(self) -> Pieces:
        self.model.eval()
        root = _Forward(self.model, pre_logits=not self.native_head)
        images = self._images()
        with torch.no_grad():
            try:
                self.model(images[: BATCHES[0]])
            except (RuntimeError, AssertionError, ValueError) as error:
                raise ValueError(
                    f"Expected an image_size and num_channels that the backbone can take, but got "
                    f"{self.image_size} px, {self.num_channels} channels: {error}"
                ) from error
            pieces = cut_at_exits(root, images)
        for name, constant in pieces.constants.items():
            self.register_buffer(name, constant, persistent=False)
        return pieces

    @property
    def _has_token(self) -> bool:
        layouts = [find_layout(self.model, (1, *shape)) for shape in self._pieces.shapes]
        return getattr(self.model, "cls_token", None) is not None and not {"nchw", "nhwc", 0} & set(layouts)

    def _images(self) -> Tensor:
        parameter = next(self.model.parameters())
        shape = (BATCHES[1], self.num_channels, self.image_size, self.image_size)
        images = torch.randn(shape, generator=torch.Generator().manual_seed(0), device="cpu")
        return images.to(parameter.device, parameter.dtype)

    @torch.no_grad()
    def _check_rows(self) -> None:
        """Rows 0 and 2 of 3 go on alike whether row 1 leaves, at the first, middle or last exit but one, or stays."""
        images, last = self._images(), self.num_blocks - 1
        kept = torch.tensor([0, 2], device=images.device)
        state, full, few = self.embed(images.clone()), [], {}
        for i in range(last + 1):
            state = self.block(i, state)
            full.append(state[0].clone())
            if i in {0, last // 2, last - 1}:
                few[i] = select(state, kept)
        logits = self.finish(state, pre_logits=not self.native_head)
        if self.native_head and not _same(logits, self.model(images)):
            raise _refusal(self.model, "its pieces together give other logits than the whole")
        for i, state in few.items():
            same = []
            for j in range(i + 1, last + 1):
                state = self.block(j, state)
                same.append(_same(state[0], full[j][kept], spread_of=full[j]))
            same.append(_same(self.finish(state, pre_logits=not self.native_head), logits[kept], spread_of=logits))
            if not all(same):
                name = self.exit_modules[i]
                raise _refusal(self.model, f"what stays behind {name!r} changes when other samples leave")

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key != "_pieces"}  # compiled code: made again


def _refusal(model: nn.Module, reason: str) -> ValueError:
    return ValueError(f"Expected a network that can lose samples on its way, but got {type(model).__name__}: {reason}.")


def _same(found: Tensor, expected: Tensor, spread_of: Tensor | None = None) -> bool:
    """Equal to a thousandth of the spread between rows, and to rounding."""
    whole = (expected if spread_of is None else spread_of).double()
    spread = (whole - whole.mean(0)).abs().max()
    rounding = 10 * torch.finfo(expected.dtype).eps * whole.abs().max()
    difference = (found.double() - expected.double()).abs().max()
    return found.shape == expected.shape and not difference > 1e-3 * spread + rounding


# Which modules have an exit behind them.


def exit_candidates(model: nn.Module) -> Iterator[list[str]]:
    """Lists of module names to try as exits, the best first."""
    yield from _containers(model, "")
    for prefix in NUMBERED:
        yield _running((name, child) for name, child in model.named_children() if re.fullmatch(rf"{prefix}_?\d+", name))
    modules, info = dict(model.named_modules()), getattr(model, "feature_info", None) or []
    names = dict.fromkeys(entry["module"] for entry in info if entry["module"] in modules)
    yield [name for name in names if not isinstance(modules[name], nn.ModuleList)]
    for name, child in model.named_children():
        yield from _containers(child, f"{name}.")


def _containers(owner: nn.Module, prefix: str) -> Iterator[list[str]]:
    for name in CONTAINERS:
        container = getattr(owner, name, None)
        if isinstance(container, (nn.Sequential, nn.ModuleList)):
            children = _running((f"{prefix}{name}.{child}", module) for child, module in container.named_children())
            yield [path for path in children if _is_block(owner.get_submodule(path.removeprefix(prefix)))]


def _running(modules: Iterable[tuple[str, nn.Module]]) -> list[str]:
    """The names, with those of its modules in place of a list of modules, which itself never runs."""
    names = []
    for name, module in modules:
        inner = ((f"{name}.{child}", block) for child, block in module.named_children())
        names += _running(inner) if isinstance(module, nn.ModuleList) else [name]
    return names


def _is_block(module: nn.Module) -> bool:
    """Not a single layer."""
    return any(True for _ in module.children()) and not isinstance(module, nn.modules.batchnorm._BatchNorm)


def find_layout(model: nn.Module, shape: tuple[int, ...]) -> str | int | None:
    """``"nchw"``, ``"nhwc"``, the number of prefix tokens before a square of patch tokens, or None for all else."""
    if len(shape) == 4:
        first, last = shape[2] == shape[3], shape[1] == shape[2]
        if first and last:
            return getattr(model, "output_fmt", "NCHW").lower()
        return "nchw" if first else "nhwc" if last else None
    if len(shape) == 3:
        for prefix in (getattr(model, "num_prefix_tokens", 0), 0, 1):
            patches = shape[1] - prefix
            if patches > 0 and round(patches**0.5) ** 2 == patches:
                return prefix
    return None


class _Forward(nn.Module):
    """The model up to its logits, or up to the input of its classifier."""

    def __init__(self, model: nn.Module, pre_logits: bool):
        super().__init__()
        self.model, self.pre_logits = model, pre_logits

    def forward(self, pixel_values: Tensor) -> Tensor:
        if not self.pre_logits:
            return self.model(pixel_values)
        return self.model.forward_head(self.model.forward_features(pixel_values), pre_logits=True)


def cut_at_exits(root: _Forward, images: Tensor) -> Pieces:
    """Behind the first candidates that give two exits or more."""
    reason = "it has no blocks that timm names"
    for candidates in exit_candidates(root.model):
        if len(candidates) < 2:
            continue
        try:
            return cut_forward(root, images, candidates, lambda value: find_layout(root.model, value.shape) is not None)
        except (RuntimeError, TypeError, ValueError, AttributeError, NotImplementedError, fx.proxy.TraceError) as error:
            reason = str(error).strip().split("\n")[0].rstrip(".")
    raise _refusal(root.model, reason)
