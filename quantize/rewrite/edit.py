"""Helpers that edit a graph: add constants, replace a node, join matmuls, and remove what nothing reads."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import NameFixPass, RemoveUnusedNodesPass


def constant(graph: ir.Graph, name: str, array: np.ndarray | np.generic) -> ir.Value:
    """Return the initializer `name` of `graph`. It is created from `array` if it does not exist yet."""
    if name not in graph.initializers:
        tensor = ir.tensor(array, name=name)
        graph.register_initializer(
            ir.Value(
                name=name, shape=ir.Shape(tensor.shape.numpy()), type=ir.TensorType(tensor.dtype), const_value=tensor
            )
        )
    return graph.initializers[name]


def lazy_constant(
    graph: ir.Graph, name: str, dtype: ir.DataType, shape: Sequence[int], make: Callable[[], np.ndarray]
) -> ir.Value:
    """Add an initializer whose array `make` computes each time it is read, and return it.

    The arrays are not kept, because those of a whole model would take as much memory as its file.
    """

    def tensor() -> ir.TensorProtocol:
        return ir.tensor(np.ascontiguousarray(make()), name=name)

    sizes = ir.Shape(shape)
    value = ir.Value(name=name, shape=sizes, type=ir.TensorType(dtype))
    value.const_value = ir.LazyTensor(tensor, dtype, sizes, name=name)
    graph.register_initializer(value)
    return value


def replace_node(graph: ir.Graph, node: ir.Node, tape: ir.tape.Tape, result: ir.Value) -> None:
    """Insert the nodes of `tape` in place of `node`; `result` takes the name, shape and type of its output."""
    output = node.outputs[0]
    graph.insert_before(node, tape.nodes)
    name, result.shape, result.type = output.name, output.shape, output.type
    ir.convenience.replace_all_uses_with(output, result, replace_graph_outputs=True)
    graph.remove(node, safe=True)
    result.name = name
    for new in tape.nodes:
        new.name = f"{node.name}.{new.op_type}" if node.name else None


def replace_matmuls(
    graph: ir.Graph, nodes: Sequence[ir.Node], sizes: Sequence[int], tape: ir.tape.Tape, result: ir.Value
) -> None:
    """Insert the nodes of `tape` in place of the matmuls `nodes`.

    Their outputs [.., N], with N from `sizes`, are consecutive parts of `result` [.., ΣN].
    """
    if len(nodes) == 1:
        replace_node(graph, nodes[0], tape, result)
        return
    name = f"split_{'_'.join(map(str, sizes))}"
    parts = tape.op_multi_out(
        "Split", [result, constant(graph, name, np.array(sizes, np.int64))], {"axis": -1}, num_outputs=len(nodes)
    )
    for new in tape.nodes:
        new.name = f"{nodes[0].name}.joined.{new.op_type}"
    graph.insert_before(nodes[0], tape.nodes)
    for node, part in zip(nodes, parts, strict=True):
        old = node.outputs[0]
        name, part.shape, part.type = old.name, old.shape, old.type
        ir.convenience.replace_all_uses_with(old, part, replace_graph_outputs=True)
        graph.remove(node, safe=True)
        part.name = name


def join_matmuls(graph: ir.Graph) -> None:
    """Make one MatMulNBits of those that read the same value, and Split its output [.., ΣN] into theirs [.., N].

    The integers of their channels stand one after the other, so the results are the same bit by bit. Queries, keys and
    values gain, and gate and up-projection: in a small model, starting a matmul takes as long as computing it. Scales are
    joined when ONNX Runtime loads the graph, as it computes them then. A matmul with a bias after it stays, since ONNX
    Runtime makes one node of the two.
    """
    groups: dict[tuple, list[ir.Node]] = {}
    for node in graph:
        readers = [use.node for use in node.outputs[0].uses()]
        biased = any(one.op_type == "Add" and any(v.is_initializer() for v in one.inputs if v) for one in readers)
        if node.op_type == "MatMulNBits" and len(node.inputs) <= 4 and not biased:
            same = tuple((name, node.attributes[name].value) for name in sorted(node.attributes) if name != "N")
            groups.setdefault((node.inputs[0], len(node.inputs), same), []).append(node)
    for (x, _, same), nodes in groups.items():
        if len(nodes) > 1:
            _join(graph, x, dict(same), nodes)


def _join(graph: ir.Graph, x: ir.Value, same: dict[str, Any], nodes: list[ir.Node]) -> None:
    integers, sizes = [node.inputs[1] for node in nodes], [node.attributes["N"].as_int() for node in nodes]
    tape = ir.tape.Tape()
    whole = lazy_constant(
        graph,
        f"{integers[0].name}_joined",
        integers[0].dtype,
        [sum(sizes), *integers[0].shape.numpy()[1:]],
        lambda: np.concatenate([value.const_value.numpy() for value in integers]),
    )
    more = [tape.op("Concat", list(values), {"axis": 0}) for values in zip(*(n.inputs[2:] for n in nodes), strict=True)]
    joined = tape.op("MatMulNBits", [x, whole, *more], same | {"N": sum(sizes)}, domain=nodes[0].domain)
    replace_matmuls(graph, nodes, sizes, tape, joined)


def clean(model: ir.Model) -> None:
    """Remove nodes and initializers that nothing reads, and give every node and value a unique name."""
    RemoveUnusedNodesPass()(model)
    NameFixPass()(model)
