"""The guesses of the demo's teacher for one blank at four temperatures, and the picture of minidistil/README.md.

`python sample.py --model data/demo --teacher none --temperature 2` prints the same guesses.
"""

import dataclasses

import sample
from benches import ROOT, Common
from minidistil import plot, weights
from minidistil.tokenizer import Tokenizer

K = 20  # words
TEMPERATURES = {"0": 0.0, "1": 1.0, "2": 2.0, "infinity": float("inf")}


@dataclasses.dataclass
class Settings(Common):
    pass


def bench(settings):
    """Yields a row a temperature: {"provider": temperature, "guesses": K [word, share], the likeliest first}."""
    model, tokenizer = weights.load_model(ROOT / "data" / "demo"), Tokenizer.load(ROOT / "data" / "demo")
    ids = tokenizer.encode_prompt(sample.PROMPT)
    logits = sample.predict(model, ids, [ids.index(tokenizer.mask_id)])
    for name, tau in TEMPERATURES.items():
        guesses = [[word, round(share, 6)] for word, share in sample.likeliest(logits, K, tau, tokenizer.shown)[0]]
        yield {"case": "temperature", "provider": name, "prompt": sample.PROMPT, "guesses": guesses}


def table(results):
    """Markdown: a row per word, a column per temperature."""
    names = [f"temperature {r['provider']}" for r in results]
    lines = [f"| | {' | '.join(names)} |", "|---" * (1 + len(names)) + "|"]
    for guesses in zip(*(r["guesses"] for r in results), strict=True):
        lines.append(f"| {guesses[0][0]} | {' | '.join(f'{share:.2%}' for _, share in guesses)} |")
    return "\n".join(lines)


def draw(path, results):
    plot.draw(path, *(panel(r["provider"], *zip(*r["guesses"], strict=True)) for r in results), height=4.6)


def panel(name, words, shares):
    """Bars from left to right, each with its number; the words stand beside temperature 0 only."""

    def paint(axes, width):
        axes.barh(range(len(words)), shares, 0.7, color=plot.BLUE)
        for y, share in enumerate(shares):
            axes.annotate(f"{share:.2%}", (share, y), (3, 0), textcoords="offset points", fontsize=7.5, va="center")
        axes.set_yticks(range(len(words)), words if name == "0" else [""] * len(words))
        axes.tick_params(axis="y", length=0)
        axes.set(ylim=(len(words) - 0.4, -0.6), xlim=(0, 1.6 * max(shares)))  # room for the numbers
        axes.set_xticks([])
        axes.grid(False)
        axes.set_xlabel(f"together {sum(shares):.1%}")

    return f"temperature {name}", paint
