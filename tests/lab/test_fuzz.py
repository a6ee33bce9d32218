"""The short form of `python -m lab.fuzz` on every format, and every file that was once a finding."""

import shutil

import pytest

from cuantiza.core.errors import UserError
from lab.fuzz.campaign import campaign
from lab.fuzz.formats import FORMATS

from helpers import ROOT

# Before the fix, each of these files caused a traceback, with two exceptions: the first never ended, and the bomb (300
# MB when unpacked) kept the loader busy for two seconds.
FOUND = {
    "two-billion-layers.config.json": "config.json",
    "unknown-token.tokenizer.json": "tokenizer.json",
    "panic.tokenizer.json": "tokenizer.json",
    "few-inputs.onnx": "ONNX",
    "bad-name.parquet": "corpus .parquet",
    "two-disks.bin": "pytorch_model.bin",
    "terabyte.bin": "pytorch_model.bin",
    "bomb.bin": "pytorch_model.bin",
    "deep.safetensors.index.json": "safetensors index",
}


@pytest.mark.parametrize("name", FORMATS)
def test_broken_files_are_read_or_refused(name, tmp_path):
    row = campaign(name, 100, seed=1, engine="hypothesis", findings=tmp_path)
    assert row["finding"] is None
    assert row["cases"] == 100 and row["accepted"] < 100


def test_a_reader_that_fails_is_found(tmp_path, monkeypatch):
    """The harness reports a traceback, a write, a read outside of the folder and a started program as findings."""
    from lab.fuzz.formats import Format
    from lab.fuzz.harness import Finding, read_case

    def reader(action):
        return Format("bad", "file", lambda folder: None, lambda seed: None, action)

    def raises(folder):
        raise ZeroDivisionError

    def starts(folder):
        import subprocess

        subprocess.run(["true"], check=True)

    actions = {
        "ZeroDivisionError": raises,
        "opened": lambda folder: (folder / "left").write_text("x"),
        "passwd": lambda folder: open("/etc/passwd").close(),  # noqa: PTH123
        "Popen": starts,
    }
    for expected, action in actions.items():
        with pytest.raises(Finding, match=expected):
            read_case(reader(action), tmp_path, b"")
    assert read_case(reader(lambda folder: None), tmp_path, b"")


@pytest.mark.parametrize("file", FOUND)
def test_what_was_found_is_refused(file, tmp_path):
    form = FORMATS[FOUND[file]]
    form.prepare(tmp_path)
    shutil.copyfile(ROOT / "tests/hostile" / file, tmp_path / form.file)
    with pytest.raises(UserError) as refused:
        form.read(tmp_path)
    assert form.file.split("/")[-1] in str(refused.value)


def test_a_tensor_that_requires_grad_is_a_tensor(tmp_path):
    import torch

    form = FORMATS["pytorch_model.bin"]
    form.prepare(tmp_path)
    state = torch.load(tmp_path / form.file, weights_only=True)
    torch.save({name: torch.nn.Parameter(tensor) for name, tensor in state.items()}, tmp_path / form.file)
    form.read(tmp_path)


def test_every_file_that_was_found_is_kept_in_use():
    assert {path.name for path in (ROOT / "tests/hostile").iterdir()} == set(FOUND)
