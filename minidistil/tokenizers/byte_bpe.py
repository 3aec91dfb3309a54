"""Byte-level BPE with exactly the ids of Hugging Face's fast GPT-2 and RoBERTa tokenizers, in plain Python and faster.

    text -> chunks at white space -> words: letters, digits or others, with the space before them -> bytes -> merges

    GPT-2  Radford et al. 2019, section 2.2, on bytes
    BPE    Sennrich et al. 2016, arXiv 1508.07909, algorithm 1

The files spell each byte as one printable character. Nothing is unknown, and ids give the text back to the byte.

The reference is the Rust crate `tokenizers` (here 0.23.3), whose letters and numbers are those of Unicode 16. The
exceptions below come from a comparison of all code points, for Unicode 13 (Python 3.10) to 15.1 (Python 3.13).

As in WordPiece, a cache makes it fast: most chunks of a text occurred before and cost one look-up and one copy.
"""

import array
import dataclasses
import hashlib
import heapq
import json
import pathlib
import re
import unicodedata

from minidistil.errors import UserError
from minidistil.tokenizers import byte_bpe_files
from minidistil.tokenizers.added_tokens import AddedToken, Matcher
from minidistil.tokenizers.base import BaseTokenizer
from minidistil.tokenizers.byte_bpe_files import BYTES, END_OF_TEXT, ROBERTA
from minidistil.tokenizers.caches import CACHE_ENTRIES, Cache, Table
from minidistil.tokenizers.code_points import characters

SHORT_WORD = 64  # bytes; up to here, looking for the earliest merge in all of the word is faster than sorting merges

# Unicode's White_Space; Python's \s has U+001C to U+001F, too
WHITE = "\t\n\v\f\r \x85\xa0\u1680\u2000\u2001\u2002\u2003\u2004\u2005\u2006\u2007\u2008\u2009\u200a\u2028\u2029\u202f"
WHITE += "\u205f\u3000"
_VISIBLE = str.maketrans({" ": "\u2423", "\n": "\u21b5", "\t": "\u21e5", "\r": "\u240d"})  # in tables
# what is not white with the space before it; white space, whose last character is a chunk of its own before such
_CHUNK = re.compile(f" ?[^{WHITE}]+|[{WHITE}]+(?![^{WHITE}])|[{WHITE}]")
# words of a chunk of ASCII or of classes: ASCII as it is, other letters A, numbers 0, white space a space, the rest !
_WORD = re.compile("'(?:[stmd]|re|ve|ll)| ?[A-Za-z]+| ?[0-9]+| ?[^\t-\r A-Za-z0-9]+|[\t-\r ]+")

# Letters and numbers of Unicode 16 that Unicode 13 lacks. Ranges span what is of the same kind in both.
_NEW_LETTER = characters(
    "870-887 889-88E 8B5-8C9 C5D CDD 170D 171F 1B4C 1C89-1C8A 2C2F-2C5F 9FFD-9FFF A7C0-A7CD A7D0-A7D1 A7D3 A7D5-A7DC "
    "A7F2-A7F4 10570-1057A 1057C-1058A 1058C-10592 10594-10595 10597-105A1 105A3-105B1 105B3-105B9 105BB-105BC "
    "105C0-105F3 10780-10785 10787-107B0 107B2-107BA 10D4A-10D65 10D6F-10D85 10EC2-10EC4 10F70-10F81 11071-11072 11075 "
    "1123F-11240 11380-11389 1138B 1138E 11390-113B5 113B7 113D1 113D3 11740-11746 11AB0-11ABF 11BC0-11BE0 11F02 "
    "11F04-11F10 11F12-11F33 12F90-12FF0 1342F 13441-13446 13460-143FA 16100-1611D 16A70-16ABE 16D40-16D6C 18CFF "
    "1AFF0-1AFF3 1AFF5-1AFFB 1AFFD-1AFFE 1B11F-1B122 1B132 1B155 1DF00-1DF1E 1DF25-1DF2A 1E030-1E06D 1E290-1E2AD "
    "1E4D0-1E4EB 1E5D0-1E5ED 1E5F0 1E7E0-1E7E6 1E7E8-1E7EB 1E7ED-1E7EE 1E7F0-1E7FE 2A6DE-2A6DF 2B735-2B739 2EBF0-2EE5D "
    "31350-323AF"
)
_NEW_NUMBER = characters(
    "10D40-10D49 116D0-116E3 11BF0-11BF9 11F50-11F59 16130-16139 16AC0-16AC9 16D70-16D79 1CCF0-1CCF9 1D2C0-1D2D3 "
    "1E4F0-1E4F9 1E5F1-1E5FA"
)


def _class_of(c):
    """Returns what `_WORD` sees of a character."""
    if c in WHITE:
        return " "
    category = unicodedata.category(c)[0]
    if category == "L" or _NEW_LETTER.match(c):
        return c if c.isascii() else "A"
    if category == "N" or _NEW_NUMBER.match(c):
        return c if c.isascii() else "0"
    return c if c.isascii() else "!"


class ByteBPE(BaseTokenizer):
    """A vocabulary of byte sequences and the merges that make them.

    vocab: tokens in the order of their ids, spelled as in the files; all bytes are among them. merges: pairs of tokens,
    the first is merged first. added: AddedTokens, which may name special tokens; those that the vocabulary lacks follow
    its last id. A vocabulary with <mask> is RoBERTa's. Any other is GPT-2's, whose one special token is `sep`.
    purposes: {"pad_token": "<pad>" ...}, which change no id and are saved for transformers. Raises UserError where a
    special token is missing.
    """

    def __init__(self, vocab, merges, added=(), sep=END_OF_TEXT, max_length=None, purposes=()):
        self.base, self.merges, self.listed = list(vocab), [*map(tuple, merges)], list(added)
        known = set(self.base)
        self.vocab = self.base + [token.content for token in self.listed if token.content not in known]
        self.ids = {token: i for i, token in enumerate(self.vocab)}
        self.masked = ROBERTA["mask"] in self.ids
        special, self.second_type = ROBERTA if self.masked else {"sep": sep}, 0
        self.pair_separators = 2 if self.masked else 1
        for token in special.values():
            if token not in self.ids:
                of = "RoBERTa" if self.masked else "GPT-2"
                raise UserError(f"the vocabulary has no {token}: use the vocab.json and merges.txt of a {of} model")
        self.set_special(special)
        self.purposes = dict(purposes)
        self.max_length = max_length or (512 if self.masked else 1024)
        flags = {token: AddedToken(token, lstrip=token == special.get("mask")) for token in special.values()}
        flags |= {token.content: token for token in self.listed}
        self.tokens = {self.ids[token]: flags[token] for token in sorted(flags, key=self.ids.get)}  # id -> AddedToken
        self.added = [token for token in self.tokens.values() if token.content not in special.values()]
        raw = self._matched(token for token in self.added if not token.normalized)
        self._raw = Matcher(raw)
        self._prompt = Matcher(self._matched(self.tokens[i] for i in self.special_ids) + raw)
        self._normalised = Matcher(self._matched(token for token in self.added if token.normalized))
        self._bytes = [*map(byte_bpe_files.bytes_of, self.base)]  # of each id
        self._bytes += [b""] * (len(self.vocab) - len(self.base))
        for i, token in self.tokens.items():
            self._bytes[i] = token.content.encode("utf-8", "replace")
        self._of_byte = [self.ids[c] for c in sorted(BYTES, key=BYTES.get)]
        # a pair is the number left * V + right; a pair without a rank has the last, len(merges)
        self._pairs = [(self.ids[a], self.ids[b], self.ids[a + b]) for a, b in self.merges]
        self._ranks = {a * len(self.vocab) + b: rank for rank, (a, b, _) in enumerate(self._pairs)}
        self._classes = Table(_class_of)
        self._packed = Cache(self._pack_word, CACHE_ENTRIES // 2)  # word -> the same
        self._cache = Cache(self._pack, CACHE_ENTRIES)  # chunk -> its ids as the bytes of uint32
        self._located = Cache(self._locate, CACHE_ENTRIES // 4)  # chunk -> its pieces: heavier entries

    def __reduce__(self):  # a worker process starts with an empty cache
        return ByteBPE, (self.base, self.merges, self.listed, self.special["sep"], self.max_length, self.purposes)

    def _matched(self, tokens):
        return [(token.content, self.ids[token.content], token.single_word) for token in tokens]

    @classmethod
    def load(cls, path):
        """Reads vocab.json and merges.txt, or tokenizer.json, and what stands beside them.

        `path` is a model's folder or one of its files. Raises UserError where a file is missing, damaged, contradicts
        another or asks for another tokenizer.
        """
        path = pathlib.Path(path)
        path, vocab, merges, settings = byte_bpe_files.read_folder(path if path.is_dir() else path.parent)
        try:
            return cls(vocab, merges, **settings)
        except UserError as error:
            raise UserError(f"{path}: {error}") from None

    def save(self, folder, family="gpt2"):
        """Writes vocab.json, merges.txt and three files of settings for transformers, whatever the model's family."""
        byte_bpe_files.write_folder(pathlib.Path(folder), self)

    @property
    def hub_ids(self):
        """The ids that a model's config.json names: where transformers begins and ends generated text."""
        return {"bos_token_id": self.cls_id if self.masked else self.sep_id, "eos_token_id": self.sep_id}

    @property
    def digest(self):
        """SHA-256 of everything that affects ids: vocabulary, merges, special and added tokens."""
        state = [self.base, self.merges, self.special, [dataclasses.astuple(token) for token in self.tokens.values()]]
        return hashlib.sha256(json.dumps(state).encode()).hexdigest()

    def encode_with_offsets(self, text):
        """Returns `encode(text)` with character offsets: (ids, starts, ends), three lists of equal length.

        text[starts[i] : ends[i]] is piece i without the spaces at its ends; a piece of spaces alone is empty. Pieces
        inside one character have the same offsets.
        """
        located = []
        for token, start, end in self._find(text, self._raw) if self.added else [(None, 0, len(text))]:
            if token is not None:
                located.append((token, start, end))
                continue
            for chunk in _CHUNK.finditer(text, start, end):
                place = chunk.start()
                located += [(i, place + start, place + end) for i, start, end in self._located[chunk[0]]]
        return tuple(map(list, zip(*located, strict=True))) or ([], [], [])

    def encode_prompt(self, text):
        """Returns the ids (a list) of a text as a model reads it; special tokens in the text keep their meaning.

        RoBERTa's are <s> text </s>; <mask> takes the white space before it. GPT-2's begin with `sep`: in training, a
        document begins after the end of another, so that the first word has something to follow from.
        """
        ids = memoryview(b"".join(self._encode_parts(text, self._prompt))).cast("I").tolist()
        return [self.cls_id, *ids, self.sep_id] if self.masked else [self.sep_id, *ids]

    def decode(self, ids):
        """Returns the text; bytes that are no UTF-8, such as half a character, become U+FFFD."""
        return b"".join(self._bytes[i] for i in ids).decode("utf-8", "replace")

    def shown(self, i):
        """Returns how a table shows a token: with visible white space, or as the files spell it."""
        text = self.decode([i])
        return self.vocab[i] if "\ufffd" in text else text.translate(_VISIBLE)

    def appended(self, text, i):
        """Returns a text with one token more, in place of a <mask>, which took the white space before it."""
        return text.rstrip(WHITE) + self.decode([i])

    @staticmethod
    def chunks(text):
        """Returns the parts of a text, cut where white space begins or ends."""
        return _CHUNK.findall(text)

    def words(self, chunk):
        """Returns the words of a chunk, which no merge crosses."""
        if chunk.isascii():
            return _WORD.findall(chunk)
        return [chunk[slice(*word.span())] for word in _WORD.finditer(chunk.translate(self._classes))]

    def _encode(self, text):
        """The ids of plain text as the bytes of uint32."""
        if self.added:
            return b"".join(self._encode_parts(text, self._raw))
        return b"".join(map(self._cache.__getitem__, self.chunks(text)))

    def _encode_parts(self, text, matcher):
        """Yields the ids of a text in which `matcher` finds tokens, part by part, as the bytes of uint32."""
        for token, start, end in self._find(text, matcher):
            if token is not None:
                yield array.array("I", [token]).tobytes()
            else:
                yield from map(self._cache.__getitem__, self.chunks(text[start:end]))

    def _find(self, text, matcher):
        """Yields (id, start, end) of the tokens of `matcher`, then `_normalised`, and of text between them (None)."""
        for token, start, end in self._stripped(text, matcher):
            if token is not None or not self._normalised.tokens:
                yield token, start, end
            else:
                for inner, first, last in self._stripped(text[start:end], self._normalised):
                    yield inner, start + first, start + last

    def _stripped(self, text, matcher):
        """Yields the parts of a text, those between tokens without the white space that the tokens take along."""
        parts = [(None, 0, 0), *matcher.split(text), (None, 0, 0)]
        for (before, *_), (token, start, end), (after, *_) in zip(parts, parts[1:], parts[2:], strict=False):
            if token is None:
                if before is not None and self.tokens[before].rstrip:
                    start = end - len(text[start:end].lstrip(WHITE))
                if after is not None and self.tokens[after].lstrip:
                    end = start + len(text[start:end].rstrip(WHITE))
            if start < end:
                yield token, start, end

    def _pack(self, chunk):
        """The ids of a chunk as the bytes of uint32."""
        return b"".join([self._packed[word] for word in self.words(chunk)])

    def _pack_word(self, word):
        """The ids of a word as the bytes of uint32."""
        ids = [self._of_byte[byte] for byte in word.encode("utf-8", "replace")]
        return array.array("I", self._merge(ids) if len(ids) <= SHORT_WORD else self._merge_long(ids)).tobytes()

    def _locate(self, chunk):
        """(id, start, end) of each piece of a chunk."""
        located, at = [], 0
        owner = [place for place, c in enumerate(chunk) for _ in c.encode("utf-8", "replace")]  # of each byte
        for i in memoryview(self._pack(chunk)).cast("I"):
            piece = self._bytes[i]
            start, end = owner[at], owner[at + len(piece) - 1] + 1
            at += len(piece)
            start = min(start + len(piece) - len(piece.lstrip(b" ")), end)
            located.append((i, start, max(end - len(piece) + len(piece.rstrip(b" ")), start)))
        return located

    def _merge(self, ids):
        """ids of bytes -> ids of tokens: always the earliest merge, its leftmost place first; changes `ids`."""
        V, last, rank_of = len(self.vocab), len(self.merges), self._ranks.get
        ranks = [rank_of(left * V + right, last) for left, right in zip(ids, ids[1:], strict=False)]
        while ranks and (rank := min(ranks)) < last:
            i = ranks.index(rank)
            ids[i : i + 2] = [self._pairs[rank][2]]
            del ranks[i]
            if i > 0:
                ranks[i - 1] = rank_of(ids[i - 1] * V + ids[i], last)
            if i < len(ranks):
                ranks[i] = rank_of(ids[i] * V + ids[i + 1], last)
        return ids

    def _merge_long(self, ids):
        """The same in O(n log n): the places of each merge are sorted once, and a heap holds the merges."""
        n, V, rank_of = len(ids), len(self.vocab), self._ranks.get
        after, before = list(range(1, n + 1)), list(range(-1, n - 1))  # neighbours that are left; n and -1: none
        places = {}  # rank -> where its pair stood when it arose
        for i, pair in enumerate(left * V + right for left, right in zip(ids, ids[1:], strict=False)):
            if (rank := rank_of(pair)) is not None:
                places.setdefault(rank, []).append(i)
        waiting = sorted(places)  # a heap
        while waiting:
            rank = heapq.heappop(waiting)
            left, right, both = self._pairs[rank]
            todo = sorted(places.pop(rank))
            for done, i in enumerate(todo):
                j = after[i]
                if ids[i] != left or j == n or ids[j] != right:
                    continue  # one of the two has merged with another
                k, h = after[j], before[i]
                ids[i], ids[j], after[i] = both, -1, k
                if k < n:
                    before[k] = i
                    self._offer(places, waiting, rank_of(both * V + ids[k]), i)
                if h >= 0:
                    self._offer(places, waiting, rank_of(ids[h] * V + both), h)
                if waiting and waiting[0] < rank:  # a merge of the result that comes before it
                    places[rank] = todo[done + 1 :]
                    heapq.heappush(waiting, rank)
                    break
        return [i for i in ids if i >= 0]

    @staticmethod
    def _offer(places, waiting, rank, i):
        """Adds the place of a new pair with this rank, if it has one."""
        if rank is not None:
            if rank not in places:
                heapq.heappush(waiting, rank)
                places[rank] = []
            places[rank].append(i)
