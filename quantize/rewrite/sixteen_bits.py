"""Activations of 16 bits for kernels of 8: a second uint8 tensor holds what the first one rounds away.

Both have zero point 128, so one integer matmul can multiply the rows of both, and the weights are read once: a model that
generates, where reading the weights takes the time, is hardly slower. The second matmul costs a long prompt about what a
matmul in floating point would, but the weights stay in 8 bits.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from cuantiza.quantize.decide.activation import RESIDUAL_STEPS, RESIDUAL_ZERO
from cuantiza.quantize.rewrite.edit import constant


def quantize_twice(
    graph: ir.Graph, tape: ir.tape.Tape, x: ir.Value, scale: np.float32, zero_point: np.uint8
) -> ir.Value:
    """Add the quantization of x [.., T, K] to 16 bits: uint8 [.., 2T, K].

    The first T rows are u8(x), with `scale` and `zero_point`, which is 128; the others are what that rounds away, with
    a scale of 1/254.
    """
    assert zero_point == RESIDUAL_ZERO, f"zero point {zero_point}: both halves need {RESIDUAL_ZERO}"
    zero = constant(graph, f"zero_point_{RESIDUAL_ZERO}", zero_point)
    step = constant(graph, f"scale_{scale:.9g}", scale)
    fine_step = constant(graph, f"scale_{scale / RESIDUAL_STEPS:.9g}", np.float32(scale / RESIDUAL_STEPS))
    coarse = tape.op("QuantizeLinear", [x, step, zero])
    rest = tape.op("Sub", [x, tape.op("DequantizeLinear", [coarse, step, zero])])
    fine = tape.op("QuantizeLinear", [rest, fine_step, zero])
    return tape.op("Concat", [coarse, fine], {"axis": -2})


def add_residual(graph: ir.Graph, tape: ir.tape.Tape, matmul: ir.Value) -> ir.Value:
    """Add the sum [.., T, N] of the two halves of `matmul` [.., 2T, N], of which the second counts 1/254."""
    coarse, fine = tape.op_multi_out("Split", [matmul], {"axis": -2, "num_outputs": 2}, num_outputs=2)
    share = constant(graph, f"one_over_{RESIDUAL_STEPS}", np.float32(1 / RESIDUAL_STEPS))
    return tape.op("Add", [coarse, tape.op("Mul", [fine, share])])
