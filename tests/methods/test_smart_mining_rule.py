"""Which triplets Smart Mining takes: the golden cases, Algorithm 1 entry by entry, and random members of classes."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from methods.smart_mining import triplet_loss
from methods.smart_mining_rule import HALF_MINED, MINED, RANDOM, ClassIndex, MinedBlock, apply_rule, mine_triplets

GOLDEN = Path(__file__).parent.parent / "golden"
CASES = ("tight_k1", "sop_like_k2", "singletons")


def lists(ids: np.ndarray, distances: np.ndarray) -> Any:
    return SimpleNamespace(ids=ids, distances=distances)


# ---- golden ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES)
def test_golden_triplets(case: str) -> None:
    """MinedBlock triplets and bounds exactly; random places hold what may stand there."""
    g = np.load(GOLDEN / f"smart_mining_{case}.npz")
    y, listed, distances, count, kappa = g["y"], g["S"], g["D2"], int(g["T"]), float(g["kappa"])
    found = mine_triplets(
        SimpleNamespace(ids=np.arange(len(y))), lists(listed, distances), ClassIndex(y, (1,)), kappa, count, None
    )
    kept = np.flatnonzero(np.bincount(y)[y] > 1)
    wanted, kinds = g["triplets"][kept].reshape(-1, 3), g["kind"][kept].ravel()
    t = found.triplets
    assert np.array_equal(t.kind, kinds) and (kinds == MINED).any() == (case != "singletons")
    assert np.array_equal(t.anchor, np.repeat(kept, count))
    mined, half, random = (kinds == k for k in (MINED, HALF_MINED, RANDOM))
    assert np.array_equal(np.stack([t.anchor, t.positive, t.negative], 1)[mined], wanted[mined])
    assert np.array_equal(t.negative[half], wanted[half, 2])
    assert (
        (y[t.positive] == y[t.anchor]).all() and (t.positive != t.anchor).all() and (y[t.negative] != y[t.anchor]).all()
    )
    bound = apply_rule(
        kept, np.ones(len(kept), bool), listed[kept], distances[kept], ClassIndex(y, (1,)), kappa, count
    ).bound
    np.testing.assert_allclose(bound, g["bound"][kept], rtol=1e-12)
    assert (distances[0] >= 0).all() and random.any() == (g["kind"][kept] == RANDOM).any()


# ---- Algorithm 1, entry by entry -------------------------------------------------------------------------------------


def algorithm(anchor: int, listed: list[int], distances: list[float], y: np.ndarray, kappa: float, count: int) -> tuple[list[tuple[int, int, int]], set[int]]:  # fmt: skip
    """(positive, negative, kind) of T triplets, -1 where it is random, and the members of `pos`."""
    seen_positive, bound = False, 0.0
    negatives: list[int] = []
    positives: list[tuple[int, set[int]]] = []  # with the negatives that are nearer
    for j, d in zip(listed, distances, strict=True):
        if j < 0:
            continue
        if not seen_positive:
            if y[j] == y[anchor]:
                seen_positive, bound = True, kappa * d
                positives.append((j, set()))
            continue
        if d < bound:
            continue
        if y[j] == y[anchor]:
            positives.append((j, set(negatives)))
        else:
            negatives.append(j)
    out, left = [], list(negatives)
    for _ in range(count):
        if not left:
            out.append((-1, -1, RANDOM))
            continue
        n = left.pop(0)
        p = next((j for j, nearer in positives if n in nearer), -1)
        out.append((p, n, MINED if p >= 0 else HALF_MINED))
    return out, {j for j, _ in positives}


@settings(max_examples=150, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 7), min_size=2, max_size=6),
    kappa=st.sampled_from([0.5, 1.0, 1.3, 2.0, 50.0]),
    count=st.integers(1, 4),
    k=st.integers(1, 20),
    levels=st.sampled_from([3, 1000]),
    seed=st.integers(0, 10**6),
)
def test_the_rule_is_algorithm_1(sizes: list[int], kappa: float, count: int, k: int, levels: int, seed: int) -> None:
    """With ties, short lists, classes of one image, classes that fill the list."""
    random = np.random.default_rng(seed)
    y = random.permutation(np.repeat(np.arange(len(sizes)), sizes))
    total = len(y)
    x = random.integers(0, levels, total).astype(np.float64)
    d = (x[:, None] - x[None]) ** 2
    np.fill_diagonal(d, np.inf)
    order = np.lexsort((np.broadcast_to(np.arange(total), d.shape), d), axis=1)[:, :-1]
    short = max(0, k - order.shape[1])
    ids = np.pad(order[:, :k], ((0, 0), (0, short)), constant_values=-1)
    distances = np.pad(np.take_along_axis(d, order, 1)[:, :k], ((0, 0), (0, short)), constant_values=np.inf)
    classes = ClassIndex(y, (seed,))
    found = mine_triplets(SimpleNamespace(ids=np.arange(total)), lists(ids, distances), classes, kappa, count, None)
    t = found.triplets
    row = 0
    for anchor in np.flatnonzero(np.bincount(y)[y] > 1):
        wanted, admitted = algorithm(anchor, ids[anchor].tolist(), distances[anchor].tolist(), y, kappa, count)
        for p, n, kind in wanted:
            assert (t.anchor[row], t.kind[row]) == (anchor, kind)
            assert kind == RANDOM or t.negative[row] == n
            assert kind != MINED or t.positive[row] == p
            if kind == HALF_MINED:
                pool = set(np.flatnonzero(y == y[anchor])) - {anchor} - admitted
                assert t.positive[row] in (pool or set(np.flatnonzero(y == y[anchor])) - {anchor})
            assert y[t.positive[row]] == y[anchor] != y[t.negative[row]] and t.positive[row] != anchor
            row += 1
    assert row == len(t.anchor)
    some = np.bincount(y)[y] > 1
    inside = ids[some]
    assert found.without_positive == int((~((y[inside] == y[some][:, None]) & (inside >= 0)).any(1)).sum())


def test_what_follows_from_the_rule() -> None:
    """Negatives of an anchor differ; none is nearer than the bound; fewer are left as κ grows; κ below 1 is κ = 1."""
    random = np.random.default_rng(0)
    y, x = np.repeat(np.arange(30), 8), random.standard_normal((240, 6))
    x += 0.8 * random.standard_normal((30, 6))[y]
    d = ((x[:, None] - x[None]) ** 2).sum(-1)
    order = np.argsort(d, axis=1)[:, 1:]
    anchors, all_of = np.arange(240), np.ones(240, bool)
    distances, classes = np.take_along_axis(d, order, 1), ClassIndex(y, (0,))
    left, last = [], 0
    for kappa in (1.0, 1.2, 1.5, 3.0, 64.0):
        c = apply_rule(anchors, all_of, order, distances, classes, kappa, 3)
        left.append(int((c.negative >= 0).sum()))
        assert all(len(set(r[r >= 0])) == (r >= 0).sum() for r in c.negative)
        rows, columns = np.nonzero(c.kind == MINED)
        p, n = c.positive[rows, columns], c.negative[rows, columns]
        assert (d[rows, p] >= d[rows, n]).all() and (d[rows, n] >= c.bound[rows]).all()
        if len(rows):
            loss, _, _ = triplet_loss(*(torch.from_numpy(x)[torch.from_numpy(i)] for i in (rows, p, n)), 0.2)
            assert bool((loss > 0).all())
        last = len(rows) or last
    assert left == sorted(left, reverse=True) and left[0] > left[-1] and last
    below, one = (apply_rule(anchors, all_of, order, distances, classes, kappa, 2) for kappa in (0.3, 1.0))
    for name in ("positive", "negative", "kind", "without_positive", "without_negative"):
        assert np.array_equal(getattr(below, name), getattr(one, name))


def test_random_members_are_uniform_and_depend_on_the_key_alone() -> None:
    y = np.array([0] * 5 + [1] * 3 + [2] * 2)
    classes, other = ClassIndex(y, (1, 2)), ClassIndex(y, (1, 3))
    draws = np.arange(20_000)
    for anchor in (0, 6, 9):
        anchors = np.full(len(draws), anchor)
        positive, negative = classes.random_positive(anchors, draws), classes.random_negative(anchors, draws)
        for got, members in ((positive, np.flatnonzero(y == y[anchor])), (negative, np.flatnonzero(y != y[anchor]))):
            members = members[members != anchor]
            counts = np.bincount(got, minlength=10)
            assert set(np.flatnonzero(counts)) == set(members)
            assert abs(counts[members] / len(draws) - 1 / len(members)).max() < 0.015
        assert np.array_equal(classes.random_positive(anchors[:7], draws[3:10]), positive[3:10])
        assert not np.array_equal(other.random_negative(anchors, draws), negative)


def test_random_positives_are_those_that_the_list_does_not_offer() -> None:
    """Of class 0 (0 to 4), anchor 2: +NN 3 and the admitted 0 are left out, 1 is nearer than the bound; 4 is not listed."""
    y = np.array([0] * 5 + [1] * 3)
    ids, distances = np.array([[3, 1, 0, 5]]), np.array([[1.0, 1.1, 2.0, 3.0]])
    got = set()
    for key in range(60):
        found = apply_rule(np.array([2]), np.array([True]), ids, distances, ClassIndex(y, (key,)), 1.5, 1)
        assert found.kind[0, 0] == HALF_MINED and found.negative[0, 0] == 5
        got.add(int(found.positive[0, 0]))
    assert got == {1, 4}
    full = [apply_rule(np.array([2]), np.array([True]), np.array([[3, 1, 0, 4, 5]]), np.arange(1.0, 6.0)[None], ClassIndex(y, (key,)), 1.0, 1) for key in range(60)]  # fmt: skip
    assert {int(found.positive[0, 0]) for found in full} == {0, 1, 3, 4}  # any other member, where all are offered


def test_mined_is_what_travels() -> None:
    """Nothing as long as a list."""
    y = np.arange(50) // 5
    ids = np.stack([np.random.default_rng(i).permutation(np.delete(np.arange(50), i)) for i in range(50)])
    found = mine_triplets(SimpleNamespace(ids=np.arange(50)), lists(ids, np.sort(np.random.default_rng(0).random((50, 49)), 1)), ClassIndex(y, (0,)), 1.0, 1, None)  # fmt: skip
    assert isinstance(found, MinedBlock) and all(len(column) == 50 for column in found.triplets)
