"""A network's forward, recorded once and cut into plain functions behind chosen modules.

The forward is traced by torch.fx. Only the code that leads to the chosen modules is recorded; all other modules stay
whole, so that what they compute, branch on or cast to remains theirs. Every recorded value is computed for batches of
2 and of 3 samples: a number that is the same in both is a constant, one that grows with the batch is taken from the
batch at hand, and a branch on it is refused.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

from torch import Tensor, fx, nn
from torch.fx.proxy import Attribute

BATCHES = (2, 3)


class Pieces(NamedTuple):
    """A forward cut behind some modules.

    Attributes:
        names: the modules, in the order in which they run.
        functions: one from each cut, or the start, to the next: ``function(owner, *state)``, where ``owner.model`` is
            the network; each gives the state behind its module, a tuple of batch-first tensors, the last one the
            network's output.
        shapes: of the first tensor of each state, what its module gave, without the batch.
        constants: tensors that the recorded code made itself, by the names under which ``owner`` has to hold them.
    """

    names: tuple[str, ...]
    functions: list[Callable[..., Any]]
    shapes: list[tuple[int, ...]]
    constants: dict[str, Tensor]


class Cut(NamedTuple):
    """What is alive behind an exit: tensors of ``factor`` rows per sample, and numbers of ``factor`` per sample."""

    name: str
    tensors: dict[fx.Node, int]
    sizes: dict[fx.Node, int]


def cut_forward(root: nn.Module, inputs: Tensor, names: list[str], is_wanted: Callable[[Tensor], bool]) -> Pieces:
    """Cuts the forward of ``root``, which holds the network as ``root.model``.

    Args:
        inputs: three samples.
        names: modules of the network; those that cannot end a piece are passed over.
        is_wanted: whether a tensor, on its own or in a tuple that a module gives, is what the module is cut for.

    Raises:
        ValueError: fewer than two modules that can end a piece; what went wrong with the last of them.
    """
    tracer = _Tracer(names, [inputs[:batch].clone() for batch in BATCHES])
    nodes = list(tracer.trace(root).nodes)
    position = {node: i for i, node in enumerate(nodes)}
    output = nodes[-1].args[0]
    if not isinstance(output, fx.Node):
        raise ValueError("its output is not one tensor")
    needed = _closure([output], stop=())
    cuts, reason = [], "none of its blocks runs"
    for name, outputs in tracer.outputs.items():
        if len(outputs) != 1:
            reason = f"{name!r} runs {len(outputs)} times"
            continue
        feature = next((node for node in outputs[0] if _has_rows(node) and is_wanted(node.meta["values"][0])), None)
        if feature is None:
            reason = f"the output of {name!r} is no square map that belongs to single samples"
            continue
        end = tracer.ends[name]
        alive = [n for n in nodes[: end + 1] if n in needed and any(position[u] > end and u in needed for u in n.users)]
        try:
            cuts.append(_cut(name, feature, [node for node in alive if node.meta["depends"]]))
        except ValueError as error:
            reason = str(error)
    if len(cuts) < 2:
        raise ValueError(reason)
    starts = [Cut("", {nodes[0]: 1}, {}), *cuts]
    functions = [_compile(nodes, start, list(cut.tensors.items())) for start, cut in zip(starts, cuts, strict=False)]
    functions.append(_compile(nodes, cuts[-1], [(output, 1)], single=True))
    shapes = [tuple(next(iter(cut.tensors)).meta["values"][0].shape[1:]) for cut in cuts]
    return Pieces(tuple(cut.name for cut in cuts), functions, shapes, tracer.constants(nodes))


def _has_rows(node: fx.Node) -> bool:
    return isinstance(node.meta["values"][0], Tensor) and _factor(node) == 1


def _factor(node: fx.Node) -> int | None:
    """How many rows of the tensor, or how much of the number, one sample has; None where that is no whole number."""
    few, more = node.meta["values"]
    if isinstance(few, Tensor):
        if few.dim() == 0 or few.shape[1:] != more.shape[1:]:
            return None
        few, more = len(few), len(more)
    elif not isinstance(few, int):
        return None
    whole = few * BATCHES[1] == more * BATCHES[0] and few % BATCHES[0] == 0
    return few // BATCHES[0] if whole and few else None


def _cut(name: str, feature: fx.Node, alive: list[fx.Node]) -> Cut:
    tensors, sizes = {feature: 1}, {}
    for node in alive:
        factor = _factor(node)
        if factor is None:
            value = node.meta["values"][0]
            what = f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else f"the value {value}"
            raise ValueError(f"what follows {name!r} reads {what} ({node.name}) without rows for single samples")
        (tensors if isinstance(node.meta["values"][0], Tensor) else sizes).setdefault(node, factor)
    return Cut(name, tensors, sizes)


def _closure(outputs: Iterable[fx.Node], stop: Iterable[fx.Node]) -> set[fx.Node]:
    """The nodes that the outputs need, back to those in ``stop``, which are left out."""
    found, waiting, stop = set(), list(outputs), set(stop)
    while waiting:
        node = waiting.pop()
        if node not in found and node not in stop:
            found.add(node)
            waiting += node.all_input_nodes
    return found


def _compile(
    nodes: list[fx.Node], start: Cut, outputs: list[tuple[fx.Node, int]], single: bool = False
) -> Callable[..., Any]:
    """Python code ``piece(backbone, *state)`` from the state behind ``start`` to the outputs."""
    graph, copies = fx.Graph(), {}
    for node in start.tensors:
        copies[node] = graph.placeholder(node.name)
    batch = graph.call_method("size", (next(iter(copies.values())), 0)) if start.sizes else None
    for node, factor in start.tensors.items():
        if factor > 1:
            copies[node] = graph.call_method("flatten", (copies[node], 0, 1))
    for node, factor in start.sizes.items():
        copies[node] = graph.call_function(operator.mul, (batch, factor))
    needed = _closure((node for node, _ in outputs), stop=copies)
    for node in nodes:
        if node in needed:
            copies[node] = graph.node_copy(node, copies.__getitem__)
    results = [
        copies[node] if factor == 1 else graph.call_method("unflatten", (copies[node], 0, (-1, factor)))
        for node, factor in outputs
    ]
    graph.output(results[0] if single else tuple(results))
    code = graph.python_code("self")
    scope = dict(code.globals)
    exec(code.src, scope)
    return scope["forward"]


# Tracing with values at hand.


class _Value(fx.Proxy):
    """A recorded value; ``node.meta["values"]`` holds it for each of the two batches."""

    def __getattr__(self, name: str) -> Any:
        if callable(getattr(self.node.meta["values"][0], name)):
            return Attribute(self, name)
        return self.tracer.create_proxy("call_function", getattr, (self, name), {})

    def __len__(self) -> int:
        few, more = map(len, self.node.meta["values"])
        if few != more:
            raise ValueError("its code counts the samples of a batch")
        return few


class _Tracer(fx.Tracer):
    """Records the code that leads to the exits; every other module is one step.

    A node's ``meta`` holds its ``values`` for the two batches, and whether it ``depends`` on the images.
    """

    proxy_buffer_attributes = True

    def __init__(self, exits: list[str], images: list[Tensor]):
        super().__init__()
        self.exits, self.images = {f"model.{name}": name for name in exits}, images
        self.inside = {""} | {path.rsplit(".", k)[0] for path in self.exits for k in range(1, path.count(".") + 1)}
        self.outputs: dict[str, list[list[fx.Node]]] = {}
        self.ends: dict[str, int] = {}
        self._computing = False

    def is_leaf_module(self, module: nn.Module, path: str) -> bool:
        return path not in self.inside

    def proxy(self, node: fx.Node) -> _Value:
        return _Value(node, self)

    def to_bool(self, value: _Value) -> bool:
        few, more = map(bool, value.node.meta["values"])
        if few != more or value.node.meta["depends"]:
            raise ValueError("its code branches on the samples or on their number")
        return few

    def iter(self, value: _Value) -> Iterator[_Value]:
        return iter([value[i] for i in range(len(value))])

    def getattr(self, name: str, value: Any, cache: dict) -> Any:
        return value if self._computing else super().getattr(name, value, cache)

    def call_module(self, module: nn.Module, forward: Callable, args: tuple, kwargs: dict) -> Any:
        if self._computing:
            return forward(*args, **kwargs)
        result = super().call_module(module, forward, args, kwargs)
        if name := self.exits.get(self.path_of_module(module)):
            self.outputs.setdefault(name, []).append(_nodes_in(result))
            self.ends[name] = len(self.graph.nodes) - 1
        return result

    def create_proxy(self, kind: str, target: Any, args: tuple, kwargs: dict, *rest: Any, **options: Any) -> Any:
        """Records a step and gives its value: tuples as tuples, numbers that no batch changes as numbers."""
        proxy = super().create_proxy(kind, target, args, kwargs, *rest, **options)
        node = proxy.node
        node.meta["depends"] = kind == "placeholder" or any(n.meta["depends"] for n in node.all_input_nodes)
        self._computing = True
        try:
            node.meta["values"] = tuple(self._compute(node, i) for i in range(len(BATCHES)))
        finally:
            self._computing = False
        return self._unpack(proxy, *node.meta["values"])

    def _compute(self, node: fx.Node, i: int) -> Any:
        args, kwargs = _plain(node.args, i), _plain(node.kwargs, i)
        if node.op == "placeholder":
            return self.images[i]
        if node.op == "get_attr":
            return operator.attrgetter(node.target)(self.root)
        if node.op == "call_method":
            return getattr(args[0], node.target)(*args[1:], **kwargs)
        step = self.root.get_submodule(node.target) if node.op == "call_module" else node.target
        return step(*args, **kwargs)

    def _unpack(self, proxy: _Value, few: Any, more: Any) -> Any:
        if isinstance(few, (tuple, list)) and len(few) == len(more):
            items = [self._item(proxy, i, few, more) for i in range(len(few))]
            return items if isinstance(few, list) else tuple(items)
        if isinstance(few, dict):
            return {key: self._item(proxy, key, few, more) for key in few}
        if few is None or isinstance(few, (bool, int, float, str)) and few == more:
            return few
        return proxy

    def _item(self, proxy: _Value, key: Any, few: Any, more: Any) -> Any:
        constant = isinstance(few[key], (bool, int, float, str, type(None))) and few[key] == more[key]
        return few[key] if constant else proxy[key]

    def constants(self, nodes: list[fx.Node]) -> dict[str, Tensor]:
        """Tensors that the recorded code made itself from constants."""
        names = [node.target for node in nodes if node.op == "get_attr" and not node.target.startswith("model.")]
        return {name: getattr(self.root, name) for name in names}


def _plain(argument: Any, i: int) -> Any:
    """A step's argument for batch i, in lists that the step may change."""
    if isinstance(argument, fx.Node):
        return argument.meta["values"][i]
    if isinstance(argument, (tuple, list)):
        items = [_plain(item, i) for item in argument]
        return items if isinstance(argument, list) else tuple(items)
    if isinstance(argument, dict):
        return {key: _plain(item, i) for key, item in argument.items()}
    if isinstance(argument, slice):
        return slice(*(_plain(end, i) for end in (argument.start, argument.stop, argument.step)))
    return argument


def _nodes_in(result: Any) -> list[fx.Node]:
    if isinstance(result, fx.Proxy):
        return [result.node]
    items = result.values() if isinstance(result, dict) else result if isinstance(result, (tuple, list)) else ()
    return [node for item in items for node in _nodes_in(item)]
