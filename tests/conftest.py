"""The fixtures that tests of several rooms use. What they call is in helpers.py."""

from __future__ import annotations

import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from cuantiza.core.store.artifact import Artifact, open_artifact

from helpers import ES_MINI, Result, assert_nothing_published, assert_user_error, copy_tokenizer, stage, tiny_gpt2

# A shell that starts tests in the background has them ignore Ctrl-C, and the stages that they start inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Tests, and what they start, keep their records away from the user's."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def es_mini() -> Path:
    """The embedded model's folder."""
    return ES_MINI


@pytest.fixture
def make_gpt2(tmp_path: Path) -> Callable[..., Path]:
    """`make_gpt2(name="tiny", **config)` writes a tiny checkpoint, as transformers saves it, and gives its folder."""

    def make(name: str = "tiny", **overrides: object) -> Path:
        folder = tmp_path / name
        tiny_gpt2(**overrides).save_pretrained(folder)
        copy_tokenizer(folder)
        return folder

    return make


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny checkpoint that tests copy or read, and do not change."""
    folder = tmp_path_factory.mktemp("checkpoints") / "tiny"
    tiny_gpt2().save_pretrained(folder)
    copy_tokenizer(folder)
    return folder


@pytest.fixture
def export_here(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> Callable[..., Result]:
    """`export_here("--model", ...)`: the export stage in this process, seconds faster than in its own.

    Parity compares in this process as well, where torch is imported already.
    """
    import cuantiza.export.__main__
    import cuantiza.export.parity
    from cuantiza.core.errors import run

    monkeypatch.setattr(cuantiza.export.parity, "isolated", lambda function, *args, label: function(*args))

    def call(*args: object) -> Result:
        monkeypatch.setattr(sys, "argv", ["export", *map(str, args)])
        handler = signal.getsignal(signal.SIGTERM)
        capsys.readouterr()
        try:
            with pytest.raises(SystemExit) as end:
                run(cuantiza.export.__main__.main)
        finally:
            signal.signal(signal.SIGTERM, handler)
        return Result(end.value.code, *capsys.readouterr())

    return call


@pytest.fixture
def exported(export_here: Callable[..., Result], tmp_path: Path) -> Callable[..., Artifact]:
    """`exported(folder, *options)`: the verified fp32 artifact of `folder`; fails where the export does."""

    def call(folder: Path, *options: object) -> Artifact:
        output = tmp_path / "artifacts"
        result = export_here("--model", folder, "--output", output, *options)
        assert result.status == 0, result.stderr
        return open_artifact(output / folder.name / "fp32")

    return call


@pytest.fixture(scope="session")
def es_mini_fp32(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    """The embedded model's fp32 artifact, made by the command itself."""
    output = tmp_path_factory.mktemp("artifacts")
    result = stage("export", "--output", output)
    assert result.status == 0, result.stderr
    return open_artifact(output / "es-mini" / "fp32")


@pytest.fixture
def folder(tiny_folder: Path, tmp_path: Path) -> Path:
    """A good checkpoint, to be spoilt."""
    return shutil.copytree(tiny_folder, tmp_path / "spoilt")


@pytest.fixture
def refused(export_here: Callable[..., Result], folder: Path, tmp_path: Path) -> Callable[..., str]:
    """`refused(*fragments)`: the spoilt checkpoint gives that one line, and nothing is published."""

    def call(*fragments: str, options: tuple[str, ...] = ()) -> str:
        output = tmp_path / "artifacts"
        line = assert_user_error(export_here("--model", folder, "--output", output, *options), *fragments)
        assert_nothing_published(output)
        return line

    return call
