"""The wire format of Protocol Buffers, as far as sentencepiece's messages need it.

A message is a series of fields: a key (number * 8 + kind), then a varint (7 bits a byte, the lowest first), 4 or 8
bytes, or a length and as many bytes. Source: protobuf.dev/programming-guides/encoding.
"""

import struct

VARINT, FIXED64, BYTES, FIXED32 = 0, 1, 2, 5
_SIZES = {FIXED64: 8, FIXED32: 4}
_SMALL = [bytes([value]) for value in range(128)]


def fields(data):
    """Yields (number, kind, value) of each field: an int for VARINT, else bytes; ValueError where there is none."""
    at, end = 0, len(data)
    while at < end:
        key, at = _varint(data, at)
        number, kind = key >> 3, key & 7
        if kind == VARINT:
            value, at = _varint(data, at)
        else:
            size, at = _varint(data, at) if kind == BYTES else (_SIZES.get(kind, end), at)
            value = data[at : at + size]
            at += size
        if at > end or not number:
            raise ValueError("a field is cut short or has no number")
        yield number, kind, value


def field(number, value):
    """The bytes of one field: an int (or bool) is a varint, a float has 32 bits, str and bytes have a length."""
    if isinstance(value, int):
        return _packed(number << 3 | VARINT) + _packed(value)
    if isinstance(value, float):
        return _packed(number << 3 | FIXED32) + struct.pack("<f", value)
    value = value.encode() if isinstance(value, str) else value
    return _packed(number << 3 | BYTES) + _packed(len(value)) + value


def _varint(data, at):
    """(value, place behind it) of the varint at a place."""
    value = shift = 0
    while at < len(data) and shift < 64:
        byte = data[at]
        at += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, at
        shift += 7
    raise ValueError("a number is cut short or too long")


def _packed(value):
    if value < 128:
        return _SMALL[value]
    packed = bytearray()
    while value > 127:
        packed.append(value & 127 | 128)
        value >>= 7
    packed.append(value)
    return bytes(packed)
