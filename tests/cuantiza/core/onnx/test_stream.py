"""A model read without its weights equals the library's message, except for where the weights are."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx.helper as helper
import pytest
from google.protobuf.message import DecodeError

from cuantiza.core.errors import UserError
from cuantiza.core.onnx import file as onnx_file
from cuantiza.core.onnx.stream import read_without_weights
from cuantiza.core.store.artifact import Artifact


def put_back(proto: onnx.ModelProto, path: Path) -> onnx.ModelProto:
    """`proto` with the data that it refers to in the file `path`."""
    data = path.read_bytes()
    for tensor in proto.graph.initializer:
        if tensor.external_data:
            place = {entry.key: entry.value for entry in tensor.external_data}
            assert place["location"] == path.name
            start = int(place["offset"])
            tensor.raw_data = data[start : start + int(place["length"])]
            tensor.ClearField("external_data")
            tensor.ClearField("data_location")
    return proto


def test_weights_stay_in_the_file(es_mini_fp32: Artifact) -> None:
    proto = read_without_weights(es_mini_fp32.model)
    assert proto.ByteSize() < 500_000 < es_mini_fp32.model.stat().st_size
    assert put_back(proto, es_mini_fp32.model) == onnx.load(es_mini_fp32.model)


def model(**initializers: onnx.TensorProto) -> onnx.ModelProto:
    x = [helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, ["N"]) for name in "xy"]
    graph = helper.make_graph([helper.make_node("Identity", "x", "y")], "g", x[:1], x[1:], [*initializers.values()])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)])


def test_data_of_every_kind(tmp_path: Path) -> None:
    array = np.random.default_rng(0).random(5000, np.float32)
    typed = helper.make_tensor("typed", onnx.TensorProto.FLOAT, [5000], array)  # float_data, not raw
    large, small = onnx.numpy_helper.from_array(array, "large"), onnx.numpy_helper.from_array(array[:3], "small")
    first, second = model(typed=typed, large=large), onnx.ModelProto()
    second.graph.initializer.append(small)
    second.graph.initializer.append(onnx.numpy_helper.from_array(array[::-1].copy(), "second"))
    path = tmp_path / "model.onnx"
    # protobuf merges messages that are written one after the other into one.
    path.write_bytes(first.SerializeToString() + second.SerializeToString())
    proto = read_without_weights(path)
    assert [bool(tensor.external_data) for tensor in proto.graph.initializer] == [False, True, False, True]
    assert put_back(proto, path) == onnx.load(path)
    loaded = onnx_file.load(path).graph.initializers
    assert np.array_equal(loaded["large"].const_value.numpy(), array)
    assert np.array_equal(loaded["second"].const_value.numpy(), array[::-1])


def test_a_link_is_read_where_it_leads(tmp_path: Path) -> None:
    """The model may be a link, as in the hub's cache; its weights are read from the file that the link points to."""
    array = np.arange(5000, dtype=np.float32)
    (tmp_path / "blobs").mkdir()
    onnx.save(model(w=onnx.numpy_helper.from_array(array, "w")), tmp_path / "blobs/abc")
    (tmp_path / "model.onnx").symlink_to("blobs/abc")
    loaded = onnx_file.load(tmp_path / "model.onnx")
    assert np.array_equal(loaded.graph.initializers["w"].const_value.numpy(), array)


def test_a_message_that_is_cut_short_is_refused(tmp_path: Path) -> None:
    whole = model(w=onnx.numpy_helper.from_array(np.zeros(5000, np.float32), "w")).SerializeToString()
    path = tmp_path / "model.onnx"
    for length in (0, 1, 7, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(DecodeError):
            read_without_weights(path)
        with pytest.raises(UserError, match=r"model\.onnx"):
            onnx_file.load(path)


def test_a_file_may_be_saved_over_itself(tmp_path: Path) -> None:
    array = np.random.default_rng(1).random((700, 700), np.float32)
    onnx.save(model(w=onnx.numpy_helper.from_array(array, "w")), tmp_path / "model.onnx")
    for _ in range(2):
        onnx_file.save(onnx_file.load(tmp_path / "model.onnx"), tmp_path)
    assert np.array_equal(onnx_file.load(tmp_path / "model.onnx").graph.initializers["w"].const_value.numpy(), array)
    assert [path.name for path in tmp_path.iterdir()] == ["model.onnx"]
