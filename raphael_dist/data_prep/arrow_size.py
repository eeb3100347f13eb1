"""Reads from the messages of an Arrow stream how large their content is, before anything is decompressed.

pyarrow has no function for this. The layout of the messages is that of Message.fbs of the Arrow format, in FlatBuffers: a
table begins with the distance to its vtable, which lists the position of each field.
"""

import struct
from typing import Any

_HEADER = 2  # field of Message
_DICTIONARY_DATA = 1  # field of DictionaryBatch
_BUFFERS, _COMPRESSION = 2, 3  # fields of RecordBatch


def expanded_bytes(pyarrow: Any, source: Any) -> int:
    """Return how many bytes the content of an Arrow stream has when it is decompressed, as its messages state.

    `pyarrow`: the module. `source`: the opened file with the stream, which is read to its end. Raises ValueError or
    pyarrow.ArrowException if the stream is damaged.
    """
    total = 0
    try:
        for message in pyarrow.ipc.MessageReader.open_stream(source):
            if message.type in ("record batch", "dictionary"):
                total += _batch_bytes(memoryview(message.metadata), memoryview(message.body), message.type)
    except (struct.error, IndexError) as error:
        raise ValueError(f"a message (block) of the Arrow stream is damaged ({error})") from error
    return total


def _batch_bytes(data: memoryview, body: memoryview, kind: str) -> int:
    batch = _target(data, _field(data, _target(data, 0), _HEADER))
    if kind == "dictionary":
        batch = _target(data, _field(data, batch, _DICTIONARY_DATA))
    if not _field(data, batch, _COMPRESSION):
        return len(body)
    buffers, total = _target(data, _field(data, batch, _BUFFERS)), 0
    (count,) = struct.unpack_from("<I", data, buffers)
    for number in range(count):
        start, length = struct.unpack_from("<qq", data, buffers + 4 + 16 * number)
        if length:
            (size,) = struct.unpack_from("<q", body, start)
            total += length if size < 0 else size  # -1: this buffer is not compressed
    return total


def _target(data: memoryview, at: int) -> int:
    """Return the position to which a FlatBuffers offset points: `at` plus the uint32 that `data` has at position `at`."""
    return int(at + struct.unpack_from("<I", data, at)[0])


def _field(data: memoryview, table: int, number: int) -> int:
    """Return the position in `data` of field `number` of the FlatBuffers table at position `table`; 0 if it is absent."""
    vtable = table - struct.unpack_from("<i", data, table)[0]
    at = 4 + 2 * number
    if at >= struct.unpack_from("<H", data, vtable)[0]:
        return 0
    (offset,) = struct.unpack_from("<H", data, vtable + at)
    return int(table + offset) if offset else 0
