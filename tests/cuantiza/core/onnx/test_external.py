"""ONNX files whose weights are in a second file: moved, cut short, outside their folder, spoilt."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, numpy_helper

from cuantiza.core.errors import UserError
from cuantiza.core.onnx import file as onnx_file
from cuantiza.core.store.artifact import Artifact
from cuantiza.quantize.stage import quantize


@pytest.fixture
def large(es_mini_fp32: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The embedded model, saved like a model that exceeds protobuf's limit."""
    monkeypatch.setattr(onnx_file, "INLINE_LIMIT_BYTES", 1_000_000)
    folder = tmp_path / "large"
    folder.mkdir()
    onnx_file.save(onnx_file.load(es_mini_fp32.model), folder)
    return folder / "model.onnx"


def test_external_data(large: Path, es_mini_fp32: Artifact) -> None:
    assert {file.name for file in large.parent.iterdir()} == {"model.onnx", "model.onnx.data"}
    assert large.stat().st_size < 1_000_000 < (large.parent / "model.onnx.data").stat().st_size
    ours, inline = onnx_file.load(large).graph.initializers, onnx_file.load(es_mini_fp32.model).graph.initializers
    assert ours.keys() == inline.keys()
    for name, value in inline.items():
        assert ours[name].const_value.tobytes() == value.const_value.tobytes()
    onnx.checker.check_model(str(large))


def test_external_data_moves_with_its_folder(large: Path, es_mini_fp32: Artifact, tmp_path: Path) -> None:
    """The moved model runs and gives bit-equal logits to the model with its weights inside."""
    from cuantiza.core.run.runtime import Runtime

    moved = large.parent.rename(tmp_path / "moved elsewhere") / "model.onnx"
    ids = np.arange(20)[None]
    np.testing.assert_array_equal(Runtime(moved).forward(ids), Runtime(es_mini_fp32.model).forward(ids))


def test_what_quantize_says_of_the_size_counts_it(
    exported: Callable[..., Artifact], folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(onnx_file, "INLINE_LIMIT_BYTES", 1_000)
    fp32 = exported(folder)
    assert (fp32.path / onnx_file.DATA).is_file()
    quantize(fp32, "fp16")  # in another process, which knows the limit of protobuf
    assert re.search(r"fp16: [\d.]+ MB, graph × fp32: 0\.5", capsys.readouterr().err)


def relocate(path: Path, change: Callable[[TensorProto], None]) -> None:
    """Edit the first external tensor of `path`."""
    proto = onnx.load(path, load_external_data=False)
    tensor = next(tensor for tensor in proto.graph.initializer if tensor.data_location == TensorProto.EXTERNAL)
    change(tensor)
    path.write_bytes(proto.SerializeToString())


def set_entry(tensor: TensorProto, key: str, value: str) -> None:
    for entry in tensor.external_data:
        if entry.key == key:
            entry.value = value


@pytest.mark.parametrize(
    "location",
    ["../secret.bin", "/etc/passwd", "below/../../secret.bin", "link.bin", "linked/secret.bin", "", ".", ".."],
)
def test_external_data_outside_the_folder(large: Path, tmp_path: Path, location: str) -> None:
    (tmp_path / "secret.bin").write_bytes(bytes(20_000_000))
    (large.parent / "link.bin").symlink_to(tmp_path / "secret.bin")
    (large.parent / "linked").symlink_to(tmp_path)
    relocate(large, lambda tensor: set_entry(tensor, "location", location))
    for read in (onnx_file.load, onnx_file.check):
        with pytest.raises(UserError, match=r"model\.onnx: the data of .* outside its folder; refused"):
            read(large)


def test_external_data_of_a_subgraph_outside_the_folder(tmp_path: Path) -> None:
    parsed = onnx.parser.parse_model("""
        <ir_version: 10, opset_import: ["" : 21]>
        g (float[N] x, bool c) => (float[N] y)
        {
            y = If (c) <
                then_branch = t () => (float[N] a) <float[1] k = {3.0}> { a = Mul (x, k) },
                else_branch = e () => (float[N] b) { b = Neg (x) }>
        }
    """)
    tensor = parsed.graph.node[0].attribute[0].g.initializer[0]
    tensor.CopyFrom(numpy_helper.from_array(np.float32([3]), "k"))
    onnx.external_data_helper.set_external_data(tensor, "../secret.bin", 0, 4)
    tensor.ClearField("raw_data")
    (tmp_path / "model").mkdir()
    (tmp_path / "secret.bin").write_bytes(bytes(4))
    (tmp_path / "model" / "model.onnx").write_bytes(parsed.SerializeToString())
    with pytest.raises(UserError, match="outside its folder"):
        onnx_file.load(tmp_path / "model" / "model.onnx")


@pytest.mark.parametrize("change", ["missing", "truncated", "folder", "renamed"])
def test_external_data_not_whole(large: Path, change: str) -> None:
    data = large.parent / "model.onnx.data"
    if change == "truncated":
        os.truncate(data, data.stat().st_size - 1)
    else:
        data.rename(data.with_name("otro.data"))
    if change == "folder":
        data.mkdir()
    for read in (onnx_file.load, onnx_file.check):
        with pytest.raises(UserError, match=r"model\.onnx\.data: the data of .* is missing or cut short"):
            read(large)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("offset", "999999999"),
        ("length", "999999999"),
        ("offset", "-4"),
        ("length", "-4"),
        ("length", "x"),
        ("offset", ""),
        ("length", "4"),
    ],
)
def test_external_data_entries_lie(large: Path, key: str, value: str) -> None:
    """A range outside of the file, or of a wrong size, is refused when loading and does not crash later."""
    relocate(large, lambda tensor: set_entry(tensor, key, value))
    with pytest.raises(UserError, match=str(large.parent)):
        onnx_file.load(large)


def test_external_data_without_a_length(tmp_path: Path) -> None:
    """The length is optional. Without it, the file must hold as many bytes as type and shape need."""
    tensor = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=[5], data_location=TensorProto.EXTERNAL)
    tensor.external_data.add(key="location", value="w.bin")
    parsed = onnx.parser.parse_model(
        '<ir_version: 10, opset_import: ["" : 21]> g (float[5] x) => (float[5] y) { y = Add (x, w) }'
    )
    parsed.graph.initializer.append(tensor)
    (tmp_path / "model.onnx").write_bytes(parsed.SerializeToString())
    (tmp_path / "w.bin").write_bytes(np.arange(5, dtype=np.float32).tobytes())
    assert onnx_file.load(tmp_path / "model.onnx").graph.initializers["w"].const_value.numpy().tolist() == [
        0,
        1,
        2,
        3,
        4,
    ]
    os.truncate(tmp_path / "w.bin", 19)
    with pytest.raises(UserError, match=r"w\.bin"):
        onnx_file.load(tmp_path / "model.onnx")


@pytest.mark.filterwarnings("ignore:Ignoring unknown external data key")
def test_spoilt_bytes_never_crash(large: Path) -> None:
    """Random damage to the graph gives either a model or one clear error."""
    rng, whole = np.random.default_rng(0), large.read_bytes()
    refused = 0
    for _ in range(150):
        spoilt = bytearray(whole)
        for place in rng.integers(0, len(whole), 3):
            spoilt[place] = rng.integers(256)
        large.write_bytes(spoilt)
        try:
            onnx_file.load(large)
        except UserError as error:
            refused += 1
            assert str(large.parent) in str(error)
    assert refused > 10
