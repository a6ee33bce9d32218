"""Instruction sets, from what Linux and macOS say of a processor."""

from __future__ import annotations

import platform
from pathlib import Path

import pytest

from cuantiza.core.machine.instructions import from_cpuinfo, from_sysctl, instruction_sets

ZEN4 = "processor\t: 0\nflags\t\t: fpu sse4_1 fma avx f16c avx2 avx512f avx512_bf16 avx512_vnni\nbugs\t\t: spectre_v1\n"
SAPPHIRE = "flags : sse4_1 avx avx2 avx512f avx_vnni avx512_vnni amx_bf16 amx_tile amx_int8 avx512_fp16\n"
GRAVITON = "processor\t: 0\nFeatures\t: fp asimd evtstrm asimdhp asimddp sve i8mm bf16\n"
# A phone: the little core lacks what the big one has.
MIXED = "Features : fp asimd asimdhp asimddp\n\nFeatures : fp asimd\n"
M1 = "hw.optional.arm.FEAT_DotProd: 1\nhw.optional.arm.FEAT_I8MM: 0\nhw.optional.neon: 1\nmachdep.cpu.brand_string: Apple M1\n"
INTEL_MAC = "machdep.cpu.features: FPU SSE4.1 AVX1.0 FMA F16C\nmachdep.cpu.leaf7_features: SMEP BMI1 AVX2\nhw.optional.avx2_0: 1\n"


@pytest.mark.parametrize(
    ("text", "found"),
    [
        (ZEN4, ("SSE4.1", "AVX", "AVX2", "FMA", "F16C", "AVX-512", "AVX-512 VNNI", "AVX-512 BF16")),
        (
            SAPPHIRE,
            ("SSE4.1", "AVX", "AVX2", "AVX-512", "AVX-VNNI", "AVX-512 VNNI", "AVX-512 FP16", "AMX int8", "AMX BF16"),
        ),
        (GRAVITON, ("NEON", "NEON fp16", "NEON dotprod", "NEON i8mm", "NEON BF16", "SVE")),
        (MIXED, ("NEON",)),
        ("processor : 0\nisa : rv64imafdc\n", ()),
        ("", ()),
    ],
)
def test_linux(text: str, found: tuple[str, ...]) -> None:
    assert from_cpuinfo(text) == found


@pytest.mark.parametrize(
    ("text", "found"),
    [
        (M1, ("NEON", "NEON dotprod")),
        (INTEL_MAC, ("SSE4.1", "AVX", "AVX2", "FMA", "F16C")),
        ("", ()),
    ],
)
def test_macos(text: str, found: tuple[str, ...]) -> None:
    assert from_sysctl(text) == found


@pytest.mark.skipif(not Path("/proc/cpuinfo").exists(), reason="no /proc/cpuinfo here")
def test_this_machine() -> None:
    least = {"x86_64": "SSE4.1", "aarch64": "NEON"}.get(platform.machine())
    assert least is None or least in instruction_sets()
