"""Our writer of ONNX files agrees with the library's, and files with false contents are refused."""

from __future__ import annotations

from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper

from cuantiza.core.errors import UserError
from cuantiza.core.onnx import file as onnx_file
from cuantiza.core.store.artifact import Artifact


def weights_of(proto: onnx.ModelProto) -> dict[str, tuple[int, list[int], bytes]]:
    """{name: (type, dims, raw bytes)} of all weights. Asserts that no name is repeated."""
    found = {}
    for tensor in proto.graph.initializer:
        assert tensor.name not in found
        array = ir.from_proto(tensor)
        found[tensor.name] = (tensor.data_type, list(tensor.dims), array.tobytes())
    return found


def assert_same_model(ours: Path, theirs: Path) -> None:
    """Assert that both files parse to the same message.

    The order and encoding of initializers may differ, and their types may be stated twice.
    """
    first, second = onnx.load(ours), onnx.load(theirs)
    weights = weights_of(first)
    assert weights == weights_of(second)
    for proto in (first, second):
        proto.graph.ClearField("initializer")
        told = [value for value in proto.graph.value_info if value.name not in weights]
        proto.graph.ClearField("value_info")
        proto.graph.value_info.extend(told)
    assert first == second


def save_both(model: ir.Model, tmp_path: Path) -> Path:
    """Save the model with our writer and the library's, compare the files, and return ours."""
    for name in ("ours", "theirs"):
        (tmp_path / name).mkdir(exist_ok=True)
    onnx_file.save(model, tmp_path / "ours")
    ir.save(ir.external_data.load_to_model(model), tmp_path / "theirs" / "model.onnx")
    assert [file.name for file in (tmp_path / "ours").iterdir()] == ["model.onnx"]
    assert_same_model(tmp_path / "ours" / "model.onnx", tmp_path / "theirs" / "model.onnx")
    return tmp_path / "ours" / "model.onnx"


def model_with(tensors: dict[str, ir.TensorProtocol]) -> ir.Model:
    """A model that returns x, with the given initializers."""
    x = ir.Value(name="x", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape(["N", 3]))
    node = ir.node("Identity", [x], name="same")
    node.outputs[0].name, node.outputs[0].type, node.outputs[0].shape = (
        "y",
        ir.TensorType(ir.DataType.FLOAT),
        ir.Shape(["N", 3]),
    )
    values = [
        ir.Value(name=name, const_value=tensor, type=ir.TensorType(tensor.dtype), shape=tensor.shape)
        for name, tensor in tensors.items()
    ]
    return ir.Model(
        ir.Graph(
            [x], node.outputs, nodes=[node], initializers=values, opset_imports={"": 21}, name="g", doc_string="dúo"
        ),
        ir_version=10,
        producer_name="prueba",
        metadata_props={"clave": "válor"},
    )


# Writing


def test_embedded_model(es_mini_fp32: Artifact, tmp_path: Path) -> None:
    path = save_both(onnx_file.load(es_mini_fp32.model), tmp_path)
    assert path.read_bytes() == es_mini_fp32.model.read_bytes()


DTYPES = [
    np.float32,
    np.float64,
    np.float16,
    ml_dtypes.bfloat16,
    np.int8,
    np.uint8,
    np.int16,
    np.uint16,
    np.int32,
    np.uint32,
    np.int64,
    np.uint64,
    np.bool_,
    ml_dtypes.int4,
    ml_dtypes.uint4,
    ml_dtypes.float8_e4m3fn,
    ml_dtypes.float8_e5m2,
]


def test_every_type(tmp_path: Path) -> None:
    """4-bit types are tested with an odd number of elements, because two share a byte."""
    values = np.arange(15) % 7
    tensors = {
        f"{np.dtype(dtype).name}.{shape}": ir.tensor(
            values.astype(dtype).reshape(shape), name=f"{np.dtype(dtype).name}.{shape}"
        )
        for dtype in DTYPES
        for shape in ((15,), (3, 5))
    }
    path = save_both(model_with(tensors), tmp_path)
    onnx.checker.check_model(str(path))
    for tensor in onnx.load(path).graph.initializer:
        wanted = values.astype(bool) if tensor.data_type == TensorProto.BOOL else values
        np.testing.assert_array_equal(numpy_helper.to_array(tensor).ravel().astype(np.int64), wanted)


def test_shapes(tmp_path: Path) -> None:
    """Scalars, empty tensors, and sizes on both sides of the point where the encoded length takes one more byte."""
    sizes = [0, 1, 31, 32, 33, 4095, 4096, 4097, 2**19 - 1, 2**19, 2**19 + 1]
    tensors = {f"w{size}": ir.tensor(np.arange(size, dtype=np.float32), name=f"w{size}") for size in sizes}
    bytes_near = [*range(100, 140), *range(16_330, 16_390)]
    tensors |= {f"b{size}": ir.tensor(np.full(size, size % 251, np.uint8), name=f"b{size}") for size in bytes_near}
    tensors["scalar"] = ir.tensor(np.float32(2.5), name="scalar")
    tensors["empty"] = ir.tensor(np.zeros((3, 0, 2), np.int64), name="empty")
    tensors["nombre/ñ.«x»" * 40] = ir.tensor(np.ones((1, 1, 1), np.float16), name="nombre/ñ.«x»" * 40)
    path = save_both(model_with(tensors), tmp_path)
    onnx.checker.check_model(str(path), full_check=True)


def test_no_weights(tmp_path: Path) -> None:
    save_both(model_with({}), tmp_path)


@pytest.mark.parametrize("kind", ["lazy", "strided", "typed-fields", "external"])
def test_kinds_of_tensors(tmp_path: Path, kind: str) -> None:
    """The bytes written are the array's, row-major and little-endian, for every class of tensor in the library."""
    array = np.arange(12, dtype=np.float32).reshape(3, 4)
    if kind == "lazy":
        tensor = ir.LazyTensor(lambda: ir.tensor(array), ir.DataType.FLOAT, ir.Shape((3, 4)), name="w")
    elif kind == "strided":
        array = np.arange(24, dtype=np.float32).reshape(4, 6)[:, ::2].T
        tensor = ir.Tensor(array, name="w")
    elif kind == "typed-fields":
        tensor = ir.from_proto(helper.make_tensor("w", TensorProto.FLOAT, (3, 4), array.ravel()))
    else:
        (tmp_path / "w.bin").write_bytes(b"head" + array.tobytes() + b"tail")
        tensor = ir.ExternalTensor(
            "w.bin", 4, array.nbytes, ir.DataType.FLOAT, shape=ir.Shape((3, 4)), name="w", base_dir=tmp_path
        )
    model = model_with({"w": tensor})
    if kind == "external":  # the library's own writer would keep it external
        onnx_file.save(model, tmp_path)
        path = tmp_path / "model.onnx"
    else:
        path = save_both(model, tmp_path)
    (weight,) = onnx.load(path, load_external_data=False).graph.initializer
    assert (weight.name, list(weight.dims), weight.data_location) == ("w", list(array.shape), TensorProto.DEFAULT)
    np.testing.assert_array_equal(numpy_helper.to_array(weight), array)


def test_saving_changes_nothing(es_mini_fp32: Artifact, tmp_path: Path) -> None:
    """Saving does not change the model in memory, and saving again gives the same file."""
    model = onnx_file.load(es_mini_fp32.model)
    names, nodes = list(model.graph.initializers), len(model.graph)
    first = save_both(model, tmp_path).read_bytes()
    assert (list(model.graph.initializers), len(model.graph)) == (names, nodes)
    assert save_both(model, tmp_path).read_bytes() == first


def test_weights_of_subgraphs_and_functions(tmp_path: Path) -> None:
    """Only the main graph's weights are written separately; those in an If's branches stay where they are."""
    parsed = onnx.parser.parse_model("""
        <ir_version: 10, opset_import: ["" : 21, "local" : 1], producer_name: "prueba">
        g (float[N] x, bool c) => (float[N] y) <float[1] w = {2.0}>
        {
            s = If (c) <
                then_branch = t () => (float[N] a) <float[1] k = {3.0}> { a = Mul (x, k) },
                else_branch = e () => (float[N] b) { b = local.twice (x) } >
            y = Mul (s, w)
        }
        <domain: "local", opset_import: ["" : 21]>
        twice (v) => (r) { r = Add (v, v) }
    """)
    onnx.save(parsed, tmp_path / "source.onnx")
    path = save_both(onnx_file.load(tmp_path / "source.onnx"), tmp_path)
    session = ort.InferenceSession(path, providers=["CPUExecutionProvider"])
    for condition, wanted in ((True, 6.0), (False, 4.0)):
        assert session.run(None, {"x": np.ones(2, np.float32), "c": np.asarray(condition)})[0].tolist() == [wanted] * 2


def test_weight_that_is_an_input(tmp_path: Path) -> None:
    """The weight is the default value of an input. Old exporters wrote every weight like this."""
    parsed = onnx.parser.parse_model("""
        <ir_version: 10, opset_import: ["" : 21]>
        g (float[2] x, float[2] w = {1.0, 2.0}) => (float[2] y) { y = Add (x, w) }
    """)
    assert {value.name for value in parsed.graph.input} == {"x", "w"} and len(parsed.graph.initializer) == 1
    onnx.save(parsed, tmp_path / "source.onnx")
    path = save_both(onnx_file.load(tmp_path / "source.onnx"), tmp_path)
    session = ort.InferenceSession(path, providers=["CPUExecutionProvider"])
    assert session.run(None, {"x": np.zeros(2, np.float32)})[0].tolist() == [1.0, 2.0]


def test_mislabelled_tensor_is_not_written(tmp_path: Path) -> None:
    lazy = ir.LazyTensor(lambda: ir.tensor(np.zeros(3, np.float32)), ir.DataType.FLOAT, ir.Shape((4,)), name="w")
    with pytest.raises(ValueError, match="w: 12 bytes where its type and shape say 16"):
        onnx_file.save(model_with({"w": lazy}), tmp_path)


def test_limit_is_exact(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_with({"w": ir.tensor(np.zeros(1000, np.float32), name="w")})
    for limit, files in ((4000, {"model.onnx"}), (3999, {"model.onnx", "model.onnx.data"})):
        monkeypatch.setattr(onnx_file, "INLINE_LIMIT_BYTES", limit)
        folder = tmp_path / str(limit)
        folder.mkdir()
        onnx_file.save(model, folder)
        assert {file.name for file in folder.iterdir()} == files
    monkeypatch.undo()
    assert onnx_file.INLINE_LIMIT_BYTES < 2**31 - 1_000_000


# Corrupt files


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"none\.onnx: does not exist"):
        onnx_file.load(tmp_path / "none.onnx")


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\0" * 1000,
        b"not a model",
        b"\xff" * 64,
        b"PK\x03\x04",
        "año\n".encode("utf-16"),
        b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n",
    ],
)
def test_no_model(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "model.onnx").write_bytes(content)
    for read in (onnx_file.load, onnx_file.check):
        with pytest.raises(UserError, match=r"model\.onnx: is not a (readable|valid) ONNX"):
            read(tmp_path / "model.onnx")


def test_truncated_model(es_mini_fp32: Artifact, tmp_path: Path) -> None:
    """The file is cut in the header, in the graph, in the weights, or before the last byte."""
    whole = es_mini_fp32.model.read_bytes()
    for kept in (1, 7, 20, 1000, 20_000, len(whole) // 2, len(whole) - 1):
        (tmp_path / "model.onnx").write_bytes(whole[:kept])
        with pytest.raises(UserError, match=r"model\.onnx: is not a (readable|valid) ONNX"):
            onnx_file.load(tmp_path / "model.onnx")


def test_outputs_without_a_shape(tmp_path: Path) -> None:
    """ONNX Runtime runs such a file, though the specification wants at least the rank."""
    path = tmp_path / "model.onnx"
    onnx_file.save(model_with({}), tmp_path)
    proto = onnx.load(path)
    for value in proto.graph.output:
        value.type.tensor_type.ClearField("shape")
    path.write_bytes(proto.SerializeToString())
    onnx_file.check(path)
    assert ort.InferenceSession(path).run(None, {"x": np.ones((2, 3), np.float32)})[0].shape == (2, 3)
