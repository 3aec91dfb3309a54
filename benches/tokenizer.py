"""WordPiece and byte-level BPE on one thread, ours against the Rust package `tokenizers`; ids must be identical."""

import collections
import dataclasses
import os
import pickle
import time

from benches import ROOT, Common
from benches.measure import spread
from benches.report import attempt, measured, speed_up
from data import byte_vocab
from data.docstrings import harvest, python_files
from minidistil.cli import option
from minidistil.errors import UserError
from minidistil.tokenizer import Tokenizer
from minidistil.tokenizers.byte_bpe import ByteBPE


@dataclasses.dataclass
class Settings(Common):
    rounds: int = option(3, "measurements of each provider, interleaved")
    byte_level: str = option(None, "folder of a byte-level BPE (default: 8,192 entries learnt from the texts)")


def rust_wordpiece(tokenizers, mine):
    """The crate's tokenizer with the ids of an uncased WordPiece."""
    rust = tokenizers.Tokenizer(tokenizers.models.WordPiece(mine.ids, unk_token="[UNK]", max_input_chars_per_word=100))
    rust.normalizer = tokenizers.normalizers.BertNormalizer(lowercase=True)
    rust.pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()
    return rust


def rust_byte_level(tokenizers, mine):
    """The crate's tokenizer with the ids of a ByteBPE."""
    rust = tokenizers.Tokenizer(tokenizers.models.BPE(mine.ids, mine.merges))
    rust.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    return rust


def byte_level(folder, texts, size):
    """The ByteBPE of a folder, or one learnt from the texts."""
    if folder:
        tokenizer = Tokenizer.load(folder)
        if not isinstance(tokenizer, ByteBPE):
            raise UserError(f"{folder} holds no byte-level BPE: name the folder of a GPT-2 or RoBERTa model")
        return tokenizer
    splitter, chunks, words = byte_vocab.of_merges("gpt2", []), collections.Counter(), collections.Counter()
    for text in texts:
        chunks.update(splitter.chunks(text))
    for chunk, n in chunks.items():
        for word in splitter.words(chunk):
            words[word] += n
    return byte_vocab.learn(words, size, "gpt2")


def providers_of(mine, rust, texts):
    """Returns {name: function () -> ids of every text}; "cold" calls start with an empty cache."""

    def cold():
        fresh = pickle.loads(copied)
        return [fresh.encode(text) for text in texts]

    copied = pickle.dumps(mine)
    return {
        "ours, cold cache": cold,
        "ours, warm cache": lambda: [mine.encode(text) for text in texts],
        "tokenizers, one text at a time": lambda: [rust.encode(text, add_special_tokens=False).ids for text in texts],
        "tokenizers, encode_batch": lambda: [e.ids for e in rust.encode_batch(texts, add_special_tokens=False)],
        "tokenizers, encode_batch_fast": lambda: [
            e.ids
            for e in rust.encode_batch_fast(texts, add_special_tokens=False)  # the same, without offsets
        ],
    }


def bench(settings):
    """Yields a row per tokenizer and provider; the speed-up is over the fastest way of `tokenizers`."""
    os.environ["TOKENIZERS_PARALLELISM"], os.environ["RAYON_NUM_THREADS"] = "false", "1"
    try:
        import tokenizers
    except ImportError:
        raise UserError("there is nothing to compare with: pip install -r requirements-dev.txt") from None
    texts = harvest(python_files()[:: 20 if settings.tiny else 1])
    wordpiece = Tokenizer.load(ROOT / "data" / "demo")
    yield from compare("", providers_of(wordpiece, rust_wordpiece(tokenizers, wordpiece), texts), settings)
    bpe = byte_level(settings.byte_level, texts, 1000 if settings.tiny else 8192)
    yield from compare("byte-level BPE: ", providers_of(bpe, rust_byte_level(tokenizers, bpe), texts), settings)


def compare(kind, providers, settings):
    """Yields a row per provider of one kind of tokenizer."""
    expected = providers["tokenizers, encode_batch"]()
    tokens, rows = sum(map(len, expected)), {}
    for provider, encode in providers.items():
        rows[provider] = row = {"case": "tokenizer", "provider": kind + provider,
                                "shape": {"tokens": tokens, "texts": len(expected)}}  # fmt: skip
        with attempt(row):
            if encode() != expected:
                raise UserError("other ids than those of tokenizers: no time is reported for a wrong result")
    running = {provider: encode for provider, encode in providers.items() if "error" not in rows[provider]}
    times = {provider: [] for provider in running}
    for _ in range(1 if settings.tiny else settings.rounds):
        for provider, encode in running.items():
            start = time.process_time()
            encode()
            times[provider].append(time.process_time() - start)
    for provider, seconds in times.items():
        rows[provider]["tokens_per_second"] = [round(x, 1) for x in spread([tokens / s for s in seconds])]
    best = max((r for p, r in rows.items() if p in times and p.startswith("tokenizers")),
               key=lambda r: r["tokens_per_second"][1])  # fmt: skip
    for row in rows.values():
        row["speed_up"] = speed_up(row, best, "tokens_per_second")
        yield row


def table(results):
    """Markdown: medians, and the speed-up over the fastest alternative."""
    lines = ["| | tokens/s | speed-up |", "|---|---|---|"]
    for r in measured(results):
        lines.append(f"| {r['provider']} | {r['tokens_per_second'][1]:,.0f} | {r['speed_up']:.1f}x |")
    return "\n".join(lines)
