"""Length-bucketed batches: little padding, in an order that is a pure function of (seed, epoch).

An item is (ids, types): token ids and segment numbers, two lists or arrays of equal length.
"""

import numpy as np
import torch

from minidistil.precision import precision
from minidistil.rng import mix

WINDOW = 50  # batches in a window that is sorted by length: enough for little padding, few enough for random batches
TOKENS = {"cuda": 8192, "cpu": 512}  # in a batch of `predict`; on a CPU its activations must fit the caches (LOG.md)


def encode_pair(tokenizer, first, second, T):
    """Returns the item [CLS] first [SEP], or [CLS] first [SEP] second [SEP], of at most T tokens.

    RoBERTa has two [SEP] between the texts, and a single token type. Truncation removes tokens from the end of the
    longer text, as in transformers; of an odd number it keeps one more.
    """
    a, b = tokenizer.encode(first), [] if second is None else tokenizer.encode(second)
    between = [tokenizer.sep_id] * tokenizer.pair_separators
    room = T - 2 - (second is not None and len(between))
    keep = max(room - len(a), room - room // 2) if len(b) >= len(a) else room // 2
    keep = min(keep, len(b))  # of the second
    a, b = a[: room - keep], b[:keep]
    if second is None:
        return [tokenizer.cls_id, *a, tokenizer.sep_id], [0] * (len(a) + 2)
    ids = [tokenizer.cls_id, *a, *between, *b, tokenizer.sep_id]
    return ids, [0] * (len(a) + 1 + len(between)) + [tokenizer.second_type] * (len(b) + 1)


def encode_apart(tokenizer, first, second, T):
    """Returns the item of texts that are encoded one by one: [CLS] first [SEP], then [CLS] second [SEP] of type 1.

    Each has at most T tokens.
    """
    texts = [first] if second is None else [first, second]
    rows = [[tokenizer.cls_id, *tokenizer.encode(text)[: T - 2], tokenizer.sep_id] for text in texts]
    return sum(rows, []), [k for k, row in enumerate(rows) for _ in row]


def batches(lengths, batch, seed, epoch):
    """Returns one epoch: a list of index arrays of `batch` items of similar length; one may be smaller."""
    n = len(lengths)
    order = np.argsort(mix(seed, 7, epoch, np.arange(n)), kind="stable")
    parts = []
    for window in np.split(order, range(batch * WINDOW, n, batch * WINDOW)):
        window = window[np.argsort(lengths[window], kind="stable")]
        parts += [window[i : i + batch] for i in range(0, len(window), batch)]
    return [parts[i] for i in np.argsort(mix(seed, 8, epoch, np.arange(len(parts))), kind="stable")]


def padded_length(n):
    """Returns the tokens of a row in which the longest item has n: a multiple of 8."""
    return -(-n // 8) * 8


def padded(items, chosen, pad_id, device):
    """Returns (ids, mask, types), each (B, T) on `device`; mask is True at real tokens, T a multiple of 8."""
    T = padded_length(max(len(items[i][0]) for i in chosen))
    ids = np.full((len(chosen), T), pad_id, np.int64)
    mask, types = np.zeros((len(chosen), T), bool), np.zeros((len(chosen), T), np.int64)
    for row, i in enumerate(chosen):
        n = len(items[i][0])
        ids[row, :n], types[row, :n], mask[row, :n] = *items[i], True
    return tuple(torch.from_numpy(a).to(device) for a in (ids, mask, types))


def predict_shared(model, items, pad_id, device, dtype, ranks):
    """Returns what `predict` does on every rank, each of which computes its share of the items."""
    results = [None] * len(items)
    for rank, own in enumerate(ranks.gather(predict(model, items[ranks.rank :: ranks.size], pad_id, device, dtype))):
        results[rank :: ranks.size] = own
    return results


@torch.no_grad()
def predict(model, items, pad_id, device, dtype="fp32", tokens=None):
    """Returns a model's logits for each item, fp32 numpy arrays: (K,) of a classifier, (2, T) of a reader.

    Batches have about `tokens` tokens, the longest items first, so that memory runs out in the first batch or never.
    dtype, by name, is the precision of matrix products; autocast casts weights that require gradients once, and keeps
    them until its context ends.
    """
    training, results, done = model.training, [None] * len(items), 0
    model.eval()
    tokens = tokens or TOKENS[device.type]
    order = np.argsort([-len(ids) for ids, _ in items], kind="stable")
    autocast, _ = precision(dtype, device)
    with autocast():
        while done < len(items):
            chosen = order[done : done + max(1, tokens // len(items[order[done]][0]))]
            done += len(chosen)
            logits = model(*padded(items, chosen, pad_id, device)).float().cpu().numpy()
            for row, i in enumerate(chosen):
                results[i] = logits[row] if logits.ndim == 2 else logits[row][:, : len(items[i][0])].copy()
    model.train(training)
    return results
