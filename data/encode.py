"""Documents -> token ids: the part of prepare.py that runs in the workers."""

import hashlib
import itertools
import re

import numpy as np

from data.sentence_split import sentences

HASHES = 1 << 63  # document hashes are below this
PIECE = 1 << 16  # characters of a document to split at once: the list of words takes 15 times the memory of the text
_SPACE = re.compile(r"[ \t\r\n]")
_CUT = re.compile(r"(?<=\S)[ \t\r\n]")  # the first of several, all but the last of which byte-level BPE keeps together


def token_dtype(vocab_size):
    """Returns the stored integer type: little-endian uint16 up to 65,536 ids, else uint32."""
    return np.dtype("<u2" if vocab_size <= 1 << 16 else "<u4")


def encoder(tokenizer, prefix=None):
    """Returns the function from a Batch to (hashes, tokens, bytes: (n,) each; ids of all documents, as bytes; cuts).

    Documents without tokens, such as blank lines, are skipped. With a `prefix`, which may be "", each sentence is a
    document; the prefix stands before its text, but counts neither for its hash nor for its bytes.
    """
    dtype = token_dtype(len(tokenizer.vocab))
    # a cut could part an added token, or a token from the white space after it
    spaced = any(_SPACE.search(token.content) or token.rstrip for token in tokenizer.added)

    def ids_of(text):
        document = tokenizer.encode_documents([text] if spaced else pieces(text))
        if len(text) > PIECE and not spaced:  # [SEP] after each piece: only the last one stays
            document = np.append(document[document != tokenizer.sep_id], document[-1:])
        return document

    nothing = ids_of(prefix or "")

    def encode(batch):
        hashes, sizes, ids = [], [], []
        texts, cuts = batch.documents()
        for text in texts if prefix is None else itertools.chain.from_iterable(map(sentences, texts)):
            document = ids_of((prefix or "") + text)
            if np.array_equal(document, nothing):
                continue
            ids.append(document)
            data = text.encode("utf-8", "replace")  # JSON and Python strings can contain half a surrogate pair
            hashes.append(document_hash(data))
            sizes.append(len(data))
        tokens = np.array([len(document) for document in ids], np.int64)
        joined = np.concatenate([np.empty(0, dtype), *ids], dtype=dtype, casting="same_kind")
        return np.array(hashes, np.uint64), tokens, np.array(sizes, np.int64), joined.tobytes(), cuts

    return encode


def document_hash(data):
    """Returns the hash, in [0, HASHES), that assigns the document with these UTF-8 bytes to a split."""
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "big") % HASHES


def pieces(text):
    """Yields a long text in pieces, split where white space begins: there a split changes no token of any tokenizer."""
    start = 0
    while len(text) - start > PIECE:
        space = _CUT.search(text, start + PIECE)
        if not space:
            break
        yield text[start : space.start()]
        start = space.start()
    yield text[start:]
