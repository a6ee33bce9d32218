"""Artifacts: whole or not there, verified byte for byte, rebuilt for a stated reason, one stage at a time."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

import cuantiza
from cuantiza.core.errors import UserError
from cuantiza.core.store import digests, folders
from cuantiza.core.store.artifact import Artifact, open_artifact, publish, rebuild_reason
from cuantiza.core.store.digests import code_digest, digest
from cuantiza.core.store.folders import locked, staging

from helpers import ROOT, assert_nothing_published, stage

INPUTS = {"checkpoint": "c0ffee", "opset": 21, "versions": {"onnx-ir": "1.0"}}
CONTENT = {"model.onnx": bytes(range(256)) * 40, "config.json": b'{"a\xc3\xb1o": 1}\n', "empty.json": b""}


def build(target: Path, content: dict[str, bytes] = CONTENT, inputs: dict = INPUTS) -> Artifact:
    target.parent.mkdir(parents=True, exist_ok=True)
    with staging(target) as work:
        for name, data in content.items():
            (work / name).write_bytes(data)
        return publish(
            work,
            target,
            name=target.name,
            model="modelo-ñ",
            recipe={"type": "fp32"},
            inputs=inputs,
            parent=None,
            calibration=None,
            versions={"python": "3"},
            details={"parity": 1e-05},
        )


def names(folder: Path) -> set[str]:
    return {file.name for file in folder.iterdir()}


@pytest.fixture
def built(tmp_path: Path) -> Path:
    return build(tmp_path / "modelo" / "fp32").path


# Publishing and verifying


def test_round_trip(tmp_path: Path) -> None:
    target = tmp_path / "modelo" / "fp32"
    published = build(target)
    assert open_artifact(target) == published
    assert names(target) == CONTENT.keys() | {"manifest.json"} and names(target.parent) == {"fp32"}
    assert {name: (target / name).read_bytes() for name in CONTENT} == CONTENT
    assert published.model == target / "model.onnx"
    assert {name: file.bytes for name, file in published.manifest.files.items()} == {
        name: len(data) for name, data in CONTENT.items()
    }
    for name, file in published.manifest.files.items():
        told = subprocess.run(["sha256sum", target / name], capture_output=True, text=True, check=True).stdout
        assert told.split()[0] == file.sha256
    fields = json.loads((target / "manifest.json").read_text(encoding="utf-8"))
    assert fields.pop("sha256") == digest(fields)
    assert fields == dataclasses.asdict(published.manifest) and fields["schema"] == "cuantiza/artifact/1"
    assert target.stat().st_mode & 0o777 == 0o755


def test_digest_is_of_the_content(tmp_path: Path) -> None:
    """The digest depends on every byte and file name, but not on the place, the time or the inputs."""
    first = build(tmp_path / "a" / "fp32")
    assert build(tmp_path / "b" / "other", dict(reversed(CONTENT.items())), {"x": 1}).digest == first.digest
    renamed = {name.replace("model", "other"): data for name, data in CONTENT.items()}
    for changed in (CONTENT | {"config.json": b"{}"}, CONTENT | {"more": b""}, renamed):
        assert build(tmp_path / "c" / "fp32", changed).digest != first.digest


def test_digest_of_values() -> None:
    assert digest({"a": 1, "b": [2]}) == digest({"b": [2], "a": 1}) != digest({"a": 1, "b": ["2"]})


@pytest.mark.parametrize("name", ["model.onnx", "config.json"])
def test_every_flipped_bit_is_noticed(built: Path, name: str) -> None:
    path, data = built / name, CONTENT[name]
    for bit in {0, 1, 7, 8, len(data) * 4, len(data) * 8 - 1}:
        spoilt = bytearray(data)
        spoilt[bit // 8] ^= 1 << bit % 8
        path.write_bytes(spoilt)
        with pytest.raises(UserError, match=f"{name}: missing or changed"):
            open_artifact(built)
    path.write_bytes(data)
    open_artifact(built)


@pytest.mark.parametrize("name", CONTENT)
@pytest.mark.parametrize("change", ["deleted", "truncated", "longer", "folder"])
def test_changed_file_is_noticed(built: Path, name: str, change: str) -> None:
    path = built / name
    if change in ("deleted", "folder"):
        path.unlink()
    if change == "folder":
        path.mkdir()
    elif change != "deleted":
        path.write_bytes(CONTENT[name][:-1] if change == "truncated" and CONTENT[name] else CONTENT[name] + b"\0")
    with pytest.raises(UserError, match=f"{name}: missing or changed"):
        open_artifact(built)
    assert rebuild_reason(built, INPUTS).startswith(str(path))


def test_no_manifest(built: Path, tmp_path: Path) -> None:
    for path in (tmp_path / "nowhere", tmp_path):
        with pytest.raises(UserError, match=r"no manifest\.json.*make export quantize"):
            open_artifact(path)
    (built / "manifest.json").unlink()
    assert "no manifest.json" in rebuild_reason(built, INPUTS)


@pytest.mark.parametrize(
    "change",
    [
        lambda fields: fields.pop("recipe"),
        lambda fields: fields.pop("files"),
        lambda fields: fields.update(unknown=1),
        lambda fields: fields.update(files=[]),
        lambda fields: fields.update(files={"model.onnx": 3}),
        lambda fields: fields["files"]["model.onnx"].pop("bytes"),
        lambda fields: fields["files"]["model.onnx"].update(mode=7),
        lambda fields: fields.update(schema="cuantiza/artifact/2"),
        lambda fields: fields["files"].update(
            {"../secret": {"bytes": 6, "sha256": digests.sha256_file(ROOT / "pyproject.toml")}}
        ),
        lambda fields: fields["files"]["model.onnx"].update(bytes="10240"),
        lambda fields: fields["files"]["model.onnx"].update(sha256=None),
    ],
)
def test_broken_manifest(built: Path, change: Callable[[dict], object]) -> None:
    path = built / "manifest.json"
    fields = json.loads(path.read_text(encoding="utf-8"))
    change(fields)
    path.write_text(json.dumps(fields), encoding="utf-8")
    with pytest.raises(UserError, match=str(built)):
        open_artifact(built)
    assert rebuild_reason(built, INPUTS)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"3", b"\xff\xfe", b"null"])
def test_manifest_is_no_manifest(built: Path, content: bytes) -> None:
    (built / "manifest.json").write_bytes(content)
    with pytest.raises(UserError, match=r"manifest\.json: broken manifest"):
        open_artifact(built)


@pytest.mark.parametrize("part", ["name", "parity", "checkpoint", "sha256"])
def test_every_flipped_bit_of_the_manifest_is_noticed(built: Path, part: str) -> None:
    """That includes flips that leave valid JSON, flips in fields that no file depends on, and the last line end."""
    path = built / "manifest.json"
    data = path.read_bytes()
    start = data.index(f'"{part}": '.encode())
    for bit in range(8 * start, 8 * (data.index(b"\n", start) + 1)):
        spoilt = bytearray(data)
        spoilt[bit // 8] ^= 1 << bit % 8
        path.write_bytes(spoilt)
        with pytest.raises(UserError, match=r"manifest\.json: broken manifest|missing or changed"):
            open_artifact(built)
    path.write_bytes(data[:-1])
    with pytest.raises(UserError, match="changed since it was published"):
        open_artifact(built)


def test_a_manifest_without_a_sum_of_its_own(built: Path) -> None:
    """Older versions published such manifests."""
    path = built / "manifest.json"
    fields = json.loads(path.read_text(encoding="utf-8"))
    del fields["sha256"]
    path.write_text(json.dumps(fields, indent=1), encoding="utf-8")
    open_artifact(built)


# Reasons to rebuild


def test_rebuild_reason(built: Path) -> None:
    assert rebuild_reason(built.parent / "int8", INPUTS) == "new"
    assert rebuild_reason(built, INPUTS) is None
    assert rebuild_reason(built, dict(reversed(INPUTS.items()))) is None
    assert rebuild_reason(built, INPUTS | {"opset": 20}) == "changed: opset"
    assert (
        rebuild_reason(built, INPUTS | {"versions": {"onnx-ir": "1.1"}, "checkpoint": "bad"})
        == "changed: checkpoint, versions"
    )
    assert rebuild_reason(built, INPUTS | {"exporter": "graph"}) == "changed: exporter"
    assert rebuild_reason(built, {"opset": 21}) == "changed: checkpoint, versions"


def test_code_is_an_input(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The code digest covers the named modules and everything that they import, also in functions, but nothing else."""
    for name, source in {
        "__init__.py": "",
        "core/__init__.py": "",
        "core/a.py": "x = 1\n",
        "core/b.py": "import numpy\nx = 1\n",
        "core/c.py": "x = 1\n",
        "export/__init__.py": "",
        "export/main.py": "from cuantiza.core import a\ndef f():\n    from cuantiza.core.b import x\n    import cuantiza.export.main\n",
    }.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(source)
    monkeypatch.setattr(cuantiza, "__path__", [str(tmp_path)])
    of = code_digest.__wrapped__
    before = of("cuantiza.export.main")
    assert before == of("cuantiza.export.main") != of("cuantiza.core.a")
    (tmp_path / "core/c.py").write_text("x = 2\n")
    assert of("cuantiza.export.main") == before
    for name in ("core/a.py", "core/b.py", "export/main.py", "export/__init__.py", "core/__init__.py", "__init__.py"):
        changed = (tmp_path / name).read_text() + "# another version\n"
        (tmp_path / name).write_text(changed)
        assert of("cuantiza.export.main") != before
        before = of("cuantiza.export.main")


# Replacing

NEW = CONTENT | {"model.onnx": b"new"}


@pytest.mark.parametrize("rename", [1, 2])
def test_an_error_while_replacing_leaves_the_old_one(built: Path, monkeypatch: pytest.MonkeyPatch, rename: int) -> None:
    """If the first or the second rename is interrupted, the old artifact is whole and there are no leftovers."""
    calls, real = [], Path.rename

    def dying(self: Path, target: Path) -> Path:
        calls.append(self)
        if len(calls) == rename:
            raise KeyboardInterrupt
        return real(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", dying)
        with pytest.raises(KeyboardInterrupt):
            build(built, NEW)
    assert open_artifact(built).model.read_bytes() == CONTENT["model.onnx"]
    assert names(built.parent) == {"fp32"}
    (built.parent / ".cuantiza.lock").touch()
    with locked(built.parent):
        build(built, NEW)
    assert open_artifact(built).model.read_bytes() == b"new"
    assert names(built.parent) == {"fp32", ".cuantiza.lock"}


PUBLISH_WITHOUT_END = """
import os, sys
sys.path[:0] = ["tests/cuantiza/core/store", "tests", "."]
from pathlib import Path
from test_artifact import CONTENT, NEW, build
while os.fork():  # every round is a fork, as importing takes longer than a round
    os.wait()
print(os.getpid(), flush=True)
while True:
    for content in (CONTENT, NEW):
        build(Path(sys.argv[1]), content)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_killed_while_replacing(tmp_path: Path) -> None:
    """A real process that publishes all the time is killed at 25 moments; the artifact is never a mixture."""
    target = tmp_path / "modelo" / "fp32"
    target.parent.mkdir()
    (target.parent / ".cuantiza.lock").touch()
    wholes = {build(tmp_path / name / "fp32", content).digest for name, content in (("old", CONTENT), ("new", NEW))}
    with subprocess.Popen(
        [sys.executable, "-c", PUBLISH_WITHOUT_END, target],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as parent:
        try:
            for number in range(25):
                worker = int(parent.stdout.readline())
                time.sleep(0.005 + 0.003 * number)
                os.kill(worker, signal.SIGSTOP)
                while Path(f"/proc/{worker}/stat").read_text().rpartition(")")[2].split()[0] != "T":
                    time.sleep(0.001)
                assert not target.exists() or open_artifact(target).digest in wholes
                os.kill(worker, signal.SIGKILL)
        finally:
            os.killpg(parent.pid, signal.SIGKILL)
    with locked(target.parent):
        build(target)
    assert names(target.parent) == {"fp32", ".cuantiza.lock"}


def test_staging_leaves_nothing(built: Path) -> None:
    with pytest.raises(ZeroDivisionError), staging(built) as work:
        assert work.parent == built.parent and work.name.startswith(".tmp-")
        (work / "below").mkdir()
        (work / "below" / "file").write_text("x")
        1 / 0  # noqa: B018
    assert names(built.parent) == {"fp32"}


# What is left over


def test_what_a_signal_left_is_swept(built: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It breaks off the removal of a temporary folder: the holder of the lock removes it on its way out."""
    (built.parent / ".cuantiza.lock").touch()

    def interrupted(folder: Path, ignore_errors: bool) -> None:
        monkeypatch.undo()
        raise KeyboardInterrupt

    monkeypatch.setattr(folders.shutil, "rmtree", interrupted)
    with pytest.raises(KeyboardInterrupt), locked(built.parent), staging(built) as work:
        (work / "model.onnx").write_bytes(b"half")
    assert names(built.parent) == {"fp32", ".cuantiza.lock"}


def test_leftovers_are_swept(built: Path) -> None:
    (built.parent / ".cuantiza.lock").touch()
    for name in (".tmp-a", ".tmp-b"):
        (built.parent / name / "old").mkdir(parents=True)
        (built.parent / name / "old" / "model.onnx").write_bytes(b"half")
    with locked(built.parent):
        assert names(built.parent) == {"fp32", ".cuantiza.lock"}
    open_artifact(built)


# Both, as users meet them


def start_export(folder: Path, output: Path) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-m", "export", "--model", folder, "--output", output],
        cwd=ROOT,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_two_exports_at_once(tiny_folder: Path, tmp_path: Path) -> None:
    """One process builds the artifact; the other waits and then finds it up to date."""
    output = tmp_path / "artifacts"
    with start_export(tiny_folder, output) as first, start_export(tiny_folder, output) as second:
        said = sorted((run.communicate(timeout=120)[1] for run in (first, second)), key=lambda text: "parity" in text)
        assert (first.returncode, second.returncode) == (0, 0), said
    assert "waiting for another run" in said[0] and "up to date" in said[0] and "parity" in said[1]
    open_artifact(output / "tiny" / "fp32")


@pytest.mark.parametrize(
    ("sign", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGKILL, -9)], ids=["INT", "TERM", "KILL"]
)
def test_interrupted_export(tiny_folder: Path, tmp_path: Path, sign: signal.Signals, status: int) -> None:
    """An export that is ended midway leaves no artifact, no traceback and (after SIGKILL: until the next run) no files."""
    output = tmp_path / "artifacts"
    with start_export(tiny_folder, output) as run:
        deadline = time.monotonic() + 60
        while not list(output.glob("tiny/.tmp-*/config.json")) and time.monotonic() < deadline and run.poll() is None:
            time.sleep(0.01)
        time.sleep(0.3)  # until the parity check, which runs in a child process
        run.send_signal(sign)
        said = run.communicate(timeout=60)[1]
    assert run.returncode == status, said
    if sign == signal.SIGKILL:
        assert list(output.glob("tiny/.tmp-*"))
        # The next run removes leftovers before it does anything else, even if it fails later.
        (tmp_path / "tiny").mkdir()
        assert stage("export", "--model", tmp_path / "tiny", "--output", output).status == 2
    else:
        assert "Traceback" not in said
    assert_nothing_published(output)
