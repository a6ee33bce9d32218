"""Bad checkpoints: one clear line that names the file, and nothing published."""

from __future__ import annotations

import errno
import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from helpers import Result, assert_nothing_published, assert_user_error, copy_tokenizer, edit_config, edit_weights


def test_no_config(folder: Path, refused: Callable[..., str]) -> None:
    (folder / "config.json").unlink()
    refused(str(folder), "config.json")


def test_empty_folder(folder: Path, refused: Callable[..., str]) -> None:
    for file in folder.iterdir():
        file.unlink()
    refused(str(folder), "config.json")


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[]", b"null", b"\xff\xfe{}", b"[" * 100_000, b'{"n_embd": 1e999999999999}{'],
    ids=["empty", "cut", "list", "null", "utf16", "deep", "two"],
)
def test_broken_config(folder: Path, refused: Callable[..., str], content: bytes) -> None:
    (folder / "config.json").write_bytes(content)
    refused(str(folder / "config.json"), "JSON")


def test_a_gpt2_that_says_it_is_a_llama(folder: Path, refused: Callable[..., str]) -> None:
    edit_config(folder, model_type="llama")
    refused(str(folder), "embed_tokens.weight", "transformer.")


@pytest.mark.parametrize("model_type", ["bloom", "mpt", "bert", 7])
def test_not_exported(folder: Path, refused: Callable[..., str], model_type: object) -> None:
    edit_config(folder, model_type=model_type)
    refused(str(folder / "config.json"), f"{model_type!r}")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("n_embd", "32"),
        ("n_embd", 32.5),
        ("n_embd", -32),
        ("n_embd", 33),
        ("n_layer", 0),
        ("n_layer", True),
        ("n_head", [2]),
        ("n_head", 3),
        ("n_inner", "128"),
        ("n_inner", 0),
        ("vocab_size", None),
        ("vocab_size", 2**40),
        ("n_positions", {}),
        ("layer_norm_epsilon", "1e-5"),
        ("layer_norm_epsilon", 0),
        ("layer_norm_epsilon", float("nan")),
        ("activation_function", "mish"),
        ("activation_function", ["relu"]),
        ("activation_function", None),
        ("scale_attn_weights", "true"),
        ("scale_attn_by_inverse_layer_idx", 1),
        ("tie_word_embeddings", "no"),
        ("add_cross_attention", True),
    ],
)
def test_config_field(folder: Path, refused: Callable[..., str], key: str, value: object) -> None:
    edit_config(folder, **{key: value})
    named = (
        "wte.weight" if (key, value) == ("vocab_size", None) else key
    )  # null is the default, 50257, which the weights contradict
    refused(named)


@pytest.mark.parametrize(
    ("key", "value", "weight"),
    [
        ("n_embd", 64, "wte.weight"),
        ("n_layer", 3, "h.2."),
        ("n_positions", 64, "wpe.weight"),
        ("vocab_size", 9000, "wte.weight"),
        ("n_inner", 100, "mlp.c_fc.weight"),
        ("tie_word_embeddings", False, "lm_head.weight"),
    ],
)
def test_config_and_weights_disagree(
    folder: Path, refused: Callable[..., str], key: str, value: object, weight: str
) -> None:
    edit_config(folder, **{key: value})
    refused(str(folder), weight)


def test_all_bad_fields_are_told_at_once(folder: Path, refused: Callable[..., str]) -> None:
    edit_config(folder, n_layer="2", n_embd=-32, activation_function="mish", tie_word_embeddings="no")
    refused(str(folder / "config.json"), "n_layer is '2'", "n_embd is -32", "'mish'", "tie_word_embeddings is 'no'")


def test_fewer_layers_than_weights(folder: Path, refused: Callable[..., str]) -> None:
    """Weights that the graph would leave out are refused, because the graph would be only a part of the model."""
    edit_config(folder, n_layer=1)
    refused(str(folder), "h.1.")


@pytest.mark.parametrize("tied", [True, None], ids=["tied", "unsaid"])
def test_head_of_its_own_in_a_tied_model(
    make_gpt2: Callable[..., Path], export_here: Callable[..., Result], tmp_path: Path, tied: bool | None
) -> None:
    """transformers 4 ties such a head to the embedding, transformers 5 does not: either choice or a clear refusal."""
    folder = make_gpt2("head", tie_word_embeddings=False)
    edit_config(folder, tie_word_embeddings=tied)
    if tied is None:
        fields = json.loads((folder / "config.json").read_text())
        del fields["tie_word_embeddings"]
        (folder / "config.json").write_text(json.dumps(fields))
    result = export_here("--model", folder, "--output", tmp_path / "artifacts")
    if result.status:
        assert_user_error(result, "lm_head.weight", "tie_word_embeddings")


# Tokenizer


def test_no_tokenizer(folder: Path, refused: Callable[..., str]) -> None:
    for name in ("tokenizer.json", "vocab.json", "merges.txt"):
        (folder / name).unlink()
    refused(str(folder), "tokenizer")


def test_no_merges(folder: Path, refused: Callable[..., str]) -> None:
    for name in ("tokenizer.json", "merges.txt"):
        (folder / name).unlink()
    refused(str(folder), "merges.txt")


@pytest.mark.parametrize("name", ["tokenizer.json", "vocab.json", "merges.txt", "tokenizer_config.json"])
@pytest.mark.parametrize(
    "content", [b"", b"{", b"\xff\xfe", b"[]", b"3 4 5\n6 7 8\n"], ids=["empty", "cut", "bytes", "list", "other"]
)
def test_broken_tokenizer(folder: Path, refused: Callable[..., str], name: str, content: bytes) -> None:
    if name in ("vocab.json", "merges.txt"):
        (folder / "tokenizer.json").unlink()
    (folder / name).write_bytes(content)
    refused(str(folder))


@pytest.mark.parametrize("layout", ["tokenizer.json", "vocab.json"])
def test_tokenizer_larger_than_the_vocabulary(
    export_here: Callable[..., Result], make_gpt2: Callable[..., Path], tmp_path: Path, layout: str
) -> None:
    folder = make_gpt2("small", vocab_size=8191)
    if layout == "vocab.json":
        (folder / "tokenizer.json").unlink()
    result = export_here("--model", folder, "--output", tmp_path / "artifacts")
    assert_user_error(result, str(folder), "8191", "8190")
    assert_nothing_published(tmp_path / "artifacts")


def test_merges_cut_short(folder: Path, refused: Callable[..., str]) -> None:
    (folder / "tokenizer.json").unlink()
    merges = (folder / "merges.txt").read_text(encoding="utf-8").splitlines(keepends=True)
    (folder / "merges.txt").write_text("".join(merges[:7000]), encoding="utf-8")
    refused(str(folder / "merges.txt"), "cut short")


def test_broken_generation_config(folder: Path, refused: Callable[..., str]) -> None:
    (folder / "generation_config.json").write_text("{")
    refused(str(folder / "generation_config.json"))


# Options and output


def test_model_is_a_file(export_here: Callable[..., Result], folder: Path, tmp_path: Path) -> None:
    result = export_here("--model", folder / "config.json", "--output", tmp_path / "artifacts")
    assert_user_error(result, "config.json", "neither a folder nor a hub id")


@pytest.mark.parametrize(
    "spec", ["./missing", "../missing", "a/b/c", "", "owner/na me", "owner/name@", "owner/..", "..@main", "a" * 300]
)
def test_no_such_model(export_here: Callable[..., Result], tmp_path: Path, spec: str) -> None:
    assert_user_error(export_here("--model", spec, "--output", tmp_path / "artifacts"), spec)
    assert_nothing_published(tmp_path / "artifacts")


@pytest.mark.parametrize("opset", ["17", "25", "-1"])
def test_opset_out_of_range(refused: Callable[..., str], opset: str) -> None:
    refused("opset", opset, "18", options=("--opset", opset))


def test_output_folder_of_others(export_here: Callable[..., Result], folder: Path, tmp_path: Path) -> None:
    other = tmp_path / "artifacts" / folder.name
    other.mkdir(parents=True)
    (other / "thesis.tex").write_text("years of work")
    assert_user_error(export_here("--model", folder, "--output", tmp_path / "artifacts"), str(other), "OUT=")
    assert [file.name for file in other.iterdir()] == ["thesis.tex"]


@pytest.mark.parametrize("place", ["artifacts", "artifacts/spoilt"])
def test_output_is_a_file(export_here: Callable[..., Result], folder: Path, tmp_path: Path, place: str) -> None:
    path = tmp_path / place
    path.parent.mkdir(exist_ok=True)
    path.write_text("a file")
    assert_user_error(export_here("--model", folder, "--output", tmp_path / "artifacts"), str(path))
    assert path.read_text() == "a file"


def test_target_is_a_file(export_here: Callable[..., Result], folder: Path, tmp_path: Path) -> None:
    """A stray file called fp32 in one of our folders is replaced or refused, without a traceback."""
    output = tmp_path / "artifacts"
    (output / folder.name).mkdir(parents=True)
    (output / folder.name / ".cuantiza.lock").touch()
    (output / folder.name / "fp32").write_text("a file")
    result = export_here("--model", folder, "--output", output)
    assert result.status in (0, 2) and "Traceback" not in result.stderr
    assert not list(output.rglob(".tmp-*"))


@pytest.fixture
def small_disk(tmp_path: Path):
    """A real file system of 1 MB, which is less than the model needs."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = shutil.which("mount") and subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", disk], capture_output=True
    )
    if not mounted or mounted.returncode:
        pytest.skip("mounting a tmpfs takes root")
    yield disk
    subprocess.run(["umount", disk], check=True)


def test_full_disk(export_here: Callable[..., Result], folder: Path, small_disk: Path) -> None:
    result = export_here("--model", folder, "--output", small_disk)
    assert_user_error(result, "no space left", "free some space")
    assert_nothing_published(small_disk)


def test_full_disk_without_root(
    export_here: Callable[..., Result], folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same test where no disk can be mounted: writing the weights fails."""
    from cuantiza.core.onnx import file as onnx_file

    def fail(file, tensor) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", file.name)

    monkeypatch.setattr(onnx_file, "_write_raw", fail)
    assert_user_error(
        export_here("--model", folder, "--output", tmp_path / "artifacts"),
        "no space left",
        "model.onnx",
        "free some space",
    )
    assert_nothing_published(tmp_path / "artifacts")


def test_read_only_output(export_here: Callable[..., Result], folder: Path, small_disk: Path) -> None:
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    assert_user_error(export_here("--model", folder, "--output", small_disk), str(small_disk), "read-only")


def test_failure_keeps_the_published_one(export_here: Callable[..., Result], folder: Path, tmp_path: Path) -> None:
    """A checkpoint that breaks later does not take the good artifact with it."""
    output = tmp_path / "artifacts"
    assert export_here("--model", folder, "--output", output).status == 0
    before = {file.name: file.read_bytes() for file in (output / folder.name / "fp32").iterdir()}
    edit_weights(folder, lambda weights: weights.pop("transformer.ln_f.bias"))
    assert_user_error(export_here("--model", folder, "--output", output), "ln_f.bias")
    assert {file.name: file.read_bytes() for file in (output / folder.name / "fp32").iterdir()} == before
    assert not list(output.rglob(".tmp-*"))


def test_parity_refuses_another_graph(
    export_here: Callable[..., Result], folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A graph in which one weight is wrong by one per cent is not published."""
    import cuantiza.export.graphs.parts

    real = cuantiza.export.graphs.parts.check_finite
    monkeypatch.setattr(
        cuantiza.export.graphs.parts,
        "check_finite",
        lambda name, array, where: real(name, array, where) * (1.01 if name == "h.0.ln_1.bias" else 1),
    )
    assert_user_error(export_here("--model", folder, "--output", tmp_path / "artifacts"), "differs from PyTorch")
    assert_nothing_published(tmp_path / "artifacts")


def test_tokenizer_files_are_enough(export_here: Callable[..., Result], tmp_path: Path) -> None:
    """A folder that holds only a tokenizer is not a model."""
    copy_tokenizer(tmp_path / "tokenizer")
    assert_user_error(export_here("--model", tmp_path / "tokenizer", "--output", tmp_path / "artifacts"), "config.json")
    assert_nothing_published(tmp_path / "artifacts")
