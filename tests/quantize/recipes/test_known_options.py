"""What each matrix costs is measured once for a model, a text and a plan."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from cuantiza.core.store.user_cache import VARIABLE
from cuantiza.quantize.known_options import known_options
from cuantiza.quantize.mixed import BASE, OTHERS
from cuantiza.quantize.recipes.registry import RECIPES
from cuantiza.quantize.weights.allocate import Option


@pytest.mark.parametrize("change", ["model", "windows", "plan"])
def test_what_was_measured_counts_for_the_same_model_text_and_plan(change, monkeypatch, tmp_path):
    monkeypatch.setenv(VARIABLE, str(tmp_path / "caches"))
    (path := tmp_path / "model.onnx").write_bytes(b"one")
    windows, plan = [np.arange(6).reshape(2, 3)], RECIPES["int-mixed"].plan()
    found = {"w": [Option(BASE, 10, 0.1), Option(OTHERS[0], 8, 1 / 3)]}
    assert known_options(path, windows, plan, lambda: found) == found
    assert known_options(path, windows, plan, lambda: pytest.fail("measured again")) == found
    if change == "model":
        (path := tmp_path / "other" / "model.onnx").parent.mkdir()
        path.write_bytes(b"two")
    elif change == "windows":
        windows = [np.arange(6).reshape(3, 2)]
    else:
        plan = replace(plan, alphas=(0.5,))
    assert known_options(path, windows, plan, dict) == {}
