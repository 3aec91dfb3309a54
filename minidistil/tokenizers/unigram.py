"""Unigram with exactly the ids of sentencepiece, through its library: XLM-R, multilingual E5 and their like.

    text -> table of characters (NFKC and more) -> spaces joined, each begins a word -> the likeliest pieces

    Unigram         Kudo 2018, arXiv 1804.10959
    sentencepiece   Kudo and Richardson 2018, arXiv 1808.06226
    XLM-R           Conneau et al. 2019, arXiv 1911.02116

The model that the library gets has its pieces in the order of the ids, so that its ids are ours. Where the crate
`tokenizers` differs from sentencepiece, in rare characters and in ties, sentencepiece counts (see LOG.md).
"""

import array
import dataclasses
import hashlib
import json
import pathlib
import re

import numpy as np
import sentencepiece

from minidistil.errors import UserError
from minidistil.files import replacing
from minidistil.tokenizers import protobuf, sentencepiece_model, unigram_files
from minidistil.tokenizers.added_tokens import Matcher
from minidistil.tokenizers.base import BaseTokenizer
from minidistil.tokenizers.caches import Table
from minidistil.tokenizers.sentencepiece_model import NORMAL, UNUSED, WORD_START

_SURROGATES = re.compile("[\ud800-\udfff]")


class Unigram(BaseTokenizer):
    """A Unigram vocabulary with its normalisation.

    pieces: (text, score, kind) in the order of ids. charsmap: sentencepiece's table of characters, or b"". special and
    added as in Tokenizer; those that no piece has follow the last id. Added tokens are matched in the text as it is.
    files: name -> bytes of the files that `save` writes. Raises UserError where the library refuses the model.
    """

    second_type = 0  # such models have one token type, or do without the second

    def __init__(self, pieces, charsmap, special, added=(), max_length=512, pair_separators=2, files=None):
        self.pieces, self.charsmap, self.files = list(pieces), charsmap, dict(files or {})
        self.vocab = [text for text, _, _ in self.pieces]
        self.ids = {token: i for i, token in enumerate(self.vocab)}
        for token in [*special.values(), *(token.content for token in added)]:
            if token not in self.ids:
                self.ids[token] = len(self.vocab)
                self.vocab.append(token)
        self.set_special(special)
        self.added = sorted(added, key=lambda token: self.ids[token.content])
        self.max_length, self.pair_separators = max_length, pair_separators
        self._model = sentencepiece_model.write(self.pieces, charsmap)
        self._processor = sentencepiece.SentencePieceProcessor()
        try:
            self._processor.LoadFromSerializedProto(self._model)
        except RuntimeError as error:
            raise UserError(f"sentencepiece refuses these pieces ({' '.join(str(error).split())})") from None
        raw = [(token.content, self.ids[token.content], token.single_word) for token in self.added]
        named = [(token, self.ids[token], False) for token in special.values()]
        self._raw, self._prompt = Matcher(raw), Matcher(named + raw)
        self._blank = Table(lambda character: not self._processor.normalize(character))

    def __reduce__(self):
        state = self.pieces, self.charsmap, self.special, self.added, self.max_length, self.pair_separators, self.files
        return Unigram, state

    @classmethod
    def load(cls, path):
        """Reads a model's folder, or one of its files, which stands for it; raises UserError."""
        path = pathlib.Path(path)
        if path.is_file() and path.name not in unigram_files.FILES:
            names = f"{unigram_files.XLM_R} (ids as in XLM-R) or {unigram_files.DEBERTA} (ids as in the file)"
            raise UserError(f"{path}: the name of a .model says what its ids are: call it {names}")
        folder = path if path.is_dir() else path.parent
        settings = unigram_files.read_folder(folder)
        try:
            return cls(**settings)
        except UserError as error:
            raise UserError(f"{folder}: {error}") from None

    def save(self, folder, family="xlm-roberta"):
        """Writes the files that were read, and what transformers needs beside them; the family changes nothing."""
        for name, data in unigram_files.written(self).items():
            with replacing(pathlib.Path(folder) / name, len(data)) as temporary:
                temporary.write_bytes(data)

    def cut(self, used):
        """Returns (tokenizer, ids): one with those pieces only that the ids `used` need, and its tokens' ids here.

        Text of these pieces keeps them: the likeliest split stays the likeliest where there are fewer others. The
        least and most likely pieces stay, by which the library scores unknown text and pieces of its user; so do
        special and added tokens, and all characters of used pieces.
        """
        normal = {text: score for text, score, kind in self.pieces if kind == NORMAL}
        texts = {self.vocab[i] for i in used} & normal.keys()
        texts |= set("".join(texts)) | {min(normal, key=normal.get), max(normal, key=normal.get)}
        pieces = [piece for piece in self.pieces if piece[0] in texts or piece[2] not in (NORMAL, UNUSED)]
        kept = {text for text, _, _ in pieces}.union(self.vocab[len(self.pieces) :])
        ids = [i for i, token in enumerate(self.vocab) if token in kept]
        files = unigram_files.cut(self.files, {self.vocab[i]: new for new, i in enumerate(ids)})
        shape = self.special, self.added, self.max_length, self.pair_separators
        return Unigram(pieces, self.charsmap, *shape, files), ids

    @property
    def digest(self):
        """SHA-256 of everything that affects ids: pieces, scores, the table of characters, special and added tokens."""
        state = json.dumps([self.special, [dataclasses.astuple(token) for token in self.added]])
        return hashlib.sha256(self._model + state.encode()).hexdigest()

    @property
    def hub_ids(self):
        """The ids that config.json has for this vocabulary."""
        return {"bos_token_id": self.cls_id, "eos_token_id": self.sep_id}

    def encode_documents(self, texts):
        """Returns the ids of all texts in one uint32 array, with `sep` after each text that has ids."""
        if self.added:
            return super().encode_documents(texts)
        ids = array.array("I")
        for document in self._processor.encode(list(map(_utf8, texts)), num_threads=1):
            if document:
                ids.extend(document)
                ids.append(self.sep_id)
        return np.frombuffer(ids, np.uint32)

    def encode_with_offsets(self, text):
        """Returns `encode(text)` with character offsets: (ids, starts, ends), three lists of equal length.

        text[starts[i] : ends[i]] is piece i in the original text, without white space. Pieces of one character ("½" is
        three) have the same offsets; those of a mark of a word's start on its own are empty, before the word.
        """
        located = []
        for token, start, end in self._raw.split(text) if self.added else [(None, 0, len(text))]:
            located += [(token, start, end)] if token is not None else self._locate(text[start:end], start)
        return tuple(map(list, zip(*located, strict=True))) or ([], [], [])

    def _locate(self, text, offset):
        """Yields (id, start, end) of each piece of a text at `offset` without added tokens."""
        data = _utf8(text)
        places = np.cumsum((np.frombuffer(data + b"a", np.uint8) & 0xC0) != 0x80) - 1  # byte -> character
        answer = self._processor.encode(data, out_type="serialized_proto")
        for piece in (value for number, _, value in protobuf.fields(answer) if number == 2):
            values = {number: value for number, _, value in protobuf.fields(piece)}
            start, end = (int(places[values.get(number, 0)]) for number in (4, 5))
            while start < end and self._blank[ord(text[start])]:
                start += 1
            while start < end and self._blank[ord(text[end - 1])]:
                end -= 1
            if values[1] != _MARK and start == end:  # the library gives a character to the last of its pieces
                end = min(start + 1, len(text))
            yield values.get(2, 0), offset + start, offset + end

    def encode_prompt(self, text):
        """Returns cls text sep as ids (a list); special tokens in the text, such as <mask>, keep their meaning."""
        ids = b"".join(self._encode_parts(text, self._prompt))
        return [self.cls_id, *memoryview(ids).cast("I").tolist(), self.sep_id]

    def decode(self, ids):
        """Returns readable text: pieces joined, a space for each mark of a word's start but the first."""
        return "".join(self.vocab[i] for i in ids).replace(WORD_START, " ").removeprefix(" ")

    def appended(self, text, i):
        """Returns a text with one token more, in place of a <mask>, which took the white space before it."""
        return text.rstrip() + self.vocab[i].replace(WORD_START, " ")

    def _encode_plain(self, text):
        """The ids of text without added tokens as the bytes of uint32."""
        return array.array("I", self._processor.encode(_utf8(text))).tobytes()


_MARK = WORD_START.encode()


def _utf8(text):
    """The bytes of a text, in which half a surrogate pair becomes U+FFFD, as damaged UTF-8 does."""
    try:
        return text.encode()
    except UnicodeEncodeError:
        return _SURROGATES.sub("\ufffd", text).encode()
