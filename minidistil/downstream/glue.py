"""GLUE and IMDb from their official files: tasks, reading, score.

    GLUE    Wang et al. 2018, arXiv 1804.07461: nine tasks in tab-separated files
    IMDb    Maas et al. 2011: film reviews, one per file, or one per line of a tab-separated file

Quotes in these files are text, and only "\\n" or "\\r\\n" ends a line: IMDb's reviews contain U+0085, where
`str.splitlines` would split. Test sets without labels are not read.
"""

import dataclasses
import gzip
import hashlib
import pathlib
import statistics
import sys
import typing
import zlib

from minidistil.errors import UserError


class Example(typing.NamedTuple):
    """One or two texts and their label."""

    first: str
    second: str  # None in tasks on single texts
    label: int  # class id; STS-B: a float from 0 to 5


@dataclasses.dataclass(frozen=True)
class Task:
    """A task: its labels, metrics and file format."""

    name: str
    folder: str  # its official name
    labels: tuple  # names in the order of class ids; none: regression
    metrics: tuple  # names in metrics.METRICS
    texts: tuple  # columns of the first and second text, in lower case
    label: str = "label"  # column
    codes: dict = None  # label in the file -> class id, or None to skip the line; default: the names in `labels`
    header: tuple = None  # columns of files that have no header line
    dev: tuple = (("dev", "dev.tsv"),)  # split, file

    @property
    def pair(self):
        """Whether an example has two texts."""
        return len(self.texts) == 2


ENTAILMENT = ("entailment", "not_entailment")
NUMBERS = {"0": 0, "1": 1}
NLI = {"entailment": 0, "neutral": 1, "contradiction": 2, "-": None}  # "-": the annotators did not agree
MNLI_DEV = (("matched", "dev_matched.tsv"), ("mismatched", "dev_mismatched.tsv"))
SENTENCES = ("sentence1", "sentence2")

TASKS = {task.name: task for task in [
    Task("cola", "CoLA", ("unacceptable", "acceptable"), ("matthews",), ("sentence",), codes=NUMBERS,
         header=("source", "label", "star", "sentence")),
    Task("sst2", "SST-2", ("negative", "positive"), ("accuracy",), ("sentence",), codes=NUMBERS),
    Task("mrpc", "MRPC", ("not_equivalent", "equivalent"), ("accuracy", "f1"), ("#1 string", "#2 string"), "quality",
         codes=NUMBERS),
    Task("stsb", "STS-B", (), ("pearson", "spearman"), SENTENCES, "score"),
    Task("qqp", "QQP", ("not_duplicate", "duplicate"), ("accuracy", "f1"), ("question1", "question2"), "is_duplicate",
         codes=NUMBERS),
    Task("mnli", "MNLI", tuple(NLI)[:3], ("accuracy",), SENTENCES, "gold_label", codes=NLI, dev=MNLI_DEV),
    Task("qnli", "QNLI", ENTAILMENT, ("accuracy",), ("question", "sentence")),
    Task("rte", "RTE", ENTAILMENT, ("accuracy",), SENTENCES),
    Task("wnli", "WNLI", ("not_entailment", "entailment"), ("accuracy",), SENTENCES, codes=NUMBERS),
    Task("imdb", "aclImdb", ("neg", "pos"), ("accuracy",), ("text",), codes={"neg": 0, "pos": 1, **NUMBERS}),
]}  # fmt: skip
GLUE = list(TASKS)[:9]  # without IMDb and whatever follows it

# Microsoft's original MRPC files, accepted in place of GLUE's; their test set has labels
MSR = {"train": "msr_paraphrase_train.txt", "dev": "msr_paraphrase_test.txt"}


def load(name, data):
    """Returns (train, {split: dev}), lists of Examples, of one task; MNLI's splits are matched and mismatched.

    `data` is the task's folder or its parent; any file may be a .gz. For IMDb it is aclImdb, a folder with train.tsv
    and optionally test.tsv, or one such file. Raises UserError with file and line.
    """
    task, data = TASKS[name], pathlib.Path(data)
    folder = data / task.folder if (data / task.folder).is_dir() else data
    if name == "imdb":
        return _load_imdb(task, folder)
    files = {"train": "train.tsv", **dict(task.dev)}
    if name == "mrpc" and not _exists(folder, files["train"]) and _exists(folder, MSR["train"]):
        files = MSR
    splits = {split: _read(task, _find(task, folder, file)) for split, file in files.items()}
    return splits.pop("train"), splits


def score(task, metrics):
    """Returns a task's score as on the GLUE leaderboard, percent: the mean over `metrics`, {split: {metric: share}}."""
    return 100 * statistics.fmean(shares[name] for shares in metrics.values() for name in task.metrics)


def _load_imdb(task, path):
    """`load` for IMDb; without a test set one review in ten is held out."""
    if (path / "train" / "pos").is_dir():
        return _read_reviews(task, path / "train"), {"dev": _read_reviews(task, path / "test")}
    train = _without_breaks(_read(task, path if path.is_file() else _find(task, path, "train.tsv")))
    if _exists(path, "test.tsv"):
        return train, {"dev": _without_breaks(_read(task, _find(task, path, "test.tsv")))}
    sides = [], []
    for example in train:  # by its hash, so that copies of a text are on the same side
        digest = hashlib.sha256(example.first.encode()).digest()
        sides[int.from_bytes(digest, "big") % 10 == 0].append(example)
    if not all(sides):
        raise UserError(f"{path} has too few reviews to hold one in ten out: add a test.tsv")
    return sides[0], {"dev": sides[1]}


def _read_reviews(task, folder):
    """Returns the reviews of a folder with neg/*.txt and pos/*.txt, sorted by file name."""
    examples = []
    for label, side in enumerate(task.labels):
        paths = sorted((folder / side).glob("*.txt"))
        if not paths:
            raise UserError(f"no reviews in {folder / side}: give an {task.folder} folder with train and test")
        examples += [Example("\n".join(line for _, line in lines(path)), None, label) for path in paths]
    return _without_breaks(examples)


def _without_breaks(examples):
    """Returns the examples with a space for each HTML line break."""
    return [example._replace(first=example.first.replace("<br />", " ")) for example in examples]


def _exists(folder, name):
    """Whether a folder has this file, plain or as .gz."""
    return (folder / name).is_file() or (folder / f"{name}.gz").is_file()


def _find(task, folder, name):
    """Returns the path of this file in a folder, plain or as .gz."""
    if not _exists(folder, name):
        raise UserError(f"no {folder / name}, plain or .gz: give the folder with {task.folder}'s files, or its parent")
    return folder / name if (folder / name).is_file() else folder / f"{name}.gz"


def lines(path):
    """Yields (number, text) of each line of a file, without its end, nor blank lines and NUL bytes at the end."""
    number, blank = 0, []
    try:
        with gzip.open(path) if path.suffix == ".gz" else open(path, "rb") as file:
            for number, line in enumerate(file, start=1):  # lines of bytes end at b"\n" only
                text = line.decode("utf-8-sig" if number == 1 else "utf-8")
                text = text.removesuffix("\n").removesuffix("\r") if text.endswith("\n") else text.rstrip("\0")
                blank.append((number, text))
                if text.strip(" ") or number == 1:
                    yield from blank
                    blank = []
    except (EOFError, gzip.BadGzipFile, zlib.error):
        raise UserError(f"{path} is cut short or no .gz: copy or download it again") from None
    except UnicodeDecodeError:
        raise UserError(f"{path}, line {number}: not UTF-8: save it as UTF-8, or copy or download it again") from None
    if not number:
        raise UserError(f"{path} is empty: copy or download it again")


def _read(task, path):
    """Returns the Examples in a tab-separated file."""
    numbered = lines(path)
    header = task.header or next(numbered)[1].casefold().split("\t")
    for name in (*task.texts, task.label):
        if name not in header:
            raise UserError(f"{path} has no column {name!r}: give the official file of {task.folder}")
    texts, label = [header.index(name) for name in task.texts], header.index(task.label)
    codes = task.codes or {name: i for i, name in enumerate(task.labels)}
    examples, broken = [], 0
    for number, line in numbered:
        cells = line.split("\t")
        if len(cells) != len(header):
            if task.name != "qqp":
                raise _fault(path, number, f"{len(cells)} columns instead of {len(header)}")
            broken += 1  # in the official file some questions contain a line break
            continue
        try:
            value = codes[cells[label]] if task.labels else float(cells[label])
            if not task.labels and not 0 <= value <= 5:
                raise ValueError
        except (KeyError, ValueError):
            wanted = " or ".join(codes) or "a number from 0 to 5"
            raise _fault(path, number, f"the {task.label} is {cells[label][:40]!r}, not {wanted}") from None
        if value is not None:
            first, second = cells[texts[0]], cells[texts[1]] if task.pair else None
            examples.append(Example(first, second, value))
    if broken:
        print(f"{path}: skipped {broken} broken lines, kept {len(examples):,}", file=sys.stderr)
    if not examples:
        raise UserError(f"{path} holds no examples: copy or download it again")
    return examples


def _fault(path, line, fault):
    return UserError(f"{path}, line {line}: {fault}: copy or download the file again")
