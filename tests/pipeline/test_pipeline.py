"""The whole pipeline on checkpoints as they lie on the hub, and with its disk full."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from cuantiza.core.store.artifact import Artifact, open_artifact

from helpers import CORPUS, assert_user_error, copy_tokenizer, stage, tiny_gpt2


def checkpoint_of_2020(folder: Path, zipped: bool) -> Path:
    """As datificate/gpt2-small-spanish lies on the hub, in either of torch's formats."""
    copy_tokenizer(folder, ("vocab.json", "merges.txt", "special_tokens_map.json"))
    (folder / "tokenizer_config.json").write_text('{"model_max_length": 64}')
    model = tiny_gpt2(n_positions=64)
    state = {**model.state_dict()}
    for layer in range(2):
        mask = torch.tril(torch.ones(64, 64, dtype=torch.uint8))
        state |= {f"transformer.h.{layer}.attn.bias": mask[None, None]}
    torch.save(state, folder / "pytorch_model.bin", _use_new_zipfile_serialization=zipped)
    (folder / "config.json").write_text(
        json.dumps(
            {
                "activation_function": "gelu_new", "architectures": ["GPT2LMHeadModel"], "bos_token_id": 0, "eos_token_id": 0,
                "gradient_checkpointing": False, "layer_norm_epsilon": 1e-05, "model_type": "gpt2", "n_ctx": 64, "n_embd": 32,
                "n_head": 2, "n_layer": 2, "n_positions": 64, "vocab_size": 8192,
                "task_specific_params": {"text-generation": {"do_sample": True, "max_length": 50}},
            }
        )
    )  # fmt: skip
    return folder


def test_both_formats_of_2020_are_read(exported: Callable[..., Artifact], tmp_path: Path) -> None:
    made = [exported(checkpoint_of_2020(tmp_path / f"zipped-{zipped}", zipped)) for zipped in (True, False)]
    assert made[0].model.read_bytes() == made[1].model.read_bytes()


def test_the_three_stages_on_a_checkpoint_of_2020(tmp_path: Path) -> None:
    checkpoint = checkpoint_of_2020(tmp_path / "checkpoint", zipped=False)
    artifacts, reports = tmp_path / "artifacts", tmp_path / "reports"
    for command in (
        ("export", "--output", artifacts),
        ("quantize", "--output", artifacts, "--corpus", CORPUS),
        ("eval", "--artifacts", artifacts, "--output", reports, "--corpus", CORPUS, "--tokens", 500, "--rounds", 1),
    ):
        result = stage(*command, "--model", checkpoint)
        assert result.status == 0, result.stderr
    report = json.loads((reports / "checkpoint/report.json").read_text(encoding="utf-8"))
    rows = {row["name"]: row for row in report["artifacts"]}
    assert list(rows) == ["fp32", "int8-dynamic", "int8-static", "int8-dynamic-ort", "torch-fp32", "torch-dynamic"]
    assert abs(rows["torch-fp32"]["delta_ln_ppl"]) < 1e-4


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 3 MB: room for the tiny fp32 artifact, and not for more than one other."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=3m", "none", folder], capture_output=True).returncode:
        pytest.skip("mounting a small file system takes root")
    yield folder
    subprocess.run(["umount", folder], check=True)


def test_quantize_on_a_full_disk(tiny_folder: Path, small_disk: Path, tmp_path: Path) -> None:
    assert stage("export", "--model", tiny_folder, "--output", tmp_path / "artifacts").status == 0
    shutil.copytree(tmp_path / "artifacts/tiny", small_disk / "tiny")
    (small_disk / "filler").write_bytes(bytes(3_000_000 - sum(f.stat().st_size for f in small_disk.rglob("*"))))
    line = assert_user_error(
        stage("quantize", "--model", tiny_folder, "--output", small_disk, "--recipes", "int8-dynamic"),
        "free some space",
    )
    assert "died" not in line
    assert not (small_disk / "tiny/int8-dynamic").exists() and not list(small_disk.rglob(".tmp-*"))
    open_artifact(small_disk / "tiny/fp32")
