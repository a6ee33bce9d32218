"""Packed weights in the user's cache: exactly the same logits, however the copy comes about, is damaged or cannot be."""

from __future__ import annotations

import functools
import hashlib
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from cuantiza.core.inputs.corpus import Source, load_splits
from cuantiza.core.run import packed, runtime
from cuantiza.core.run.packed import is_packed
from cuantiza.core.run.runtime import Runtime, open_session
from cuantiza.core.store import entries
from cuantiza.core.store.artifact import Artifact
from cuantiza.core.store.user_cache import VARIABLE, user_cache
from cuantiza.model import load
from cuantiza.quantize.recipes.half import Half
from cuantiza.quantize.recipes.registry import RECIPES
from cuantiza.quantize.settings import Calibration
from lab.faults.disk import spoil

from helpers import CORPUS, ROOT, stage

NAMES = ("int8-dynamic", "int8-dynamic-ort", "int8-weight", "int8-weight-ort", "int4-weight-ort", "fp16", "bf16-ort")
IDS = np.random.default_rng(0).integers(8192, size=(1, 40))
# Opens the artifact's file argv[1] as a part of the artifact "a", in the cache of the environment, and prints its logits.
PROGRAM = f"""
import hashlib, sys
import numpy as np
from pathlib import Path
from cuantiza.core.run.packed import is_packed
from cuantiza.core.run.runtime import Runtime
runtime = Runtime(Path(sys.argv[1]), 1, artifact="a")
logits = runtime.forward(np.array({IDS.tolist()}))
print(hashlib.sha256(logits.tobytes()).hexdigest(), is_packed(runtime.session))
"""


@pytest.fixture(autouse=True)
def own_caches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each test has a cache of its own."""
    monkeypatch.setenv(VARIABLE, str(tmp_path / "caches"))


@pytest.fixture(scope="module")
def quantized(es_mini_fp32: Artifact, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """`quantized(recipe)`: the ONNX file of es-mini, rounded to nearest, because only the operators matter here."""

    @functools.cache
    def get(name: str) -> Path:
        if name == "fp32":
            return es_mini_fp32.model
        recipe, folder = RECIPES[name], tmp_path_factory.mktemp(name)
        if not isinstance(recipe, Half):
            recipe = replace(recipe, rounding="nearest", calibration=Calibration(8, 32))
        recipe.make(es_mini_fp32.path, folder, load_splits(Source(str(CORPUS)))[0])
        return folder / "model.onnx"

    return get


@pytest.fixture
def model(quantized: Callable[[str], Path]) -> Path:
    return quantized("int8-dynamic-ort")


def copies() -> list[Path]:
    """The copies in the cache. Nothing else is left in it by the makers."""
    assert not list(user_cache().glob(".tmp-*"))
    return sorted((user_cache() / "packed").glob("*"))


def answers(model: Path, threads: int = 1, artifact: str | None = "a") -> tuple[bool, bytes]:
    """(whether the session is over a copy, the bytes of the logits of a prompt and of the tokens after it)."""
    opened = Runtime(model, threads, artifact=artifact)
    cache, logits = opened.cache(1, 40), [opened.forward(IDS[:, :16])]
    for piece in (IDS[:, :33], *(IDS[:, at : at + 1] for at in range(33, 40))):
        logits.append(opened.step(cache, piece))
    return is_packed(opened.session), b"".join(array.tobytes() for array in logits)


def process(model: Path, program: str = PROGRAM) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-c", program, str(model)],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.parametrize("name", ["fp32", *NAMES])
def test_logits_are_exactly_the_artifacts(quantized: Callable[[str], Path], name: str) -> None:
    """Also on more threads than the copy was made with."""
    for threads in (1, 2):
        without, expected = answers(quantized(name), threads, artifact=None)
        made, found = answers(quantized(name), threads)
        assert (without, made) == (False, True) and found == expected
    assert len(copies()) == 1
    assert answers(quantized(name), 2) == (True, expected)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_weights_are_mapped(model: Path) -> None:
    opened = Runtime(model, 1, artifact="a")
    assert is_packed(opened.session)
    assert str(copies()[0] / "weights.bin") in Path("/proc/self/maps").read_text()


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_processes_share_what_they_map(model: Path) -> None:
    """Most of the packed weights' pages that a process uses are those of the other, and not its own."""
    program = PROGRAM + 'sys.stdout.flush(); sys.stdin.readline(); print(Path("/proc/self/smaps").read_text())'
    process(model).communicate(timeout=120)
    both = [process(model, program) for _ in range(2)]
    assert all(one.stdout.readline().endswith("True\n") for one in both)  # both have computed, and wait
    shared, own, inside = 0, 0, False
    for line in both[0].communicate(timeout=120)[0].splitlines():
        if "-" in line.split(" ")[0]:
            inside = line.endswith("weights.bin")
        elif inside and line.startswith("Shared"):
            shared += int(line.split()[1])
        elif inside and line.startswith("Private"):
            own += int(line.split()[1])
    both[1].communicate(timeout=120)
    assert shared > 3000 > own, (shared, own)  # KiB


def test_load_and_generate_use_it(es_mini_fp32: Artifact) -> None:
    command = ["cuantiza", "generate", "--artifact", es_mini_fp32.path, "--tokens", 5, "--greedy"]
    off = stage(*command, env={VARIABLE: "off"})
    first, again = stage(*command), stage(*command)
    assert off.status == first.status == again.status == 0, first.stderr
    assert first.stdout == again.stdout == off.stdout and len(copies()) == 1
    assert is_packed(load(es_mini_fp32).runtime.session)


def test_only_artifacts_that_are_loaded_have_one(model: Path) -> None:
    """Sessions of calibration and of eval open the file itself."""
    Runtime(model, 1)
    open_session(model, 1)
    assert not is_packed(open_session(model, 1, prepack=False, artifact="a"))
    assert not copies()


def test_other_circumstances_another_copy(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert is_packed(open_session(model, 1, artifact="a")) and len(copies()) == 1
    assert is_packed(open_session(model, 2, artifact="a")) and len(copies()) == 1
    open_session(model, 1, artifact="b")
    assert len(copies()) == 2
    open_session(model, 1, spin=True, artifact="a")
    assert len(copies()) == 3
    with monkeypatch.context() as patch:
        patch.setenv("ORT_GQA_DISABLE_FLASH_ATTENTION", "1")
        open_session(model, 1, artifact="a")
    assert len(copies()) == 4
    with monkeypatch.context() as patch:
        patch.setattr(packed, "processor", lambda: "another")
        open_session(model, 1, artifact="a")
    assert len(copies()) == 5
    monkeypatch.setattr(runtime, "exact_options", lambda model: {"session.x64quantprecision": "2"})
    open_session(model, 1, artifact="a")
    assert len(copies()) == 6


def test_switched_off(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "off")
    assert not is_packed(open_session(model, 1, artifact="a")) and not (tmp_path / "caches").exists()


@pytest.mark.parametrize("name", ["index.json", "model.onnx", "weights.bin"])
@pytest.mark.parametrize("how", ["deleted", "emptied", "halved", "first bit", "one bit", "last bit"])
def test_a_damaged_copy_is_made_again(model: Path, name: str, how: str) -> None:
    expected = answers(model)
    whole = {file.name: file.read_bytes() for file in copies()[0].iterdir()}
    spoil(copies()[0] / name, how, random.Random(0))
    assert answers(model) == expected and expected[0]
    assert {file.name: file.read_bytes() for file in copies()[0].iterdir()}.keys() == whole.keys()
    assert (copies()[0] / "weights.bin").read_bytes() == whole["weights.bin"]


def test_a_flipped_bit_is_seen_although_the_file_is_known(model: Path) -> None:
    """The sha256 of large files is kept from run to run, but not where a program has written to them."""
    expected = answers(model)
    weights = copies()[0] / "weights.bin"
    time.sleep(2.1)
    assert answers(model) == expected  # its sha256 is known from here on
    times, whole = weights.stat(), weights.read_bytes()
    spoil(weights, "one bit", random.Random(1))
    os.utime(weights, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert weights.read_bytes() != whole
    assert answers(model) == expected and (copies()[0] / "weights.bin").read_bytes() == whole


def test_a_copy_that_is_not_exact_is_not_published(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        packed, "_mapped", lambda folder, options, mapped=packed._mapped: _other(mapped(folder, options))
    )
    assert not is_packed(open_session(model, 1, artifact="a")) and not copies()


class _other:
    """A session whose outputs differ in one bit."""

    def __init__(self, session: object) -> None:
        self._session = session

    def run(self, names: object, feeds: object) -> list[np.ndarray]:
        first, *rest = self._session.run(names, feeds)
        first = first.copy()
        first.view(np.uint32).flat[-1] ^= 1
        return [first, *rest]


def test_two_processes_at_once(model: Path) -> None:
    """One makes the copy, and the other does not wait for it; or it comes later, and finds the copy."""
    both = [process(model), process(model)]
    said = [one.communicate(timeout=120)[0].split() for one in both]
    assert len(copies()) == 1 and said[0][0] == said[1][0], [one.stderr for one in both]
    assert "True" in (said[0][1], said[1][1])


MOMENTS = {
    "the weights are written": "packed._agree",
    "the index is missing": "packed.sha256_file",
    "it is published": "entries.replace",
    "it is there": "entries._hold_to_bound",
}


@pytest.mark.parametrize("where", MOMENTS.values(), ids=MOMENTS)
def test_killed_while_it_is_made(model: Path, where: str) -> None:
    kill = "import os, signal\nfrom cuantiza.core.run import packed\nfrom cuantiza.core.store import entries\n"
    kill += f"{where} = lambda *_: os.kill(os.getpid(), signal.SIGKILL)\n"
    killed = process(model, kill + PROGRAM)
    assert killed.wait(120) == -signal.SIGKILL
    killed.communicate()
    _as_if_nothing_had_happened(model)


@pytest.mark.slow
def test_killed_at_any_of_fifty_moments(model: Path) -> None:
    begun = time.monotonic()
    process(model).communicate()
    whole, struck = time.monotonic() - begun, 0
    for number in range(50):
        shutil.rmtree(user_cache())
        killed = process(model)
        try:
            killed.wait(whole * number / 50)
        except subprocess.TimeoutExpired:
            killed.kill()
            struck += 1
        killed.communicate()
        _as_if_nothing_had_happened(model)
    assert struck > 25


def _as_if_nothing_had_happened(model: Path) -> None:
    """The next process has the right logits and a copy, and nothing is left of the one that was killed."""
    after = process(model)
    said = after.communicate(timeout=120)
    expected = Runtime(model, 1).forward(IDS)
    assert said[0].split() == [hashlib.sha256(expected.tobytes()).hexdigest(), "True"], said[1]
    if list(user_cache().glob(".tmp-*")):  # the copy was there already; the next maker removes what is left
        with entries.making(user_cache()) as work:
            assert work is not None
    assert len(copies()) == 1


@pytest.fixture
def disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A file system of 1 MB, with the cache in it."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)]
    if not shutil.which("mount") or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("mounting a tmpfs takes root")
    monkeypatch.setenv(VARIABLE, str(folder))
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk(model: Path, disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = answers(model, artifact=None)
    for looks in (True, False):  # whether there is room, before or only while it is written
        if not looks:
            monkeypatch.setattr(packed, "_has_room", lambda model, folder: True)
        assert answers(model) == expected and not copies()


def test_a_folder_that_can_only_be_read(model: Path, disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is in it is used, and nothing can be added."""
    subprocess.run(["mount", "-o", "remount,size=256m", str(disk)], check=True)
    expected = answers(model)
    assert expected[0]
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
    assert answers(model) == expected
    assert answers(model, artifact="b") == (False, expected[1])


def test_it_is_held_to_its_bound(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    open_session(model, 1, artifact="a")
    size = sum(file.stat().st_size for file in copies()[0].iterdir())
    most = packed._MOST_TIMES * model.stat().st_size
    assert size < most  # what is reserved for a copy is enough
    monkeypatch.setattr(entries, "BOUND_BYTES", most)
    for name in "bcd":
        assert is_packed(open_session(model, 1, artifact=name))
        assert size * len(copies()) < most
    assert len(copies()) == most // size
    monkeypatch.setattr(entries, "BOUND_BYTES", most - 1)
    before = copies()
    assert not is_packed(open_session(model, 1, artifact="too large for it")) and copies() == before
