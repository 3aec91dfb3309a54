"""The safetensors file format, read and written by hand.

A file is 8 bytes, the length of the header as a little-endian integer; a JSON header that maps each name to
{"dtype", "shape", "data_offsets": [begin, end]}; and the data, which these ranges cover without gap or overlap.
Source: https://huggingface.co/docs/safetensors. Files are not trusted: any bytes either load or raise UserError.
"""

import hashlib
import json
import math
import os
import re

import numpy as np
import torch

from minidistil.errors import UserError
from minidistil.files import replacing

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
    "U64": torch.uint64, "U32": torch.uint32, "U16": torch.uint16, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
HEADER_LIMIT = 100_000_000  # bytes; the limit of the format
ZERO_DIGEST = "0" * 64  # placeholder of the digest while it is computed


def damaged(path, fault):
    return UserError(f"{path}: the file is damaged: {fault}: copy or download it again")


def read_safetensors(path, checksum=False):
    """Returns (tensors by name, metadata str -> str) of a safetensors file.

    The tensors are views of a private memory map: do not write to them, and do not change the file while they exist.
    With `checksum`, the file must contain the digest of `write_safetensors(checksum=True)` and match it. Raises
    UserError, with file and fault, for anything that the format forbids.
    """
    with open(path, "rb") as file:  # once, since a run may replace the file meanwhile
        size = os.fstat(file.fileno()).st_size
        start = file.read(8)
        if start == b"version ":
            raise UserError(f"{path} is a Git LFS pointer, not the weights: run `git lfs pull` in its folder")
        length = int.from_bytes(start, "little")
        if len(start) < 8 or length > HEADER_LIMIT or 8 + length > size:
            raise damaged(path, f"a header of {length} bytes in a file of {size}")
        header = file.read(length)
        data = torch.from_numpy(np.memmap(file, mode="c"))  # torch.from_file takes no name that is not UTF-8
    try:
        metadata, entries = _parse_header(header, size - 8 - length)
    except ValueError as error:
        raise damaged(path, error) from None
    if checksum:
        _verify(path, start + header, data[8 + length :], metadata.get("sha256", ""))
    tensors = {}
    for name, (dtype, shape, begin, end) in entries.items():
        part = data[8 + length + begin : 8 + length + end]
        # a header of odd length leaves the data unaligned, and a view must be aligned
        part = part if part.storage_offset() % dtype.itemsize == 0 else part.clone()
        tensors[name] = part.view(dtype).view(shape)
    return tensors, metadata


def _parse_header(header, data_size):
    """Returns (metadata, {name: (dtype, shape, begin, end)}); ValueError states the fault."""
    if not header.startswith(b"{"):
        raise ValueError("the header is not a JSON object")
    header = parse_json(header)
    metadata = header.pop("__metadata__", None)
    metadata = {} if metadata is None else metadata  # null, as some writers have it
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise ValueError("__metadata__ does not map strings to strings")
    entries = {}
    for name, entry in header.items():
        if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
            raise ValueError(f"the entry of {name!r} is not dtype, shape and data_offsets")
        dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
        if not isinstance(dtype, str) or dtype not in DTYPES:
            raise ValueError(f"{name!r} has the unknown dtype {dtype!r}")
        # torch has at most 64 dimensions; a product beyond 2^63 would overflow the strides, even with a zero size
        sane = _are_sizes(shape) and len(shape) <= 64 and math.prod(max(n, 1) for n in shape) < 2**63
        if not sane or not _are_sizes(offsets) or len(offsets) != 2:
            raise ValueError(f"{name!r} has an impossible shape or data_offsets")
        entries[name] = (DTYPES[dtype], shape, *offsets)
    position = 0
    for name, (dtype, shape, begin, end) in sorted(entries.items(), key=lambda item: item[1][2:]):
        if begin != position:
            raise ValueError(f"{name!r} begins at byte {begin}, not {position}, where the tensor before it ends")
        if end - begin != math.prod(shape) * dtype.itemsize:
            raise ValueError(f"{name!r} has {end - begin} bytes, but its shape is {shape} of {DTYPE_NAMES[dtype]}")
        position = end
    if position != data_size:
        raise ValueError(f"the header describes {position} bytes of data, the file has {data_size}")
    return metadata, entries


def _are_sizes(values):
    """Whether `values` is a list of integers, none negative; true does not count as one."""
    return isinstance(values, list) and all(type(value) is int and 0 <= value < 2**63 for value in values)


def parse_json(data, kind=dict):
    """Returns the JSON object, or list, in the UTF-8 bytes `data`; ValueError for anything else, and repeated keys."""

    def unique(pairs):
        values = dict(pairs)
        if len(values) != len(pairs):
            raise ValueError("a key occurs twice")
        return values

    def refuse(constant):
        raise ValueError(f"{constant} is not JSON")

    try:
        value = json.loads(data.decode("utf-8"), object_pairs_hook=unique, parse_constant=refuse)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    if not isinstance(value, kind):
        raise ValueError(f"not a JSON {'object' if kind is dict else 'list'}")
    return value


def _checksum_field(digest):
    """Returns the digest's bytes in a header; no JSON string can contain them, because it would escape the quotes."""
    return f'"sha256":"{digest}"'.encode()


def _verify(path, header, data, digest):
    """Raises UserError unless the file, with zeros for its digest, hashes to that digest."""
    if not re.fullmatch("[0-9a-f]{64}", digest) or _checksum_field(digest) not in header:
        raise damaged(path, "it holds no checksum")
    hasher = hashlib.sha256(header.replace(_checksum_field(digest), _checksum_field(ZERO_DIGEST)))
    hasher.update(data.numpy())
    if hasher.hexdigest() != digest:
        raise damaged(path, "its bytes and its checksum disagree")


def write_safetensors(path, tensors, metadata=None, checksum=False):
    """Writes tensors by name, and metadata str -> str, as a safetensors file, atomically and one tensor at a time.

    The same tensors give the same bytes. With `checksum`, the metadata entry `sha256` is the SHA-256 of the whole file
    while that entry's 64 digits are zeros; `read_safetensors(checksum=True)` checks it.
    """
    metadata = {"format": "pt", **(metadata or {})}  # some readers demand the format
    if checksum:
        metadata["sha256"] = ZERO_DIGEST
    header, position = {"__metadata__": dict(sorted(metadata.items()))}, 0
    # widest types first, so that every tensor is aligned to its item size
    names = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    for name in names:
        dtype, shape, end = tensors[name].dtype, list(tensors[name].shape), position + tensors[name].nbytes
        header[name] = {"dtype": DTYPE_NAMES[dtype], "shape": shape, "data_offsets": [position, end]}
        position = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    start = len(text).to_bytes(8, "little") + text
    with replacing(path, len(start) + position) as temporary, open(temporary, "wb") as file:
        hasher = hashlib.sha256(start)
        file.write(start)
        for name in names:
            part = tensors[name].detach().cpu().reshape(-1).view(torch.uint8).numpy()
            file.write(part)
            if checksum:
                hasher.update(part)
        if checksum:
            file.seek(start.index(_checksum_field(ZERO_DIGEST)))
            file.write(_checksum_field(hasher.hexdigest()))
