"""Corpus of sentences -> padded batches of sentences of similar length: a pure function of seed and index.

`data/prepare.py --sentences` writes train.bin as one stream, sentence [SEP] sentence [SEP] ..., and train.ends.bin, the
index behind each [SEP]. A row is [CLS] + at most T - 2 tokens of a sentence + [SEP], padded on the right.

Update u uses sentences u * G ... (u + 1) * G - 1 of the run, for any split over micro-batches and ranks, and all parts
of it are padded to the same length, which is the update's.
"""

import numpy as np

from kernels import IGNORE
from minidistil.errors import UserError
from minidistil.masking import Masking
from minidistil.rng import mix, permuted

WINDOW = 50  # updates in a window that is sorted by length: enough for little padding, few enough for random batches
SAMPLE = 4096  # sentences that mean_length is estimated from


class Sentences:
    """Sentences of a corpus as batches, G to an update, of at most T tokens; `batch(first, n)` is a pure function.

    tokens, ends: the TokenFiles of a split. masking: None, or (counts, smoothing, mask_share) as of Sequences.
    label_share: the share of tokens with a label. per_epoch: how many sentences an epoch uses, a multiple of G.
    mean_length: tokens of a sentence with [CLS] and [SEP], after the cut at T, estimated from an even sample.

    With `shuffle`, each epoch has a new permutation of the sentences and leaves out the last ones of it, fewer than G.
    Each window of WINDOW updates is sorted by length and cut into updates, which come in a random order. Without
    (evaluation), sentence g is sentence g of the file, and rows are padded to the longest of the n that were asked for.
    Raises UserError where there are fewer than G sentences to shuffle.
    """

    causal = False

    def __init__(self, tokens, ends, T, G, tokenizer, seed, masking=None, shuffle=False):
        self.tokens, self.ends, self.T, self.G = tokens, ends, T, G
        self.tokenizer, self.seed, self.shuffle = tokenizer, seed, shuffle
        counts, smoothing, self.label_share = masking or (None, 0.0, 0.0)
        self.masking = Masking(tokenizer, seed, counts, smoothing) if masking else None
        self.per_epoch = len(ends) // G * G
        if shuffle and not self.per_epoch:
            enough = f"take a --batch x --accum of at most {len(ends)}, or more text"
            raise UserError(f"the corpus has {len(ends)} sentences, fewer than the {G} of an update: {enough}")
        sample = np.linspace(0, len(ends) - 1, min(len(ends), SAMPLE)).astype(np.int64)
        self.mean_length = float(self._places(sample)[:, 1].mean())
        self._window = None, None  # the last one's (epoch, number) and places: only a cache

    def batch(self, first, n):
        """Returns (ids, labels, mask) of sentences first ... first + n - 1: (n, T') int64, int64, bool.

        T' is a multiple of 8, or T; labels are -100 where there is none; mask is True at tokens, False at padding.
        """
        index = np.arange(first, first + n, dtype=np.uint64)
        if self.shuffle:
            updates = range(first // self.G, (first + n - 1) // self.G + 1)
            places = np.concatenate([self._update(u) for u in updates])
        else:
            places = self._places(index.astype(np.int64))
        T = min(self.T, -(-int(places[:, 1].max()) // 8) * 8)
        if self.shuffle:
            places = places[first % self.G :][:n]
        mask = np.arange(T)[None] < places[:, 1:]
        ids = np.full((n, T), self.tokenizer.pad_id, np.int64)
        ids[:, 0] = self.tokenizer.cls_id
        for row, (start, length) in enumerate(places.tolist()):
            ids[row, 1 : length - 1] = self.tokens[start : start + length - 2]
            ids[row, length - 1] = self.tokenizer.sep_id
        if self.masking is None:
            return ids, np.full((n, T), IGNORE, np.int64), mask
        wanted = np.maximum(np.rint(self.label_share * places[:, 1]), 1).astype(np.int64)
        return *self.masking(ids, index, wanted), mask

    def _update(self, u):
        """Returns the places of update u's sentences, (G, 2)."""
        epoch, u = divmod(u, self.per_epoch // self.G)
        number, u = divmod(u, WINDOW)
        key, places = self._window
        if key != (epoch, number):
            places = self._sorted_window(epoch, number)
            self._window = (epoch, number), places
        return places[u]

    def _sorted_window(self, epoch, number):
        """Returns the places of a window's sentences, (updates, G, 2), in the order of use."""
        first = number * WINDOW * self.G
        position = np.arange(first, min(first + WINDOW * self.G, self.per_epoch), dtype=np.uint64)
        places = self._places(permuted(position, len(self.ends), self.seed, 12, epoch).astype(np.int64))
        updates = places[np.argsort(places[:, 1], kind="stable")].reshape(-1, self.G, 2)
        return updates[np.argsort(mix(self.seed, 13, epoch, number, np.arange(len(updates))), kind="stable")]

    def _places(self, sentences):
        """Returns (first token, length with [CLS] and [SEP] and cut at T) of sentences of the file, (n, 2) int64."""
        places = np.empty((len(sentences), 2), np.int64)
        for row, s in enumerate(sentences.tolist()):
            start, end = self.ends[s - 1 : s + 1] if s else (0, self.ends[:1][0])
            places[row] = start, min(end - start + 1, self.T)
        return places
