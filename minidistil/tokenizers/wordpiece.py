"""WordPiece with exactly the ids of Hugging Face's fast BERT tokenizer, in plain Python and faster.

    text -> clean -> space around CJK -> strip accents -> lower case -> split at spaces and punctuation -> pieces

    BERT       Devlin et al. 2018, arXiv 1810.04805; first implementation: google-research/bert, tokenization.py
    WordPiece  Wu et al. 2016, arXiv 1609.08144, section 4.1; here greedy longest-match-first

Implementations differ in rare Unicode characters. The reference is the Rust crate `tokenizers` (here 0.23.3), because
most of today's checkpoints were trained with it. Its Unicode tables are older than Python's in three respects and newer
in one. The exceptions below come from a comparison of all code points, for Unicode 13 (Python 3.10) to 18.

A cache makes it fast: most chunks of a text occurred before and cost one look-up and one copy.
"""

import array
import dataclasses
import hashlib
import json
import pathlib
import re
import unicodedata

from minidistil.errors import UserError
from minidistil.files import write_json, write_text
from minidistil.tokenizers import wordpiece_files
from minidistil.tokenizers.added_tokens import Matcher
from minidistil.tokenizers.base import BaseTokenizer
from minidistil.tokenizers.caches import CACHE_ENTRIES, Cache, Table
from minidistil.tokenizers.code_points import characters
from minidistil.tokenizers.wordpiece_files import LONGEST_WORD, SPECIAL_TOKENS

CASED = 0.1  # share of words with capitals above which a vocabulary is cased; bert-base-cased has 0.31

_NO_SPACE_BEFORE = (".", "?", "!", ",", "n't", "'m", "'s", "'ve", "'re")  # in decoded text

# str.split() splits at these control characters, BERT drops them: "a\x0bb" is one word
_FALSE_SPACES = "\x0b\x0c\x1c\x1d\x1e\x1f\x85"
_CHUNK = re.compile(f"[\\S{_FALSE_SPACES}]+")  # what str.split() yields, with the false spaces inside
_ASCII_WORD = re.compile("[0-9A-Za-z]+|[^ ]")  # in printable ASCII all but letters and digits are punctuation


# the blocks of Google's tokenization.py, except that extension E starts at 2B920 instead of 2B820
_CJK = characters("3400-4DBF 4E00-9FFF F900-FAFF 20000-2A6DF 2A700-2B81F 2B920-2CEAF 2F800-2FA1F")

# Categories as of Unicode 8. No code point in the ranges of _NOT_MARK was a mark (Mn) then, though some are today.
# Other code points in a range do not matter, so neighbouring exceptions share one. The same holds for the next one.
_NOT_MARK = characters(
    "5C8-5C9 7FD 897-8E1 9FE AFA-AFF B53-B55 C04-C3C D00 D3B-D3C D81 EBA ECE 180F-1886 1ABF-1AF0 1DF6-1DFB A82C A8C5 "
    "A8FF A9BD 10D24-10F85 11070-11074 110C2 111C9 111CF 1123E-11241 1133B 113BB-1145E 1182F-1612F 16F4F 16FE4 "
    "1CF00-1D128 1D25B-1D25C 1E000-1E6F5 1E944-1E94A"
)
_NOT_PUNCTUATION = characters(
    "61D 9FD-A76 C77-C84 1B4E-1B4F 1B7D-1B7F 2E43-2E63 10D6E-10F89 113D4-1145D 11660-116B9 1183B-11FFF 12FF1-12FF2 "
    "16D6D-16FE2 1E5FF-1E95F"
)
_NOT_CONTROL = characters("890-8E2 110CD-1343F")
_STILL_MARK = "\u1734\U0001171e"  # today Mc
_STILL_PUNCTUATION = "\u166d\U000111c9"  # today So and Mn

# Decomposition as of Unicode 12: applied to the runs between newer characters, across which no mark moves.
_DECOMPOSED = characters(
    "5C8-5C9 7FD 897-8D3 9FE C3C D3B-D3C EBA 1715 1ABF-1AF0 1DF6-1DFA A82C 105C9-105E4 10D24-10F85 11070 1133B "
    "11383-113D0 1145E 11839-11A99 11D42-1612F 16D68-16FF1 1D127-1D128 1D250-1D281 1E08F-1E6F5",
    form="[^%s]+",
)

# Lower case as of Unicode 17: capitals that Unicode 13 lacks, and the distance to their lower-case letters.
_LOWER = {
    chr(code): chr(code + distance)
    for distance, capitals in {
        1: "1C89 A7C0 A7CC A7CE A7D0 A7D2 A7D4 A7D6 A7D8 A7DA",
        27: "16EA0-16EB8",
        32: "10D50-10D65",
        39: "10570-1057A 1057C-1058A 1058C-10592 10594-10595",
        48: "2C2F",
        0x264 - 0xA7CB: "A7CB",
        0x19B - 0xA7DC: "A7DC",
    }.items()
    for first, _, last in (part.partition("-") for part in capitals.split())
    for code in range(int(first, 16), int(last or first, 16) + 1)
}


class WordPiece(BaseTokenizer):
    """A WordPiece vocabulary with its normalisation.

    vocab: tokens in the order of their ids. lowercase, strip_accents (None: as lowercase) and chinese (space around CJK
    characters) affect the ids; max_length is the longest sequence of the model. added: AddedTokens; those that the
    vocabulary lacks follow its last id. Raises UserError where the vocabulary lacks a special token or repeats it. For
    any other duplicate the last line applies, as in other implementations.
    """

    def __init__(self, vocab, lowercase=True, strip_accents=None, chinese=True, max_length=512, added=()):
        self.base = list(vocab)  # the entries that WordPiece makes
        self.vocab = self.base + [token.content for token in added if token.content not in set(self.base)]
        self.ids = {token: i for i, token in enumerate(self.vocab)}
        self.added = sorted(added, key=lambda token: self.ids[token.content])
        for token in SPECIAL_TOKENS.values():
            if (count := self.vocab.count(token)) != 1:
                problem = f"the vocabulary has {token} {count} times" if count else f"the vocabulary has no {token}"
                raise UserError(
                    f"{problem}: use a BERT model's vocab.txt, one made by data/vocab.py, or the folder of a tokenizer"
                )
        self.set_special(SPECIAL_TOKENS)
        self.lowercase = bool(lowercase)
        self.strip_accents = bool(lowercase if strip_accents is None else strip_accents)
        self.chinese = bool(chinese)
        self.max_length = max_length
        ids = {token: i for i, token in enumerate(self.base)}
        self._first = {token: i for token, i in ids.items() if len(token) <= LONGEST_WORD}
        self._later = {token[2:]: i for token, i in ids.items() if token.startswith("##")}
        self._longest = max(map(len, self.vocab))
        self._clean = Table(self._clean_character)
        self._fold = Table(self._fold_character)
        self._unspaced = Table(self._fold_without_spaces)
        raw = [(token.content, self.ids[token.content], token.single_word) for token in self._matched(False)]
        special = [(token, self.ids[token], False) for token in SPECIAL_TOKENS.values()]
        self._raw, self._prompt = Matcher(raw), Matcher(special + raw)
        self._normalised = Matcher(
            (self._normalise(token.content, self._unspaced), self.ids[token.content], token.single_word)
            for token in self._matched(True)
        )
        self._cache = Cache(self._pack, CACHE_ENTRIES)  # chunk -> its ids as the bytes of uint32
        self._located = Cache(self._locate, CACHE_ENTRIES // 4)  # chunk -> its pieces: heavier entries

    def __reduce__(self):  # a worker process starts with an empty cache
        return WordPiece, (self.base, self.lowercase, self.strip_accents, self.chinese, self.max_length, self.added)

    def _matched(self, normalized):
        return [token for token in self.added if token.normalized == normalized]

    @classmethod
    def load(cls, path):
        """Reads a vocabulary file, or a model's folder: vocab.txt or tokenizer.json, and what stands beside them.

        A file named vocab.txt or tokenizer.json stands for its folder. As in transformers, the tokenizer's class
        decides where settings come from: tokenizer_config.json for BertTokenizer, else tokenizer.json. With a
        vocabulary alone, text is lowercased unless a tenth of its words have capitals. Raises UserError where a file is
        missing, damaged, contradicts another or is not BERT's.
        """
        path = pathlib.Path(path)
        if not path.exists():
            raise UserError(f"there is no {path}: name a vocab.txt or a folder that holds one")
        named = path.name in ("vocab.txt", "tokenizer.json")  # which stand for their folder
        folder = path if path.is_dir() else path.parent if named else None
        settings = {}
        if folder is None:
            vocab = wordpiece_files.read_vocab(path)
        else:
            path, vocab, settings = wordpiece_files.read_folder(folder)
        if all(token.content in vocab for token in settings.get("added", ())):  # no token has an id after them
            vocab = "\n".join(vocab).rstrip("\n").split("\n")  # without blank lines at the end of the file
        words = [token for token in vocab if not token.startswith("[") and token.lower() != token.upper()]
        capitals = sum(token != token.lower() for token in words)
        try:
            return cls(vocab, **{"lowercase": capitals <= CASED * len(words)} | settings)
        except UserError as error:
            raise UserError(f"{path}: {error}") from None

    def save(self, folder, family="bert"):
        """Writes vocab.txt, tokenizer_config.json, special_tokens_map.json and tokenizer.json for transformers.

        `family` is the model's; a DistilBERT's tokenizer gives no token_type_ids, which its model rejects, and a
        GPT-2's none either, nor [CLS] and [SEP] around a text, which is to be continued.
        """
        folder, causal = pathlib.Path(folder), family == "gpt2"
        kinds = {"gpt2": "PreTrainedTokenizerFast", "distilbert": "DistilBertTokenizer"}
        special = {f"{name}_token": token for name, token in SPECIAL_TOKENS.items()}
        strip_accents = None if self.strip_accents == self.lowercase else self.strip_accents
        config = {
            "tokenizer_class": kinds.get(family, "BertTokenizer"),
            **({"model_input_names": ["input_ids", "attention_mask"]} if causal else {}),
            "do_lower_case": self.lowercase, "strip_accents": strip_accents, "tokenize_chinese_chars": self.chinese,
            "model_max_length": self.max_length, **special,
        }  # fmt: skip
        if self.added:
            added = wordpiece_files.added_tokens_json(self)
            config["added_tokens_decoder"] = {token.pop("id"): token for token in added}
        write_text(folder / "vocab.txt", "".join(token + "\n" for token in self.base))
        write_json(folder / "tokenizer_config.json", config)
        write_json(folder / "special_tokens_map.json", special)
        write_json(folder / "tokenizer.json", wordpiece_files.tokenizer_json(self, strip_accents, causal))

    @property
    def digest(self):
        """SHA-256 of everything that affects ids: vocabulary, lowercase, strip_accents, chinese, added tokens."""
        state = [self.base, self.lowercase, self.strip_accents, self.chinese]
        if self.added:
            state.append([dataclasses.astuple(token) for token in self.added])
        return hashlib.sha256(json.dumps(state).encode()).hexdigest()

    def encode_with_offsets(self, text):
        """Returns `encode(text)` with character offsets: (ids, starts, ends), three lists of equal length.

        text[starts[i] : ends[i]] is piece i in the original text, with its capitals and precomposed accents. A
        character that normalisation drops, such as a combining accent, belongs to a piece only inside it; several
        pieces of one character ("한" is three) have the same offsets.
        """
        located = []
        for token, start, end in self._raw.split(text) if self.added else [(None, 0, len(text))]:
            if token is not None:
                located.append((token, start, end))
            elif not self._normalised.tokens:
                located += self._locate_plain(text[start:end], start)
            else:
                located += self._locate_normalised(text[start:end], start)
        return tuple(map(list, zip(*located, strict=True))) or ([], [], [])

    def _locate_plain(self, text, offset):
        """Yields (id, start, end) of each piece of a text at `offset` without added tokens."""
        for chunk in _CHUNK.finditer(text):
            place = offset + chunk.start()
            for i, start, end in self._located[chunk[0]]:
                yield i, place + start, place + end

    def _locate_normalised(self, text, offset):
        """Yields (id, start, end) of each piece of a text at `offset` in which added tokens may be normalised."""
        normal, places = self._spread(text, self._unspaced)
        for token, start, end in self._normalised.split(normal):
            part = [(token, start, end)] if token is not None else self._locate_plain(normal[start:end], start)
            for i, first, last in part:
                yield i, offset + places[first], offset + places[last - 1] + 1

    def encode_prompt(self, text):
        """Returns [CLS] text [SEP] as ids (a list); special tokens in the text, such as [MASK], keep their meaning."""
        ids = b"".join(self._encode_parts(text, self._prompt))
        return [self.cls_id, *memoryview(ids).cast("I").tolist(), self.sep_id]

    def decode(self, ids):
        """Returns readable text: pieces joined, no space before closing punctuation."""
        parts = []
        for token in (self.vocab[i] for i in ids):
            if parts and token.startswith("##"):
                token = token[2:]
            elif parts and not token.startswith(_NO_SPACE_BEFORE):
                token = " " + token
            parts.append(token)
        return "".join(parts)

    def appended(self, text, i):
        """Returns a text with one token more."""
        token = self.vocab[i]
        return text.rstrip() + token[2:] if token.startswith("##") else text + token

    def _encode_parts(self, text, matcher):
        """Yields the ids of a text in which `matcher` finds tokens, part by part, as the bytes of uint32."""
        for token, start, end in matcher.split(text):
            if token is not None:
                yield array.array("I", [token]).tobytes()
            elif not self._normalised.tokens:
                yield self._encode_plain(text[start:end])
            else:
                normal = self._normalise(text[start:end], self._unspaced)
                for token, start, end in self._normalised.split(normal):
                    plain = token is None
                    yield self._encode_plain(normal[start:end]) if plain else array.array("I", [token]).tobytes()

    def _encode_plain(self, text):
        """The ids of text without added tokens as the bytes of uint32."""
        if any(map(text.__contains__, _FALSE_SPACES)):
            text = text.translate(dict.fromkeys(map(ord, _FALSE_SPACES)))
        return b"".join(map(self._cache.__getitem__, text.split()))

    def _pack(self, chunk):
        """Returns the ids of text without spaces as the bytes of uint32."""
        ids = []
        for word in self._words(chunk):
            if (i := self._first.get(word)) is not None:
                ids.append(i)
            else:
                ids += self._pieces(word)
        return array.array("I", ids).tobytes()

    def _locate(self, chunk):
        """(id, start, end) of each piece of text without spaces: normalised one character at a time."""
        normal, places = self._spread(chunk, self._fold)
        if normal.split() != self._words(chunk):
            # NFD reordered two marks that stripping keeps, such as U+302E and U+1B44: too rare to trace
            return [(i, 0, len(chunk)) for i in self.encode(chunk)]
        located = []
        for word in re.finditer(r"\S+", normal):
            at = word.start()
            for i in self._pieces(word[0]):
                size = len(word[0]) if i == self.unk_id else len(self.vocab[i]) - 2 * (at > word.start())  # without ##
                located.append((i, places[at], places[at + size - 1] + 1))
                at += size
        return located

    def _spread(self, text, fold):
        """Text normalised one character at a time, and the place in the text of each normalised character."""
        normal, places = [], []
        for place, character in enumerate(text):
            new = self._normalise(character, fold)
            normal.append(new)
            places += [place] * len(new)
        return "".join(normal), places

    def _words(self, text):
        """Returns the normalised words of plain text; each punctuation mark and each CJK character is a word."""
        if text.isascii() and text.isprintable():
            return _ASCII_WORD.findall(text.lower() if self.lowercase else text)
        return self._normalise(text, self._fold).split()

    def _normalise(self, text, fold):
        """Plain text after both passes, with spaces between words if `fold` puts them around punctuation."""
        text = text.translate(self._clean)
        if self.strip_accents:
            text = _DECOMPOSED.sub(lambda run: unicodedata.normalize("NFD", run[0]), text)
        return text.translate(fold)

    def _clean_character(self, c):
        """First pass: no control characters, plain spaces, space around CJK."""
        if c.isspace() and c not in _FALSE_SPACES:
            return " "
        category = unicodedata.category(c)  # a lone surrogate (Cs) cannot come from UTF-8; dropped like U+FFFD
        if c in "\0\ufffd" or (category in ("Cc", "Cf", "Co", "Cs") and not _NOT_CONTROL.match(c)):
            return ""
        return f" {c} " if self.chinese and _CJK.match(c) else c

    def _fold_character(self, c):
        """Second pass, after decomposition: no marks, lower case, space around punctuation."""
        category = unicodedata.category(c)
        if self.strip_accents and (c in _STILL_MARK or (category == "Mn" and not _NOT_MARK.match(c))):
            return ""
        if c in _STILL_PUNCTUATION or (category[0] == "P" and not _NOT_PUNCTUATION.match(c)) or c in "$+<=>^`|~":
            return f" {c} "
        # character by character: str.lower() would turn the last letter of "ΟΔΟΣ" into a final sigma
        return (_LOWER.get(c) or c.lower()) if self.lowercase else c

    def _fold_without_spaces(self, c):
        """Second pass without space around punctuation: the text in which normalised added tokens are matched."""
        folded = self._fold_character(c)
        return c if folded == f" {c} " else folded

    def _pieces(self, word):
        """Returns the ids of a word's pieces, each the longest match; [UNK] for the word if a rest has none."""
        if len(word) > LONGEST_WORD:
            return [self.unk_id]
        ids, table = [], self._first
        while word:
            piece = word[: self._longest]
            while piece and piece not in table:
                piece = piece[:-1]
            if not piece:
                return [self.unk_id]
            ids.append(table[piece])
            word, table = word[len(piece) :], self._later
        return ids
