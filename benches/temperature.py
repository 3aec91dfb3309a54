"""The teacher's guesses for one blank at four temperatures, for the lesson in minidistil/README.md.

    python -m benches.temperature         writes results/temperature.json and draws results/temperature.svg

`python sample.py --model data/demo --teacher none --temperature 2` prints the same guesses.
"""

import json

import sample
from benches import RESULTS, ROOT
from minidistil import files, plot, weights
from minidistil.tokenizer import Tokenizer

K = 20  # words
TEMPERATURES = {"0": 0.0, "1": 1.0, "2": 2.0, "infinity": float("inf")}


def guesses():
    """Returns {"prompt", "words": the K likeliest, "shares": {temperature: of each word}}."""
    model, tokenizer = weights.load_model(ROOT / "data" / "demo"), Tokenizer.load(ROOT / "data" / "demo")
    ids = tokenizer.encode_prompt(sample.PROMPT)
    logits = sample.predict(model, ids, [ids.index(tokenizer.mask_id)])
    rows = {name: sample.likeliest(logits, K, tau, tokenizer.shown)[0] for name, tau in TEMPERATURES.items()}
    shares = {name: [round(share, 6) for _, share in row] for name, row in rows.items()}
    return {"prompt": sample.PROMPT, "words": [word for word, _ in rows["1"]], "shares": shares}


def panel(name, words, shares):
    """The words' shares as bars from left to right, each with its number; the words stand beside temperature 0 only."""

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


def draw(path, found):
    plot.draw(path, *(panel(name, found["words"], shares) for name, shares in found["shares"].items()), height=4.6)


if __name__ == "__main__":
    found = guesses()
    files.write_json(RESULTS / "temperature.json", found)
    draw(RESULTS / "temperature.svg", found)
    print(json.dumps(found["shares"]))
