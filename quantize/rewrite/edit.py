"""Helpers that edit a graph: add constants, replace a node, and remove what nothing reads."""

from __future__ import annotations

from collections.abc import Callable, Sequence

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


def clean(model: ir.Model) -> None:
    """Remove nodes and initializers that nothing reads, and give every node and value a unique name."""
    RemoveUnusedNodesPass()(model)
    NameFixPass()(model)
