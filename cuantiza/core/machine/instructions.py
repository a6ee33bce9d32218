"""Which of a processor's instruction sets the kernels of quantized models choose between.

ONNX Runtime's matmul kernels differ by these: u8·s8 sums in one step need VNNI (x86-64) or dotprod (Arm), tiles need AMX
or SME, and int8 is hardly faster than fp32 where none of them is there. Importing this module loads only the standard
library.
"""

from __future__ import annotations

import os
import platform
import re
import subprocess
from pathlib import Path

# The name that a report shows, and the names that Linux (/proc/cpuinfo) and macOS (`sysctl`) have for it, in lower case.
_NAMES = {
    "SSE4.1": ("sse4_1", "sse4.1"),
    "AVX": ("avx", "avx1.0"),
    "AVX2": ("avx2",),
    "FMA": ("fma",),
    "F16C": ("f16c",),
    "AVX-512": ("avx512f",),
    "AVX-VNNI": ("avx_vnni",),
    "AVX-512 VNNI": ("avx512_vnni", "avx512vnni"),
    "AVX-512 BF16": ("avx512_bf16",),
    "AVX-512 FP16": ("avx512_fp16",),
    "AMX int8": ("amx_int8",),
    "AMX BF16": ("amx_bf16",),
    "NEON": ("asimd", "neon", "advsimd"),
    "NEON fp16": ("asimdhp", "feat_fp16"),
    "NEON dotprod": ("asimddp", "feat_dotprod"),
    "NEON i8mm": ("i8mm", "feat_i8mm"),
    "NEON BF16": ("bf16", "feat_bf16"),
    "SVE": ("sve",),
    "SVE2": ("sve2",),
    "SME": ("sme", "feat_sme"),
}
_CPUINFO = Path("/proc/cpuinfo")


def instruction_sets() -> tuple[str, ...]:
    """The instruction sets of this processor that matter to kernels; empty where the system does not tell."""
    if _CPUINFO.exists():
        return from_cpuinfo(_CPUINFO.read_text(encoding="utf-8", errors="replace"))
    if platform.system() == "Darwin":
        return from_sysctl(_sysctl())
    return ()


def processor() -> str:
    """Identifies the kind of this processor, with everything that it can do, where the system tells.

    Linux lists all features of a processor, also those that `instruction_sets` has no name for.
    """
    if _CPUINFO.exists():
        # The lines that do not change with time, as a clock does.
        text = _CPUINFO.read_text(encoding="utf-8", errors="replace")
        told = re.findall(r"^(?:vendor_id|cpu family|model|stepping|flags|CPU |Features).*", text, re.MULTILINE)
    elif platform.system() == "Darwin":
        told = _sysctl().splitlines()
    else:
        told = [platform.processor()]
    return "\n".join([platform.machine(), *sorted(set(told))])


def from_cpuinfo(text: str) -> tuple[str, ...]:
    """Those that every processor in the text of /proc/cpuinfo has: big and little cores may differ."""
    lines = re.findall(r"^(?:flags|Features)\s*:(.*)$", text, re.MULTILINE)
    return _named(set.intersection(*(set(line.lower().split()) for line in lines)) if lines else set())


def from_sysctl(text: str) -> tuple[str, ...]:
    """Those in the output of macOS's `sysctl hw.optional machdep.cpu`."""
    listed = re.findall(r"^machdep\.cpu\.(?:leaf7_)?features:(.*)$", text, re.MULTILINE)
    optional = re.findall(r"^hw\.optional\.(?:arm\.)?(\w+): 1$", text, re.MULTILINE)
    return _named({word.lower() for word in [*optional, *" ".join(listed).split()]})


def _named(flags: set[str]) -> tuple[str, ...]:
    return tuple(name for name, flag in _NAMES.items() if flags & set(flag))


def _sysctl() -> str:
    command = ["/usr/sbin/sysctl", "hw.optional", "machdep.cpu"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=False).stdout
    except (OSError, subprocess.SubprocessError):
        return ""


def kernel_switches() -> dict[str, str]:
    """The variables of the environment that choose between ONNX Runtime's kernels."""
    return {name: value for name, value in os.environ.items() if name.startswith(("ORT_", "MLAS_"))}
