"""A backend of `torch.compile` that fuses kernels by a fixed rule and runs none.

The graphs are the real ones: Dynamo's, after AOTAutograd, Inductor's decompositions and its choice
of what to keep for the backward pass. Inductor itself cannot plan kernels for a GPU that is not
there, so this rule, which is meant to be no better than Inductor, stands for it:

- Matrix products and attention are kernels of their own. Views cost nothing.
- All other operations that are connected without a product or attention between them, and that run
  over the same number of values, are one kernel. It reads each input once and writes only what
  other kernels or the caller need. A sum over the last axis joins the kernel of the values that it
  sums; what is computed from such sums, too.
- An elementwise operation whose result no other kernel needs is computed within those that use it.
- A sum over other axes (the gradient of a norm's weight) is a kernel of its own.
"""

from __future__ import annotations

import operator
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.partitioners import min_cut_rematerialization_partition
from torch._inductor.decomposition import select_decomp_table
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.flop_counter import flop_registry

from benchmarks.gpu_model.trace import VIEWS, Kernel, Phase, Trace, count_flops, num_bytes


def fusing_backend(trace: Trace) -> Callable[..., Any]:
    """Return a backend for `torch.compile` whose graphs record their kernels in `trace`."""

    def compiler(phase: Phase) -> Callable[..., Any]:
        return lambda module, _: _boxed(_Plan(module.graph, phase), trace)

    backend: Callable[..., Any] = aot_autograd(
        fw_compiler=compiler("forward"),
        bw_compiler=compiler("backward"),
        partition_fn=min_cut_rematerialization_partition,
        decompositions=select_decomp_table(),
    )
    return backend


def _boxed(plan: _Plan, trace: Trace) -> Callable[[list[Any]], Any]:
    def run(args: list[Any]) -> Any:
        given = list(args)
        args.clear()  # The caller keeps nothing, so that a value is freed after its last use.
        return plan.run(given, trace)

    run._boxed_call = True  # type: ignore[attr-defined]
    return run


class _Plan:
    """The kernels of one graph.

    A *root* is an operation that has a place in a kernel: a sum, or one whose result a product, an
    attention or the caller reads. All other operations are computed within the roots that use them.
    """

    def __init__(self, graph: fx.Graph, phase: Phase) -> None:
        self._nodes = list(graph.nodes)
        self._phase = phase
        self._roots = [node for node in self._nodes if _is_root(node)]
        self._inside = {root: self._computed_within(root) for root in self._roots}
        kernels = self._fuse()
        self._stored = {node for node in self._nodes if _is_barrier(node)}
        for roots in kernels:
            self._stored |= {root for root in roots if self._is_read_elsewhere(root, roots)}
        self._kernels = {node: self._barrier(node) for node in self._nodes if _is_barrier(node)}
        self._kernels |= {roots[0]: self._fused(roots) for roots in kernels}
        self._ends = self._last_uses()

    def _computed_within(self, root: fx.Node) -> list[fx.Node]:
        """Return the root and the operations that are computed for it, and not stored."""
        inside = [root]
        for node in inside:  # It grows.
            for source in map(_base, node.all_input_nodes):
                if _is_fusible(source) and source not in self._roots and source not in inside:
                    inside.append(source)
        return inside

    def _fuse(self) -> list[list[fx.Node]]:
        """Return the roots of each kernel."""
        levels, domains = self._levels(), self._domains()
        kernels: dict[fx.Node, list[fx.Node]] = {}
        for root in self._roots:
            kernels[root] = [root]
            if _sums_columns(root):
                continue
            for other in self._roots[: self._roots.index(root)]:
                is_alike = (levels[root], domains[root]) == (levels[other], domains[other])
                is_joined = kernels[other] is kernels[root]
                if _sums_columns(other) or not is_alike or is_joined:
                    continue
                if self._touched(root) & self._touched(other):
                    kernels[other] += kernels[root]
                    for member in kernels[root]:
                        kernels[member] = kernels[other]
        return [roots for root, roots in kernels.items() if roots[0] is root]

    def _touched(self, root: fx.Node) -> set[fx.Node]:
        """Return what a root computes or reads."""
        inside = self._inside[root]
        return {*inside, *(_base(source) for node in inside for source in node.all_input_nodes)}

    def _levels(self) -> dict[fx.Node, int]:
        """Return how many products and attentions must end before each operation, in a row."""
        levels: dict[fx.Node, int] = {}
        for node in self._nodes:
            sources = node.all_input_nodes
            levels[node] = max((levels[s] + _is_barrier(s) for s in sources), default=0)
        return levels

    def _domains(self) -> dict[fx.Node, int]:
        """Return how many values a kernel for each operation loops over."""
        domains: dict[fx.Node, int] = {}
        for node in filter(_is_fusible, self._nodes):
            value = _value(node.args[0] if _is_reduction(node) else node)
            domains[node] = value.numel()
            for source in filter(_is_fusible, map(_base, node.all_input_nodes)):
                # Computed from sums over rows: belongs to their kernel.
                if not _sums_columns(source) and _value(source).numel() == domains[node]:
                    domains[node] = max(domains[node], domains[source])
        return domains

    def _is_read_elsewhere(self, root: fx.Node, roots: Sequence[fx.Node]) -> bool:
        return _is_needed(root) or any(
            _base(source) is root
            for other in set(self._roots) - set(roots)
            for node in self._inside[other]
            for source in node.all_input_nodes
        )

    def _last_uses(self) -> dict[fx.Node, int]:
        """Return the position of the last kernel that reads each value."""
        ends: dict[fx.Node, int] = {}
        position = {node: number for number, node in enumerate(self._nodes)}
        for node in reversed(self._nodes):
            uses = [
                position[user]
                if user.op == "output" or _is_barrier(user) or user in self._roots
                else ends[user]
                for user in node.users
            ]
            ends[node] = max(uses, default=position[node])
        return ends

    def _barrier(self, node: fx.Node) -> Kernel:
        args, kwargs = tree_map(_value, (node.args, node.kwargs), is_leaf=_is_node)
        name, out = _name(node), _value(node)
        given, results = _tensors((args, kwargs)), _tensors(out)
        return Kernel(
            name=name,
            dtype=given[0].dtype,
            num_bytes=sum(map(num_bytes, [*given, *results])),
            flops=count_flops(node.target, name, args, kwargs, out),
            phase=self._phase,
            place="compiled field",
        )

    def _fused(self, roots: Sequence[fx.Node]) -> Kernel:
        reads: dict[fx.Node, int] = defaultdict(int)
        inside = list(dict.fromkeys(node for root in roots for node in self._inside[root]))
        for node in inside:
            for argument in node.all_input_nodes:
                source = _base(argument)
                if source not in inside:
                    reads[source] += num_bytes(_value(argument))
        read = sum(min(size, _total_bytes(source)) for source, size in reads.items())
        written = sum(_total_bytes(root) for root in roots if root in self._stored)
        return Kernel(
            name=f"fused {' '.join(sorted({_name(node) for node in inside}))}",
            dtype=_tensors(_value(roots[0]))[0].dtype,
            num_bytes=read + written,
            flops=0.0,
            phase=self._phase,
            place="compiled field",
        )

    def run(self, given: list[Any], trace: Trace) -> Any:
        """Record the kernels, and make and free the tensors that a run would."""
        values: dict[fx.Node, Any] = {}
        ending: dict[int, list[fx.Node]] = defaultdict(list)
        for node, end in self._ends.items():
            ending[end].append(node)
        given.reverse()
        for position, node in enumerate(self._nodes):
            if node.op == "placeholder":
                values[node] = given.pop()
            elif node.op == "output":
                return tree_map(
                    lambda value: values[value] if _is_node(value) else value,
                    node.args[0],
                    is_leaf=_is_node,
                )
            elif node in self._stored:
                values[node] = tree_map(_allocated, node.meta["val"])
            elif _is_view(node) and node.all_input_nodes[0] in values:
                arguments = fx.map_arg((node.args, node.kwargs), values.__getitem__)
                values[node] = node.target(*arguments[0], **arguments[1])
            if node in self._kernels:
                trace.kernels.append(self._kernels[node])
            for dead in ending[position]:
                values.pop(dead, None)
        raise AssertionError("a graph without an output")


def _is_node(value: Any) -> bool:
    return isinstance(value, fx.Node)


def _value(node: Any) -> Any:
    return node.meta["val"] if _is_node(node) else node


def _allocated(value: Any) -> Any:
    if not isinstance(value, Tensor):
        return value
    return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=value.device)


def _tensors(values: Any) -> list[Tensor]:
    return [value for value in tree_leaves(values) if isinstance(value, Tensor)]


def _name(node: fx.Node) -> str:
    return str(node.target._schema.name).split("::")[1]  # type: ignore[union-attr]


def _is_view(node: fx.Node) -> bool:
    if node.op != "call_function":
        return False
    if node.target is operator.getitem:
        return True
    return bool(node.target.is_view) or _name(node) in VIEWS  # type: ignore[union-attr]


def _is_barrier(node: fx.Node) -> bool:
    if node.op != "call_function" or node.target is operator.getitem:
        return False
    return node.target.overloadpacket in flop_registry  # type: ignore[union-attr]


def _is_fusible(node: fx.Node) -> bool:
    return node.op == "call_function" and not _is_view(node) and not _is_barrier(node)


def _base(node: fx.Node) -> fx.Node:
    """Return the node whose memory a view shows."""
    while _is_view(node):
        node = node.all_input_nodes[0]
    return node


def _is_needed(node: fx.Node) -> bool:
    """Tell whether a product, an attention or the caller reads an operation's result."""
    return any(
        user.op == "output" or _is_barrier(user) or (_is_view(user) and _is_needed(user))
        for user in node.users
    )


def _is_root(node: fx.Node) -> bool:
    return _is_fusible(node) and (_is_reduction(node) or _is_needed(node))


def _is_reduction(node: fx.Node) -> bool:
    return _name(node) in ("sum", "mean", "amax")


def _sums_columns(node: fx.Node) -> bool:
    """Tell whether an operation sums over other axes than the last."""
    if not _is_reduction(node):
        return False
    num_axes, axes = _value(node.args[0]).dim(), node.args[1]
    return any(axis % num_axes != num_axes - 1 for axis in axes)  # type: ignore[union-attr]


def _total_bytes(node: fx.Node) -> int:
    return sum(tensor.element_size() * tensor.numel() for tensor in _tensors(_value(node)))
