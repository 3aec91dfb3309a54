"""GLUE and IMDb: the real files, the official layouts of those that are not here, and files that are wrong."""

import collections
import gzip

import pytest

from minidistil.downstream.glue import GLUE, TASKS, Example, load, score
from minidistil.downstream.metrics import METRICS
from minidistil.errors import UserError

MNLI_HEADER = (
    "index promptID pairID genre sentence1_binary_parse sentence2_binary_parse sentence1_parse sentence2_parse "
    "sentence1 sentence2"
).split()
MRPC_HEADER = ["Quality", "#1 ID", "#2 ID", "#1 String", "#2 String"]
QQP_HEADER = ["id", "qid1", "qid2", "question1", "question2", "is_duplicate"]


def write(path, *rows, end="\n"):
    """Writes rows of cells as a tab-separated file, gzipped where its name says so."""
    path.parent.mkdir(parents=True, exist_ok=True)
    data = "".join("\t".join(map(str, row)) + end for row in rows).encode()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)


# ---- the table


def test_table():
    assert list(TASKS) == [*GLUE, "imdb"] == "cola sst2 mrpc stsb qqp mnli qnli rte wnli imdb".split()
    for name, task in TASKS.items():
        assert task.name == name and set(task.metrics) <= set(METRICS)
        assert len(task.labels) == {"stsb": 0, "mnli": 3}.get(name, 2)
        assert task.pair == (name not in ("cola", "sst2", "imdb"))


def test_score_is_the_mean_of_metrics_and_dev_sets():
    assert score(TASKS["rte"], {"dev": {"accuracy": 0.5, "loss": 9.0}}) == 50
    assert score(TASKS["mrpc"], {"dev": {"accuracy": 0.8, "f1": 0.9}}) == pytest.approx(85)
    assert score(TASKS["stsb"], {"dev": {"pearson": 0.25, "spearman": -0.75}}) == -25
    assert score(TASKS["mnli"], {"matched": {"accuracy": 0.5}, "mismatched": {"accuracy": 0.25}}) == 37.5


# ---- the real files


@pytest.mark.parametrize(
    "name, counts, labels, first, label",
    [
        ("cola", (8551, 1043), {0: 322, 1: 721}, "The sailors rode the breeze clear of the rocks.", 1),
        ("sst2", (67349, 872), {0: 428, 1: 444}, "it 's a charming and often affecting journey . ", 1),
        ("mrpc", (3668, 408), {0: 129, 1: 279}, "He said the foodservice pie business doesn 't fit the company 's", 1),
        ("stsb", (5749, 1500), None, "A man with a hard hat is dancing.", 5.0),
        ("rte", (2490, 277), {0: 146, 1: 131}, "Dana Reeve, the widow of the actor Christopher Reeve, has", 1),
        ("wnli", (635, 71), {0: 40, 1: 31}, "The drain is clogged with hair. It has to be cleaned.", 0),
    ],
)
def test_real_files(assets, name, counts, labels, first, label):
    train, dev = load(name, assets / "glue")
    assert (len(train), len(dev["dev"])) == counts and list(dev) == ["dev"]
    assert dev["dev"][0].first.startswith(first) and dev["dev"][0].label == label
    if labels:
        assert collections.Counter(example.label for example in dev["dev"]) == labels
        assert {example.label for example in train} == set(labels)
    else:
        assert {type(example.label) for example in train} == {float}
        assert {0.0, 5.0} <= {example.label for example in train}
    for example in train + dev["dev"]:
        assert example.first and (bool(example.second) == TASKS[name].pair)
        assert not {"\t", "\n", "\r"} & set(example.first + (example.second or ""))


def test_quotes_are_text(assets):
    _, dev = load("mrpc", assets / "glue" / "MRPC")  # the task's own folder does as well
    assert dev["dev"][0].second == '" The foodservice pie business does not fit our long-term growth strategy .'


def test_real_imdb(assets):
    train, dev = load("imdb", assets / "imdb")
    assert len(train) + len(dev["dev"]) == 25_000 and 2_300 < len(dev["dev"]) < 2_700
    assert collections.Counter(example.label for example in train + dev["dev"]) == {0: 12_500, 1: 12_500}
    assert train[0].first.startswith("Story of a man who has unnatural feelings for a pig.") and train[0].label == 0
    assert not any("<br" in example.first for example in train)
    assert any("\x85" in example.first for example in train)
    assert not {example.first for example in train} & {example.first for example in dev["dev"]}
    assert load("imdb", assets / "imdb" / "train.tsv.gz") == (train, dev)


# ---- official layouts


def test_qqp(tmp_path, capsys):
    """Two of its lines are the halves of a question with a line break; a question may be empty."""
    write(
        tmp_path / "QQP" / "train.tsv",
        QQP_HEADER,
        [133273, 213221, 213222, "How is the life of a math student?", 'Which level of "prep" is enough?', 0],
        [402555, 536040, 536041, "How do I control my emotions?", "How do you control"],
        ['"', "What is the evidence for his existence?", 0],
        [360472, 364011, 490273, "", "Can you \u2028 see?", 1],
    )
    write(tmp_path / "QQP" / "dev.tsv", QQP_HEADER, [1, 2, 3, "Why?", "How?", 0], end="\r\n")
    train, dev = load("qqp", tmp_path)
    assert train == [
        ("How is the life of a math student?", 'Which level of "prep" is enough?', 0),
        ("", "Can you \u2028 see?", 1),
    ]
    assert dev == {"dev": [Example("Why?", "How?", 0)]}
    assert capsys.readouterr().err == f"{tmp_path / 'QQP' / 'train.tsv'}: skipped 2 broken lines, kept 2\n"


def test_mnli(tmp_path):
    def row(i, first, second, *labels):
        return [i, f"{i}", f"{i}n", "fiction", "( a )", "( b )", "(ROOT a)", "(ROOT b)", first, second, *labels]

    write(
        tmp_path / "MNLI" / "train.tsv",
        [*MNLI_HEADER, "label1", "gold_label"],
        row(0, "Conceptually cream skimming", "Product and geography", "neutral", "neutral"),
        row(1, "you know", "You lose the things", "entailment", "entailment"),
        row(2, "Yes", "No", "contradiction", "contradiction"),
    )
    five = [*MNLI_HEADER, *(f"label{i}" for i in range(1, 6)), "gold_label"]
    votes = ["neutral", "neutral", "entailment", "entailment", "contradiction"]
    write(
        tmp_path / "MNLI" / "dev_matched.tsv", five, row(0, "a", "b", *votes, "-"), row(1, "c", "d", *votes, "neutral")
    )
    write(tmp_path / "MNLI" / "dev_mismatched.tsv.gz", five, row(0, "e", "f", *votes, "contradiction"))
    train, dev = load("mnli", tmp_path)
    assert [example.label for example in train] == [1, 0, 2]
    assert [TASKS["mnli"].labels[example.label] for example in train] == ["neutral", "entailment", "contradiction"]
    assert train[0][:2] == ("Conceptually cream skimming", "Product and geography")
    assert dev == {"matched": [("c", "d", 1)], "mismatched": [("e", "f", 2)]}


def test_qnli(tmp_path):
    header = ["index", "question", "sentence", "label"]
    write(tmp_path / "train.tsv", header, [0, "When did it start?", "It did not.", "not_entailment"])
    write(tmp_path / "dev.tsv", header, [0, "What came into force?", "A constitution.", "entailment"])
    train, dev = load("qnli", tmp_path)
    assert train == [("When did it start?", "It did not.", 1)]
    assert dev == {"dev": [("What came into force?", "A constitution.", 0)]}


def test_mrpc_as_microsoft_has_it(tmp_path):
    """A BOM, "\\r\\n", and quotes that nothing closes; GLUE's own files, where they are, come first."""
    files = [tmp_path / "MRPC" / f"msr_paraphrase_{part}.txt" for part in ("train", "test")]
    write(files[0], ["\ufeffQuality", *MRPC_HEADER[1:]], [1, 702876, 702977, 'the " witness "', '" Amrozi'], end="\r\n")
    write(files[1], ["\ufeffQuality", *MRPC_HEADER[1:]], [0, 1089874, 1089925, "PCCW 's", "Current Chief"], end="\r\n")
    train, dev = load("mrpc", tmp_path)
    assert train == [('the " witness "', '" Amrozi', 1)]
    assert dev == {"dev": [("PCCW 's", "Current Chief", 0)]}
    write(tmp_path / "MRPC" / "train.tsv", MRPC_HEADER, [0, 1, 2, "a", "b"])
    with pytest.raises(UserError, match="dev.tsv, plain or .gz"):  # Microsoft's train has GLUE's dev inside
        load("mrpc", tmp_path)
    write(tmp_path / "MRPC" / "dev.tsv", MRPC_HEADER, [1, 1, 2, "c", "d"])
    assert load("mrpc", tmp_path) == ([("a", "b", 0)], {"dev": [("c", "d", 1)]})


@pytest.fixture
def acl_imdb(tmp_path):
    for part in ("train", "test"):
        for side, stars in (("neg", 2), ("pos", 9), ("unsup", 0)):
            folder = tmp_path / "aclImdb" / part / side
            folder.mkdir(parents=True)
            for i in (10, 9):
                (folder / f"{i}_{stars}.txt").write_text(f"{part} {i}:<br /><br />it\u0085is {side}", encoding="utf-8")
        (tmp_path / "aclImdb" / part / "urls_pos.txt").write_text("http://www.imdb.com/title/tt0453418/usercomments\n")
    return tmp_path / "aclImdb"


@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("tail", ["", "\0", "\0\0", "{0}", "{0}{0} {0}", "{0}\0"])
@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_a_mark_at_the_start_and_nothing_at_the_end(tmp_path, end, tail, suffix):
    """A BOM, "\\r\\n", NUL bytes and blank last lines belong to no example, nor a missing last line end."""
    for name, header in (("CoLA", []), ("SST-2", [["sentence", "label"]])):
        rows = [["Good.", "1"], ["Bad.", "0"]] if header else [["gj04", "1", "", "Good."], ["gj04", "0", "*", "Bad."]]
        text = end.join("\t".join(row) for row in header + rows)
        for file, last in (("train.tsv", end), ("dev.tsv", "" if "{" not in tail else end)):
            data = ("\ufeff" + text + last + tail.format(end)).encode()
            path = tmp_path / name / (file + suffix)
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(gzip.compress(data) if suffix else data)
        train, dev = load({"CoLA": "cola", "SST-2": "sst2"}[name], tmp_path)
        assert train == dev["dev"] == [("Good.", None, 1), ("Bad.", None, 0)]


def test_acl_imdb(acl_imdb):
    train, dev = load("imdb", acl_imdb)
    assert train == [
        (f"train {i}:  it\u0085is {side}", None, y) for y, side in enumerate(("neg", "pos")) for i in (10, 9)
    ]
    assert [example.label for example in dev["dev"]] == [0, 0, 1, 1] and dev["dev"][0].first.startswith("test 10:  it")
    assert load("imdb", acl_imdb.parent) == (train, dev)


def test_imdb_tables(tmp_path):
    reviews = [[i % 2, f"review<br />{i}"] for i in range(200)]
    write(tmp_path / "train.tsv", ["label", "text"], *reviews, *reviews)
    train, dev = load("imdb", tmp_path)
    assert len(train) + len(dev["dev"]) == 400 and 20 <= len(dev["dev"]) <= 60
    assert not {example.first for example in train} & {example.first for example in dev["dev"]}
    write(tmp_path / "test.tsv.gz", ["text", "label"], ["Bad!", "neg"], ["Good!", "pos"])
    train, dev = load("imdb", tmp_path)
    assert len(train) == 400 and train[3] == ("review 3", None, 1)
    assert dev == {"dev": [("Bad!", None, 0), ("Good!", None, 1)]}


# ---- files that are wrong


def refusal(name, data):
    with pytest.raises(UserError) as error:
        load(name, data)
    message = str(error.value)
    assert "\n" not in message and message.count(": ") >= 1
    return message


@pytest.mark.parametrize(
    "name, text, message",
    [
        ("sst2", "", "train.tsv is empty"),
        ("sst2", "\n\n", "train.tsv has no column 'sentence'"),
        ("cola", "", "train.tsv is empty"),
        ("sst2", "sentence\tlabel\n", "train.tsv holds no examples"),
        ("sst2", "sentence\tgold\nbad\t0\n", "train.tsv has no column 'label'"),
        ("rte", "index\tsentence1\tlabel\n0\tA\tentailment\n", "train.tsv has no column 'sentence2'"),
        ("sst2", "sentence\tlabel\nbad\t0\n\nbad\t0\n", "train.tsv, line 3: 1 columns instead of 2"),
        ("sst2", "sentence\tlabel\nbad\t0\nbad 0\n", "train.tsv, line 3: 1 columns instead of 2"),
        ("sst2", "sentence\tlabel\nbad\t0\nvery\tbad\t0\n", "train.tsv, line 3: 3 columns instead of 2"),
        ("sst2", "sentence\tlabel\nbad\t2\n", "train.tsv, line 2: the label is '2', not 0 or 1"),
        ("cola", "gj04\t1\t\tGood.\ngj04\t*\t\tBad.\n", "train.tsv, line 2: the label is '*', not 0 or 1"),
        ("cola", "gj04\t1\t\tGood.\ngj04\t0\tBad.\n", "train.tsv, line 2: 3 columns instead of 4"),
        ("rte", "sentence1\tsentence2\tlabel\nA\tB\t1\n", "line 2: the label is '1', not entailment or not_entailment"),
        ("stsb", "sentence1\tsentence2\tscore\nA\tB\tmuch\n", "line 2: the score is 'much', not a number from 0 to 5"),
        ("stsb", "sentence1\tsentence2\tscore\nA\tB\t5\nA\tB\t5.1\n", "line 3: the score is '5.1', not a number"),
        ("stsb", "sentence1\tsentence2\tscore\nA\tB\t-1\n", "the score is '-1', not a number from 0 to 5"),
        ("stsb", "sentence1\tsentence2\tscore\nA\tB\tnan\n", "the score is 'nan', not a number from 0 to 5"),
        ("qqp", "\t".join(QQP_HEADER) + "\nbroken\n", "train.tsv holds no examples"),
        ("qqp", "\t".join(QQP_HEADER) + "\n1\t2\t3\ta\tb\tyes\n", "line 2: the is_duplicate is 'yes', not 0 or 1"),
        ("imdb", "label\ttext\n0\tBad.\n", "too few reviews to hold one in ten out"),
        ("imdb", "label\ttext\nunsup\tHm.\n", "train.tsv, line 2: the label is 'unsup', not neg or pos or 0 or 1"),
    ],
)
def test_refuses(tmp_path, name, text, message):
    (tmp_path / "train.tsv").write_bytes(text.encode())
    assert message in refusal(name, tmp_path) and str(tmp_path) in refusal(name, tmp_path)


def test_refuses_a_folder_without_files(tmp_path, acl_imdb):
    assert f"no {tmp_path / 'x' / 'train.tsv'}, plain or .gz" in refusal("cola", tmp_path / "x")
    assert f"no {tmp_path / 'x' / 'train.tsv'}, plain or .gz" in refusal("imdb", tmp_path / "x")
    write(tmp_path / "MNLI" / "train.tsv", ["sentence1", "sentence2", "gold_label"], ["a", "b", "neutral"])
    assert f"no {tmp_path / 'MNLI' / 'dev_matched.tsv'}, plain or .gz" in refusal("mnli", tmp_path)
    for path in (acl_imdb / "test" / "pos").iterdir():
        path.unlink()
    assert f"no reviews in {acl_imdb / 'test' / 'pos'}" in refusal("imdb", acl_imdb)


def test_refuses_what_is_not_utf8(tmp_path, acl_imdb):
    (tmp_path / "train.tsv").write_bytes(b"\xef\xbb\xbfsentence\tlabel\nbad\t0\ncaf\xe9\t1\nbad\t0\n")
    assert f"{tmp_path / 'train.tsv'}, line 3: not UTF-8" in refusal("sst2", tmp_path)
    (acl_imdb / "train" / "pos" / "10_9.txt").write_bytes(b"caf\xe9")
    assert f"{acl_imdb / 'train' / 'pos' / '10_9.txt'}, line 1: not UTF-8" in refusal("imdb", acl_imdb)


def test_refuses_a_damaged_gz(tmp_path):
    """Cut anywhere, or with any byte of its data or its checksum changed."""
    path = tmp_path / "train.tsv.gz"
    write(path, ["sentence", "label"], ["bad", 0], ["good", 1])
    whole = path.read_bytes()
    for n in range(len(whole)):
        path.write_bytes(whole[:n])
        assert f"{path} is {'cut short or no .gz' if n else 'empty'}" in refusal("sst2", tmp_path)
    for n in range(10, len(whole)):
        path.write_bytes(whole[:n] + bytes([whole[n] ^ 0x55]) + whole[n + 1 :])
        assert f"{path}" in refusal("sst2", tmp_path)
    path.write_bytes(b"sentence\tlabel\nbad\t0\n")
    assert f"{path} is cut short or no .gz" in refusal("sst2", tmp_path)
