"""k-reciprocal re-ranking against the paper's formulas as dense loops."""

from __future__ import annotations

import itertools
import math
import tracemalloc

import numpy as np
import pytest
import torch

from pipeline.evaluation import reranking
from pipeline.evaluation.reid import ReidRetrieval, ReidSet, match
from pipeline.evaluation.reranking import KNearestAndFarthest, Reranking
from tests.pipeline.evaluation.test_reid import assert_equal


def oracle(queries, gallery, k1, k2, weight, more_than=True) -> np.ndarray:
    """d* [queries, gallery] with sets and sums over all rows; `more_than`: two thirds are not enough."""
    rows = [row.tolist() for row in torch.cat([queries, gallery]).double()]
    norms = [math.sqrt(math.fsum(x * x for x in row)) for row in rows]
    everyone = range(len(rows))
    distance = []
    for i in everyone:
        cosines = [
            math.fsum(a * b for a, b in zip(rows[i], rows[j], strict=True)) / (norms[i] * norms[j]) for j in everyone
        ]
        distance.append([1 - cosine for cosine in cosines])
    ranked = [[i, *sorted(set(everyone) - {i}, key=lambda j, i=i: (distance[i][j], j))] for i in everyone]

    def reciprocal(i, k):
        return {j for j in ranked[i][: k + 1] if i in ranked[j][: k + 1]}

    encoded = []
    for i in everyone:
        members = set(own := reciprocal(i, k1))
        for q in own:
            others = reciprocal(q, k1 // 2)
            inside, needed = 3 * len(own & others), 2 * len(others)
            if inside > needed or (inside == needed and not more_than):
                members |= others
        row = [math.exp(-distance[i][j] / max(distance[i])) if j in members else 0.0 for j in everyone]
        encoded.append(np.array(row) / sum(row))
    expanded = [sum(encoded[j] for j in ranked[i][:k2]) / k2 for i in everyone]
    result = np.empty((len(queries), len(gallery)))
    for q, g in itertools.product(range(len(queries)), range(len(gallery))):
        a, b = expanded[q], expanded[len(queries) + g]
        jaccard = 1 - np.minimum(a, b).sum() / np.maximum(a, b).sum()
        result[q, g] = (1 - weight) * jaccard + weight * distance[q][len(queries) + g] / max(distance[q])
    return result


def people(num: int, num_people: int, seed: int, dtype: torch.dtype = torch.float32) -> tuple:
    """Rows around a centre a person, some of them scaled duplicates; and the persons."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(num_people, (num,), generator=generator)
    centres = torch.randn(num_people, 6, generator=torch.Generator().manual_seed(9))
    rows = centres[labels] + 0.8 * torch.randn(num, 6, generator=generator)
    copies = torch.randint(num, (2, num // 6), generator=generator)
    rows[copies[0]] = rows[copies[1]] * 2.0
    return rows.to(dtype), labels


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("k1", "k2", "weight"), [(20, 6, 0.3), (7, 3, 0.85), (6, 1, 0.0), (1, 2, 0.5), (59, 60, 1)])
def test_equals_the_loops(k1, k2, weight, dtype):
    queries, gallery = people(12, 8, 0, dtype)[0], people(48, 8, 1, dtype)[0]
    result = Reranking.of(queries, gallery, k1=k1, k2=k2, weight=weight)
    np.testing.assert_allclose(
        -result.block(np.arange(12)), oracle(queries, gallery, k1, k2, weight), rtol=0, atol=1e-12
    )


def test_two_thirds_are_not_enough():
    queries, gallery = people(12, 8, 0)[0], people(48, 8, 1)[0]
    expected, of_the_paper = (oracle(queries, gallery, 7, 3, 0.3, more_than) for more_than in (True, False))
    assert np.abs(expected - of_the_paper).max() > 0.01
    result = -Reranking.of(queries, gallery, k1=7, k2=3).block(np.arange(12))
    np.testing.assert_allclose(result, expected, rtol=0, atol=1e-12)


def test_no_bit_depends_on_how_the_work_is_cut(monkeypatch):
    queries, gallery = people(20, 12, 0)[0], people(70, 12, 1)[0]
    everyone = torch.cat([queries, gallery])
    whole = Reranking.of(queries, gallery).block(np.arange(20))
    cuts = [slice(a, b) for a, b in itertools.pairwise([0, 13, 13, 60, 90])]
    parts = [KNearestAndFarthest.of(everyone, part=cut, memory_bytes=10**5) for cut in cuts]
    shared = Reranking.of(queries, gallery, neighbours=KNearestAndFarthest.concatenate(parts))
    np.testing.assert_array_equal(shared.block(np.arange(20)), whole)
    np.testing.assert_array_equal(shared.block(np.array([17, 3])), whole[[17, 3]])
    monkeypatch.setattr(reranking, "FARTHEST_BLOCK_ROWS", 7)
    for entries in (1, 300):
        monkeypatch.setattr(reranking, "_CHUNK_ENTRIES", entries)
        again = Reranking.of(queries, gallery)
        np.testing.assert_array_equal(again.block(np.arange(20)), whole)
        np.testing.assert_array_equal(again.block(np.array([17, 3])), whole[[17, 3]])


def test_matches_are_ranked_by_it():
    """The filter comes after it: junk and rows of the same camera are neighbours like others."""
    (queries, labels), (gallery, gallery_labels) = people(20, 12, 0), people(70, 12, 1)
    looked_for = ReidSet(queries, labels, torch.arange(20) % 2)
    present = ReidSet(gallery, gallery_labels - 2, torch.arange(70) % 2)
    again = Reranking.of(queries, gallery, k1=7, k2=3, weight=0.5)
    result = match(looked_for, present, reranking=again)
    distance = -again.block(np.arange(20))
    for i in range(20):
        seen = (present.labels == labels[i]) & (present.cameras == looked_for.cameras[i])
        order = [j for j in np.lexsort((np.arange(70), distance[i])) if present.labels[j] != -2 and not seen[j]]
        hits = [int(present.labels[j]) == int(labels[i]) for j in order]
        assert result.neighbours[i].tolist() == order[:10]
        assert result.first_hit[i] == (hits.index(True) if any(hits) else -1)
        precisions = [sum(hits[: r + 1]) / (r + 1) for r, hit in enumerate(hits) if hit]
        assert result.average_precision[i] == pytest.approx(sum(precisions) / max(1, len(precisions)), abs=1e-14)
    plain = match(looked_for, present)
    assert (result.neighbours != plain.neighbours).any()
    parts = [match(looked_for, present, reranking=again, part=slice(a, b)) for a, b in ((0, 7), (7, 20))]
    assert_equal(ReidRetrieval.concatenate(parts), result)


def test_it_improves_the_ranking_of_clusters():
    """Rows of a person have the same neighbours, even where noise keeps two of them apart."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(300) % 30
    rows = torch.randn(30, 16, generator=generator)[labels] + 0.9 * torch.randn(300, 16, generator=generator)
    looked_for = ReidSet(rows[:60], labels[:60], torch.zeros(60, dtype=torch.int64))
    present = ReidSet(rows[60:], labels[60:], torch.ones(240, dtype=torch.int64))
    plain = match(looked_for, present).summary()["map"]
    again = match(looked_for, present, reranking=Reranking.of(rows[:60], rows[60:], k1=8, k2=3)).summary()["map"]
    assert plain + 5 < again < 100


@pytest.mark.parametrize("point", [[0.3] * 7, [0.0, 1.0, 0.0]])
def test_collapsed_to_one_point(point):
    """No distance is more than rounding; the neighbours are the first rows, and so are theirs."""
    queries, gallery = torch.tensor([point] * 4), 2 * torch.tensor([point] * 20)
    distance = -Reranking.of(queries, gallery, k1=5, k2=2).block(np.arange(4))
    assert np.isfinite(distance).all() and (distance >= -1).all() and (distance <= 2).all()
    assert (distance[:, :2] < distance[:, 2:].min()).all()  # rows 4 and 5 of all, which are among the first


def test_memory_is_bounded():
    """3,600 rows: a dense matrix of them would take 104 MB, 600 x 3,000 distances 14 MB."""
    rows = torch.randn(3600, 4, generator=torch.Generator().manual_seed(0))
    queries, gallery = (
        ReidSet(rows[part], torch.arange(3600)[part] % 500, torch.arange(3600)[part])
        for part in (slice(0, 600), slice(600, 3600))
    )
    tracemalloc.start()
    try:
        again = Reranking.of(queries.embeddings, gallery.embeddings, k1=8, k2=3)
        assert tracemalloc.get_traced_memory()[1] < 64 * 2**20
        tracemalloc.reset_peak()
        match(queries, gallery, reranking=again, part=slice(0, 400), memory_bytes=4 * 2**20)
        assert tracemalloc.get_traced_memory()[1] < 32 * 2**20
    finally:
        tracemalloc.stop()


def test_bad_input_is_refused():
    queries, gallery = people(4, 3, 0)[0], people(9, 3, 1)[0]
    for arguments, message in [
        ({"k1": 13}, "got k1=13 for 13 rows: expected at least 1 and fewer than rows"),
        ({"k1": 0, "k2": 1}, "got k1=0 for 13 rows"),
        ({"k1": 4, "k2": 6}, "expected k2 from 1 to k1"),
        ({"k1": 4, "k2": 0}, "k2=0"),
        ({"k1": 4, "k2": 2, "weight": 1.5}, "weight=1.5"),
        (
            {"k1": 4, "k2": 2, "neighbours": KNearestAndFarthest.of(torch.cat([queries, gallery]), 5)},
            r"neighbours \(13, 5\): expected \(13, 4\)",
        ),
    ]:
        with pytest.raises(ValueError, match=message):
            Reranking.of(queries, gallery, **arguments)
    with pytest.raises(ValueError, match="9 of 9 gallery rows are zero or not finite"):
        Reranking.of(queries, gallery * math.nan, k1=4, k2=2)
    again = Reranking.of(queries, gallery, k1=4, k2=2)
    ids = torch.arange(9)
    with pytest.raises(ValueError, match=r"got a reranking of \(4, 9\) queries and gallery rows: expected \(9, 9\)"):
        match(ReidSet(gallery, ids, ids), ReidSet(gallery, ids, ids), reranking=again)
