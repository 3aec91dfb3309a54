"""Distils a student with sentence-transformers, by the recipe of its own example.

    python benches/retention/peer.py TEXT... --teacher DIR --student-layers 3 --steps 500 --out DIR

The example drops layers of the teacher and learns its vectors by their mean squared error: AdamW without weight decay,
peak learning rate 1e-4, which rises in a tenth of the updates and then falls linearly, batches of 64, one pass over
unlabelled sentences, clipped at norm 1. Here the student has the layers that train.py copies, and the sentences are
those that data/prepare.py makes of the same texts, drawn by --seed. `seconds` include the teacher's vectors, which are
made only of the sentences that the updates use. Its Trainer needs two packages more and runs the same updates as
`old_fit`, which is used here. The last line of stdout is one JSON object: {"out", "steps", "seconds"}.

Source: sentence-transformers 5, examples/sentence_transformer/training/distillation/
model_distillation_layer_reduction.py; Reimers and Gurevych 2020, arXiv 2004.09813.
"""

import dataclasses
import json
import pathlib
import random
import sys
import time

import torch

if __name__ == "__main__":
    sys.path[0] = str(pathlib.Path(__file__).resolve().parents[2])

from data.sentence_split import sentences
from minidistil.cli import option, parse_args, run_script
from minidistil.device import choose_device
from minidistil.errors import UserError
from minidistil.precision import precision
from minidistil.student import parse_layers

BATCH, ENCODE_BATCH, LR, WARMUP, LENGTH = 64, 128, 1e-4, 0.1, 128  # LENGTH as --seq-len of the recipes of words


@dataclasses.dataclass
class Settings:
    text: str = option(dataclasses.MISSING, "files of text", nargs="+")
    teacher: str = option(None, "folder of the teacher", required=True)
    student_layers: str = option(None, "teacher layers to keep: a number (6) or a list (0,2,4) (default: half)")
    steps: int = option(None, "updates", required=True)
    seed: int = option(0, "seed of the sentences, their order and dropout")
    dtype: str = option("fp32", "precision of matrix products", choices=("fp32", "bf16", "fp16"))
    prefix: str = option("", "text before every sentence")
    out: str = option(None, "folder of the student", required=True)


def drawn(paths, n, seed):
    """Returns n sentences of the files in a random order, each once before any comes again."""
    texts = [s for path in paths for line in open(path, encoding="utf-8") for s in sentences(line)]
    texts, order = list(dict.fromkeys(texts)), random.Random(seed)
    return [text for _ in range(-(-n // len(texts))) for text in order.sample(texts, len(texts))][:n]


def distil(settings):
    """Trains and saves the student; returns the summary that the last line prints."""
    try:
        from sentence_transformers import InputExample, SentenceTransformer
        from sentence_transformers.sentence_transformer.losses import MSELoss
    except ImportError:
        raise UserError("sentence-transformers is not installed: pip install -r requirements-dev.txt") from None
    device = choose_device("auto")
    torch.manual_seed(settings.seed)
    in_fp32 = {"dtype": torch.float32}  # whatever the file holds: the library would train weights of two bytes
    teacher, student = (
        SentenceTransformer(settings.teacher, device=str(device), model_kwargs=in_fp32) for _ in range(2)
    )
    model = student[0].auto_model
    if not hasattr(getattr(model, "encoder", None), "layer"):
        raise UserError(
            f"{settings.teacher} has no encoder.layer, whose layers the example drops: leave this recipe out"
        )
    layers = parse_layers(settings.student_layers, len(model.encoder.layer))
    model.encoder.layer = torch.nn.ModuleList([model.encoder.layer[i] for i in layers])
    model.config.num_hidden_layers = len(layers)
    for each in (teacher, student):
        each.max_seq_length = min(LENGTH, each.max_seq_length or LENGTH)
    texts = [settings.prefix + text for text in drawn(settings.text, settings.steps * BATCH, settings.seed)]
    began = time.monotonic()
    autocast, _ = precision(settings.dtype, device)
    with autocast():
        vectors = teacher.encode(texts, batch_size=ENCODE_BATCH, show_progress_bar=False)
    examples = [InputExample(texts=[text], label=vector) for text, vector in zip(texts, vectors, strict=True)]
    student.old_fit(  # outside of autocast, which would keep its first copies of the weights for the whole training
        [(torch.utils.data.DataLoader(examples, batch_size=BATCH, shuffle=True), MSELoss(student))],
        epochs=1, warmup_steps=round(WARMUP * settings.steps), optimizer_params={"lr": LR}, weight_decay=0.0,
        use_amp=settings.dtype != "fp32", show_progress_bar=False,
    )  # fmt: skip
    seconds = time.monotonic() - began
    student.save(settings.out)
    return {"out": settings.out, "steps": settings.steps, "seconds": round(seconds, 1)}


def main(argv):
    print(json.dumps(distil(Settings(**parse_args(Settings, argv, __doc__))), separators=(",", ":")))


if __name__ == "__main__":
    run_script(main)
