"""Shuffled orders that need no memory: the row at a position is a pure function of (seed, stream, epoch, position)."""

from __future__ import annotations

import hashlib

import numpy as np
from numpy.typing import NDArray

U64 = np.uint64
_ROUNDS = 6


def name_key(name: str) -> int:
    """A stable 64-bit number for a name."""
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "little")


def mix(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Finaliser of splitmix64 (Steele, Lea and Flood 2014): every input bit changes every output bit."""
    x = (x ^ (x >> U64(30))) * U64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> U64(27))) * U64(0x94D049BB133111EB)
    return x ^ (x >> U64(31))


def shuffled(
    seed: int, key: NDArray[np.uint64] | int, position: NDArray[np.int64], size: NDArray[np.int64] | int
) -> NDArray[np.int64]:
    """Rows at `position` of endless shuffled streams.

    Stream i has `size[i]` rows and the name `key[i]`; its positions 0 .. size-1 are one epoch, in which every row
    comes exactly once, and each epoch has an order of its own. A Feistel network on the next even number of bits
    (Luby and Rackoff 1988) that is walked until it lands below `size` (Black and Rogaway 2002).
    """
    position = np.asarray(position, dtype=np.int64)
    size = np.broadcast_to(np.asarray(size, dtype=np.int64), position.shape)
    epoch = (position // size).astype(U64)
    with np.errstate(over="ignore"):
        draw = mix(epoch + mix(np.array(seed % 2**64, dtype=U64)))  # mixed, or seed 1 would begin with seed 0's second epoch
        key = mix(np.broadcast_to(np.asarray(key, dtype=U64), position.shape) + draw)
        half = ((np.ceil(np.log2(np.maximum(size, 2))).astype(np.int64) + 1) // 2).astype(U64)
        index = (position % size).astype(U64)
        walking = np.arange(len(position))
        while len(walking):
            index[walking] = _feistel(index[walking], key[walking], half[walking])
            walking = walking[index[walking] >= size[walking].astype(U64)]
    return index.astype(np.int64)


def _feistel(index: NDArray[np.uint64], key: NDArray[np.uint64], half: NDArray[np.uint64]) -> NDArray[np.uint64]:
    mask = (U64(1) << half) - U64(1)
    left, right = index >> half, index & mask
    for r in range(_ROUNDS):
        left, right = right, left ^ (mix(right + key + U64(r * 0x9E3779B97F4A7C15 % 2**64)) & mask)
    return (left << half) | right
