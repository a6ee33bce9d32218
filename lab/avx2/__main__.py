"""The command `python -m lab.avx2 [--environments FOLDER …] [--work FOLDER] -- COMMAND…`."""

from __future__ import annotations

import argparse
import hashlib
import os
import platform
import re
import shutil
import sys
from pathlib import Path

from cuantiza.core.errors import UserError, run
from cuantiza.core.machine import child
from cuantiza.core.machine.progress import report as say
from cuantiza.core.store import folders
from cuantiza.core.store.user_cache import VARIABLE
from lab import ROOT
from lab.avx2 import SITES
from lab.avx2 import __doc__ as about
from lab.avx2.sites import listed

_MASK = Path(__file__).with_name("mask.c")
# glibc's own copies of AVX-512 (memcpy and the like) are chosen before any audit library is loaded.
_GLIBC = "glibc.cpu.hwcaps=-AVX512F,-AVX512VL,-AVX512BW,-AVX512DQ,-AVX512CD"
# llama.cpp decides when it is compiled, so it is compiled once more.
_LLAMA = (
    "-DGGML_NATIVE=off -DGGML_AVX=on -DGGML_AVX2=on -DGGML_FMA=on -DGGML_F16C=on -DGGML_BMI2=on -DGGML_AVX512=off "
    "-DGGML_AVX_VNNI=off"
)
# Run by each environment's interpreter: it prints the libraries that still find something newer.
_ASK = """
from importlib.util import find_spec as has
newer = []
if has("onnxruntime"):
    from cuantiza.core.run.exact_int8 import exact_products
    newer += [] if exact_products() else ["ONNX Runtime"]  # its u8·s8 sums are clipped where there is no VNNI
if has("numpy"):
    from numpy._core._multiarray_umath import __cpu_features__
    newer += ["NumPy"] if __cpu_features__["AVX512F"] else []
if has("torch"):
    import torch
    newer += [] if torch.backends.cpu.get_cpu_capability() == "AVX2" else ["PyTorch"]
if has("openvino"):
    import openvino
    newer += ["OpenVINO"] if "BF16" in openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES") else []
if has("llama_cpp") and has("diskcache"):  # the folder of llama.cpp for AVX2 is on every interpreter's path
    import llama_cpp
    newer += ["llama.cpp"] if b"AVX512" in llama_cpp.llama_print_system_info() else []
print(", ".join(newer))
"""
_TIMEOUT_S = 3600


def main() -> int:
    args = _arguments()
    if platform.machine() != "x86_64":
        raise UserError(f"lab.avx2: needs a processor of x86-64; this one is {platform.machine()}")
    for tool in ("cc", "objdump"):
        if shutil.which(tool) is None:
            raise UserError(f"{tool}: is not installed; Debian's packages gcc and binutils have cc and objdump")
    if shutil.which(args.command[0]) is None:
        raise UserError(f"{args.command[0]}: is no program")
    environments = args.environments or [path for path in _environments() if path.is_dir()]
    for path in environments:
        if not path.is_dir():
            raise UserError(f"--environments {path}: is not a folder; give that of a virtual environment")
    work = args.work.absolute()
    with folders.locked(work):
        changes = _prepare(environments, work)
        _check(environments, changes)
    sys.stdout.flush()
    environment = os.environ | changes
    environment.pop("PYTHONFAULTHANDLER", None)  # it would take SIGILL
    os.execvpe(args.command[0], args.command, environment)


def _environments() -> list[Path]:
    """The virtual environments of this project, and of the libraries that lab.bench compares with."""
    pythons = [os.environ.get("PEERS_PYTHON"), os.environ.get("OPTIMUM_PYTHON")]
    others = [Path(python).absolute().parent.parent for python in pythons if python]
    return list(dict.fromkeys([Path(sys.prefix), ROOT / ".venv-peers", ROOT / ".venv-optimum", *others]))


def _prepare(environments: list[Path], work: Path) -> dict[str, str]:
    """Make what is missing in the folder `work`; the environment variables that hold a process back."""
    mask = work / "mask.so"
    # The handler of a signal must not be the first to call a function, so all are bound at the start.
    compile_ = ["cc", "-O2", "-shared", "-fPIC", "-Wall", "-Wl,-z,now", "-o", f"{mask}.new", _MASK]
    _run(compile_, "mask.c")
    Path(f"{mask}.new").replace(mask)
    text = listed(environments, work / "sites.json")
    sites = work / f"sites-{hashlib.sha256(text.encode()).hexdigest()[:16]}.txt"
    if not sites.is_file():  # a run that reads another list goes on with it
        sites.with_suffix(".new").write_text(text, encoding="utf-8")
        sites.with_suffix(".new").replace(sites)
    return {
        "LD_AUDIT": str(mask),
        SITES: str(sites),
        "GLIBC_TUNABLES": _GLIBC,
        VARIABLE: str(work / "cache"),  # packed weights are of the kernels that packed them
        "PYTHONPATH": os.pathsep.join(filter(None, [*_llama(environments, work), os.environ.get("PYTHONPATH")])),
    }


def _llama(environments: list[Path], work: Path) -> list[str]:
    """The folder with llama.cpp for AVX2, compiled there once from the pinned sources, if an environment has it."""
    python = next((root / "bin" / "python" for root in environments if any(root.rglob("llama_cpp/__init__.py"))), None)
    if python is None:
        return []
    pins = ROOT / "setup" / "peers.txt"
    pin = re.search(r"^llama_cpp_python==(\S+)(?:.*\\\n)+.*$", pins.read_text(encoding="utf-8"), re.MULTILINE)
    if pin is None:
        raise UserError(f"{pins}: does not pin llama_cpp_python, which {python.parent.parent} has")
    build = hashlib.sha256(f"{_LLAMA} {platform.python_version()}".encode()).hexdigest()[:8]
    folder = work / f"llama-cpp-{pin[1]}-{build}"
    if not folder.is_dir():
        say(f"avx2      compiling llama.cpp {pin[1]} (once; some minutes)")
        only = work / "llama.txt"
        only.write_text(pin[0] + "\n", encoding="utf-8")
        temporary = folder.with_name(folder.name + ".partial")
        shutil.rmtree(temporary, ignore_errors=True)
        install = [python, "-m", "pip", "install", "--quiet", "--no-deps", "--no-binary=llama_cpp_python"]
        install += ["--no-cache-dir", "--require-hashes", "--requirement", only, "--target", temporary]
        _run(install, "llama_cpp_python", CMAKE_ARGS=_LLAMA)
        temporary.rename(folder)
    return [str(folder)]


def _check(environments: list[Path], changes: dict[str, str]) -> None:
    """Raises UserError if a library of a virtual environment still finds something newer than AVX2."""
    for python in [path for root in environments if (path := root / "bin" / "python").is_file()]:
        newer = _run([python, "-c", _ASK], str(python), **changes).splitlines()[-1]
        if newer:
            raise UserError(f"{python}: {newer} still finds what is newer than AVX2; see rtld-audit(7)")


def _run(command: list[object], what: str, **environment: str) -> str:
    try:
        return child.run(command, timeout=_TIMEOUT_S, cwd=ROOT, environment=environment)
    except child.Failed as error:
        raise UserError(f"{what}: {error}") from None


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m lab.avx2", description=about, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("command", nargs="+", metavar="COMMAND", help="what to run; write it after --")
    parser.add_argument(
        "--environments",
        type=Path,
        nargs="+",
        metavar="FOLDER",
        help="folders whose libraries are held back (default .venv, .venv-peers and .venv-optimum)",
    )
    default = Path("artifacts/avx2")
    parser.add_argument("--work", type=Path, default=default, help=f"folder for what is made once (default {default})")
    return parser.parse_args()


if __name__ == "__main__":
    run(main)
