"""An ONNX file's message without its weights: they stay in the file, and the message says where.

Protobuf's parser would hold the file and every weight of it in memory. Here the framing of the three enclosing
messages is walked by the protobuf encoding (protobuf.dev/programming-guides/encoding), and what is left is the library's.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from pathlib import Path

import onnx
from google.protobuf.message import DecodeError

# Field numbers of onnx.proto3.
MODEL_GRAPH, GRAPH_INITIALIZER, TENSOR_RAW_DATA = 7, 5, 9
_TENSOR_EXTERNAL_DATA = 13
_VARINT, _FIXED64, _DELIMITED, _FIXED32 = 0, 1, 2, 5
# Smaller ones are read: shapes and axes, which the library wants to look at.
_LEAST_BYTES = 4096

Span = tuple[int, int]


def read_without_weights(path: Path) -> onnx.ModelProto:
    """The message of `path`, its initializers' large raw data replaced by external data in `path` itself.

    Raises DecodeError where it is no protobuf message.
    """
    if path.is_symlink():  # what lies beside it is not beside the file
        return onnx.load(path, load_external_data=False)
    with path.open("rb") as file:
        if not path.stat().st_size:
            raise DecodeError("an empty file")
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            model = onnx.ModelProto()
            model.ParseFromString(
                b"".join(_rewritten(data, (0, len(data)), [MODEL_GRAPH, GRAPH_INITIALIZER], path.name))
            )
            return model


def _rewritten(data: mmap.mmap, span: Span, descend: list[int], file: str) -> Iterator[bytes]:
    """The message in `span`, down the fields `descend`: the last of these are tensors, which lose their raw data."""
    if not descend:
        yield from _without_raw_data(data, span, file)
        return
    for number, whole, content in _fields(data, span):
        if number == descend[0]:
            inner = b"".join(_rewritten(data, content, descend[1:], file))
            yield frame(number, len(inner)) + inner
        else:
            yield data[slice(*whole)]


def _without_raw_data(data: mmap.mmap, span: Span, file: str) -> Iterator[bytes]:
    fields = list(_fields(data, span))
    raw = [content for number, _, content in fields if number == TENSOR_RAW_DATA]
    outside = any(number == _TENSOR_EXTERNAL_DATA for number, _, _ in fields)
    if len(raw) != 1 or outside or raw[0][1] - raw[0][0] < _LEAST_BYTES:
        yield data[slice(*span)]
        return
    yield from (data[slice(*whole)] for number, whole, _ in fields if number != TENSOR_RAW_DATA)
    (start, end) = raw[0]
    place = onnx.TensorProto(data_location=onnx.TensorProto.EXTERNAL)
    for key, value in (("location", file), ("offset", start), ("length", end - start)):
        place.external_data.add(key=key, value=str(value))
    yield place.SerializeToString()


def _fields(data: mmap.mmap, span: Span) -> Iterator[tuple[int, Span, Span]]:
    """(number, where it is with its tag, where its content is) of every field of the message in `span`.

    The number is 0 of those that are not delimited by a length.
    """
    at, end = span
    while at < end:
        begin = at
        tag, at = _varint(data, at, end)
        kind = tag & 7
        if kind == _VARINT:
            start, (_, at) = at, _varint(data, at, end)
        elif kind == _DELIMITED:
            length, start = _varint(data, at, end)
            at = start + length
        elif kind in (_FIXED64, _FIXED32):
            start, at = at, at + (8 if kind == _FIXED64 else 4)
        else:
            raise DecodeError(f"wire type {kind}")
        if at > end:
            raise DecodeError("a field that is cut short")
        # Of no other kind is what is looked for here; what else goes by its number is for the library to judge.
        yield tag >> 3 if kind == _DELIMITED else 0, (begin, at), (start, at)


def _varint(data: mmap.mmap, at: int, end: int) -> tuple[int, int]:
    """(value, where it ends) of the varint at `at`."""
    value = shift = 0
    while at < end and shift < 70:
        byte = data[at]
        value |= (byte & 0x7F) << shift
        at, shift = at + 1, shift + 7
        if byte < 0x80:
            return value, at
    raise DecodeError("a number that is cut short")


def frame(field: int, length: int) -> bytes:
    """Tag of a length-delimited field, and the length as a varint."""
    out = bytearray([field << 3 | 2])
    while length > 0x7F:
        out.append(length & 0x7F | 0x80)
        length >>= 7
    out.append(length)
    return bytes(out)
