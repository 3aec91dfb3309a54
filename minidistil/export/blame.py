"""Which groups of layers cost most in int8, and which of them to leave in fp32."""

from minidistil.export import int8
from minidistil.export.gate import compare
from minidistil.export.held_out import HeldOut
from minidistil.export.session import Session

ITEMS = 200  # of those held out, on which groups are compared with each other
MOST = 4  # groups that are proposed


def _session(model, exclude):
    return Session(int8.quantised(model, exclude).SerializeToString())


def costs(graph, model, held, exclude):
    """Returns {group: what of the mean difference to ours goes if it stays fp32}, the largest first.

    Each group is left out in turn, and all others are quantised, on the first of the items that are held out.
    """
    part = HeldOut(held.what, held.items[:ITEMS], held.labels and held.labels[:ITEMS])
    candidates = [group for group in int8.groups(model) if group not in exclude]

    def mean(left_out):
        return compare(graph, {"int8": _session(model, left_out)}, part)["int8"].mean

    whole = mean(exclude)
    gains = {group: whole - mean((*exclude, group)) for group in candidates}
    return dict(sorted(gains.items(), key=lambda item: -item[1]))


def enough(graph, model, held, exclude, order, max_loss):
    """Returns (groups to leave in fp32, their Quality) that lose no more than max_loss, or (None, the last Quality).

    Groups are added in the given order, MOST at most.
    """
    for n in range(1, min(MOST, len(order)) + 1):
        chosen = (*exclude, *order[:n])
        quality = compare(graph, {"int8": _session(model, chosen)}, held)["int8"]
        if quality.within(max_loss):
            return chosen, quality
    return None, quality
