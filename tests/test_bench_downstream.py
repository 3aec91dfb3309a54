"""`bench.py retention` and `bench.py ablation`: what they run, and what they make of it."""

import pathlib
import shutil
import types

import pytest
from pictures import svg_texts

from benches import distil, retention
from minidistil.errors import UserError


def settings(**given):
    names = dict(teacher=None, student=None, data=None, task="sst2,rte", rounds=3, finetune=None, taught=None,
                 train=None)  # fmt: skip
    return types.SimpleNamespace(**names | {"tiny": False} | given)


# ---- retention


def test_retention_runs_finetune_on_each_model(tiny, glue, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(tiny / "teacher", tmp_path / "half")
    few = "--examples 16 --epochs 1 --batch 8 --lr 1e-3 --device cpu --dtype fp32 --seq-len 32"
    given = settings(teacher=str(tiny / "teacher"), student="half", data=str(glue), rounds=2, finetune=few)
    results = list(retention.bench(given))
    assert [r["provider"] for r in results] == ["teacher", "half"]
    # the same weights, budget and seeds: the same scores
    assert results[0]["scores"] == results[1]["scores"] and set(results[0]["scores"]) == {"sst2", "rte"}
    assert results[1]["retained"] == 100.0 and results[0]["seeds"] == 2
    table = retention.table(results).splitlines()
    assert table[0] == "| | sst2 | rte | mean | kept |" and len({line.count("|") for line in table}) == 1
    retention.draw(tmp_path / "kept.svg", results)
    assert {"teacher", "half", "SST-2", "RTE", "mean"} <= set(svg_texts(tmp_path / "kept.svg"))


def test_the_first_student_is_taught_again_by_the_fine_tuned_teacher(tiny, glue, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(tiny / "teacher", tmp_path / "half")
    few = "--examples 16 --epochs 1 --batch 8 --lr 1e-3 --device cpu --dtype fp32 --seq-len 32"
    given = settings(teacher=str(tiny / "teacher"), student="half", data=str(glue), rounds=1, finetune=few, task="sst2")
    results = list(retention.bench(settings(**{**vars(given), "taught": "--augment 2"})))
    assert [r["provider"] for r in results] == ["teacher", "half", "half-taught"]
    assert [r["settings"] for r in results] == [few, few, f"{few} --augment 2"]
    said = (tmp_path / "runs" / "retention" / "half-taught.log").read_text()
    assert "16 items of" in said and "2 augmented copies of each" in said and "update     6/6" in said
    assert f"the teacher's dev score is {results[0]['scores']['sst2']:.2f}" in said


def test_retention_says_why_a_run_failed(tiny, glue, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    given = settings(teacher=str(tiny / "teacher"), student="nowhere", data=str(glue), finetune="--examples 8 --lr x")
    teacher, student = retention.bench(given)
    assert "--lr x: give one learning rate" in teacher["error"] and "nowhere is not a folder" in student["error"]
    assert "scores" not in teacher and "scores" not in student


@pytest.mark.parametrize("missing", ["teacher", "student", "data"])
def test_retention_needs_models_and_data(missing):
    with pytest.raises(UserError, match="give --teacher, --student"):
        list(retention.bench(settings(**dict(teacher="a", student="b", data="c") | {missing: None})))


def test_published_scores_keep_what_the_paper_says():
    """The paper's 97 %: 77.0 of 79.5, the means of nine tasks."""
    bert, distilbert = ({t: s for t, s in row.items() if t != "imdb"} for row in retention.PUBLISHED.values())
    means = [round(sum(row.values()) / len(row), 1) for row in (bert, distilbert)]
    assert means == [79.5, 77.0]
    row = {"provider": "teacher", "scores": bert, "tasks": {}}
    assert "96.9%" in retention.table([row]).splitlines()[-1]


# ---- ablation


def last_rows(rows):
    """What a report keeps of rows that come again with each seed."""
    return list({id(row): row for row in rows}.values())


def fake_script(calls):
    def script(name, *words):
        words = list(map(str, words))
        calls.append(words)
        out, seed = (words[words.index(flag) + 1] for flag in ("--out", "--seed"))
        pathlib.Path(out).mkdir()
        (pathlib.Path(out) / "curve.svg").write_text("<svg/>")
        top1 = 0.30 + 0.02 * int(seed) - (0.10 if "random" in words else 0)
        student = {"parameters": 7, "top1": top1, "mlm_loss": 3.0, "kl": 0.5, "agreement": 0.6}
        return {"teacher": {"parameters": 9, "top1": 0.4}, "student": student, "seconds": 1.0 + int(seed), "steps": 5}

    return script


def test_ablation_leaves_out_one_part_at_a_time(monkeypatch):
    calls = []
    monkeypatch.setattr(distil, "script", fake_script(calls))
    results = last_rows(distil.bench_ablation(settings(train="--steps 5", rounds=2)))
    assert len(calls) == 10 and all(words[:4] == ["--mask-share", "0.15", "--steps", "5"] for words in calls)
    assert [words[4:6] for words in calls[1:5]] == [
        ["--alpha-ce", "0"], ["--alpha-cos", "0"], ["--alpha-mlm", "0"], ["--student-init", "random"],
    ]  # fmt: skip
    whole, *_, random = results[1:]
    assert whole["top1"] == [0.31, 0.01] and whole["change"] == 0.0 and whole["seconds"] == 2.0
    assert random["change"] == pytest.approx(-0.1) and random["paper"] == -3.69
    table = distil.ablation_table(results).splitlines()
    assert len(table) == 7 and "| -10.00 | -3.69 |" in table[-1] and "31.0% ± 1.0%" in table[2]


def test_ablation_runs_train(tiny, monkeypatch):
    monkeypatch.setattr(distil, "ABLATIONS", {"all three losses": ([], 0.0)})
    flags = f"--teacher {tiny / 'teacher'} --data {tiny / 'corpus'} --seq-len 32 --batch 4 --steps 3 --accum 1 --lr .01"
    results = last_rows(distil.bench_ablation(settings(train=flags, rounds=1)))
    teacher, whole = results
    assert whole["steps"] == 3 and whole["top1"][1] == 0 and whole["kl"][0] > 0 and whole["change"] == 0
