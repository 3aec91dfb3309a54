"""The text of a run of train.py: its corpus, the sequences of an update, and what is held out.

A packed corpus gives full sequences (data.py), one of sentences a sentence a row (sentences.py).
"""

from minidistil.data import MASK_SHARE, Corpus, Sequences
from minidistil.evaluate import HeldOut, HeldOutVectors
from minidistil.sentences import Sentences

EVAL_SEED = 20191002  # of the held-out masks, the same in every run


def open_corpus(folder, tokenizer, tokenizer_folder, is_demo=False):
    """Opens the corpus in `folder`; if None, prepares (once) and opens the docs corpus, tokenised with `tokenizer`."""
    if folder is None:
        if not is_demo:
            print(
                f"no --data: training on the docs corpus with the vocabulary of {tokenizer_folder}; for the published "
                "result take Wikipedia + books: python data/prepare.py wikipedia:enwiki-latest-pages-articles.xml.bz2 "
                f"BOOKS_FOLDER --vocab {tokenizer_folder} --out data/wikibooks, then add --data data/wikibooks",
                flush=True,
            )
        from data.cached import docs_corpus

        folder = docs_corpus(tokenizer.digest, tokenizer_folder)
    corpus = Corpus(folder)
    corpus.check_tokenizer(tokenizer, tokenizer_folder)
    return corpus


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
