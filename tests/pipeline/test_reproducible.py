"""The same checkpoint, text, recipe and versions give the same bytes: elsewhere, later, on fewer processors."""

import os

import pytest

from helpers import stage

RECIPES = ("int8-dynamic", "int8-static", "int4-weight-ort")


def build(model, output, hash_seed, processors):
    """All files of the artifacts of `model` by their path below `output`."""

    def restrict():
        os.sched_setaffinity(0, processors)

    for arguments in (("export",), ("quantize", "--recipes", *RECIPES)):
        result = stage(
            *arguments, "--model", model, "--output", output, env={"PYTHONHASHSEED": hash_seed}, preexec_fn=restrict
        )
        assert result.status == 0, result.stderr
    return {
        path.relative_to(output): path.read_bytes()
        for path in output.rglob("*")
        if path.is_file() and path.name != ".cuantiza.lock"
    }


@pytest.mark.skipif(
    not hasattr(os, "sched_setaffinity") or len(os.sched_getaffinity(0)) < 2,
    reason="no two processors to choose from here",
)
def test_artifacts_are_the_same_bytes_anywhere(make_gpt2, tmp_path):
    """On two layers of es-mini's size, whose matmuls BLAS splits over threads where it may."""
    model = make_gpt2(n_embd=256, n_head=4, n_positions=1024)
    processors = os.sched_getaffinity(0)
    one = build(model, tmp_path / "one", "0", {min(processors)})
    other = build(model, tmp_path / "a longer way" / "to another", "4242", processors)
    assert {path.parent.name for path in one} == {"fp32", *RECIPES}
    assert one.keys() == other.keys()
    assert not [str(path) for path in one if one[path] != other[path]]
