"""The learning rate as a function of the update."""

import math


def lr_at(update, total, peak, warmup):
    """Learning rate of update 0 ... total - 1: up to `peak` over the first `warmup` share, then down a line to zero.

    Neither the first nor the last update is wasted: the line starts one step above zero and would reach it at `total`.
    """
    rising = min(math.ceil(total * warmup), total)
    if update < rising:
        return peak * (update + 1) / rising
    return peak * (total - update) / (total - rising + (rising > 0))
