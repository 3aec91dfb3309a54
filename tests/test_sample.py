"""What sample.py puts in the blank, against transformers' own pipeline, and how it shows it."""

import dataclasses
import io
import json
import os
import pathlib
import shutil
import sys

import pytest
import torch
from forked import call

import sample
from minidistil import weights
from minidistil.errors import UserError
from minidistil.model import Config, LanguageModel
from minidistil.safetensors import write_safetensors
from minidistil.tokenizer import Tokenizer
from minidistil.tokenizers.wordpiece import WordPiece
from minidistil.tokenizers.wordpiece_files import SPECIAL_TOKENS

ROOT = pathlib.Path(sample.__file__).parent
WORDS = "a an axis elements mean of paris returns sum the town 山 ##s ##ing . ,".split()
VOCAB = [*SPECIAL_TOKENS.values(), *WORDS]
PROMPTS = ["Returns the [MASK] of a town.", "the [MASK] [MASK]s of [MASK]"]


def make(folder, seed, token_types, vocab=VOCAB, vocab_size=None):
    """Writes a random model with weights large enough to have opinions, and its vocabulary."""
    family = "bert" if token_types else "distilbert"
    shape = dict(layers=2, heads=2, width=8, mlp_width=12, init_range=0.8, family=family)
    config = Config(vocab_size or len(vocab), 16, token_types, **shape)
    weights.save_model(folder, LanguageModel(config, seed=seed))
    WordPiece(vocab, max_length=16).save(folder, config.family)
    return folder


@pytest.fixture(autouse=True)
def offline(monkeypatch, tmp_path):
    """Nobody's cache, no network, no runs/ but the test's own, and a terminal of 80 columns."""
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def student(tmp_path):
    return make(tmp_path / "student", seed=3, token_types=0)


@pytest.fixture
def teacher(tmp_path):
    return make(tmp_path / "teacher", seed=4, token_types=2)


def output(capsys, *argv):
    sample.main([str(a) for a in argv])
    return capsys.readouterr().out


def answer(capsys, *argv):
    """Returns the JSON of a call, which must be all that it prints."""
    (line,) = output(capsys, *argv, "--json").splitlines()
    return json.loads(line)


def theirs(folder, prompt, temperature=1.0):
    """Returns transformers' probabilities (N, V) at the blanks, from its own tokenizer and model."""
    transformers = pytest.importorskip("transformers")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    inputs = tokenizer(prompt, return_tensors="pt")
    with torch.no_grad():
        logits = transformers.AutoModelForMaskedLM.from_pretrained(folder)(**inputs).logits[0]
    return torch.softmax(logits[inputs["input_ids"][0] == tokenizer.mask_token_id] / temperature, -1)


def assert_same_guesses(ours, p, vocab):
    """The tokens are the likeliest by p (V), in falling order, and each has the probability that p gives it."""
    expected = p.topk(len(ours)).values.tolist()
    assert [q for _, q in ours] == pytest.approx(expected, abs=1e-5)
    assert [p[vocab.index(token)].item() for token, _ in ours] == pytest.approx(expected, abs=1e-5)
    assert len({token for token, _ in ours}) == len(ours)


# ---- numbers


@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("prompt", PROMPTS)
def test_probabilities_are_those_of_transformers(capsys, student, teacher, prompt, temperature):
    found = answer(
        capsys, prompt, "--model", student, "--teacher", teacher, "-k", len(VOCAB), "--temperature", temperature
    )
    assert list(found) == ["prompt", "predictions"] and list(found["predictions"]) == ["student", "teacher"]
    assert found["prompt"] == prompt
    for who, folder in (("student", student), ("teacher", teacher)):
        blanks = found["predictions"][who]
        blanks = [blanks] if prompt.count("[MASK]") == 1 else blanks
        p = theirs(folder, prompt, temperature)
        assert len(blanks) == len(p) == prompt.count("[MASK]")
        for ours, row in zip(blanks, p, strict=True):
            assert len(ours) == len(VOCAB) and sum(q for _, q in ours) == pytest.approx(1)
            assert_same_guesses(ours, row, VOCAB)
    assert found["predictions"]["student"] != found["predictions"]["teacher"]


def test_the_likeliest_are_those_of_the_fill_mask_pipeline(capsys, assets):
    transformers = pytest.importorskip("transformers")
    folder = assets / "models" / "bert-tiny-mlm"
    pipeline = transformers.pipeline("fill-mask", model=str(folder), top_k=20)
    one, several = "Paris is the [MASK] of France.", "The [MASK] was directed by [MASK] Hitchcock."
    for prompt in (one, several):
        found = answer(capsys, prompt, "--model", folder)["predictions"]["student"]
        expected = pipeline(prompt)
        for ours, blank in zip(*([found], [expected]) if prompt == one else (found, expected), strict=True):
            assert [token for token, _ in ours] == [guess["token_str"] for guess in blank]
            assert [p for _, p in ours] == pytest.approx([guess["score"] for guess in blank], abs=1e-6, rel=1e-4)


def test_temperature_0_is_greedy(capsys, student):
    """The likeliest word has all probability; the order of the others is that of any other temperature."""
    warm, greedy = (
        answer(capsys, PROMPTS[1], "--model", student, "-k", len(VOCAB), "--temperature", temperature)["predictions"]
        for temperature in (1, 0)
    )
    for one, other in zip(warm["student"], greedy["student"], strict=True):
        assert [token for token, _ in one] == [token for token, _ in other]
        assert [p for _, p in other] == [1] + [0] * (len(VOCAB) - 1)
    assert "(temperature 0)" in output(capsys, PROMPTS[1], "--model", student, "--temperature", 0, "-k", 3)
    ties = torch.tensor([[1.0, 3.0, 3.0]], dtype=torch.float64)
    assert [p for _, p in sample.likeliest(ties, 3, 0.0, "abc".__getitem__)[0]] == [0.5, 0.5, 0]


def test_no_temperature_overflows(capsys, student):
    one_hot = answer(capsys, PROMPTS[0], "--model", student, "-k", 3, "--temperature", "1e-310")
    assert [p for _, p in one_hot["predictions"]["student"]] == [1, 0, 0]
    flat = answer(capsys, PROMPTS[0], "--model", student, "-k", 3, "--temperature", "1e300")
    assert [p for _, p in flat["predictions"]["student"]] == pytest.approx([1 / len(VOCAB)] * 3)


def test_blanks_are_filled_from_left_to_right(student):
    model, tokenizer = weights.load_model(student), Tokenizer.load(student)
    prompt = "the [MASK] of [MASK] and [MASK]."
    sentence = prompt
    for _ in range(3):
        guess = VOCAB[theirs(student, sentence)[0].argmax()]
        assert not guess.startswith("##") and guess not in SPECIAL_TOKENS.values()  # else replace() would not do
        sentence = sentence.replace("[MASK]", guess, 1)
    ids = tokenizer.encode_prompt(prompt)
    positions = [i for i, token in enumerate(ids) if token == tokenizer.mask_id]
    assert sample.fill(model, ids, positions, prompt, tokenizer) == sentence
    assert ids == tokenizer.encode_prompt(prompt)  # left as it was
    at_once = sample.predict(model, ids, positions).argmax(-1).tolist()
    assert sentence != "the {} of {} and {}.".format(*(VOCAB[i] for i in at_once))  # else the order proves nothing


def test_pieces_join_the_word_before_and_a_guessed_blank_stays(monkeypatch):
    guesses = iter(["##ing", "[MASK]", "town"])
    monkeypatch.setattr(sample, "predict", lambda *_: torch.eye(len(VOCAB))[[VOCAB.index(next(guesses))]])
    filled = sample.fill(None, [9, 4, 4, 4], [1, 2, 3], "a walk [MASK], [MASK] [MASK].", WordPiece(VOCAB))
    assert filled == "a walking, [MASK] town."


# ---- what people see


def test_one_table_side_by_side(capsys, student, teacher):
    lines = output(capsys, PROMPTS[0], "--model", student, "--teacher", teacher, "-k", 5).splitlines()
    predictions = answer(capsys, PROMPTS[0], "--model", student, "--teacher", teacher, "-k", 5)["predictions"]
    assert lines[0] == PROMPTS[0]
    assert lines[1].startswith(f"teacher: {teacher}, 2 layers x 8, ")
    assert lines[2].startswith(f"student: {student}, 2 layers x 8, ")
    assert lines[4].split() == ["teacher", "student"]
    right = lines[4].index("student")
    for rank, (row, s, t) in enumerate(zip(lines[5:10], *predictions.values(), strict=True), 1):
        left = row[:right].split()
        assert left[:3] == [str(rank), t[0], f"{t[1]:.2%}"]
        assert row[right:].split()[:2] == [s[0], f"{s[1]:.2%}"]
        assert (left[-1] == "=") == (s[0] == t[0])
    guess = {who: lists[0][0] for who, lists in predictions.items()}
    assert guess["student"] != guess["teacher"]
    assert lines[11:13] == [f"{who}: Returns the {guess[who]} of a town." for who in ("teacher", "student")]
    assert lines[13].startswith("same first guess in 0 of 1 ")


def test_agreement_is_marked(capsys, student):
    lines = output(capsys, PROMPTS[1], "--model", student, "--teacher", student, "-k", 2).splitlines()
    assert [line for line in lines if line.startswith("[MASK]")] == [
        f"[MASK] {i} of 3, the others left blank" for i in (1, 2, 3)
    ]
    assert sum(" = " in line for line in lines) == 6 and "same first guess in 3 of 3 " in lines[-1]
    assert "filled from left to right" in lines[-4]


def test_a_student_alone_has_one_column_and_no_verdict(capsys, student):
    text = output(capsys, PROMPTS[0], "--model", student, "-k", 3)
    assert "teacher" not in text and "=" not in text and "same first guess" not in text
    assert "temperature" not in text
    assert "(temperature 2)" in output(capsys, PROMPTS[0], "--model", student, "--temperature", 2, "-k", 3)


def test_bars_share_one_scale_and_fit_the_terminal():
    guesses = {"teacher": [["sum", 0.5], ["a", 0.25]], "student": [["山山", 0.125], ["sum", 0.0]]}
    # 4 for the rank, 4 for the longest token (two wide characters), 10 for the figure, the rest to bars of 20 cells
    lines = sample.table(guesses, 4 + 34 + 3 + 34, sample.EIGHTHS).split("\n")
    assert lines == [
        "   teacher" + " " * 30 + "student",
        "1  sum    50.00% " + "█" * 20 + " " * 3 + "山山   12.50% " + "█" * 5,
        "2  a      25.00% " + "█" * 10 + " " * 13 + "sum     0.00%",
    ]
    assert sample.table(guesses, 10, sample.HASHES).count("\n") == 2  # too narrow for bars: still a table
    assert max(map(len, lines)) <= 75


@pytest.mark.parametrize("share, eighths, hashes", [(0, "    ", "    "), (0.03, "▏   ", "    "), (0.5, "██  ", "##  "),
                                                    (0.65, "██▋ ", "### "), (1, "████", "####")])  # fmt: skip
def test_bar(share, eighths, hashes):
    assert sample.bar(share, 4, sample.EIGHTHS) == eighths
    assert sample.bar(share, 4, sample.HASHES) == hashes


def test_a_terminal_without_blocks_gets_hashes(monkeypatch, student):
    screen = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(screen, "ascii", write_through=True))
    sample.main([PROMPTS[0], "--model", str(student), "-k", str(len(VOCAB))])
    text = screen.getvalue().decode("ascii")
    assert "####" in text
    assert text.count(" ?  ") == 1  # 山


# ---- which models


def test_the_newest_run_and_the_teacher_that_it_names(capsys, tmp_path, teacher):
    prompt = sample.PROMPT.replace("given", "a").replace("along", "of")
    with pytest.raises(UserError, match="no model in runs/: train one"):
        sample.main([prompt])
    for age, name in enumerate(["new", "old"]):
        folder = make(tmp_path / "runs" / name, seed=age + 5, token_types=0)
        os.utime(folder / "model.safetensors", (1e9 - age, 1e9 - age))
    unfinished = tmp_path / "runs" / "unfinished"
    unfinished.mkdir()
    (unfinished / "model.safetensors").write_bytes(b"")
    run_json = tmp_path / "runs" / "new" / "run.json"

    def predictions(*argv):
        return answer(capsys, prompt, "-k", 3, *argv)["predictions"]

    alone = predictions()
    assert alone["teacher"] is None
    new, old = (predictions("--model", f"runs/{name}")["student"] for name in ("new", "old"))
    assert alone["student"] == new != old
    run_json.write_text(json.dumps({"settings": {"teacher": str(teacher)}}))
    assert predictions()["teacher"] == predictions("--model", teacher, "--teacher", "none")["student"]
    assert predictions("--teacher", "none") == alone
    assert predictions("--teacher", "runs/old")["teacher"] == old
    for text in (json.dumps({"settings": {"teacher": "none"}}), "{}", "[]", "{"):
        run_json.write_text(text)
        sample.main([prompt, "-k", "3", "--json"])
        out, err = capsys.readouterr()
        assert json.loads(out)["predictions"] == alone and err == ""


def test_a_named_teacher_that_is_gone_is_said_and_done_without(capsys, tmp_path, student, teacher):
    """Or that predicts no words, such as a sentence encoder whose student learns words, too."""
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "config.json").write_text("{}")
    shutil.copytree(teacher, tmp_path / "headless")
    tensors = weights.read_weights(teacher)
    encoder = {name: tensor.clone() for name, tensor in tensors.items() if name.startswith("bert.")}
    assert 0 < len(encoder) < len(tensors)
    write_safetensors(tmp_path / "headless" / "model.safetensors", encoder)
    for name in (str(tmp_path / "gone"), str(tmp_path / "empty"), str(tmp_path / "headless")):
        (student / "run.json").write_text(json.dumps({"settings": {"teacher": name}}))
        sample.main([PROMPTS[0], "--model", str(student), "-k", "3", "--json"])
        out, err = capsys.readouterr()
        assert json.loads(out)["predictions"]["teacher"] is None
        assert err.startswith("sample.py: showing the student alone: ") and name in err and err.count("\n") == 1


def test_without_a_prompt_there_is_one(capsys, student):
    assert answer(capsys, "--model", student, "-k", 3)["prompt"] == sample.PROMPT


def test_rows_without_a_word_are_never_shown(tmp_path, capsys, teacher):
    """Not even where nothing is likelier: the probabilities are those of the table without them."""
    model = weights.load_model(teacher)
    wide = LanguageModel(dataclasses.replace(model.config, vocab_size=len(VOCAB) + 3), seed=0)
    state = model.state_dict()
    state["encoder.embeddings.words.weight"] = torch.cat([state["encoder.embeddings.words.weight"], torch.ones(3, 8)])
    state["head.bias"] = torch.cat([state["head.bias"], torch.full((3,), 50.0)])
    wide.load_state_dict(state)
    weights.save_model(tmp_path / "wide", wide)
    WordPiece(VOCAB, max_length=16).save(tmp_path / "wide", "bert")
    for prompt in PROMPTS:
        said = [answer(capsys, prompt, "--model", f, "--teacher", "none", "-k", len(VOCAB)) for f in ("wide", teacher)]
        assert said[0] == said[1]
        shown = [output(capsys, prompt, "--model", f, "--teacher", "none") for f in ("wide", teacher)]
        assert shown[0].splitlines()[3:] == shown[1].splitlines()[3:]
    sample.main([PROMPTS[0], "--model", "wide"])
    n = len(VOCAB)
    assert f"sample.py: the student has {n + 3} rows for {n} words: the last 3 stay unused" in capsys.readouterr().err


# ---- what is refused


@pytest.mark.parametrize("prompt, argv, message", [
    ("", [], "no [MASK]: write [MASK] where a word is missing"),
    ("the sum", [], "no [MASK]: write [MASK] where a word is missing"),
    ("the [mask]", [], "no [MASK]: write [MASK] in capitals"),
    ("[MASK]", ["-k", 0], "-k is 0: it must be at least 1"),
    ("[MASK]", ["-k", len(VOCAB) + 1], f"the vocabulary has {len(VOCAB)} words: use -k {len(VOCAB)} or less"),
    ("[MASK]", ["--temperature", -1], "--temperature is -1.0: it must be 0 or more"),
    ("[MASK]", ["--temperature", "nan"], "--temperature is nan: it must be 0 or more"),
    ("[MASK]", ["--temperature", "inf"], "--temperature is inf: it must be"),
    ("the " * 14 + "[MASK]", [], "the prompt is 17 tokens long, the student reads 16: shorten it"),
    ("[MASK]", ["--teacher", "other"], "student and teacher have different vocabularies"),
    ("[MASK]", ["--teacher", "missing/one/more"], "missing/one/more is "),
    ("[MASK]", ["--model", "missing/one/more"], "missing/one/more is "),
    ("[MASK]", ["--model", "short"], f"the student has {len(VOCAB) - 1} words, its vocabulary {len(VOCAB)}"),
])  # fmt: skip
def test_refusals(tmp_path, student, prompt, argv, message):
    make(tmp_path / "other", seed=1, token_types=2, vocab=[*VOCAB[:-1], "else"])
    make(tmp_path / "short", seed=1, token_types=2, vocab_size=len(VOCAB) - 1)
    with pytest.raises(UserError) as error:  # of an option given twice, the second counts
        sample.main([prompt, "--model", str(student), "-k", "3", *map(str, argv)])
    assert message in str(error.value) and "\n" not in str(error.value)


def test_the_longest_prompt_fits(capsys, student):
    assert answer(capsys, "the " * 13 + "[MASK]", "--model", student, "-k", 3)["predictions"]["student"]


def test_an_error_is_one_line_and_exit_code_1():
    done = call([ROOT / "sample.py", "the sum", "--model", "demo"])
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == "sample.py: error: the prompt has no [MASK]: write [MASK] where a word is missing\n"
