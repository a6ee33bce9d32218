"""The known failures of runtimes, each explained in a few words and with its cure."""

from __future__ import annotations

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Reason:
    """Why a cell is not ok: a few words, the runtime's exact message, and the cure if it is known."""

    short: str
    message: str
    cure: str | None


# (part of the message, explanation in a few words, cure). The first match counts.
_KNOWN = (
    (
        r"from domain 'com\.microsoft' is unknown|com\.microsoft\.\w+ with a message",
        "operators of ONNX Runtime",
        "Take the recipe without -ort, which consists of standard operators.",
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
