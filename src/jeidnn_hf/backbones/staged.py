"""The staged backbone: a frozen network cut at its exits.

``stem`` takes pixels to the first state, ``stage(l, state)`` runs the blocks between exits l-1 and l,
``exit_feature(l, state)`` is what exit l sees. Chained over all l they compute the network itself. A state is a pytree
of batch-first tensors, so the rows of samples that left can be dropped from it at any exit (``select``).

A family is one subclass that says what its stem, blocks and head are, registered for its timm class.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from .pooling import check_statistics, grid_size, pool, pooled_width

State = Any


def select(tree: Any, rows: Tensor) -> Any:
    """Keeps the given rows (an index tensor) of every tensor in a pytree; ``None`` stays ``None``."""
    if isinstance(tree, Tensor):
        if tree.dim() == 4 and tree.is_contiguous(memory_format=torch.channels_last):  # index_select would undo that
            return tree.permute(0, 2, 3, 1).index_select(0, rows).permute(0, 3, 1, 2)
        return tree.index_select(0, rows)
    if isinstance(tree, dict):
        return {key: select(value, rows) for key, value in tree.items()}
    if isinstance(tree, tuple) and hasattr(tree, "_fields"):
        return type(tree)(*(select(value, rows) for value in tree))
    if isinstance(tree, (tuple, list)):
        return type(tree)(select(value, rows) for value in tree)
    if tree is None:
        return None
    raise ValueError(f"Expected a state of tensors, tuples, lists and dicts, but got {type(tree).__name__}.")


def tokens_to_map(tokens: Tensor, num_prefix: int, grid: tuple[int, int]) -> Tensor:
    """Patch tokens ``(B, prefix + H W, C)`` laid out as their map ``(B, C, H, W)``."""
    return tokens[:, num_prefix:].transpose(1, 2).unflatten(2, grid)


class StagedBackbone(nn.Module):
    """A frozen timm model with exits after some of its blocks.

    Args:
        model: the network; it is put in eval mode for good and its parameters no longer require gradients.
        image_size: side of the square images that it takes.
        num_channels: their channels.
        exit_stages: the blocks, counted from 0, with an exit after them; rising, the last one included. Default: all.
        exit_pooling: statistics of an exit's feature map, one list for all exits or one list per exit but the last;
            ``"plain"``: the paper's, ``cls`` or ``avg1`` where there is no class token; ``"rich"``: ``avg4 max2`` on
            maps at least 16 wide, ``avg2 max2`` on smaller ones, ``avg1`` on points, and ``cls`` where there is one.
        native_head: whether the last exit keeps the network's own classifier. Its exit feature is then its logits,
            else the classifier's input, for a trained head to read.

    Attributes:
        exit_dims: width d_l of each exit feature.
        map_shapes: (C, H, W) of the feature map at each exit but the last.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        image_size: int,
        num_channels: int = 3,
        exit_stages: Sequence[int] | None = None,
        exit_pooling: str | Sequence[str] | Sequence[Sequence[str]] = "plain",
        native_head: bool = True,
    ):
        super().__init__()
        self.model = model
        self.image_size, self.num_channels, self.native_head = image_size, num_channels, native_head
        self.exit_stages = _check_exit_stages(exit_stages, self.num_blocks)
        self.freeze()
        with torch.device("cpu"):
            self.map_shapes, self.has_class_token, last_dim = self._probe()
        self.exit_pooling = self._check_pooling(exit_pooling)
        seen = zip(self.exit_pooling, self.map_shapes, strict=True)
        self.exit_dims = (*(pooled_width(names, shape[0]) for names, shape in seen), last_dim)

    # What a family defines.

    channels_last = False
    """Whether the network is fastest with its weights and maps laid out pixel by pixel, as convolutions are."""

    @property
    def num_blocks(self) -> int:
        raise NotImplementedError

    def embed(self, pixel_values: Tensor) -> State:
        """Pixels to the state before the first block."""
        raise NotImplementedError

    def block(self, i: int, state: State) -> State:
        raise NotImplementedError

    def feature_map(self, state: State) -> tuple[Tensor, Tensor | None]:
        """The map ``(B, C, H, W)`` that an exit pools, and the class token ``(B, C)`` if there is one."""
        raise NotImplementedError

    def finish(self, state: State, pre_logits: bool = False) -> Tensor:
        """The last block's state to the network's own logits, or to the input of its classifier."""
        raise NotImplementedError

    # What every family shares.

    @property
    def num_exits(self) -> int:
        return len(self.exit_stages)

    @property
    def model_dtype(self) -> torch.dtype:
        return next(self.model.parameters()).dtype

    def stem(self, pixel_values: Tensor) -> State:
        """``(B, C, S, S)`` pixels to the first state; a ValueError where the shape is another."""
        expected = (self.num_channels, self.image_size, self.image_size)
        if pixel_values.dim() != 4 or tuple(pixel_values.shape[1:]) != expected:
            raise ValueError(
                f"Expected pixel_values of shape (batch, {', '.join(map(str, expected))}), but got "
                f"{tuple(pixel_values.shape)}; resize with the model's own preprocessing."
            )
        if self.channels_last:
            pixel_values = pixel_values.contiguous(memory_format=torch.channels_last)
        return self.embed(pixel_values)

    def stage(self, l: int, state: State) -> State:
        """Runs the blocks after exit l-1 up to exit l (0-based)."""
        first = self.exit_stages[l - 1] + 1 if l else 0
        for i in range(first, self.exit_stages[l] + 1):
            state = self.block(i, state)
        return state

    def exit_feature(self, l: int, state: State) -> Tensor:
        """``(B, d_l)``: pooled statistics; at the last exit the native logits, or the native classifier's input."""
        if l == self.num_exits - 1:
            return self.finish(state, pre_logits=not self.native_head)
        return pool(*self.feature_map(state), self.exit_pooling[l])

    def forward(self, pixel_values: Tensor) -> tuple[Tensor, ...]:
        """The features of all exits."""
        return self.features(self.states(pixel_values))

    def states(self, pixel_values: Tensor) -> Iterator[State]:
        """The state that the stem gives and those at the exits, L + 1 in all."""
        state = self.stem(pixel_values)
        yield state
        for l in range(self.num_exits):
            state = self.stage(l, state)
            yield state

    def features(self, states: Iterable[State]) -> tuple[Tensor, ...]:
        """What ``states`` gives to the features of all exits."""
        return tuple(self.exit_feature(l, state) for l, state in enumerate(islice(states, 1, None)))

    def hidden_state(self, state: State) -> Tensor:
        """The state as one tensor, for who wants to look at it: tokens or a map, in the network's own layout."""
        return state

    def freeze(self) -> None:
        self.requires_grad_(False)
        self.train(False)
        if self.channels_last:
            self.model.to(memory_format=torch.channels_last)

    def train(self, mode: bool = True) -> StagedBackbone:
        """Stays in eval mode: no dropout, no drop-path, no BatchNorm updates."""
        return super().train(False)

    def _probe(self) -> tuple[tuple[tuple[int, int, int], ...], bool, int]:
        """Map shapes, whether there is a class token, and the last exit's width, from one blank image."""
        parameter = next(self.model.parameters())
        blank = torch.zeros(
            1, self.num_channels, self.image_size, self.image_size, dtype=parameter.dtype, device=parameter.device
        )
        shapes, token = [], None
        with torch.no_grad():
            try:
                state = self.embed(blank)
                for l in range(self.num_exits - 1):
                    state = self.stage(l, state)
                    feature_map, token = self.feature_map(state)
                    shapes.append(tuple(feature_map.shape[1:]))
                last = self.finish(self.stage(self.num_exits - 1, state), pre_logits=not self.native_head)
            except (RuntimeError, AssertionError) as error:
                raise ValueError(
                    f"Expected an image_size and num_channels that the backbone can take, but got "
                    f"{self.image_size} px, {self.num_channels} channels: {error}"
                ) from error
        return tuple(shapes), token is not None, last.shape[1]

    def _check_pooling(self, pooling: str | Sequence) -> tuple[tuple[str, ...], ...]:
        exits = self.num_exits - 1
        token = ("cls",) if self.has_class_token else ()
        if pooling == "plain":
            pooling = token or ("avg1",)
        elif pooling == "rich":
            pooling = [token + _rich_statistics(min(height, width)) for _, height, width in self.map_shapes]
        elif isinstance(pooling, str):
            raise ValueError(f"Expected exit_pooling to be 'plain', 'rich' or a list of names, but got {pooling!r}.")
        if exits and (not len(pooling) or isinstance(pooling[0], str)):
            pooling = [pooling] * exits
        if exits and len(pooling) != exits:
            raise ValueError(
                f"Expected exit_pooling to be one list or {exits} lists, one per exit but the last, "
                f"but got {len(pooling)}."
            )
        pooling = tuple(check_statistics(names) for names in pooling[:exits])
        for l, (names, (_, height, width)) in enumerate(zip(pooling, self.map_shapes, strict=True), start=1):
            if "cls" in names and not self.has_class_token:
                raise ValueError(f"Expected a backbone with a class token for the statistic 'cls' at exit {l}.")
            if max(map(grid_size, names)) > min(height, width):
                raise ValueError(f"Expected grids that fit the {height} x {width} map of exit {l}, but got {names}.")
        return pooling


def _rich_statistics(side: int) -> tuple[str, ...]:
    return ("avg4", "max2") if side >= 16 else ("avg2", "max2") if side >= 2 else ("avg1",)


def _check_exit_stages(stages: Sequence[int] | None, num_blocks: int) -> tuple[int, ...]:
    if stages is None:
        return tuple(range(num_blocks))
    given, stages = stages, tuple(stages) if isinstance(stages, Iterable) else ()
    allowed = f"rising block numbers from 0 to {num_blocks - 1}, the last one included"
    whole = all(isinstance(stage, int) and not isinstance(stage, bool) for stage in stages)
    if not stages or not whole or list(stages) != sorted(set(stages)) or stages[0] < 0 or stages[-1] != num_blocks - 1:
        got = list(stages) if isinstance(given, Iterable) else given
        raise ValueError(f"Expected exit_stages to be a list of {allowed}, but got {got}.")
    return stages


_FAMILIES: dict[type, type[StagedBackbone]] = {}


def register_family(*model_classes: type):
    """Class decorator: the StagedBackbone that cuts models of these classes (and of their subclasses)."""

    def register(view: type[StagedBackbone]) -> type[StagedBackbone]:
        _FAMILIES.update(dict.fromkeys(model_classes, view))
        return view

    return register


def staged_backbone(model: nn.Module, **options) -> StagedBackbone:
    """Cuts a timm model at its exits, by the view of its family or else by tracing; ``options``: `StagedBackbone`'s."""
    for cls in type(model).__mro__:
        if cls in _FAMILIES:
            return _FAMILIES[cls](model, **options)
    if hasattr(model, "forward_features"):
        from .timm_generic import TracedBackbone

        return TracedBackbone(model, **options)
    known = sorted(cls.__name__ for cls in _FAMILIES)
    raise ValueError(f"Expected a backbone of one of the classes {known}, but got {type(model).__name__}.")
