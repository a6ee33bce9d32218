"""The artifacts on processors that this machine is not, under QEMU's user-mode emulation: their quality, not their speed.

x86-64 without VNNI, where products of u8 and s8 are not exact unless told (cuantiza/core/run/exact_int8.py). aarch64: the wheels of
that architecture, in a Debian that nothing outside of its folder knows of.
"""

from __future__ import annotations

import json
import platform
import shutil
import subprocess
import sys
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import numpy as np

from cuantiza.core.errors import UserError
from cuantiza.core.run.divergence import compare
from cuantiza.core.run.exact_int8 import probe
from cuantiza.core.store import digests, folders

DRIVER = Path(__file__).with_name("driver.py")
# What NumPy and ONNX Runtime need of a system: Debian finds what those need in turn.
_PACKAGES = ("python3.11-minimal", "libpython3.11-stdlib", "libstdc++6", "zlib1g")
_SUITE = "http://deb.debian.org/debian bookworm main"
_KEYRING = Path("/usr/share/keyrings/debian-archive-keyring.gpg")
_WHEELS = ("manylinux_2_28_aarch64", "manylinux_2_27_aarch64", "manylinux2014_aarch64")


class Failed(Exception):
    """Why a processor gave no result, in one line."""


@dataclass(frozen=True)
class Processor:
    """One to emulate: QEMU's `model` of it, and `part`, the number that /proc/cpuinfo has on aarch64."""

    name: str
    machine: str
    model: str
    about: str
    part: str = ""


PROCESSORS = {
    processor.name: processor
    for processor in (
        Processor("haswell", "x86_64", "Haswell", "x86-64 of 2013: AVX2, no VNNI"),
        Processor("nehalem", "x86_64", "Nehalem", "x86-64 of 2008: SSE4.2, no AVX"),
        Processor("cortex-a72", "aarch64", "cortex-a72", "Raspberry Pi 4: no dot product", "0xd08"),
        Processor("neoverse-n1", "aarch64", "neoverse-n1", "Graviton 2: dot product", "0xd0c"),
        Processor("max", "aarch64", "max", "all that QEMU has of aarch64: int8 matrix products, SVE", "0xd4f"),
    )
}


def emulator(processor: Processor) -> str:
    """The path of QEMU for `processor`. Raises UserError where it is missing, or could not run our own environment."""
    name = f"qemu-{processor.machine}"
    found = shutil.which(name) or shutil.which(f"{name}-static")
    if not found:
        raise UserError(
            f"--processors {processor.name}: no {name} on PATH; install it (Debian: apt-get install qemu-user)"
        )
    if processor.machine == "x86_64" and platform.machine() != "x86_64":
        raise UserError(
            f"--processors {processor.name}: runs this environment's own packages, which are not x86-64's; choose an aarch64 one"
        )
    return found


def command(processor: Processor | None, folder: Path) -> list[str]:
    """The command line of a Python on `processor` (None: this machine) with ONNX Runtime and NumPy.

    What it takes is made in `folder` where it is missing. Raises UserError.
    """
    if processor is None:
        return [sys.executable]
    qemu = [emulator(processor), "-cpu", processor.model]
    if processor.machine == "x86_64":
        return [*qemu, sys.executable]
    folder = folder.absolute()
    with folders.locked(folder):
        system = _aarch64(folder)
        root = _view(folder, system, processor)
    return [*qemu, "-L", str(root), "-E", f"PYTHONPATH={system / 'packages'}", str(root / "usr/bin/python3.11")]


def run(prefix: list[str], job: dict, work: Path) -> dict:
    """What the driver says of the processor behind `prefix` (from `command`) once `job` is done. Raises Failed.

    There is no time limit: an emulated run takes as long as the machine's other work lets it.
    """
    path = work / "job.json"
    path.write_text(json.dumps({**job, "probe": probe().hex()}), encoding="utf-8")
    # In `work`, where QEMU leaves the memory of what it saw crash.
    done = subprocess.run(
        [*prefix, str(DRIVER), str(path)],
        cwd=work,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        errors="replace",
    )
    if done.returncode:
        lines = [line.strip() for line in done.stderr.splitlines() if line.strip() and "TCG doesn't" not in line]
        raise Failed(lines[-1] if lines else f"ended with status {done.returncode}")
    return json.loads(done.stdout.splitlines()[-1])


@dataclass(frozen=True)
class Difference:
    """Of an artifact there from the same one here: nats a token, paired, with its standard error over windows (None: one
    window), and the largest |Δ logit|, whole and through the cache."""

    delta_ln_ppl: float
    delta_ln_ppl_stderr: float | None
    max_logit_difference: float
    max_logit_difference_cached: float


def difference(here: dict[str, np.ndarray], there: dict[str, np.ndarray], windows: np.ndarray) -> Difference:
    """Of what the driver wrote, `whole` [W, T, V] and `cached` [C, V], for token ids `windows` [W, T]."""
    means = []
    for ids, mine, other in zip(windows, here["whole"], there["whole"], strict=True):
        (nll,), (changed, *_) = compare(mine[:-1], [other[:-1]], ids[1:])
        means.append(float((changed - nll).mean()))
    stderr = float(np.std(means, ddof=1) / len(means) ** 0.5) if len(means) > 1 else None
    largest = {name: float(np.abs(there[name] - here[name]).max()) for name in ("whole", "cached")}
    return Difference(float(np.mean(means)), stderr, largest["whole"], largest["cached"])


def versions() -> dict[str, str]:
    """Of what runs in all environments, and of QEMU."""
    found = {name: version(name) for name in ("onnxruntime", "numpy")}
    qemu = next(filter(None, (shutil.which(f"qemu-{name}") for name in ("x86_64", "aarch64"))), None)
    if qemu:
        found["qemu"] = subprocess.run([qemu, "--version"], capture_output=True, text=True).stdout.split()[2]
    return found


def aarch64_system(folder: Path) -> Path:
    """Where `system`, Debian's packages unpacked, and `packages`, the wheels of these versions, are or will be."""
    return folder / f"aarch64-{digests.digest([_SUITE, _PACKAGES, _wheels()])[:12]}"


def _wheels() -> list[str]:
    return [f"{name}=={version(name)}" for name in ("onnxruntime", "numpy")]


def _aarch64(folder: Path) -> Path:
    """`aarch64_system(folder)`, made where it is missing."""
    target = aarch64_system(folder)
    if not target.is_dir():
        print(f"setting up {target} (once; some 220 MB)", file=sys.stderr)
        with folders.staging(target) as work:
            made = work / "made"
            made.mkdir()
            _unpack_system(work / "apt", made / "system")
            _install(_wheels(), made / "packages")
            made.rename(target)
    return target


def _unpack_system(apt: Path, system: Path) -> None:
    """Debian's arm64 packages, by an apt that knows neither this system's packages nor changes them."""
    for tool in ("apt-get", "dpkg-deb"):
        if not shutil.which(tool):
            raise UserError(f"aarch64: no {tool} to get Debian's packages with; run this on Debian or Ubuntu")
    if not _KEYRING.is_file():
        raise UserError(f"{_KEYRING}: missing; install it (apt-get install debian-archive-keyring)")
    for name in ("lists/partial", "cache/archives/partial"):
        (apt / name).mkdir(parents=True)
    (apt / "status").touch()
    (apt / "sources.list").write_text(f"deb [arch=arm64 signed-by={_KEYRING}] {_SUITE}\n", encoding="utf-8")
    settings = {
        "Dir::State": apt,
        "Dir::State::status": apt / "status",
        "Dir::Cache": apt / "cache",
        "Dir::Etc::sourcelist": apt / "sources.list",
        "Dir::Etc::sourceparts": "-",
        "APT::Architecture": "arm64",
        "APT::Architectures": "arm64",
        "Debug::NoLocking": "1",
        # The folder may be one that apt's own user cannot enter.
        "APT::Sandbox::User": "root",
    }
    options = [part for name, value in settings.items() for part in ("-o", f"{name}={value}")]
    _must(["apt-get", *options, "-q", "update"], "read Debian's list of packages")
    get = ["apt-get", *options, "-q", "-y", "--no-install-recommends", "--download-only", "install", *_PACKAGES]
    _must(get, "download Debian's packages for arm64")
    for package in sorted((apt / "cache/archives").glob("*.deb")):
        _must(["dpkg-deb", "--extract", str(package), str(system)], f"unpack {package.name}")


def _install(wheels: list[str], packages: Path) -> None:
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--target", str(packages)]
    kind = ["--only-binary=:all:", "--python-version", "3.11", "--implementation", "cp"]
    _must(
        [*pip, *kind, *(part for wheel in _WHEELS for part in ("--platform", wheel)), *wheels], "install aarch64 wheels"
    )


def _view(folder: Path, system: Path, processor: Processor) -> Path:
    """The system with the /proc/cpuinfo of `processor`: QEMU shows this machine's, at which ONNX Runtime's import dies."""
    root = folder / f"{system.name}-{processor.name}"
    if not root.is_dir():
        with folders.staging(root) as work:
            made = work / "made"
            (made / "proc").mkdir(parents=True)
            about = ["BogoMIPS\t: 100.00", "Features\t: fp asimd", "CPU implementer\t: 0x41", "CPU architecture: 8"]
            about += ["CPU variant\t: 0x0", f"CPU part\t: {processor.part}", "CPU revision\t: 0", "", ""]
            blocks = ["\n".join([f"processor\t: {number}", *about]) for number in _processors()]
            (made / "proc/cpuinfo").write_text("".join(blocks), encoding="ascii")
            for entry in (system / "system").iterdir():
                (made / entry.name).symlink_to(entry)
            made.rename(root)
    return root


def _processors() -> list[int]:
    """Numbers of this machine's processors, which /sys names under QEMU as well."""
    folder = Path("/sys/devices/system/cpu")
    return sorted(int(path.name[3:]) for path in folder.glob("cpu[0-9]*")) or [0]


def _must(arguments: list[str], what: str) -> None:
    done = subprocess.run(arguments, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace")
    if done.returncode:
        lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
        raise UserError(
            f"aarch64: could not {what} ({lines[-1] if lines else f'status {done.returncode}'}); run it again"
        )
