"""tokenizer.json of a Unigram tokenizer, read and written.

It lists pieces and scores in the order of their ids, and spells out what sentencepiece does by itself: a table of
characters (Precompiled), spaces joined, and each of them the beginning of a word (Metaspace). Files that say something
else are refused.
"""

import base64
import binascii
import dataclasses
import functools
import re
import sys

from minidistil.errors import UserError
from minidistil.tokenizers import sentencepiece_model
from minidistil.tokenizers.added_tokens import AddedToken
from minidistil.tokenizers.sentencepiece_model import NORMAL, UNKNOWN, WORD_START

USE = "use a model with XLM-R's tokenizer, or another of sentencepiece's type Unigram"
_BLANKS = (" ", "\n", "\t", "\r", r"\s+", " {2,}", r"[\r\n\t]", r"\A +| +\z")  # patterns of white space

_SURROGATES = re.compile("[\ud800-\udfff]")


def entries(path, data):
    """The (text, score) pairs of a tokenizer.json whose model is of type Unigram."""
    model = data.get("model")
    model = model if isinstance(model, dict) else {}
    vocab = model.get("vocab")
    kind = model.get("type") or ("Unigram" if isinstance(vocab, list) else None)  # early files omit it
    if kind != "Unigram":
        raise UserError(f"{path}: model.type is {kind!r}, not 'Unigram': {USE}")
    if not isinstance(vocab, list) or not vocab:
        raise UserError(f"{path} holds no list of pieces and scores: fetch it again")
    for entry in vocab:
        if not isinstance(entry, list) or len(entry) != 2 or not isinstance(entry[0], str):
            raise UserError(f"{path}: {str(entry)[:80]!r} is no piece with a score: fetch it again")
        if _SURROGATES.search(entry[0]):
            raise UserError(f"{path}: the piece {entry[0]!r} is no text: fetch it again")
    return vocab


def read(path, data):
    """(pieces, charsmap) of a tokenizer.json, if it splits text as sentencepiece does."""
    vocab, model = entries(path, data), data["model"]
    unknown = model.get("unk_id")
    if type(unknown) is not int or not 0 <= unknown < len(vocab):
        raise UserError(f"{path}: model.unk_id is {unknown!r}, the id of no piece: fetch it again")
    if model.get("byte_fallback"):
        raise UserError(f"{path}: model.byte_fallback is {model['byte_fallback']!r}: {USE}")
    _check_pre_tokenizer(path, data.get("pre_tokenizer"))
    pieces = [(text, score, NORMAL if i != unknown else UNKNOWN) for i, (text, score) in enumerate(vocab)]
    return pieces, _charsmap(path, data.get("normalizer"))


def _steps(value, key):
    """The steps of a normalizer or pre_tokenizer: those of a Sequence, or itself."""
    value = value if isinstance(value, dict) else {"type": value}
    parts = value.get(key) if value.get("type") == "Sequence" else [value]
    return [part if isinstance(part, dict) else {"type": part} for part in (parts if isinstance(parts, list) else [])]


def _check_pre_tokenizer(path, value):
    """Raises UserError unless text is split at spaces, each of which begins a word, as the first character does."""
    found = _steps(value, "pretokenizers")
    metaspace = found[-1] if found else {}
    prefix = metaspace.get("prepend_scheme", "always" if metaspace.get("add_prefix_space", True) is True else "never")
    if (
        [step.get("type") for step in found] not in (["Metaspace"], ["WhitespaceSplit", "Metaspace"])
        or metaspace.get("replacement", WORD_START) != WORD_START
        or prefix != "always"
    ):
        raise UserError(f"{path}: its pre_tokenizer is not sentencepiece's, WhitespaceSplit and Metaspace: {USE}")


def _charsmap(path, value):
    """The table of characters of a tokenizer.json's normalizer.

    NFKC stands for a table that was lost in a conversion: XLM-R's takes its place, and a line on stderr says so.
    """
    found = _steps(value, "normalizers") if value else []
    others = []
    for step in found:
        pattern = step.get("pattern")
        pattern = pattern.get("String", pattern.get("Regex")) if isinstance(pattern, dict) else None
        if step.get("type") == "Replace" and not (pattern in _BLANKS and step.get("content") in (" ", WORD_START, "")):
            raise UserError(f"{path}: its normalizer replaces {pattern!r}, which sentencepiece does not: {USE}")
        if step.get("type") not in ("Replace", "Strip"):  # of white space, which sentencepiece joins and strips
            others.append(step)
    kinds = [step.get("type") for step in others]
    if kinds == ["Precompiled"]:
        try:
            return base64.b64decode(others[0].get("precompiled_charsmap"), validate=True)
        except (TypeError, ValueError, binascii.Error):
            raise UserError(f"{path}: its precompiled_charsmap is not base64: fetch it again") from None
    if kinds in (["NFKC"], ["Nmt", "NFKC"]):
        _say(f"{path}: its normalizer is NFKC, not sentencepiece's: nmt_nfkc, which XLM-R uses, takes its place")
        return sentencepiece_model.nmt_nfkc()
    if kinds:
        raise UserError(f"{path}: its normalizer is {' and '.join(map(str, kinds))}, not sentencepiece's: {USE}")
    return b""


@functools.cache
def _say(line):
    print(line, file=sys.stderr, flush=True)


def separators(path, data, special):
    """How many separators stand between two texts; raises UserError where a text is not between cls and sep."""
    processor = data.get("post_processor")
    kind = processor.get("type") if isinstance(processor, dict) else None
    if kind is None or kind in ("RobertaProcessing", "BertProcessing"):
        return 1 if kind == "BertProcessing" or (kind is None and special["sep"] == "[SEP]") else 2
    one, two = (_template(processor.get(name)) for name in ("single", "pair"))
    cls, sep = special["cls"], special["sep"]
    n = len(two) - 4
    if one != [cls, "A", sep] or n not in (1, 2) or two != [cls, "A", *[sep] * n, "B", sep]:
        raise UserError(f"{path}: its post_processor does not put texts between {cls} and {sep}: {USE}")
    return n


def _template(parts):
    """The names of the parts of a template: special tokens and texts."""
    parts = parts if isinstance(parts, list) else []
    values = [value for part in parts if isinstance(part, dict) for value in part.values()]
    return [value.get("id") if isinstance(value, dict) else None for value in values]


def write(tokenizer):
    """The value of the tokenizer.json with which the crate `tokenizers` gives the same ids."""
    special = tokenizer.special
    cls, sep = special["cls"], special["sep"]
    start, end = ({"SpecialToken": {"id": token, "type_id": 0}} for token in (cls, sep))
    first, second = ({"Sequence": {"id": name, "type_id": 0}} for name in "AB")
    metaspace = {"type": "Metaspace", "replacement": WORD_START, "prepend_scheme": "always", "split": True}
    table = {"type": "Precompiled", "precompiled_charsmap": base64.b64encode(tokenizer.charsmap).decode()}
    tokens = [AddedToken(token, lstrip=name == "mask") for name, token in special.items()] + tokenizer.added
    listed = [{"id": tokenizer.ids[token.content], **dataclasses.asdict(token)} for token in tokens]
    return {
        "version": "1.0", "truncation": None, "padding": None,
        "added_tokens": sorted(listed, key=lambda token: token["id"]),
        "normalizer": table if tokenizer.charsmap else None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [{"type": "WhitespaceSplit"}, metaspace]},
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [start, first, end],
            "pair": [start, first, *[end] * tokenizer.pair_separators, second, end],
            "special_tokens": {t: {"id": t, "ids": [tokenizer.ids[t]], "tokens": [t]} for t in (cls, sep)},
        },
        "decoder": metaspace,
        "model": {
            "type": "Unigram", "unk_id": tokenizer.unk_id, "byte_fallback": False,
            "vocab": [[text, score] for text, score, _ in tokenizer.pieces],
        },
    }  # fmt: skip
