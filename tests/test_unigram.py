"""The ids are those of the sentencepiece library, and transformers' wherever it follows it."""

import base64
import itertools
import json
import os
import pathlib
import pickle
import random
import shutil
import subprocess
import sys

import numpy as np
import pytest
import sentencepiece
from code_points import CODE_POINTS
from conftest import ROOT
from test_damage import survives

from data.prepare import prepare
from minidistil.data import Corpus
from minidistil.errors import UserError
from minidistil.tokenizer import Tokenizer
from minidistil.tokenizers import protobuf, sentencepiece_model, unigram_files
from minidistil.tokenizers.sentencepiece_model import CONTROL, NORMAL, UNKNOWN
from minidistil.tokenizers.unigram import Unigram

MODEL = "sentencepiece.bpe.model"
TEXTS = [
    "", " ", "The capital of France is Paris.", "  two  spaces\tand\nlines ", "<s> <mask> </s> <unk>",
    "½ ﬁ ～ ㈱ é e\u0301", "Straße, Größe; naïve", "東京 は 日本", "Привет мир", "\u200b\ufeffzero\u200bwidth",
    "a\0b\x01c", "x" * 3000, "🙂👩‍💻", "a\ufffdb", "▁under ▁", "0123456789", "你好，世界。", "\u3000wide\u00a0space",
]  # fmt: skip


def train(path, rule="nmt_nfkc", size=1200, **options):
    """Writes a small model of this project's own prose and a few lines in other scripts."""
    text = (ROOT / "README.md").read_text(encoding="utf-8").splitlines() + 20 * TEXTS[5:9]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=(line for line in text if "\0" not in line),
        model_prefix=str(path.with_suffix("")),
        vocab_size=size,
        hard_vocab_limit=False,
        normalization_rule_name=rule,
        num_threads=1,
        minloglevel=2,
        **options,
    )


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """A folder with a .model as XLM-R's, and what says so."""
    folder = tmp_path_factory.mktemp("trained")
    train(folder / MODEL)
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "XLMRobertaTokenizer"}))
    return folder


@pytest.fixture
def folder(trained, tmp_path):
    return pathlib.Path(shutil.copytree(trained, tmp_path / "model"))


@pytest.fixture(scope="session")
def tokenizer(trained):
    return Tokenizer.load(trained)


@pytest.fixture(scope="session")
def library(trained):
    """Text -> the ids of XLM-R, as fairseq makes them of sentencepiece's: one further on, the unknown piece is 3."""
    processor = sentencepiece.SentencePieceProcessor(model_file=str(trained / MODEL))
    return lambda text: [i + 1 if i else 3 for i in processor.encode(text)]


@pytest.fixture(scope="session")
def theirs(tokenizer):
    """transformers' XLM-R tokenizer with these pieces."""
    transformers = pytest.importorskip("transformers")
    vocab = [(text, score) for text, score, _ in tokenizer.pieces]
    return transformers.XLMRobertaTokenizer(vocab=vocab, _spm_precompiled_charsmap=tokenizer.charsmap)


def paragraphs(assets, language):
    data = json.loads((assets / "xquad" / f"xquad.{language}.json").read_text(encoding="utf-8"))["data"]
    found = [paragraph for article in data for paragraph in article["paragraphs"]]
    return [text for p in found for text in (p["context"], *(question["question"] for question in p["qas"]))]


def plain(tokenizer, text):
    return tokenizer._tokenizer.encode(text, add_special_tokens=False).ids


def in_context(character):
    return f"ab {character} x{character}y"


def test_a_model_is_read_as_the_library_reads_it(trained):
    pieces, charsmap = sentencepiece_model.read(trained / MODEL)
    processor = sentencepiece.SentencePieceProcessor(model_file=str(trained / MODEL))
    assert len(pieces) == len(processor)
    for i, (text, score, kind) in enumerate(pieces):
        assert (text, score) == (processor.id_to_piece(i), processor.get_score(i))
        assert kind == (UNKNOWN if processor.is_unknown(i) else CONTROL if processor.is_control(i) else NORMAL)
    assert charsmap == sentencepiece_model.nmt_nfkc()
    again = sentencepiece.SentencePieceProcessor()
    again.LoadFromSerializedProto(sentencepiece_model.write(pieces, charsmap))
    assert [again.id_to_piece(i) for i in range(len(again))] == [text for text, _, _ in pieces]
    assert all(again.encode(text) == processor.encode(text) for text in TEXTS)


def test_protobuf_fields():
    data = protobuf.field(1, "é") + protobuf.field(300, 2**40) + protobuf.field(3, -1.5) + protobuf.field(4, True)
    assert [value for _, _, value in protobuf.fields(data)] == ["é".encode(), 2**40, b"\0\0\xc0\xbf", 1]
    for cut in range(1, len(data)):
        try:
            assert (
                list(protobuf.fields(data[:cut]))
                == list(protobuf.fields(data))[: len(list(protobuf.fields(data[:cut])))]
            )
        except ValueError:
            continue
    with pytest.raises(ValueError):
        list(protobuf.fields(data[:-1]))


def test_ids_are_the_librarys(tokenizer, library):
    rng = random.Random(0)
    common = "  \n\t.,abcTheisé½ßñ中文字日🙂\u200d\u00a0\u3000²Ⅷﬁ\u0301Привет▁<s>"
    texts = TEXTS + [in_context(character) for character in CODE_POINTS[::8]]
    for _ in range(5000):
        odd = (rng.choice(CODE_POINTS) if rng.random() < 0.1 else rng.choice(common) for _ in range(40))
        texts.append("".join(odd)[: rng.randint(0, 40)])
    assert [text for text in texts if tokenizer.encode(text) != library(text)] == []
    documents = [ids + [2] for ids in map(library, texts) if ids]
    assert tokenizer.encode_documents(texts).tolist() == [i for ids in documents for i in ids]
    assert tokenizer.encode_documents(["", " "]).dtype == np.uint32
    assert tokenizer.encode("a\ud800b") == library("a\ufffdb")


def test_ids_are_transformers_but_for_a_control_character(tokenizer, theirs):
    """tokenizers splits text at U+0085, which sentencepiece drops."""
    texts = [in_context(character) for character in CODE_POINTS[::8]] + TEXTS[:4] + TEXTS[5:9]
    ids = [encoding.ids for encoding in theirs._tokenizer.encode_batch(texts, add_special_tokens=False)]
    assert [text for text, i in zip(texts, ids, strict=True) if tokenizer.encode(text) != i] == []
    assert tokenizer.encode(in_context("\x85")) != plain(theirs, in_context("\x85"))


def test_special_tokens_and_pairs(tokenizer, theirs):
    assert tokenizer.special == {"cls": "<s>", "pad": "<pad>", "sep": "</s>", "unk": "<unk>", "mask": "<mask>"}
    assert (tokenizer.cls_id, tokenizer.pad_id, tokenizer.sep_id, tokenizer.unk_id) == (0, 1, 2, 3)
    assert tokenizer.mask_id == len(tokenizer.vocab) - 1 == theirs.mask_token_id
    assert not set(tokenizer.encode("<s> <mask> </s> <pad> <unk>")) & {0, 1, 2, tokenizer.mask_id}
    for text in ("Paris is <mask> of", "<mask>Paris<mask>, <mask> . ", "Paris"):
        assert tokenizer.encode_prompt(text) == theirs.encode(text)
    a, b, sep = tokenizer.encode("the one"), tokenizer.encode("the other"), tokenizer.sep_id
    pair = [tokenizer.cls_id, *a, *[sep] * tokenizer.pair_separators, *b, sep]
    assert theirs("the one", "the other")["input_ids"] == pair
    assert tokenizer.second_type == 0 and tokenizer.hub_ids == {"bos_token_id": 0, "eos_token_id": 2}
    assert tokenizer.decode(tokenizer.encode(" The capital  of France.")) == "The capital of France."


def test_offsets(tokenizer, theirs, library):
    """Those of transformers, except that a mark of a word's start on its own is empty, not the first character.

    transformers rounds sums of scores otherwise than sentencepiece: |---|---| with pieces of two and four columns, or a
    bar of blocks, is a tie, of which each has its own end.
    """
    texts = [text for text in TEXTS if not set("<\0\u0301\u200b") & set(text)]
    texts += (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    for text in texts:
        ids, starts, ends = tokenizer.encode_with_offsets(text)
        assert ids == library(text) == tokenizer.encode(text)
        encoding = theirs._tokenizer.encode(text, add_special_tokens=False)
        if set(text) <= set("|- :") or "\u2588" in text:
            assert sorted(ids) == sorted(encoding.ids), text
            continue
        assert ids == encoding.ids, text
        for i, *ours, expected in zip(ids, starts, ends, encoding.offsets, strict=True):
            if tokenizer.vocab[i] == "▁":
                assert ours[0] == ours[1] and ours[0] in expected
            else:
                assert tuple(ours) == expected, (text[:50], tokenizer.vocab[i])


def test_offsets_of_what_normalisation_changes(tokenizer):
    """A letter and its accent are one piece's, all pieces of a sign have the sign, dropped text is nobody's."""
    text = "a \u200b Straße e\u0301 ½"
    ids, starts, ends = tokenizer.encode_with_offsets(text)
    pieces = [(tokenizer.vocab[i], text[start:end]) for i, start, end in zip(ids, starts, ends, strict=True)]
    assert "".join(piece for piece, _ in pieces) == "▁a▁Straße▁é▁1⁄2"
    spans = [span for piece, span in pieces if piece != "▁"]
    assert spans[0] == "a" and "".join(spans[1:]).startswith("Straßee\u0301½") and set("".join(spans[-1:])) == {"½"}
    assert starts == sorted(starts) and ends == sorted(ends)


def test_real_text(assets):
    """A vocabulary of 250,002 pieces: the library's ids, and transformers' ids and offsets, in English and German."""
    tokenizer = Tokenizer.load(assets / "models" / "multilingual-e5-small-q4")
    transformers = pytest.importorskip("transformers")
    vocab = [(text, score) for text, score, _ in tokenizer.pieces]
    theirs = transformers.XLMRobertaTokenizer(vocab=vocab, _spm_precompiled_charsmap=tokenizer.charsmap)
    texts = paragraphs(assets, "en")[::4] + paragraphs(assets, "de")[::4]
    for text, encoding in zip(texts, theirs._tokenizer.encode_batch(texts, add_special_tokens=False), strict=True):
        ids, starts, ends = tokenizer.encode_with_offsets(text)
        assert ids == encoding.ids == tokenizer.encode(text)
        for i, *ours, expected in zip(ids, starts, ends, encoding.offsets, strict=True):
            assert tuple(ours) == expected or tokenizer.vocab[i] == "▁"


def test_normaliser_that_was_lost(assets, tmp_path, capfd):
    """A conversion wrote NFKC for nmt_nfkc: said in one line; the saved tokenizer.json has sentencepiece's table."""
    tokenizer = Tokenizer.load(assets / "models" / "multilingual-e5-small-q4")
    tokenizer.save(tmp_path)
    capfd.readouterr()
    again = Tokenizer.load(tmp_path)
    assert again.digest == tokenizer.digest and capfd.readouterr().err == ""
    theirs = pytest.importorskip("transformers").AutoTokenizer.from_pretrained(tmp_path)
    text = "Zu welchem \u200bJahr, and <mask>"
    assert theirs.encode(text) == tokenizer.encode_prompt(text)


@pytest.mark.parametrize("family", ["xlm-roberta", "distilbert", "bert"])
def test_saved_folders_open_in_transformers(folder, tmp_path, family):
    tokenizer = Tokenizer.load(folder)
    tokenizer.max_length = 77
    out = tmp_path / "out"
    tokenizer.save(out, family)
    (out / "config.json").write_text(json.dumps({"model_type": family}))
    assert (out / MODEL).read_bytes() == (folder / MODEL).read_bytes()
    theirs = pytest.importorskip("transformers").AutoTokenizer.from_pretrained(out)
    assert theirs.model_max_length == 77 and "token_type_ids" not in theirs("a")
    for text in ["Paris is <mask> of", "½ ﬁ ～ ㈱", "the <mask>.", "<s> x </s>"]:
        assert theirs.encode(text) == tokenizer.encode_prompt(text)
    assert theirs.get_vocab() == tokenizer.ids
    again = Tokenizer.load(out)
    assert (again.digest, again.max_length) == (tokenizer.digest, 77)
    again.save(out, family)  # onto itself
    assert Tokenizer.load(out).digest == tokenizer.digest
    (out / MODEL).unlink()  # tokenizer.json alone says the same
    assert Tokenizer.load(out).digest == tokenizer.digest


def test_added_tokens(folder, tmp_path):
    n = len(Tokenizer.load(folder).vocab)
    config = {"tokenizer_class": "XLMRobertaTokenizer", "added_tokens_decoder": {
        str(n - 1): {"content": "<mask>", "lstrip": True}, str(n): {"content": "<url>", "special": False},
        str(n + 1): {"content": "zqx", "single_word": True, "special": True}}}  # fmt: skip
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = Tokenizer.load(folder)
    assert [token.content for token in tokenizer.added] == ["<url>", "zqx"] and len(tokenizer.vocab) == n + 2
    text = "see <url>, zqx and bezqx <mask>"
    ids, starts, ends = tokenizer.encode_with_offsets(text)
    assert ids == tokenizer.encode(text) and ids.count(n) == ids.count(n + 1) == 1 and n - 1 not in ids
    assert text[starts[ids.index(n)] : ends[ids.index(n)]] == "<url>"
    assert tokenizer.encode_documents([text, ""]).tolist() == [*ids, 2]
    tokenizer.save(tmp_path / "out")
    theirs = pytest.importorskip("transformers").AutoTokenizer.from_pretrained(tmp_path / "out")
    assert theirs.encode(text) == tokenizer.encode_prompt(text)
    config["added_tokens_decoder"][str(n + 7)] = config["added_tokens_decoder"].pop(str(n + 1))
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="not its own or the next free one"):
        Tokenizer.load(folder)


def test_pickles_and_corpora(folder, tmp_path):
    tokenizer = Tokenizer.load(folder)
    again = pickle.loads(pickle.dumps(tokenizer))
    assert again.digest == tokenizer.digest and again.encode("The capital") == tokenizer.encode("The capital")
    again.save(tmp_path / "again")
    (tmp_path / "text.txt").write_text("\n".join(f"the capital {i} of France" for i in range(50)))
    prepare([tmp_path / "text.txt"], folder, tmp_path / "corpus", val_share=0.1, workers=2, progress=False)
    corpus = Corpus(tmp_path / "corpus")
    corpus.check_tokenizer(tokenizer, folder)
    assert Tokenizer.load(tmp_path / "corpus").digest == tokenizer.digest
    digests = {Tokenizer.load(folder / MODEL).digest}
    (folder / "tokenizer_config.json").unlink()
    digests.add(Tokenizer.load(folder).digest)  # the name of the file says the same
    assert digests == {tokenizer.digest}


def test_ids_as_in_the_model(trained, tmp_path):
    """DeBERTa-v3's: special tokens are pieces, [MASK] is added behind them."""
    names = {"pad_id": 0, "bos_id": 1, "eos_id": 2, "unk_id": 3, "pad_piece": "[PAD]", "bos_piece": "[CLS]",
             "eos_piece": "[SEP]", "unk_piece": "[UNK]"}  # fmt: skip
    train(tmp_path / "spm.model", **names)
    processor = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "spm.model"))
    config = {"tokenizer_class": "DebertaV2Tokenizer", "mask_token": "[MASK]"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = Tokenizer.load(tmp_path)
    assert (tokenizer.cls_id, tokenizer.mask_id, tokenizer.pair_separators) == (1, len(processor), 1)
    assert all(tokenizer.encode(text) == processor.encode(text) for text in TEXTS)
    tokenizer.save(tmp_path / "out")
    assert Tokenizer.load(tmp_path / "out").digest == tokenizer.digest


def set_in(value, place, new):
    for key in place[:-1]:
        value = value[key]
    value[place[-1]] = new


TABLE = base64.b64encode(b"\x08\0\0\0" + 8 * b"\xff" + b"a\0").decode()


@pytest.mark.parametrize(
    ("place", "new", "problem"),
    [
        (["model", "type"], "BPE", "'BPE'|tokenizer_class"),
        (["model", "unk_id"], 10**6, "unk_id"),
        (["model", "unk_id"], 4, "unk_token is"),
        (["model", "byte_fallback"], True, "byte_fallback"),
        (["model", "vocab", 9, 1], "x", "score of"),
        (["model", "vocab", 9, 1], float("nan"), "score of"),
        (["model", "vocab", 9, 0], "<s>", "repeats the piece"),
        (["model", "vocab", 9], ["a"], "no piece with a score"),
        (["normalizer"], {"type": "Lowercase"}, "Lowercase"),
        (["normalizer"], {"type": "Precompiled", "precompiled_charsmap": "?"}, "base64"),
        (["normalizer"], {"type": "Precompiled", "precompiled_charsmap": TABLE}, "table of characters"),
        (["normalizer"], {"type": "Replace", "pattern": {"String": "``"}, "content": '"'}, "replaces"),
        (["pre_tokenizer"], {"type": "Whitespace"}, "pre_tokenizer"),
        (["pre_tokenizer"], {"type": "Metaspace", "prepend_scheme": "first"}, "pre_tokenizer"),
        (["post_processor", "single"], [{"Sequence": {"id": "A"}}], "post_processor"),
    ],
)
def test_a_tokenizer_json_of_another_kind(folder, place, new, problem):
    Tokenizer.load(folder).save(folder)
    (folder / MODEL).unlink()
    value = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    set_in(value, place, new)
    (folder / "tokenizer.json").write_text(json.dumps(value))
    with pytest.raises(UserError, match=problem) as caught:
        Tokenizer.load(folder)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"model_type": "bpe"}, "of type BPE"),
        ({"byte_fallback": True}, "byte_fallback is True"),
        ({"remove_extra_whitespaces": False}, "remove_extra_whitespaces is False"),
        ({"treat_whitespace_as_suffix": True}, "treat_whitespace_as_suffix is True"),
        ({"unk_id": 2, "bos_id": 0, "eos_id": 1}, "does not begin with"),
    ],
)
def test_other_models_of_sentencepiece(tmp_path, options, problem):
    train(tmp_path / MODEL, **options)
    with pytest.raises(UserError, match=problem):
        Tokenizer.load(tmp_path)


def test_what_is_missing_or_disagrees(folder, tmp_path):
    (tmp_path / "other.model").write_bytes((folder / MODEL).read_bytes())
    with pytest.raises(UserError, match="the name of a .model"):
        Tokenizer.load(tmp_path / "other.model")
    (folder / MODEL).rename(folder / "spiece.model")
    for kind in ("T5Tokenizer", "AlbertTokenizer"):
        (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": kind}))
        with pytest.raises(UserError, match=kind):
            Tokenizer.load(folder)
    (folder / "spiece.model").rename(folder / MODEL)
    (folder / "tokenizer_config.json").unlink()
    Tokenizer.load(folder).save(folder)
    value = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    value["model"]["vocab"][9][0] = "another"
    (folder / "tokenizer.json").write_text(json.dumps(value))
    with pytest.raises(UserError, match="disagree"):
        Tokenizer.load(folder)


def test_look_ups_stay_inside_the_table():
    """Units of a trie that lead outside of it, and strings that do not end."""
    good = sentencepiece_model.nmt_nfkc()
    assert sentencepiece_model._whole(good)
    trie, rng = int.from_bytes(good[:4], "little") // 4, random.Random(0)
    found = 0
    for _ in range(200):
        damaged = bytearray(good)
        place = 4 + 4 * rng.randrange(trie)
        damaged[place : place + 4] = (rng.getrandbits(21) << 10 | rng.getrandbits(10)).to_bytes(4, "little")
        found += not sentencepiece_model._whole(bytes(damaged))
    assert found > 150
    for damaged in (good[:-1] + b"a", good[:1000], good[:4], b"\xff" * 4 + good[4:], good[:4] + good[8:]):
        assert not sentencepiece_model._whole(damaged)


def use(folder):
    tokenizer = Tokenizer.load(folder)
    for text in TEXTS:
        tokenizer.encode(text), tokenizer.encode_with_offsets(text), tokenizer.encode_prompt(text)
    assert len(tokenizer.digest) == 64 and unigram_files.written(tokenizer)


def survives_here(folder, name):
    survives(pathlib.Path(folder) / name, lambda: use(folder))


@pytest.mark.parametrize(
    ("name", "rule"),
    [
        (MODEL, "nmt_nfkc"),  # of which nearly all is the table of characters
        (MODEL, "identity"),
        ("tokenizer.json", "nmt_nfkc"),
        ("tokenizer.json", "identity"),
        ("tokenizer_config.json", "identity"),
        ("special_tokens_map.json", "identity"),
    ],
)
def test_damage(tmp_path, name, rule):
    """In a process of its own, so that a crash of the library is seen."""
    train(tmp_path / MODEL, rule, size=300)
    Tokenizer.load(tmp_path).save(tmp_path)
    (tmp_path / "special_tokens_map.json").write_text(json.dumps({"mask_token": {"content": "<mask>"}, "x": ["<a>"]}))
    if name == "tokenizer.json":
        (tmp_path / MODEL).unlink()
    if name == MODEL:
        (tmp_path / "tokenizer.json").unlink()
    code = "import sys, test_unigram; test_unigram.survives_here(*sys.argv[1:])"
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"}
    command = [sys.executable, "-X", "faulthandler", "-c", code, str(tmp_path), name]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]


def test_a_model_cut_short(folder):
    raw = (folder / MODEL).read_bytes()
    sizes = [len(protobuf.field(number, value)) for number, _, value in protobuf.fields(raw)]
    between = list(itertools.accumulate(sizes))[:-1]  # two fields, where every prefix is a message, too
    for size in (0, 1, 10, *between[:5], *between[-5:], len(raw) // 2, len(raw) - 1):
        (folder / MODEL).write_bytes(raw[:size])
        with pytest.raises(UserError, match="damaged"):
            Tokenizer.load(folder)


def test_a_cut_vocabulary_splits_its_text_the_same(tokenizer):
    text = (ROOT / "README.md").read_text(encoding="utf-8")[:3000] + TEXTS[5] + "\u2603"
    small, ids = tokenizer.cut(set(tokenizer.encode(text)))
    assert len(small.vocab) == len(ids) < len(tokenizer.vocab)
    assert [ids[i] for i in small.encode(text)] == tokenizer.encode(text)
    assert [tokenizer.vocab[i] for i in ids] == small.vocab and isinstance(small, Unigram)
    assert set("".join(tokenizer.vocab[i] for i in set(tokenizer.encode(text)) - {3})) <= set(small.vocab)


def test_a_cut_vocabulary_finds_unknown_text_as_unlikely():
    """The library takes 10 from the least likely piece for it: without "q", "<unk>" and "ab" would win here."""
    special = {"cls": "<s>", "pad": "<pad>", "sep": "</s>", "unk": "<unk>", "mask": "<mask>"}
    pieces = [(text, 0.0, UNKNOWN if name == "unk" else CONTROL) for name, text in special.items()]
    for text, score in {"▁": -0.1, "\u2603a": -19, "b": -19, "ab": -0.5, "q": -30, "r": -29}.items():
        pieces.append((text, float(score), NORMAL))
    whole = Unigram(pieces, b"", special)
    text = "ab \u2603ab"
    small, ids = whole.cut(set(whole.encode(text)))
    assert [ids[i] for i in small.encode(text)] == whole.encode(text)
    assert small.vocab[5:] == ["▁", "\u2603a", "b", "ab", "q"]
