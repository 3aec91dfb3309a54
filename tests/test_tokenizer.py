"""The ids are those of the crate `tokenizers`: every code point in use, random Unicode and 33 MB of English."""

import dataclasses
import gzip
import itertools
import json
import pickle
import random
import unicodedata

import numpy as np
import pytest
from code_points import CODE_POINTS

from minidistil.errors import UserError
from minidistil.tokenizer import Tokenizer
from minidistil.tokenizers import caches, wordpiece
from minidistil.tokenizers.added_tokens import AddedToken
from minidistil.tokenizers.wordpiece import WordPiece
from minidistil.tokenizers.wordpiece_files import SPECIAL_TOKENS

SPECIAL = list(SPECIAL_TOKENS.values())
# lowercase, strip_accents, chinese: uncased, cased, and what else a tokenizer_config.json may ask for
SETTINGS = {"uncased": (True, None, True), "cased": (False, None, True), "odd": (False, True, False)}
every_setting = pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
cased_and_not = pytest.mark.parametrize("settings", [SETTINGS["uncased"], SETTINGS["cased"]], ids=["uncased", "cased"])

WORDS = """the a an of in un able ##able ##ing ##s ##a ##b ##c paris france capital is Paris The 年 ##年
    ' . ? ! , '' do not n't 's 've 're 'm ... ##. ##n't"""
SMALL = list(dict.fromkeys([*SPECIAL, *WORDS.split(), *"abcdefghijklmnopqrstuvwxyz[]#-"]))
TEXTS = [
    "", " ", "The capital of France is Paris.", "unable, unables; unablez", "[SEP] [MASK] [mask]", "a\tb\r\nc\x0bd",
    "Ünable ﬁ ΟΔΟΣ İstanbul 한국어 ガ", "年年a年", "a" * 100 + " " + "a" * 101, "don't 's ... ##s",
    "\u00ad\u200ba\ufeff",
]  # fmt: skip


def oracle(vocab, lowercase, strip_accents, chinese):
    """The crate's tokenizer for plain text: it knows no special tokens."""
    tokenizers = pytest.importorskip("tokenizers")
    ids = {token: i for i, token in enumerate(vocab)}
    result = tokenizers.Tokenizer(tokenizers.models.WordPiece(ids, unk_token="[UNK]", max_input_chars_per_word=100))
    result.normalizer = tokenizers.normalizers.BertNormalizer(True, chinese, strip_accents, lowercase)
    result.pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()
    result.decoder = tokenizers.decoders.WordPiece(prefix="##")
    return result


def oracle_words(oracle, text):
    return [word for word, _ in oracle.pre_tokenizer.pre_tokenize_str(oracle.normalizer.normalize_str(text))]


def differences(tokenizer, oracle, texts):
    """The texts whose ids differ from the oracle's."""
    found = []
    for start in range(0, len(texts), 2000):
        batch = texts[start : start + 2000]
        encodings = oracle.encode_batch(batch, add_special_tokens=False)
        found += [text for text, e in zip(batch, encodings, strict=True) if tokenizer.encode(text) != e.ids]
    return found


@cased_and_not
def test_words_of_every_code_point(settings):
    # words, not ids: with a real vocabulary most differences would hide behind [UNK]
    forms = ["a%sb", "%s"]
    if settings[0]:
        forms.append("a\u0345\u0334%s\u0345\u0334")  # marks change places according to combining classes
    tokenizer, truth = WordPiece(SPECIAL, *settings), oracle(SPECIAL, *settings)
    for start in range(0, len(CODE_POINTS), 200):
        characters = CODE_POINTS[start : start + 200]
        for form in forms:
            text = " ".join(form % c for c in characters)
            assert tokenizer._words(text) == oracle_words(truth, text), f"{form!r} from U+{ord(characters[0]):04X}"


def random_texts(seed, count):
    draw = random.Random(seed)
    common = "abcdefghijklm ABCDE the ing un .,'!?-#[]" * 2
    marks = [c for c in CODE_POINTS if unicodedata.category(c)[0] == "M"]
    oddities = " \t\n\r\v\f\x1c\x1d\x1e\x1f\x85\xa0\u2028\u3000\u200b\u200d\ufeff\u00ad\0\ufffd\x7f\u180eΣςßİıK\u1e9e"
    blocks = [range(start, start + 0x100) for start in range(0, 0x3400, 0x100)]  # living scripts and symbols
    blocks += [range(start, start + 0x100) for start in (0x4E00, 0x9F00, 0xAC00, 0xF900, 0xFB00, 0xFE00, 0xFF00)]
    blocks += [range(start, start + 0x400) for start in (0x10000, 0x10C00, 0x11000, 0x11800, 0x16C00, 0x1D000, 0x1E000)]
    blocks += [range(start, start + 0x200) for start in (0x1F300, 0x1F900, 0x2B700, 0x2F800, 0xE0000)]
    chunks = [*SPECIAL, "[mask]", "a" * 99, "ab" * 52, "한국어", "नमस्ते", "Ünïcödé", "e\u0301", "👩‍👩‍👧", "don't", "##s"]
    kinds = (
        lambda: draw.choice(common),
        lambda: draw.choice(marks),
        lambda: draw.choice(oddities),
        lambda: chr(draw.choice(draw.choice(blocks))),
        lambda: draw.choice(chunks),
    )
    weights = (50, 12, 10, 25, 3)
    for _ in range(count):
        yield "".join(kind() for kind in draw.choices(kinds, weights, k=draw.randrange(1, 25)))


@pytest.fixture(scope="module")
def many_texts():
    return list(random_texts(seed=20181011, count=60_000))


# combining marks that stripping accents keeps
MARKS_THAT_STAY = {c for c in CODE_POINTS if unicodedata.combining(c) and unicodedata.category(c) == "Mc"}


def vocabulary_of(texts):
    """A vocabulary of all characters that can come out: hardly anything hides behind [UNK]."""
    characters = sorted(set(unicodedata.normalize("NFD", "".join(map(str.lower, texts)))) | set("".join(texts)))
    return list(dict.fromkeys([*SMALL, *characters, *(f"##{c}" for c in characters)]))


@every_setting
def test_ids_of_random_unicode(many_texts, settings):
    texts = many_texts[:20_000] if settings == SETTINGS["odd"] else many_texts
    vocab = vocabulary_of(texts)
    tokenizer, truth = WordPiece(vocab, *settings), oracle(vocab, *settings)
    assert differences(tokenizer, truth, texts) == []
    share = sum(tokenizer.encode(text).count(tokenizer.unk_id) for text in texts[:2000]) / 2000
    assert 0 < share < 0.5  # [UNK] per text


@cased_and_not
def test_ids_of_imdb(assets, settings):
    kind = "uncased" if settings[0] else "cased"
    tokenizer = Tokenizer.load(assets / "vocab" / f"bert-base-{kind}.txt")
    assert tokenizer.lowercase == settings[0]  # guessed from the vocabulary
    with gzip.open(assets / "imdb" / "train.tsv.gz", "rt", encoding="utf-8", newline="\n") as file:
        texts = [line.rstrip("\n").split("\t")[3] for line in itertools.islice(file, 1, None, 5)]
    assert len(texts) == 5_000
    assert differences(tokenizer, oracle(tokenizer.vocab, *settings), texts) == []


def offset_differences(tokenizer, oracle, texts):
    """(text, token, our place, the oracle's) where the places differ; ids must not."""
    for text, theirs in zip(texts, oracle.encode_batch(texts, add_special_tokens=False), strict=True):
        ids, starts, ends = tokenizer.encode_with_offsets(text)
        assert ids == theirs.ids == tokenizer.encode(text)
        assert starts == sorted(starts) and ends == sorted(ends)
        for i, *ours, place in zip(ids, starts, ends, theirs.offsets, strict=True):
            assert 0 <= ours[0] < ours[1] <= len(text)
            if tuple(ours) != place:
                yield text, tokenizer.vocab[i], tuple(ours), place


@every_setting
def test_offsets_of_random_unicode(settings):
    texts = [*TEXTS, *random_texts(seed=20160616, count=4000)]
    vocab = vocabulary_of(texts)
    tokenizer = WordPiece(vocab, *settings)
    found = list(offset_differences(tokenizer, oracle(vocab, *settings), texts))
    # ours is the whole chunk where marks that stay change places: see the test below
    stay = [sum(c in MARKS_THAT_STAY for c in text[slice(*ours)]) > 1 for text, _, ours, _ in found]
    found = [difference for difference, several in zip(found, stay, strict=True) if not several]
    # The crate places what NFD moved by count, not by character. Where a mark that stays changed places with one that
    # goes, it points at the latter, or beside it; ours is the mark that stays.
    assert all(text[slice(*ours)] == token.removeprefix("##") for text, token, ours, _ in found)
    assert all(unicodedata.combining(text[start]) for text, _, (start, _), _ in found)
    assert (0 < len(found) < len(texts) / 200) if tokenizer.strip_accents else not found


@cased_and_not
def test_offsets_of_imdb(assets, settings):
    kind = "uncased" if settings[0] else "cased"
    tokenizer = Tokenizer.load(assets / "vocab" / f"bert-base-{kind}.txt")
    with gzip.open(assets / "imdb" / "train.tsv.gz", "rt", encoding="utf-8", newline="\n") as file:
        texts = [line.rstrip("\n").split("\t")[3] for line in itertools.islice(file, 1, None, 100)]
    assert sum(not text.isascii() for text in texts) > 20
    assert list(offset_differences(tokenizer, oracle(tokenizer.vocab, *settings), texts)) == []


@pytest.mark.parametrize(
    ("text", "surfaces"),
    [
        ("Ünable  PARIS,\tun\u0301able", "Ün able PARIS , un able"),  # what is dropped between pieces is nobody's
        ("pa\u0301ris i\u0301s", "pa\u0301ris i\u0301s"),  # but not inside
        ("年年a年[SEP]", "年 年 a 年 [ SEP ]"),
        ("xq\u200bz\u00adée x", "xq\u200bz\u00adée x"),  # [UNK] is the whole word
        ("in\x0b \x1fof\x85un\x0c", "in of\x85un"),  # no spaces for BERT
        ("of half\ud83d a", "of half a"),  # no oracle: `tokenizers` refuses it
        ("", ""),
    ],
)
def test_offsets_by_hand(text, surfaces):
    ids, starts, ends = WordPiece(SMALL).encode_with_offsets(text)
    assert " ".join(text[start:end] for start, end in zip(starts, ends, strict=True)) == surfaces
    assert ids == WordPiece(SMALL).encode(text)


def test_offsets_where_marks_that_stay_change_places():
    marks = sorted(MARKS_THAT_STAY)
    vocab = vocabulary_of(marks)
    tokenizer, truth = WordPiece(vocab), oracle(vocab, *SETTINGS["uncased"])
    text = "the a\u302e\u1b44b end"
    ids, starts, ends = tokenizer.encode_with_offsets(text)
    assert [vocab[i] for i in ids][1:5] == ["a", "##\u1b44", "##\u302e", "##b"]
    assert [*zip(starts, ends, strict=True)] == [(0, 3), *[(4, 8)] * 4, (9, 12)]  # the whole chunk
    draw = random.Random(2)
    for _ in range(500):
        text = " ".join("a" + "".join(draw.choices(marks, k=3)) for _ in range(3))
        ids, starts, ends = tokenizer.encode_with_offsets(text)
        assert ids == truth.encode(text).ids == tokenizer.encode(text)
        assert len(ids) == len(starts) == len(ends) and starts == sorted(starts)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("İstanbul ΟΔΟΣ Straße", "istanbul οδοσ straße"),  # no final sigma, ß stays
        ("Café Ｎaïve ½", "cafe ｎaive ½"),  # NFD, not NFKD
        ("한", "\u1112\u1161\u11ab"),
        ("in\u00advisi\u200bble\ufeff", "invisible"),
        ("a\x0bb\x1cc\x85d\u2028e\u3000f", "abcd e f"),
        ("中国\U0002b820\U0002b920", "中 国 \U0002b820 \U0002b920"),
        ("\u061d \u166d", "\u061d \u166d"),
        ("don't[SEP]$5", "don ' t [ sep ] $ 5"),
        ("half \ud83d of a pair", "half of a pair"),  # no oracle: `tokenizers` refuses it
    ],
)
def test_corners(text, words):
    assert WordPiece(SPECIAL)._words(text) == words.split()


def test_the_longest_word_is_counted_after_normalisation():
    tokenizer = WordPiece([*SPECIAL, "a", "##a"])
    a, piece, unk = 5, 6, tokenizer.unk_id
    assert tokenizer.encode("A\u0301" * 100 + " " + "a" * 101) == [a] + [piece] * 99 + [unk]
    assert tokenizer.encode("a" * 150 + "-" + "a\u200b" * 100) == [unk, unk, a] + [piece] * 99  # "-" is [UNK] by itself
    assert tokenizer.encode("aab") == [unk]  # the whole word


def test_continuations_need_a_character():
    # "##" and "#" are entries, and must not be taken for a piece of "ab" that is no longer than its prefix
    vocab, settings = [*SPECIAL, "a", "#", "##", "", "##c"], SETTINGS["uncased"]
    texts = ["ab", "ac", "a#", "##c", "acac", "b"]
    assert differences(WordPiece(vocab, *settings), oracle(vocab, *settings), texts) == []


@cased_and_not
def test_prompts(settings):
    transformers = pytest.importorskip("transformers")
    lowercase, _, _ = settings
    ours = WordPiece(SMALL, lowercase)
    theirs = transformers.BertTokenizer(vocab=ours.ids, do_lower_case=lowercase)
    prompts = ["Paris is the [MASK] of France.", "[MASK][MASK]a[SEP]", "[mask] [ MASK ] [[MASK]]", "[mask]", "x[CLS"]
    for prompt in [*prompts, *TEXTS, *random_texts(seed=3, count=2000)]:
        assert ours.encode_prompt(prompt) == theirs(prompt)["input_ids"], ascii(prompt)
    assert ours.encode_prompt("a [MASK]") == [ours.cls_id, ours.ids["a"], ours.mask_id, ours.sep_id]


def test_decode():
    ours, theirs = WordPiece(SMALL), oracle(SMALL, *SETTINGS["uncased"])
    draw = random.Random(5)
    for ids in ([], [9], *(draw.choices(range(len(SMALL)), k=12) for _ in range(2000))):
        assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=False), [SMALL[i] for i in ids]
    assert ours.decode(ours.encode_prompt("Unables, [MASK] is...")) == "[CLS] unables, [MASK] is... [SEP]"


def test_documents_in_one_array():
    tokenizer = WordPiece(SMALL)
    ids, end = tokenizer.encode_documents(["the capital", "", " \n", "\u200b", "unable"]), tokenizer.sep_id
    assert ids.dtype == np.uint32
    assert ids.tolist() == [*tokenizer.encode("the capital"), end, *tokenizer.encode("unable"), end]
    assert tokenizer.encode_documents([]).shape == (0,)


def test_the_cache_is_bounded_and_changes_nothing(monkeypatch):
    texts = list(random_texts(seed=11, count=3000)) + ["the capital of france " * 3] * 100
    expected = [WordPiece(SMALL).encode(text) for text in texts]
    monkeypatch.setattr(wordpiece, "CACHE_ENTRIES", 64)
    small = WordPiece(SMALL)
    cache = small._cache
    for text, ids in zip(texts, expected, strict=True):
        assert small.encode(text) == ids
        assert len(cache) + len(cache.older) <= 64
    assert "capital" in cache and small.encode("x" * 1000) == [small.unk_id]
    assert max(map(len, cache)) <= caches.CACHED_LENGTH  # nor do long chunks stay


def test_a_word_is_computed_once(monkeypatch):
    tokenizer = WordPiece(SMALL)
    first = tokenizer.encode("The capital, unables")
    monkeypatch.setattr(WordPiece, "_words", None)
    assert tokenizer.encode("unables The capital, unables")[-len(first) :] == first


def test_what_is_asked_for_again_survives(monkeypatch):
    monkeypatch.setattr(wordpiece, "CACHE_ENTRIES", 8)
    tokenizer, computed = WordPiece(SMALL), []
    compute = tokenizer._cache.compute
    monkeypatch.setattr(tokenizer._cache, "compute", lambda chunk: computed.append(chunk) or compute(chunk))
    for i in range(50):
        tokenizer.encode(f"the x{i}")
    assert computed.count("the") == 1


def test_pickle_for_worker_processes():
    tokenizer = WordPiece(SMALL, False, True, False, 77)
    tokenizer.encode("the capital")
    copy = pickle.loads(pickle.dumps(tokenizer))
    assert (copy.digest, copy.max_length, len(copy._cache)) == (tokenizer.digest, 77, 0)
    assert copy.encode("The capital") == tokenizer.encode("The capital")


def test_digest_follows_all_that_changes_ids():
    digests = [
        WordPiece(*arguments).digest
        for arguments in (
            (SMALL,),
            (SMALL, False),
            (SMALL, True, False),
            (SMALL, False, True),
            (SMALL, True, None, False),
            (SMALL[:-1],),
            ([*SMALL[:-2], SMALL[-1], SMALL[-2]],),
        )  # fmt: skip
    ]
    assert len(set(digests)) == len(digests) and all(len(digest) == 64 for digest in digests)
    assert digests[0] == WordPiece(tuple(SMALL), 1, True, True, max_length=128).digest


@pytest.mark.parametrize("model_type", ["bert", "distilbert"])
@pytest.mark.parametrize("settings", [*SETTINGS.values(), (True, False, True)])
@pytest.mark.parametrize("absent", [None, "tokenizer.json", "vocab.txt"])
def test_saved_for_transformers(tmp_path, model_type, settings, absent):
    transformers = pytest.importorskip("transformers")
    vocab = list(dict.fromkeys([*SMALL, *"AÜéü中国", "##é"]))
    ours = WordPiece(vocab, *settings, max_length=99)
    ours.save(tmp_path, model_type)
    files = {"special_tokens_map.json", "tokenizer.json", "tokenizer_config.json", "vocab.txt"}
    assert {path.name for path in tmp_path.iterdir()} == files
    if absent:
        (tmp_path / absent).unlink()
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    texts = [*TEXTS, "a [MASK] Éé 中国é.", *random_texts(seed=7, count=300)]
    assert [ours.encode_prompt(text) for text in texts] == theirs(texts)["input_ids"]
    assert theirs.model_max_length == 99
    assert ("token_type_ids" in theirs("a")) == (model_type == "bert")
    assert theirs("the capital", "of france")["input_ids"] == ours.encode_prompt("the capital[SEP]of france")
    for name in SPECIAL_TOKENS:
        assert getattr(theirs, f"{name}_token_id") == getattr(ours, f"{name}_id")
    again = Tokenizer.load(tmp_path)
    assert (again.digest, again.max_length) == (ours.digest, 99)


def test_tokenizer_json_alone_serves_the_crate(tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    ours = WordPiece(SMALL, *SETTINGS["odd"])
    ours.save(tmp_path, "bert")
    theirs = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    for text in [*TEXTS, *random_texts(seed=9, count=300)]:
        assert theirs.encode(text).ids == ours.encode_prompt(text), ascii(text)
    pair = theirs.encode("the capital", "of france")
    assert pair.type_ids == [0] * 4 + [1] * 3 and pair.ids == ours.encode_prompt("the capital[SEP]of france")


def test_an_entry_twice(tmp_path):
    transformers = pytest.importorskip("transformers")
    ours = WordPiece([*SMALL, "the", "", "end"])
    assert ours.encode("the end") == [len(SMALL), len(SMALL) + 2]
    ours.save(tmp_path, "bert")
    assert transformers.AutoTokenizer.from_pretrained(tmp_path)("the end")["input_ids"] == ours.encode_prompt("the end")
    assert Tokenizer.load(tmp_path).digest == ours.digest
    (tmp_path / "vocab.txt").unlink()
    with pytest.raises(UserError, match="not 0, 1, 2"):
        Tokenizer.load(tmp_path)


def test_load_real_folders(assets):
    transformers = pytest.importorskip("transformers")
    folder = assets / "models" / "bert-tiny-mlm"
    ours, theirs = Tokenizer.load(folder), transformers.AutoTokenizer.from_pretrained(folder)
    assert (ours.lowercase, ours.strip_accents, ours.chinese, ours.max_length) == (True, True, True, 512)
    assert ours.digest == Tokenizer.load(folder / "vocab.txt").digest
    for text in TEXTS:
        assert ours.encode_prompt(text) == theirs(text)["input_ids"]


def write_vocab(folder, vocab=SMALL, **config):
    (folder / "vocab.txt").write_text("\n".join(vocab) + "\n", encoding="utf-8")
    if config:
        (folder / "tokenizer_config.json").write_text(json.dumps(config))


def test_where_settings_come_from(tmp_path):
    cased = [*SPECIAL, "[unused1]", "paris", "Paris"]
    write_vocab(tmp_path, cased)
    assert not Tokenizer.load(tmp_path).lowercase  # it would never use "Paris"
    write_vocab(tmp_path, cased[:-1])
    assert Tokenizer.load(tmp_path / "vocab.txt").lowercase
    write_vocab(tmp_path, cased[:-1], do_lower_case=False, strip_accents=True, tokenize_chinese_chars=False)
    for path in (tmp_path, tmp_path / "vocab.txt", str(tmp_path)):  # a file named vocab.txt stands for its folder
        found = Tokenizer.load(path)
        assert (found.lowercase, found.strip_accents, found.chinese, found.max_length) == (False, True, False, 512)
    (tmp_path / "vocab.txt").rename(tmp_path / "other.txt")  # another name stands for itself
    assert Tokenizer.load(tmp_path / "other.txt").lowercase
    WordPiece(cased, True, False, False).save(tmp_path, "bert")
    (tmp_path / "tokenizer_config.json").unlink()  # then tokenizer.json says it
    found = Tokenizer.load(tmp_path)
    assert (found.lowercase, found.strip_accents, found.chinese) == (True, False, False)


@pytest.mark.parametrize("kind", ["BertTokenizer", "DistilBertTokenizerFast", "PreTrainedTokenizerFast", None])
@pytest.mark.parametrize("says", [True, False, None])
@pytest.mark.parametrize("model_type", ["distilbert", None])
def test_the_class_decides_which_file_decides(tmp_path, kind, says, model_type):
    transformers = pytest.importorskip("transformers")
    for in_json in (True, False):
        WordPiece(SMALL, in_json).save(tmp_path, "bert")
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": kind, "do_lower_case": says}))
        if says is None:  # transformers does not take null for an answer
            (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": kind}))
        (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type} if model_type else {}))
        theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
        assert Tokenizer.load(tmp_path).encode_prompt("Paris paris The") == theirs("Paris paris The")["input_ids"]


@pytest.mark.parametrize("lowercase, in_config", [(True, False), (False, True)])
def test_a_null_in_tokenizer_json_is_an_answer(tmp_path, lowercase, in_config):
    """ "strip_accents": null means: where it makes text lower-case, whatever tokenizer_config.json says."""
    transformers = pytest.importorskip("transformers")
    WordPiece([*SPECIAL, "cafe", "caf\u00e9"], lowercase).save(tmp_path, "bert")
    data = json.loads((tmp_path / "tokenizer.json").read_text(encoding="utf-8"))
    data["normalizer"]["strip_accents"] = None
    (tmp_path / "tokenizer.json").write_text(json.dumps(data), encoding="utf-8")
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "strip_accents": in_config, "model_max_length": 64}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    found, theirs = Tokenizer.load(tmp_path), transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert found.encode_prompt("caf\u00e9") == theirs("caf\u00e9")["input_ids"] and found.max_length == 64


def test_a_class_that_only_the_model_names(tmp_path):
    write_vocab(tmp_path, do_lower_case=False)
    (tmp_path / "config.json").write_text('{"tokenizer_class": "BertJapaneseTokenizer"}')
    with pytest.raises(UserError, match="BertJapaneseTokenizer"):
        Tokenizer.load(tmp_path)


def test_a_few_capitals_do_not_make_a_vocabulary_cased(tmp_path):
    words = [*SPECIAL, *(f"word{i}" for i in range(95))]
    for capitals, lowercase in (
        (["LOL"], True),
        ([f"W{i}" for i in range(9)], True),
        (map(str.upper, words[5:]), False),
    ):
        write_vocab(tmp_path, [*words, *capitals])
        assert Tokenizer.load(tmp_path).lowercase == lowercase


def test_what_editors_leave_is_harmless(tmp_path):
    settings = (
        '{"do_lower_case": null, "strip_accents": null, "tokenize_chinese_chars": null, "added_tokens_decoder": null'
    )
    for text in (settings + "}", settings + ', "model_max_length": null, "extra_special_tokens": null}'):
        (tmp_path / "tokenizer_config.json").write_text(text, encoding="utf-8-sig")
        for end in ("\n\n", "\r\n\r\n\r\n", "", " \n \t\n"):
            (tmp_path / "vocab.txt").write_text("\n".join(SMALL) + end, encoding="utf-8-sig", newline="")
            assert Tokenizer.load(tmp_path).digest == WordPiece(SMALL).digest
            assert Tokenizer.load(tmp_path).max_length == 512
    WordPiece([*SMALL, ""]).save(tmp_path, "bert")  # what transformers makes of a blank line
    (tmp_path / "vocab.txt").unlink()
    assert Tokenizer.load(tmp_path).vocab == SMALL


# --- added tokens ---

ADDED = [
    AddedToken("[unused1]"),  # in the vocabulary, as the next
    AddedToken("<url>", single_word=True),
    AddedToken("Üxy", normalized=True, special=False),  # beside it, as the next
    AddedToken("new york", single_word=True, normalized=True, special=False),
    AddedToken("中国", rstrip=True),
]
ADDED_VOCAB = [*SMALL, "[unused1]", "<url>", "url", "<", ">", "new", "york", "##y"]


def added_by_transformers(folder, tokens):
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    theirs.add_tokens([transformers.AddedToken(**token) for token in tokens])
    theirs.save_pretrained(folder)


def in_tokenizer_json(folder, tokens, ids):
    added_by_transformers(folder, tokens)


def in_tokenizer_json_alone(folder, tokens, ids):
    added_by_transformers(folder, tokens)
    (folder / "vocab.txt").unlink()
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')


def in_decoder(folder, tokens, ids):
    decoder = {ids[token["content"]]: token for token in tokens}
    write_vocab(folder, ADDED_VOCAB, do_lower_case=True, added_tokens_decoder=decoder)


def in_added_tokens_json(folder, tokens, ids):
    (folder / "added_tokens.json").write_text(json.dumps(ids))


def in_special_tokens_map(folder, tokens, ids):
    contents = {"additional_special_tokens": [token["content"] for token in tokens], "bos_token": "the"}
    (folder / "special_tokens_map.json").write_text(json.dumps(contents))


def in_config(folder, tokens, ids):
    write_vocab(folder, ADDED_VOCAB, do_lower_case=True, extra_special_tokens=[token["content"] for token in tokens])


KINDS = [in_tokenizer_json, in_tokenizer_json_alone, in_decoder, in_added_tokens_json, in_special_tokens_map, in_config]


@pytest.mark.parametrize("write", KINDS)
@pytest.mark.parametrize("absent", [None, "tokenizer.json", "vocab.txt"])
def test_tokens_that_a_file_adds(tmp_path, write, absent):
    transformers = pytest.importorskip("transformers")
    folder, export = tmp_path / "model", tmp_path / "export"
    for each in (folder, export):
        each.mkdir()
        (each / "config.json").write_text('{"model_type": "bert"}')
    write_vocab(folder, ADDED_VOCAB, do_lower_case=True)
    known = WordPiece(ADDED_VOCAB, added=ADDED).ids
    ids = {token.content: known[token.content] for token in ADDED}
    write(folder, [dataclasses.asdict(token) for token in ADDED], ids)
    theirs, ours = transformers.AutoTokenizer.from_pretrained(folder), Tokenizer.load(folder)
    ours.save(export, "bert")
    if absent:
        (export / absent).unlink()
    exported = transformers.AutoTokenizer.from_pretrained(export)
    draw = random.Random(4)
    contents = [token.content for token in ADDED] * 2
    others = [" ", " ", "-", "x", "é", "the", "中", "new  york", "<URL>", "[UNUSED1]", "u\u0308XY", "\u200b", "[MASK]"]
    for _ in range(300):
        text = "".join(draw.choices(contents + others, k=draw.randint(1, 6)))
        expected = theirs(text)["input_ids"]
        assert ours.encode_prompt(text) == expected == exported(text)["input_ids"], ascii(text)
        if "[MASK]" not in text:
            ids, starts, ends = ours.encode_with_offsets(text)
            assert ids == ours.encode(text) == expected[1:-1]
            surfaces = [
                text[slice(*place)].rstrip() for place in theirs(text, return_offsets_mapping=True)["offset_mapping"]
            ]
            assert [text[start:end] for start, end in zip(starts, ends, strict=True)] == surfaces[1:-1]
    again = Tokenizer.load(export)
    assert again.digest == ours.digest == pickle.loads(pickle.dumps(ours)).digest
    assert again.digest != WordPiece(ours.base).digest and len(again.vocab) == len(theirs)


def test_an_entry_beside_the_vocabulary_is_no_piece():
    ours = WordPiece([*SPECIAL, "a", "##b"], added=[AddedToken("ab", single_word=True)])
    assert ours.vocab[-1] == "ab" and ours.encode("ab, abb") == [7, ours.unk_id, 5, 6, 6]
    assert ours.encode("[SEP]") != [ours.sep_id]  # plain text, still


def test_a_blank_line_came_after_the_added_token_got_its_id(tmp_path):
    (tmp_path / "vocab.txt").write_text("\n".join(SMALL) + "\n\n", encoding="utf-8")
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<new>": len(SMALL)}))
    assert Tokenizer.load(tmp_path).vocab == [*SMALL, "<new>"]


def test_lines_end_as_they_like_and_no_length_means_512(tmp_path):
    (tmp_path / "vocab.txt").write_bytes("\r\n".join(SMALL).encode())
    (tmp_path / "tokenizer_config.json").write_text('{"model_max_length": 1000000000000000019884624838656}')
    found = Tokenizer.load(tmp_path)
    assert found.vocab == SMALL and found.max_length == 512


def broken_tokenizer_json(folder, change):
    WordPiece(SMALL).save(folder, "bert")
    data = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    change(data)
    (folder / "tokenizer.json").write_text(json.dumps(data))


BROKEN = {
    "absent": (lambda folder: folder.rmdir(), "there is no"),
    "empty folder": (lambda folder: None, "holds no vocabulary, neither vocab.txt, .*, nor tokenizer.json"),
    "a GPT-2 without its vocabulary": (
        lambda folder: (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "GPT2Tokenizer"}'),
        "holds no vocabulary, neither vocab.txt, vocab.json and merges.txt, ",
    ),
    "not UTF-8": (lambda folder: (folder / "vocab.txt").write_bytes(b"[PAD]\n\xff\xfe"), "not UTF-8"),
    "empty vocabulary": (lambda folder: (folder / "vocab.txt").touch(), r"no \[PAD\]"),
    "no [MASK]": (lambda folder: write_vocab(folder, SMALL[:4]), r"vocab.txt: the vocabulary has no \[MASK\]"),
    "[SEP] twice": (lambda folder: write_vocab(folder, [*SMALL, "[SEP]"]), r"\[SEP\] 2 times"),
    "config is broken": (
        lambda folder: (write_vocab(folder), (folder / "tokenizer_config.json").write_text("{")), "not valid JSON",
    ),
    "config is a list": (
        lambda folder: (write_vocab(folder), (folder / "tokenizer_config.json").write_text("[]")), "no JSON object",
    ),
    "config is odd": (lambda folder: write_vocab(folder, do_lower_case="yes"), "do_lower_case is 'yes'"),
    "no length": (lambda folder: write_vocab(folder, model_max_length="long"), "model_max_length is 'long'"),
    "another class": (lambda folder: write_vocab(folder, tokenizer_class="BertJapaneseTokenizer"), "BertJapanese"),
    "two vocabularies": (
        lambda folder: (WordPiece(SMALL).save(folder, "bert"), write_vocab(folder, SMALL[:-1])), "disagree",
    ),
    "BPE": (
        lambda folder: broken_tokenizer_json(folder, lambda data: data["model"].update(type="BPE")), "type is 'BPE'",
    ),
    "early BPE": (
        lambda folder: broken_tokenizer_json(folder, lambda data: data.update(model={"vocab": {}, "merges": []})),
        "unk_token is None",
    ),
    "another normalizer": (
        lambda folder: broken_tokenizer_json(folder, lambda data: data.update(normalizer=None)),
        "normalizer.type is None",
    ),
    "an added token without id": (
        lambda folder: broken_tokenizer_json(folder, lambda data: data["added_tokens"].append({"content": "<new>"})),
        "with the id None",
    ),
    "an added token without place": (
        lambda folder: (write_vocab(folder), (folder / "added_tokens.json").write_text('{"<new>": 7777}')),
        f"gives '<new>' the id 7777, where the next free one is {len(SMALL)}",
    ),
    "an added token that is none": (lambda folder: write_vocab(folder, extra_special_tokens=[3]), "adds 3"),
    "another [MASK]": (lambda folder: write_vocab(folder, mask_token="<mask>"), "mask_token is '<mask>'"),
    "no special tokens in text": (
        lambda folder: write_vocab(folder, split_special_tokens=True, extra_special_tokens=["<new>"]),
        "split_special_tokens is true",
    ),
    "no vocabulary": (
        lambda folder: broken_tokenizer_json(folder, lambda data: data["model"].pop("vocab")), "holds no vocabulary",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("breaks", "message"), BROKEN.values(), ids=BROKEN)
def test_what_cannot_be_loaded(tmp_path, breaks, message):
    folder = tmp_path / "model"
    folder.mkdir()
    breaks(folder)
    with pytest.raises(UserError, match=message) as caught:
        Tokenizer.load(folder)
    assert "\n" not in str(caught.value) and str(folder) in str(caught.value) and ": " in str(caught.value)


def test_a_failed_save_keeps_the_old_vocabulary(tmp_path, monkeypatch):
    WordPiece(SMALL).save(tmp_path, "bert")
    before = (tmp_path / "vocab.txt").read_bytes()

    def refuse(*_):
        raise OSError("disk full")

    monkeypatch.setattr("os.replace", refuse)
    with pytest.raises(OSError, match="disk full"):
        WordPiece(SMALL[:-1]).save(tmp_path, "bert")
    assert (tmp_path / "vocab.txt").read_bytes() == before
    assert not list(tmp_path.glob(".*"))
