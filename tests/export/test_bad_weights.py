"""Bad weight files: one clear line that names the file, nothing published, and no code run."""

from __future__ import annotations

import json
import pickle
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from helpers import Result, assert_nothing_published, assert_user_error, edit_config, edit_weights, stage, tiny_gpt2


def as_bin(folder: Path, state: object) -> Path:
    (folder / "model.safetensors").unlink()
    torch.save(state, folder / "pytorch_model.bin")
    return folder / "pytorch_model.bin"


def test_no_weights(folder: Path, refused: Callable[..., str]) -> None:
    (folder / "model.safetensors").unlink()
    refused(str(folder), "model.safetensors", "pytorch_model.bin")


@pytest.mark.parametrize("name", ["tf_model.h5", "flax_model.msgpack", "rust_model.ot"])
def test_other_frameworks_alone(folder: Path, refused: Callable[..., str], name: str) -> None:
    (folder / "model.safetensors").rename(folder / name)
    refused(name, "save_pretrained")


@pytest.mark.parametrize("kept", [0, 4, 8, 100, 5_000, -1])
def test_truncated_safetensors(folder: Path, refused: Callable[..., str], kept: int) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:kept])
    refused(str(path), "cut short")


def spoil_header(folder: Path, change: Callable[[dict], None]) -> None:
    path = folder / "model.safetensors"
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json"])
def test_clone_without_git_lfs(folder: Path, refused: Callable[..., str], name: str) -> None:
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 497774208\n"
    (folder / "tf_model.h5").write_text(pointer)  # is not read, so it may stay away
    (folder / name).write_text(pointer)
    assert "tf_model.h5" not in refused(str(folder), name, "git lfs pull")


def test_mislabelled_safetensors(folder: Path, refused: Callable[..., str]) -> None:
    """The weight of a linear layer is transposed."""
    edit_weights(folder, lambda weights: weights.update({"transformer.h.0.mlp.c_fc.weight": torch.ones(128, 32)}))
    refused(str(folder), "h.0.mlp.c_fc.weight", "[128, 32]", "[32, 128]")


def test_safetensors_header_lies(folder: Path, refused: Callable[..., str]) -> None:
    spoil_header(folder, lambda header: header["transformer.wpe.weight"].update(dtype="F16"))
    refused(str(folder / "model.safetensors"))


def test_integer_weight(folder: Path, refused: Callable[..., str]) -> None:
    """A weight of an already quantized checkpoint has the right name and shape, but its numbers mean something else."""
    edit_weights(
        folder,
        lambda weights: weights.update({"transformer.h.1.attn.c_attn.weight": torch.ones(32, 96, dtype=torch.int8)}),
    )
    refused("h.1.attn.c_attn.weight")


def test_garbage_under_the_right_name(folder: Path, refused: Callable[..., str]) -> None:
    (folder / "model.safetensors").write_bytes(
        b"version https://git-lfs.github.com/spec/v1\noid sha256:0000\nsize 1234567\n"
    )
    refused(str(folder / "model.safetensors"))


def test_weights_are_a_folder(folder: Path, refused: Callable[..., str]) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").mkdir()
    refused(str(folder))


def test_missing_weight(folder: Path, refused: Callable[..., str]) -> None:
    edit_weights(folder, lambda weights: weights.pop("transformer.h.1.ln_2.bias"))
    refused(str(folder), "h.1.ln_2.bias")


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_not_finite(folder: Path, refused: Callable[..., str], value: float, kind: str) -> None:
    weights = load_file(folder / "model.safetensors")
    weights["transformer.h.1.mlp.c_proj.weight"][5, 7] = value
    if kind == "bin":
        as_bin(folder, weights)
    else:
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    refused(str(folder), "h.1.mlp.c_proj.weight", "NaN or infinities")


def test_opposite_infinities(folder: Path, refused: Callable[..., str]) -> None:
    """A careless sum could hide two infinities of opposite sign."""

    def change(weights: dict[str, torch.Tensor]) -> None:
        weights["transformer.wte.weight"][8191, 0], weights["transformer.wte.weight"][0, 0] = (
            float("inf"),
            float("-inf"),
        )

    edit_weights(folder, change)
    refused("wte.weight", "NaN or infinities")


def test_large_finite_weights(folder: Path, export_here: Callable[..., Result], tmp_path: Path) -> None:
    """Weights of 3e38 are finite: a large embedding of an unused token does not make a checkpoint damaged."""
    edit_config(folder, tie_word_embeddings=False)

    def change(weights: dict[str, torch.Tensor]) -> None:
        weights["lm_head.weight"] = weights["transformer.wte.weight"].clone()
        weights["transformer.wte.weight"][8000] = 3e38

    edit_weights(folder, change)
    result = export_here("--model", folder, "--output", tmp_path / "artifacts")
    assert result.status == 0, result.stderr


@pytest.mark.parametrize("kind", ["bin", "safetensors"])
def test_missing_shard(folder: Path, refused: Callable[..., str], kind: str) -> None:
    if kind == "safetensors":
        (folder / "model.safetensors").unlink()
        tiny_gpt2().save_pretrained(folder, max_shard_size="400KB")
    else:
        weights = list(load_file(folder / "model.safetensors").items())
        (folder / "model.safetensors").unlink()
        parts = [dict(weights[:9]), dict(weights[9:])]
        names = [f"pytorch_model-0000{number}-of-00002.bin" for number in (1, 2)]
        for name, part in zip(names, parts, strict=True):
            torch.save(part, folder / name)
        index = {key: name for name, part in zip(names, parts, strict=True) for key in part}
        (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": index}))
    shard = sorted(folder.glob("*-00002-of-*"))[0]
    shard.unlink()
    refused(str(folder), shard.name)


@pytest.mark.parametrize(
    "content",
    [
        "{",
        "{}",
        '{"weight_map": []}',
        '{"weight_map": {"wte.weight": "../model.safetensors"}}',
        '{"weight_map": {"wte.weight": 3}}',
        '{"weight_map": {"wte.weight": {}}}',
    ],
)
def test_broken_index(folder: Path, refused: Callable[..., str], content: str) -> None:
    (folder / "model.safetensors").rename(folder / "model-00001-of-00001.safetensors")
    (folder / "model.safetensors.index.json").write_text(content)
    refused(str(folder / "model.safetensors.index.json"))


class Bomb:
    """An object whose unpickling runs code."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple:
        return (open, (str(self.marker), "w"))


@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize("zipped", [True, False, None], ids=["zip", "legacy", "bare pickle"])
def test_pickle_that_runs_code(
    folder: Path, refused: Callable[..., str], tmp_path: Path, zipped: bool | None, protocol: int
) -> None:
    marker = tmp_path / "executed"
    state = {"transformer.wte.weight": torch.ones(8192, 32), "bomb": Bomb(marker)}
    if zipped is None:
        (folder / "model.safetensors").unlink()
        (folder / "pytorch_model.bin").write_bytes(pickle.dumps({"bomb": Bomb(marker)}, protocol))
    else:
        (folder / "model.safetensors").unlink()
        torch.save(state, folder / "pytorch_model.bin", _use_new_zipfile_serialization=zipped, pickle_protocol=protocol)
    fragments = ["pytorch_model.bin"] if zipped is None else ["pytorch_model.bin", "unexecuted", "model.safetensors"]
    refused(*fragments)
    assert not marker.exists()
    assert b"executed" in (folder / "pytorch_model.bin").read_bytes()


def test_pickle_that_runs_code_as_a_user_meets_it(folder: Path, tmp_path: Path) -> None:
    marker = tmp_path / "executed"
    as_bin(folder, {"bomb": Bomb(marker)})
    result = stage("export", "--model", folder, "--output", tmp_path / "artifacts")
    assert_user_error(result, "pytorch_model.bin", "unexecuted", "model.safetensors")
    assert not marker.exists()
    assert_nothing_published(tmp_path / "artifacts")


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize("share", [0, 0.001, 0.3, 0.999])
def test_truncated_bin(folder: Path, refused: Callable[..., str], zipped: bool, share: float) -> None:
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    path = folder / "pytorch_model.bin"
    torch.save(weights, path, _use_new_zipfile_serialization=zipped)
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * share)])
    refused(str(path))


@pytest.mark.parametrize(
    "state",
    [[1, 2], torch.ones(3), {"model": {"wte.weight": torch.ones(2, 2)}}, {}, {3: torch.ones(2)}],
    ids=["list", "tensor", "nested", "empty", "numbered"],
)
def test_bin_without_named_tensors(folder: Path, refused: Callable[..., str], state: object) -> None:
    as_bin(folder, state)
    refused(str(folder))
