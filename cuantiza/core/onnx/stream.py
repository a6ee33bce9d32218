"""Read an ONNX file's protobuf message without its weights: they stay in the file, and the message says where.

Protobuf's own parser would hold the whole file and every weight in memory. Here the framing of the three enclosing
messages (model, graph, tensor) is read by the rules of the encoding (protobuf.dev/programming-guides/encoding). The
shortened message is then parsed by the library.
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
# Smaller tensors are read: shapes and axes, whose values the library needs.
_LEAST_BYTES = 4096

Span = tuple[int, int]


def read_without_weights(path: Path) -> onnx.ModelProto:
    """The message in `path`, in which large raw data of initializers is replaced by external data in `path` itself.

    Raises DecodeError if the file is not a protobuf message.
    """
    if path.is_symlink():  # external data is beside the file that the link points to
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
    """The message in `span`, rewritten along the fields `descend`; the last ones are tensors, which lose their data."""
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
    """Every field of the message in `span`: (number, its span with the tag, the span of its content).

    Fields that are not delimited by a length have the number 0 here.
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
        # Only length-delimited fields are looked for; fields of other kinds are left to the library.
        yield tag >> 3 if kind == _DELIMITED else 0, (begin, at), (start, at)


def _varint(data: mmap.mmap, at: int, end: int) -> tuple[int, int]:
    """The varint at `at`: (value, the position after it)."""
    value = shift = 0
    while at < end and shift < 70:
        byte = data[at]
        value |= (byte & 0x7F) << shift
        at, shift = at + 1, shift + 7
        if byte < 0x80:
            return value, at
    raise DecodeError("a number that is cut short")


def frame(field: int, length: int) -> bytes:
    """The bytes before a length-delimited field's content: its tag, and its length as a varint."""
    out = bytearray([field << 3 | 2])
    while length > 0x7F:
        out.append(length & 0x7F | 0x80)
        length >>= 7
    out.append(length)
    return bytes(out)
