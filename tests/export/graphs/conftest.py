"""Fixtures of the graphs' tests."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from helpers import Result, assert_nothing_published, assert_user_error, copy_tokenizer, tiny_llama


@pytest.fixture
def make_llama(tmp_path: Path) -> Callable[..., Path]:
    """`make_llama(kind="llama", **config)` writes the checkpoint of a `tiny_llama`, and gives its folder."""

    def make(kind: str = "llama", **overrides: object) -> Path:
        folder = tmp_path / kind
        tiny_llama(kind, **overrides).save_pretrained(folder)
        copy_tokenizer(folder)
        return folder

    return make


@pytest.fixture
def refused_here(export_here: Callable[..., Result], tmp_path: Path) -> Callable[..., str]:
    """`refused_here(folder, *fragments)`: the checkpoint gives that one line, and nothing is published."""

    def call(folder: Path, *fragments: str) -> str:
        output = tmp_path / "artifacts"
        line = assert_user_error(export_here("--model", folder, "--output", output), *fragments)
        assert_nothing_published(output)
        return line

    return call
