"""The model card of a task that finetune.py has learnt, made from scores.json; see minidistil/card.py."""

import json
import pathlib

from minidistil import files, hub
from minidistil.card import code, head, of_energy, plain, table, title_of, write_card
from minidistil.downstream.glue import GLUE, TASKS
from minidistil.downstream.grid import summarise
from minidistil.energy import describe
from minidistil.pooling import read_pooling

# our metric -> the Hub's name of it, and by how much ours is divided; a metric of one of several splits ends in _SPLIT
METRICS = {
    "accuracy": ("accuracy", 100), "f1": ("f1", 100), "matthews": ("matthews_correlation", 100),
    "pearson": ("pearsonr", 100), "spearman": ("spearmanr", 100), "em": ("exact_match", 1),
}  # fmt: skip


def data_set(task, data):
    """Returns the Hub's (name, title, configuration, split) of a task whose data are at `data`; None where unknown."""
    if task in GLUE:
        return "nyu-mll/glue", f"GLUE {task}", task, "validation"
    if task == "imdb":  # without its test set a tenth of the training set is held out
        return "stanfordnlp/imdb", "IMDb", "plain_text", None
    if task == "squad" and pathlib.Path(data).is_dir():  # a single file may hold any questions in the same form
        return "rajpurkar/squad", "SQuAD v1.1", "plain_text", "validation"
    return None


def results(task, metrics, known):
    """Returns the EvalResults of {metric: percent} on a data set of `data_set`."""
    from huggingface_hub import EvalResult

    name, title, config, split = known
    found = []
    for metric, value in metrics.items():
        ours, _, part = metric.partition("_")
        if ours in METRICS:
            hubs, scale = METRICS[ours] if task != "squad" else (METRICS[ours][0], 1)
            found.append(EvalResult(
                task_type="question-answering" if task == "squad" else "text-classification", dataset_type=name,
                dataset_name=title, dataset_config=config, dataset_split=f"{split}_{part}" if part else split,
                metric_type=hubs, metric_value=round(value / scale, 6), metric_name=metric,
            ))  # fmt: skip
    return found


def card(folder):
    """Returns the card of a task's folder from the scores.json beside it; None without huggingface_hub."""
    folder = pathlib.Path(folder)
    task, state = folder.name, json.loads((folder.parent / "scores.json").read_text(encoding="utf-8"))
    settings, runs = state.get("tasks", {}).get(task, state["settings"]), state["runs"][task]
    kept = max(runs, key=lambda run: run["epochs"][-1]["score"])
    metrics = {name: value for name, value in kept["epochs"][-1].items() if name != "score"}
    own = "columns" in state  # a table of one's own, whatever its name
    known = None if own else data_set(task, settings["data"])
    pair = len(state["columns"]["texts"]) == 2 if own else task in TASKS and TASKS[task].pair
    bilstm, squad, vectors = settings["model"] == "bilstm", task == "squad" and not own, settings.get("vectors")
    prompt = read_pooling(folder).prompt if vectors else None
    base = None if bilstm else hub.published_name(settings["model"])
    library = None if bilstm else "sentence-transformers" if vectors else "transformers"
    name = f"{title_of(folder.resolve().parent)}-{task}"
    try:
        found = results(task, metrics, known) if known else []
        top = head(
            base_model=base, base_model_relation=base and "finetune", library_name=library,
            pipeline_tag="question-answering" if squad else "text-classification",
            datasets=[known[0]] if known else None, language="en" if known else None,
            metrics=sorted({result.metric_type for result in found}),
            tags=["minidistil", *["distillation"] * bool(settings["teacher"])],
            **({"model_name": name, "eval_results": found} if found else {}),
        )  # fmt: skip
    except ImportError:
        return None
    return top + "\n" + "\n\n".join([
        f"# {plain(name)}", _what(task, settings, base, known),
        "## Training", _training(settings, kept, state["dtype"]),
        "## Held-out examples", _scores(runs, kept),
        "## How to load it", *_loading("FILE" if own else task, bilstm, squad, pair, prompt),
        *of_energy(state["energy"], sum(map(len, state["runs"].values())), len(state["runs"])),
    ]) + "\n"  # fmt: skip


def _what(task, settings, base, known):
    what = f"[{base}](https://huggingface.co/{base})" if base else "A model that is not on the Hub"
    what = "A BiLSTM on word vectors" if settings["model"] == "bilstm" else what
    of = f"[{known[1]}](https://huggingface.co/datasets/{known[0]})" if known else plain(task)
    text = f"{what}, fine-tuned with minidistil for {of}"
    if not settings["teacher"]:
        return f"{text}."
    names = settings["teacher"].split(",")
    published = ", ".join(filter(None, map(hub.published_name, names)))
    whose = f"{len(names)} fine-tuned teacher{'s' * (len(names) > 1)}"
    return f"{text}, and guided by {whose}{f' ({published})' if published else ''}."


def _training(settings, kept, dtype):
    limit = f"at most {settings['examples']:,} examples" if settings["examples"] else "all examples"
    text = f"{kept['updates']:,} updates of {settings['batch']} examples (epochs: {settings['epochs']:g}, of {limit}), "
    text += f"learning rate up to {kept['lr']:g}, seed {kept['seed']}, matrix products in {dtype}."
    if not settings["teacher"]:
        return text
    weights = f"task {settings['alpha_task']:g}, tau^2 KL {settings['alpha_ce']:g} (tau = {settings['temperature']:g})"
    text += f" Weights of the objective: {weights}, logits {settings['alpha_mse']:g}."
    text += f" Each example had {settings['augment']} augmented copies." if settings["augment"] else ""
    others = settings.get("unlabelled")
    return text + (f" The teacher labelled up to {others:,} other texts of the training set." if others else "")


def _scores(runs, kept):
    summary, last = summarise(runs), kept["epochs"][-1]
    note = f"The model is the best of {len(runs)} training runs by its score on these examples"
    note = "There was one training run" if len(runs) == 1 else note
    if summary["seeds"] > 1:
        note += f"; over {summary['seeds']} seeds the score has the median {summary['score']:.2f}, "
        note += f"from {summary['lowest']:.2f} to {summary['highest']:.2f}"
    return table([["metric", "percent"], *([name, f"{value:.2f}"] for name, value in last.items())]) + f"\n\n{note}."


def _loading(task, bilstm, squad, pair, prompt):
    """Returns the parts of a card that say how to load the model; the code runs in its folder.

    `prompt` stands before each text whose vector is classified; None for other models.
    """
    here = 'folder = "."  # this folder; elsewhere its path, or its name on the Hub'
    if squad:  # for which transformers 5 has no pipeline any more
        yield code(
            "python", "from transformers import AutoModelForQuestionAnswering, AutoTokenizer", "", here,
            "tokenizer = AutoTokenizer.from_pretrained(folder)",
            "model = AutoModelForQuestionAnswering.from_pretrained(folder)",
            'inputs = tokenizer("Who wrote it?", "It was written by Ada.", return_tensors="pt")',
            "outputs = model(**inputs)",
            "first, last = outputs.start_logits.argmax(), outputs.end_logits.argmax()",
            'print(tokenizer.decode(inputs["input_ids"][0, first : last + 1]))',
        )  # fmt: skip
    elif prompt is not None:
        yield code("python", "from sentence_transformers import SentenceTransformer", "", here,
                   'print(SentenceTransformer(folder).encode("One sentence."))  # its vector')  # fmt: skip
        texts = f"{prompt + 'One sentence.'!r}, {prompt + 'Another one.' if pair else None!r}"
        yield "With minidistil, from its checkout, the classifier of these vectors, too:"
        yield code(
            "python", "import torch", "from minidistil.downstream.batches import encode_apart, predict",
            "from minidistil.downstream.heads import load_finetuned", "from minidistil.tokenizer import Tokenizer", "",
            here, "(model, labels), tokenizer = load_finetuned(folder), Tokenizer.load(folder)",
            f"item = encode_apart(tokenizer, {texts}, 128)",
            'print(labels, predict(model, [item], tokenizer.pad_id, torch.device("cpu")))',
        )  # fmt: skip
    elif not bilstm:
        given = '{"text": "One sentence.", "text_pair": "Another one."}' if pair else '"One sentence."'
        yield code("python", "from transformers import pipeline", "", here,
                   'model = pipeline("text-classification", model=folder)', f"print(model({given}))")  # fmt: skip
    else:
        yield "With minidistil, from its checkout:"
        yield code("python", "from minidistil.downstream import bilstm", "", here,
                   "model, labels = bilstm.load(folder)", "print(labels, model)")  # fmt: skip
        return
    yield "With minidistil, from its checkout, as a teacher:"
    data = "" if task == "FILE" else " --data DATA"
    how = "" if prompt is None else " --vectors"
    yield code("", f"python finetune.py --task {task} --model STUDENT{data} --teacher FOLDER{how}")


def write_results(out, state):
    """Writes the end of finetune.py, be it an interruption: scores.json, cards, a line about the energy."""
    files.write_json(out / "scores.json", state)
    for task, runs in state["runs"].items():
        if runs:
            write_card(out / task, card(out / task))
    if state["energy"]:
        print(f"energy: {describe(state['energy'])}", flush=True)
