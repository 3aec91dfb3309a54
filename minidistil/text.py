"""The text of a run of train.py: the sequences of an update, and what is held out.

A packed corpus gives full sequences (data.py), one of sentences a sentence a row (sentences.py).
"""

from minidistil.data import MASK_SHARE, Sequences
from minidistil.evaluate import HeldOut, HeldOutVectors
from minidistil.sentences import Sentences

EVAL_SEED = 20191002  # of the held-out masks, the same in every run


def training_sequences(corpus, T, G, tokenizer, seed, objective, causal, smoothing, mask_share):
    """Returns the Sequences or Sentences of updates of G; those of sentence vectors alone are not masked."""
    if corpus.prefix is None:
        return Sequences(corpus.train, T, tokenizer, seed, corpus.counts, smoothing, True, mask_share, causal)
    masking = None if objective.vectors_only else (corpus.counts, smoothing, mask_share)
    return Sentences(corpus.train, corpus.train_ends, T, G, tokenizer, seed, masking, shuffle=True)


def open_held_out(corpus, T, tokens, tokenizer, objective, causal, teacher, pooling, device):
    """Returns HeldOut, or HeldOutVectors where the objective has vectors, on about so many held-out `tokens`.

    Masks are fixed and uniform. A teacher whose head is fresh knows no words to compare with.
    """
    words_of = None if getattr(teacher, "fresh_head", False) else teacher
    if corpus.prefix is None:
        val = Sequences(corpus.val, T, tokenizer, EVAL_SEED, causal=causal)
        n = min(val.per_epoch, max(1, tokens // T))
        return HeldOut(*val.batch(0, n), words_of, device)

    def batch(masking):
        val = Sentences(corpus.val, corpus.val_ends, T, 1, tokenizer, EVAL_SEED, masking)
        return val.batch(0, min(val.per_epoch, max(1, int(tokens / val.mean_length))))

    words = None
    if not objective.vectors_only:
        ids, labels, mask = batch((None, 0.0, MASK_SHARE))
        words = HeldOut(ids, labels, words_of, device, mask=mask)
    if not objective.alpha_emb:
        return words
    ids, _, mask = batch(None)
    return HeldOutVectors(ids, mask, teacher, pooling, words, device)
