"""What the failures that are known mean, in a few words, and what cures each."""

from __future__ import annotations

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Reason:
    """Why a cell is not ok: in a few words, by the runtime's exact message, and what would cure it, where known."""

    short: str
    message: str
    cure: str | None


_PORTABLE = "Take the recipe without -ort, which consists of standard operators."
# (what the message says, in a few words, cure), the first that fits.
_KNOWN = (
    (
        r"com\.microsoft\.GatherBlockQuantized with a message",
        "operators of ONNX Runtime",
        "Take int8-dynamic. The recipe without -ort needs the change of its own cell.",
    ),
    (
        r"from domain 'com\.microsoft' is unknown|com\.microsoft\.\w+ with a message",
        "operators of ONNX Runtime",
        _PORTABLE,
    ),
    (
        r"DequantizeLinear cannot operate with dynamic shapes",
        "blocked DequantizeLinear",
        "Of a table that is no constant, it takes no scales by block: Cast, Sub and Mul say the same of looked-up rows, "
        "which is a change to the recipe (quantize/weight_only.py); with them OpenVINO runs it.",
    ),
    (
        r"custom/reshape\.cpp",
        "one sequence at a time",
        "Its GroupQueryAttention takes a batch of one. Take the recipe without -ort for batches.",
    ),
)
BFLOAT16 = "This processor computes in bfloat16, and the library does so unless told: compile with INFERENCE_PRECISION_HINT f32."


def explain(message: str) -> Reason:
    """The reason behind a runtime's `message`."""
    for pattern, short, cure in _KNOWN:
        if re.search(pattern, message):
            return Reason(short, message, cure)
    return Reason("fails", message, None)
