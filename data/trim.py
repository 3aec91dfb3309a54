"""Cuts a multilingual teacher's vocabulary to the pieces that a corpus uses.

    python data/trim.py --teacher xlm-roberta-base --data books/en books/de --out runs/teacher

On that corpus the new teacher's tokens are the same texts, with the same hidden states and logits; other text may be
split into smaller pieces. The summary's `unseen_share` estimates how much of other text: the share of tokens of one
document in fifty whose pieces no other document uses. For sentencepiece's Unigram vocabularies, such as XLM-R's; the
pieces are those of the documents of data/prepare.py, so prepare the same sources with the new teacher.
"""

import dataclasses
import json
import pathlib
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


def counter(tokenizer):
    """Returns the function from a Batch to ((ids, counts) of its documents, those of held-out ones, cuts)."""

    def count(batch):
        sides = [], []
        texts, cuts = batch.documents()
        for text in texts:
            held_out = document_hash(text.encode("utf-8", "replace")) < HELD_OUT * HASHES
            sides[held_out].append(tokenizer.encode_documents(pieces(text)))
        return *(np.unique(np.concatenate([*ids, []]), return_counts=True) for ids in sides), cuts

    return count


def count_tokens(sources, tokenizer, workers, field, encoding):
    """Returns (how often documents use each id, held-out documents, cuts); the first two are (V,) int64."""
    size = text_sources.check(sources)
    totals, cuts = np.zeros((2, len(tokenizer.vocab)), np.int64), 0
    with tqdm.tqdm(total=size or None, unit="B", unit_scale=True, disable=None, leave=False) as bar:

        def progress():
            for batch in text_sources.batches(sources, field, encoding):
                yield batch
                bar.update(batch.progress)

        for *sides, cut in ordered_map(workers, counter, (tokenizer,), progress(), lambda batch: batch.weight):
            cuts += cut
            for total, (ids, counts) in zip(totals, sides, strict=True):
                total[ids.astype(np.int64)] += counts
    totals[:, tokenizer.sep_id] = 0  # the ends of documents
    return *totals, cuts


def cut_model(folder, out, ids):
    """Writes a model folder whose vocabulary is these rows of another's; returns its Config and both sizes."""
    config = weights.read_config(folder)
    with torch.device("meta"):
        model = LanguageModel(config)
    tensors, names = weights.named_weights(folder, model)
    rows, before = torch.tensor(ids), parameters(tensors)
    for ours in ("encoder.embeddings.words.weight", "head.bias"):
        for name in names.get(ours, ()):
            if name in tensors:  # an encoder has no head
                if len(tensors[name]) != config.vocab_size:
                    raise UserError(
                        f"{folder}: {name} has {len(tensors[name])} rows, but config.json says {config.vocab_size}: "
                        "take both from the same model"
                    )
                tensors[name] = tensors[name][rows]
    values = weights.read_json(pathlib.Path(folder) / "config.json")
    places = {i: new for new, i in enumerate(ids)}
    for key, value in values.items():
        if key.endswith("_token_id") and type(value) is int:
            values[key] = places.get(value, value)
    values[FAMILIES[config.family].config_keys["vocab_size"]] = len(ids)
    if any(name in tensors for name in names["head.bias"]):
        weights.check_decoder(folder, config)
        values["tie_word_embeddings"] = True  # it was equal to the words, and is not written
    write_safetensors(out / "model.safetensors", tensors)
    files.write_json(out / "config.json", values)
    return weights.read_config(out), {"before": before, "after": parameters(tensors)}


def parameters(tensors):
    return sum(tensor.numel() for tensor in tensors.values())


def main(argv):
    settings = Settings(**cli.parse_args(Settings, argv, __doc__))
    started = time.perf_counter()
    out = pathlib.Path(settings.out)
    if out.exists() and (out.is_file() or any(out.iterdir())):
        raise UserError(f"{out} already exists, and runs may depend on it: choose another --out")
    folder = hub.resolve(settings.teacher)
    tokenizer = Tokenizer.load(folder)
    if not isinstance(tokenizer, Unigram):
        kind = type(tokenizer).__name__
        raise UserError(f"{folder} has a {kind} vocabulary: only Unigram vocabularies, such as XLM-R's, can be cut")
    check_vocabulary("teacher", weights.read_config(folder), tokenizer)
    sources = text_sources.paths_first(settings.data)
    used, held_out, cuts = count_tokens(sources, tokenizer, cores(settings.workers), settings.field, settings.encoding)
    if left_out := text_sources.described(text_sources.files_of(sources)):
        print(left_out)
    if cuts:
        print(described_cuts(cuts))
    if not (used + held_out).any():
        raise UserError("the sources hold no text: name others")
    small, ids = tokenizer.cut(np.flatnonzero(used + held_out).tolist())
    small.save(out)
    config, sizes = cut_model(folder, out, ids)
    if modules_folder(folder):  # of a sentence encoder
        write_pooling(out, read_pooling(folder), config)
    summary = {
        "out": settings.out,
        "tokens": int(used.sum() + held_out.sum()),
        "pieces": {"before": len(tokenizer.vocab), "after": len(small.vocab)},
        "parameters": sizes,
        "unseen_share": round(float(held_out[used == 0].sum() / max(1, held_out.sum())), 6),
        "seconds": round(time.perf_counter() - started, 2),
    }
    print(json.dumps(summary, separators=(",", ":")))


if __name__ == "__main__":
    from data.trim import main  # under its importable name, by which workers look up functions

    cli.run_script(main)
