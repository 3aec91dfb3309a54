"""WordPiece on one thread, English text, ours against the Rust package `tokenizers`; ids must be identical."""

import dataclasses
import os
import time

from benches import ROOT, Common
from benches.measure import spread
from benches.report import attempt, measured, speed_up
from data.docstrings import harvest, python_files
from minidistil.cli import option
from minidistil.errors import UserError
from minidistil.tokenizer import Tokenizer
from minidistil.tokenizers.wordpiece import WordPiece


@dataclasses.dataclass
class Settings(Common):
    rounds: int = option(3, "measurements of each provider, interleaved")


def providers_of(texts):
    """Returns {name: function () -> ids of every text}; "cold" calls start with an empty cache."""
    os.environ["TOKENIZERS_PARALLELISM"], os.environ["RAYON_NUM_THREADS"] = "false", "1"
    try:
        import tokenizers
    except ImportError:
        raise UserError("there is nothing to compare with: pip install -r requirements-dev.txt") from None
    mine = Tokenizer.load(ROOT / "data" / "demo")
    rust = tokenizers.Tokenizer(tokenizers.models.WordPiece(mine.ids, unk_token="[UNK]", max_input_chars_per_word=100))
    rust.normalizer = tokenizers.normalizers.BertNormalizer(lowercase=True)
    rust.pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()

    def cold():
        fresh = WordPiece(mine.vocab, mine.lowercase)
        return [fresh.encode(text) for text in texts]

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
    """Yields a row per provider; the speed-up is over the fastest way of `tokenizers`."""
    texts = harvest(python_files()[:: 20 if settings.tiny else 1])
    providers = providers_of(texts)
    expected = providers["tokenizers, encode_batch"]()
    tokens, rows = sum(map(len, expected)), {}
    for provider, encode in providers.items():
        rows[provider] = row = {"case": "tokenizer", "provider": provider,
                                "shape": {"tokens": tokens, "texts": len(texts)}}  # fmt: skip
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
