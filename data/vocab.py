"""Learns a vocabulary from text with sentencepiece, as a BERT model's vocab.txt or GPT-2's or RoBERTa's tokenizer.

    python data/vocab.py docstrings --size 8192 --out runs/vocab.txt
    python data/vocab.py docstrings --size 8192 --byte-level gpt2 --out runs/gpt2    # vocab.json and merges.txt

Documents are those of data/prepare.py, a long one cut in the same places; memory grows only with the distinct words.

Byte-pair encoding (Sennrich et al. 2016) over the counts of words, as our tokenizer splits them before it looks for
pieces. For WordPiece it learns three tenths more pieces than needed and drops those that the greedy longest match uses
least, which are merges that only led to longer pieces. Tokens per word of held-out docstrings, 8,192 entries, November
2026: 1.052 without dropping, 1.040 with it; sentencepiece's unigram model 1.150 and 1.144. Byte-level BPE, which needs
every merge, keeps the first ones.
"""

import collections
import dataclasses
import json
import pathlib
import sys
import time

if __name__ == "__main__":
    sys.path[0] = str(pathlib.Path(__file__).resolve().parent.parent)

import tqdm

from data import byte_vocab
from data import sources as text_sources
from data.byte_pairs import byte_pairs
from data.documents import described_cuts
from data.encode import HASHES, document_hash, pieces
from data.workers import cores, ordered_map
from minidistil import cli, files
from minidistil.cli import option
from minidistil.errors import UserError
from minidistil.tokenizers.byte_bpe import ByteBPE
from minidistil.tokenizers.wordpiece import WordPiece
from minidistil.tokenizers.wordpiece_files import LONGEST_WORD, SPECIAL_TOKENS

HELD_OUT = 0.02  # share of the documents on which the reported metrics are computed
COVERAGE = 0.99999  # share of all characters that belong to the alphabet, in which any word can be spelled
SURPLUS = 1.3
_WORD_START = "\u2581"  # sentencepiece's mark of a word start


@dataclasses.dataclass
class Settings:
    source: str = option(
        dataclasses.MISSING, "file or folder of text, docstrings, wikipedia:DUMP, hf:NAME[:CONFIG[:COLUMN]]", nargs="+"
    )
    out: str = option(None, "vocab.txt to write, or a folder for it and its configuration", required=True)
    size: int = option(8192, "entries, special tokens included")
    byte_level: str = option(
        None, "learn byte-level BPE with the special tokens of this model", choices=[*byte_vocab.KINDS]
    )
    cased: bool = option(False, "keep capitals and accents")
    sample_bytes: int = option(500_000_000, "stop reading after so many bytes of text")
    workers: int = option(None, "processes (default: the cores of this computer)")
    field: str = option(
        "text", "field of .jsonl and .json, column of .tsv, .csv and .parquet files that holds the text"
    )
    encoding: str = option("utf-8", "of the text files, such as latin-1 or cp1252")


def learn(counts, size, tokenizer):
    """Returns a vocabulary of `size` entries for words with these counts; `tokenizer` splits off single characters.

    Order: special tokens, the alphabet, its continuations, then pieces, most used first. Raises UserError where the
    text or `size` is too small.
    """
    alphabet = _alphabet(counts)
    words = {
        word: n
        for word, n in sorted(counts.items())
        if len(word) <= LONGEST_WORD and alphabet.issuperset(word) and _WORD_START not in word
    }
    # and all of printable ASCII: code and formulas are text too
    alphabet = sorted(alphabet.union(c for c in map(chr, range(33, 127)) if words_of(tokenizer, c) == [c]))
    base = [*SPECIAL_TOKENS.values(), *alphabet]
    base += [f"##{c}" for c in alphabet if len(words_of(tokenizer, f"a{c}a")) == 1]
    if size < len(base):
        raise UserError(f"--size {size} is too small for this text, whose alphabet alone takes {len(base)}: raise it")
    candidates = list(dict.fromkeys(base + _byte_pairs(words, int(SURPLUS * size))))
    if size > len(candidates):
        raise UserError(f"the text yields {len(candidates)} entries, not {size}: lower --size or give more text")
    used = usage(WordPiece(candidates, tokenizer.lowercase), words)
    return base + sorted(candidates[len(base) :], key=lambda piece: (-used[piece], piece))[: size - len(base)]


def _alphabet(words):
    """Returns the set of the characters that make up COVERAGE of the text."""
    characters = collections.Counter()
    for word, n in words.items():
        for c in word:
            characters[c] += n
    missing = (1 - COVERAGE) * characters.total()
    for c, n in sorted(characters.items(), key=lambda item: (item[1], item[0])):
        missing -= n
        if missing < 0:
            break
        del characters[c]
    return set(characters)


def _byte_pairs(words, size):
    """Returns up to `size` pieces in the merge order of byte-pair encoding, in WordPiece's spelling."""
    spelled = [piece[1:] if piece[0] == _WORD_START else f"##{piece}" for piece in byte_pairs(words, size)]
    return [piece for piece in spelled if piece]


def usage(tokenizer, words):
    """Returns a Counter: how often each entry of the vocabulary is used for words with these counts."""
    used = collections.Counter()
    for word, n in words.items():
        for i in tokenizer.encode(word):
            used[tokenizer.vocab[i]] += n
    return used


def chunks_of(tokenizer, text):
    """Returns the parts of a text, of which many repeat, that the tokenizer splits into words one by one."""
    return tokenizer.chunks(text) if isinstance(tokenizer, ByteBPE) else text.split()


def words_of(tokenizer, chunk):
    """Returns the words of a chunk, as the tokenizer sees them before it looks for pieces."""
    return tokenizer.words(chunk) if isinstance(tokenizer, ByteBPE) else tokenizer._words(chunk)


def counter(tokenizer):
    """Returns the function from a Batch to (word counts, word counts of held-out documents, cuts); runs in workers."""

    def count(batch):
        sides = collections.Counter(), collections.Counter()
        texts, cuts = batch.documents()
        for text in texts:
            held_out = document_hash(text.encode("utf-8", "replace")) < HELD_OUT * HASHES
            for piece in pieces(text):
                sides[held_out].update(chunks_of(tokenizer, piece))
        return *map(words_in, sides), cuts

    def words_in(chunks):
        words = collections.Counter()
        for chunk, n in chunks.items():
            for word in words_of(tokenizer, chunk):
                words[word] += n
        return words

    return count


def count_words(sources, tokenizer, sample_bytes, workers, field, encoding="utf-8"):
    """Returns (word counts, word counts of held-out documents, cuts) of the first `sample_bytes` of text."""
    size = text_sources.check(sources)

    def sample():
        taken = 0
        for batch in text_sources.batches(sources, field, encoding):
            yield batch
            bar.update(batch.progress)
            taken += batch.weight
            if taken >= sample_bytes:
                return

    totals, cuts = (collections.Counter(), collections.Counter()), 0
    with tqdm.tqdm(total=size or None, unit="B", unit_scale=True, disable=None, leave=False) as bar:
        for *counts, cut in ordered_map(workers, counter, (tokenizer,), sample(), lambda batch: batch.weight):
            cuts += cut
            for total, part in zip(totals, counts, strict=True):
                total.update(part)
    return *totals, cuts


def main(argv):
    settings = Settings(**cli.parse_args(Settings, argv, __doc__))
    started = time.perf_counter()
    out = pathlib.Path(settings.out)
    if out.exists() and (out.is_file() or any(out.iterdir())):
        raise UserError(f"{out} already exists, and models may depend on it: choose another --out")
    kind = settings.byte_level
    if kind and settings.cased:
        raise UserError("--cased is for WordPiece: leave it out, byte-level BPE always keeps capitals and accents")
    if kind and out.suffix in (".txt", ".json"):
        raise UserError(f"--byte-level writes vocab.json and merges.txt: name a folder with --out, not {out}")
    splitter = byte_vocab.of_merges(kind, []) if kind else WordPiece([*SPECIAL_TOKENS.values()], not settings.cased)
    sources = text_sources.paths_first(settings.source)
    counts, held_out, cuts = count_words(
        sources, splitter, settings.sample_bytes, cores(settings.workers), settings.field, settings.encoding
    )
    if left_out := text_sources.described(text_sources.files_of(sources)):
        print(left_out)
    if cuts:
        print(described_cuts(cuts))
    if not (counts or held_out):
        raise UserError("the sources hold no text: name others")
    if kind:
        tokenizer = byte_vocab.learn(counts, settings.size, kind)
    else:
        tokenizer = WordPiece(learn(counts, settings.size, splitter), not settings.cased)
    if out.suffix == ".txt":
        files.write_text(out, "".join(f"{token}\n" for token in tokenizer.vocab))
    else:
        tokenizer.save(out, kind or "bert")
    words = held_out or counts  # with few documents, none may be held out
    used = usage(tokenizer, words)
    unknown = {} if kind else {"unk_share": round(used["[UNK]"] / used.total(), 7)}
    summary = {
        "out": settings.out,
        "size": len(tokenizer.vocab),
        "words": counts.total(),
        "tokens_per_word": round(used.total() / words.total(), 4),
        **unknown,
        "seconds": round(time.perf_counter() - started, 2),
    }
    print(json.dumps(summary, separators=(",", ":")))


if __name__ == "__main__":
    from data.vocab import main  # under its importable name, by which workers look up functions

    cli.run_script(main)
