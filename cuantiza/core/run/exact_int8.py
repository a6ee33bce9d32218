"""Whether ONNX Runtime's products of u8 and s8 are exact on this processor, and the session option that makes them so.

x86-64 without VNNI multiplies them with vpmaddubsw, which clips the sum of two neighbouring products to 16 bits. The
option makes those weights u8, which takes kernels that widen first. They are up to twice as slow where VNNI is, so that
it is set by what a product comes to, and not everywhere. Its name and rule: ONNX Runtime's
onnxruntime_session_options_config_keys.h, kOrtSessionOptionsAvx2PrecisionMode.
"""

from __future__ import annotations

import functools
import platform

import numpy as np
import onnxruntime as ort

EXACT = {"session.x64quantprecision": "1"}
# The manifest's note on this for whoever opens an integer artifact elsewhere; cuantiza/core/run/runtime.py needs none.
SESSION_OPTIONS = {"session_options": {"x86-64 without VNNI": EXACT}}
# Enough inputs and channels for the main loop of every kernel.
_INPUTS, _CHANNELS = 32, 16


@functools.cache
def exact_products() -> dict[str, str]:
    """Session options, by name, that integer products need to be exact here: none where they are."""
    if platform.machine() not in ("x86_64", "AMD64"):
        return {}  # the option is for x86-64 alone
    return EXACT if saturates(probe(), {}) else {}


def probe() -> bytes:
    """An ONNX file with the one product that shows it: `rows` u8 [M, 32] by columns of 127, s8 [32, 16].

    255 · 127 + 255 · 127 = 64,770 is clipped to 32,767.
    """
    from onnx import TensorProto, helper  # here, as emulated processors have no such package

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
    """Whether sums of `model` (from `probe`) come out wrong here in a session with `options`.

    For one row and for several, which take different kernels.
    """
    settings = ort.SessionOptions()
    settings.intra_op_num_threads = 1
    for name, value in options.items():
        settings.add_session_config_entry(name, value)
    session = ort.InferenceSession(model, settings, providers=["CPUExecutionProvider"])
    found = [session.run(None, {"rows": np.full((rows, _INPUTS), 255, np.uint8)})[0] for rows in (1, 5)]
    return any(bool((sums != 255 * 127 * _INPUTS).any()) for sums in found)
