"""Random numbers as pure functions of (seed, index): no state, the same on every machine.

The second key is the stream: 1, 2 order of the blocks (data.py); 3 to 5 masks (masking.py); 6 dropout (train.py,
finetune.py); 7, 8 order of a task's batches (batches.py); 9 subset of its examples (tasks.py); 10, 11 augmentation
(distil.py); 12, 13 order of the sentences (sentences.py).
"""

import numpy as np


def mix(*keys):
    """Hashes integers or uint64 arrays, broadcast together, to uint64: a chain of splitmix64 (Steele et al. 2014)."""
    state = np.zeros(1, np.uint64)
    for key in keys:
        z = (state ^ np.asarray(key).astype(np.uint64)) + np.uint64(0x9E3779B97F4A7C15)  # arrays wrap silently
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        state = z ^ (z >> np.uint64(31))
    return state


def uniform(*keys):
    """Like `mix`, but float64 in the open interval (0, 1), so that the logarithm is finite."""
    return ((mix(*keys) >> np.uint64(11)).astype(np.float64) + 0.5) / 2.0**53


def permuted(index, n, *keys):
    """Returns where a random permutation of n, given by `keys`, maps each `index` (uint64 array, below n).

    A four-round Feistel network over the next power of four; a result of n or more is permuted again until it is below
    n (cycle walking, Black and Rogaway 2002). It shuffles any number of blocks without memory.
    """
    half = np.uint64(max(1, (int(n - 1).bit_length() + 1) // 2))
    low = (np.uint64(1) << half) - np.uint64(1)
    result = np.array(index, np.uint64)
    outside = np.arange(len(result))
    while len(outside):
        left, right = result[outside] >> half, result[outside] & low
        for r in range(4):
            left, right = right, left ^ (mix(*keys, r, right) & low)
        result[outside] = (left << half) | right
        outside = outside[result[outside] >= n]
    return result
