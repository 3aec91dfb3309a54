"""DistilRoBERTa from text to task: a byte-level vocabulary, pairs as </s></s>, <mask>, one token type."""

import json
import random

import pytest
import torch

import finetune
import sample
import train
from data import prepare, vocab
from minidistil import weights
from minidistil.downstream import bilstm, squad
from minidistil.downstream.batches import encode_pair, padded
from minidistil.downstream.heads import load_finetuned
from minidistil.errors import UserError
from minidistil.model import Config, LanguageModel
from minidistil.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def roberta(tiny, tmp_path_factory):
    """Vocabulary, corpus and random teacher of a RoBERTa, made from the tiny world's text by the program itself."""
    folder = tmp_path_factory.mktemp("roberta")
    text = str(tiny / "text.txt")
    vocab.main([text, "--byte-level", "roberta", "--size", "600", "--workers", "1", "--out", str(folder / "vocab")])
    tokenizer = Tokenizer.load(folder / "vocab")
    config = Config(
        vocab_size=len(tokenizer.vocab), positions=48, token_types=1, layers=4, heads=2, width=32, mlp_width=64,
        norm_eps=1e-5, pad_id=tokenizer.pad_id, init_range=0.2, family="roberta",
    )  # fmt: skip
    (folder / "teacher").mkdir()
    weights.save_model(folder / "teacher", LanguageModel(config, seed=1), **tokenizer.hub_ids)
    tokenizer.max_length = config.positions
    tokenizer.save(folder / "teacher", "roberta")
    prepare.prepare([text], folder / "vocab", folder / "corpus", val_share=0.1, workers=1, progress=False)
    return folder


@pytest.fixture(scope="module")
def student(roberta, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "student"
    train.train(train.Settings(
        teacher=str(roberta / "teacher"), data=str(roberta / "corpus"), steps=30, batch=8, accum=1, seq_len=48, lr=2e-3,
        device="cpu", dtype="fp32", eval_tokens=512, eval_every=30, out=str(out),
    ))  # fmt: skip
    return out


def test_its_vocabulary_is_not_for_a_gpt2(roberta, tmp_path):
    """In transformers, its <s> and </s> around a prompt would end what is to be continued."""
    shape = dict(model_type="gpt2", vocab_size=600, n_positions=48, n_embd=32, n_layer=2, n_head=2)
    (tmp_path / "gpt2.json").write_text(json.dumps(shape))
    given = dict(teacher="none", student_config=str(tmp_path / "gpt2.json"), out=str(tmp_path / "out"), device="cpu")
    with pytest.raises(UserError, match="its vocabulary is one for masked tokens: take a GPT-2's, or make one: python"):
        train.train(train.Settings(data=str(roberta / "corpus"), batch=8, accum=1, seq_len=48, steps=1, **given))


def test_a_student_learns(student):
    history = [json.loads(line) for line in (student / "metrics.jsonl").read_text().splitlines()]
    first, last = (record["held_out"] for record in history if "held_out" in record)
    assert last["kl"] < 0.9 * first["kl"]
    config = json.loads((student / "config.json").read_text())
    assert (config["model_type"], config["num_hidden_layers"], config["type_vocab_size"]) == ("roberta", 2, 1)
    assert (config["max_position_embeddings"], config["pad_token_id"]) == (50, 1)
    assert (config["bos_token_id"], config["eos_token_id"]) == (0, 2)


def test_transformers_fills_the_same_blanks(student, tiny, capsys):
    transformers = pytest.importorskip("transformers")
    pipeline = transformers.pipeline("fill-mask", model=str(student), top_k=5, device=-1)
    words = (tiny / "text.txt").read_text().split()
    tokenizer = Tokenizer.load(student)
    for prompt in (f"{words[0]} [MASK] {words[2]}", f"[MASK] {words[5]}", f"{words[1]}   <mask>{words[3]}."):
        sample.main([prompt, "--model", str(student), "--teacher", "none", "-k", "5", "--json"])
        ours = json.loads(capsys.readouterr().out)["predictions"]["student"]
        theirs = pipeline(prompt.replace("[MASK]", "<mask>"))
        assert [tokenizer.ids[token] for token, _ in ours] == [guess["token"] for guess in theirs]
        assert [p for _, p in ours] == pytest.approx([guess["score"] for guess in theirs], abs=1e-6, rel=1e-4)
    sample.main([f"{words[0]} [MASK] {words[2]}", "--model", str(student), "-k", "5"])
    said = capsys.readouterr().out
    assert "student" in said and "teacher" in said and "Ġ" not in said  # white space is shown as such


def test_ids_of_texts_and_pairs_are_those_of_transformers(roberta, tiny):
    transformers = pytest.importorskip("transformers")
    ours, theirs = (load(roberta / "teacher") for load in (Tokenizer.load, transformers.AutoTokenizer.from_pretrained))
    words, rng = (tiny / "text.txt").read_text().split(), random.Random(0)
    for _ in range(200):
        a, b = (" ".join(rng.choices(words, k=rng.randint(1, 30))) for _ in range(2))
        T = rng.randint(10, 48)
        assert encode_pair(ours, a, b, T)[0] == theirs(a, b, truncation="longest_first", max_length=T)["input_ids"]
        assert encode_pair(ours, a, None, T)[0] == theirs(a, truncation=True, max_length=T)["input_ids"]
        assert set(encode_pair(ours, a, b, T)[1]) == {0}
        assert ours.encode_prompt(a) == theirs(a)["input_ids"]


@pytest.mark.parametrize("task", ["sst2", "rte"])
def test_a_task_is_learnt_and_opens_in_transformers(student, glue, tmp_path, task):
    transformers = pytest.importorskip("transformers")
    out = tmp_path / "out"
    summary = finetune.finetune(finetune.Settings(
        task=task, model=str(student), data=str(glue), out=str(out), batch=8, lr="3e-3", epochs=1.0, device="cpu",
        dtype="fp32", seq_len=48,
    ))  # fmt: skip
    assert summary["tasks"][task]["score"] > (80 if task == "sst2" else 40)
    theirs, loading = transformers.AutoModelForSequenceClassification.from_pretrained(
        out / task, output_loading_info=True
    )
    assert not loading["missing_keys"] and not loading["unexpected_keys"]
    tokenizer = transformers.AutoTokenizer.from_pretrained(out / task)
    model, _ = load_finetuned(out / task)
    texts = ("ab cd", "abc a b") if task == "rte" else ("ab cd",)
    inputs = tokenizer(*texts, return_tensors="pt")
    ids, types = encode_pair(Tokenizer.load(out / task), *(*texts, None)[:2], 48)
    assert inputs["input_ids"].tolist() == [ids]
    with torch.no_grad():
        ours = model(torch.tensor([ids]), types=torch.tensor([types]))
        torch.testing.assert_close(ours, theirs.eval()(**inputs).logits, atol=1e-5, rtol=1e-5)
    if task == "sst2":
        said = transformers.pipeline("text-classification", model=str(out / task), device=-1)("ab cd")[0]
        assert said["score"] == pytest.approx(torch.softmax(ours, -1).max().item(), abs=1e-5)


def test_a_bilstm_reads_pairs_of_a_vocabulary_without_token_types(roberta, tiny, glue, tmp_path):
    """RoBERTa's types are all 0: what follows the first </s> is the second text, as with BERT's types."""
    few = dict(task="rte", data=str(glue), examples=16, epochs=1.0, lr="1e-3", device="cpu", dtype="fp32")
    finetune.finetune(
        finetune.Settings(model=str(roberta / "teacher"), out=str(tmp_path / "teacher"), seq_len=48, **few)
    )
    teacher = str(tmp_path / "teacher" / "rte")
    for change in (dict(words=str(roberta / "teacher")), dict(teacher=teacher)):
        out = tmp_path / f"bilstm-{min(change)}"
        summary = finetune.finetune(finetune.Settings(model="bilstm", out=str(out), seq_len=48, **few, **change))
        assert 0 <= summary["tasks"]["rte"]["score"] <= 100
    tokenizer, model = Tokenizer.load(roberta / "teacher"), bilstm.load(out / "rte")[0]
    one, other = (encode_pair(tokenizer, "ab", text, 48) for text in ("abc", "h g"))
    with torch.no_grad():
        logits = [model(*padded([item], [0], tokenizer.pad_id, torch.device("cpu"))) for item in (one, other)]
    assert not torch.equal(*logits)  # the second text is read


def test_a_vocabulary_has_what_its_model_needs(roberta, tiny, tmp_path):
    """Positions are counted by <pad>, and blanks are filled in: silently, a model would learn something else."""
    shape = weights.read_config(roberta / "teacher")
    for folder, config, words in (
        (tiny, shape, r"says pad_token_id 1, but \[PAD\] is 0 in its vocabulary, and a roberta counts positions by it"),
        (
            tmp_path,
            Config(**{**vars(shape), "family": "bert", "pad_id": 0}),
            "the model is a bert, which fills in masked",
        ),
    ):
        weights.write_config(tmp_path, config)
        if folder == tmp_path:
            text = str(tiny / "text.txt")
            vocab.main(
                [text, "--byte-level", "gpt2", "--size", "500", "--workers", "1", "--out", str(tmp_path / "gpt2")]
            )
            prepare.prepare([text], tmp_path / "gpt2", tmp_path / "corpus", val_share=0.1, workers=1, progress=False)
        with pytest.raises(UserError, match=words):
            train.train(train.Settings(
                teacher="none", student_config=str(tmp_path / "config.json"), data=str(folder / "corpus"), device="cpu",
                dtype="fp32", steps=1, out=str(tmp_path / "out"),
            ))  # fmt: skip
    weights.save_model(tmp_path / "gpt2", LanguageModel(config))
    with pytest.raises(UserError, match="the student is a bert, which fills in masked"):
        sample.main(["a [MASK]", "--model", str(tmp_path / "gpt2")])


@pytest.mark.parametrize(("length", "stride"), [(384, 128), (100, 30)])
def test_windows_of_real_questions_are_those_of_transformers(assets, length, stride):
    """GPT-2's words with RoBERTa's special tokens: the same windows, and spans that say the answer."""
    transformers = pytest.importorskip("transformers")
    folder = assets / "models" / "gpt2-bpe"
    plain = Tokenizer.load(folder)
    names = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    tokens = [*names, *(token for token in plain.vocab if token not in names)]
    ours = type(plain)(tokens, plain.merges)
    theirs = transformers.RobertaTokenizer(
        vocab={token: i for i, token in enumerate(tokens)}, merges=[tuple(pair) for pair in plain.merges]
    )
    compared = 0
    for question in squad.read(assets / "squad" / "mlqa-en-a.json")[:40]:
        found = squad.windows(question, ours, length, stride, longest_question=64)
        asked = len(ours.encode(question.question))
        encoded = theirs(
            question.question, question.context, truncation="only_second", max_length=length,
            stride=length - asked - 4 - stride, return_overflowing_tokens=True, return_offsets_mapping=True,
        )  # fmt: skip
        if len(encoded["input_ids"]) != len(found):
            continue  # transformers' windows end otherwise
        for window, ids, offsets in zip(found, encoded["input_ids"], encoded["offset_mapping"], strict=True):
            assert window.ids == ids and not any(window.types)
            spans = list(zip(window.starts, window.ends, strict=True))
            assert spans == [tuple(offset) for offset in offsets[window.first : -1]]
            if window.span != (0, 0):
                start, end = (window.span[i] - window.first for i in (0, 1))
                assert question.answers[0][0] in question.context[window.starts[start] : window.ends[end]]
                compared += 1
    assert compared > 20
