"""The model card of a run of train.py: README.md in the form of the Hugging Face Hub, made from the run's run.json.

The YAML head is huggingface_hub's. Local paths stay out of a card: what is not on the Hub has no name there. The last
line of a card holds the SHA-256 of the others, so that a card which somebody has edited is known, and kept.
Source: https://huggingface.co/docs/hub/model-cards
"""

import hashlib
import json
import pathlib
import re
import sys

from minidistil import files, hub
from minidistil.energy import describe

COLUMNS = {  # held-out metric -> its heading and form
    "mlm_loss": ("masked-LM loss, nats", "{:.3f}"), "clm_loss": ("loss of the next token, nats", "{:.3f}"),
    "perplexity": ("perplexity", "{:.4g}"), "top1": ("top-1", "{:.1%}"), "kl": ("KL to the teacher", "{:.3f}"),
    "agreement": ("agrees with the teacher", "{:.1%}"), "emb": ("squared distance to the teacher's vectors", "{:.4f}"),
}  # fmt: skip
TERMS = {  # setting -> what it weighs
    "alpha_ce": "tau^2 KL of the student's distribution from the teacher's, both softened with tau = {temperature:g}",
    "alpha_mlm": "cross-entropy of {labels}", "alpha_cos": "1 - cosine between last hidden states",
    "alpha_mse": "squared difference of logits", "alpha_emb": "squared distance of sentence vectors of length 1",
}  # fmt: skip
LICENCE = (
    "# license:  # yours to choose, since it follows from the base model's and the data's:\n"
    "#           # https://huggingface.co/docs/hub/repositories-licenses\n"
)
SEAL = "\n<!-- written by minidistil, and rewritten while the text above has the SHA-256 {} -->\n"


# ---- any card


def head(**values):
    """Returns the YAML head of a card, of huggingface_hub's ModelCardData; what is None or empty is left out."""
    from huggingface_hub import ModelCardData  # imported when a card is written, not before

    data = ModelCardData(**{name: value for name, value in values.items() if value})
    return f"---\n{LICENCE}{data.to_yaml()}\n---\n"


def title_of(folder):
    """Returns the name of a folder, of whatever bytes, as one line of valid text."""
    return " ".join(pathlib.Path(folder).resolve().name.encode("utf-8", "backslashreplace").decode().split())


def plain(text):
    """Returns text as Markdown that shows it."""
    return re.sub(r"([\\`*_{}\[\]<>#|~])", r"\\\1", text)


def table(rows):
    """Returns rows of cells, the first one the headings, as a table in Markdown."""
    rows = [rows[0], ["---"] * len(rows[0]), *rows[1:]]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def code(language, *lines):
    return "\n".join([f"```{language}", *lines, "```"])


def of_energy(record, runs=1, tasks=1):
    """Returns the section about a `record` of energy, or nothing; of so many training runs of so many tasks."""
    of = f"Of {runs} training runs on {tasks} task{'s' * (tasks > 1)} together: " if runs > 1 else ""
    return ["## Energy", f"{of}{describe(record)}."] if record else []


def sealed(text):
    return text + SEAL.format(hashlib.sha256(text.encode()).hexdigest())


def write_card(folder, text):
    """Writes the card of a folder; one that somebody has edited stays, and the new one is README.new.md beside it."""
    path = pathlib.Path(folder) / "README.md"
    if text is None:
        print(f"{path} is not written, for want of huggingface_hub: pip install huggingface_hub", file=sys.stderr)
        return
    if path.exists():
        found = path.read_bytes().decode(errors="replace")
        if found != sealed(found.rpartition(SEAL[:5])[0]):
            new = path.with_name("README.new.md")
            print(f"{path} was edited and is kept; the card of this run is {new.name} beside it", flush=True)
            path = new
    files.write_text(path, sealed(text))


# ---- the card of train.py


def card(folder):
    """Returns the card of a run of train.py from the run.json in its folder; None without huggingface_hub."""
    folder = pathlib.Path(folder)
    run = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    settings, student, teacher = run["settings"], run["summary"]["student"], run["summary"]["teacher"]
    causal, vectors, words = "perplexity" in student, "emb" in student, "top1" in student
    base = _base(settings)
    sources = [_source(source) for source in run["data"]["sources"]]
    languages = {language for _, _, language in sources}
    kind = "sentence encoder" if vectors else "causal language model" if causal else "masked language model"
    try:
        top = head(
            base_model=base, base_model_relation=base and "finetune",
            library_name="sentence-transformers" if vectors else "transformers",
            pipeline_tag="sentence-similarity" if vectors else "text-generation" if causal else "fill-mask",
            datasets=sorted({dataset for dataset, _, _ in sources if dataset}),
            language=None if None in languages else sorted(languages), metrics=["perplexity"] if causal else None,
            tags=["minidistil", *["distillation"] * bool(teacher), *["feature-extraction"] * vectors],
        )  # fmt: skip
    except ImportError:
        return None
    drawn = ["![curves of the training loss and the held-out metrics](curve.svg)"] * (folder / "curve.svg").is_file()
    return top + "\n" + "\n\n".join([
        f"# {plain(title_of(folder))}", f"{_what(kind, settings, student, teacher)} {_length(run)}",
        "## Training", _data(run, sources), _objective(settings, causal), _settings(run),
        "## Held-out text", _held_out(run), *drawn,
        "## How to load it", *_loading(causal, vectors, words),
        *of_energy(run["energy"]),
    ]) + "\n"  # fmt: skip


def _base(settings):
    """Returns the Hub's name of the model whose weights the student began with, or None."""
    if settings["student_init"] not in (None, "teacher", "random"):
        return hub.published_name(settings["student_init"])
    return None if settings["student_config"] or settings["student_init"] == "random" else _teacher(settings)


def _teacher(settings):
    return None if settings["teacher"] in ("demo", "none") else hub.published_name(settings["teacher"])


def _what(kind, settings, student, teacher):
    size = f"A {kind} with {student['parameters']:,} parameters"
    if not teacher:
        return f"{size}, trained with minidistil, without a teacher."
    name, share = _teacher(settings), student["parameters"] / teacher["parameters"]
    whose = f"[{name}](https://huggingface.co/{name})" if name else "a model that is not on the Hub"
    whose = "minidistil's demo" if settings["teacher"] == "demo" else whose
    size += f", {share:.0%} of its teacher's {teacher['parameters']:,}"
    return f"{size}, distilled with minidistil. The teacher is {whose}."


def _length(run):
    summary = run["summary"]
    took = f"It was trained for {summary['steps']:,} updates, {summary['tokens']:,} tokens, in {summary['seconds']:,} s"
    if run["ended_by"] == "completion":
        return f"{took}."
    return f"{took}; {run['planned_steps']:,} updates were planned, but a {run['ended_by']} ended the run before."


def _source(source):
    """Returns (data set on the Hub or None, description without a local path, language or None) of a source of text."""
    if source in ("docstrings", "docs"):  # "docs" in corpora that were prepared before November 2026
        return None, "documentation strings of installed Python packages", "en"
    if source.startswith("wikipedia:"):
        wiki = re.match(r"([a-z]{2,3})wiki-", pathlib.Path(source.removeprefix("wikipedia:")).name)
        return None, f"a dump of Wikipedia{f' ({wiki[1]})' if wiki else ''}", wiki and wiki[1]
    if source.startswith("hf:"):
        name = source.removeprefix("hf:").split(":")[0]
        if re.fullmatch(hub.NAME, name, re.ASCII) and not pathlib.Path(name).exists():
            return name, f"[{name}](https://huggingface.co/datasets/{name})", None
    return None, "local files", None


def _data(run, sources):
    data = run["data"]
    unit = "sentences" if "sentences" in data else "documents"
    named = ", ".join(dict.fromkeys(description for _, description, _ in sources))
    n = data["documents"]
    text = f"Text: {n['train']:,} {unit}, {data['tokens']['train']:,} tokens ({named}); "
    text += f"{n['val']:,} {unit}, {data['tokens']['val']:,} tokens, were held out."
    return text + (" The held-out metrics are on another corpus." if run["settings"]["eval_data"] else "")


def _objective(settings, causal):
    labels = "the next tokens" if causal else "the masked tokens"
    names = ["alpha_mlm"] if settings["teacher"] == "none" else TERMS
    terms = [[f"{settings[name]:g}", TERMS[name].format(labels=labels, **settings)] for name in names if settings[name]]
    return "The objective is the sum of these means over an update:\n\n" + table([["weight", "term"], *terms])


def _settings(run):
    settings, steps = run["settings"], run["planned_steps"]
    G = run["identity"]["sequences in an update"]
    text = f"An update has {G:,} sequences of at most {settings['seq_len']} tokens. AdamW, learning rate up to "
    text += f"{settings['lr']:g}, which rises for {settings['warmup']:.0%} of {steps:,} updates and then falls linearly"
    text += f"; gradients clipped at {settings['clip']:g}, matrix products in {run['dtype']}, seed {settings['seed']}."
    return text


def _held_out(run):
    student, teacher = run["summary"]["student"], run["summary"]["teacher"]
    after = f"after {run['evaluated_after']:,} updates"
    rows = {"before training": run["before"], after: student, "teacher": teacher}
    shown = [name for name in COLUMNS if name in student]
    cells = [[who, *(COLUMNS[name][1].format(row[name]) if name in row else "" for name in shown)]
             for who, row in rows.items() if row and row.keys() & set(shown)]  # fmt: skip
    return table([["", *(COLUMNS[name][0] for name in shown)], *cells])


def _loading(causal, vectors, words):
    """Returns the parts of a card that say how to load the model; the code runs in its folder."""
    here = '"."  # this folder; elsewhere its path, or its name on the Hub'
    if vectors:
        yield code("python", "from sentence_transformers import SentenceTransformer", "",
                   f"model = SentenceTransformer({here.replace('  #', ')  #')}",
                   'vectors = model.encode(["One sentence.", "Another one."])',
                   "print(model.similarity(vectors, vectors))")  # fmt: skip
        use = "python train.py --teacher USER/NAME --student-layers 2 --data SENTENCES --alpha-ce 0 --alpha-mlm 0 "
        use += "--alpha-emb 1"
    elif causal:
        yield code("python", "from transformers import pipeline", "", f"folder = {here}",
                   'generate = pipeline("text-generation", model=folder)',
                   'print(generate("Returns the", max_new_tokens=20))')  # fmt: skip
    else:
        yield code("python", "from transformers import pipeline", "", f"folder = {here}",
                   'fill = pipeline("fill-mask", model=folder)',
                   'print(fill(f"Returns the {fill.tokenizer.mask_token} of the elements."))')  # fmt: skip
    if words:
        use = f'python sample.py "Returns the{"" if causal else " [MASK] of the elements."}" --model USER/NAME'
    yield "With minidistil, from its checkout:"
    yield code("", use)
