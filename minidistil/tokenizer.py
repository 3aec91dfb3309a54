"""WordPiece, exactly as the world uses it: the ids of Hugging Face's fast BERT tokenizer, in plain Python and faster.

    text -> clean -> space around CJK -> strip accents -> lower case -> split at spaces and punctuation -> pieces

    BERT       Devlin et al. 2018, arXiv 1810.04805; the first code is google-research/bert, tokenization.py
    WordPiece  Wu et al. 2016, arXiv 1609.08144, section 4.1; applied as the greedy longest match first

Implementations differ in the corners of Unicode. The one to match is the Rust crate `tokenizers` (here 0.23.3), which
fed most of today's checkpoints. Its tables of Unicode are older than Python's in three ways and newer in one; the
exceptions below were found by comparing all code points, and are written so that they hold from Unicode 13
(Python 3.10) to Unicode 18.

Speed comes from a cache: most chunks of a text have been seen before, and then cost one look-up and one copy.
"""

import array
import hashlib
import json
import pathlib
import re
import unicodedata

import numpy as np

from minidistil.errors import UserError
from minidistil.files import write_json, write_text

SPECIAL_TOKENS = {"pad": "[PAD]", "unk": "[UNK]", "cls": "[CLS]", "sep": "[SEP]", "mask": "[MASK]"}
LONGEST_WORD = 100  # characters, after normalisation; a longer word is [UNK]
CACHE_ENTRIES = 2**19  # 90 MB when full of words; IMDb, 33 million characters, has 281 thousand different chunks
CACHED_LENGTH = 32  # characters; a longer chunk hardly comes twice, and the cache must stay small on any text

_SPECIAL_TOKEN = re.compile("(" + "|".join(map(re.escape, SPECIAL_TOKENS.values())) + ")")
_NO_SPACE_BEFORE = (".", "?", "!", ",", "n't", "'m", "'s", "'ve", "'re")  # in decoded text

# str.split() breaks at these control characters, BERT drops them: "a\x0bb" is one word
_FALSE_SPACES = "\x0b\x0c\x1c\x1d\x1e\x1f\x85"
_CHUNK = re.compile(f"[\\S{_FALSE_SPACES}]+")  # what str.split() yields, and the false spaces inside
_ASCII_WORD = re.compile("[0-9A-Za-z]+|[^ ]")  # of printable ASCII: what is neither letter nor digit is punctuation


def _characters(ranges, form="[%s]"):
    """A pattern for one character out of hexadecimal ranges."""
    return re.compile(form % re.sub("[0-9A-F]+ ?", lambda code: f"\\U{code[0].strip():0>8}", ranges))


# the blocks of Google's tokenization.py, but extension E from 2B920 where Google has 2B820
_CJK = _characters("3400-4DBF 4E00-9FFF F900-FAFF 20000-2A6DF 2A700-2B81F 2B920-2CEAF 2F800-2FA1F")

# Categories as of Unicode 8. In the ranges of _NOT_MARK no code point was a mark (Mn) then, though some are today; what
# else lies in a range does not matter, so neighbouring exceptions share one. Likewise for the next two.
_NOT_MARK = _characters(
    "5C8-5C9 7FD 897-8E1 9FE AFA-AFF B53-B55 C04-C3C D00 D3B-D3C D81 EBA ECE 180F-1886 1ABF-1AF0 1DF6-1DFB A82C A8C5 "
    "A8FF A9BD 10D24-10F85 11070-11074 110C2 111C9 111CF 1123E-11241 1133B 113BB-1145E 1182F-1612F 16F4F 16FE4 "
    "1CF00-1D128 1D25B-1D25C 1E000-1E6F5 1E944-1E94A"
)
_NOT_PUNCTUATION = _characters(
    "61D 9FD-A76 C77-C84 1B4E-1B4F 1B7D-1B7F 2E43-2E63 10D6E-10F89 113D4-1145D 11660-116B9 1183B-11FFF 12FF1-12FF2 "
    "16D6D-16FE2 1E5FF-1E95F"
)
_NOT_CONTROL = _characters("890-8E2 110CD-1343F")
_STILL_MARK = "\u1734\U0001171e"  # today Mc
_STILL_PUNCTUATION = "\u166d\U000111c9"  # today So and Mn

# Decomposition as of Unicode 12: it happens in the runs between newer characters, which no mark moves across.
_DECOMPOSED = _characters(
    "5C8-5C9 7FD 897-8D3 9FE C3C D3B-D3C EBA 1715 1ABF-1AF0 1DF6-1DFA A82C 105C9-105E4 10D24-10F85 11070 1133B "
    "11383-113D0 1145E 11839-11A99 11D42-1612F 16D68-16FF1 1D127-1D128 1D250-1D281 1E08F-1E6F5",
    form="[^%s]+",
)

# Lower case as of Unicode 17: the capitals that Unicode 13 did not know, and the distance to their small letters.
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


class _Table(dict):
    """A `str.translate` table that asks `replace(character)` once for each character it meets."""

    def __init__(self, replace):
        self.replace = replace

    def __missing__(self, code):
        self[code] = replacement = self.replace(chr(code))
        return replacement


class _Cache(dict):
    """chunk -> compute(chunk), of bounded size: the younger half, once full, takes the place of the older."""

    def __init__(self, compute, entries):
        self.compute, self.half, self.older = compute, entries // 2, {}

    def __missing__(self, chunk):
        value = self.older.get(chunk)
        if value is None:
            value = self.compute(chunk)
        if len(chunk) <= CACHED_LENGTH:
            if len(self) >= self.half:
                self.older = dict(self)
                self.clear()
            self[chunk] = value
        return value


class Tokenizer:
    """A WordPiece vocabulary and the normalisation that belongs to it.

    vocab: tokens in the order of their ids. lowercase, strip_accents (None: as lowercase) and chinese (space around CJK
    characters) change ids; max_length is what the model can read. Raises UserError where the vocabulary lacks a
    special token or has it twice. Of any other duplicate the last line counts, as it does elsewhere.
    """

    def __init__(self, vocab, lowercase=True, strip_accents=None, chinese=True, max_length=512):
        self.vocab = list(vocab)
        self.ids = {token: i for i, token in enumerate(self.vocab)}
        for name, token in SPECIAL_TOKENS.items():
            count = self.vocab.count(token)
            if count != 1:
                problem = f"the vocabulary has {token} {count} times" if count else f"the vocabulary has no {token}"
                raise UserError(f"{problem}: use the vocab.txt of a BERT model, or one made by data/vocab.py")
            setattr(self, f"{name}_id", self.ids[token])
        self.lowercase = bool(lowercase)
        self.strip_accents = bool(lowercase if strip_accents is None else strip_accents)
        self.chinese = bool(chinese)
        self.max_length = max_length
        self._first = {token: i for token, i in self.ids.items() if len(token) <= LONGEST_WORD}
        self._later = {token[2:]: i for token, i in self.ids.items() if token.startswith("##")}
        self._longest = max(map(len, self.vocab))
        self._clean = _Table(self._clean_character)
        self._fold = _Table(self._fold_character)
        self._cache = _Cache(self._pack, CACHE_ENTRIES)  # chunk -> its ids as the bytes of uint32
        self._located = _Cache(self._locate, CACHE_ENTRIES // 4)  # chunk -> its pieces: heavier entries

    def __reduce__(self):  # a worker process starts with an empty cache
        return Tokenizer, (self.vocab, self.lowercase, self.strip_accents, self.chinese, self.max_length)

    @classmethod
    def load(cls, path):
        """Reads a vocabulary file, or a model's folder: vocab.txt or tokenizer.json, and tokenizer_config.json.

        A file named vocab.txt stands for its folder. Settings come from tokenizer_config.json, else tokenizer.json;
        where neither says so, text is lowercased unless the vocabulary has tokens with capitals.
        Raises UserError where a file is absent, broken, contradicts another or is not BERT's.
        """
        path = pathlib.Path(path)
        if not path.exists():
            raise UserError(f"there is no {path}: name a vocab.txt or a folder that holds one")
        ids, settings = None, {}
        if path.is_dir() or path.name == "vocab.txt":
            folder = path if path.is_dir() else path.parent
            path = folder / "vocab.txt"
            if (folder / "tokenizer.json").exists():
                ids, settings = _read_tokenizer_json(folder / "tokenizer.json")
            if (folder / "tokenizer_config.json").exists():
                settings |= _read_tokenizer_config(folder / "tokenizer_config.json")
        if path.exists():
            vocab = _read(path).removesuffix("\n").split("\n")
            if ids is not None and ids != {token: i for i, token in enumerate(vocab)}:
                raise UserError(f"{path} and tokenizer.json disagree: remove the one that is not the model's")
        elif ids is not None:
            path = folder / "tokenizer.json"
            vocab = sorted(ids, key=ids.get)
            if [ids[token] for token in vocab] != list(range(len(vocab))):
                raise UserError(f"{path}: its ids are not 0, 1, 2, ...: add the model's vocab.txt")
        else:
            raise UserError(f"{folder} holds neither vocab.txt nor tokenizer.json: add the model's vocabulary")
        capitals = any(token != token.lower() for token in vocab if not token.startswith("["))
        try:
            return cls(vocab, **{"lowercase": not capitals} | settings)
        except UserError as error:
            raise UserError(f"{path}: {error}") from None

    def save(self, folder, model_type):
        """Writes vocab.txt, tokenizer_config.json, special_tokens_map.json and tokenizer.json for transformers.

        model_type is "bert" or "distilbert"; a DistilBERT tokenizer makes no token_type_ids, which its model refuses.
        """
        folder = pathlib.Path(folder)
        special = {f"{name}_token": token for name, token in SPECIAL_TOKENS.items()}
        strip_accents = None if self.strip_accents == self.lowercase else self.strip_accents
        config = {
            "tokenizer_class": {"bert": "BertTokenizer", "distilbert": "DistilBertTokenizer"}[model_type],
            "do_lower_case": self.lowercase,
            "strip_accents": strip_accents,
            "tokenize_chinese_chars": self.chinese,
            "model_max_length": self.max_length,
            **special,
        }
        write_text(folder / "vocab.txt", "".join(token + "\n" for token in self.vocab))
        write_json(folder / "tokenizer_config.json", config)
        write_json(folder / "special_tokens_map.json", special)
        write_json(folder / "tokenizer.json", _tokenizer_json(self, strip_accents))

    @property
    def digest(self):
        """SHA-256 of all that decides ids: the vocabulary, lowercase, strip_accents and chinese."""
        decisive = [self.vocab, self.lowercase, self.strip_accents, self.chinese]
        return hashlib.sha256(json.dumps(decisive).encode()).hexdigest()

    def encode(self, text):
        """Returns the ids (a list) of plain text: nothing is added, and a literal "[SEP]" is three tokens."""
        return memoryview(self._encode(text)).cast("I").tolist()

    def encode_with_offsets(self, text):
        """Returns `encode(text)` and where each piece comes from: (ids, starts, ends), three lists of equal length.

        text[starts[i] : ends[i]] is how piece i is written in the text, which is not normalised: with its capitals and
        precomposed accents. What normalisation drops, such as a combining accent, belongs to a piece only inside it;
        pieces of one character ("한" is three) have the same place.
        """
        ids, starts, ends = [], [], []
        for chunk in _CHUNK.finditer(text):
            offset = chunk.start()
            for i, start, end in self._located[chunk[0]]:
                ids.append(i)
                starts.append(offset + start)
                ends.append(offset + end)
        return ids, starts, ends

    def encode_documents(self, texts):
        """Returns the ids of all texts in one uint32 array, each text that has any followed by [SEP]."""
        end = array.array("I", [self.sep_id]).tobytes()
        return np.frombuffer(b"".join(ids + end for ids in map(self._encode, texts) if ids), np.uint32)

    def encode_prompt(self, text):
        """Returns [CLS] text [SEP] as ids (a list); special tokens in the text, such as [MASK], keep their meaning."""
        ids = [self.cls_id]
        for part in _SPECIAL_TOKEN.split(text):
            ids += [self.ids[part]] if _SPECIAL_TOKEN.fullmatch(part) else self.encode(part)
        return ids + [self.sep_id]

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

    def _encode(self, text):
        """The ids of plain text as the bytes of uint32."""
        if any(map(text.__contains__, _FALSE_SPACES)):
            text = text.translate(dict.fromkeys(map(ord, _FALSE_SPACES)))
        return b"".join(map(self._cache.__getitem__, text.split()))

    def _pack(self, chunk):
        """The ids of text without spaces as the bytes of uint32."""
        ids = []
        for word in self._words(chunk):
            if (i := self._first.get(word)) is not None:
                ids.append(i)
            else:
                ids += self._pieces(word)
        return array.array("I", ids).tobytes()

    def _locate(self, chunk):
        """(id, start, end) of each piece of text without spaces: normalised one character at a time."""
        normal, places = "", []  # the place in the chunk of each normalised character
        for place, character in enumerate(chunk):
            new = self._normalise(character)
            normal += new
            places += [place] * len(new)
        if normal.split() != self._words(chunk):
            # NFD changed the order of two marks that stripping spares, such as U+302E and U+1B44: too rare to follow
            return [(i, 0, len(chunk)) for i in self.encode(chunk)]
        located = []
        for word in re.finditer(r"\S+", normal):
            at = word.start()
            for i in self._pieces(word[0]):
                if i == self.unk_id:
                    size = len(word[0])
                else:
                    size = len(self.vocab[i]) - 2 * (at > word.start())  # without its ##
                located.append((i, places[at], places[at + size - 1] + 1))
                at += size
        return located

    def _words(self, text):
        """The words of plain text, normalised; each punctuation mark and each CJK character is one."""
        if text.isascii() and text.isprintable():
            return _ASCII_WORD.findall(text.lower() if self.lowercase else text)
        return self._normalise(text).split()

    def _normalise(self, text):
        """Plain text after both passes, with spaces between words."""
        text = text.translate(self._clean)
        if self.strip_accents:
            text = _DECOMPOSED.sub(lambda run: unicodedata.normalize("NFD", run[0]), text)
        return text.translate(self._fold)

    def _clean_character(self, c):
        """First pass: no control characters, plain spaces, space around CJK."""
        if c.isspace() and c not in _FALSE_SPACES:
            return " "
        category = unicodedata.category(c)  # a lone surrogate (Cs) cannot come from UTF-8; it goes the way of U+FFFD
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
        # one character at a time: str.lower() would turn the last letter of "ΟΔΟΣ" into a final sigma
        return (_LOWER.get(c) or c.lower()) if self.lowercase else c

    def _pieces(self, word):
        """The ids of a word's pieces, each the longest that fits; [UNK] for the whole word if some rest fits none."""
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


def _read(path):
    """The text of a UTF-8 file."""
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise UserError(f"{path} is not UTF-8 text: name the vocabulary itself, or save it as UTF-8") from None


def _read_json(path):
    """The object in a JSON file."""
    try:
        value = json.loads(_read(path))
    except json.JSONDecodeError as error:
        raise UserError(f"{path} is not valid JSON ({error}): fetch it again") from None
    if not isinstance(value, dict):
        raise UserError(f"{path} holds no JSON object: fetch it again")
    return value


def _read_tokenizer_json(path):
    """(token -> id, settings) of a tokenizer.json, if its tokenizer is BERT's in every way."""
    data = _read_json(path)
    for section, key, expected in (
        ("model", "type", "WordPiece"),
        ("model", "unk_token", SPECIAL_TOKENS["unk"]),
        ("model", "continuing_subword_prefix", "##"),
        ("model", "max_input_chars_per_word", LONGEST_WORD),
        ("normalizer", "type", "BertNormalizer"),
        ("normalizer", "clean_text", True),
        ("pre_tokenizer", "type", "BertPreTokenizer"),
    ):
        found = (data.get(section) or {}).get(key)
        if found is None and (section, key) == ("model", "type"):
            continue  # early files leave it out
        if found != expected:
            raise UserError(f"{path}: {section}.{key} is {found!r}, in BERT {expected!r}: use a BERT model's tokenizer")
    ids = data["model"].get("vocab")
    if not isinstance(ids, dict):
        raise UserError(f"{path} holds no vocabulary: fetch it again")
    added = [token["content"] for token in data.get("added_tokens") or [] if token["content"] not in ids]
    if added:
        raise UserError(f"{path} adds {added[0]!r} to its vocabulary: use a model without added tokens")
    normalizer = data["normalizer"]
    names = {"lowercase": "lowercase", "strip_accents": "strip_accents", "handle_chinese_chars": "chinese"}
    return ids, {ours: normalizer[theirs] for theirs, ours in names.items() if theirs in normalizer}


def _read_tokenizer_config(path):
    """The settings of a tokenizer_config.json."""
    config = _read_json(path)
    kind = config.get("tokenizer_class") or "BertTokenizer"
    if not re.fullmatch("(Distil)?BertTokenizer(Fast)?|PreTrainedTokenizerFast|TokenizersBackend", str(kind)):
        raise UserError(f"{path}: tokenizer_class is {kind}: use a model with BERT's or DistilBERT's tokenizer")
    settings = {}
    for theirs, ours, allowed in (
        ("do_lower_case", "lowercase", (True, False)),
        ("strip_accents", "strip_accents", (True, False, None)),
        ("tokenize_chinese_chars", "chinese", (True, False)),
    ):
        if theirs in config:
            if config[theirs] not in allowed:
                raise UserError(f"{path}: {theirs} is {config[theirs]!r}: make it true or false")
            settings[ours] = config[theirs]
    length = config.get("model_max_length", 512)
    if not isinstance(length, (int, float)) or length < 1:
        raise UserError(f"{path}: model_max_length is {length!r}: make it the longest sequence that the model reads")
    if length < 1e9:  # transformers writes 1e30 for "not known"
        settings["max_length"] = int(length)
    return settings


def _tokenizer_json(tokenizer, strip_accents):
    """What the crate `tokenizers` needs to give the same ids."""
    cls, sep = SPECIAL_TOKENS["cls"], SPECIAL_TOKENS["sep"]
    start, end, end_of_pair = (
        {"SpecialToken": {"id": token, "type_id": segment}} for token, segment in ((cls, 0), (sep, 0), (sep, 1))
    )
    text, second_text = ({"Sequence": {"id": name, "type_id": segment}} for name, segment in (("A", 0), ("B", 1)))
    kind = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": tokenizer.ids[token], "content": token, **kind} for token in SPECIAL_TOKENS.values()],
        "normalizer": {
            "type": "BertNormalizer",
            "clean_text": True,
            "handle_chinese_chars": tokenizer.chinese,
            "strip_accents": strip_accents,
            "lowercase": tokenizer.lowercase,
        },
        "pre_tokenizer": {"type": "BertPreTokenizer"},
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [start, text, end],
            "pair": [start, text, end, second_text, end_of_pair],
            "special_tokens": {t: {"id": t, "ids": [tokenizer.ids[t]], "tokens": [t]} for t in (cls, sep)},
        },
        "decoder": {"type": "WordPiece", "prefix": "##", "cleanup": True},
        "model": {
            "type": "WordPiece",
            "unk_token": SPECIAL_TOKENS["unk"],
            "continuing_subword_prefix": "##",
            "max_input_chars_per_word": LONGEST_WORD,
            "vocab": tokenizer.ids,
        },
    }
