"""Counted randomness: every draw comes from a generator that is seeded by where in the run it happens.

The seed is a hash of (run seed, stream name, iteration, rank), so no generator state has to be saved: a resumed run
that knows its counters draws what the uninterrupted run would have drawn.
"""

import hashlib
import json
from operator import index

import torch


def seed_sequence(seed: int, stream: str, iteration: int, rank: int = 0) -> int:
    """The seed of one stream at one iteration, for numpy, environments and other third parties.

    Args:
        seed: the run's seed.
        stream: what the draws are for, e.g. `"rollout"`; different names are independent.
        iteration: training iteration.
        rank: data-parallel rank.

    Returns:
        An integer in [0, 2**63), the same in every interpreter and on every machine.

    Raises:
        TypeError: if seed, iteration or rank is not an integer.
    """
    key = json.dumps([index(seed), stream, index(iteration), index(rank)])
    return int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), "big") >> 1


def generator(seed: int, stream: str, iteration: int, rank: int = 0) -> torch.Generator:
    """A fresh CPU generator for one stream at one iteration; the arguments are those of `seed_sequence`.

    Torch's CPU generator keeps the low 32 bits of its seed: two streams coincide with probability 2**-32.

    Example:
        >>> noise = torch.randn(3, generator=generator(seed=0, stream="rollout", iteration=12))
    """
    return torch.Generator().manual_seed(seed_sequence(seed, stream, iteration, rank))
