"""`python -m lab.avx2 -- COMMAND…` runs a command as if this x86-64 processor ended at AVX2: no AVX-512, VNNI or AMX.

Kernels for such processors are other ones: slower, and their u8·s8 sums are clipped. The clock, the caches and the memory
stay this machine's, so compare rows of one run, as everywhere. What asks the system instead of the processor still finds
all: the machine that `cuantiza eval` reports, for example. A command that handles SIGILL itself ends with the first
question to the processor (pytest needs `-p no:faulthandler`).
"""

from __future__ import annotations

import os

HELD_TO = "AVX2"
# The environment variable that says where the list of instructions is (mask.c).
SITES = "MASK_SITES"
_NEWER = ("AVX-512", "AVX-VNNI", "AMX")


def visible(instructions: tuple[str, ...]) -> tuple[str, ...]:
    """Those of a processor's `instructions` that libraries in this process can find."""
    return tuple(name for name in instructions if not (is_held() and name.startswith(_NEWER)))


def is_held() -> bool:
    """Whether this process was started by `python -m lab.avx2`."""
    return SITES in os.environ
