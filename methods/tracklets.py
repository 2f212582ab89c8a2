"""Batches of video: identities × tracklets × frames, a plan as those of `methods.plans`."""

from __future__ import annotations

import numpy as np
from jaxtyping import Int64

from methods.plans import Plan
from methods.random_streams import Stream


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
        labels: Identity of every frame.
        tracks: Tracklet of every frame.
        identities: P, the number of identities in a step.
        per_identity: T, the number of tracklets per identity.
        length: F, the number of frames per tracklet.
        seed, epoch: Seed of the run and number of the epoch.

    Returns:
        Plan of steps × P·T·F slots, with a column `track`.

    Raises:
        ValueError: There are fewer identities than P.

    Cost: O(N log N).
    """
    random = np.random.default_rng([seed, epoch, Stream.TRACKLETS])
    order = np.lexsort((tracks, labels))
    starts = np.flatnonzero(np.r_[True, np.diff(tracks[order]) != 0] | np.r_[True, np.diff(labels[order]) != 0])
    sizes = np.diff(np.r_[starts, len(order)])
    owners = labels[order[starts]]  # of every tracklet, ascending
    all_identities, first_track, num_tracks = np.unique(owners, return_index=True, return_counts=True)
    if len(all_identities) < identities:
        raise ValueError(
            f"batches of {identities} identities, but the training set has {len(all_identities)}: lower classes_per_batch"
        )
    epoch_identities = random.permutation(len(all_identities))[: len(all_identities) // identities * identities]
    drawn_tracks = first_track[epoch_identities, None] + random.integers(
        0, num_tracks[epoch_identities, None], (len(epoch_identities), per_identity)
    )
    drawn_tracks = drawn_tracks.ravel()
    # Every draw shuffles its tracklet's frames anew and takes the first F, around and around if need be.
    draw_of_frame = np.repeat(np.arange(len(drawn_tracks)), sizes[drawn_tracks])
    ends = np.cumsum(sizes[drawn_tracks])
    frame_in_track = np.arange(len(draw_of_frame)) - np.repeat(ends - sizes[drawn_tracks], sizes[drawn_tracks])
    frames = order[starts[drawn_tracks][draw_of_frame] + frame_in_track][
        np.lexsort((random.random(len(draw_of_frame)), draw_of_frame))
    ]
    frame_positions = (ends - sizes[drawn_tracks])[:, None] + np.arange(length) % sizes[drawn_tracks][:, None]
    ids = frames[frame_positions].reshape(-1, identities * per_identity * length)
    return Plan(ids, {"track": tracks[ids]})
