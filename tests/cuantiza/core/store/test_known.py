"""What an earlier run read is not read again where nothing changed, and nothing is made from what was not read."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from cuantiza.core.errors import UserError
from cuantiza.core.inputs.checkpoints import checkpoint_digest
from cuantiza.core.store import digests, records
from cuantiza.core.store.artifact import Artifact, open_artifact, up_to_date
from cuantiza.core.store.digests import HASH_ALL, LEAST_BYTES, sha256_file, sha256_known, sha256_once, versions
from cuantiza.core.store.user_cache import user_cache
from cuantiza.eval.stage import evaluate
from cuantiza.export.stage import export
from cuantiza.quantize.stage import quantize

from helpers import CORPUS, ROOT, Result

BYTES = 2 * LEAST_BYTES
RUN = {"tokens": 40, "window": 32, "rounds": 1, "threads": 1}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of this test's own, and a process that has read no file yet."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(digests, "_read_here", {})
    return tmp_path / "cache" / "cuantiza"


@pytest.fixture
def later(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """`later()`: from now on the clock says ten seconds more, so that files just written are old."""
    real = time.time_ns
    return lambda: monkeypatch.setattr(digests.time, "time_ns", lambda: real() + 10**10)


@pytest.fixture
def new_process(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """`new_process()`: forget what this process has read itself."""
    return digests._read_here.clear


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The sizes of the large files that were read to their end."""
    sizes: list[int] = []
    real = hashlib.file_digest

    def counting(file, name):
        if (size := os.fstat(file.fileno()).st_size) >= LEAST_BYTES:
            sizes.append(size)
        return real(file, name)

    monkeypatch.setattr(digests.hashlib, "file_digest", counting)
    return sizes


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "large"
    path.write_bytes(bytes(BYTES))
    return path


def flip(path: Path) -> None:
    """Change one bit of `path` in place, and set its time back."""
    before = path.stat()
    with path.open("r+b") as file:
        file.seek(before.st_size // 2)
        byte = file.read(1)[0]
        file.seek(before.st_size // 2)
        file.write(bytes([byte ^ 1]))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert path.stat().st_mtime_ns == before.st_mtime_ns and path.stat().st_size == before.st_size


def rot(path: Path) -> None:
    """Flip a bit as a disk does that changes no time: what was recorded of the file holds for how it is now."""
    record = records.read_record("file", os.path.realpath(path))
    assert record is not None
    flip(path)
    with path.open("rb") as file:
        changed = record | digests._identity(file)
    assert changed["sha256"] == record["sha256"]
    records.write_record("file", os.path.realpath(path), changed)


def told(path: Path) -> str:
    return subprocess.run(["sha256sum", path], capture_output=True, text=True, check=True).stdout.split()[0]


# Files


def test_a_file_is_read_once(file: Path, later: Callable, read: list[int]) -> None:
    later()
    assert {sha256_known(file) for _ in range(3)} == {told(file)} and read == [BYTES]
    assert sha256_once(file) == told(file) and read == [BYTES]
    assert sha256_file(file) == told(file) and read == [BYTES] * 2


def test_another_process_reads_for_itself_what_it_builds_from(
    file: Path, later: Callable, new_process: Callable, read: list[int]
) -> None:
    later()
    sha256_known(file)
    new_process()
    assert sha256_known(file) == told(file) and read == [BYTES]
    assert sha256_once(file) == told(file) and read == [BYTES] * 2
    assert sha256_once(file) == told(file) and read == [BYTES] * 2


def test_a_young_file_is_not_trusted(file: Path, later: Callable, read: list[int]) -> None:
    """A second change within one step of the file system's clock leaves the same times."""
    assert sha256_known(file) == sha256_once(file) == sha256_known(file) and len(read) == 3
    future = time.time_ns() + 10**12
    os.utime(file, ns=(future, future))  # a server whose clock is ahead
    later()
    assert sha256_known(file) == sha256_known(file) and len(read) == 5
    os.utime(file, ns=(0, 0))
    assert sha256_known(file) == sha256_known(file) and len(read) == 6


def test_a_file_that_changes_while_it_is_read_is_not_trusted(
    file: Path, later: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    later()
    with monkeypatch.context() as patch:
        real = hashlib.file_digest

        def disturbed(stream, name):
            found = real(stream, name)
            flip(file)
            return found

        patch.setattr(digests.hashlib, "file_digest", disturbed)
        assert sha256_known(file) != told(file)
    assert sha256_known(file) == told(file)


@pytest.mark.parametrize("look", [sha256_known, sha256_once])
def test_every_change_is_noticed(file: Path, tmp_path: Path, later: Callable, look: Callable[[Path], str]) -> None:
    later()
    before = look(file)
    flip(file)  # the time of the inode's change cannot be set back
    assert before != look(file) == told(file)
    (tmp_path / "other").write_bytes(bytes(BYTES))
    shutil.copystat(file, tmp_path / "other")
    (tmp_path / "other").replace(file)
    assert look(file) == before == told(file)
    file.write_bytes(bytes(BYTES + 1))
    assert look(file) == told(file) != before


def test_a_copy_and_a_link(file: Path, tmp_path: Path, later: Callable, read: list[int]) -> None:
    later()
    (tmp_path / "link").symlink_to(file)
    assert sha256_known(tmp_path / "link") == sha256_known(file) and len(read) == 1
    shutil.copy2(file, tmp_path / "copy")
    flip(tmp_path / "copy")
    assert sha256_known(tmp_path / "copy") == told(tmp_path / "copy") != sha256_known(file)


def test_all_is_read_where_the_user_says_so(
    file: Path, later: Callable, read: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    later()
    sha256_known(file)
    rot(file)
    assert sha256_known(file) != told(file)
    monkeypatch.setenv(HASH_ALL, "1")
    assert sha256_known(file) == told(file) and len(read) == 2
    monkeypatch.delenv(HASH_ALL)
    assert sha256_known(file) == told(file) and len(read) == 2  # what was read is what is known


# Records


@pytest.mark.parametrize("spoil", ["bit", "half", "other", "list"])
def test_a_damaged_record_is_none(file: Path, later: Callable, cache: Path, read: list[int], spoil: str) -> None:
    later()
    sha256_known(file)
    (record,) = (cache / "records").glob("file-*.json")
    text = record.read_text()
    value = json.loads(text)["value"]["sha256"]
    changed = {
        "bit": text.replace(value, value[::-1]),
        "half": text[: len(text) // 2],
        "other": text.replace(str(file), str(file) + "x"),
        "list": "[]",
    }
    record.write_text(changed[spoil])
    assert sha256_known(file) == told(file) and len(read) == 2


def test_no_place_for_records(file: Path, tmp_path: Path, later: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    later()
    (tmp_path / "no-folder").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "no-folder"))
    assert sha256_known(file) == sha256_known(file) == told(file)


def test_records_do_not_pile_up(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(records, "_MOST", 10)
    for number in range(25):
        records.write_record("file", str(number), number)
    assert len(list((cache / "records").iterdir())) <= 10
    assert records.read_record("file", "24") == 24 and records.read_record("file", "0") is None


def test_the_users_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert user_cache() == tmp_path / "cache" / "cuantiza"
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(sys, "platform", "linux")
    for ignored in ("", "relative"):
        monkeypatch.setenv("XDG_CACHE_HOME", ignored)
        assert user_cache() == tmp_path / ".cache" / "cuantiza"
    monkeypatch.setattr(sys, "platform", "darwin")
    assert user_cache() == tmp_path / "Library" / "Caches" / "cuantiza"


def test_imports_are_parsed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    first = digests.code_files("cuantiza.export.stage")
    monkeypatch.setattr(digests, "_imports", lambda source: pytest.fail("parsed again"))
    assert digests.code_files("cuantiza.export.stage") == first and "cuantiza.export.graphs.gpt2" in first


def test_versions_are_those_that_python_tells() -> None:
    names = {item.name for item in importlib.metadata.distributions()}
    assert {"numpy", "onnx-ir", "torch"} <= names
    found = versions(*names, "no-such-distribution")
    assert found.pop("python").startswith("3.")
    assert found == {name: importlib.metadata.version(name) for name in names}


# Artifacts


@pytest.fixture
def tiny(tiny_folder: Path, tmp_path: Path) -> Path:
    """A checkpoint to be spoilt, whose weights are a large file."""
    folder = shutil.copytree(tiny_folder, tmp_path / "tiny")
    assert (folder / "model.safetensors").stat().st_size >= LEAST_BYTES
    return folder


@pytest.fixture
def fp32(es_mini_fp32: Artifact, tmp_path: Path, later: Callable) -> Artifact:
    """A copy of es-mini's artifact, which an earlier run has read."""
    later()
    path = shutil.copytree(es_mini_fp32.path, tmp_path / "artifacts" / "es-mini" / "fp32")
    (path.parent / ".cuantiza.lock").touch()
    return open_artifact(path, sha256_known)


def test_a_touched_file_is_still_up_to_date(fp32: Artifact, read: list[int]) -> None:
    assert up_to_date(fp32.path, fp32.manifest.inputs) == fp32 and not read
    fp32.model.touch()
    assert up_to_date(fp32.path, fp32.manifest.inputs) == fp32 and len(read) == 1


def test_a_flipped_bit_is_noticed_although_its_time_is_set_back(fp32: Artifact) -> None:
    flip(fp32.model)
    assert "model.onnx: missing or changed" in str(up_to_date(fp32.path, fp32.manifest.inputs))


def test_nothing_is_built_from_a_rotten_artifact(fp32: Artifact, new_process: Callable) -> None:
    """The times say that nothing changed, so only who builds from it reads it; from then on all know."""
    rot(fp32.model)
    new_process()
    assert up_to_date(fp32.path, fp32.manifest.inputs) == fp32
    with pytest.raises(UserError, match=r"model\.onnx: missing or changed"):
        quantize(fp32, "fp16")
    assert not (fp32.path.parent / "fp16").exists()
    assert "model.onnx: missing or changed" in str(up_to_date(fp32.path, fp32.manifest.inputs))


def test_nothing_is_measured_from_a_rotten_artifact(fp32: Artifact, new_process: Callable) -> None:
    rot(fp32.model)
    new_process()
    with pytest.raises(UserError, match=r"model\.onnx: missing or changed"):
        evaluate([fp32], corpus=CORPUS, **RUN)


def test_an_export_says_what_it_really_read(
    tiny: Path, tmp_path: Path, export_here: Callable[..., Result], later: Callable, new_process: Callable
) -> None:
    later()
    run = lambda opset: export_here("--model", tiny, "--output", tmp_path / "out", "--opset", opset)  # noqa: E731
    assert run(21).status == 0
    before = open_artifact(tmp_path / "out/tiny/fp32")
    rot(tiny / "model.safetensors")
    new_process()
    assert "up to date" in run(21).stderr
    assert run(20).status == 0
    after = open_artifact(tmp_path / "out/tiny/fp32").manifest.inputs["checkpoint"]
    assert after == checkpoint_digest(tiny) != before.manifest.inputs["checkpoint"]


# All stages


def test_a_pipeline_with_nothing_to_do_reads_no_large_file(
    tiny: Path,
    tmp_path: Path,
    export_here: Callable[..., Result],
    later: Callable,
    new_process: Callable,
    read: list[int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    later()
    output, reports = tmp_path / "artifacts", tmp_path / "reports"
    assert export_here("--model", tiny, "--output", output).status == 0  # parity in this process

    def pipeline() -> None:
        new_process()
        fp32 = export(tiny, output)
        evaluate([fp32, quantize(fp32, "fp32-ort")], corpus=CORPUS, output=reports, **RUN)

    pipeline()
    files = [*output.rglob("*"), *reports.rglob("*")]
    before = {file: (file.stat().st_ino, file.stat().st_mtime_ns) for file in files if file.is_file()}
    read.clear()
    pipeline()
    assert {file: (file.stat().st_ino, file.stat().st_mtime_ns) for file in before} == before and not read
    monkeypatch.setenv(HASH_ALL, "1")
    pipeline()
    large = [tiny / "model.safetensors", output / "tiny/fp32/model.onnx", output / "tiny/fp32-ort/model.onnx"]
    assert all(file.stat().st_size >= LEAST_BYTES for file in large)
    assert {file.stat().st_size for file in large} == set(read)
    assert {file: (file.stat().st_ino, file.stat().st_mtime_ns) for file in before} == before


LOADED = """
import sys
from importlib import import_module
for command, *arguments in {commands!r}:
    assert import_module(f"cuantiza.{{command}}.__main__").main(arguments) == 0
print(*sorted({{name.split(".")[0] for name in sys.modules}}))
"""


def test_a_pipeline_with_nothing_to_do_loads_what_it_needs_alone(fp32: Artifact, tmp_path: Path) -> None:
    output, reports = fp32.path.parent.parent, tmp_path / "reports"
    evaluate([fp32], corpus=CORPUS, output=reports / "es-mini", **RUN)
    settings = [word for name, value in RUN.items() for word in (f"--{name}", str(value))]
    commands = [
        ["export", "--output", str(output)],
        ["quantize", "--output", str(output), "--recipes", "fp32"],
        [
            "eval",
            "--artifacts",
            str(output),
            "--output",
            str(reports),
            "--recipes",
            "fp32",
            "--without-torch",
            *settings,
        ],
    ]
    done = subprocess.run(
        [sys.executable, "-c", LOADED.format(commands=commands)], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0 and done.stderr.count("up to date") == 2, done.stderr
    loaded = set(done.stdout.splitlines()[-1].split())
    assert "pydantic" in loaded
    assert not loaded & {"numpy", "onnx", "onnxruntime", "onnx_ir", "torch", "transformers", "jinja2", "asyncio"}
