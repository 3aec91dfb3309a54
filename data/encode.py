"""Documents to token ids: the part of `prepare.py` that runs in the workers."""

import hashlib
import re

import numpy as np

HASHES = 1 << 63  # document hashes are below this
PIECE = 1 << 16  # characters of a document that are encoded at once
ENCODED = 1 << 18  # ids that are kept as a Python list
_SPACE = re.compile(r"[ \t\r\n]")


def token_dtype(vocab_size):
    """Returns the stored integer type: little-endian uint16 up to 65,536 ids, else uint32."""
    return np.dtype("<u2" if vocab_size <= 1 << 16 else "<u4")


def encoder(tokenizer):
    """Returns the function from a Batch to (hashes, tokens, bytes: (n,) each; ids of all documents, as bytes)."""
    dtype = token_dtype(len(tokenizer.vocab))

    def encode(batch):
        hashes, sizes, ends, ids, arrays, done = [], [], [], [], [], 0
        for text in map(str.strip, batch.read(batch.payload)):
            before = done + len(ids)
            for piece in pieces(text):
                ids += tokenizer.encode(piece)
                if len(ids) > ENCODED:  # a list takes 8 bytes an id, and more while it grows
                    arrays.append(np.array(ids, dtype))
                    done += len(ids)
                    ids.clear()
            if done + len(ids) == before:  # nothing but white space and control characters
                continue
            ids.append(tokenizer.sep_id)
            ends.append(done + len(ids))
            data = text.encode("utf-8", "replace")  # JSON and Python can spell half a surrogate pair
            hashes.append(document_hash(data))
            sizes.append(len(data))
        arrays.append(np.array(ids, dtype))
        tokens = np.diff(np.array(ends, np.int64), prepend=0)
        return np.array(hashes, np.uint64), tokens, np.array(sizes, np.int64), np.concatenate(arrays).tobytes()

    return encode


def document_hash(data):
    """Returns the number in [0, HASHES) that decides on which side the document with these UTF-8 bytes falls."""
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "big") % HASHES


def pieces(text):
    """Yields a long text in pieces cut at white space, where cutting changes no token."""
    start = 0
    while len(text) - start > PIECE:
        space = _SPACE.search(text, start + PIECE)
        if not space:
            break
        yield text[start : space.start()]
        start = space.start()
    yield text[start:]
