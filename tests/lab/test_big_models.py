"""lab/big_models.py measures anonymous memory correctly, merges its figures, and makes the page from them."""

import json
import subprocess
import sys

import numpy as np
import pytest

from lab.big_models import RECIPES, anonymous, growth, join, nearest_recipe, step, write_page
from lab.checkpoints.random import checkpoint
from lab.checkpoints.shapes import SHAPES, Shape

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")


def test_anonymous_memory_of_a_process_and_of_those_below_it(tmp_path):
    """Memory that a process or its children fill counts; a mapped file does not."""
    np.full(40_000_000, 1, np.uint8).tofile(tmp_path / "file")
    program = f"""
import subprocess, sys, numpy as np
mapped = np.memmap({str(tmp_path / "file")!r}, np.uint8, "r")
filled = np.full(60_000_000, 1, np.uint8)
child = subprocess.Popen([sys.executable, "-c", "b = b'x' * 100_000_000; print('', flush=True); input()"], stdin=-1, stdout=-1)
child.stdout.readline()
print(int(mapped.sum()), flush=True)
input()
"""
    with subprocess.Popen([sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        process.stdout.readline()
        own, below = anonymous(process.pid)
        process.communicate(b"\n")
    assert 60e6 < own < 100e6  # without the mapped 40 MB, but with the memory of Python and NumPy
    assert 100e6 < below < 120e6
    assert anonymous(process.pid) == (0, 0)


def test_memory_does_not_grow_with_the_model(tmp_path, monkeypatch):
    """Export streams the weights from the checkpoint to the file, and rounding to nearest does so as well.

    The checkpoint's weights would take a byte of memory for each of its bytes, and the integers of all layers a quarter
    of one. Half of that is allowed, since a layer's nodes take about 1 MB in Python at any width, here 0.04 of its bytes.
    """
    # Otherwise glibc keeps up to 32 MB of freed memory for every size of array that it has seen, more or less by chance.
    monkeypatch.setenv("MALLOC_MMAP_THRESHOLD_", "65536")
    recipe = nearest_recipe(tmp_path)
    sizes, peaks = [], []
    for layers in (2, 8):
        shape = Shape(f"layers-{layers}", layers=layers, width=768, heads=12, vocabulary=8192, positions=128)
        model = checkpoint(shape, tmp_path)
        sizes.append((model / "model.safetensors").stat().st_size)
        export = step(["export", "--model", model, "--output", tmp_path / "out"])
        nearest = step(["quantize", "--model", model, "--output", tmp_path / "out", "--recipes", recipe])
        peaks.append((export["anonymous_bytes_of_the_first"], nearest["anonymous_bytes"]))
    slopes = np.subtract(*peaks[::-1]) / np.subtract(*sizes[::-1])
    assert (slopes < np.array([1, 0.25]) / 2).all(), (slopes, sizes, peaks)


def test_another_size_or_step_joins_what_was_measured(tmp_path):
    about = {"cpu": "a CPU", "processors": 2, "memory_bytes": 24e9, "tokens": 1024, "versions": {"numpy": "2"}}
    path = tmp_path / "big.json"
    assert join(path, about, []) == []
    rows = [{"shape": name, "steps": {"export": 1, "eval": 2}, "n": 3} for name in ("gpt2", "gpt2-xl")]
    path.write_text(json.dumps(about | {"rows": rows}))
    medium, export = {"shape": "gpt2-medium", "steps": {"export": 9}}, {"shape": "gpt2", "steps": {"export": 8}}
    assert join(path, about, [medium]) == [rows[0], medium, rows[1]]
    assert join(path, about, [export])[0] == {"shape": "gpt2", "steps": {"export": 8, "eval": 2}, "n": 3}
    assert join(path, about | {"versions": {"numpy": "3"}}, [medium]) == [medium]


def test_the_page_is_made_of_the_figures(tmp_path):
    names = ("fp32", *RECIPES)
    step = {"seconds": 12.0, "anonymous_bytes": 2_500_000_000, "anonymous_bytes_of_the_first": 340_000_000}
    row = {
        "shape": "gpt2",
        "checkpoint_bytes": 498_000_000,
        "steps": dict.fromkeys(("export", *RECIPES, "eval"), step),
        "file_bytes": dict.fromkeys(names, 123_000_000),
        "ln_ppl": {"fp32": 1000.0} | dict.fromkeys(RECIPES, 1010.0),
        "scored": 100,
    }
    about = {"cpu": "a CPU", "processors": 2, "memory_bytes": 24e9, "tokens": 1024}
    (tmp_path / "big.json").write_text(json.dumps({**about, "rows": [row]}))
    write_page(tmp_path / "big.json")
    page = (tmp_path / "big.md").read_text()
    assert "| gpt2 | 0.50 | 12 | 12 | 12 | 12 | 12 |" in page and "| 2.50 |" in page and "| 0.34 |" in page
    assert page.count("+0.1000") == len(RECIPES)


def test_growth_of_what_is_linear_is_one():
    """If time is 3 s per GB of the blocks, and memory half the checkpoint plus 1 GB, the exponents and slope say so."""

    def row(name):
        shape = SHAPES[name]
        blocks = 4 * shape.layers * 12 * shape.width**2
        whole = blocks + 4 * shape.width * (shape.vocabulary + shape.positions)
        steps = {"export": {"seconds": 3e-9 * blocks, "anonymous_bytes": whole / 2 + 1e9}}
        return {"shape": name, "checkpoint_bytes": whole, "steps": steps}

    whole, blocks, memory = growth([row(name) for name in ("gpt2", "gpt2-medium", "gpt2-xl")], ["export"])
    assert (blocks[1], memory[1]) == ("1.00", "0.50")
    assert 1 < float(whole[1]) < 1.2  # the embedding's share falls
