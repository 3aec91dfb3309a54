"""train.py on sentences: their vectors alone and with the other terms, in students of any width, resumed and split."""

import dataclasses
import json
import math
import re

import numpy as np
import pytest
import torch
from same_layers import assert_same_layers
from test_distributed import torchrun

import finetune
import train
from data.prepare import prepare
from minidistil import weights
from minidistil.data import Corpus
from minidistil.downstream.vectors import embed
from minidistil.errors import UserError
from minidistil.model import Config, LanguageModel
from minidistil.narrow import Projection, leading_directions, narrowed, to_student, to_teacher
from minidistil.pooling import Pooling, SentenceEncoder, read_pooling, write_pooling
from minidistil.run import identity_of, load_checkpoint, read_metrics
from minidistil.safetensors import read_safetensors
from minidistil.student import build_student
from minidistil.tokenizer import Tokenizer

VECTORS = dict(alpha_ce=0.0, alpha_mlm=0.0, alpha_cos=0.0, alpha_emb=1.0)
ALL = dict(alpha_ce=5.0, alpha_mlm=2.0, alpha_cos=1.0, alpha_mse=0.01, alpha_emb=3.0)
TERMS = {"vectors": VECTORS, "with the cosine": VECTORS | dict(alpha_cos=1.0), "all": ALL}


@pytest.fixture(scope="module")
def world(tiny, tmp_path_factory):
    """`teacher`, a random sentence encoder of the tiny vocabulary without a head; `sentences`, its corpus."""
    folder = tmp_path_factory.mktemp("sentences")
    tokenizer = Tokenizer.load(tiny / "teacher")
    config = Config(len(tokenizer.vocab), 32, layers=4, heads=4, width=32, mlp_width=64)
    model = SentenceEncoder(config, seed=1)
    with torch.no_grad():  # vectors that differ from text to text, and layer from layer
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(2)), alpha=0.05)
    weights.save_model(folder / "teacher", model)
    tokenizer.save(folder / "teacher", "bert")
    write_pooling(folder / "teacher", Pooling("mean", True, 24), config)
    text, out = [str(tiny / "text.txt")], folder / "corpus"
    prepare(text, folder / "teacher", out, val_share=0.1, workers=1, progress=False, prefix="")
    return folder


def settings(world, out, **changes):
    basic = dict(
        teacher=str(world / "teacher"), data=str(world / "corpus"), steps=6, batch=4, accum=2, seq_len=24, device="cpu",
        dtype="fp32", eval_tokens=256, lr=1e-3, out=str(out),
    )  # fmt: skip
    return train.Settings(**basic | VECTORS | changes)


def headed(world, tiny):
    """The settings of a teacher with a language-model head: another model, in the same words."""
    return dict(teacher=str(tiny / "teacher"))


def tensors(out):
    return read_safetensors(out / "model.safetensors")[0]


def same_bits(a, b):
    a, b = tensors(a), tensors(b)
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_vectors_come_closer_and_the_folder_opens_in_sentence_transformers(world, tmp_path):
    summary = train.train(settings(world, tmp_path / "out", steps=60))
    history = read_metrics(tmp_path / "out" / "metrics.jsonl")
    evaluated = [record["held_out"] for record in history if "held_out" in record]
    assert all(list(metrics) == ["emb"] for metrics in evaluated)
    assert evaluated[-1]["emb"] < 0.7 * evaluated[0]["emb"] and summary["student"]["emb"] == evaluated[-1]["emb"]
    assert all(record["loss"] == record["emb"] and "ce" not in record for record in history if "loss" in record)
    sizes = [
        sum(tensor.numel() for tensor in tensors(folder).values()) for folder in (world / "teacher", tmp_path / "out")
    ]
    assert summary["teacher"] == {"parameters": sizes[0]} and summary["student"]["parameters"] == sizes[1] < sizes[0]
    pooling = read_pooling(tmp_path / "out")
    assert pooling == read_pooling(world / "teacher") == Pooling("mean", True, 24)
    # what the run says of held-out sentences is what users of the folder get
    val = Corpus(world / "corpus")
    rows = np.split(val.val[:], val.val_ends[:-1])[: len(val.val_ends)]
    tokenizer = Tokenizer.load(world / "teacher")
    texts = [" ".join(tokenizer.vocab[i] for i in row[:-1]) for row in rows]
    a, b = (embed(folder, texts) for folder in (tmp_path / "out", world / "teacher"))
    assert np.square(a - b).sum(1).mean() == pytest.approx(evaluated[-1]["emb"], rel=0.2)  # of some of them
    library = pytest.importorskip("sentence_transformers")
    model = library.SentenceTransformer(str(tmp_path / "out"), device="cpu")
    assert np.abs(model.encode(texts) - a).max() < 1e-5


@pytest.mark.parametrize("terms", TERMS)
@pytest.mark.parametrize("width", [None, 16])
def test_a_resumed_run_has_the_same_bits(terms, width, world, tiny, tmp_path):
    given = TERMS[terms] | (headed(world, tiny) if terms == "all" else {}) | dict(student_width=width)
    train.train(settings(world, tmp_path / "whole", **given))
    halves = dict(given, time_limit=1e-9)  # one update at a time
    train.train(settings(world, tmp_path / "halves", **halves))
    for _ in range(5):
        train.train(settings(world, tmp_path / "halves", resume=True, **halves))
    assert same_bits(tmp_path / "whole", tmp_path / "halves")
    whole, again = (load_checkpoint(tmp_path / name)[1] for name in ("whole", "halves"))
    assert whole.keys() == again.keys() and all(torch.equal(whole[name], again[name]) for name in whole)
    projection = {name for name in whole if "projection" in name}
    learnt = {f"{kind}.projection.weight" for kind in ("student", "exp_avg", "exp_avg_sq")}
    of_states = learnt if given["alpha_cos"] else set()
    assert projection == ({"student.projection.directions", *of_states} if width else set())
    assert not any("projection" in name for name in tensors(tmp_path / "whole"))
    config = weights.read_config(tmp_path / "whole")
    assert (config.width, config.mlp_width, config.layers) == ((16, 32, 2) if width else (32, 64, 2))
    with pytest.raises(UserError, match="student_width"):
        train.train(
            settings(world, tmp_path / "halves", resume=True, **dict(given, student_width=None if width else 16))
        )


def test_a_run_whose_vectors_were_compared_in_the_teachers_width_is_refused(world, tmp_path, monkeypatch):
    with monkeypatch.context() as before:
        before.setattr(train, "identity_of", lambda *given: {
            name: value for name, value in identity_of(*given).items() if name != "vectors' width"})  # fmt: skip
        train.train(settings(world, tmp_path / "out", student_width=16, time_limit=1e-9))
    with pytest.raises(UserError, match="vectors' width None -> the student's"):
        train.train(settings(world, tmp_path / "out", student_width=16, resume=True))


@pytest.mark.parametrize("terms", TERMS)
@pytest.mark.parametrize("width", [None, 16])
def test_the_split_changes_an_update_by_rounding_only(terms, width, world, tiny, tmp_path):
    given = TERMS[terms] | (headed(world, tiny) if terms == "all" else {}) | dict(student_width=width, dropout=0.1)
    given |= dict(seed=1)  # of seed 0, one gradient nearly cancels, and Adam makes its rounding as large as an update
    for name, (batch, accum) in {"wide": (8, 1), "long": (1, 8), "both": (4, 2)}.items():
        train.train(settings(world, tmp_path / name, batch=batch, accum=accum, **given))
    for name in ("long", "both"):
        assert_same_layers(tensors(tmp_path / "wide"), tensors(tmp_path / name))


def test_two_ranks_are_one(world, tmp_path):
    """With a projection, whose gradient the ranks average too."""
    given = dict(VECTORS, alpha_cos=1.0, student_width=16, teacher=world / "teacher", data=world / "corpus", seq_len=24)
    train.train(settings(world, tmp_path / "one", **{**VECTORS, "alpha_cos": 1.0}, student_width=16, lr=5e-4, steps=5))
    done = torchrun(world, tmp_path / "two", batch=2, accum=2, lr=5e-4, **given)
    assert done.returncode == 0, done.stderr
    assert_same_layers(tensors(tmp_path / "one"), tensors(tmp_path / "two"))
    one, two = (load_checkpoint(tmp_path / name)[1]["student.projection.weight"] for name in ("one", "two"))
    assert (one - two).norm() < 1e-6 * one.norm()


def test_vectors_beside_words(world, tiny, tmp_path):
    """All terms: every metric of words and of vectors, the head and the pooling of the teacher."""
    summary = train.train(settings(world, tmp_path / "out", **ALL | headed(world, tiny)))
    assert list(summary["student"]) == ["parameters", "mlm_loss", "top1", "kl", "agreement", "emb"]
    assert {"kl", "ce", "cos", "mse", "emb"} <= read_metrics(tmp_path / "out" / "metrics.jsonl")[1].keys()
    assert type(weights.load_model(tmp_path / "out")) is LanguageModel
    assert read_pooling(tmp_path / "out").mode == "mean" and len(embed(tmp_path / "out", ["a b"])) == 1


def test_a_teacher_without_a_head_gives_none_where_words_are_learnt(world, tmp_path):
    """With --alpha-mlm the student gets a fresh head; the teacher, which has none, is not compared with it."""
    summary = train.train(settings(world, tmp_path / "out", alpha_mlm=1.0, steps=2))
    assert list(summary["student"]) == ["parameters", "mlm_loss", "top1", "emb"]
    assert list(summary["teacher"]) == ["parameters"]
    with pytest.raises(UserError, match="has no masked-LM head: .* or learn its sentence vectors alone"):
        train.train(settings(world, tmp_path / "kl", alpha_ce=1.0))


def test_a_narrower_student_starts_from_the_leading_directions(world):
    teacher = weights.load_model(world / "teacher", kind=SentenceEncoder)
    student = build_student(teacher, width=16)
    words = teacher.encoder.embeddings.words.weight
    V = leading_directions(teacher, 16)
    torch.testing.assert_close(V.T @ V, torch.eye(16), atol=1e-6, rtol=0)
    _, values, vectors = torch.linalg.svd(words.detach().double(), full_matrices=False)
    shared = torch.linalg.svdvals(vectors[:16] @ V.double())
    assert shared.min() > 1 - 1e-6  # the same directions
    kept = (student.encoder.embeddings.words.weight @ V.T - words).norm().item()
    assert kept == pytest.approx(values[16:].square().sum().sqrt().item(), rel=1e-4)  # the best of rank 16
    projection = Projection(teacher, student, True, True)
    assert torch.equal(projection.weight, V) and torch.equal(projection.directions, V)
    assert [name for name, p in projection.named_parameters() if p.requires_grad] == ["weight"]
    D = teacher.config.width // teacher.config.heads
    assert student.config.width // student.config.heads == D
    random = build_student(teacher, "random", width=16)
    assert random.config == student.config
    assert not torch.equal(random.encoder.embeddings.words.weight, student.encoder.embeddings.words.weight)


def test_a_student_wider_than_its_teacher(world, tmp_path, capsys):
    """From a folder or a config: the directions it has too many stay empty, and the vectors come closer."""
    teacher = weights.load_model(world / "teacher", kind=SentenceEncoder)
    wide = SentenceEncoder(dataclasses.replace(teacher.config, width=48, heads=6, layers=2))
    projection = wide.projection = Projection(teacher, wide, True, True)
    v, h = torch.randn(5, 32), torch.randn(5, 48)
    torch.testing.assert_close(to_student(wide, v) @ to_student(wide, v).T, v @ v.T)  # angles stay
    torch.testing.assert_close(to_teacher(wide, h), h @ projection.directions.T)
    del wide.projection
    weights.save_model(tmp_path / "wide", wide)
    given = dict(student_config=str(tmp_path / "wide" / "config.json"), alpha_cos=1.0, steps=40)
    train.train(settings(world, tmp_path / "out", **given))
    history = [record["held_out"]["emb"] for record in read_metrics(tmp_path / "out" / "metrics.jsonl")
               if "held_out" in record]  # fmt: skip
    assert history[-1] < 0.7 * history[0] and weights.read_config(tmp_path / "out").width == 48
    assert "with the teacher's, in its own width\n" in capsys.readouterr().out


def test_the_layers_of_a_narrower_student_are_the_teachers(world):
    """Within the leading directions: the heads and units of the teacher that write most compute what they do there."""
    teacher = weights.load_model(world / "teacher", kind=SentenceEncoder)
    narrow, V = narrowed(teacher, 16), leading_directions(teacher, 16)
    z = torch.randn(5, 16, generator=torch.Generator().manual_seed(0))
    for wide, small in zip(teacher.encoder.blocks, narrow.encoder.blocks, strict=True):
        H, D, C = 4, 8, 32
        values, out = wide.attention.qkv.weight[-C:].view(H, D, C), wide.attention.out.weight.view(C, H, D)
        strength = [(out[:, h] @ values[h]).norm().item() for h in range(H)]
        heads = sorted(sorted(range(H), key=strength.__getitem__)[-2:])
        want = wide.attention.qkv(z @ V.T).view(5, 3, H, D)[:, :, heads].flatten(1)
        torch.testing.assert_close(small.attention.qkv(z), want, atol=1e-5, rtol=1e-4)
        y, places = torch.randn(5, 2, D), torch.zeros(5, H, D)
        places[:, heads] = y
        want = wide.attention.out(places.flatten(1)) @ V
        torch.testing.assert_close(small.attention.out(y.flatten(1)), want, atol=1e-5, rtol=1e-4)
        size = wide.mlp.up.weight.norm(dim=1) * wide.mlp.down.weight.norm(dim=0)
        units = sorted(range(64), key=size.tolist().__getitem__)[-32:]
        kept = torch.nn.functional.one_hot(torch.tensor(units), 64).sum(0)
        want = wide.mlp.down(torch.nn.functional.gelu(wide.mlp.up(z @ V.T)) * kept) @ V
        torch.testing.assert_close(small.mlp(z), want, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(student_width=12), "--student-width 12: give a multiple of 8, a head's width, below 32"),
        (dict(student_width=32), "below 32"),
        (dict(student_width=-8), "--student-width -8: give a multiple of 8"),
        (dict(student_width=16, student_config="x.json"), "--student-config already says how wide"),
        (dict(student_width=16, student_init="x"), "--student-init x already has its width"),
        (dict(compile=True), "--compile is for sequences of one length"),
        (dict(alpha_emb=-1.0), "--alpha-emb is -1.0"),
        (dict(alpha_emb=0.0), "every weight of the objective is 0"),
        (dict(teacher="none", student_init="{teacher}"), "every weight of the objective is 0"),
        (dict(batch=4000, accum=1000), "sentences"),
    ],
)
def test_what_cannot_work_is_one_line(changes, message, world, tmp_path):
    changes = {k: v.format(teacher=world / "teacher") if isinstance(v, str) else v for k, v in changes.items()}
    with pytest.raises(UserError, match=re.escape(message)):
        train.train(settings(world, tmp_path / "out", **changes))


def test_a_packed_corpus_has_no_sentences(world, tiny, tmp_path):
    with pytest.raises(UserError, match=r"--alpha-emb needs a corpus of sentences, .*data/prepare.py --sentences"):
        train.train(settings(world, tmp_path / "out", data=str(tiny / "corpus")))
    with pytest.raises(UserError, match="evaluate on the same kind"):
        given = VECTORS | dict(alpha_emb=0.0, alpha_mlm=1.0, eval_data=str(tiny / "corpus"))
        train.train(settings(world, tmp_path / "out", **given))


def test_the_prompt_of_a_teacher_is_that_of_its_corpus(world, tiny, tmp_path):
    asks = tmp_path / "asks"
    model = weights.load_model(world / "teacher", kind=SentenceEncoder)
    weights.save_model(asks, model)
    Tokenizer.load(world / "teacher").save(asks, "bert")
    write_pooling(asks, Pooling("cls", False, 24, {"prompts": {"q": "ab "}, "default_prompt_name": "q"}), model.config)
    with pytest.raises(UserError, match="reads 'ab ' before each sentence, and .* has '': prepare .* --prefix 'ab '"):
        train.train(settings(world, tmp_path / "out", teacher=str(asks)))
    text = [str(tiny / "text.txt")]
    prepare(text, asks, tmp_path / "corpus", val_share=0.1, workers=1, progress=False, prefix="ab ")
    train.train(settings(world, tmp_path / "out", teacher=str(asks), data=str(tmp_path / "corpus"), steps=1))
    assert read_pooling(tmp_path / "out").prompt == "ab " and read_pooling(tmp_path / "out").mode == "cls"


def test_a_run_that_was_begun_before_there_were_vectors_resumes(tiny, tmp_path):
    """Its checkpoint names neither --alpha-emb nor --student-width."""
    given = dict(teacher=str(tiny / "teacher"), data=str(tiny / "corpus"), seq_len=32)
    given |= dict(alpha_ce=5.0, alpha_emb=0.0, time_limit=1e-9, steps=2)
    train.train(settings(tiny, tmp_path / "out", **given))
    path = tmp_path / "out" / "checkpoint" / "state.safetensors"
    from minidistil.safetensors import write_safetensors

    info, saved = load_checkpoint(tmp_path / "out")
    for name in ("alpha_emb", "student_width", "sentences", "pooling"):
        del info["identity"][name]
    write_safetensors(path, {k: v.clone() for k, v in saved.items()}, {"info": json.dumps(info)}, checksum=True)
    assert train.train(settings(tiny, tmp_path / "out", resume=True, **given))["steps"] == 2


def test_the_lengths_of_sentences_make_the_speed(world, tmp_path):
    """Progress counts real tokens, not padding nor --seq-len."""
    summary = train.train(settings(world, tmp_path / "out"))
    corpus = Corpus(world / "corpus")
    lengths = np.minimum(np.diff(corpus.train_ends[:], prepend=0) + 1, 24)
    assert summary["tokens"] == pytest.approx(6 * 8 * lengths.mean(), rel=0.02)
    assert math.isfinite(summary["tokens_per_second"])


def test_a_student_is_trained_further_and_fine_tuned(world, glue, tmp_path):
    """--student-init takes a finished student; finetune.py takes an encoder without a head."""
    first = train.train(settings(world, tmp_path / "first", steps=20))
    again = train.train(settings(world, tmp_path / "again", student_init=str(tmp_path / "first"), steps=20))
    history = read_metrics(tmp_path / "again" / "metrics.jsonl")
    assert history[0]["held_out"]["emb"] == first["student"]["emb"] > again["student"]["emb"]
    flags = f"--task sst2 --model {tmp_path / 'again'} --data {glue} --out {tmp_path / 'tuned'} --device cpu --lr 1e-3"
    tuned = finetune.finetune(finetune.Settings(**finetune.parse_args(finetune.Settings, flags.split(), "")))
    assert set(tuned["tasks"]) == {"sst2"}
    assert weights.read_config(tmp_path / "tuned" / "sst2") == weights.read_config(tmp_path / "again")
