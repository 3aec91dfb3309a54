"""Which tokens of a sequence are masked, and what stands in their place: a pure function of (seed, index, position).

Masking (Devlin et al. 2018, section 3.1): round(0.15 n) of a sequence's n tokens (or another share), never special
ones, drawn without replacement with weight count^-smoothing, which prefers rare words (as DistilBERT's released code
does): 80 % become [MASK], 10 % random, 10 % stay.
"""

import numpy as np

from kernels import IGNORE
from minidistil.rng import uniform

MASK_SHARE, REPLACED_BY_MASK, REPLACED_BY_RANDOM = 0.15, 0.8, 0.1


class Masking:
    """Masks tokens of sequences. `counts`: (V,) how often the text has each token; smoothing 0 masks uniformly."""

    def __init__(self, tokenizer, seed, counts=None, smoothing=0.0):
        self.tokenizer, self.seed, self.vocab_size = tokenizer, seed, len(tokenizer.vocab)
        counts = np.ones(self.vocab_size) if counts is None else np.maximum(counts, 1)
        self.weights = counts.astype(np.float64) ** -smoothing
        self.weights[tokenizer.special_ids] = 0.0

    def __call__(self, ids, index, wanted):
        """Returns (masked ids, labels), each (n, T) int64; labels are -100 where nothing is masked.

        ids: (n, T) int64. index: (n,) uint64, the number of each sequence in the run. wanted: (n,) int64, how many
        tokens to mask; a sequence with fewer regular tokens has fewer masks. Padding changes nothing of a sequence.
        """
        index, position = index[:, None], np.arange(ids.shape[1], dtype=np.uint64)[None]
        # Efraimidis and Spirakis 2006: the k smallest -log(u) / w are a weighted sample without replacement
        with np.errstate(divide="ignore"):
            keys = -np.log(uniform(self.seed, 3, index, position)) / self.weights[ids]  # (n, T), inf at special tokens
        last = (np.maximum(wanted, 1) - 1)[:, None]
        threshold = np.take_along_axis(np.partition(keys, np.unique(last), axis=1), last, axis=1)
        masked = (keys <= threshold) & np.isfinite(keys) & (wanted > 0)[:, None]
        labels = np.where(masked, ids, IGNORE)
        action = uniform(self.seed, 4, index, position)
        random_ids = (uniform(self.seed, 5, index, position) * self.vocab_size).astype(np.int64)
        ids = np.where(masked & (action < REPLACED_BY_MASK), self.tokenizer.mask_id, ids)
        replace = masked & (action >= REPLACED_BY_MASK) & (action < REPLACED_BY_MASK + REPLACED_BY_RANDOM)
        return np.where(replace, random_ids, ids), labels
