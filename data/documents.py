"""What a document is, and batches of them.

A document is what ends with [SEP] and is held out as a whole. One of more than DOCUMENT_BYTES of UTF-8 is cut at white
space into parts, each a document of its own: no token changes, since the tokenizer splits at white space, unless an
added token contains some. Text that has no white space for so long, such as Chinese, is cut after a punctuation mark,
which is a token of its own.
"""

import dataclasses
import re
from collections.abc import Callable
from typing import Any

from minidistil.errors import UserError

BATCH_BYTES = 1 << 20
DOCUMENT_BYTES = 4 << 20
RECORD_BYTES = 16 << 20  # the longest record of a table, JSON file or dump, which must be parsed as a whole

_TO_SPACE = re.compile(rb".+(?=[ \t\r\n])", re.DOTALL)  # not at \x0b or \x85, which the tokenizer drops
_TO_MARK = re.compile(
    rb".*(?:[!-/:-@\[-`{-~]|" + "|".join("\u3000\u3001\u3002\uff01\uff0c\uff1a\uff1b\uff1f").encode() + rb")", re.DOTALL
)


@dataclasses.dataclass(frozen=True)
class Batch:
    """Undecoded documents; `read(payload)` returns them as a list of str."""

    read: Callable
    payload: Any
    weight: int  # bytes in memory
    progress: int  # stored bytes of the source since the last batch
    unique: bool = False  # whether to drop documents that repeat an earlier one of the source
    cuts: int = 0  # of long documents that were cut already

    def documents(self):
        """Returns (stripped documents, none of more than DOCUMENT_BYTES, blank ones included; number of cuts)."""
        found, cuts = [], self.cuts
        for text in map(str.strip, self.read(self.payload)):
            if 4 * len(text) <= DOCUMENT_BYTES:  # as most are, whatever their characters
                found.append(text)
            else:
                cut = list(parts(text))
                found += map(str.strip, cut)
                cuts += len(cut) - 1
        return found, cuts


def parts(text):
    """Yields the parts of a text of more than DOCUMENT_BYTES; a shorter one is yielded whole."""
    data, start = text.encode("utf-8", "surrogatepass"), 0  # JSON and Python strings can hold half a surrogate pair
    while len(data) - start > DOCUMENT_BYTES:
        end = start + place_to_cut(data[start : start + DOCUMENT_BYTES], "a document")
        yield data[start:end].decode("utf-8", "surrogatepass")
        start = end
    yield data[start:].decode("utf-8", "surrogatepass")


def place_to_cut(data, name):
    """Returns the place of the last white space in UTF-8 bytes, or else that after the last punctuation mark."""
    match = _TO_SPACE.match(data) or _TO_MARK.match(data)
    if not match:
        raise UserError(
            f"{name} has {len(data):,} bytes without white space or punctuation: leave it out, or put spaces into it"
        )
    return match.end()


def described_cuts(cuts):
    """Returns one line about `cuts` cuts."""
    return f"long documents cut at white space into parts of at most {DOCUMENT_BYTES:,} bytes: {cuts:,} cuts"
