"""The ids are those of the crate `tokenizers`, on every code point in use, on random Unicode and on IMDb's English."""

import collections
import dataclasses
import gzip
import itertools
import json
import os
import pathlib
import pickle
import random
import time

import numpy as np
import pytest
from code_points import CODE_POINTS
from test_damage import survives

from data import byte_vocab
from data.documents import Batch
from data.encode import PIECE, encoder
from minidistil.errors import UserError
from minidistil.tokenizer import Tokenizer
from minidistil.tokenizers import byte_bpe
from minidistil.tokenizers.added_tokens import AddedToken
from minidistil.tokenizers.byte_bpe import ByteBPE
from minidistil.tokenizers.byte_bpe_files import BYTES, END_OF_TEXT, ROBERTA, write_folder

ROOT = pathlib.Path(__file__).resolve().parent.parent
TEXTS = [
    "", " ", "  ", "\n", "Hello world", " Hello  world!\n\n  I'll say: it's don'T'S 're 's", " \t \r\n x",
    "a\u00a0b\x85c\x1cd \u3000e", "naïve Über 3½ Ⅻ٣ 中文字 한국 e\u0301", "👩\u200d💻 🙂🙂", "<mask> <s> <|endoftext|>",
]  # fmt: skip


def oracle(tokenizer):
    """The crate's tokenizer for plain text; its offsets leave out spaces, as RoBERTa's do."""
    tokenizers = pytest.importorskip("tokenizers")
    vocab = {token: i for i, token in enumerate(tokenizer.base)}
    result = tokenizers.Tokenizer(tokenizers.models.BPE(vocab, tokenizer.merges))
    result.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    result.post_processor = tokenizers.processors.ByteLevel(add_prefix_space=False, trim_offsets=True)
    result.decoder = tokenizers.decoders.ByteLevel()
    return result


def learned(kind, size=600):
    """A tokenizer learnt from our own README."""
    counts, splitter = collections.Counter(), byte_vocab.of_merges(kind, [])
    for chunk in splitter.chunks((ROOT / "README.md").read_text(encoding="utf-8")):
        counts.update(splitter.words(chunk))
    return byte_vocab.learn(counts, size, kind)


@pytest.fixture(scope="session")
def gpt2():
    """GPT-2's tokenizer; where the real assets are absent, a small one of its kind."""
    folder = pathlib.Path(os.environ.get("MINIDISTIL_ASSETS", ROOT.parent / "shared" / "assets")) / "models/gpt2-bpe"
    return Tokenizer.load(folder) if folder.is_dir() else learned("gpt2", 3000)


@pytest.fixture(scope="session")
def roberta(gpt2):
    """A tokenizer of RoBERTa's kind with the same merges, whose ids are in another order."""
    tokens = gpt2.base[:-1]
    random.Random(1).shuffle(tokens)
    special = [*ROBERTA.values()]
    return ByteBPE([*special[:4], *tokens, "madeupword0000", END_OF_TEXT, special[4]], gpt2.merges)


@pytest.fixture(params=["gpt2", "roberta"])
def ours(request):
    return request.getfixturevalue(request.param)


@pytest.fixture(scope="session", params=["gpt2", "roberta"])
def small(request):
    return learned(request.param)


def random_texts(seed, count):
    draw = random.Random(seed)
    white = [" ", " ", " ", " ", "\n", "\t", "\r\n", "\xa0", "\u3000", "\x85", "\x1c", "\u2028", "\u200b"]
    words = ["the", "ing", "Hello", "don't", "we'll", "'s", "'T", "l'", "2018", "½", "Über", "中文", "한국어", "नमस्ते",
             "e\u0301", "👩\u200d👩\u200d👧", "--", "...", "#!", "<s>", "<mask>", "http://a.b/c?d=e&f",
             "x" * 70]  # fmt: skip
    blocks = [range(start, start + 0x100) for start in range(0, 0x3400, 0x100)]
    blocks += [range(start, start + 0x400) for start in (0x4E00, 0xAC00, 0xFB00, 0x10000, 0x11000, 0x16C00, 0x1D000)]
    blocks += [range(start, start + 0x200) for start in (0x1F300, 0x1E000, 0x2F800, 0xE0000)]
    kinds = (
        lambda: draw.choice(white),
        lambda: draw.choice(words),
        lambda: draw.choice("abcdefghijklmnopqrstuvwxyzABC0123456789.,!?'\"-"),
        lambda: chr(draw.choice(draw.choice(blocks))),
    )
    for _ in range(count):
        yield "".join(kind() for kind in draw.choices(kinds, (35, 20, 25, 20), k=draw.randrange(1, 25)))


def differences(tokenizer, oracle, texts):
    """The texts whose ids or offsets differ from the oracle's, or that do not come back from their ids."""
    found = []
    for start in range(0, len(texts), 2000):
        batch = texts[start : start + 2000]
        for text, theirs in zip(batch, oracle.encode_batch(batch), strict=True):
            ids, starts, ends = tokenizer.encode_with_offsets(text)
            same = ids == theirs.ids == tokenizer.encode(text) and [*zip(starts, ends, strict=True)] == theirs.offsets
            if not same or tokenizer.decode(ids) != text:
                found.append(text)
    return found


def test_words_of_every_code_point(gpt2):
    """In frames that show whether it is a letter, a number, white space or another character."""
    splitter = oracle(gpt2).pre_tokenizer
    for start in range(0, len(CODE_POINTS), 200):
        characters = CODE_POINTS[start : start + 200]
        text = " ".join(f"a{c}1{c}!{c}" for c in characters)
        ends = itertools.accumulate(len(word) for chunk in gpt2.chunks(text) for word in gpt2.words(chunk))
        theirs = [end for _, (_, end) in splitter.pre_tokenize_str(text)]
        assert [*ends] == theirs, f"from U+{ord(characters[0]):04X}"


def test_ids_of_code_points(ours):
    texts = [f"a{c}1{c}! {c}{c}\n{c}" for c in [*CODE_POINTS[:0x3000], *CODE_POINTS[0x3000::30]]]
    assert differences(ours, oracle(ours), texts) == []


def test_ids_of_random_unicode(ours):
    texts = [*TEXTS, *random_texts(seed=20190214, count=20_000)]
    assert differences(ours, oracle(ours), texts) == []


def test_ids_of_imdb(ours, assets):
    with gzip.open(assets / "imdb" / "train.tsv.gz", "rt", encoding="utf-8", newline="\n") as file:
        texts = [line.rstrip("\n").split("\t")[3] for line in itertools.islice(file, 1, None, 25)]
    assert len(texts) == 1000 and differences(ours, oracle(ours), texts) == []


def test_gpt2_itself(assets):
    tokenizer = Tokenizer.load(assets / "models" / "gpt2-bpe")
    assert tokenizer.encode("Hello world") == [15496, 995] and tokenizer.sep_id == 50256
    assert (len(tokenizer.vocab), len(tokenizer.merges), tokenizer.max_length) == (50257, 50000, 1024)


@pytest.mark.parametrize("word", ["x", "ab", "\u4e2d\u6587", "\n", "letters"])
def test_long_words(ours, word):
    draw = random.Random(3)
    long = "".join(draw.choices("etaoinshrdlu", k=200_000)) if word == "letters" else word * (200_000 // len(word))
    started = time.process_time()
    ids = ours.encode(long)
    assert time.process_time() - started < 5  # seconds; a fifth of one where this was written
    assert ids == oracle(ours).encode(long).ids


def test_both_ways_to_merge():
    """Merges in any order, as no training gives them, and bytes of which many repeat."""
    draw = random.Random(4)
    for _ in range(200):
        tokens, merges = list("ab"), []
        for _ in range(12):
            pair = draw.choice(tokens), draw.choice(tokens)
            if "".join(pair) not in tokens:
                merges.append(pair)
                tokens.append("".join(pair))
        draw.shuffle(merges)
        vocab = [*BYTES, *(left + right for left, right in merges), END_OF_TEXT]
        ours = ByteBPE(vocab, merges)
        truth = oracle(ours)
        for _ in range(20):
            word = "".join(draw.choices("ab", k=draw.randrange(1, 60)))
            ids = [ours.ids[c] for c in word]
            assert ours._merge(list(ids)) == ours._merge_long(list(ids)) == truth.encode(word).ids


def test_a_merge_twice(small):
    """The last place counts, as in the crate."""
    again = ByteBPE(small.base, [*small.merges, small.merges[0], small.merges[5]])
    assert differences(again, oracle(again), list(random_texts(seed=8, count=500))) == []


def test_decode(ours):
    truth, draw = oracle(ours), random.Random(5)
    for ids in ([], [9], *(draw.choices(range(len(ours.vocab)), k=12) for _ in range(1000))):
        assert ours.decode(ids) == truth.decode(ids, skip_special_tokens=False)
    assert ours.decode([ours.sep_id, *ours.encode(" \u00fc")]) == ours.special["sep"] + " \u00fc"


def test_half_a_surrogate_pair(small):
    assert small.encode("a \ud83d b") == small.encode("a ? b")
    assert len(small.encode_with_offsets("a \ud83d b")[0]) == len(small.encode("a ? b"))


def test_offsets_by_hand(gpt2):
    text = " Hello \u00fcb\U0001f642  x\n"
    ids, starts, ends = gpt2.encode_with_offsets(text)
    pieces = [text[start:end] for start, end in zip(starts, ends, strict=True)]
    assert "".join(dict.fromkeys(pieces)) == "Hello\u00fcb\U0001f642x\n" and ids == gpt2.encode(text)


# --- what a tokenizer offers ---


def test_kinds(small):
    assert Tokenizer.hub_ids == {}  # of WordPiece: BERT's config.json names none
    if small.masked:
        assert small.special == ROBERTA and (small.pair_separators, small.second_type, small.max_length) == (2, 0, 512)
        assert small.special_ids == [0, 1, 2, 3, 599]
        assert small.hub_ids == {"bos_token_id": small.cls_id, "eos_token_id": small.sep_id}
    else:
        assert small.special == {"sep": END_OF_TEXT} and small.special_ids == [599] and small.max_length == 1024
        assert small.hub_ids == {"bos_token_id": small.sep_id, "eos_token_id": small.sep_id}


def test_documents_in_one_array(small):
    ids, end = small.encode_documents(["the capital", "", " \n", "unable"]), small.sep_id
    assert ids.dtype == np.uint32
    assert ids.tolist() == [*small.encode("the capital"), end, *small.encode(" \n"), end, *small.encode("unable"), end]


@pytest.mark.parametrize("added", [[], [AddedToken("<t>", rstrip=True)], [AddedToken("<t>", lstrip=True)]])
def test_long_documents_are_cut_where_no_id_changes(small, added):
    """Behind a token that takes white space along, every cut would."""
    tokenizer, draw = ByteBPE(small.base, small.merges, added), random.Random(9)
    parts = ["the", "<t>", "x1", " ", "  ", "\n\n", "\t", "\u3000", " \xa0 ", "'s"]
    texts = ["x" * PIECE + "<t>  b", "".join(draw.choices(parts, k=3 * PIECE))]
    for text in map(str.strip, texts):
        _, counts, _, ids, _ = encoder(tokenizer)(Batch(lambda payload: payload, [text], 1, 1))
        expected = [*tokenizer.encode(text), tokenizer.sep_id]
        assert np.frombuffer(ids, np.uint16).tolist() == expected and counts.tolist() == [len(expected)]


def test_prompts(small):
    words = small.encode
    if small.masked:
        expected = [small.cls_id, *words("a"), small.mask_id, *words(" b"), small.mask_id, small.sep_id]
        assert small.encode_prompt("a \t<mask> b<mask>") == expected
    else:
        assert small.encode_prompt("a <mask>") == [small.sep_id, *words("a <mask>")]
        assert small.encode_prompt(f"a {END_OF_TEXT}b") == [small.sep_id, *words("a "), small.sep_id, *words("b")]
    for token in small.special.values():  # plain text
        assert not set(words(f"a {token}")) & set(small.special_ids) and small.decode(words(token)) == token


def test_the_caches_are_bounded_and_change_nothing(monkeypatch, small):
    texts = list(random_texts(seed=11, count=1000)) + ["the capital of france " * 3] * 100
    expected = [small.encode(text) for text in texts]
    monkeypatch.setattr(byte_bpe, "CACHE_ENTRIES", 64)
    fresh = pickle.loads(pickle.dumps(small))
    for text, ids in zip(texts, expected, strict=True):
        assert fresh.encode(text) == ids
        assert all(len(cache) + len(cache.older) <= 64 for cache in (fresh._cache, fresh._packed))
    assert " capital" in fresh._cache


def test_pickle_for_worker_processes(small):
    tokenizer = ByteBPE(
        small.base, small.merges, [AddedToken("<new>"), AddedToken("ab", normalized=True)], max_length=7
    )
    tokenizer.encode("the capital")
    copy = pickle.loads(pickle.dumps(tokenizer))
    assert (copy.digest, copy.max_length, len(copy._cache)) == (tokenizer.digest, 7, 0)
    assert copy.encode("The <new>ab") == tokenizer.encode("The <new>ab")


def test_digest_follows_all_that_changes_ids(small):
    vocab, merges, end = small.base, small.merges, small.special["sep"]
    swapped = [*vocab[:300], vocab[301], vocab[300], *vocab[302:]]
    different = [
        ByteBPE(*arguments).digest
        for arguments in (
            (vocab, merges, [], end),
            (swapped, merges, [], end),
            (vocab, [merges[1], merges[0], *merges[2:]], [], end),
            (vocab, merges, [AddedToken("the")], end),
            (vocab, merges, [AddedToken("the", lstrip=True)], end),
        )
    ]
    assert len(set(different)) == len(different) and all(len(digest) == 64 for digest in different)
    assert different[0] == ByteBPE(tuple(vocab), [[*pair] for pair in merges], max_length=128).digest
    if not small.masked:
        assert ByteBPE(vocab, merges, sep=vocab[300]).digest not in different


# --- files ---

ADDED = [
    AddedToken("<url>", single_word=True),
    AddedToken("the", special=False),  # also made by merges
    AddedToken("new york", lstrip=True, normalized=True, special=False),
    AddedToken("\u4e2d\u56fd", rstrip=True),
    AddedToken("[X]", lstrip=True, rstrip=True),
    AddedToken("[XY]"),
]
PARTS = ["<url>", "the", "new york", "\u4e2d\u56fd", "[X]", "[XY]"] * 2
PARTS += [" ", "  ", "\n", "\t", "\xa0", "-", "x", "\u00e9", " the", "new  york", "<mask>", END_OF_TEXT, "</s>"]


@pytest.mark.parametrize("absent", [(), ("tokenizer.json",), ("vocab.json", "merges.txt")])
@pytest.mark.parametrize("added", [[], ADDED], ids=["plain", "added"])
def test_saved_for_transformers(tmp_path, small, absent, added, caplog, recwarn, capfd):
    transformers = pytest.importorskip("transformers")
    ours = ByteBPE(small.base, small.merges, added, max_length=2000)
    ours.save(tmp_path, "roberta" if small.masked else "gpt2")
    for name in absent:
        (tmp_path / name).unlink()
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert type(theirs).__name__ == ("RobertaTokenizer" if small.masked else "GPT2Tokenizer")
    assert theirs.model_max_length == 2000 and len(theirs) == len(ours.vocab)
    draw, begun = random.Random(7), int(not small.masked)  # transformers puts nothing before GPT-2's text
    texts = [*TEXTS, *random_texts(seed=7, count=300)]
    texts += ["".join(draw.choices(PARTS, k=draw.randint(1, 6))) for _ in range(1000)]
    for text in texts:
        found = theirs(text, return_offsets_mapping=True)
        assert ours.encode_prompt(text)[begun:] == found["input_ids"], ascii(text)
        if not any(token in text for token in ours.special.values()):
            ids, starts, ends = ours.encode_with_offsets(text)
            assert ids == ours.encode(text)
            expected = [text[slice(*place)].strip() for place in found["offset_mapping"]]
            expected = expected[1:-1] if small.masked else expected
            assert [text[slice(*place)].strip() for place in zip(starts, ends, strict=True)] == expected, ascii(text)
    for name, token in {"bos": "cls", "eos": "sep", "unk": "unk"}.items():
        assert getattr(theirs, f"{name}_token") == ours.special.get(token, ours.special["sep"])
    if small.masked:
        assert theirs("a b", "c")["input_ids"] == ours.encode_prompt("a b</s></s>c")
        assert theirs.mask_token_id == ours.mask_id and "token_type_ids" not in theirs("a")
    again = Tokenizer.load(tmp_path)
    assert (again.digest, again.max_length, again.added) == (ours.digest, 2000, ours.added)
    said = capfd.readouterr()
    assert not caplog.records and not recwarn.list and said.err == said.out == ""


def only(folder, tokenizer, *names):
    """Writes the files of a tokenizer with these names, and no others."""
    write_folder(folder, tokenizer)
    for path in folder.iterdir():
        if path.name not in names:
            path.unlink()


def test_a_vocabulary_and_merges_alone(tmp_path, small):
    only(tmp_path, small, "vocab.json", "merges.txt")
    for path in (tmp_path, tmp_path / "vocab.json", str(tmp_path / "merges.txt")):
        assert Tokenizer.load(path).digest == small.digest
    text = (tmp_path / "merges.txt").read_text(encoding="utf-8").removeprefix("#version: 0.2\n")
    (tmp_path / "merges.txt").write_text("\ufeff" + text.rstrip("\n"), encoding="utf-8", newline="\r\n")  # an editor's
    assert Tokenizer.load(tmp_path).digest == small.digest


@pytest.mark.parametrize("merges", ["strings", "pairs"])
@pytest.mark.parametrize("kind", ["BPE", None])
@pytest.mark.parametrize("in_sequence", [True, False])
def test_a_tokenizer_json_alone(tmp_path, small, merges, kind, in_sequence):
    only(tmp_path, small, "tokenizer.json")

    def change(data):
        data["model"]["type"] = kind
        if merges == "pairs":
            data["model"]["merges"] = [merge.split(" ") for merge in data["model"]["merges"]]
        if in_sequence:
            data["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [data["pre_tokenizer"]]}

    in_json(change)(tmp_path)
    assert Tokenizer.load(tmp_path).digest == small.digest == Tokenizer.load(tmp_path / "tokenizer.json").digest


def added_by_transformers(folder, tokens):
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    theirs.add_tokens([transformers.AddedToken(**dataclasses.asdict(token)) for token in tokens])
    theirs.save_pretrained(folder)


def test_what_transformers_saved(tmp_path, small):
    transformers = pytest.importorskip("transformers")
    small.save(tmp_path, "gpt2")
    added_by_transformers(tmp_path, ADDED)
    for absent in (None, "tokenizer_config.json", "vocab.json"):
        if absent and (tmp_path / absent).exists():
            (tmp_path / absent).unlink()
        ours = Tokenizer.load(tmp_path)
        assert {token.content for token in ours.added} == {token.content for token in ADDED}
        theirs = transformers.PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "tokenizer.json"))
        draw = random.Random(2)
        for _ in range(300):
            text = "".join(draw.choices(PARTS, k=draw.randint(1, 6)))
            begun = int(not small.masked)
            assert ours.encode_prompt(text)[begun:] == theirs(text)["input_ids"], ascii(text)


@pytest.mark.parametrize("config", [{}, {"model_max_length": 512}])
def test_as_released(tmp_path, small, config):
    """Folders of 2019: the files of the vocabulary, tokenizer.json, and hardly a word of configuration."""
    transformers = pytest.importorskip("transformers")
    only(tmp_path, small, "vocab.json", "merges.txt", "tokenizer.json")
    in_json(lambda data: [token.update(normalized=True) for token in data["added_tokens"]])(tmp_path)
    in_json(lambda data: data["model"].pop("type"))(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "roberta" if small.masked else "gpt2"}))
    if config:
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    ours, theirs = Tokenizer.load(tmp_path), transformers.AutoTokenizer.from_pretrained(tmp_path)
    for text in [*TEXTS, "a <mask> b", "a\u3000 <mask><s> b", *random_texts(seed=13, count=200)]:
        assert ours.encode_prompt(text)[not small.masked :] == theirs(text)["input_ids"], ascii(text)


def test_special_tokens_behind_the_vocabulary(tmp_path):
    """Of either kind: they have their ids from the list of added tokens."""
    for kind, special in (("gpt2", [END_OF_TEXT]), ("roberta", [*ROBERTA.values()])):
        plain = learned(kind)
        vocab = [token for token in plain.base if token not in special]
        ours = ByteBPE(vocab, plain.merges, [AddedToken(token, lstrip=token == "<mask>") for token in special])
        assert ours.special == plain.special and ours.added == [] and ours.sep_id >= len(vocab)
        assert not set(ours.encode(special[0])) & set(ours.special_ids)
        for names in (["vocab.json", "merges.txt", "tokenizer_config.json"], ["tokenizer.json"]):
            only(tmp_path, ours, *names)
            again = Tokenizer.load(tmp_path)
            assert again.digest == ours.digest == pickle.loads(pickle.dumps(again)).digest
        added_by_transformers(tmp_path, [])
        assert Tokenizer.load(tmp_path).encode_prompt("a <mask>") == ours.encode_prompt("a <mask>")


@pytest.mark.parametrize("name", ["tokenizer_config.json", "special_tokens_map.json"])
def test_another_end_of_text(tmp_path, name):
    plain = learned("gpt2")
    ours = ByteBPE([*plain.base[:-1], "</s>"], plain.merges, sep="</s>")
    only(tmp_path, ours, "vocab.json", "merges.txt")
    (tmp_path / name).write_text(json.dumps({"eos_token": {"content": "</s>"}, "pad_token": "[PAD]"}))
    found = Tokenizer.load(tmp_path)
    assert (found.special, found.vocab[found.sep_id]) == ({"sep": "</s>"}, "</s>")
    assert [token.content for token in found.added] == ["[PAD]"] and found.ids["[PAD]"] == len(ours.vocab)
    found.save(tmp_path / "again", "gpt2")
    assert Tokenizer.load(tmp_path / "again").digest == found.digest
    (tmp_path / name).write_text(json.dumps({"eos_token": "<eos>"}))
    with pytest.raises(UserError, match="vocab.json: the vocabulary has no <eos>"):
        Tokenizer.load(tmp_path)


@pytest.mark.parametrize("name", ["tokenizer_config.json", "special_tokens_map.json"])
def test_a_token_for_padding(tmp_path, name):
    """GPT-2 has none: who fine-tuned a model added one, and its student's folder pads with it, too."""
    transformers = pytest.importorskip("transformers")
    only(tmp_path, learned("gpt2"), "vocab.json", "merges.txt")
    (tmp_path / name).write_text(json.dumps({"pad_token": {"content": "[PAD]"}, "unk_token": END_OF_TEXT}))
    ours = pickle.loads(pickle.dumps(Tokenizer.load(tmp_path)))
    ours.save(tmp_path / "again", "gpt2")
    (tmp_path / "again" / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "again")
    assert (theirs.pad_token, theirs.pad_token_id) == ("[PAD]", ours.ids["[PAD]"]) and theirs.eos_token == END_OF_TEXT
    padded = theirs(["a", "a b c"], padding=True)["input_ids"]
    assert padded[0] == ours.encode("a") + [ours.ids["[PAD]"]] * (len(padded[1]) - 1)
    ends = {f"{name}_token": END_OF_TEXT for name in ("bos", "eos")}
    assert Tokenizer.load(tmp_path / "again").purposes == ours.purposes | ends


def in_json(change, name="tokenizer.json"):
    def breaks(folder):
        data = json.loads((folder / name).read_text(encoding="utf-8"))
        change(data)
        (folder / name).write_text(json.dumps(data))

    return breaks


def alone(*names):
    """Removes all files but these, then changes what is left."""

    def decorate(breaks):
        def breaks_alone(folder):
            for path in folder.iterdir():
                if path.name not in names:
                    path.unlink()
            breaks(folder)

        return breaks_alone

    return decorate


def in_merges(change):
    def breaks(folder):
        lines = (folder / "merges.txt").read_text(encoding="utf-8").split("\n")
        (folder / "merges.txt").write_text("\n".join(change(lines)), encoding="utf-8")

    return alone("vocab.json", "merges.txt")(breaks)


def in_vocab(change):
    return alone("vocab.json", "merges.txt")(in_json(change, "vocab.json"))


def in_tokenizer(**values):
    return alone("tokenizer.json")(in_json(lambda data: data.update(values)))


def in_model(**values):
    return alone("tokenizer.json")(in_json(lambda data: data["model"].update(values)))


def level(**values):
    return {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True} | values


BROKEN = {
    "merges end after a line": (in_merges(lambda lines: lines[:100]), "merges.txt, line 100 is the last, but no merge"),
    "merges end in a line": (in_merges(lambda lines: [*lines[:100], lines[100][:1]]), "line 101: .* is no pair of"),
    "no merges": (in_merges(lambda lines: []), "cut short"),
    "three tokens": (in_merges(lambda lines: [*lines[:50], "a b c", *lines[50:]]), "line 51: 'a b c' is no pair"),
    "an unknown token": (in_merges(lambda lines: [*lines[:50], "a zzq", *lines[50:]]), "line 51 merges .* no 'zzq'"),
    "an unknown result": (in_merges(lambda lines: [*lines[:9], "q %", *lines[9:]]), "line 10 merges .* no 'q%'"),
    "no merges.txt": (alone("vocab.json")(lambda folder: None), "there is no .*merges.txt"),
    "no vocab.json": (alone("merges.txt")(lambda folder: None), "there is no .*vocab.json"),
    "an end of words": (
        alone("vocab.json", "merges.txt")(
            lambda folder: (
                in_json(lambda ids: ids.update({"e</w>": len(ids), "xe</w>": len(ids) + 1}), "vocab.json")(folder),
                in_merges(lambda lines: [*lines[:-1], "x e</w>", ""])(folder),
            )
        ),
        "'e</w>' is neither a byte nor merged",
    ),
    "a merge to a special token": (
        alone("vocab.json", "merges.txt", "tokenizer_config.json")(
            in_json(lambda config: (config.clear(), config.update(eos_token="\u0120t")), "tokenizer_config.json")
        ),
        "line .* merges '\u0120' and 't', but '\u0120t' is a special token",
    ),
    "a list": (alone("merges.txt")(lambda folder: (folder / "vocab.json").write_text("[1]")), "holds no JSON object"),
    "half a file": (
        alone("vocab.json", "merges.txt")(
            lambda folder: (folder / "vocab.json").write_text((folder / "vocab.json").read_text()[:900])
        ),
        "vocab.json is not valid JSON",
    ),
    "a hole": (in_vocab(lambda ids: ids.update({"<new>": len(ids) + 1})), "'<new>' has 601 where 600 comes next"),
    "an id twice": (in_vocab(lambda ids: ids.update({"<new>": 5})), "has 5 where 6 comes next"),
    "an id of text": (in_vocab(lambda ids: ids.update({"<new>": "600"})), "holds no vocabulary of tokens and ids"),
    "a byte is missing": (
        in_vocab(lambda ids: ids.update({"<new>": ids.pop("\u0120")})), "no token '\u0120', which spells the byte 32",
    ),
    "no end of text": (
        in_vocab(lambda ids: ids.update({"<new>": ids.pop(END_OF_TEXT)})), r"the vocabulary has no <\|endoftext\|>",
    ),
    "no <pad>": (in_vocab(lambda ids: ids.update({"<mask>": len(ids)})), "vocab.json: the vocabulary has no <s>"),
    "two vocabularies": (in_json(lambda ids: ids.update({"<new>": len(ids)}), "vocab.json"), "disagree: remove"),
    "another class": (
        in_json(lambda config: config.update(tokenizer_class="CLIPTokenizer"), "tokenizer_config.json"),
        "tokenizer_class is CLIPTokenizer: use",
    ),
    "a space before": (
        in_json(lambda config: config.update(add_prefix_space=True), "tokenizer_config.json"),
        "tokenizer_config.json: add_prefix_space is True, which is not supported",
    ),
    "WordLevel": (in_model(type="WordLevel"), "model.type is 'WordLevel'"),
    "of sentencepiece": (
        in_tokenizer(normalizer={"type": "Prepend", "prepend": "_"}), "normalizer is 'Prepend', which is not supported",
    ),
    "bytes as a last resort": (in_model(byte_fallback=True), "model.byte_fallback is True, which is not supported"),
    "dropout": (in_model(dropout=0.1), "model.dropout is 0.1"),
    "a suffix": (in_model(end_of_word_suffix="</w>"), "model.end_of_word_suffix is '</w>'"),
    "a prefix": (in_model(continuing_subword_prefix="##"), "model.continuing_subword_prefix is '##'"),
    "whole words": (in_model(ignore_merges=True), "model.ignore_merges is True"),
    "another splitter": (in_tokenizer(pre_tokenizer={"type": "Whitespace"}), "pre_tokenizer.type is 'Whitespace'"),
    "two splitters": (
        in_tokenizer(pre_tokenizer={"type": "Sequence", "pretokenizers": [{"type": "Digits"}, level()]}),
        "pre_tokenizer.type is 'Sequence'",
    ),
    "no splitter": (in_tokenizer(pre_tokenizer=None), "pre_tokenizer.type is None"),
    "a space before in JSON": (in_tokenizer(pre_tokenizer=level(add_prefix_space=True)), "add_prefix_space is True"),
    "no words": (in_tokenizer(pre_tokenizer=level(use_regex=False)), "pre_tokenizer.use_regex is False"),
    "a merge of one": (in_model(merges=["a b", "ab"]), "tokenizer.json, merge 2: 'ab' is no pair of tokens"),
    "no merges in JSON": (in_model(merges=None), "holds no vocabulary of tokens and merges"),
}  # fmt: skip


@pytest.mark.parametrize(("breaks", "message"), BROKEN.values(), ids=BROKEN)
def test_what_cannot_be_loaded(tmp_path, breaks, message):
    learned("gpt2").save(tmp_path, "gpt2")
    breaks(tmp_path)
    with pytest.raises(UserError, match=message) as caught:
        Tokenizer.load(tmp_path)
    assert "\n" not in str(caught.value) and str(tmp_path) in str(caught.value) and len(str(caught.value)) < 600


def test_a_merge_of_a_token_that_nobody_spells(tmp_path):
    """What a trained file may leave unused is no damage: tokens that no merge could make, and those for special use."""
    plain = learned("gpt2")
    only(tmp_path, ByteBPE([*plain.base, "madeupword0000", "<s>", "[PAD]"], plain.merges), "vocab.json", "merges.txt")
    assert Tokenizer.load(tmp_path).encode("madeupword0000 <s>") == plain.encode("madeupword0000 <s>")


@pytest.mark.parametrize("names", [
    ("vocab.json", "merges.txt"), ("merges.txt", "vocab.json"), ("tokenizer.json",),
    ("tokenizer.json", "tokenizer_config.json"), ("tokenizer_config.json", "vocab.json", "merges.txt"),
    ("special_tokens_map.json", "vocab.json", "merges.txt"),
], ids=lambda names: "-".join(names))  # fmt: skip
@pytest.mark.parametrize("kind", ["gpt2", "roberta"])
def test_damaged_files(tmp_path, kind, names):
    """Each damaged version of the first of these files loads, and can be used and saved, or is refused in one line."""
    plain = learned(kind, 300)
    only(tmp_path, ByteBPE(plain.base, plain.merges, ADDED[:2] if len(names) > 2 else []), *names)

    turn = itertools.count()

    def use():
        tokenizer = Tokenizer.load(tmp_path)
        text = "the  <url> <mask> \u00e9\n"
        tokenizer.encode_prompt(text)
        ids, _, _ = tokenizer.encode_with_offsets(text)
        assert ids == tokenizer.encode(text) and tokenizer.decode(ids) is not None and len(tokenizer.digest) == 64
        if next(turn) % 8 == 0:  # it takes longer than all the rest
            tokenizer.save(tmp_path / "again", kind)
            assert Tokenizer.load(tmp_path / "again").digest == tokenizer.digest

    survives(tmp_path / names[0], use)


def test_a_failed_save_keeps_the_old_files(tmp_path, monkeypatch, small):
    small.save(tmp_path, "gpt2")
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def refuse(*_):
        raise OSError("disk full")

    monkeypatch.setattr("os.replace", refuse)
    with pytest.raises(OSError, match="disk full"):
        ByteBPE(small.base, small.merges, ADDED).save(tmp_path, "gpt2")
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
