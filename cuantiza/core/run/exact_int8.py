"""Whether ONNX Runtime's u8·s8 matmuls are exact on this processor, and the session option that makes them exact.

x86-64 without VNNI multiplies with the instruction vpmaddubsw, which clips the sum of two neighbouring products to 16
bits. Our own int8 recipes choose weights that never reach this limit (`pairs` in quantize/weights/rounding.py). Weights of
other tools do. For them, the option converts the weights to u8, for kernels that widen to more bits first. With VNNI these
are up to twice as slow, so the option is set only where a test matmul comes out wrong. Its name and rule are in ONNX
Runtime's onnxruntime_session_options_config_keys.h, kOrtSessionOptionsAvx2PrecisionMode.
"""

from __future__ import annotations

import functools
import json
import platform
from pathlib import Path

import numpy as np
import onnxruntime as ort

from cuantiza.core.store.artifact import MANIFEST, SCHEMA

EXACT = {"session.x64quantprecision": "1"}
# A manifest's note for programs that open an artifact whose integer matmuls may be clipped; `exact_options` reads it.
_NOTE = "session_options"
SESSION_OPTIONS = {_NOTE: {"x86-64 without VNNI": EXACT}}
# Sizes that reach the main loop of every kernel.
_INPUTS, _CHANNELS = 32, 16
_UINT8, _INT8, _INT32 = 2, 3, 6  # TensorProto.DataType


def exact_options(model: Path) -> dict[str, str]:
    """The session options, by name, that make the integer matmuls of the ONNX file `model` exact on this processor.

    There are none for a file whose manifest asks for none. A file without a manifest may be of any tool.
    """
    try:
        manifest = json.loads((model.parent / MANIFEST).read_bytes())
        if manifest["schema"] == SCHEMA and _NOTE not in manifest["details"]:
            return {}
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        pass  # no artifact's folder; whoever needs a whole artifact opens it by cuantiza/core/store/artifact.py
    return exact_products()


@functools.cache
def exact_products() -> dict[str, str]:
    """The session options, by name, that make integer matmuls exact on this processor; empty if they are anyway."""
    if platform.machine() not in ("x86_64", "AMD64"):
        return {}  # the option exists for x86-64 only
    return EXACT if saturates(probe(), {}) else {}


def probe() -> bytes:
    """The bytes of an ONNX file with one matmul that shows the clipping: input `rows` u8 [M, 32], weights s8 [32, 16].

    All weights are 127. For inputs of 255, 255 · 127 + 255 · 127 = 64,770 is clipped to 32,767.

    The message is written by the rules of protobuf's encoding, with the field numbers of onnx.proto3: every session
    needs it, and importing onnx would take as long as opening the session. Emulated processors (lab/matrix/emulation)
    have no onnx either.
    """
    weights = np.full((_INPUTS, _CHANNELS), 127, np.int8)
    node = _text(1, "rows") + _text(1, "columns") + _text(2, "sums") + _text(4, "MatMulInteger")
    columns = _number(1, _INPUTS) + _number(1, _CHANNELS) + _number(2, _INT8) + _text(8, "columns")
    graph = (
        _message(1, node)
        + _text(2, "probe")
        + _message(5, columns + _message(9, weights.tobytes()))
        + _message(11, _rows("rows", _UINT8, _INPUTS))
        + _message(12, _rows("sums", _INT32, _CHANNELS))
    )
    return _number(1, 10) + _message(7, graph) + _message(8, _text(1, "") + _number(2, 21))


def _rows(name: str, type_: int, width: int) -> bytes:
    """A ValueInfoProto: the tensor `name` of elements `type_`, [M, `width`]."""
    shape = _message(1, _text(2, "M")) + _message(1, _number(1, width))
    return _text(1, name) + _message(2, _message(1, _number(1, type_) + _message(2, shape)))


def _number(field: int, value: int) -> bytes:
    return _varint(field << 3) + _varint(value)


def _text(field: int, value: str) -> bytes:
    return _message(field, value.encode())


def _message(field: int, content: bytes) -> bytes:
    return _varint(field << 3 | 2) + _varint(len(content)) + content


def _varint(value: int) -> bytes:
    """Seven bits a byte, the lowest first; the highest bit of a byte says that another follows."""
    return bytes([value]) if value < 128 else bytes([value & 127 | 128]) + _varint(value >> 7)


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
