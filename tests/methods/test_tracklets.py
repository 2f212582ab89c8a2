"""Video batches: who stands in them, how often, and that the draw depends on seed and epoch alone."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from methods.tracklets import tracklets


def make(sizes: list[list[int]], seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Identities and tracklets of frames in mixed order; `sizes[identity][tracklet]`."""
    labels = [i for i, of in enumerate(sizes) for n in of for _ in range(n)]
    numbers = np.random.default_rng(seed).permutation(100)[: sum(len(of) for of in sizes)].tolist()
    tracks = [numbers.pop() if k == 0 else -1 for of in sizes for n in of for k in range(n)]
    for at, track in enumerate(tracks):
        if track < 0:
            tracks[at] = tracks[at - 1]
    order = np.random.default_rng(seed).permutation(len(labels))
    return np.array(labels)[order], np.array(tracks)[order]


@settings(max_examples=60, deadline=None)
@given(
    sizes=st.lists(st.lists(st.integers(1, 12), min_size=1, max_size=4), min_size=3, max_size=8),
    identities=st.integers(1, 3),
    per_identity=st.integers(1, 3),
    length=st.integers(1, 9),
    epoch=st.integers(0, 3),
)
def test_batches(sizes: list[list[int]], identities: int, per_identity: int, length: int, epoch: int) -> None:
    labels, tracks = make(sizes)
    plan = tracklets(labels, tracks, identities, per_identity, length, 7, epoch)
    assert plan.ids.shape == (len(sizes) // identities, identities * per_identity * length)
    assert np.array_equal(plan.columns["track"], tracks[plan.ids])
    blocks = plan.ids.reshape(-1, per_identity, length)
    of = labels[blocks]
    assert (of == of[:, :1, :1]).all(), "a block is one identity"
    assert len(set(of[:, 0, 0])) == len(blocks), "every identity at most once an epoch"
    for tracklet in blocks.reshape(-1, length):
        (track,) = set(tracks[tracklet])
        size = int((tracks == track).sum())
        times = np.unique(tracklet, return_counts=True)[1]
        assert len(times) == min(size, length) and times.max() - times.min() <= (length > size), "frames repeat evenly"
    again = tracklets(labels, tracks, identities, per_identity, length, 7, epoch)
    assert np.array_equal(again.ids, plan.ids)


def test_draws_are_uniform_and_independent() -> None:
    """Over many epochs: of tracklets, of frames; the same tracklet drawn twice shows other frames."""
    labels, tracks = make([[8, 8, 8], [8, 8, 8]])
    plans = [tracklets(labels, tracks, 2, 2, 4, 0, epoch) for epoch in range(400)]
    assert len({p.ids.tobytes() for p in plans}) == 400
    ids = np.concatenate([p.ids for p in plans]).reshape(-1, 2, 4)
    shares = np.bincount(ids.ravel(), minlength=48) / ids.size
    np.testing.assert_allclose(shares, 1 / 48, rtol=0.35)
    of = tracks[ids[:, :, 0]]
    same = of[:, 0] == of[:, 1]
    assert 0.28 < same.mean() < 0.39
    assert np.mean([set(a) == set(b) for a, b in ids[same]]) < 0.1
    assert not np.array_equal(tracklets(labels, tracks, 2, 2, 4, 1, 0).ids, plans[0].ids)


def test_too_few_identities() -> None:
    with pytest.raises(
        ValueError, match="batches of 3 identities, but the training set has 2: lower classes_per_batch"
    ):
        tracklets(*make([[3], [4]]), 3, 2, 9, 0, 0)
