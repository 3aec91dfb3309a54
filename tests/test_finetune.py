"""Fine-tuning from end to end on toy tasks in the official layouts."""

import json
import os
import random
import re
import shutil
import signal
import types

import numpy as np
import pytest
import torch

import finetune
from finetune import Settings
from minidistil import weights
from minidistil.data import IGNORE
from minidistil.downstream import distil
from minidistil.downstream.batches import predict
from minidistil.downstream.distil import TaskObjective, ensemble
from minidistil.downstream.grid import learning_rates, next_run, summarise
from minidistil.downstream.heads import Classifier, load_finetuned
from minidistil.downstream.tasks import check_positions, describe, open_task
from minidistil.downstream.vectors import embed
from minidistil.errors import UserError
from minidistil.model import Config, LanguageModel
from minidistil.progress import lr_at
from minidistil.run import CHECKPOINT, load_checkpoint, same_on_ranks
from minidistil.safetensors import read_safetensors, write_safetensors
from minidistil.tokenizer import Tokenizer

FAST = dict(batch=8, lr="3e-3", device="cpu", dtype="fp32")


def tuned(tiny, glue, out, task="sst2", **settings):
    values = {"task": task, "model": str(tiny / "teacher"), "data": str(glue), "out": out and str(out)}
    values |= {**FAST, **settings}
    return finetune.finetune(Settings(**values))


@pytest.fixture(scope="module")
def sst2(tiny, glue, tmp_path_factory):
    """The teacher of other tests: (its summary, its folder)."""
    out = tmp_path_factory.mktemp("runs") / "sst2"
    return tuned(tiny, glue, out), out


# ---- a run


def test_learns_and_leaves_a_model(sst2, glue):
    summary, out = sst2
    figures = summary["tasks"]["sst2"]
    assert figures["score"] == figures["accuracy"] > 90
    assert figures["seeds"] == 1 and figures["lr"] == 3e-3 and summary["macro"] == figures["score"]
    state = json.loads((out / "scores.json").read_text())
    (one,) = state["runs"]["sst2"]
    assert len(one["epochs"]) == 3 and one["updates"] == 150
    model, labels = load_finetuned(out / "sst2")
    assert labels == ("negative", "positive") and isinstance(model, Classifier)
    assert json.loads((out / "sst2" / "config.json").read_text())["finetuning_task"] == "sst2"


def test_what_is_kept_scores_what_was_reported(sst2, glue):
    transformers = pytest.importorskip("transformers")
    summary, out = sst2
    pipeline = transformers.pipeline("text-classification", model=str(out / "sst2"), device=-1)
    rows = [line.split("\t") for line in (glue / "SST-2" / "dev.tsv").read_text().splitlines()[1:]]
    right = [said["label"] == ("negative", "positive")[int(label)]
             for said, (_, label) in zip(pipeline([s for s, _ in rows]), rows, strict=True)]  # fmt: skip
    assert 100 * np.mean(right) == pytest.approx(summary["tasks"]["sst2"]["score"], abs=0.01)


def test_the_best_run_is_kept(tiny, glue, tmp_path):
    """Not the first, and not the last: the middle of three learning rates is the only one that learns."""
    figures = tuned(tiny, glue, tmp_path / "out", lr="1e-9,3e-3,2e-9", examples=160, epochs=2.0)["tasks"]["sst2"]
    model, _ = load_finetuned(tmp_path / "out" / "sst2")
    work = open_task("sst2", glue, Tokenizer.load(tmp_path / "out" / "sst2"))
    kept = work.evaluate([predict(model, work.dev[0], 0, torch.device("cpu"))])["score"]
    assert figures["lr"] == 3e-3 and kept == pytest.approx(figures["score"], abs=0.01) and kept > 70


def test_same_seed_same_bits(tiny, glue, tmp_path):
    for name in "ab":
        tuned(tiny, glue, tmp_path / name, examples=40, epochs=1.0)
    a, b = ((tmp_path / name / "sst2" / "model.safetensors").read_bytes() for name in "ab")
    assert a == b


def test_bf16_learns_like_fp32(tiny, glue, sst2, tmp_path):
    """The teacher and the scores are in bf16, too; the model that is kept, and what it learns, are fp32."""
    used = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Classifier, "__call__", lambda model, *inputs: called(model, used, *inputs))
        figures = tuned(tiny, glue, tmp_path / "out", dtype="bf16", teacher=str(sst2[1]))["tasks"]["sst2"]
    assert abs(figures["score"] - sst2[0]["tasks"]["sst2"]["score"]) < 5
    assert len(used) > 150 and set(used) == {torch.bfloat16}
    tensors, _ = read_safetensors(tmp_path / "out" / "sst2" / "model.safetensors")
    rounded = sum(torch.equal(t, t.bfloat16().float()) for t in tensors.values())
    assert {t.dtype for t in tensors.values()} == {torch.float32} and rounded < len(tensors) / 10
    assert json.loads((tmp_path / "out" / "scores.json").read_text())["dtype"] == "bf16"


def called(model, used, *inputs):
    logits = torch.nn.Module.__call__(model, *inputs)
    used.append(logits.dtype)
    if not model.pool.weight.requires_grad:  # a teacher, which autocast would cast again in each call
        used.append(model.pool.weight.dtype)
    return logits


def test_a_share_of_the_examples_and_of_an_epoch(tiny, glue, tmp_path):
    tuned(tiny, glue, tmp_path / "out", examples=44, epochs=1.5)
    (one,) = json.loads((tmp_path / "out" / "scores.json").read_text())["runs"]["sst2"]
    assert one["updates"] == 9 and len(one["epochs"]) == 2  # 6 batches an epoch


def test_regression_and_pairs(tiny, glue, tmp_path):
    figures = tuned(tiny, glue, tmp_path / "out", "stsb", examples=40, epochs=2.0)["tasks"]["stsb"]
    assert figures["score"] == pytest.approx((figures["pearson"] + figures["spearman"]) / 2, abs=0.01)
    config = json.loads((tmp_path / "out" / "stsb" / "config.json").read_text())
    assert config["problem_type"] == "regression" and config["id2label"] == {"0": "score"}
    model, _ = load_finetuned(tmp_path / "out" / "stsb")
    assert 2 < model.classify.bias.item() < 3  # the mean, near which it began


def test_all_is_what_the_folder_holds(tiny, glue, tmp_path, capsys):
    summary = tuned(tiny, glue, tmp_path / "out", "all", examples=24, epochs=1.0)
    assert list(summary["tasks"]) == ["sst2", "stsb", "rte"]
    assert summary["macro"] == pytest.approx(np.mean([t["score"] for t in summary["tasks"].values()]), abs=0.01)
    assert "cola, mrpc, qqp, mnli, qnli, wnli" in capsys.readouterr().out


# ---- learning rates and seeds


def test_first_seed_chooses_the_learning_rate():
    runs, score = [], {(1e-3, 5): 70.0, (2e-3, 5): 80.0, (2e-3, 6): 60.0, (2e-3, 7): 90.0}
    while (todo := next_run(runs, (1e-3, 2e-3), 5, 3)) is not None:
        runs.append({"lr": todo[0], "seed": todo[1], "epochs": [{"score": 0.0}, {"score": score.pop(todo)}]})
    assert not score
    assert summarise(runs) == {"score": 80.0, "lowest": 60.0, "highest": 90.0, "lr": 2e-3, "seeds": 3}


@pytest.mark.parametrize("lr, width, rates", [
    (None, 768, (2e-5, 3e-5, 5e-5)), (None, 128, (5e-5, 1e-4, 3e-4)), (None, None, (1e-3,)),
    ("1e-4,2e-4", 768, [1e-4, 2e-4]),
])  # fmt: skip
def test_rates(lr, width, rates):
    assert learning_rates(lr, width) == rates


# ---- a teacher


def test_objective_is_its_formula():
    generator = torch.Generator().manual_seed(0)
    weights = dict(alpha_task=0.2, alpha_ce=0.7, alpha_mse=0.4, temperature=3.0)
    objective = TaskObjective(**weights)
    for shape in ((5, 3), (5, 2, 7)):
        s, soft, mean = (torch.randn(shape, generator=generator).double() for _ in range(3))
        y = torch.randint(shape[-1], shape[:-1], generator=generator)
        log_q, log_p = (torch.log_softmax(z / 3.0, -1) for z in (s, soft))
        kl = 9.0 * (log_p.exp() * (log_p - log_q)).sum(-1).mean()
        ce = -torch.log_softmax(s, -1).gather(-1, y[..., None]).mean()
        expected = 0.2 * ce + 0.7 * kl + 0.4 * ((s - mean) ** 2).mean()
        found = objective.loss(s.float(), y, soft.float(), mean.float())
        assert found.item() == pytest.approx(expected.item(), rel=1e-5)
        assert objective.loss(s.float(), y).item() == pytest.approx(ce.item(), rel=1e-5)
    s, y, mean = torch.tensor([[1.0], [2.0]]), torch.tensor([0.0, 4.0]), torch.tensor([[3.0], [3.0]])
    found = TaskObjective(regression=True, **weights).loss(s, y, mean, mean)
    assert found.item() == pytest.approx(0.2 * 2.5 + (0.7 + 0.4) * 2.5)


def test_an_example_without_a_label_has_no_loss_of_the_tasks_own():
    """Its share of the mean stays: each example weighs as much as without the others."""
    generator = torch.Generator().manual_seed(0)
    for shape, regression, nothing in (((6, 3), False, -100), ((6, 2, 5), False, -100), ((6, 1), True, float("nan"))):
        s, soft = (torch.randn(shape, generator=generator).requires_grad_() for _ in range(2))
        soft = soft.detach()
        y = torch.randn(6, generator=generator) if regression else torch.randint(shape[-1], shape[:-1])
        one = [[tensor[i : i + 1] for tensor in (s, y, soft, soft)] for i in range(6)]
        objective = TaskObjective(regression, alpha_task=0.2, alpha_ce=0.7)
        alone = TaskObjective(regression, alpha_task=0.0, alpha_ce=0.7).loss(s[4:], y[4:], soft[4:], soft[4:])
        labels = torch.cat([y[:4], torch.full_like(y[4:], nothing)])
        found = objective.loss(s, labels, soft, soft)
        expected = (sum(objective.loss(*one[i]) for i in range(4)) + 2 * alone) / 6
        assert found.item() == pytest.approx(expected.item(), rel=1e-5)
        for a, b in zip(*(torch.autograd.grad(x, s) for x in (found, expected)), strict=True):
            torch.testing.assert_close(a, b)


def test_an_ensemble_is_the_mean_of_probabilities():
    rng = np.random.default_rng(0)
    views = [[rng.normal(size=(2, n)).astype(np.float32) * 3 for n in (4, 9)] for _ in range(3)]
    soft, mean = ensemble(views, 2.0)
    for i in range(2):
        p = np.mean([np.exp(v[i] / 2) / np.exp(v[i] / 2).sum(-1, keepdims=True) for v in views], 0)
        q = np.exp(soft[i] / 2) / np.exp(soft[i] / 2).sum(-1, keepdims=True)
        np.testing.assert_allclose(q, p, atol=1e-6)
        np.testing.assert_allclose(mean[i], np.mean([v[i] for v in views], 0), atol=1e-6)
    assert ensemble(views[:1], 2.0) == (views[0], views[0])


def test_a_student_follows_its_teachers(tiny, glue, sst2, tmp_path, capsys):
    """With the task's own loss switched off, whatever the student learns it learns from the teacher."""
    teacher = str(sst2[1] / "sst2")
    summary = tuned(tiny, glue, tmp_path / "one", teacher=f"{sst2[1]},{teacher}", alpha_task=0.0, epochs=2.0)
    assert summary["tasks"]["sst2"]["score"] > 90
    assert capsys.readouterr().out.count("the teacher's dev score is") == 2
    on_logits = dict(alpha_task=0.0, alpha_ce=0.0, alpha_mse=1.0)
    summary = tuned(tiny, glue, tmp_path / "two", teacher=teacher, **on_logits, epochs=2.0)
    assert summary["tasks"]["sst2"]["score"] > 90


@pytest.mark.parametrize("task", ["sst2", "stsb"])
def test_altered_copies_and_other_texts_are_labelled_by_the_teacher(task, tiny, glue, tmp_path, capsys):
    """A student that sees few of the examples, two augmented copies of each, and the texts of others."""
    tuned(tiny, glue, tmp_path / "teacher", task, epochs=2.0)
    few = dict(teacher=str(tmp_path / "teacher"), examples=24, epochs=1.0)
    tuned(tiny, glue, tmp_path / "few", task, **few)
    tuned(tiny, glue, tmp_path / "many", task, **few, augment=2, unlabelled=72)
    said = capsys.readouterr().out
    assert "24 items of" in said and " and 2 augmented copies of each and 72 unlabelled ones" in said
    card = (tmp_path / "many" / task / "README.md").read_text(encoding="utf-8")
    assert "2 augmented copies. The teacher labelled up to 72 other texts" in " ".join(card.split())
    updates = [json.loads((tmp_path / name / "scores.json").read_text())["runs"][task][0]["updates"]
               for name in ("few", "many")]  # fmt: skip
    assert updates[1] == 6 * updates[0]
    with pytest.raises(UserError, match=f"begun with other data for {task}: give the same --data and --unlabelled"):
        tuned(tiny, glue, tmp_path / "many", task, **few, augment=2, unlabelled=71, resume=True)


def test_unlabelled_texts_are_the_others_without_their_labels(tiny, glue):
    tokenizer = Tokenizer.load(tiny / "teacher")
    whole, part, rest = (open_task("sst2", glue, tokenizer, limit=n, unlabelled=m)
                         for n, m in ((None, 9), (24, 50), (24, 10**6)))  # fmt: skip
    left = len(whole.train[0]) - 24
    assert [len(task.unlabelled) for task in (whole, part, rest)] == [0, 50, left]
    assert " and 50 unlabelled ones, dev" in describe(part, 0, 50)
    assert f" and {left:,} unlabelled ones, all that there are, dev" in describe(rest, 0, 10**6)
    assert " and 0 unlabelled ones, all that there are, dev" in describe(whole, 0, 9)

    def seen(items):
        return [tuple(ids.tolist()) for ids, _ in items]

    assert sorted(seen(rest.train[0]) + seen(rest.unlabelled)) == sorted(seen(whole.train[0]))
    assert set(seen(part.unlabelled)) <= set(seen(rest.unlabelled))
    items, targets = distil.with_unlabelled(part, 1, tokenizer)
    assert len(items) == len(targets) == 24 + 50 + 24 and (targets[24:] == IGNORE).all()
    assert (targets[:24] == part.train[1]).all() and seen(items[:74]) == seen(part.train[0]) + seen(part.unlabelled)


def test_a_task_that_is_done_asks_no_teacher(tiny, glue, sst2, tmp_path, capsys):
    few = dict(teacher=str(sst2[1]), examples=16, epochs=1.0)
    expected = tuned(tiny, glue, tmp_path / "out", **few)
    assert "the teacher's dev score" in capsys.readouterr().out
    assert tuned(tiny, glue, tmp_path / "out", **few, resume=True)["tasks"] == expected["tasks"]
    assert "the teacher's dev score" not in capsys.readouterr().out


def test_bilstm_on_the_teachers_words(tiny, glue, sst2, tmp_path):
    summary = tuned(tiny, glue, tmp_path / "out", model="bilstm", teacher=str(sst2[1]), epochs=2.0)
    assert summary["tasks"]["sst2"]["score"] > 85
    from minidistil.downstream import bilstm

    model, labels = bilstm.load(tmp_path / "out" / "sst2")
    assert labels == ("negative", "positive")
    assert model.words.weight.shape == weights.load_model(tiny / "teacher").encoder.embeddings.words.weight.shape


# ---- interruption


def interrupted_at(n, monkeypatch):
    """Sends this process SIGTERM before its n-th batch of training."""
    count, padded = 0, finetune.padded

    def counted(*args):
        nonlocal count
        count += 1
        if count == n:
            os.kill(os.getpid(), signal.SIGTERM)
        return padded(*args)

    monkeypatch.setattr(finetune, "padded", counted)


@pytest.mark.parametrize("n, dtype", [  # in the first epoch, at its end, in the second seed
    (1, "fp32"), (5, "fp32"), (7, "fp32"), (12, "fp32"), (5, "bf16"),
])  # fmt: skip
def test_resumed_is_uninterrupted(n, dtype, tiny, glue, tmp_path, monkeypatch, capsys):
    few = dict(examples=24, epochs=2.0, seeds=2, dtype=dtype)
    expected = tuned(tiny, glue, tmp_path / "a", **few)
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as ended:
        interrupted_at(n, patch)
        tuned(tiny, glue, tmp_path / "b", **few)
    assert ended.value.code == 128 + signal.SIGTERM
    assert re.search(rf"resume with: \S+ finetune.py --out {tmp_path / 'b'} --resume", capsys.readouterr().out)
    monkeypatch.chdir(tmp_path)
    finetune.main(["--out", "b", "--resume"])  # the settings are in scores.json
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found["tasks"] == expected["tasks"]
    a, b = ((tmp_path / name / "sst2" / "model.safetensors").read_bytes() for name in "ab")
    assert a == b


def test_killed_without_warning(tiny, glue, tmp_path, monkeypatch):
    """A checkpoint that was saved on the way is gone on from; when all is done, none is left."""
    few = dict(examples=24, epochs=2.0)
    expected = tuned(tiny, glue, tmp_path / "a", **few)
    with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
        patch.setattr(finetune, "lr_at", lambda update, *rest: lr_at(update, *rest) + (0 / 0 if update == 4 else 0))
        tuned(tiny, glue, tmp_path / "b", **few, save_every=0.0)
    assert load_checkpoint(tmp_path / "b")[0]["update"] == 4
    assert tuned(tiny, glue, tmp_path / "b", **few, resume=True)["tasks"] == expected["tasks"]
    a, b = ((tmp_path / name / "sst2" / "model.safetensors").read_bytes() for name in "ab")
    assert a == b and not (tmp_path / "b" / CHECKPOINT).exists()


def test_more_seeds_later(tiny, glue, tmp_path, capsys):
    """And with nothing more to do, a resumption changes nothing, not even the seconds that the runs took."""
    few = dict(examples=24, epochs=1.0)
    first = tuned(tiny, glue, tmp_path / "out", **few)
    scores = (tmp_path / "out" / "scores.json").read_bytes()
    shutil.copytree(tmp_path / "out", tmp_path / "copy")
    again = tuned(tiny, glue, tmp_path / "copy", **few, resume=True)
    assert again == {**first, "out": str(tmp_path / "copy")} and "is finished" in capsys.readouterr().out
    assert (tmp_path / "copy" / "scores.json").read_bytes() == scores
    summary = tuned(tiny, glue, tmp_path / "out", **few, seeds=3, resume=True)
    assert summary["tasks"]["sst2"]["seeds"] == 3


def test_what_a_resumption_adds_is_resumed_too(tiny, glue, tmp_path, monkeypatch, capsys):
    """The command that an interrupted one prints goes on with its tasks and seeds; each card names its own teacher."""
    few, out = dict(examples=24, epochs=1.0, resume=True), tmp_path / "out"
    tuned(tiny, glue, out, **few | dict(resume=False))
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        interrupted_at(2, patch)
        tuned(tiny, glue, out, **few, seeds=2)
    finetune.main(["--out", str(out), "--resume"])
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["tasks"]["sst2"]["seeds"] == 2
    tuned(tiny, glue, tmp_path / "teacher", "rte", **few | dict(resume=False))
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        interrupted_at(2, patch)
        tuned(tiny, glue, out, "rte", teacher=str(tmp_path / "teacher"), **few)
    finetune.main(["--out", str(out), "--resume"])
    assert list(json.loads(capsys.readouterr().out.splitlines()[-1])["tasks"]) == ["rte"]
    cards = [(out / task / "README.md").read_text() for task in ("rte", "sst2")]
    assert ["guided by 1 fine-tuned teacher" in card for card in cards] == [True, False]


def test_what_ranks_must_have_in_common(tiny, glue, sst2, tmp_path, monkeypatch):
    """Also what a resumed run may change; the files of another machine may be others."""
    given = {}
    monkeypatch.setattr(finetune, "same_on_ranks", lambda contents, ranks: given.update(contents) or contents)
    tuned(tiny, glue, tmp_path / "out", examples=16, epochs=1.0, teacher=str(sst2[1]))
    assert given.keys() >= {"lr", "seeds", "task", "weights", "teachers", "data", "batch"} and given["lr"] == [3e-3]
    other = types.SimpleNamespace(gather=lambda value: [value, value, value | {"lr": [1e-5]}])
    with pytest.raises(UserError, match=r"rank 2 has other settings than rank 0 \(lr \[0.003\] -> \[1e-05\]\): give"):
        same_on_ranks(given, other)
    assert same_on_ranks(given, types.SimpleNamespace(gather=lambda value: [value])) is given


# ---- SQuAD


def test_squad(tiny, tmp_path):
    words, rng = (tiny / "teacher" / "vocab.txt").read_text().split()[5:], random.Random(0)
    articles = []
    for a in range(60):
        context = rng.sample(words, 80)
        place = rng.randrange(11)
        start = len(" ".join(context[:place])) + (place > 0)
        qa = {"id": str(a), "question": context[place], "answers": [{"text": context[place], "answer_start": start}]}
        articles.append({"title": f"t{a}", "paragraphs": [{"context": " ".join(context), "qas": [qa]}]})
    path = tmp_path / "squad.json"
    path.write_text(json.dumps({"version": "1.1", "data": articles}))
    weights.save_model(tmp_path / "model", long_model(tiny))
    for name in ("vocab.txt", "tokenizer_config.json"):
        (tmp_path / "model" / name).write_bytes((tiny / "teacher" / name).read_bytes())
    few = dict(model=str(tmp_path / "model"), data=str(path), seq_len=96)
    figures = tuned(tiny, None, tmp_path / "out", "squad", **few, epochs=2.0)["tasks"]["squad"]
    assert figures["score"] == figures["f1"] and 0 <= figures["em"] <= figures["f1"]
    items, spans = open_task("squad", str(path), Tokenizer.load(tmp_path / "model"), 96).train
    answered = [(ids, *span) for (ids, _), span in zip(items, spans.tolist(), strict=True) if any(span)]
    assert len(answered) > len(items) / 4  # the others are windows without the answer
    for ids, start, end in answered:  # each question is its answer
        assert ids[start : end + 1].tolist() == ids[1 : end - start + 2].tolist()
    taught = dict(teacher=str(tmp_path / "out"), examples=40, augment=1, unlabelled=20)
    second = tuned(tiny, None, tmp_path / "second", "squad", **few, **taught, epochs=1.0)
    assert set(second["tasks"]["squad"]) >= {"em", "f1"}
    runs = json.loads((tmp_path / "second" / "scores.json").read_text())["runs"]["squad"]
    assert runs[0]["updates"] == (40 + 8 + 40) // FAST["batch"]  # each of the 48 questions has one window
    tokenizer = Tokenizer.load(tiny / "teacher")
    for asked, fewer in ((8, ""), (9, ", all that there are")):  # questions are counted, not their windows
        task = open_task("squad", str(path), tokenizer, 72, 40, asked)
        assert len(task.unlabelled) > asked
        assert f" and {len(task.unlabelled)} unlabelled ones{fewer}, dev" in describe(task, 0, asked)


def long_model(tiny):
    config = weights.load_model(tiny / "teacher").config
    return LanguageModel(Config(**{**vars(config), "positions": 96}), seed=0)


# ---- what a user can get wrong


@pytest.mark.parametrize("wrong, words", [
    (dict(task="sst3"), "--task sst3 is not known: choose from cola"),
    (dict(data="nowhere"), "nowhere"),
    (dict(data="nowhere", task="all"), "nowhere holds no task of GLUE"),
    (dict(lr="fast"), "--lr fast: give one learning rate"),
    (dict(lr="-1"), "--lr -1: give one learning rate"),
    (dict(epochs=0.0), "--epochs is 0.0: it must be greater than 0"),
    (dict(alpha_ce=-1.0), "--alpha-ce is -1.0: it must not be negative"),
    (dict(augment=-1), "--augment is -1: it must not be negative"),
    (dict(unlabelled=9, teacher="t"), "--unlabelled counts training texts that --examples leaves out"),
    (dict(warmup=2.0), "--warmup is 2.0"),
    (dict(seed=-1), "--seed is -1: it must be a whole number from 0 to 9223372036854775807"),
    (dict(seed=2**63 - 2, seeds=3), "from 0 to 9223372036854775805"),
    (dict(seq_len=4), "--seq-len is 4"),
    (dict(seq_len=64, task="sst2", words="x"), "--words is for --model bilstm"),
    (dict(model="bilstm"), "--model bilstm needs word vectors"),
    (dict(model="bilstm", words="TEACHER", task="squad"), "--model bilstm classifies sentences"),
    (dict(teacher=","), "--teacher ,: name one folder"),
    (dict(teacher="TEACHER"), "is not a fine-tuned model"),
    (dict(task="rte", teacher="SST2"), "(labels found: negative, positive; wanted: entailment, not_entailment)"),
    (dict(task="stsb,sst2,rte", teacher="SST2"), "labels found: negative, positive; wanted: score"),
    (dict(task="sst2,squad", teacher="SST2"), "it is a ...ForSequenceClassification, not a ...ForQuestionAnswering"),
    (dict(teacher="SST2", alpha_task=0.0, alpha_ce=0.0), "every weight of the objective is 0"),
    (dict(resume=True, out=None), "--resume needs to know which run"),
    (dict(resume=True), "nothing to resume"),
    (dict(device="tpu"), "--device tpu"),
])  # fmt: skip
def test_wrong_settings(wrong, words, tiny, glue, sst2, tmp_path):
    places = {"TEACHER": str(tiny / "teacher"), "SST2": str(sst2[1] / "sst2")}
    wrong = {name: places.get(value, value) if isinstance(value, str) else value for name, value in wrong.items()}
    with pytest.raises(UserError) as error:
        tuned(tiny, glue, **{"out": tmp_path / "out", **wrong})
    assert words in str(error.value) and "\n" not in str(error.value) and ": " in str(error.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("flag", "--temperature --alpha-task --alpha-ce --alpha-mse --augment --unlabelled".split())
def test_settings_of_a_teacher_need_one(flag):
    with pytest.raises(UserError, match=f"{flag} is for a teacher: name one with --teacher"):
        finetune.main(["--task", "sst2", "--model", "m", "--data", "d", flag, "1"])


@pytest.mark.parametrize("spare", [-1, 5])
def test_a_table_may_have_more_rows_than_words(tiny, glue, tmp_path, spare):
    words = Tokenizer.load(tiny / "teacher")
    config = Config(**{**vars(weights.read_config(tiny / "teacher")), "vocab_size": len(words.vocab) + spare})
    weights.save_model(tmp_path / "model", LanguageModel(config, seed=0))
    words.save(tmp_path / "model", "bert")
    few = dict(model=str(tmp_path / "model"), examples=16, epochs=1.0)
    if spare < 0:
        with pytest.raises(UserError, match=f"the model has {config.vocab_size} words, its vocabulary"):
            tuned(tiny, glue, tmp_path / "out", **few)
    else:
        tuned(tiny, glue, tmp_path / "out", **few)
        assert weights.read_config(tmp_path / "out" / "sst2").vocab_size == config.vocab_size


# ---- what models and tasks have to fit


def relabelled(source, folder, names, order=None):
    """A copy of a fine-tuned folder whose config.json names its classes so; `order` is that of its classes."""
    shutil.copytree(source, folder)
    values = json.loads((folder / "config.json").read_text())
    values.pop("label2id"), values.pop("id2label")
    if names is not None:
        values["id2label"] = {str(i): name for i, name in enumerate(names)}
    (folder / "config.json").write_text(json.dumps(values))
    if order:
        tensors = {name: tensor.clone() for name, tensor in read_safetensors(folder / "model.safetensors")[0].items()}
        for name in ("classifier.weight", "classifier.bias"):
            tensors[name] = tensors[name][order]
        write_safetensors(folder / "model.safetensors", tensors)
    return str(folder)


@pytest.mark.parametrize("names, found", [
    (["LABEL_0", "LABEL_1"], "LABEL_0, LABEL_1"), (None, "none"), ([], "none"), (["negative"], "negative"),
    (["negative", "neutral", "positive"], "negative, neutral, positive"), (["neg", "pos"], "neg, pos"),
])  # fmt: skip
def test_labels_that_are_not_the_tasks_are_named(names, found, tiny, glue, sst2, tmp_path):
    teacher = relabelled(sst2[1] / "sst2", tmp_path / "teacher", names)
    with pytest.raises(UserError) as error:
        tuned(tiny, glue, tmp_path / "out", teacher=teacher)
    assert f"(labels found: {found}; wanted: negative, positive)" in str(error.value)
    assert "id2label of its config.json" in str(error.value) and not (tmp_path / "out").exists()


def test_labels_may_be_spelled_and_ordered_otherwise(tiny, glue, sst2, tmp_path, capsys):
    """They are matched by name: what the teacher says of an example is the same."""
    same = relabelled(sst2[1] / "sst2", tmp_path / "same", ["NEGATIVE", "Positive"])
    turned = relabelled(sst2[1] / "sst2", tmp_path / "turned", ["POSITIVE", "NEGATIVE"], order=[1, 0])
    few = dict(examples=16, epochs=1.0)
    for i, teacher in enumerate((str(sst2[1]), same, turned)):
        tuned(tiny, glue, tmp_path / f"out{i}", teacher=teacher, **few)
    scores = re.findall(r"the teacher's dev score is (\S+)", capsys.readouterr().out)
    assert len(scores) == 3 and len(set(scores)) == 1 and float(scores[0]) > 90
    a, b, c = ((tmp_path / f"out{i}" / "sst2" / "model.safetensors").read_bytes() for i in range(3))
    assert a == b == c


def test_a_regression_has_one_number_by_any_name(tiny, glue, tmp_path):
    few = dict(task="stsb", examples=16, epochs=1.0)
    tuned(tiny, glue, tmp_path / "teacher", **few)
    teacher = relabelled(tmp_path / "teacher" / "stsb", tmp_path / "other", ["LABEL_0"])
    tuned(tiny, glue, tmp_path / "out", **few, teacher=teacher)


def one_type(tiny, folder):
    config = Config(**{**vars(weights.read_config(tiny / "teacher")), "token_types": 1})
    weights.save_model(folder, LanguageModel(config, seed=0))
    Tokenizer.load(tiny / "teacher").save(folder, "bert")
    return str(folder)


def test_pairs_need_two_token_types(tiny, glue, tmp_path):
    """Which is said before the first of several tasks; single texts, and words alone, need one."""
    model, few = one_type(tiny, tmp_path / "model"), dict(examples=16, epochs=1.0)
    for task in ("rte", "sst2,rte", "squad"):
        with pytest.raises(UserError, match=r"model has one token type \(type_vocab_size 1\), (rte|squad) needs two"):
            tuned(tiny, glue, tmp_path / "out", task, model=model, **few)
    assert not (tmp_path / "out").exists()
    tuned(tiny, glue, tmp_path / "out", model=model, **few)
    tuned(tiny, glue, tmp_path / "bilstm", "rte", model="bilstm", words=model, **few)


@pytest.mark.parametrize("change, words", [
    (dict(token_types=1), "has one token type"), (dict(positions=16), "has 16 positions: use --seq-len 16 or less"),
    (dict(vocab_size=200), "has 200 words, its vocabulary"),
])  # fmt: skip
def test_a_teacher_must_fit_too(change, words, tiny, glue, tmp_path):
    config = Config(**{**vars(weights.read_config(tiny / "teacher")), **change})
    labels = {str(i): label for i, label in enumerate(open_task("rte", glue, Tokenizer.load(tiny / "teacher")).labels)}
    weights.save_model(tmp_path / "teacher", Classifier(config, 2, seed=0), id2label=labels)
    Tokenizer.load(tiny / "teacher").save(tmp_path / "teacher", "bert")
    path = tmp_path / "RTE"
    path.mkdir()
    text = " ".join(Tokenizer.load(tiny / "teacher").vocab[10:20])
    for name in ("train", "dev"):
        (path / f"{name}.tsv").write_text(f"sentence1\tsentence2\tlabel\n{text}\t{text}\tentailment\n")
    with pytest.raises(UserError, match=words):
        tuned(tiny, tmp_path, tmp_path / "out", "rte", teacher=str(tmp_path / "teacher"))
    assert not (tmp_path / "out").exists()


# ---- the same contents under another path


def test_a_resumed_run_compares_contents(tiny, glue, sst2, tmp_path, monkeypatch):
    """Of the model, the words and the teacher, however their paths are written, and wherever they have moved."""
    monkeypatch.chdir(tmp_path)
    few = dict(examples=16, epochs=1.0)
    for model, words in (("encoder", None), ("bilstm", "copy")):
        for name, source in (("copy", tiny / "teacher"), ("tuned", sst2[1])):
            shutil.copytree(source, name, dirs_exist_ok=True)
        model = "copy" if model == "encoder" else model
        out = tmp_path / f"out-{model}"
        tuned(tiny, glue, out, model=model, words=words, teacher="tuned", **few)
        os.rename("copy", "moved")
        again = dict(model=model if words else "./moved", words=words and str(tmp_path / "moved"), resume=True, **few)
        found = tuned(tiny, glue, out, teacher="./tuned/sst2", seeds=2, **again)
        assert found["tasks"]["sst2"]["seeds"] == 2
        os.rename("moved", "copy")
    other = LanguageModel(weights.read_config("copy"), seed=5)
    weights.save_model("other", other)
    Tokenizer.load("copy").save("other", "bert")
    with pytest.raises(UserError, match=r"begun with other settings \(weights "):
        tuned(tiny, glue, tmp_path / "out-copy", model="other", teacher="tuned", seeds=3, resume=True, **few)
    with pytest.raises(UserError, match=r"begun with other settings \(model encoder -> bilstm\)"):
        tuned(tiny, glue, tmp_path / "out-copy", model="bilstm", words="copy", teacher="tuned", resume=True, **few)
    for teacher in (None, "tuned,tuned"):
        with pytest.raises(UserError, match="begun with other teachers for sst2: give the same --teacher, or a new"):
            tuned(tiny, glue, tmp_path / "out-copy", model="copy", teacher=teacher, resume=True, **few)


def test_examples_longer_than_the_model(tiny, glue, tmp_path):
    path = glue.parent / "long" / "SST-2"
    path.mkdir(parents=True)
    for name in ("train", "dev"):
        (path / f"{name}.tsv").write_text("sentence\tlabel\n" + "a " * 80 + "\t0\n")
    with pytest.raises(UserError, match="has 32 positions: use --seq-len 32 or less"):
        tuned(tiny, path.parent, tmp_path / "out")
    rows = ["a " * 80 + "\t0\n", "a\t0\n"]
    (path / "dev.tsv").write_text("sentence\tlabel\na\t0\n")
    for some in (rows, rows[::-1]):  # whichever has no label
        (path / "train.tsv").write_text("sentence\tlabel\n" + "".join(some))
        task = open_task("sst2", path.parent, Tokenizer.load(tiny / "teacher"), None, 1, 1)
        with pytest.raises(UserError, match="has 32 positions"):
            check_positions("the model", weights.read_config(tiny / "teacher"), task)


def test_positions_that_are_no_multiple_of_8(tiny, tmp_path):
    """Batches are padded to one; the length that is advised works."""
    path = tmp_path / "data" / "SST-2"
    path.mkdir(parents=True)
    for name in ("train", "dev"):
        (path / f"{name}.tsv").write_text("sentence\tlabel\n" + ("a " * 80 + "\t0\n" + "a\t1\n") * 8)
    config = weights.read_config(tiny / "teacher")
    weights.save_model(tmp_path / "model", LanguageModel(Config(**{**vars(config), "positions": 36}), seed=0))
    Tokenizer.load(tiny / "teacher").save(tmp_path / "model", "bert")
    few = dict(model=str(tmp_path / "model"), epochs=1.0)
    for length in (None, 36, 33):
        with pytest.raises(UserError, match="has 36 positions: use --seq-len 32 or less"):
            tuned(tiny, path, tmp_path / "out", seq_len=length, **few)
    tuned(tiny, path, tmp_path / "out", seq_len=32, **few)
    assert embed(tmp_path / "model", ["a " * 80]).shape == (1, config.width)


def test_an_output_folder_named_like_the_model(tiny, glue, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    few = dict(words="words", teacher="one,two")
    for model, out in (("mine", "./mine"), ("bilstm", "words"), ("bilstm", "two"), ("bilstm", "bilstm")):
        with pytest.raises(UserError, match=f"--out {out} is also the name of the model .*choose another --out"):
            tuned(tiny, glue, out, model=model, **few if model == "bilstm" else {})
    assert not list(tmp_path.iterdir())


def test_another_run_is_not_written_over(tiny, glue, sst2):
    with pytest.raises(UserError, match="is not empty: add --resume to continue, or choose another --out"):
        tuned(tiny, glue, sst2[1])
    with pytest.raises(UserError, match=r"begun with other settings \(batch 8 -> 9\)"):
        tuned(tiny, glue, sst2[1], batch=9, resume=True)


def test_a_loss_that_is_not_finite_names_its_examples(tiny, glue, tmp_path):
    with pytest.raises(UserError, match=r"sst2 lr 1e\+30 seed 0, update \d+: the loss is .*lower --lr"):
        tuned(tiny, glue, tmp_path / "out", lr="1e30", examples=40)


def test_a_damaged_checkpoint_is_refused(tiny, glue, tmp_path, monkeypatch):
    few = dict(examples=24, epochs=1.0)
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        interrupted_at(2, patch)
        tuned(tiny, glue, tmp_path / "out", **few)
    path = tmp_path / "out" / CHECKPOINT
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(UserError, match="damaged"):
        tuned(tiny, glue, tmp_path / "out", **few, resume=True)


# ---- on a GPU


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
def test_cuda_learns_too(tiny, glue, tmp_path, dtype):
    assert tuned(tiny, glue, tmp_path / "out", device="cuda", dtype=dtype)["tasks"]["sst2"]["score"] > 90
