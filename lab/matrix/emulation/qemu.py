"""Run artifacts on other processors under QEMU's user-mode emulation, to check their quality (not their speed).

On x86-64 without VNNI, u8·s8 matmuls are not exact by default (cuantiza/core/run/exact_int8.py). For aarch64, a folder
holds that architecture's wheels and the Debian packages that they need, separate from this system.
"""

from __future__ import annotations

import json
import platform
import shutil
import sys
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import numpy as np

from cuantiza.core.errors import UserError
from cuantiza.core.machine import child
from cuantiza.core.run.divergence import compare
from cuantiza.core.run.exact_int8 import probe
from cuantiza.core.store import digests, folders

DRIVER = Path(__file__).with_name("driver.py")
# The Debian packages that NumPy and ONNX Runtime need; apt adds what these depend on.
_PACKAGES = ("python3.11-minimal", "libpython3.11-stdlib", "libstdc++6", "zlib1g")
_SUITE = "http://deb.debian.org/debian bookworm main"
_KEYRING = Path("/usr/share/keyrings/debian-archive-keyring.gpg")
_WHEELS = ("manylinux_2_28_aarch64", "manylinux_2_27_aarch64", "manylinux2014_aarch64")


@dataclass(frozen=True)
class Processor:
    """A processor to emulate: `model` is QEMU's name of it, `part` its number in /proc/cpuinfo on aarch64."""

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
    """The path of QEMU for `processor`. Raises UserError if it is missing, or could not run our own environment."""
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

    What it needs is made in `folder` unless it is there already. Raises UserError.
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
    """Have the driver do `job` on the processor of `prefix` (from `command`); returns what it says of the processor.

    There is no time limit, because emulation is slow, and slower still on a busy machine. Raises child.Failed.
    """
    path = work / "job.json"
    path.write_text(json.dumps({**job, "probe": probe().hex()}), encoding="utf-8")
    # In `work`, because QEMU leaves a core dump of a crash in its working folder.
    return json.loads(child.run([*prefix, DRIVER, path], cwd=work, noise="TCG doesn't").splitlines()[-1])


@dataclass(frozen=True)
class Difference:
    """How one artifact's logits on the other processor differ from those on this one.

    The loss per token in nats, paired, with its standard error over windows (None for a single window); and the
    largest |Δ logit| without and with the cache.
    """

    delta_ln_ppl: float
    delta_ln_ppl_stderr: float | None
    max_logit_difference: float
    max_logit_difference_cached: float


def difference(here: dict[str, np.ndarray], there: dict[str, np.ndarray], windows: np.ndarray) -> Difference:
    """Compare what the driver wrote, `whole` [W, T, V] and `cached` [C, V], for token ids `windows` [W, T]."""
    means = []
    for ids, mine, other in zip(windows, here["whole"], there["whole"], strict=True):
        (nll,), (changed, *_) = compare(mine[:-1], [other[:-1]], ids[1:])
        means.append(float((changed - nll).mean()))
    stderr = float(np.std(means, ddof=1) / len(means) ** 0.5) if len(means) > 1 else None
    largest = {name: float(np.abs(there[name] - here[name]).max()) for name in ("whole", "cached")}
    return Difference(float(np.mean(means)), stderr, largest["whole"], largest["cached"])


def versions() -> dict[str, str]:
    """Versions of the packages that every environment has, and of QEMU where it is installed."""
    found = {name: version(name) for name in ("onnxruntime", "numpy")}
    qemu = next(filter(None, (shutil.which(f"qemu-{name}") for name in ("x86_64", "aarch64"))), None)
    if qemu:
        found["qemu"] = child.run([qemu, "--version"]).split()[2]
    return found


def aarch64_system(folder: Path) -> Path:
    """The folder for aarch64: in it `system` has Debian's packages, unpacked, and `packages` the wheels."""
    return folder / f"aarch64-{digests.digest([_SUITE, _PACKAGES, _wheels()])[:12]}"


def _wheels() -> list[str]:
    return [f"{name}=={version(name)}" for name in ("onnxruntime", "numpy")]


def _aarch64(folder: Path) -> Path:
    """The folder `aarch64_system(folder)`, which is made if it is missing."""
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
    """Get and unpack Debian's arm64 packages, with an apt that neither reads nor changes this system's own packages."""
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
        # apt's own user may not be allowed to enter the folder.
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
    """The system with a /proc/cpuinfo of `processor`. QEMU would show this machine's, and importing ONNX Runtime fails."""
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
    """The numbers of this machine's processors; under QEMU, /sys still shows these."""
    folder = Path("/sys/devices/system/cpu")
    return sorted(int(path.name[3:]) for path in folder.glob("cpu[0-9]*")) or [0]


def _must(arguments: list[str], what: str) -> None:
    """Run a command that makes a system. Raises UserError, with `what` it could not do."""
    try:
        child.run(arguments)
    except child.Failed as error:
        raise UserError(f"aarch64: could not {what} ({error}); run it again") from None
