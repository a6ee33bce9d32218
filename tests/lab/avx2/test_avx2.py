"""`python -m lab.avx2` hides what is newer than AVX2 from real libraries, and our int8 files are right there."""

from __future__ import annotations

import ctypes
import json
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnxruntime
import pytest

from cuantiza.core.machine.instructions import instruction_sets
from cuantiza.core.run import exact_int8
from cuantiza.core.run.runtime import Runtime
from cuantiza.core.store.artifact import Artifact
from cuantiza.quantize.stage import quantize
from lab import ROOT
from lab.avx2 import SITES, visible

pytestmark = [
    pytest.mark.skipif(platform.machine() != "x86_64", reason="AVX2 is of x86-64"),
    pytest.mark.skipif(not (shutil.which("cc") and shutil.which("objdump")), reason="needs gcc and binutils"),
]
IDS = np.arange(200, 264)
# The logits of each artifact that the command is given, without the option that makes u8·s8 sums exact. It prints
# whether they are clipped.
PROGRAM = """
import sys
from pathlib import Path
import numpy as np
from cuantiza.core.run import exact_int8
from cuantiza.core.run.runtime import Runtime
print(bool(exact_int8.exact_products()))
exact_int8.exact_products = dict
np.savez(sys.argv[1], *[Runtime(Path(file), 1).forward(np.arange(200, 264)[None]) for file in sys.argv[2:]])
"""
# What CPUID and XGETBV answer: leaf 7 (AVX-512 F is bit 16 of EBX, VNNI bit 11 of ECX, AVX2 bit 5 of EBX), XCR0.
PROCESSOR = """
#include <cpuid.h>
unsigned ask(unsigned sub, int wanted) {
    unsigned a, b, c, d;
    __cpuid_count(7, sub, a, b, c, d);
    return wanted == 'b' ? b : c;
}
unsigned state(void) {
    unsigned low, high;
    __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    return low;
}
"""


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What takes long is made once."""
    return tmp_path_factory.mktemp("avx2") / "work"


def held(work: Path, libraries: Path, *command: object) -> subprocess.CompletedProcess[str]:
    """Run `command` without what is newer than AVX2, as far as ONNX Runtime and the folder `libraries` are concerned."""
    ours = Path(onnxruntime.__file__).parent
    line = [sys.executable, "-m", "lab.avx2", "--environments", ours, libraries, "--work", work, "--", *command]
    return subprocess.run([*map(str, line)], cwd=ROOT, capture_output=True, text=True, timeout=600, check=False)


@pytest.fixture(scope="module")
def logits(es_mini_fp32: Artifact, work: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, float]:
    """The largest difference of a logit between this processor and one that ends at AVX2, of each recipe."""
    folder = tmp_path_factory.mktemp("artifacts")
    recipes = ("int8-dynamic", "int8-static-ort", "ort-dynamic")
    models = [quantize(es_mini_fp32, recipe, folder / recipe).model for recipe in recipes]
    done = held(work, folder, sys.executable, "-c", PROGRAM, folder / "held.npz", *models)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "True", "ONNX Runtime still finds VNNI"
    there = np.load(folder / "held.npz").values()
    here = [Runtime(model, 1).forward(IDS[None]) for model in models]
    return {name: float(np.abs(own - other).max()) for name, own, other in zip(recipes, here, there, strict=True)}


@pytest.mark.parametrize("recipe", ["int8-dynamic", "int8-static-ort"])
def test_nothing_of_our_int8_files_is_clipped(recipe: str, logits: dict[str, float]) -> None:
    # Floats are added in another order, so that an activation here and there may become the next integer.
    assert logits[recipe] < 0.1


def test_onnx_runtime_s_own_int8_file_is_clipped(logits: dict[str, float]) -> None:
    if exact_int8.exact_products():
        pytest.skip("this processor clips sums anyway")
    assert logits["ort-dynamic"] > 0.2


def test_a_library_is_told_that_the_processor_ends_at_avx2(work: Path, tmp_path: Path) -> None:
    library = tmp_path / "libprocessor.so"
    (tmp_path / "processor.c").write_text(PROCESSOR, encoding="utf-8")
    subprocess.run(["cc", "-O2", "-shared", "-fPIC", "-o", library, tmp_path / "processor.c"], check=True)
    ask = "import ctypes; it = ctypes.CDLL({!r}); print(it.ask(0, {}), it.ask(0, {}), it.state())"
    done = held(work, tmp_path, sys.executable, "-c", ask.format(str(library), ord("b"), ord("c")))
    assert done.returncode == 0, done.stderr
    features, more, state = map(int, done.stdout.splitlines()[-1].split())
    assert features & (1 << 16) == 0
    assert more & (1 << 11) == 0
    assert state & ~7 == 0
    here = ctypes.CDLL(str(library)).ask(0, ord("b"))
    assert features & (1 << 5) == here & (1 << 5)  # AVX2 itself stays


def test_its_status_is_the_command_s_own(work: Path, tmp_path: Path) -> None:
    code = "import os, signal; assert 'LD_AUDIT' in os.environ; os.kill(os.getpid(), signal.SIGKILL)"
    assert held(work, tmp_path, sys.executable, "-c", code).returncode == -9


def test_what_it_cannot_run_is_one_line(work: Path, tmp_path: Path) -> None:
    for line, said in (
        ((tmp_path, "no-such-program"), "no-such-program: is no program"),
        ((tmp_path / "nowhere", "true"), "nowhere: is not a folder"),
    ):
        done = held(work, *line)
        assert done.returncode == 2
        assert said in done.stderr
        assert "Traceback" not in done.stderr


def test_a_damaged_list_is_made_again(work: Path, tmp_path: Path) -> None:
    assert held(work, tmp_path, "true").returncode == 0
    (work / "sites.json").write_text('{"half', encoding="utf-8")
    assert held(work, tmp_path, "true").returncode == 0
    assert json.loads((work / "sites.json").read_text(encoding="utf-8"))


def test_a_page_names_no_instruction_set_that_was_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(SITES, "sites.txt")
    found = visible((*instruction_sets(), "AVX2", "AVX-512 VNNI", "AVX-VNNI", "AMX int8"))
    assert "AVX2" in found
    assert not [name for name in found if name.startswith(("AVX-512", "AVX-VNNI", "AMX"))]
