"""Weights in integers of 8 or 4 bits with a scale for every block of inputs; activations stay in floating point.

A weight is [K, N] here, x [.., K] · W [K, N], as in rounding.py: G = ⌈K / block⌉ blocks run along the inputs K, and
the last one is shorter where `block` does not divide K. A table [V, D] is the weight with K = D and N = V.

Two forms of the same integers, each with a table that look-up and head share stored once:

`portable`, standard operators (DequantizeLinear of opset 21). A matrix keeps the orientation in which it was stored:
    [K, N]                  scale, zero point [G, N], or [N] without blocks
    [N, K], every table     scale, zero point [N, G], or [N] without blocks
  in int8 / int4 where the grid is symmetric (no zero point), in uint8 / uint4 where it is not.
  Without blocks, q · scale is a Cast and a Mul of constants, which runtimes fold at load: fp32's results, speed and
  memory from a quarter of the file. With blocks, ONNX Runtime 1.32 fuses DequantizeLinear and the product into
  MatMulNBits at load where the blocks are a power of two from 16 on, along axis 0 of [K, N]; it turns constants before
  that, so the Transpose stands in front of DequantizeLinear. Other blocks are as correct, but every run dequantizes
  the whole matrix. What it fuses it computes with int8 activations, a scale a block, unless the session sets
  session.qdq_matmulnbits_accuracy_level to 0; 8 bits have no fast kernel then.

`ort`, com.microsoft (ONNX Runtime's docs/ContribOperators.md), K padded to G · block with zeros:
    weight      uint8 [N, G, block · bits / 8]    MatMulNBits; as [N, G · block · bits / 8] GatherBlockQuantized
    scale       float32 [N, G]
    zero point  uint8 [N, ⌈G · bits / 8⌉], left out where it is 2^(bits−1), which is what a symmetric grid becomes
  Without blocks, one scale a channel [N, 1] is spread over blocks of the operator's at load; so are zero points.
  Two 4-bit numbers share a byte, the first in the lower half, as in ONNX's own int4.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from cuantiza.core.errors import UserError
from cuantiza.quantize.decide.decision import Site
from cuantiza.quantize.decide.rounding import Grid, IntWeight, round_to_nearest
from cuantiza.quantize.rewrite.edit import clean, constant, lazy_constant, replace_node
from cuantiza.quantize.rewrite.find import Embedding, Projection, find_embeddings, find_projections, find_tables
from cuantiza.quantize.rewrite.fuse_attention import ORT
from cuantiza.quantize.settings import Target

# MatMulNBits' accuracy_level: activations may become int8 with a scale a block, which is its fast path.
_INT8_COMPUTE = 4
# Blocks and 4-bit integers exist in the standard from this opset on.
_PORTABLE_OPSET = 21
_TYPES = {
    (8, True): ir.DataType.INT8,
    (8, False): ir.DataType.UINT8,
    (4, True): ir.DataType.INT4,
    (4, False): ir.DataType.UINT4,
}


@dataclass(frozen=True)
class _Stored:
    """An IntWeight in the graph. `parts` are the integers, the scale and, where there is one, the zero point."""

    weight: IntWeight
    channel_axis: int
    parts: list[ir.Value]

    @property
    def inputs(self) -> int:
        return self.weight.q.shape[0]

    @property
    def channels(self) -> int:
        return self.weight.q.shape[1]


def choose_weights(model: ir.Model, sites: dict[str, Site], tables: Grid) -> dict[str, IntWeight]:
    """What `quantize_weights` takes: the weights of `sites`, and tables rounded to nearest on a grid of their own.

    A table that a projection without a site reads is left out.
    """
    projections = find_projections(model.graph)
    weights = {p.weight.name: sites[p.name].weight for p in projections if p.name in sites and sites[p.name].weight}
    floating = {p.weight for p in projections if p.name not in sites}
    for table in find_tables(model.graph) - floating:
        rows = next(
            (p.channel_axis == 0 for p in projections if p.weight is table), True
        )  # [V, D], as look-ups have it
        array = table.const_value.numpy()
        weights[table.name] = round_to_nearest(array.T if rows else array, tables)
    return weights


def quantize_weights(
    model: ir.Model, weights: dict[str, IntWeight], target: Target
) -> tuple[list[Projection], list[Embedding]]:
    """Rewrite `model` in place, every product with and look-up in one of `weights`; returns what was rewritten.

    `weights` holds matrices [K, N] by the name of the initializer that each replaces; others stay as they are.
    Raises UserError where `target` has no form for a grid, or the opset of `model` is below 21 for `portable`.
    """
    graph = model.graph
    projections = [projection for projection in find_projections(graph) if projection.weight.name in weights]
    embeddings = [embedding for embedding in find_embeddings(graph) if embedding.table.name in weights]
    axes: dict[str, set[int]] = {}
    for projection in projections:
        axes.setdefault(projection.weight.name, set()).add(projection.channel_axis)
    for embedding in embeddings:
        axes.setdefault(embedding.table.name, set()).add(0)
    if target == "portable" and axes and graph.opset_imports[""] < _PORTABLE_OPSET:
        raise UserError(
            f"opset {graph.opset_imports['']} has no blocks and no 4-bit integers; export with OPSET={_PORTABLE_OPSET}"
        )

    store, multiply, look_up = _FORMS[target]
    stored = {}
    for name, used in axes.items():
        if len(used) > 1:
            raise UserError(f"{name}: is multiplied both as it is and turned; leave it out of the weights to quantize")
        stored[name] = store(graph, name, weights[name], used.pop())
    for embedding in embeddings:
        tape, ids = ir.tape.Tape(), embedding.node.inputs[1]
        replace_node(graph, embedding.node, tape, look_up(graph, tape, stored[embedding.table.name], ids))
    for projection in projections:
        tape, x = ir.tape.Tape(), projection.node.inputs[0]  # which an earlier rewrite may have replaced
        result = multiply(tape, stored[projection.weight.name], x, projection.bias)
        replace_node(graph, projection.node, tape, result)
    if target == "ort" and stored:
        graph.opset_imports[ORT] = 1
    clean(model)
    return projections, embeddings


def _scale(weight: IntWeight) -> np.ndarray:
    """float32 [G, N], 0 for a block of zeros: int8 kernels take the zero point off after the sum, which rounds."""
    block = weight.grid.block or len(weight.q)
    starts = np.arange(0, len(weight.q), block)
    spread = np.repeat(weight.zero_point, block, axis=0)[: len(weight.q)]
    return np.where(np.logical_or.reduceat(weight.q != spread, starts), weight.scale, np.float32(0))


def _store_portable(graph: ir.Graph, name: str, weight: IntWeight, channel_axis: int) -> _Stored:
    grid = weight.grid
    dtype, turned = _TYPES[grid.bits, grid.symmetric], channel_axis == 0
    scale, zero_point = _scale(weight), weight.zero_point
    if grid.block is None:
        scale, zero_point = scale[0], zero_point[0]
    q = weight.q.T if turned else weight.q
    arrays = {"scale": scale}
    if not grid.symmetric:
        arrays["zero_point"] = zero_point.astype(dtype.numpy())
    parts = [
        lazy_constant(graph, f"{name}_int{grid.bits}", dtype, q.shape, lambda: q.astype(dtype.numpy(), copy=False)),
        *(
            constant(graph, f"{name}_{suffix}", np.ascontiguousarray(array.T if turned else array))
            for suffix, array in arrays.items()
        ),
    ]
    return _Stored(weight, channel_axis, parts)


def _multiply_portable(tape: ir.tape.Tape, stored: _Stored, x: ir.Value, bias: ir.Value | None) -> ir.Value:
    """x [.., K] · (q − zero point) · scale [K, N] + bias."""
    parts, block = stored.parts, stored.weight.grid.block
    if stored.channel_axis == 0:
        parts = [_transpose(tape, part) for part in parts]
    if block is None:
        matrix = _dequantize(tape, *parts)
    else:
        matrix = tape.op("DequantizeLinear", parts, {"axis": 0, "block_size": block})
    result = tape.op("MatMul", [x, matrix])  # [.., N]
    return result if bias is None else tape.op("Add", [result, bias])


def _dequantize(tape: ir.tape.Tape, q: ir.Value, scale: ir.Value, zero_point: ir.Value | None = None) -> ir.Value:
    """(q − zero point) · scale in float32, by broadcasting."""
    result = tape.op("Cast", [q], {"to": ir.DataType.FLOAT})
    if zero_point is not None:
        result = tape.op("Sub", [result, tape.op("Cast", [zero_point], {"to": ir.DataType.FLOAT})])
    return tape.op("Mul", [result, scale])


def _transpose(tape: ir.tape.Tape, part: ir.Value) -> ir.Value:
    """[K, N] of [N, K]; one scale a channel [N] has no other side."""
    return part if len(part.shape) == 1 else tape.op("Transpose", [part], {"perm": [1, 0]})


def _look_up_portable(graph: ir.Graph, tape: ir.tape.Tape, stored: _Stored, ids: ir.Value) -> ir.Value:
    """Rows ids [..] of the table and their scales, dequantized: float32 [.., D]."""
    grid = stored.weight.grid
    rows = []
    for part in stored.parts:
        source = part
        if part.dtype.bitwidth == 4:
            # Gather knows no 4-bit integers. ONNX Runtime does this Cast once, at load: a byte a weight in memory.
            source = tape.op("Cast", [part], {"to": _TYPES[8, grid.symmetric]})
        if len(part.shape) == 1:
            # In front of Gather, so that it folds to a tensor of its own: ONNX Runtime does not fuse a product
            # whose scale something else reads.
            source = tape.op("Unsqueeze", [source, _vector(graph, "axis_last", -1)])
        rows.append(tape.op("Gather", [source, ids]))
    if grid.block is None:
        # DequantizeLinear could say it as blocks of a whole row, which OpenVINO 2026.4 takes of constants alone.
        return _dequantize(tape, *rows)
    return tape.op("DequantizeLinear", rows, {"axis": -1, "block_size": grid.block})


def _store_ort(graph: ir.Graph, name: str, weight: IntWeight, channel_axis: int) -> _Stored:
    grid, (inputs, channels) = weight.grid, weight.q.shape
    block = _ort_block(weight)
    if block < 16 or block & (block - 1):
        raise UserError(
            f"{name}: blocks of {block} with target ort; MatMulNBits needs blocks of a power of two from 16 on, or take target portable"
        )
    shift = 2 ** (grid.bits - 1) if grid.symmetric else 0
    blocks = -(-inputs // block)

    def packed() -> np.ndarray:
        q = np.zeros((channels, blocks * block), np.uint8)
        q[:, :inputs] = weight.q.T.view(np.uint8) + np.uint8(shift)  # modulo 256
        return _pack(q, grid.bits).reshape(shape)

    shape = (channels, blocks, block * grid.bits // 8)
    scale, zero_point = np.ascontiguousarray(_scale(weight).T), None if grid.symmetric else weight.zero_point.T
    if grid.block is None and zero_point is not None:
        zero_point = np.repeat(zero_point, blocks, axis=1)
    parts = [
        lazy_constant(graph, f"{name}_int{grid.bits}", ir.DataType.UINT8, shape, packed),
        constant(graph, f"{name}_scale", scale),
    ]
    if grid.block is None:
        parts[1] = _spread(graph, parts[1], blocks)
    if zero_point is not None:
        parts.append(constant(graph, f"{name}_zero_point", _pack(zero_point, grid.bits)))
    return _Stored(weight, channel_axis, parts)


def _ort_block(weight: IntWeight) -> int:
    """The operator's block: the grid's, or where that has none, the largest to 128 that divides the inputs, else 32.

    A scale a channel fits blocks of any size. Activations get a scale a block, so larger ones would cost quality.
    """
    if weight.grid.block is not None:
        return weight.grid.block
    return next((block for block in (128, 64, 32, 16) if len(weight.q) % block == 0), 32)


def _spread(graph: ir.Graph, scale: ir.Value, blocks: int) -> ir.Value:
    """scale [N, 1] as [N, G]; ONNX Runtime does this once, at load."""
    tape = ir.tape.Tape()
    spread = tape.op("Expand", [scale, _vector(graph, f"shape_1_{blocks}", 1, blocks)])
    graph.insert_before(graph[0], tape.nodes)
    return spread


def _pack(values: np.ndarray, bits: int) -> np.ndarray:
    """uint8 [N, n] below 2^bits -> uint8 [N, ⌈n · bits / 8⌉], the first of two in the lower half of a byte."""
    if bits == 8:
        return np.ascontiguousarray(values)
    packed = values[:, ::2].copy()
    packed[:, : values.shape[1] // 2] |= values[:, 1::2] << 4
    return packed


def _multiply_ort(tape: ir.tape.Tape, stored: _Stored, x: ir.Value, bias: ir.Value | None) -> ir.Value:
    """MatMulNBits(x [.., K], W, scale, zero point, -, bias) [.., N]; ONNX Runtime fuses an Add behind it at load."""
    grid = stored.weight.grid
    inputs = [x, *stored.parts]
    if bias is not None:
        inputs += [None] * (5 - len(inputs)) + [bias]
    sizes = {"K": stored.inputs, "N": stored.channels, "bits": grid.bits, "block_size": _ort_block(stored.weight)}
    return tape.op("MatMulNBits", inputs, sizes | {"accuracy_level": _INT8_COMPUTE}, domain=ORT)


def _look_up_ort(graph: ir.Graph, tape: ir.tape.Tape, stored: _Stored, ids: ir.Value) -> ir.Value:
    """GatherBlockQuantized of rows ids [..]: float32 [.., D], without the padding of the last block."""
    grid = stored.weight.grid
    table, scale, *zero_point = stored.parts
    rows_of_bytes = tape.op("Reshape", [table, _vector(graph, f"shape_{stored.channels}_rows", stored.channels, -1)])
    inputs = [rows_of_bytes, ids, scale, *zero_point]
    block = _ort_block(stored.weight)
    attributes = {"bits": grid.bits, "block_size": block, "gather_axis": 0, "quantize_axis": 1}
    rows = tape.op("GatherBlockQuantized", inputs, attributes, domain=ORT)
    if stored.inputs % block == 0:
        return rows
    start, end, axis = (
        _vector(graph, name, value)
        for name, value in (("slice_start", 0), (f"slice_end_{stored.inputs}", stored.inputs), ("axis_last", -1))
    )
    return tape.op("Slice", [rows, start, end, axis])


def _vector(graph: ir.Graph, name: str, *values: int) -> ir.Value:
    return constant(graph, name, np.array(values, np.int64))


# How a matrix is stored, multiplied with, and looked up in.
_FORMS = {
    "portable": (_store_portable, _multiply_portable, _look_up_portable),
    "ort": (_store_ort, _multiply_ort, _look_up_ort),
}
