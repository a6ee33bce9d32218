"""Hypothesis strategies that break a valid input: JSON texts, bytes and protobuf messages."""

from __future__ import annotations

import copy
import json
from typing import Any

from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message
from hypothesis import strategies as st

NAMES = ("../x", "/etc/passwd", "a/../../b", "", ".", "..", "\0", "x" * 5000, "con\nlinea", "file:///etc/passwd", "~")
NUMBERS = (
    0,
    -1,
    1,
    2**31 - 1,
    2**31,
    2**63 - 1,
    2**63,
    2**64,
    10**30,
    -(2**63),
    1e308,
    0.5,
    float("nan"),
    float("inf"),
)
VALUES = st.one_of(
    st.sampled_from((*NAMES, *NUMBERS, None, True, False)),
    st.sampled_from(([], {}, [[]], [None], {"": None}, [0] * 1000)).map(copy.deepcopy),
    st.integers(),
    st.text(max_size=20),
    st.floats(),
)
# Texts nested too deeply for a recursive parser, and texts that only some readers accept as JSON.
TEXTS = (
    b"",
    b"[" * 100_000,
    b'{"a":' * 50_000,
    b"\xef\xbb\xbf{}",
    b"{}{}",
    b'{"a":1,"a":2}',
    b"NaN",
    b'"\xff"',
    b'"\\ud800"',
    b"9" * 10_000,
    b'{"schema":' + b"9" * 5000 + b"}",
    '{"é": "ñ"}'.encode("utf-16"),
)


@st.composite
def broken_json(draw: st.DrawFn, seed: bytes) -> bytes:
    """The JSON text `seed` with some of its values, keys or bytes changed."""
    if draw(st.integers(0, 9)) == 0:
        return draw(st.one_of(st.sampled_from(TEXTS), broken_bytes(seed)))
    return json.dumps(draw(broken_value(json.loads(seed)))).encode()


@st.composite
def broken_value(draw: st.DrawFn, value: Any) -> Any:
    """A copy of the JSON value `value` with one to three places replaced, removed, renamed or copied from elsewhere."""
    root = [copy.deepcopy(value)]
    for _ in range(draw(st.integers(1, 3))):
        places = list(_places(root))
        holder, key = places[draw(st.integers(0, len(places) - 1))]
        action = draw(st.sampled_from(("replace", "replace", "remove", "rename", "swap")))
        if action == "remove" and holder is not root:
            del holder[key]
        elif action == "rename" and isinstance(holder, dict):
            holder[draw(st.sampled_from(NAMES))] = holder.pop(key)
        elif action == "swap":
            other, there = places[draw(st.integers(0, len(places) - 1))]
            holder[key] = copy.deepcopy(other[there])
        else:
            holder[key] = draw(VALUES)
    return root[0]


def _places(holder: Any):
    """Yield (container, key) of every value in `holder`, at every depth."""
    for key in list(holder) if isinstance(holder, dict) else range(len(holder)):
        yield holder, key
        if isinstance(holder[key], (dict, list)):
            yield from _places(holder[key])


@st.composite
def broken_bytes(draw: st.DrawFn, seed: bytes) -> bytes:
    """A copy of `seed` that was cut or extended, or had some of its bytes replaced."""
    data = bytearray(seed)
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, max(0, len(data) - 1)))
        action = draw(st.sampled_from(("flip", "cut", "insert", "overwrite", "repeat")))
        if action == "flip" and data:
            data[at] ^= 1 << draw(st.integers(0, 7))
        elif action == "cut":
            del data[at : at + draw(st.integers(1, max(1, len(data))))]
        elif action == "insert":
            data[at:at] = draw(st.binary(min_size=1, max_size=16))
        elif action == "overwrite":
            patch = draw(st.sampled_from((b"\xff" * 8, b"\0" * 8, b"\x7f" + b"\xff" * 7, b"\x80" * 10)))
            data[at : at + len(patch)] = patch
        else:
            data[at:at] = data[at : at + 64]
    return bytes(data)


@st.composite
def broken_message(draw: st.DrawFn, seed: Message) -> bytes:
    """The bytes of the protobuf message `seed` with one to three fields changed, or with broken bytes."""
    if draw(st.integers(0, 9)) == 0:
        return draw(broken_bytes(seed.SerializeToString()))
    message = type(seed)()
    message.CopyFrom(seed)
    for _ in range(draw(st.integers(1, 3))):
        fields = list(_fields(message))
        owner, field = fields[draw(st.integers(0, len(fields) - 1))]
        _change(draw, owner, field)
    return message.SerializeToString()


def _fields(message: Message):
    """Yield (message, field) of every field that is set in `message` or in a message inside it."""
    for field, value in message.ListFields():
        yield message, field
        if field.type == FieldDescriptor.TYPE_MESSAGE:
            for item in value if _repeated(field) else [value]:
                yield from _fields(item)


def _repeated(field: FieldDescriptor) -> bool:
    return bool(getattr(field, "is_repeated", False))


def _change(draw: st.DrawFn, owner: Message, field: FieldDescriptor) -> None:
    action = draw(st.sampled_from(("change", "change", "clear", "repeat")))
    values = getattr(owner, field.name)
    if action == "clear":
        owner.ClearField(field.name)
    elif _repeated(field) and len(values):
        index = draw(st.integers(0, len(values) - 1))
        if action == "repeat":
            values.extend([values[index]] * draw(st.sampled_from((1, 3, 100))))
        elif field.type == FieldDescriptor.TYPE_MESSAGE:
            values[index].ClearField(draw(st.sampled_from([item.name for item in values[index].DESCRIPTOR.fields])))
        else:
            values[index] = _scalar(draw, field)
    elif field.type != FieldDescriptor.TYPE_MESSAGE and not _repeated(field):
        setattr(owner, field.name, _scalar(draw, field))


def _scalar(draw: st.DrawFn, field: FieldDescriptor) -> Any:
    kinds = FieldDescriptor
    if field.type == kinds.TYPE_STRING:
        return draw(st.sampled_from([*NAMES, "input_ids", "logits"]))
    if field.type == kinds.TYPE_BYTES:
        return draw(st.binary(max_size=64))
    if field.type in (kinds.TYPE_FLOAT, kinds.TYPE_DOUBLE):
        return draw(st.floats(width=32))
    if field.type == kinds.TYPE_INT64:
        return draw(st.one_of(st.sampled_from((0, -1, 1, 2**31, 2**40, 2**63 - 1, -(2**63))), st.integers(-9, 99)))
    if field.type == kinds.TYPE_ENUM:  # protobuf refuses other values here; broken bytes can still hold them
        return draw(st.sampled_from([value.number for value in field.enum_type.values]))
    return draw(st.one_of(st.sampled_from((0, 1, 2**31 - 1, -(2**31), -1)), st.integers(0, 40)))
