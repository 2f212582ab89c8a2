"""Re-identification against loops written from the definitions, and its exactness however the work is cut up."""

from __future__ import annotations

import itertools
import math
import tracemalloc
from dataclasses import fields, replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from jaxtyping import TypeCheckError

from pipeline.evaluation import tracklets
from pipeline.evaluation.reid import DISTRACTOR, JUNK, ReidRetrieval, ReidSet, match
from pipeline.evaluation.tracklets import TrackSums, pool_tracks


def oracle(queries: ReidSet, gallery: ReidSet, distractors="wrong", keep=10) -> ReidRetrieval:
    """One query and one gallery row at a time; the trapezoidal rule as a walk down the ranking."""
    sides = [[row.tolist() for row in side.embeddings.double()] for side in (queries, gallery)]
    norms = [[math.sqrt(math.fsum(x * x for x in row)) for row in side] for side in sides]
    result = []
    for i, row in enumerate(sides[0]):
        person, camera = int(queries.labels[i]), int(queries.cameras[i])
        order = []
        for j, other in enumerate(sides[1]):
            label = int(gallery.labels[j])
            same_view = label == person and int(gallery.cameras[j]) == camera
            if label == JUNK or same_view or (label == DISTRACTOR and distractors == "junk"):
                continue
            cosine = math.fsum(x * y for x, y in zip(row, other, strict=True)) / (norms[0][i] * norms[1][j])
            order.append((-cosine, j))
        ids = [j for _, j in sorted(order)]
        hits = [int(gallery.labels[j]) == person for j in ids]
        num_relevant, found, precision = sum(hits), 0, 0.0
        area, old_recall, old_precision = 0.0, 0.0, 1.0
        for rank, hit in enumerate(hits):
            found += hit
            precision += hit * found / (rank + 1)
            if num_relevant:
                recall = found / num_relevant
                area += (recall - old_recall) * (old_precision + found / (rank + 1)) / 2
                old_recall, old_precision = recall, found / (rank + 1)
        first = hits.index(True) if num_relevant else -1
        result.append((first, precision / max(num_relevant, 1), area, num_relevant, (ids + [-1] * keep)[:keep]))
    return ReidRetrieval(*(np.array(column) for column in zip(*result, strict=True)))


def assert_equal(got: ReidRetrieval, expected: ReidRetrieval, tolerance: float = 0.0) -> None:
    for field in fields(ReidRetrieval):
        a, b = getattr(got, field.name), getattr(expected, field.name)
        np.testing.assert_allclose(a, b, rtol=0, atol=tolerance if a.dtype == np.float64 else 0, err_msg=field.name)


def sightings(num: int, people: int, cameras: int, dim: int, seed: int, least_label: int) -> ReidSet:
    """Rows around a centre a person, a tenth of them scaled duplicates of others."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(least_label, people, (num,), generator=generator)
    centres = torch.randn(people, dim, generator=torch.Generator().manual_seed(99))
    rows = centres[labels.clamp(min=0)] + 0.9 * torch.randn(num, dim, generator=generator)
    copies = torch.randint(num, (2, num // 10), generator=generator)
    rows[copies[0]] = rows[copies[1]] * 2.0
    return ReidSet(rows, labels, torch.randint(cameras, (num,), generator=generator))


def case(dtype: torch.dtype = torch.float32) -> tuple[ReidSet, ReidSet]:
    """40 queries, ten of which are rows of the gallery of 300 as well; person 29 is seen by one camera only."""
    queries, gallery = sightings(40, 30, 3, 4, 0, 0), sightings(300, 30, 3, 4, 1, JUNK)
    known = torch.nonzero(gallery.labels >= 0)[:10, 0]
    for field in ("embeddings", "labels", "cameras"):
        getattr(queries, field)[:10] = getattr(gallery, field)[known]
    for side in (queries, gallery):
        side.cameras[side.labels == 29] = 1
    queries.labels[39], queries.cameras[39] = 29, 1
    return tuple(replace(side, embeddings=side.embeddings.to(dtype)) for side in (queries, gallery))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("distractors", ["wrong", "junk"])
def test_equals_the_loops(distractors, dtype):
    queries, gallery = case(dtype)
    expected = oracle(queries, gallery, distractors)
    result = match(queries, gallery, distractors=distractors)
    assert_equal(result, expected, 1e-13)
    assert (result.first_hit > 5).any() and (result.num_relevant > 5).any() and result.num_relevant[39] == 0


@settings(max_examples=80, deadline=None)
@given(
    looked_for=st.lists(st.tuples(st.integers(0, 3), st.integers(0, 2), st.integers(0, 1)), min_size=1, max_size=5),
    present=st.lists(
        st.tuples(st.integers(0, 3), st.integers(-2, 2), st.integers(0, 1), st.sampled_from([0.25, 1.0, 2.0])),
        min_size=1,
        max_size=14,
    ),
    distractors=st.sampled_from(["wrong", "junk"]),
    keep=st.integers(1, 16),
    memory_bytes=st.sampled_from([1, 2000, 10**6]),
)
def test_equals_the_loops_with_many_ties(looked_for, present, distractors, keep, memory_bytes):
    pool = torch.randn(4, 3, generator=torch.Generator().manual_seed(1))
    which, labels, cameras = (torch.tensor(column) for column in zip(*looked_for, strict=True))
    queries = ReidSet(pool[which], labels, cameras)
    which, labels, cameras, scale = (torch.tensor(column) for column in zip(*present, strict=True))
    gallery = ReidSet(pool[which] * scale[:, None], labels, cameras)
    result = match(queries, gallery, distractors=distractors, keep=keep, memory_bytes=memory_bytes)
    assert_equal(result, oracle(queries, gallery, distractors, keep), 1e-13)


def on_circle(*degrees: float) -> torch.Tensor:
    angles = torch.tensor(degrees).deg2rad()
    return torch.stack([angles.cos(), angles.sin()], dim=1)


def test_both_average_precisions_by_hand():
    """Nearest first: wrong, right, same camera, right, junk, distractor, right."""
    queries = ReidSet(on_circle(0.0), torch.tensor([5]), torch.tensor([1]))
    gallery = ReidSet(
        on_circle(70, 10, 20, 30, 40, 50, 60),
        torch.tensor([5, 3, 5, 5, 5, JUNK, -1]),
        torch.tensor([0, 1, 2, 1, 0, 0, 0]),
    )
    result = match(queries, gallery, keep=6)
    assert result.neighbours.tolist() == [[1, 2, 4, 6, 0, -1]]
    assert (result.first_hit.tolist(), result.num_relevant.tolist()) == ([1], [3])
    # Right rows at the ranks 1, 2 and 4: precision there 1/2, 2/3, 3/5, and just before them 0/1, 1/2, 2/4.
    assert result.average_precision[0] == pytest.approx((1 / 2 + 2 / 3 + 3 / 5) / 3, abs=1e-15)
    trapezoids = (1 / 2 + 0) / 2 + (2 / 3 + 1 / 2) / 2 + (3 / 5 + 2 / 4) / 2
    assert result.average_precision_trapezoidal[0] == pytest.approx(trapezoids / 3, abs=1e-15)
    # Without the distractor at the ranks 1, 2 and 3.
    result = match(queries, gallery, distractors="junk")
    assert result.average_precision[0] == pytest.approx((1 / 2 + 2 / 3 + 3 / 4) / 3, abs=1e-15)
    trapezoids = (1 / 2 + 0) / 2 + (2 / 3 + 1 / 2) / 2 + (3 / 4 + 2 / 3) / 2
    assert result.average_precision_trapezoidal[0] == pytest.approx(trapezoids / 3, abs=1e-15)


def test_summary_is_in_percent_and_leaves_out_queries_without_positive():
    """Query 0 finds its person first, query 1 at rank 2; that of query 2 is seen by its own camera only."""
    queries = ReidSet(on_circle(0, 0, 0), torch.tensor([1, 2, 3]), torch.tensor([0, 0, 0]))
    gallery = ReidSet(on_circle(1, 2, 3, 4), torch.tensor([1, 3, 0, 2]), torch.tensor([1, 0, 1, 1]))
    result = match(queries, gallery)
    assert result.first_hit.tolist() == [0, 3, -1]
    assert result.num_relevant.tolist() == [1, 1, 0]
    assert result.summary(cmc_at=(1, 3, 4)) == {
        "cmc@1": 50.0,
        "cmc@3": 50.0,
        "cmc@4": 100.0,
        "map": 62.5,
        "map_trapezoidal": 56.25,
        "queries": 2,
        "queries_without_positive": 1,
    }
    assert [key for key in result.summary() if "cmc" in key] == ["cmc@1", "cmc@5", "cmc@10", "cmc@20"]
    alone = match(replace(queries, labels=torch.tensor([7, 8, 9])), gallery)
    with pytest.raises(ValueError, match="none of the 3 queries has its person in the gallery, seen by another camera"):
        alone.summary()


def test_no_bit_depends_on_how_the_work_is_cut():
    queries, gallery = case()
    whole = match(queries, gallery)
    for memory_bytes in (1, 10**5, 10**9):
        assert_equal(match(queries, gallery, memory_bytes=memory_bytes), whole)
    for cuts in ([0, 20, 40], [0, 1, 1, 39, 40]):
        parts = [match(queries, gallery, part=slice(a, b)) for a, b in itertools.pairwise(cuts)]
        assert_equal(ReidRetrieval.concatenate(parts), whole)
        assert ReidRetrieval.concatenate(parts).summary() == whole.summary()
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        assert_equal(match(queries, gallery, memory_bytes=10**5), whole)
    finally:
        torch.set_num_threads(threads)


def test_float64_decides_what_float32_cannot_see():
    """The right rows' cosines differ from the others' by 1e-12, in an order that the gallery's does not tell."""
    generator = torch.Generator().manual_seed(0)
    rank = torch.randperm(60, generator=generator)
    cosine = 0.9 - 1e-12 * rank.double()
    rows = torch.stack([cosine, (1 - cosine**2).sqrt()], dim=1)
    queries = ReidSet(torch.tensor([[1.0, 0.0]], dtype=torch.float64), torch.tensor([0]), torch.tensor([0]))
    result = match(queries, ReidSet(rows, (rank % 7 != 3).long(), torch.ones(60, dtype=torch.int64)), keep=60)
    assert rank[result.neighbours[0]].tolist() == list(range(60))
    assert result.first_hit.tolist() == [3]
    precisions = [(i + 1) / (r + 1) for i, r in enumerate(range(3, 60, 7))]
    assert result.average_precision[0] == pytest.approx(sum(precisions) / len(precisions), abs=1e-14)


def test_memory_is_bounded():
    """600 x 4,000 similarities in float64 would take 19 MB."""
    ids = torch.arange(4000)
    rows = torch.randn(4000, 4, generator=torch.Generator().manual_seed(0))
    gallery = ReidSet(rows, ids // 8, ids % 4)
    queries = ReidSet(*(getattr(gallery, f.name)[:600] for f in fields(ReidSet)))
    match(queries, gallery, part=slice(0, 2))
    tracemalloc.start()
    try:
        match(queries, gallery, memory_bytes=4 * 2**20)
        assert tracemalloc.get_traced_memory()[1] < 8 * 2**20
    finally:
        tracemalloc.stop()


def test_bad_input_is_refused():
    ones, labels = torch.ones(3, 2), torch.tensor([0, 1, 2])
    good = ReidSet(ones, labels, labels)
    for queries, gallery, message in [
        (replace(good, labels=labels - 1), good, "got label -1 in row 0 of the queries: expected 0 or more"),
        (good, replace(good, labels=labels - 3), "got label -3 in row 0 of the gallery: expected -2 or more"),
        (good, replace(good, embeddings=ones * math.nan), "3 of 3 gallery rows are zero or not finite"),
        (replace(good, embeddings=ones * 0), good, "3 of 3 queries rows are zero or not finite"),
        (replace(good, embeddings=torch.ones(3, 4)), good, "expected the same dimension"),
        (replace(good, embeddings=ones.half()), good, "got queries torch.float16"),
    ]:
        with pytest.raises(ValueError, match=message):
            match(queries, gallery)
    with pytest.raises(ValueError, match="keep=0"):
        match(good, good, keep=0)
    with pytest.raises((ValueError, TypeCheckError)):
        match(good, good, distractors="ignored")
    with pytest.raises((ValueError, TypeCheckError)):
        match(replace(good, cameras=labels[:2]), good)


def frames() -> tuple[torch.Tensor, np.ndarray]:
    """600 frames of 12 tracklets of 1 to about 100 frames, mixed."""
    generator = np.random.default_rng(0)
    tracks = np.concatenate([np.arange(12), (12 * generator.random(588) ** 2).astype(np.int64)]) * 1000 - 3
    rows = torch.from_numpy(generator.normal(0.3, 1, (600, 5)).astype(np.float32))
    return rows, tracks


def test_tracklets_are_means_of_their_frames():
    rows, tracks = frames()
    found, pooled = pool_tracks(rows, tracks)
    assert found.tolist() == sorted(set(tracks.tolist())) and len(found) == 12
    for track, got in zip(found, pooled, strict=True):
        own = [row.tolist() for row, number in zip(rows.double(), tracks, strict=True) if number == track]
        mean = [math.fsum(column) / len(own) for column in zip(*own, strict=True)]
        length = math.sqrt(math.fsum(x * x for x in mean))
        assert got.tolist() == pytest.approx([x / length for x in mean], abs=1e-14)


def test_tracklets_in_batches_and_on_ranks(monkeypatch):
    rows, tracks = frames()
    found, pooled = pool_tracks(rows, tracks)
    in_batches = TrackSums.empty(found[::-1].copy(), 5)
    for start in range(0, 600, 70):
        in_batches.add(rows[start : start + 70], tracks[start : start + 70])
    assert torch.equal(in_batches.rows(), pooled)
    monkeypatch.setattr(tracklets, "_FRAMES_PER_BLOCK", 7)
    assert torch.equal(pool_tracks(rows, tracks)[1], pooled)

    ranks = [TrackSums.empty(found, 5) for _ in range(3)]
    for rank, part in zip(ranks, (slice(0, 5), slice(5, 5), slice(5, 600)), strict=True):
        rank.add(rows[part], tracks[part])
    total = TrackSums(found, sum(r.sums for r in ranks), sum(r.counts for r in ranks))
    assert (total.rows() - pooled).abs().max() < 1e-12
    assert total.counts.tolist() == [int((tracks == track).sum()) for track in found]


def test_bad_frames_are_refused():
    rows, tracks = torch.ones(4, 2), np.array([3, 3, 8, 9])
    sums = TrackSums.empty(np.array([3, 8]), 2)
    with pytest.raises(ValueError, match="got a frame of track 9: expected one of 2 others"):
        sums.add(rows, tracks)
    with pytest.raises((ValueError, TypeCheckError)):
        sums.add(rows, tracks[:3])
    with pytest.raises(ValueError, match=r"got frames \(3, 4\): expected \(3, 2\)"):
        sums.add(torch.ones(3, 4), tracks[:3])
    sums.add(rows[:2], tracks[:2])
    with pytest.raises(ValueError, match="1 of 2 tracks have no frame, the first is track 8"):
        sums.rows()
    for bad in (math.nan, math.inf, 0.0):
        with pytest.raises(
            ValueError, match="2 of 3 tracks have a mean that is zero or not finite, the first is track 8"
        ):
            pool_tracks(torch.tensor([[1.0, 1.0], [1.0, 1.0], [bad, 0.0], [bad, 0.0]]), tracks)
    with pytest.raises(ValueError, match="got no tracks"):
        pool_tracks(torch.ones(0, 2), np.array([], np.int64))
