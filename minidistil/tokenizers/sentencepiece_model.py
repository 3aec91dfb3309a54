"""A sentencepiece model as pieces and a table of characters: read from a .model, checked, and written for the library.

The library trusts what it loads: a damaged table of characters makes it read outside of it. So nothing reaches it but
what `write` makes of checked values. Source: sentencepiece_model.proto, and normalizer.cc for the table.
"""

import functools
import io
import math
import struct

import numpy as np
import sentencepiece

from minidistil.errors import UserError
from minidistil.tokenizers import protobuf
from minidistil.tokenizers.protobuf import BYTES, FIXED32, VARINT

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)  # kinds of pieces
WORD_START = "\u2581"  # stands for a space
UNIGRAM = 1
_MODEL_TYPES = {2: "BPE", 3: "word", 4: "character"}
# field of NormalizerSpec or TrainerSpec -> (name, its default value, the value that our tokenizer has)
_NORMALIZER = {
    3: ("add_dummy_prefix", True, True),
    4: ("remove_extra_whitespaces", True, True),
    5: ("escape_whitespaces", True, True),
}
_TRAINER = {24: ("treat_whitespace_as_suffix", False, False), 35: ("byte_fallback", False, False)}


def read(path):
    """(pieces, charsmap) of a .model file: pieces are (text, score, kind) in the model's order, charsmap is bytes.

    Raises UserError where the file is damaged, or is a model that `write` cannot express.
    """
    try:
        sections = {number: [] for number in range(1, 4)}
        for number, kind, value in protobuf.fields(path.read_bytes()):
            if kind != BYTES:
                raise ValueError("a field is not a message")
            sections.setdefault(number, []).append(value)
        if not all(sections.values()):  # the pieces come first: where the file was cut between two of them
            raise ValueError("it ends before its settings")
        trainer, normalizer = (
            {(number, kind): value for data in sections[n] for number, kind, value in protobuf.fields(data)}
            for n in (2, 3)
        )
        pieces = [_piece(data) for data in sections[1]]
    except ValueError as error:  # of UTF-8, too
        raise UserError(f"{path} is no sentencepiece model, or damaged ({error}): fetch it again") from None
    model_type = trainer.get((3, VARINT), UNIGRAM)
    if model_type != UNIGRAM:
        name = _MODEL_TYPES.get(model_type, model_type)
        raise UserError(f"{path} is a sentencepiece model of type {name}: use a model whose type is Unigram")
    for fields, section in ((_NORMALIZER, normalizer), (_TRAINER, trainer)):
        for number, (name, default, wanted) in fields.items():
            if bool(section.get((number, VARINT), default)) != wanted:
                raise UserError(f"{path}: {name} is {not wanted}: use a model in which it is {wanted}, such as XLM-R's")
    return pieces, normalizer.get((2, BYTES), b"")


def _piece(data):
    text, score, piece_kind = b"", 0.0, NORMAL
    for number, kind, value in protobuf.fields(data):
        if number == 1 and kind == BYTES:
            text = value
        elif number == 2 and kind == FIXED32:
            (score,) = struct.unpack("<f", value)
        elif number == 3 and kind == VARINT:
            piece_kind = value
    return text.decode(), score, piece_kind


def check(path, pieces, charsmap):
    """Raises UserError for what the library would refuse, or what would make it fail later."""
    seen = set()
    for text, score, kind in pieces:
        if not text or "\0" in text or text in seen:
            problem = "repeats the piece" if text in seen else "has the piece"
            raise UserError(f"{path} {problem} {text!r}: fetch it again")
        if type(score) not in (float, int) or not math.isfinite(score) or abs(score) > 1e6:
            raise UserError(f"{path}: the score of {text!r} is {score!r}, which is no log-probability: fetch it again")
        if kind not in (NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED):
            raise UserError(f"{path}: the piece {text!r} is of type {kind}: use a model such as XLM-R's")
        seen.add(text)
    if [kind for _, _, kind in pieces].count(UNKNOWN) != 1:
        raise UserError(f"{path} does not have one piece for unknown text: fetch it again")
    if not any(kind == NORMAL for _, _, kind in pieces):
        raise UserError(f"{path} has no pieces: fetch it again")
    if charsmap and not _whole(charsmap):
        raise UserError(f"{path}: its table of characters (precompiled_charsmap) is damaged: fetch it again")


def _whole(charsmap):
    """Whether every look-up in a table of characters stays inside of it.

    The table is the size of a trie in bytes, the trie, and strings that end with a zero byte. The trie is a double
    array of uint32 units (Darts-clone): bit 31 marks a unit that holds the place of a string; another one leads, with
    the offset in its bits 10 to 30 (times 256 if bit 9 is set), to one unit for each byte of the text, and to a string
    if bit 8 is set.
    """
    size = int.from_bytes(charsmap[:4], "little")
    trie, strings = charsmap[4 : 4 + size], charsmap[4 + size :]
    if len(charsmap) < 8 or size % 1024 or len(trie) != size or not size or not strings.endswith(b"\0"):
        return False
    try:
        strings.decode()
    except UnicodeDecodeError:
        return False
    units = np.frombuffer(trie, "<u4").astype(np.int64)
    inner = np.flatnonzero(units < 1 << 31)
    first = inner ^ (units[inner] >> 10 << ((units[inner] & 1 << 9) >> 6))
    if not ((first | 255) < len(units)).all():
        return False
    places = units[first[units[inner] & 1 << 8 != 0]] & (1 << 31) - 1
    return bool((places < len(strings)).all())


def write(pieces, charsmap):
    """The bytes of a Unigram model of these pieces, whose ids are their order."""
    unknown = next(text for text, _, kind in pieces if kind == UNKNOWN)
    entries = (
        protobuf.field(1, protobuf.field(1, text) + protobuf.field(2, float(score)) + protobuf.field(3, kind))
        for text, score, kind in pieces
    )
    trainer = protobuf.field(3, UNIGRAM) + protobuf.field(45, unknown)
    return b"".join(entries) + protobuf.field(2, trainer) + protobuf.field(3, protobuf.field(2, charsmap))


def cut(data, kept):
    """The bytes of a .model without the pieces that are not in `kept`; control and unknown pieces stay."""
    parts = []
    for number, _, value in protobuf.fields(data):
        text, _, kind = _piece(value) if number == 1 else (None, 0.0, CONTROL)
        if kind in (CONTROL, UNKNOWN) or text in kept:
            parts.append(protobuf.field(number, value))
    return b"".join(parts)


@functools.cache
def nmt_nfkc():
    """The library's own table of characters, with which XLM-R's and most other models were made."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["a b"]), model_writer=model, vocab_size=6, hard_vocab_limit=False,
        normalization_rule_name="nmt_nfkc", num_threads=1, minloglevel=2,
    )  # fmt: skip
    spec = next(value for number, _, value in protobuf.fields(model.getvalue()) if number == 3)
    return next(value for number, _, value in protobuf.fields(spec) if number == 2)
