"""More examples for a teacher to label: copies of a task's own in which words are masked or exchanged.

A few thousand examples show a student little of what its teacher makes of other sentences, and one that is given a
probability instead of a label needs no true one. After Tang et al. 2019, arXiv 1903.12136, "Data augmentation for
distillation", without their part-of-speech tagger and n-grams.
"""

import numpy as np

from minidistil.rng import mix, uniform

MASKED, EXCHANGED = 0.1, 0.1  # share of the tokens, as Tang et al. have them


def altered(items, copies, tokenizer):
    """Returns `copies` altered versions of each item: first one of all of them, then a second one, and so on.

    items: (ids, types), int32 and int8 arrays (n,). A token becomes [MASK], or a random one out of all items, frequent
    ones more often; those that frame a text stay. A pure function of its arguments.
    """
    ids = np.concatenate([ids for ids, _ in items])  # (all tokens,)
    free = ~np.isin(ids, [tokenizer.cls_id, tokenizer.sep_id])
    words, place = ids[free], np.arange(len(ids))
    ends = np.cumsum([len(ids) for ids, _ in items])[:-1]
    result = []
    for copy in range(copies):
        draw = uniform(0, 10, copy, place)
        others = words[mix(0, 11, copy, place) % np.uint64(len(words))] if len(words) else ids
        changed = np.where(free & (draw < MASKED + EXCHANGED), others, ids)
        changed = np.where(free & (draw < MASKED), tokenizer.mask_id, changed).astype(ids.dtype)
        result += zip(np.split(changed, ends), (types for _, types in items), strict=True)
    return result
