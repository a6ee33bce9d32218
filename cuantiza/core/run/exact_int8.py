"""Whether ONNX Runtime's u8·s8 matmuls are exact on this processor, and the session option that makes them exact.

x86-64 without VNNI multiplies with the instruction vpmaddubsw, which clips the sum of two neighbouring products to 16
bits. The option converts the weights to u8, for kernels that widen to more bits first. With VNNI these are up to twice
as slow, so the option is set only where a test matmul comes out wrong. Its name and rule are in ONNX Runtime's
onnxruntime_session_options_config_keys.h, kOrtSessionOptionsAvx2PrecisionMode.
"""

from __future__ import annotations

import functools
import platform

import numpy as np
import onnxruntime as ort

EXACT = {"session.x64quantprecision": "1"}
# A manifest's note for programs that open an artifact with integer matmuls; cuantiza/core/run/runtime.py needs none.
SESSION_OPTIONS = {"session_options": {"x86-64 without VNNI": EXACT}}
# Sizes that reach the main loop of every kernel.
_INPUTS, _CHANNELS = 32, 16


@functools.cache
def exact_products() -> dict[str, str]:
    """The session options, by name, that make integer matmuls exact on this processor; empty if they are anyway."""
    if platform.machine() not in ("x86_64", "AMD64"):
        return {}  # the option exists for x86-64 only
    return EXACT if saturates(probe(), {}) else {}


def probe() -> bytes:
    """The bytes of an ONNX file with one matmul that shows the clipping: input `rows` u8 [M, 32], weights s8 [32, 16].

    All weights are 127. For inputs of 255, 255 · 127 + 255 · 127 = 64,770 is clipped to 32,767.
    """
    from onnx import (  # imported here, because emulated processors (lab/matrix/emulation) have no onnx
        TensorProto,
        helper,
    )

    weights = np.full((_INPUTS, _CHANNELS), 127, np.int8)
    tensor = helper.make_tensor("columns", TensorProto.INT8, weights.shape, weights.tobytes(), raw=True)
    graph = helper.make_graph(
        [helper.make_node("MatMulInteger", ["rows", "columns"], ["sums"])],
        "probe",
        [helper.make_tensor_value_info("rows", TensorProto.UINT8, ["M", _INPUTS])],
        [helper.make_tensor_value_info("sums", TensorProto.INT32, ["M", _CHANNELS])],
        [tensor],
    )
    opset = [helper.make_opsetid("", 21)]
    return bytes(helper.make_model(graph, opset_imports=opset, ir_version=10).SerializeToString())


def saturates(model: bytes, options: dict[str, str]) -> bool:
    """Whether `model` (from `probe`) gives wrong sums on this processor, in a session with `options`.

    It is run with one input row and with five, because they take different kernels.
    """
    settings = ort.SessionOptions()
    settings.intra_op_num_threads = 1
    for name, value in options.items():
        settings.add_session_config_entry(name, value)
    session = ort.InferenceSession(model, settings, providers=["CPUExecutionProvider"])
    found = [session.run(None, {"rows": np.full((rows, _INPUTS), 255, np.uint8)})[0] for rows in (1, 5)]
    return any(bool((sums != 255 * 127 * _INPUTS).any()) for sums in found)
