"""Streams of random numbers that methods draw from.

A generator is seeded from (seed, epoch, stream) or (seed, stream), so that plans of one epoch are independent of each other.
"""

from __future__ import annotations

from enum import IntEnum


class Stream(IntEnum):
    """The last word of a seed. The values are arbitrary, but fixed: another value would make another plan of an old run."""

    CLASS_BALANCED = 0x9A7
    COMBINE_SAMPLER = 0xC0B
    NUMBER_SAMPLER = 0x2B5
    UNIFORM_CLASSES = 0x6CA
    EACH_CLASS_ONCE = 0x3E1
    MMSI_HOLDOUT = 0x3E2
    SMART_MINING_TRIPLETS = 0x53A
    SMART_MINING_ORDER = 0x53B
    TRACKLETS = 0x7AC
