"""Cuts a multilingual teacher's vocabulary to the pieces that a corpus uses.

    python data/trim.py --teacher xlm-roberta-base --data books/en books/de --out runs/teacher

The new teacher splits that corpus into the same pieces and gives them the same hidden states and logits; other text may
be split into smaller pieces. The summary's `unseen_share` estimates how much of other text: the share of tokens of one
document in fifty whose pieces no other document uses. The pooler and the heads of tasks are kept. For sentencepiece's
Unigram vocabularies, such as XLM-R's.

The pieces are those of the documents of data/prepare.py, and with --sentences and --prefix of its sentences, so prepare
the same sources in the same way with the new teacher. Those of the prompts in the teacher's folder are kept, too.
"""

import dataclasses
import itertools
import json
import pathlib
import signal
import sys
import time

if __name__ == "__main__":
    sys.path[0] = str(pathlib.Path(__file__).resolve().parent.parent)

import numpy as np
import torch
import tqdm

from data import sources as text_sources
from data.documents import described_cuts
from data.encode import HASHES, document_hash, pieces
from data.new_folder import new_folder
from data.sentence_split import sentences
from data.workers import cores, ordered_map
from minidistil import cli, files, hub, weights
from minidistil.checks import check_vocabulary
from minidistil.cli import option
from minidistil.errors import UserError
from minidistil.families import FAMILIES
from minidistil.model import LanguageModel
from minidistil.pooling import modules_folder, read_pooling, write_pooling
from minidistil.safetensors import write_safetensors
from minidistil.tokenizer import Tokenizer
from minidistil.tokenizers.unigram import Unigram

HELD_OUT = 0.02  # share of the documents on which unseen_share is computed; their pieces are kept, too


@dataclasses.dataclass
class Settings:
    teacher: str = option(None, "model: folder or name on the Hugging Face Hub", required=True)
    data: str = option(
        None, "file or folder of text, docstrings, wikipedia:DUMP, hf:NAME[:CONFIG[:COLUMN]]", nargs="+", required=True
    )
    out: str = option(None, "folder of the new teacher; must not exist", required=True)
    workers: int = option(None, "processes (default: the cores of this computer)")
    field: str = option(
        "text", "field of .jsonl and .json, column of .tsv, .csv and .parquet files that holds the text"
    )
    encoding: str = option("utf-8", "of the text files, such as latin-1 or cp1252")
    sentences: bool = option(False, "for a corpus of single sentences, as data/prepare.py makes it")
    prefix: str = option(None, "text before every sentence, as the model needs it, such as 'query: '")


def counter(tokenizer, prefix=None):
    """Returns the function from a Batch to ((ids, counts) of its documents, those of held-out ones, cuts).

    With a `prefix`, which may be "", each sentence is a document, which it begins.
    """

    def count(batch):
        sides = [], []
        texts, cuts = batch.documents()
        for text in texts if prefix is None else itertools.chain.from_iterable(map(sentences, texts)):
            held_out = document_hash(text.encode("utf-8", "replace")) < HELD_OUT * HASHES
            sides[held_out].append(tokenizer.encode_documents(pieces((prefix or "") + text)))
        return *(np.unique(np.concatenate([*ids, []]), return_counts=True) for ids in sides), cuts

    return count


def count_tokens(sources, tokenizer, workers, field, encoding, prefix=None):
    """Returns (how often documents use each id, held-out documents, cuts); the first two are (V,) int64."""
    size = text_sources.check(sources)
    totals, cuts = np.zeros((2, len(tokenizer.vocab)), np.int64), 0
    with tqdm.tqdm(total=size or None, unit="B", unit_scale=True, disable=None, leave=False) as bar:

        def progress():
            for batch in text_sources.batches(sources, field, encoding):
                yield batch
                bar.update(batch.progress)

        for *sides, cut in ordered_map(workers, counter, (tokenizer, prefix), progress(), lambda batch: batch.weight):
            cuts += cut
            for total, (ids, counts) in zip(totals, sides, strict=True):
                total[ids.astype(np.int64)] += counts
    totals[:, tokenizer.sep_id] = 0  # the ends of documents
    return *totals, cuts


def whole_model(folder, config):
    """Returns the tensors of a model by their names in its files, perhaps views of these, and those with a row a piece.

    Raises UserError where it cannot be cut.
    """
    with torch.device("meta"):
        model = LanguageModel(config)
    tensors, names = weights.named_weights(folder, model)
    words, *_ = names["encoder.embeddings.words.weight"]
    by_piece = [name for name in (words, *names["head.bias"]) if name in tensors]  # an encoder has no head
    for name in by_piece:
        if len(tensors[name]) != config.vocab_size:
            rows = f"{len(tensors[name])} rows, but config.json says {config.vocab_size}"
            raise UserError(f"{folder}: {name} has {rows}: take both from the same model")
    if len(by_piece) > 1:
        weights.check_decoder(folder, config)
    encoder = words.partition(".")[0]
    for name, tensor in weights.task_weights(folder).items():
        tensors[f"{encoder}.{name}" if name.startswith("pooler.") else name] = tensor
    return tensors, by_piece


def cut_model(folder, out, ids):
    """Writes a model folder whose vocabulary is these rows of another's; returns its Config and both sizes."""
    config = weights.read_config(folder)
    tensors, by_piece = whole_model(folder, config)
    rows, before = torch.tensor(ids), parameters(tensors)
    tensors |= {name: tensors[name][rows] for name in by_piece}
    values = weights.read_json(pathlib.Path(folder) / "config.json")
    places = {i: new for new, i in enumerate(ids)}
    for key, value in values.items():
        if key.endswith("_token_id") and type(value) is int:
            values[key] = places.get(value, value)
    values[FAMILIES[config.family].config_keys["vocab_size"]] = len(ids)
    if len(by_piece) > 1:
        values["tie_word_embeddings"] = True  # it was equal to the words, and is not written
    write_safetensors(out / "model.safetensors", tensors)
    files.write_json(out / "config.json", values)
    return weights.read_config(out), {"before": before, "after": parameters(tensors)}


def parameters(tensors):
    return sum(tensor.numel() for tensor in tensors.values())


def main(argv):
    settings = Settings(**cli.parse_args(Settings, argv, __doc__))
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # cleans up, like Ctrl-C
    if settings.prefix is not None and not settings.sentences:
        raise UserError("--prefix stands before each sentence: add --sentences, or leave it out")
    with new_folder(settings.out) as out:
        summary = trim(settings, out)
    print(json.dumps(summary, separators=(",", ":")))


def trim(settings, out):
    """Writes the new teacher in the empty folder `out`; returns the summary."""
    started = time.perf_counter()
    folder = hub.resolve(settings.teacher, vectors=True)
    tokenizer = Tokenizer.load(folder)
    if not isinstance(tokenizer, Unigram):
        kind = type(tokenizer).__name__
        raise UserError(f"{folder} has a {kind} vocabulary: only Unigram vocabularies, such as XLM-R's, can be cut")
    check_vocabulary("teacher", weights.read_config(folder), tokenizer)
    whole_model(folder, weights.read_config(folder))  # what cannot be cut is refused before the text is read
    pooling = read_pooling(folder)
    sources = text_sources.paths_first(settings.data)
    how = cores(settings.workers), settings.field, settings.encoding
    prefix = (settings.prefix or "") if settings.sentences else None
    used, held_out, cuts = count_tokens(sources, tokenizer, *how, prefix)
    if left_out := text_sources.described(text_sources.files_of(sources)):
        print(left_out)
    if cuts:
        print(described_cuts(cuts))
    if not (used + held_out).any():
        raise UserError("the sources hold no text: name others")
    prompts = tokenizer.encode_documents((pooling.settings.get("prompts") or {}).values())
    small, ids = tokenizer.cut(np.union1d(np.flatnonzero(used + held_out), prompts).astype(int).tolist())
    small.save(out)
    config, sizes = cut_model(folder, out, ids)
    if modules_folder(folder):  # of a sentence encoder
        write_pooling(out, pooling, config)
    return {
        "out": settings.out,
        "tokens": int(used.sum() + held_out.sum()),
        "pieces": {"before": len(tokenizer.vocab), "after": len(small.vocab)},
        "parameters": sizes,
        "unseen_share": round(float(held_out[used == 0].sum() / max(1, held_out.sum())), 6),
        "seconds": round(time.perf_counter() - started, 2),
    }


if __name__ == "__main__":
    from data.trim import main  # under its importable name, by which workers look up functions

    cli.run_script(main)
