"""Weight-only quantization: 8-bit or 4-bit weights with a scale per block of inputs; activations stay in float.

A weight is [K, N] here, for x [.., K] · W [K, N], as in rounding.py. G = ⌈K / block⌉ blocks run along the inputs K; the
last one is shorter where `block` does not divide K. An embedding matrix [V, D] is such a weight with K = D and N = V.

The two targets store the same integers in different forms. In both, a matrix that embedding and head share is stored
once.

The target `portable` uses standard operators (DequantizeLinear of opset 21). A matrix keeps its stored orientation:
    [K, N]                          scale and zero point [G, N], or [N] without blocks
    [N, K], embedding matrices      scale and zero point [N, G], or [N] without blocks
  The type is int8 or int4 where the grid is symmetric (no zero point), and uint8 or uint4 where it is not.
  In 8 bits, and without blocks, q · scale is a Cast and a Mul of constants, which runtimes fold at load; the scales of
  blocks are repeated for their inputs. Results, speed and memory are then those of fp32, with a file a quarter of the size.
  Where the grid has 8-bit scales, they are stored as uint8 and multiplied, Cast and Mul, by a step float32 per channel.
  Runtimes fold this at load, too.
  In 4 bits with blocks, ONNX Runtime 1.32 fuses DequantizeLinear and MatMul into MatMulNBits at load. It does so for blocks
  of a power of two from 16 on, along axis 0 of [K, N]. It folds a transposed constant before that, so the Transpose stands
  before DequantizeLinear. Other blocks give correct results too, but every run dequantizes the whole matrix.
  The fused operator quantizes activations to int8, with a scale per block, unless the session sets
  session.qdq_matmulnbits_accuracy_level to 0.

The target `ort` uses com.microsoft operators (ONNX Runtime's docs/ContribOperators.md). Zeros pad K to G · block:
    weight      uint8 [N, G, block · bits / 8] for MatMulNBits, as [N, G · block · bits / 8] for GatherBlockQuantized
    scale       float32 [N, G]
    zero point  uint8 [N, ⌈G · bits / 8⌉], left out where it is 2^(bits−1), which is what a symmetric grid becomes
  Without blocks, the per-channel scale [N, 1] is repeated for the operator's blocks at load, and a zero point is
  repeated when the file is written. Two 4-bit numbers share a byte, the first in the lower half, as in ONNX's own int4.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np
import onnx_ir as ir

from cuantiza.core.errors import UserError
from cuantiza.quantize.decide.decision import Decision
from cuantiza.quantize.rewrite.edit import clean, constant, lazy_constant, replace_node
from cuantiza.quantize.rewrite.find import Embedding, Projection, find_embeddings, find_projections, find_tables
from cuantiza.quantize.rewrite.fuse_attention import ORT
from cuantiza.quantize.settings import BLOCKS_OPSET, Target, check_opset
from cuantiza.quantize.weights.rounding import Grid, IntWeight, round_to_nearest

# The accuracy_level that lets MatMulNBits quantize activations to int8, with a scale per block: its fast path.
_INT8_COMPUTE = 4
_TYPES = {
    (8, True): ir.DataType.INT8,
    (8, False): ir.DataType.UINT8,
    (4, True): ir.DataType.INT4,
    (4, False): ir.DataType.UINT4,
}


@dataclass(frozen=True)
class _Stored:
    """An IntWeight in the graph. `parts` are its integers, its scale and, if it has one, its zero point."""

    weight: IntWeight
    channel_axis: int
    parts: list[ir.Value]

    @property
    def inputs(self) -> int:
        return self.weight.q.shape[0]

    @property
    def channels(self) -> int:
        return self.weight.q.shape[1]


def choose_weights(
    model: ir.Model, decisions: dict[str, Decision], tables: Grid, grids: Mapping[str, Grid] = MappingProxyType({})
) -> dict[str, IntWeight]:
    """Collect the integer weights for `quantize_weights`, by the names of their initializers.

    Linear layers have the weights of `decisions`. The other matrices of the embeddings and the head are rounded to
    nearest here, on the grid that `grids` has for their name, or else `tables`. A matrix that a linear layer outside `decisions` reads is left out.
    """
    projections = find_projections(model.graph)
    weights = {
        p.weight.name: decisions[p.name].weight for p in projections if p.name in decisions and decisions[p.name].weight
    }
    floating = {p.weight for p in projections if p.name not in decisions}
    for matrix in find_tables(model.graph) - floating:
        if matrix.name in weights:
            continue
        rows = next(
            (p.channel_axis == 0 for p in projections if p.weight is matrix), True
        )  # [V, D], as embeddings store it
        array = matrix.const_value.numpy()
        weights[matrix.name] = round_to_nearest(array.T if rows else array, grids.get(matrix.name, tables))
    return weights


def quantize_weights(
    model: ir.Model, weights: dict[str, IntWeight], target: Target
) -> tuple[list[Projection], list[Embedding]]:
    """Quantize, in place, every linear layer and embedding that reads one of `weights`; return those.

    `weights` maps the name of an initializer to the matrix [K, N] that replaces it; other initializers stay as they
    are. Raises UserError where a weight is multiplied both as stored and transposed, or where the target is `portable` and
    the opset of `model` is below 21.
    """
    graph = model.graph
    projections = [projection for projection in find_projections(graph) if projection.weight.name in weights]
    embeddings = [embedding for embedding in find_embeddings(graph) if embedding.table.name in weights]
    axes: dict[str, set[int]] = {}
    for projection in projections:
        axes.setdefault(projection.weight.name, set()).add(projection.channel_axis)
    for embedding in embeddings:
        axes.setdefault(embedding.table.name, set()).add(0)
    if target == "portable" and axes:
        check_opset(graph.opset_imports[""], BLOCKS_OPSET)

    store, multiply, embed = _FORMS[target]
    stored = {}
    for name, used in axes.items():
        if len(used) > 1:
            raise UserError(
                f"{name}: is multiplied both as stored and transposed; leave it out of the weights to quantize"
            )
        stored[name] = store(graph, name, weights[name], used.pop())
    for embedding in embeddings:
        tape, ids = ir.tape.Tape(), embedding.node.inputs[1]
        replace_node(graph, embedding.node, tape, embed(graph, tape, stored[embedding.table.name], ids))
    for projection in projections:
        # Not projection.x, which an earlier rewrite may have replaced.
        tape, x = ir.tape.Tape(), projection.node.inputs[0]
        result = multiply(graph, tape, stored[projection.weight.name], x, projection.bias)
        replace_node(graph, projection.node, tape, result)
    if target == "ort" and stored:
        graph.opset_imports[ORT] = 1
    clean(model)
    return projections, embeddings


def _scale(weight: IntWeight) -> np.ndarray:
    """Return the scales float32 [G, N], with scale 0 for a block of zeros.

    int8 kernels subtract the zero point after the sum, which rounds: only scale 0 makes such a block exactly 0.
    """
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
    parts = [
        lazy_constant(graph, f"{name}_int{grid.bits}", dtype, q.shape, lambda: q.astype(dtype.numpy(), copy=False)),
        _store_scale(graph, name, scale, weight.step, turned),
    ]
    if not grid.symmetric:
        zero_point = zero_point.astype(dtype.numpy())
        parts.append(
            constant(graph, f"{name}_zero_point", np.ascontiguousarray(zero_point.T if turned else zero_point))
        )
    return _Stored(weight, channel_axis, parts)


def _store_scale(graph: ir.Graph, name: str, scale: np.ndarray, step: np.ndarray | None, turned: bool) -> ir.Value:
    """Store the scales [.., N] in float32, or as multiples uint8 of `step` [N], which are multiplied at load.

    The result is [N, ..] if `turned`. A Cast and a Mul of constants are folded by every runtime that we know; they come
    first in the graph, so that one that does not computes them once a run.
    """
    if step is None:
        return constant(graph, f"{name}_scale", np.ascontiguousarray(scale.T if turned else scale))
    multiples = np.rint(scale / step).astype(np.uint8)
    stored = constant(graph, f"{name}_scale_uint8", np.ascontiguousarray(multiples.T if turned else multiples))
    tape = ir.tape.Tape()
    cast = tape.op("Cast", [stored], {"to": ir.DataType.FLOAT})
    result = tape.op("Mul", [cast, constant(graph, f"{name}_scale_step", step[:, None] if turned else step)])
    result.name, result.type, result.shape = f"{name}_scale", ir.TensorType(ir.DataType.FLOAT), stored.shape
    graph.insert_before(graph[0], tape.nodes)
    return result


def _multiply_portable(
    graph: ir.Graph, tape: ir.tape.Tape, stored: _Stored, x: ir.Value, bias: ir.Value | None
) -> ir.Value:
    """Add the nodes of x [.., K] · ((q − zero point) · scale) [K, N] + bias."""
    parts, grid = stored.parts, stored.weight.grid
    if grid.block is not None and grid.bits == 8:
        matrix = _dequantize_blocks(graph, tape, stored)
    else:
        if stored.channel_axis == 0:
            parts = [_transpose(tape, part) for part in parts]
        blocked = {"axis": 0, "block_size": grid.block}
        matrix = _dequantize(tape, *parts) if grid.block is None else tape.op("DequantizeLinear", parts, blocked)
    result = tape.op("MatMul", [x, matrix])  # [.., N]
    return result if bias is None else tape.op("Add", [result, bias])


def _dequantize(tape: ir.tape.Tape, q: ir.Value, scale: ir.Value, zero_point: ir.Value | None = None) -> ir.Value:
    """Add the nodes of (q − zero point) · scale in float32; zero point and scale are broadcast."""
    result = tape.op("Cast", [q], {"to": ir.DataType.FLOAT})
    if zero_point is not None:
        result = tape.op("Sub", [result, tape.op("Cast", [zero_point], {"to": ir.DataType.FLOAT})])
    return tape.op("Mul", [result, scale])


def _dequantize_blocks(graph: ir.Graph, tape: ir.tape.Tape, stored: _Stored) -> ir.Value:
    """Add the nodes of the matrix float32 [K, N] of integers with a scale per block, which runtimes fold at load.

    A DequantizeLinear would do, but ONNX Runtime fuses it with the matmul, and that quantizes the activations too.
    """
    axis = 1 - stored.channel_axis  # that of the inputs
    others = [_repeat(graph, tape, part, axis, stored) for part in stored.parts[1:]]
    matrix = _dequantize(tape, stored.parts[0], *others)
    return matrix if axis == 0 else tape.op("Transpose", [matrix], {"perm": [1, 0]})


def _repeat(graph: ir.Graph, tape: ir.tape.Tape, part: ir.Value, axis: int, stored: _Stored) -> ir.Value:
    """Repeat `part`, which has an element for each block of inputs along `axis`, for each input."""
    block, channels = stored.weight.grid.block, stored.channels
    blocks = -(-stored.inputs // block)
    wide = [blocks, block, channels] if axis == 0 else [channels, blocks, block]
    flat = [blocks * block, channels] if axis == 0 else [channels, blocks * block]
    repeated = tape.op("Unsqueeze", [part, _vector(graph, f"axis_{axis + 1}", axis + 1)])
    repeated = tape.op("Expand", [repeated, _vector(graph, f"shape_{'_'.join(map(str, wide))}", *wide)])
    repeated = tape.op("Reshape", [repeated, _vector(graph, f"shape_{'_'.join(map(str, flat))}", *flat)])
    if blocks * block == stored.inputs:
        return repeated
    ends = [("slice_start", 0), (f"slice_end_{stored.inputs}", stored.inputs), (f"axis_{axis}", axis)]
    return tape.op("Slice", [repeated, *(_vector(graph, name, value) for name, value in ends)])


def _transpose(tape: ir.tape.Tape, part: ir.Value) -> ir.Value:
    """Transpose [N, K] to [K, N]. A per-channel scale or zero point [N] stays as it is."""
    return part if len(part.shape) == 1 else tape.op("Transpose", [part], {"perm": [1, 0]})


def _embed_portable(graph: ir.Graph, tape: ir.tape.Tape, stored: _Stored, ids: ir.Value) -> ir.Value:
    """Gather the rows `ids` [..] of the integers and of their scales, and dequantize them: float32 [.., D]."""
    grid = stored.weight.grid
    rows = []
    for part in stored.parts:
        source = part
        if part.dtype.bitwidth == 4:
            # Gather does not support 4-bit integers. ONNX Runtime folds this Cast at load, so that the matrix takes a
            # byte per weight in memory.
            source = tape.op("Cast", [part], {"to": _TYPES[8, grid.symmetric]})
        if len(part.shape) == 1:
            # ONNX Runtime does not fuse a matmul whose scale is read by another node, too. This Unsqueeze stands before
            # the Gather, where it is folded at load into a tensor of its own.
            source = tape.op("Unsqueeze", [source, _vector(graph, "axis_last", -1)])
        rows.append(tape.op("Gather", [source, ids]))
    # A DequantizeLinear of the rows, in blocks, would do, but OpenVINO 2026.4 accepts that for constants only.
    if grid.block is None:
        return _dequantize(tape, *rows)
    if stored.inputs % grid.block == 0:
        blocks = stored.inputs // grid.block
        wide = _vector(graph, f"shape_rows_{blocks}_{grid.block}", -1, blocks, grid.block)
        narrow = _vector(graph, f"shape_rows_{blocks}_1", -1, blocks, 1)
        parts = [tape.op("Reshape", [part, narrow if place else wide]) for place, part in enumerate(rows)]
        width = _vector(graph, f"width_{stored.inputs}", stored.inputs)
        shape = tape.op("Concat", [tape.op("Shape", [ids]), width], {"axis": 0})
        return tape.op("Reshape", [_dequantize(tape, *parts), shape])
    return tape.op("DequantizeLinear", rows, {"axis": -1, "block_size": grid.block})


def _store_ort(graph: ir.Graph, name: str, weight: IntWeight, channel_axis: int) -> _Stored:
    grid, (inputs, channels) = weight.grid, weight.q.shape
    block = _ort_block(weight)
    shift = 2 ** (grid.bits - 1) if grid.symmetric else 0
    blocks = -(-inputs // block)

    def packed() -> np.ndarray:
        q = np.zeros((channels, blocks * block), np.uint8)
        q[:, :inputs] = weight.q.T.view(np.uint8) + np.uint8(shift)  # modulo 256
        return _pack(q, grid.bits).reshape(shape)

    shape = (channels, blocks, block * grid.bits // 8)
    zero_point = None if grid.symmetric else weight.zero_point.T
    if grid.block is None and zero_point is not None:
        zero_point = np.repeat(zero_point, blocks, axis=1)
    parts = [
        lazy_constant(graph, f"{name}_int{grid.bits}", ir.DataType.UINT8, shape, packed),
        _store_scale(graph, name, _scale(weight), weight.step, turned=True),
    ]
    if grid.block is None:
        parts[1] = _expand(graph, parts[1], blocks)
    if zero_point is not None:
        parts.append(constant(graph, f"{name}_zero_point", _pack(zero_point, grid.bits)))
    return _Stored(weight, channel_axis, parts)


def _ort_block(weight: IntWeight) -> int:
    """Return the operator's block size: that of the grid, or the largest up to 128 that divides the inputs, or else 32.

    A per-channel scale would allow blocks of any size. But the operator gives activations one scale per block, so
    larger blocks would cost quality.
    """
    if weight.grid.block is not None:
        return weight.grid.block
    return next((block for block in (128, 64, 32, 16) if len(weight.q) % block == 0), 32)


def _expand(graph: ir.Graph, scale: ir.Value, blocks: int) -> ir.Value:
    """Expand the per-channel scale [N, 1] to [N, G]; ONNX Runtime does this once, at load."""
    tape = ir.tape.Tape()
    expanded = tape.op("Expand", [scale, _vector(graph, f"shape_1_{blocks}", 1, blocks)])
    graph.insert_before(graph[0], tape.nodes)
    return expanded


def _pack(values: np.ndarray, bits: int) -> np.ndarray:
    """Pack numbers below 2^bits, uint8 [N, n], into uint8 [N, ⌈n · bits / 8⌉].

    Of two 4-bit numbers in a byte, the first is in the lower half.
    """
    if bits == 8:
        return np.ascontiguousarray(values)
    packed = values[:, ::2].copy()
    packed[:, : values.shape[1] // 2] |= values[:, 1::2] << 4
    return packed


def _multiply_ort(_: ir.Graph, tape: ir.tape.Tape, stored: _Stored, x: ir.Value, bias: ir.Value | None) -> ir.Value:
    """Add MatMulNBits(x [.., K], W, scale, zero point, -, bias) [.., N].

    Where the bias is a separate Add after it, ONNX Runtime fuses the two at load.
    """
    grid = stored.weight.grid
    inputs = [x, *stored.parts]
    if bias is not None:
        inputs += [None] * (5 - len(inputs)) + [bias]
    sizes = {"K": stored.inputs, "N": stored.channels, "bits": grid.bits, "block_size": _ort_block(stored.weight)}
    return tape.op("MatMulNBits", inputs, sizes | {"accuracy_level": _INT8_COMPUTE}, domain=ORT)


def _embed_ort(graph: ir.Graph, tape: ir.tape.Tape, stored: _Stored, ids: ir.Value) -> ir.Value:
    """Add GatherBlockQuantized of the rows `ids` [..]: float32 [.., D], without the padding of the last block."""
    grid = stored.weight.grid
    q, scale, *zero_point = stored.parts
    rows_of_bytes = tape.op("Reshape", [q, _vector(graph, f"shape_{stored.channels}_rows", stored.channels, -1)])
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


# For each target, the functions that store a matrix, multiply by it, and gather embeddings from it.
_FORMS = {
    "portable": (_store_portable, _multiply_portable, _embed_portable),
    "ort": (_store_ort, _multiply_ort, _embed_ort),
}
