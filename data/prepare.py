"""Text -> token file: streams any amount of text in constant memory; the result does not depend on the workers.

    python data/prepare.py docstrings --vocab data/demo --out runs/docs
    python data/prepare.py books/ wikipedia:enwiki-pages-articles.xml.bz2 --vocab vocab.txt --out runs/corpus
    python data/prepare.py books/ --vocab vocab.txt --sentences --out runs/sentences

The output folder holds train.bin and val.bin (token ids, each document followed by [SEP], or the token that ends a text
in another vocabulary; little-endian uint16, or uint32 for more than 65,536 tokens), counts.npy ((V,) int64, how often
train.bin holds each id), the tokenizer's files and meta.json with hashes of all of them. The folder is written
atomically.

A document is a line of text; or what stands between blank lines, if one line in a hundred is blank; or one value of
--field in a table or JSON file; or an article of Wikipedia. One of more than 4 MiB is cut at white space into several.
The hash of its text decides whether a document is held out, so equal texts are always in the same split.

With --sentences, documents are split into sentences (data/sentence_split.py), which take the place of documents in all
of this. train.ends.bin and val.ends.bin (little-endian int64) hold the index behind each sentence's last token, and
meta.json says what --prefix stands before each.
"""

import collections
import contextlib
import dataclasses
import hashlib
import json
import os
import pathlib
import signal
import sys
import time

import numpy as np
import tqdm

if __name__ == "__main__":
    sys.path[0] = str(pathlib.Path(__file__).resolve().parent.parent)

from data import sources as text_sources
from data.documents import DOCUMENT_BYTES, described_cuts
from data.encode import HASHES, encoder, token_dtype
from data.new_folder import new_folder
from data.workers import cores, ordered_map
from minidistil import __version__, cli, files
from minidistil.cli import option
from minidistil.data import meta_digest
from minidistil.errors import UserError
from minidistil.memory import peak_rss_mib
from minidistil.tokenizer import Tokenizer

SMALLEST_VAL = 2048  # tokens: a small corpus holds out more than its share to reach this, up to a tenth


@dataclasses.dataclass
class Settings:
    source: str = option(
        dataclasses.MISSING, "file or folder of text, docstrings, wikipedia:DUMP, hf:NAME[:CONFIG[:COLUMN]]", nargs="+"
    )
    vocab: str = option(None, "model: folder, name on the Hugging Face Hub, or demo; or a vocab.txt", required=True)
    out: str = option(None, "folder to write; must not exist", required=True)
    val_share: float = option(0.01, "share of held-out documents; of a small text more, up to a tenth")
    workers: int = option(None, "processes (default: the cores of this computer)")
    field: str = option(
        "text", "field of .jsonl and .json, column of .tsv, .csv and .parquet files that holds the text"
    )
    encoding: str = option("utf-8", "of the text files, such as latin-1 or cp1252")
    sentences: bool = option(False, "make a corpus of single sentences, for distilling sentence vectors")
    prefix: str = option(None, "text before every sentence, as the model needs it, such as 'query: '")


def prepare(
    sources, vocab, out, val_share=0.01, workers=None, field="text", progress=True, encoding="utf-8", prefix=None
):
    """Writes the folder `out` from `sources` of text (see data/sources.py), tokenised with `vocab`; returns its meta.

    With a `prefix`, which may be "", the corpus is one of sentences. Raises UserError or OSError; then `out` is
    unchanged.
    """
    sources, out = list(map(str, sources)), pathlib.Path(os.path.abspath(out))
    workers = cores(workers)
    if not 0 < val_share < 1:
        raise UserError(f"--val-share {val_share} is not between 0 and 1: 0.01 holds out one document in a hundred")
    tokenizer = Tokenizer.load(vocab)
    if prefix is not None and "cls" not in tokenizer.special:
        raise UserError(f"--sentences needs a vocabulary with [CLS], and {vocab} is a causal model's: leave it out")
    size, found = text_sources.check(sources), text_sources.files_of(sources)

    def encode_all(threshold):
        silent = None if progress else True  # None: silent unless stderr is a terminal
        with tqdm.tqdm(total=size or None, unit="B", unit_scale=True, disable=silent, leave=False) as bar:
            batches = text_sources.batches(sources, field, encoding)
            return _encode(batches, tokenizer, prefix, threshold, workers, folder, bar)

    if (out / "meta.json").exists():
        raise UserError(f"{out} already holds a prepared corpus: use it, remove it or choose another --out")
    with new_folder(out) as folder:
        tokenizer.save(folder)
        train, val, smallest, cuts = encode_all(int(val_share * HASHES))
        if val.tokens < min(SMALLEST_VAL, 0.1 * (train.tokens + val.tokens)) or train.tokens == 0:
            train, val, smallest, cuts = encode_all(_threshold_of_few(smallest, train.tokens + val.tokens))
            share = val.documents / (train.documents + val.documents)
            print(f"so little text holds out more than --val-share {val_share:g}: {share:.1%}", flush=True)
        np.save(folder / "counts.npy", train.counts)
        written = {file.path.name: file.hash.hexdigest() for split in (train, val) for file in split.files}
        meta = {
            "format": 1 if prefix is None else 2,
            "dtype": train.dtype.name,
            "vocab_size": len(tokenizer.vocab),
            "tokenizer": tokenizer.digest,
            "documents": {"train": train.documents, "val": val.documents},
            "tokens": {"train": train.tokens, "val": val.tokens},
            "bytes": {"train": train.bytes, "val": val.bytes},
            **({} if prefix is None else {"sentences": {"prefix": prefix}}),
            "sha256": {name: files.sha256(folder / name) for name in (*written, "counts.npy")},
            "sources": sources,
            **({"files": found} if any(found.values()) else {}),
            **({"long documents": {"cuts": cuts, "bytes": DOCUMENT_BYTES}} if cuts else {}),
            "created by": f"minidistil {__version__}",
        }
        intact = all(meta["sha256"][name] == digest for name, digest in written.items())
        if not intact or Tokenizer.load(folder).digest != tokenizer.digest:
            raise UserError(f"what was read back from {out.parent} is not what was written: check that disk")
        meta["meta_sha256"] = meta_digest(meta)
        files.write_json(folder / "meta.json", meta)
    return meta


class _File:
    """A file of integers during writing, and its hash."""

    def __init__(self, path):
        self.path, self.hash, self._file = path, hashlib.sha256(), open(path, "wb")
        self.close = self._file.close

    def write(self, numbers):
        data = numbers.tobytes()
        self._file.write(data)
        self.hash.update(data)


class _Split:
    """train.bin or val.bin during writing, with its statistics; of sentences also the file of their ends."""

    def __init__(self, folder, name, vocab_size, sentences):
        self.dtype = token_dtype(vocab_size)
        self.counts = np.zeros(vocab_size, np.int64)
        self.documents = self.tokens = self.bytes = 0
        self.files = [_File(folder / f"{name}{ending}") for ending in (".bin", ".ends.bin")[: 1 + sentences]]

    def write(self, ids, lengths, size):
        ends = self.tokens + np.cumsum(lengths)
        for file, numbers in zip(self.files, (ids, ends.astype("<i8")), strict=False):
            file.write(numbers)
        self.counts += np.bincount(ids, minlength=len(self.counts))
        self.documents += len(lengths)
        self.tokens += len(ids)
        self.bytes += size

    def close(self):
        for file in self.files:
            file.close()


def _encode(batches, tokenizer, prefix, threshold, workers, folder, bar):
    """Writes both token files; returns (train, val, {hash: tokens} of the documents with the smallest hashes, cuts)."""
    pending = collections.deque()

    def recorded():
        for batch in batches:
            pending.append((batch.progress, batch.unique))
            yield batch

    seen, smallest, cuts = set(), {}, 0
    started = time.perf_counter()
    with contextlib.ExitStack() as stack:
        train, val = (
            stack.enter_context(contextlib.closing(_Split(folder, name, len(tokenizer.vocab), prefix is not None)))
            for name in ("train", "val")
        )
        answers = ordered_map(workers, encoder, (tokenizer, prefix), recorded(), lambda batch: batch.weight)
        for hashes, tokens, sizes, ids, cut in stack.enter_context(contextlib.closing(answers)):
            progress, unique = pending.popleft()
            cuts += cut
            ids = np.frombuffer(ids, train.dtype)
            keep = np.ones(len(hashes), bool)
            if unique:
                for i, digest in enumerate(hashes.tolist()):
                    keep[i] = digest not in seen
                    seen.add(digest)
            for split, chosen in ((train, keep & (hashes >= threshold)), (val, keep & (hashes < threshold))):
                split.write(ids[np.repeat(chosen, tokens)], tokens[chosen], int(sizes[chosen].sum()))
            if val.tokens < SMALLEST_VAL or train.tokens == 0:
                smallest = _merge(smallest, hashes[keep].tolist(), tokens[keep].tolist())
            total = train.tokens + val.tokens
            bar.update(progress)
            bar.set_postfix_str(f"{total:,} tokens, {total / (time.perf_counter() - started):,.0f}/s")
    return train, val, smallest, cuts


def _merge(smallest, hashes, tokens):
    """Returns {hash: tokens} of the smallest hashes: enough to reach SMALLEST_VAL tokens, and one more."""
    for digest, count in zip(hashes, tokens, strict=True):
        smallest[digest] = smallest.get(digest, 0) + count
    kept, total = {}, 0
    for digest in sorted(smallest):
        kept[digest] = smallest[digest]
        if total >= SMALLEST_VAL:
            break
        total += smallest[digest]
    return kept


def _threshold_of_few(smallest, total):
    """Returns the hash threshold that holds out SMALLEST_VAL tokens of a small corpus, at most about a tenth."""
    if not smallest:
        raise UserError("the sources hold no text: name others")
    if len(smallest) == 1:
        raise UserError("the sources hold one document, and none can be held out: put documents on lines of their own")
    held_out = 0
    for digest in sorted(smallest)[:-1]:
        held_out += smallest[digest]
        if held_out >= min(SMALLEST_VAL, 0.1 * total):
            break
    return digest + 1


def main(argv):
    settings = Settings(**cli.parse_args(Settings, argv, __doc__))
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # cleans up, like Ctrl-C
    started = time.perf_counter()
    if settings.prefix is not None and not settings.sentences:
        raise UserError("--prefix stands before each sentence: add --sentences, or leave it out")
    vocab = pathlib.Path(settings.vocab).expanduser()
    if not vocab.exists() and vocab.suffix not in (".txt", ".json", ".model"):  # these would be missing files
        from minidistil import hub  # imports PyTorch, whose memory is not needed otherwise

        vocab = hub.resolve(settings.vocab)
    sources = text_sources.paths_first(settings.source)
    prefix = (settings.prefix or "") if settings.sentences else None
    how = settings.val_share, settings.workers, settings.field
    meta = prepare(sources, vocab, settings.out, *how, encoding=settings.encoding, prefix=prefix)
    if left_out := text_sources.described(meta.get("files", {"read": {}, "skipped": {}})):
        print(left_out)
    if "long documents" in meta:
        print(described_cuts(meta["long documents"]["cuts"]))
    seconds = time.perf_counter() - started
    summary = {
        "out": settings.out,
        "documents": meta["documents"],
        "tokens": meta["tokens"],
        "bytes": meta["bytes"],
        "seconds": round(seconds, 2),
        "tokens_per_second": round(sum(meta["tokens"].values()) / seconds),
        "peak_rss_mib": peak_rss_mib(),
    }
    print(json.dumps(summary, separators=(",", ":")))


if __name__ == "__main__":
    cli.run_script(main)
