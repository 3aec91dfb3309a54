"""WordPiece, exactly as the world uses it: the same ids as the fast BERT tokenizer of Hugging Face, in plain Python.

    text -> clean -> space around CJK -> strip accents -> lower case -> split at spaces and punctuation -> pieces

    BERT       Devlin et al. 2018, arXiv 1810.04805; the reference is google-research/bert, tokenization.py
    WordPiece  Wu et al. 2016, arXiv 1609.08144, section 4.1: here the greedy longest match first

Where the implementations differ, the one that made today's checkpoints' inputs wins: the Rust crate `tokenizers`, whose tables
of Unicode are older than Python's in three ways and newer in one. The exceptions at the top of this file say which code
points that concerns; they hold for Python 3.10 to 3.14 (Unicode 13 to 16) and cover what Unicode 17 and 18 add.

Speed comes from a cache: text repeats its words, so that most of them cost one dictionary look-up.
"""

import hashlib
import itertools
import json
import pathlib
import re
import unicodedata

from minidistil.cli import UserError
from minidistil.files import write_json, write_text

SPECIAL_TOKENS = {"pad": "[PAD]", "unk": "[UNK]", "cls": "[CLS]", "sep": "[SEP]", "mask": "[MASK]"}
LONGEST_WORD = 100  # characters after normalisation; a longer word is [UNK]
CACHED_CHUNKS = 2**18  # entries of either cache, about 200 bytes each
LONGEST_CACHED = 64  # characters; a longer chunk hardly comes twice


def _class(ranges):
    """A pattern that matches one character of the hexadecimal ranges."""
    return re.compile("[" + re.sub(r"[0-9A-F]+", lambda code: f"\\U{code[0]:0>8}", ranges).replace(" ", "") + "]")


_CJK = _class("3400-4DBF 4E00-9FFF F900-FAFF 20000-2A6DF 2A700-2B81F 2B920-2CEAF 2F800-2FA1F")
# Categories are those of Unicode 8. A range here may also span code points of other categories: only its newer marks (punctuation,
# format characters) matter.
_NOT_MARK = _class(
    "5C8-5C9 7FD 897-8E1 9FE AFA-AFF B53-B55 C04-C3C D00 D3B-D3C D81 EBA ECE 180F-1886 1ABF-1AF0 1DF6-1DFB A82C A8C5 "
    "A8FF A9BD 10D24-10F85 11070-11074 110C2 111C9 111CF 1123E-11241 1133B 113BB-1145E 1182F-1612F 16F4F 16FE4 "
    "1CF00-1D128 1D25B-1D25C 1E000-1E6F5 1E944-1E94A"
)
_ALSO_MARK = "\u1734\U0001171e"
_NOT_PUNCTUATION = _class(
    "61D 9FD-A76 C77-C84 1B4E-1B4F 1B7D-1B7F 2E43-2E63 10D6E-10F89 113D4-1145D 11660-116B9 1183B-11FFF 12FF1-12FF2 "
    "16D6D-16FE2 1E5FF-1E95F"
)
_ALSO_PUNCTUATION = "\u166d\U000111c9"
_NOT_CONTROL = _class("890-8E2 110CD-1343F")
# Decompositions and combining classes are those of Unicode 12: what is newer stays as it is, and no mark moves across it.
_NOT_DECOMPOSED = _class(
    "5C8-5C9 7FD 897-8D3 9FE C3C D3B-D3C EBA 1715 1ABF-1AF0 1DF6-1DFA A82C 105C9-105E4 10D24-10F85 11070 1133B "
    "11383-113D0 1145E 11839-11A99 11D42-1612F 16D68-16FF1 1D127-1D128 1D250-1D281 1E08F-1E6F5"
)
# lower case is that of Unicode 17: (first, last, distance) of the capitals that Python 3.10 or a later one does not know yet
_LOWER = {
    chr(code): chr(code + distance)
    for first, last, distance in (
        (0x1C89, 0x1C89, 1), (0x2C2F, 0x2C2F, 48), (0xA7C0, 0xA7C0, 1), (0xA7CB, 0xA7CB, -42343), (0xA7CC, 0xA7CC, 1),
        (0xA7CE, 0xA7CE, 1), (0xA7D0, 0xA7D0, 1), (0xA7D2, 0xA7D2, 1), (0xA7D4, 0xA7D4, 1), (0xA7D6, 0xA7D6, 1),
        (0xA7D8, 0xA7D8, 1), (0xA7DA, 0xA7DA, 1), (0xA7DC, 0xA7DC, -42561), (0x10570, 0x1057A, 39),
        (0x1057C, 0x1058A, 39), (0x1058C, 0x10592, 39), (0x10594, 0x10595, 39), (0x10D50, 0x10D65, 32),
        (0x16EA0, 0x16EB8, 27),
    )
    for code in range(first, last + 1)
}  # fmt: skip


class _OnDemand(dict):
    """A dict that computes what it lacks and keeps it: a `str.translate` table, or a cache of at most `limit` entries."""

    def __init__(self, compute, limit=0x110000):
        self.compute, self.limit = compute, limit

    def __missing__(self, key):
        value = self.compute(key)
        if len(self) >= self.limit:
            self.clear()
        self[key] = value
        return value


class Tokenizer:
    def __init__(self, vocab, lowercase=True, strip_accents=None, chinese=True, max_length=512):
        self.vocab = list(vocab)
        self.ids = {token: i for i, token in enumerate(self.vocab)}
        for name, token in SPECIAL_TOKENS.items():
            if token not in self.ids:
                raise UserError(f"the vocabulary has no {token}: use the vocab.txt of a BERT model")
            setattr(self, f"{name}_id", self.ids[token])
        self.lowercase = lowercase
        self.strip_accents = lowercase if strip_accents is None else strip_accents
        self.chinese = chinese
        self.max_length = max_length
        self._longest = max(map(len, self.ids))
        self._clean = _OnDemand(self._clean_character)
        self._fold = _OnDemand(self._fold_character)
        self._word_ids = _OnDemand(self._pieces, CACHED_CHUNKS)
        self._chunk_ids = _OnDemand(self._chunk, CACHED_CHUNKS)
        self._special = re.compile("(" + "|".join(map(re.escape, SPECIAL_TOKENS.values())) + ")")

    def __reduce__(self):
        return Tokenizer, (self.vocab, self.lowercase, self.strip_accents, self.chinese, self.max_length)

    @classmethod
    def load(cls, path):
        path = pathlib.Path(path)
        folder = path if path.is_dir() else path.parent
        vocab_path = path / "vocab.txt" if path.is_dir() else path
        vocab = vocab_path.read_text(encoding="utf-8").split("\n")
        if vocab[-1] == "":
            vocab.pop()
        config = {}
        if (folder / "tokenizer_config.json").exists():
            config = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
        cased = any(token[:1].isupper() for token in vocab)
        return cls(
            vocab,
            config.get("do_lower_case", not cased),
            config.get("strip_accents"),
            config.get("tokenize_chinese_chars", True),
            config.get("model_max_length", 512),
        )

    def encode(self, text):
        if any(map(text.__contains__, "\x0b\x0c\x1c\x1d\x1e\x1f\x85")):
            text = text.translate(dict.fromkeys(map(ord, "\x0b\x0c\x1c\x1d\x1e\x1f\x85")))
        return list(itertools.chain.from_iterable(map(self._chunk_ids.__getitem__, text.split())))

    def encode_prompt(self, text):
        ids = []
        for piece in self._special.split(text):
            ids.extend([self.ids[piece]] if piece in SPECIAL_TOKENS.values() else self.encode(piece))
        return [self.cls_id, *ids, self.sep_id]

    def decode(self, ids):
        tokens = [self.vocab[i] for i in ids]
        return " ".join(tokens).replace(" ##", "")

    @property
    def digest(self):
        state = [self.vocab, bool(self.lowercase), bool(self.strip_accents), bool(self.chinese)]
        return hashlib.sha256(json.dumps(state).encode()).hexdigest()

    def save(self, folder, model_type):
        folder = pathlib.Path(folder)
        write_text(folder / "vocab.txt", "".join(token + "\n" for token in self.vocab))
        special = {f"{name}_token": token for name, token in SPECIAL_TOKENS.items()}
        write_json(folder / "special_tokens_map.json", special)
        config = {
            "tokenizer_class": {"bert": "BertTokenizer", "distilbert": "DistilBertTokenizer"}[model_type],
            "do_lower_case": self.lowercase,
            "strip_accents": self.strip_accents,
            "tokenize_chinese_chars": self.chinese,
            "model_max_length": self.max_length,
            **special,
        }
        write_json(folder / "tokenizer_config.json", config)

    def _chunk(self, chunk):
        return tuple(itertools.chain.from_iterable(map(self._word_ids.__getitem__, self._words(chunk))))

    def _words(self, chunk):
        text = chunk.translate(self._clean)
        if self.strip_accents:
            text = "".join(
                unicodedata.normalize("NFD", piece) for piece in re.split(f"({_NOT_DECOMPOSED.pattern})", text)
            )
        return text.translate(self._fold).split()

    def _clean_character(self, code):
        c = chr(code)
        if c.isspace() and c not in "\x0b\x0c\x1c\x1d\x1e\x1f\x85":
            return " "
        if c in "\0\ufffd" or unicodedata.category(c) in ("Cc", "Cf", "Co", "Cs") and not _NOT_CONTROL.match(c):
            return ""
        return f" {c} " if self.chinese and _CJK.match(c) else c

    def _fold_character(self, code):
        c = chr(code)
        category = unicodedata.category(c)
        if self.strip_accents and (category == "Mn" and not _NOT_MARK.match(c) or c in _ALSO_MARK):
            return ""
        if self.lowercase:
            c = _LOWER.get(c) or c.lower()
        ascii_punctuation = c.isascii() and c.isprintable() and not c.isalnum() and c != " "
        if ascii_punctuation or category[0] == "P" and not _NOT_PUNCTUATION.match(c) or c in _ALSO_PUNCTUATION:
            return f" {c} "
        return c

    def _pieces(self, word):
        if len(word) > LONGEST_WORD:
            return (self.unk_id,)
        ids, start, prefix = [], 0, ""
        while start < len(word):
            for end in range(len(word), start, -1):
                i = self.ids.get(prefix + word[start:end])
                if i is not None:
                    break
            else:
                return (self.unk_id,)
            ids.append(i)
            start, prefix = end, "##"
        return tuple(ids)
