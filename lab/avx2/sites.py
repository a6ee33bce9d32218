"""Finds the instructions by which libraries ask the processor what it can do: CPUID and XGETBV."""

from __future__ import annotations

import json
import re
import struct
import subprocess
from collections.abc import Sequence
from pathlib import Path

from cuantiza.core.errors import UserError
from cuantiza.core.machine.progress import track
from cuantiza.core.store import digests

# Data may have the same bytes, so a disassembler tells which are instructions.
_BYTES = (b"\x0f\xa2", b"\x0f\x01\xd0")
_INSTRUCTION = re.compile(r"^\s*([0-9a-f]+):\s+(cpuid|xgetbv)\b")
_X86_64 = 62  # e_machine in an ELF file


def listed(environments: Sequence[Path], known: Path) -> str:
    """The file that mask.c reads, for all libraries in the folders `environments`.

    `known` is a file that remembers libraries by their sha256, since it takes minutes to disassemble all.
    """
    found = _read(known)
    libraries = sorted({path.resolve() for root in environments for path in root.rglob("*.so*") if path.is_file()})
    lines: list[str] = []
    for library in track(libraries, "avx2      libraries", len(libraries)):
        content = library.read_bytes()
        if not _is_code(content) or not any(code in content for code in _BYTES):
            continue
        del content
        if (key := digests.sha256_file(library)) not in found:
            found[key] = _instructions(library)
            known.write_text(json.dumps(found), encoding="utf-8")
        if found[key]:
            lines += [str(library), *found[key]]
    return "\n".join(lines) + "\n"


def _read(known: Path) -> dict[str, list[str]]:
    try:
        found: dict[str, list[str]] = json.loads(known.read_bytes())
    except (OSError, ValueError):
        return {}  # not made yet, or killed while it was written
    return found


def _is_code(content: bytes) -> bool:
    """Whether `content` is an ELF file of x86-64."""
    return content.startswith(b"\x7fELF") and struct.unpack_from("<H", content, 18)[0] == _X86_64


def _instructions(library: Path) -> list[str]:
    """One line for each CPUID or XGETBV of `library`, as mask.c reads it. Raises UserError if it cannot be read."""
    command = ["objdump", "-d", "--no-show-raw-insn", str(library)]
    # Line by line: the text of PyTorch's library is some gigabytes.
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        assert process.stdout is not None
        matches = [match for line in process.stdout if (match := _INSTRUCTION.match(line))]
    if process.returncode:
        raise UserError(f"{library}: objdump cannot read it (exit code {process.returncode})")
    return [f"{match[2][0]} {match[1]}" for match in matches]
