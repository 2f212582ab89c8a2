"""Batches of video: identities × tracklets × frames, a plan as those of `methods.plans`."""

from __future__ import annotations

import numpy as np
from jaxtyping import Int64

from methods.plans import Plan


def tracklets(
    labels: Int64[np.ndarray, " frames"],
    tracks: Int64[np.ndarray, " frames"],
    identities: int,
    per_identity: int,
    length: int,
    seed: int,
    epoch: int,
) -> Plan:
    """P identities a step, each with T tracklets of F frames; a tracklet's frames are consecutive slots.

    The sampler of OSM+CAA's video experiments (3 × 2 × 9): each of the T draws takes any tracklet of its identity, so that two
    may coincide; its frames are drawn without repeats, and repeat evenly where it has fewer than F. Every identity stands in
    an epoch once, in random order; those of an incomplete last batch are left out of it.

    Args:
        labels: identity of every frame.
        tracks: tracklet of every frame.
        identities: P.
        per_identity: T.
        length: F.
        seed, epoch: what the draw depends on.

    Returns:
        Plan of steps × P·T·F slots, with a column `track`.

    Raises:
        ValueError: there are fewer identities than P.

    Cost: O(N log N).
    """
    random = np.random.default_rng([seed, epoch, 0x7AC])
    order = np.lexsort((tracks, labels))
    starts = np.flatnonzero(np.r_[True, np.diff(tracks[order]) != 0] | np.r_[True, np.diff(labels[order]) != 0])
    sizes = np.diff(np.r_[starts, len(order)])
    owners = labels[order[starts]]  # of every tracklet, ascending
    people, first, counts = np.unique(owners, return_index=True, return_counts=True)
    if len(people) < identities:
        raise ValueError(
            f"batches of {identities} identities, but the training set has {len(people)}: lower classes_per_batch"
        )
    chosen = random.permutation(len(people))[: len(people) // identities * identities]
    drawn = first[chosen, None] + random.integers(0, counts[chosen, None], (len(chosen), per_identity))
    drawn = drawn.ravel()
    # Every draw shuffles its tracklet's frames anew and takes the first F, around and around if need be.
    draw = np.repeat(np.arange(len(drawn)), sizes[drawn])
    ends = np.cumsum(sizes[drawn])
    within = np.arange(len(draw)) - np.repeat(ends - sizes[drawn], sizes[drawn])
    frames = order[starts[drawn][draw] + within][np.lexsort((random.random(len(draw)), draw))]
    place = (ends - sizes[drawn])[:, None] + np.arange(length) % sizes[drawn][:, None]
    ids = frames[place].reshape(-1, identities * per_identity * length)
    return Plan(ids, {"track": tracks[ids]})
