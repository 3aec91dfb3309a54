"""Random numbers as a pure function of (seed, index): nothing to store, the same on every machine."""

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
    """Like `mix`, as float64 in (0, 1): never 0, so that its logarithm is finite."""
    return ((mix(*keys) >> np.uint64(11)).astype(np.float64) + 0.5) / 2.0**53


def permuted(index, n, *keys):
    """The place of each `index` (uint64 array, below n) in a random permutation of n that the keys name.

    A four-round Feistel network over the next power of four; what falls outside n walks on until it is inside
    (Black and Rogaway 2002). Shuffles any number of blocks in no memory.
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
