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
import dataclasses
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
CASED = 0.1  # share of the words with capitals that makes a vocabulary cased; of bert-base-cased 0.31

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
_OTHER_WORD = _characters("200C-200D 24B6-24E9 1F130-1F149 1F150-1F169 1F170-1F189")  # joiners, letters in circles
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


@dataclasses.dataclass(frozen=True)
class AddedToken:
    """A token that is matched in the text before WordPiece sees it; the flags are those of the crate `tokenizers`."""

    content: str
    single_word: bool = False
    lstrip: bool = False  # this and the next: take white space along, which makes no tokens here
    rstrip: bool = False
    normalized: bool = False  # matched in normalised text
    special: bool = True


class _Matcher:
    """Finds tokens in a text, the longest of the leftmost; of equal ones the first counts."""

    def __init__(self, tokens):
        self.tokens = {}  # content -> (id, single_word)
        for content, i, single_word in tokens:
            self.tokens.setdefault(content, (i, single_word))
        longest_first = sorted(filter(None, self.tokens), key=len, reverse=True)
        self._pattern = re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")

    def split(self, text):
        """Yields (id, start, end) of all parts of the text; the id is None between the tokens."""
        last = 0
        for match in self._pattern.finditer(text):
            i, single_word = self.tokens[match[0]]
            start, end = match.span()
            if single_word and (_in_word(text[start - 1 : start]) or _in_word(text[end : end + 1])):
                continue
            if start > last:
                yield None, last, start
            yield i, start, end
            last = end
        if last < len(text):
            yield None, last, len(text)


def _in_word(c):
    r"""Returns whether the crate's `\w` matches this character; "" is none."""
    category = unicodedata.category(c) if c else ""
    return category[:1] in ("L", "M") or category in ("Nd", "Nl", "Pc") or bool(_OTHER_WORD.match(c))


class Tokenizer:
    """A WordPiece vocabulary and the normalisation that belongs to it.

    vocab: tokens in the order of their ids. lowercase, strip_accents (None: as lowercase) and chinese (space around CJK
    characters) change ids; max_length is what the model can read. added: AddedTokens; those that the vocabulary lacks
    follow its last id. Raises UserError where the vocabulary lacks a special token or has it twice. Of any other
    duplicate the last line counts, as it does elsewhere.
    """

    def __init__(self, vocab, lowercase=True, strip_accents=None, chinese=True, max_length=512, added=()):
        self.base = list(vocab)  # the entries that WordPiece makes
        self.vocab = self.base + [token.content for token in added if token.content not in set(self.base)]
        self.ids = {token: i for i, token in enumerate(self.vocab)}
        self.added = sorted(added, key=lambda token: self.ids[token.content])
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
        ids = {token: i for i, token in enumerate(self.base)}
        self._first = {token: i for token, i in ids.items() if len(token) <= LONGEST_WORD}
        self._later = {token[2:]: i for token, i in ids.items() if token.startswith("##")}
        self._longest = max(map(len, self.vocab))
        self._clean = _Table(self._clean_character)
        self._fold = _Table(self._fold_character)
        self._unspaced = _Table(self._fold_without_spaces)
        raw = [(token.content, self.ids[token.content], token.single_word) for token in self._matched(False)]
        special = [(token, self.ids[token], False) for token in SPECIAL_TOKENS.values()]
        self._raw, self._prompt = _Matcher(raw), _Matcher(special + raw)
        self._normalised = _Matcher(
            (self._normalise(token.content, self._unspaced), self.ids[token.content], token.single_word)
            for token in self._matched(True)
        )
        self._cache = _Cache(self._pack, CACHE_ENTRIES)  # chunk -> its ids as the bytes of uint32
        self._located = _Cache(self._locate, CACHE_ENTRIES // 4)  # chunk -> its pieces: heavier entries

    def __reduce__(self):  # a worker process starts with an empty cache
        return Tokenizer, (
            self.base, self.lowercase, self.strip_accents, self.chinese, self.max_length, self.added,
        )  # fmt: skip

    def _matched(self, normalized):
        return [token for token in self.added if token.normalized == normalized]

    @classmethod
    def load(cls, path):
        """Reads a vocabulary file, or a model's folder: vocab.txt or tokenizer.json, and what stands beside them.

        A file named vocab.txt stands for its folder. The class of the tokenizer decides where settings come from, as in
        transformers: from tokenizer_config.json for BertTokenizer, else from tokenizer.json. Where there is only a
        vocabulary, text is lowercased unless a tenth of its words have capitals.
        Raises UserError where a file is absent, broken, contradicts another or is not BERT's.
        """
        path = pathlib.Path(path)
        if not path.exists():
            raise UserError(f"there is no {path}: name a vocab.txt or a folder that holds one")
        folder = path if path.is_dir() else path.parent if path.name == "vocab.txt" else None
        settings = {}
        if folder is None:
            vocab = _read_vocab(path)
        else:
            path, vocab, settings = _read_folder(folder)
        if all(token.content in vocab for token in settings.get("added", ())):  # no token has an id after them
            vocab = "\n".join(vocab).rstrip("\n").split("\n")  # without blank lines at the end of the file
        words = [token for token in vocab if not token.startswith("[") and token.lower() != token.upper()]
        capitals = sum(token != token.lower() for token in words)
        try:
            return cls(vocab, **{"lowercase": capitals <= CASED * len(words)} | settings)
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
        if self.added:
            config["added_tokens_decoder"] = {token.pop("id"): token for token in _added_tokens_json(self)}
        write_text(folder / "vocab.txt", "".join(token + "\n" for token in self.base))
        write_json(folder / "tokenizer_config.json", config)
        write_json(folder / "special_tokens_map.json", special)
        write_json(folder / "tokenizer.json", _tokenizer_json(self, strip_accents))

    @property
    def digest(self):
        """SHA-256 of all that decides ids: the vocabulary, lowercase, strip_accents, chinese and added tokens."""
        decisive = [self.base, self.lowercase, self.strip_accents, self.chinese]
        if self.added:
            decisive.append([dataclasses.astuple(token) for token in self.added])
        return hashlib.sha256(json.dumps(decisive).encode()).hexdigest()

    def encode(self, text):
        """Returns the ids (a list) of plain text: nothing is added, and a literal "[SEP]" is three tokens.

        An added token in the text, such as "<url>" in some vocabularies, is one.
        """
        return memoryview(self._encode(text)).cast("I").tolist()

    def encode_with_offsets(self, text):
        """Returns `encode(text)` and where each piece comes from: (ids, starts, ends), three lists of equal length.

        text[starts[i] : ends[i]] is how piece i is written in the text, which is not normalised: with its capitals and
        precomposed accents. What normalisation drops, such as a combining accent, belongs to a piece only inside it;
        pieces of one character ("한" is three) have the same place.
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

    def encode_documents(self, texts):
        """Returns the ids of all texts in one uint32 array, each text that has any followed by [SEP]."""
        end = array.array("I", [self.sep_id]).tobytes()
        return np.frombuffer(b"".join(ids + end for ids in map(self._encode, texts) if ids), np.uint32)

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

    def _encode(self, text):
        """The ids of plain text as the bytes of uint32."""
        if self.added:
            return b"".join(self._encode_parts(text, self._raw))
        return self._encode_plain(text)

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
        normal, places = self._spread(chunk, self._fold)
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

    def _spread(self, text, fold):
        """Text normalised one character at a time, and the place in the text of each normalised character."""
        normal, places = [], []
        for place, character in enumerate(text):
            new = self._normalise(character, fold)
            normal.append(new)
            places += [place] * len(new)
        return "".join(normal), places

    def _words(self, text):
        """The words of plain text, normalised; each punctuation mark and each CJK character is one."""
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

    def _fold_without_spaces(self, c):
        """Second pass without space around punctuation: the text in which normalised added tokens are matched."""
        folded = self._fold_character(c)
        return c if folded == f" {c} " else folded

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
    """The text of a UTF-8 file, without the mark that some editors put at its beginning."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise UserError(f"{path} is not UTF-8 text: name the vocabulary itself, or save it as UTF-8") from None


def _read_vocab(path):
    """The entries of a vocabulary file."""
    return [line.rstrip(" \t") for line in _read(path).removesuffix("\n").split("\n")]


def _read_json(path):
    """The object in a JSON file without its null values; {} where there is no such file."""
    if not path.exists():
        return {}
    try:
        value = json.loads(_read(path))
    except json.JSONDecodeError as error:
        raise UserError(f"{path} is not valid JSON ({error}): fetch it again") from None
    if not isinstance(value, dict):
        raise UserError(f"{path} holds no JSON object: fetch it again")
    return {key: item for key, item in value.items() if item is not None}


def _read_folder(folder):
    """(path of the vocabulary, entries without added tokens, settings with them) of a model's folder."""
    path, json_path, config_path = (folder / n for n in ("vocab.txt", "tokenizer.json", "tokenizer_config.json"))
    data, config, model = _read_json(json_path), _read_json(config_path), _read_json(folder / "config.json")
    kind = config.get("tokenizer_class") or model.get("tokenizer_class") or ("model_type" in model and "BertTokenizer")
    kind = str(kind or "TokenizersBackend")
    if not re.fullmatch("(Distil)?BertTokenizer(Fast)?|PreTrainedTokenizerFast|TokenizersBackend", kind):
        raise UserError(f"{config_path}: tokenizer_class is {kind}: use a model with BERT's or DistilBERT's tokenizer")
    in_config = "BertTokenizer" in kind
    ids, settings = _read_tokenizer_json(json_path, data) if json_path.exists() else (None, {})
    settings_of_config = _read_tokenizer_config(config_path, config)
    if in_config and (config_path.exists() or json_path.exists()):  # with transformers' default values
        settings = {"lowercase": True} | settings_of_config
    else:
        settings = settings_of_config | settings
    if path.exists():
        vocab = _read_vocab(path)
        if ids is not None and _without_blanks(ids) != _without_blanks({token: i for i, token in enumerate(vocab)}):
            raise UserError(f"{path} and tokenizer.json disagree: remove the one that is not the model's")
    elif ids is not None:
        path = json_path
        vocab = sorted(ids, key=ids.get)
        if [ids[token] for token in vocab] != list(range(len(vocab))):
            raise UserError(f"{path}: its ids are not 0, 1, 2, ...: add the model's vocab.txt")
    else:
        raise UserError(f"{folder} holds neither vocab.txt nor tokenizer.json: add the model's vocabulary")
    added = _read_added_tokens(folder, vocab, data, config, in_config)
    return path, vocab, settings | {"added": added}


def _without_blanks(ids):
    """token -> id without an empty entry at the end, which a blank line makes."""
    return {token: i for token, i in ids.items() if token or i + 1 < len(ids)}


def _read_tokenizer_json(path, data):
    """(token -> id, settings) of a tokenizer.json, if its tokenizer is BERT's in every way."""
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
    normalizer = data["normalizer"]
    names = {"lowercase": "lowercase", "strip_accents": "strip_accents", "handle_chinese_chars": "chinese"}
    return ids, {ours: normalizer[theirs] for theirs, ours in names.items() if normalizer.get(theirs) is not None}


def _read_tokenizer_config(path, config):
    """The settings of a tokenizer_config.json."""
    settings = {}
    for theirs, ours in (
        ("do_lower_case", "lowercase"),
        ("strip_accents", "strip_accents"),
        ("tokenize_chinese_chars", "chinese"),
    ):
        if theirs in config:
            if config[theirs] not in (True, False):
                raise UserError(f"{path}: {theirs} is {config[theirs]!r}: make it true or false")
            settings[ours] = config[theirs]
    length = config.get("model_max_length", config.get("max_len", 512))
    if not isinstance(length, (int, float)) or length < 1:
        raise UserError(f"{path}: model_max_length is {length!r}: make it the longest sequence that the model reads")
    if length < 1e9:  # transformers writes 1e30 for "not known"
        settings["max_length"] = int(length)
    return settings


def _read_added_tokens(folder, vocab, data, config, in_config):
    """The AddedTokens of all files of a folder, in the order in which transformers adds them to `vocab`.

    Where tokenizer_config.json lists them (added_tokens_decoder), other lists do not count, but that of tokenizer.json
    does for a tokenizer that is read from it. A blank line at the end of `vocab` goes where a file has given its id to
    a token. Raises UserError where a token would have another id than its file says.
    """
    path, json_path, legacy = (folder / n for n in ("tokenizer_config.json", "tokenizer.json", "added_tokens.json"))
    in_json = [(json_path, token.get("id"), token) for token in data.get("added_tokens") or []]
    config_lists = config.get("added_tokens_decoder")
    if config_lists is not None:
        named = _named_tokens(path, config, {})
        numbered = [(path, i, token) for i, token in config_lists.items()]
        numbered = numbered if in_config else in_json + numbered
    else:
        special_map = _read_json(folder / "special_tokens_map.json")
        named = _named_tokens(path, config, special_map)
        special_map.pop("additional_special_tokens", None)  # do not make those of added_tokens.json special
        contents = {token.content for token in _named_tokens(path, config, special_map)}
        numbered = [
            (legacy, i, {"content": content, "special": content in contents})
            for content, i in _read_json(legacy).items()
        ]
        numbered += in_json
    added, known = {}, set(vocab)
    for i, (path, value) in sorted({_id(path, i): (path, token) for path, i, token in numbered}.items()):
        token = _added_token(path, value)
        if token.content not in known and token.content not in added:
            if i < len(vocab) and not any(vocab[i:]):
                del vocab[i:]
            following = len(vocab) + sum(content not in known for content in added)
            if i != following:
                raise UserError(
                    f"{path} gives {token.content!r} the id {i}, where the next free one is {following}: "
                    "use the vocabulary that belongs to it"
                )
        added[token.content] = token
    for token in named:
        added.setdefault(token.content, token)
    new = [token for content, token in added.items() if content and content not in SPECIAL_TOKENS.values()]
    if config.get("split_special_tokens") and any(token.special for token in new):
        raise UserError(f"{folder / 'tokenizer_config.json'}: split_special_tokens is true: make it false")
    return new


def _id(path, i):
    try:
        return int(i)
    except (TypeError, ValueError):
        raise UserError(f"{path} adds a token with the id {i!r}, which is no number: fetch it again") from None


def _named_tokens(path, config, special_map):
    """The AddedTokens that the configuration names by their purpose; the five of BERT must be BERT's."""
    named = []
    for key, value in (config | special_map).items():
        if key.endswith("_token") and isinstance(value, (str, dict)):
            token = _added_token(path, value)
            expected = SPECIAL_TOKENS.get(key.removesuffix("_token"), token.content)
            if token.content != expected:
                raise UserError(
                    f"{path}: {key} is {token.content!r}, in BERT {expected!r}: use a BERT model's tokenizer"
                )
            named.append(token)
    extra = config.get("extra_special_tokens") or config.get("additional_special_tokens")
    for value in (extra or special_map.get("additional_special_tokens"), special_map.get("extra_special_tokens")):
        values = value.values() if isinstance(value, dict) else value or []
        named += [_added_token(path, value) for value in values]
    return named


def _added_token(path, value):
    """The AddedToken that a JSON file spells as a string or as an object."""
    value = {"content": value} if isinstance(value, str) else value
    if not isinstance(value, dict) or not isinstance(value.get("content"), str):
        raise UserError(f"{path} adds {value!r}, which is no token: fetch it again")
    names = [field.name for field in dataclasses.fields(AddedToken)]
    flags = {name: value[name] for name in names if value.get(name) is not None}
    return AddedToken(**{"normalized": not flags.get("special", True)} | flags)


def _added_tokens_json(tokenizer):
    """The special tokens and the added ones as tokenizer.json lists them, in the order of their ids."""
    tokens = [*map(AddedToken, SPECIAL_TOKENS.values()), *tokenizer.added]
    listed = [{"id": tokenizer.ids[token.content], **dataclasses.asdict(token)} for token in tokens]
    return sorted(listed, key=lambda token: token["id"]) if tokenizer.added else listed


def _tokenizer_json(tokenizer, strip_accents):
    """What the crate `tokenizers` needs to give the same ids."""
    cls, sep = SPECIAL_TOKENS["cls"], SPECIAL_TOKENS["sep"]
    start, end, end_of_pair = (
        {"SpecialToken": {"id": token, "type_id": segment}} for token, segment in ((cls, 0), (sep, 0), (sep, 1))
    )
    text, second_text = ({"Sequence": {"id": name, "type_id": segment}} for name, segment in (("A", 0), ("B", 1)))
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": _added_tokens_json(tokenizer),
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
            "vocab": {token: i for i, token in enumerate(tokenizer.base)},
        },
    }
