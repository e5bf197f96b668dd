"""The bytes of an ONNX file, where they are read or written without its weights in memory.

Protobuf's own reader holds a file's bytes and its weights, and its writer up to four copies of them. A message is a row of
fields: a key, which is a number and a kind, and a varint, a number of fixed size, or a length and so many bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import IO

from google.protobuf.message import DecodeError, Message
from onnx import ModelProto, TensorProto

GRAPH, INITIALIZER, RAW_DATA = 7, 5, 9  # Fields of ModelProto, GraphProto and TensorProto, in onnx.proto.
VARINT, EIGHT_BYTES, BYTES, FOUR_BYTES = 0, 1, 2, 5  # Kinds of fields.


def without_weights(
    data: bytes,
    instead: Callable[[int, int], bytes | None],
    inside: tuple[int, ...] = (GRAPH, INITIALIZER, RAW_DATA),
    start: int = 0,
    end: int | None = None,
) -> bytes:
    """Return the bytes of a model with the raw data of its initializers replaced.

    `instead(offset, length)` returns fields for the data that lie there, or None where they stay. Raises DecodeError.
    """
    parts = []
    for number, kind, begin, value, stop in _fields(data, start, len(data) if end is None else end):
        new = None
        if number == inside[0] and kind == BYTES:
            if len(inside) > 1:
                new = field(number, without_weights(data, instead, inside[1:], value, stop))
            else:
                new = instead(value, stop - value)
        parts.append(data[begin:stop] if new is None else new)
    return b"".join(parts)


def write_model(
    file: IO[bytes], model: ModelProto, tensors: Iterable[tuple[TensorProto, int, Callable[[], bytes]]]
) -> None:
    """Write a model whose initializers are given as fields, length of raw data, and what returns these; one is held at a time."""
    shell, graph = without(model, "graph"), without(model.graph, "initializer")
    rows = []
    for tensor, length, raw in tensors:
        head = tensor.SerializeToString() + (_start(RAW_DATA, length) if length else b"")
        rows.append((_start(INITIALIZER, len(head) + length) + head, length, raw))
    file.write(shell)
    file.write(_start(GRAPH, len(graph) + sum(len(head) + length for head, length, _ in rows)))
    file.write(graph)
    for head, length, raw in rows:
        file.write(head)
        if length:
            file.write(raw())


def without(message: Message, *names: str) -> bytes:
    """Serialise a message without some of its fields, which are not copied."""
    rest = type(message)()
    for one, value in message.ListFields():
        if one.name in names:
            continue
        if hasattr(value, "extend"):
            getattr(rest, one.name).extend(value)
        elif isinstance(value, Message):
            getattr(rest, one.name).CopyFrom(value)
        else:
            setattr(rest, one.name, value)
    return rest.SerializeToString()


def field(number: int, content: bytes) -> bytes:
    """Return a field of bytes."""
    return _start(number, len(content)) + content


def _start(number: int, length: int) -> bytes:
    return _varint(number << 3 | BYTES) + _varint(length)


def _varint(value: int) -> bytes:
    parts = bytearray()
    while value > 127:
        parts.append(value & 127 | 128)
        value >>= 7
    return bytes([*parts, value])


def _fields(data: bytes, start: int, end: int) -> Iterator[tuple[int, int, int, int, int]]:
    """Yield number, kind, and where each field starts, its value starts, and it ends."""
    while start < end:
        key, value = _read_varint(data, start, end)
        kind = key & 7
        if kind == VARINT:
            _, stop = _read_varint(data, value, end)
        elif kind == BYTES:
            length, value = _read_varint(data, value, end)
            stop = value + length
        elif kind in (EIGHT_BYTES, FOUR_BYTES):
            stop = value + (8 if kind == EIGHT_BYTES else 4)
        else:
            raise DecodeError(f"a field of kind {kind} at byte {start}")
        if stop > end:
            raise DecodeError(f"a field ends at byte {stop}, behind the end of what it is in, {end}")
        yield key >> 3, kind, start, value, stop
        start = stop


def _read_varint(data: bytes, start: int, end: int) -> tuple[int, int]:
    value = 0
    for place in range(10):
        if start + place >= end:
            break
        byte = data[start + place]
        value |= (byte & 127) << 7 * place
        if byte < 128:
            return value, start + place + 1
    raise DecodeError(f"a number without an end at byte {start}")
