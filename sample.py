"""Fills in [MASK], or continues a text: the likeliest words of teacher and student, side by side.

    python sample.py                                            the newest run and its teacher, on a default prompt
    python sample.py "Paris is the [MASK] of France."           any sentence, with one [MASK] or several
    python sample.py "I [MASK] it." --model DIR --teacher bert-base-uncased --temperature 2 -k 10
    python sample.py "Once upon a time" --model DIR             a GPT-2: the next word, and how the text goes on

Probabilities are softmax(logits / temperature) over the whole vocabulary; temperature 0 is the limit, in which the
likeliest word has probability 1. Several blanks are predicted independently, each with all others left blank; the
sentence below the tables is filled greedily from left to right, so each blank sees the words before it. [MASK] stands
for the blank of any model, which a RoBERTa writes <mask>. With --json, stdout is one line; for several blanks "student"
holds one such list per blank:

    {"prompt", "predictions": {"student": [[token, probability], ...], "teacher": the same, or null without one}}

For a causal model it is one such list, of the next token, and "continuations": {"student": text, "teacher": ...} too.
"""

import dataclasses
import json
import math
import pathlib
import shutil
import sys
import textwrap
import unicodedata

import torch

from minidistil import hub, weights
from minidistil.checks import check_predicts, check_seeds, check_vocabulary, score_words
from minidistil.cli import option, parse_args, run_script
from minidistil.errors import UserError
from minidistil.generate import continuation
from minidistil.model import num_params
from minidistil.tokenizer import Tokenizer
from minidistil.tokenizers.wordpiece_files import SPECIAL_TOKENS

PROMPT = "Returns the [MASK] of the elements along the given axis."
CAUSAL_PROMPT = "Returns the"
BLANK = SPECIAL_TOKENS["mask"]
EIGHTHS, HASHES = " ▏▎▍▌▋▊▉█", " #"  # characters of the bars, from an empty cell to a full one


@dataclasses.dataclass
class Settings:
    prompt: str = option(
        dataclasses.MISSING, f"a sentence with [MASK] in it, or a beginning for a GPT-2 (default: {PROMPT})", nargs="?"
    )
    model: str = option(None, "student: folder or name (default: the newest model in runs/)")
    teacher: str = option(None, "folder, name or none (default: the teacher in the model's run.json)")
    k: int = option(20, "words to show for each blank", short="-k")
    temperature: float = option(1.0, "above 1 raises the unlikely words, below 1 lowers them; 0: the likeliest alone")
    tokens: int = option(None, "of a GPT-2: length of the continuation (default: 40)")
    top_k: int = option(None, "of a GPT-2: draw the continuation from so many likeliest words, 0: all (default: 40)")
    seed: int = option(None, "of a GPT-2: what the continuation is drawn with (default: 0)")
    json: bool = option(False, "print one line of JSON and nothing else")


def newest_run():
    """Returns the folder in runs/ with the newest model."""
    written = pathlib.Path("runs").glob("*/model.safetensors")
    files = [path for path in written if path.with_name("config.json").is_file()]
    if not files:
        raise UserError("there is no model in runs/: train one with `python train.py`, or name one with --model")
    return max(files, key=lambda path: path.stat().st_mtime_ns).parent


def teacher_of(student):
    """Returns the folder of the teacher that run.json names; None, with a note on stderr, where it cannot be found."""
    try:
        name = json.loads((student / "run.json").read_text(encoding="utf-8"))["settings"]["teacher"]
        teacher = None if name == "none" else hub.resolve(name)
        if teacher and not weights.has_head(teacher):  # UserError where there are no weights
            raise UserError(f"its teacher, {teacher}, predicts no words")
        return teacher
    except UserError as error:
        print(f"sample.py: showing the student alone: {error}", file=sys.stderr)
    except (OSError, ValueError, LookupError, TypeError):  # not a folder that train.py wrote
        return None


def find_folders(settings):
    """Returns {"teacher": folder, "student": folder}, in the order of the columns; the teacher may be missing."""
    student = newest_run() if settings.model is None else hub.resolve(settings.model)
    if settings.teacher == "none":
        return {"student": student}
    teacher = teacher_of(student) if settings.teacher is None else hub.resolve(settings.teacher)
    return {"teacher": teacher, "student": student} if teacher else {"student": student}


OF_CAUSAL = {"tokens": 40, "top_k": 40, "seed": 0}  # settings of a causal model, and their default values


def completed(settings, causal):
    """Returns the settings with the default values that depend on the kind of model; UserError for what it has not."""
    prompt = settings.prompt
    if prompt is None:
        prompt = CAUSAL_PROMPT if causal else PROMPT
    given = {name: getattr(settings, name) for name in OF_CAUSAL if getattr(settings, name) is not None}
    if causal:
        for name, value in given.items():
            if value < 0:
                raise UserError(f"--{name.replace('_', '-')} is {value}: it must be 0 or more")
        check_seeds(given.get("seed", 0))
        if BLANK in prompt:
            raise UserError("the model is a GPT-2, which continues a text and fills in no [MASK]: leave it out")
        return dataclasses.replace(settings, prompt=prompt, **OF_CAUSAL | given)
    for name in given:
        raise UserError(f"--{name.replace('_', '-')} is for a GPT-2, which continues a text: leave it out")
    return dataclasses.replace(settings, prompt=prompt)


def check(settings):
    """Raises UserError for a command line that cannot work, before anything is read."""
    if settings.k < 1:
        raise UserError(f"-k is {settings.k}: it must be at least 1")
    if not 0 <= settings.temperature < math.inf:
        raise UserError(f"--temperature is {settings.temperature}: it must be 0 or more")


def check_blanks(prompt, mask):
    """Raises UserError for a prompt without the blank `mask`."""
    if mask not in prompt:
        how = "in capitals" if BLANK in prompt.upper() else "where a word is missing"
        raise UserError(f"the prompt has no [MASK]: write [MASK] {how}")


def check_fit(settings, role, config, tokenizer, ids):
    """Raises UserError for a model that does not fit the prompt's ids or -k."""
    V = len(tokenizer.vocab)
    if settings.k > V:
        raise UserError(f"-k is {settings.k}, but the vocabulary has {V} words: use -k {V} or less")
    if len(ids) > config.positions:
        raise UserError(f"the prompt is {len(ids)} tokens long, the {role} reads {config.positions}: shorten it")


@torch.no_grad()
def predict(model, ids, positions):
    """Returns the logits (N, V), fp64, of every word at N positions of a sequence of ids (a list)."""
    return model.logits(model(torch.tensor([ids]))[0, positions]).double()


def likeliest(logits, k, temperature, name):
    """Returns the k likeliest [name(id), probability] of each row of logits (N, V); ties share temperature 0."""
    values, indices = logits.topk(k)  # (N, k)
    below = logits - values[:, :1]  # the maximum is subtracted first, so that no temperature overflows
    shares = torch.softmax(below / temperature, -1) if temperature else (below == 0) / (below == 0).sum(-1, True)
    rows = zip(shares.gather(-1, indices).tolist(), indices.tolist(), strict=True)
    return [[[name(i), p] for p, i in zip(*row, strict=True)] for row in rows]


def fill(model, ids, positions, prompt, tokenizer):
    """Returns the prompt, its blanks filled greedily from left to right."""
    ids, (text, *rest) = list(ids), prompt.split(tokenizer.special["mask"])
    for position, after in zip(positions, rest, strict=True):
        ids[position] = predict(model, ids, [position]).argmax().item()
        text = tokenizer.appended(text, ids[position]) + after
    return text


def go_on(model, ids, settings, tokenizer):
    """Returns the prompt and its continuation by a causal model."""
    new = continuation(
        model, ids, settings.tokens, settings.temperature, settings.top_k, settings.seed, end=tokenizer.sep_id
    )
    prompt = ids[1:]  # decoded with the new ones: whether a space follows it is up to them
    return settings.prompt + tokenizer.decode(prompt + new)[len(tokenizer.decode(prompt)) :]


def bar(share, width, blocks):
    """Returns a bar of `share` of `width` cells, padded; `blocks` are its characters from empty to full."""
    full, part = divmod(round(share * width * (len(blocks) - 1)), len(blocks) - 1)
    return (blocks[-1] * full + blocks[part]).ljust(width)[:width]


def columns_of(text):
    """Returns the number of terminal columns of a text; East Asian wide characters take two."""
    return len(text) + sum(unicodedata.east_asian_width(c) in "WF" for c in text)


def table(guesses, width, blocks):
    """Returns the lines for one blank; guesses: {model: [[token, probability], ...]}; all bars have one scale."""
    rows = list(zip(*guesses.values(), strict=True))
    longest = max(columns_of(token) for row in rows for token, _ in row)
    most = max(p for row in rows for _, p in row)
    margin = len(str(len(rows))) + 2
    room = max(1, (width - margin + 3) // len(guesses) - 3 - longest - 10)  # for a bar; 3 between columns, 10 a number
    lines = [" " * margin + "   ".join(role.ljust(longest + 10 + room) for role in guesses)]
    for rank, row in enumerate(rows, 1):
        cells = []
        for token, p in row:
            gap = " " * (longest - columns_of(token))
            cells.append(f"{token}{gap} {p:8.2%} {bar(p / most, room, blocks)}")
        same = len(row) == 2 and row[0][0] == row[1][0]
        lines.append(f"{rank:{margin - 2}}  " + (" = " if same else "   ").join(cells))
    return "\n".join(line.rstrip() for line in lines)


def show(settings, folders, models, blanks, sentences):
    """Prints the models, a table for each blank, and the filled sentences."""
    sys.stdout.reconfigure(errors="replace")  # a vocabulary may hold characters that the terminal cannot show
    try:
        EIGHTHS.encode(sys.stdout.encoding)
        blocks = EIGHTHS
    except UnicodeEncodeError:
        blocks = HASHES
    print(settings.prompt + (f"   (temperature {settings.temperature:g})" if settings.temperature != 1 else ""))
    for role, folder in folders.items():
        config = models[role].config
        print(f"{role}: {folder}, {config.layers} layers x {config.width}, {num_params(config):,} parameters")
    for i, guesses in enumerate(blanks, 1):
        print(f"\n[MASK] {i} of {len(blanks)}, the others left blank" if len(blanks) > 1 else "")
        print(table(guesses, shutil.get_terminal_size().columns, blocks))
    print("\nfilled from left to right, each blank seeing the words before it" if len(blanks) > 1 else "")
    for role, sentence in sentences.items():
        lines = f"{role}: {sentence}".split("\n")
        width = shutil.get_terminal_size().columns
        print("\n".join(textwrap.fill(line, width, drop_whitespace=False) for line in lines))
    if "teacher" in models:
        agreed = sum(guesses["teacher"][0][0] == guesses["student"][0][0] for guesses in blanks)
        print(f"same first guess in {agreed} of {len(blanks)}   (= marks the same word at the same rank)")


def main(argv):
    settings = Settings(**parse_args(Settings, argv, __doc__))
    check(settings)
    folders = find_folders(settings)
    tokenizers = {role: Tokenizer.load(folder) for role, folder in folders.items()}
    tokenizer = tokenizers["student"]
    if any(other.digest != tokenizer.digest for other in tokenizers.values()):
        raise UserError("student and teacher have different vocabularies: name its own teacher, or use --teacher none")
    configs = {role: weights.read_config(folder) for role, folder in folders.items()}
    check_predicts(configs.get("teacher"), configs["student"])
    causal = configs["student"].causal
    settings = completed(settings, causal)
    if causal:
        ids = [tokenizer.sep_id, *tokenizer.encode(settings.prompt)]  # the beginning of a document
        positions = [len(ids) - 1]  # whose next token is the one blank
    else:
        check_vocabulary("student", configs["student"], tokenizer, say=lambda line: None)  # it has a blank
        mask = tokenizer.special["mask"]
        settings.prompt = settings.prompt.replace(BLANK, mask)
        check_blanks(settings.prompt, mask)
        ids = tokenizer.encode_prompt(settings.prompt)
        positions = [i for i, token in enumerate(ids) if token == tokenizer.mask_id]
    name = tokenizer.vocab.__getitem__ if settings.json else tokenizer.shown
    models, predictions, sentences = {}, {}, {}
    for role, folder in folders.items():
        models[role] = weights.load_model(folder)
        score_words(role, models[role], tokenizer, lambda line: print(f"sample.py: {line}", file=sys.stderr))
        check_fit(settings, role, models[role].config, tokenizer, ids)
        logits = predict(models[role], ids, positions)
        predictions[role] = likeliest(logits, settings.k, settings.temperature, name)
        if causal:
            sentences[role] = go_on(models[role], ids, settings, tokenizer)
        elif not settings.json:
            sentences[role] = fill(models[role], ids, positions, settings.prompt, tokenizer)

    if settings.json:
        lists = {role: predictions.get(role) for role in ("student", "teacher")}
        if len(positions) == 1:
            lists = {role: each and each[0] for role, each in lists.items()}
        result = {"prompt": settings.prompt, "predictions": lists}
        if causal:
            result["continuations"] = {role: sentences.get(role) for role in ("student", "teacher")}
        print(json.dumps(result, separators=(",", ":")))
    else:
        blanks = [dict(zip(predictions, row, strict=True)) for row in zip(*predictions.values(), strict=True)]
        show(settings, folders, models, blanks, sentences)


if __name__ == "__main__":
    run_script(main)
