"""Continues a text with a causal model, one token after the other."""

import torch


@torch.no_grad()
def continuation(model, ids, n, temperature=1.0, k=0, seed=0, end=None):
    """Returns at most n new ids after `ids` (a list), without `end`, at which the text is over.

    Each token is drawn from softmax(logits / temperature) over the k likeliest (0: all); at temperature 0 it is the
    likeliest. No keys and values are kept: a token costs a pass over the last `positions` tokens.
    """
    generator, ids, first = torch.Generator().manual_seed(seed), list(ids), len(ids)
    while len(ids) < first + n:
        hidden = model(torch.tensor([ids[-model.config.positions :]]))[:, -1]
        logits, indices = model.logits(hidden)[0].double().topk(min(k, model.words) if k else model.words)
        chosen = 0  # the likeliest
        if temperature:
            chosen = torch.multinomial(torch.softmax((logits - logits[0]) / temperature, -1), 1, generator=generator)
        token = indices[chosen].item()
        if token == end:
            break
        ids.append(token)
    return ids[first:]
