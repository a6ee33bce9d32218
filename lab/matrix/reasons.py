"""Known failures of runtimes: what each means in a few words, and what cures it."""

from __future__ import annotations

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Reason:
    """Why a cell is not ok: in a few words, the runtime's exact message, and a cure if one is known."""

    short: str
    message: str
    cure: str | None


# (pattern of the message, in a few words, cure); the first match counts.
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
    """The reason for a runtime's `message`."""
    for pattern, short, cure in _KNOWN:
        if re.search(pattern, message):
            return Reason(short, message, cure)
    return Reason("fails", message, None)
