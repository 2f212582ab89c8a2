"""Class-balanced plans over random class sizes: what the docstring promises, sample by sample."""

from __future__ import annotations

import re

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from methods.plans import Plan, class_balanced, combine_sampler, number_sampler, uniform_classes

ANY = 1e9  # repeats


def labels_of(sizes: list[int], seed: int = 0) -> np.ndarray:
    """Labels of classes with these sizes, shuffled."""
    return np.random.default_rng(seed).permutation(np.repeat(np.arange(len(sizes)), sizes)).astype(np.int64)


def groups_of(sizes: list[int], k: int) -> tuple[list[int], int]:
    """Groups of every class of two or more images, and groups of single images."""
    return [-(-s // k) for s in sizes if s > 1], -(-sizes.count(1) // k)


@st.composite
def datasets(draw: st.DrawFn) -> tuple[list[int], int, int]:
    """Class sizes (many singles, few large classes), P and K for which a plan exists."""
    sizes = draw(st.lists(st.one_of(st.just(1), st.integers(1, 7), st.integers(1, 40)), min_size=1, max_size=25))
    k = draw(st.integers(2, 5))
    own, mixed = groups_of(sizes, k)
    assume(own and len(own) + mixed >= 2)
    return sizes, draw(st.integers(2, min(8, len(own) + mixed))), k


@settings(max_examples=150, deadline=None)
@given(datasets(), st.integers(0, 2**40), st.integers(0, 1000))
def test_every_promise_on_random_datasets(dataset: tuple, seed: int, epoch: int) -> None:
    sizes, p, k = dataset
    labels = labels_of(sizes)
    plan = class_balanced(labels, p, k, seed, epoch, max_repeats=ANY)
    own, mixed = groups_of(sizes, k)
    total = sum(own) + mixed
    assert plan.ids.shape == (max(-(-total // p), max(own)), p * k), "no more steps than the groups need"
    assert plan.ids.dtype == np.int64
    assert set(plan.ids.ravel().tolist()) == set(range(len(labels))), "every sample at least once, and nothing else"
    size_of = np.bincount(labels)[labels]
    for row in plan.ids:
        singles = row[size_of[row] == 1]
        assert len(set(singles.tolist())) == len(singles), "a single image never stands beside itself"
        pure = []
        for group in row.reshape(p, k):
            classes = set(labels[group].tolist())
            if len(classes) == 1:
                pure.append(classes.pop())
                if sizes[pure[-1]] >= k:
                    assert len(set(group.tolist())) == k, "repeats only where the class is too small"
            else:
                assert (size_of[group] == 1).any(), "only single images share a group"
        assert len(set(pure)) == len(pure), "no class twice in a step"
        if len(set(labels[row].tolist())) < len(sizes):  # classes are left over: nobody had to come twice
            strangers = [c for g in row.reshape(p, k) if len(set(labels[g].tolist())) > 1 for c in labels[g].tolist()]
            assert len(set(strangers)) == len(strangers) and not set(strangers) & set(pure)
    again = class_balanced(labels.copy(), p, k, seed, epoch, max_repeats=ANY)
    np.testing.assert_array_equal(plan.ids, again.ids, err_msg="a pure function of its arguments")


@settings(max_examples=100, deadline=None)
@given(datasets(), st.integers(0, 2**40), st.sampled_from([1.0, 1.3, 2.0, 4.0]))
def test_a_large_class_does_not_stretch_the_epoch(dataset: tuple, seed: int, most: float) -> None:
    sizes, p, k = dataset
    labels = labels_of(sizes)
    ids = class_balanced(labels, p, k, seed, 0, most).ids
    own, mixed = groups_of(sizes, k)
    total = sum(own) + mixed
    shortest = -(-total // p)
    assert shortest <= len(ids) <= max(shortest, most * total / p)
    assert set(ids.ravel().tolist()) == set(range(len(labels))), "every sample at least once"
    if max(own) <= max(shortest, int(most * total / p)):
        np.testing.assert_array_equal(ids, class_balanced(labels, p, k, seed, 0, ANY).ids, err_msg="nothing changes")
    allowed = -(-max(own) // len(ids))
    for row in ids:
        pure = [g for g in row.reshape(p, k) if len(set(labels[g].tolist())) == 1]
        assert np.bincount([labels[g[0]] for g in pure], minlength=1).max() <= max(1, allowed)


@pytest.mark.parametrize(
    ("sizes", "before", "now"),
    [
        ([10_000] + [4] * 99, 23.1, 2.0),  # one class of nearly all images
        ([1_000] + [5] * 99, 16.1, 2.4),
        (list(2 + np.random.default_rng(0).binomial(10, 0.326, 11_318)), 1.3, 1.3),  # as Stanford Online Products
        (list((1000 / np.arange(1, 5691) ** 0.7).astype(int) + 5), 1.1, 1.1),  # as iNaturalist 2018's classes
        ([60] * 100, 1.0, 1.0),
    ],
)  # fmt: skip
def test_length_of_an_epoch_in_images(sizes: list[int], before: float, now: float) -> None:
    labels = labels_of(sizes)
    lengths = [class_balanced(labels, 24, 4, 0, 0, most).ids.size / len(labels) for most in (ANY, 2.0)]
    assert lengths[0] == pytest.approx(before, abs=0.06) and lengths[1] == pytest.approx(now, abs=0.06)


def test_seed_and_epoch_change_the_plan_and_the_global_generator_does_not() -> None:
    labels = labels_of([5] * 40)
    np.random.seed(1)
    state = np.random.get_state()[1].copy()
    first = class_balanced(labels, 8, 4, 3, 0).ids
    np.testing.assert_array_equal(np.random.get_state()[1], state, err_msg="the global generator is left alone")
    np.random.seed(2)
    np.testing.assert_array_equal(first, class_balanced(labels, 8, 4, 3, 0).ids)
    for seed, epoch in ((3, 1), (4, 0), (0, 3)):
        other = class_balanced(labels, 8, 4, seed, epoch).ids
        assert (other != first).mean() > 0.9, (seed, epoch)


def test_classes_meet_in_changing_company() -> None:
    """Which classes share a step is drawn anew: over 60 epochs every pair of 12 classes meets."""
    labels = labels_of([4] * 12)
    met = np.zeros((12, 12), dtype=int)
    for epoch in range(60):
        for row in class_balanced(labels, 4, 4, 0, epoch).ids:
            classes = np.unique(labels[row])
            met[np.ix_(classes, classes)] += 1
    expected = 60 * 3 / 11
    others = met[~np.eye(12, dtype=bool)]
    assert others.min() > expected / 4 and others.max() < expected * 2.5


@pytest.mark.parametrize(
    ("sizes", "p", "k", "numbers"),
    [
        ([5, 5, 5], 4, 4, ("4", "3")),
        ([5, 5, *[1] * 9], 6, 4, ("6", "5", "9 classes of one image")),  # 9 single images share 3 groups
        ([100], 2, 2, ("2", "1")),
    ],
)
def test_more_classes_per_batch_than_groups(sizes: list[int], p: int, k: int, numbers: tuple[str, ...]) -> None:
    with pytest.raises(ValueError, match="classes_per_batch") as caught:
        class_balanced(labels_of(sizes), p, k, 0, 0)
    message = str(caught.value)
    assert "\n" not in message and "lower classes_per_batch" in message
    for number in numbers:
        assert re.search(rf"\b{number}\b", message), message


def test_only_single_images_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"none of the 9 .*two images"):
        class_balanced(labels_of([1] * 9), 2, 4, 0, 0)


def test_single_image_is_not_repeated_when_every_class_is_present() -> None:
    """One class and one single image: the room beside the single image goes to the class, not to itself again."""
    labels = labels_of([6, 1])
    single = int(np.flatnonzero(np.bincount(labels)[labels] == 1)[0])
    for seed in range(20):
        plan = class_balanced(labels, 2, 4, seed, 0)
        assert ((plan.ids == single).sum(1) <= 1).all()


def repeats(rows: np.ndarray) -> np.ndarray:
    """Of each row, how many entries stand in it already."""
    rows = np.sort(rows, axis=1)
    return (rows[:, 1:] == rows[:, :-1]).sum(axis=1)


@pytest.mark.parametrize("tail", [[], [30_000], [1] * 4_001])
def test_promises_at_two_hundred_thousand_samples(tail: list[int]) -> None:
    """Classes of 2 to 12 images; the same with one so large that it stands in every step, and with many single images."""
    sizes = np.concatenate([2 + np.random.default_rng(0).binomial(10, 0.326, 38_000), tail]).astype(np.int64)
    labels = labels_of(sizes.tolist())
    plan = class_balanced(labels, 16, 4, 1, 2)
    groups = -(-sizes[sizes > 1] // 4)
    assert plan.ids.shape == (max(-(-(groups.sum() + -(-tail.count(1) // 4)) // 16), groups.max()), 64)
    assert np.bincount(plan.ids.ravel(), minlength=len(labels)).min() == 1, "every sample, at least once"
    of_group = labels[plan.ids].reshape(-1, 4)
    pure = (of_group == of_group[:, :1]).all(axis=1)
    assert (sizes[of_group[~pure]] == 1).any(axis=1).all() and (~pure).sum() >= tail.count(1) // 4, (
        "only single images share a group"
    )
    assert not repeats(np.where(pure, of_group[:, 0], -1 - np.arange(len(pure))).reshape(-1, 16)).any()
    full = plan.ids.reshape(-1, 4)[sizes[of_group[:, 0]] >= 4]
    assert not repeats(full).any(), "repeats only where the class is too small"


def test_short_steps_are_filled_with_all_classes_alike() -> None:
    """One class fills 2,000 steps; of the 20 others each is drawn as often, and each of its groups."""
    labels = labels_of([4 * 2000, *[8] * 20])
    ids = class_balanced(labels, 3, 4, 0, 0, max_repeats=ANY).ids
    drawn = np.bincount(labels[ids.reshape(-1, 4)[:, 0]])
    assert drawn[0] == len(ids) == 2000
    assert drawn[1:].sum() == 4000 and np.abs(drawn[1:] - 200).max() < 5 * 200**0.5
    small = np.bincount(ids.ravel())[labels > 0]
    assert np.abs(small - 100).max() < 5 * 100**0.5


def test_plan_checks_its_shape() -> None:
    ids = np.zeros((2, 3), dtype=np.int64)
    assert len(Plan(ids)) == 2
    with pytest.raises(ValueError, match="at least one slot"):
        Plan(np.zeros((0, 3), dtype=np.int64))
    with pytest.raises(ValueError, match=r"'role' has shape \(2, 2\), ids have \(2, 3\)"):
        Plan(ids, {"role": np.zeros((2, 2))})


# ---- the samplers of the papers --------------------------------------------------------------------------------------

SIZES = [9, 3, 18, 10, 1, 7]


@pytest.mark.parametrize("epoch", range(4))
def test_combine(epoch: int) -> None:
    """Groups of one class; every image; (⌊n/K⌋ + 1) groups a class, and repeated groups until P divides them."""
    labels = labels_of(SIZES)
    plan = combine_sampler(labels, 4, 9, seed=1, epoch=epoch)
    groups = plan.ids.reshape(-1, 9)
    assert plan.ids.shape[1] == 36 and set(plan.ids.flat) == set(range(len(labels)))
    assert all(len(set(labels[group])) == 1 for group in groups)
    distinct = {tuple(group) for group in groups}
    count = np.bincount([labels[group[0]] for group in distinct])
    assert count.tolist() == [2, 2, 3, 2, 1, 2], "both groups of the single image look alike"
    assert len(groups) == 16
    assert np.array_equal(plan.ids, combine_sampler(labels, 4, 9, seed=1, epoch=epoch).ids)
    assert not np.array_equal(plan.ids, combine_sampler(labels, 4, 9, seed=1, epoch=epoch + 1).ids)


def test_combine_may_put_a_class_twice_in_a_batch() -> None:
    labels = labels_of([40, 40])
    plan = combine_sampler(labels, 4, 5, seed=0, epoch=0)
    assert all(len(set(labels[row])) <= 2 for row in plan.ids)


def test_combine_needs_enough_groups() -> None:
    with pytest.raises(ValueError, match=r"a batch of 9 groups of 5 images needs as many groups, .* gives 4"):
        combine_sampler(labels_of([3, 2]), 9, 5, seed=0, epoch=0)


def test_any_shape_is_a_divisor_of_the_batch() -> None:
    """54 slots: 2, 3, 6, 9, 18 or 27 groups, each about as often; one shape an epoch."""
    labels = labels_of([30] * 20)
    drawn = []
    for epoch in range(240):
        plan = number_sampler(labels, 6, 9, seed=3, epoch=epoch)
        assert plan.ids.shape[1] == 54
        changes = np.nonzero(np.diff(labels[plan.ids]))[1]
        size = int(np.gcd.reduce([*(changes + 1), 54]))
        drawn.append(54 // size)
    counts = {p: drawn.count(p) for p in set(drawn)}
    assert set(counts) == {2, 3, 6, 9, 18, 27} and min(counts.values()) > 15


@pytest.mark.parametrize("epoch", range(3))
def test_uniform_classes(epoch: int) -> None:
    labels = labels_of(SIZES)
    plan = uniform_classes(labels, 3, 4, seed=2, epoch=epoch)
    assert len(plan) == (len(labels) - 1) // 12
    for row in plan.ids.reshape(-1, 3, 4):
        assert all(len(set(labels[group])) == 1 for group in row) and len({labels[group[0]] for group in row}) == 3
        large = [group for group in row if SIZES[labels[group[0]]] >= 4]
        assert all(len(set(group)) == 4 for group in large)
    assert np.array_equal(plan.ids, uniform_classes(labels, 3, 4, seed=2, epoch=epoch).ids)


def test_uniform_classes_draws_classes_alike_whatever_their_size() -> None:
    labels = labels_of([100, 4, 4, 4, 4])
    drawn = [labels[row].reshape(-1, 2)[:, 0] for e in range(40) for row in uniform_classes(labels, 2, 2, 0, e).ids]
    share = np.bincount(np.concatenate(drawn)) / (2 * len(drawn))
    assert np.abs(share - 0.2).max() < 0.03
    with pytest.raises(ValueError, match="classes_per_batch is 6, the training set has 5 classes"):
        uniform_classes(labels, 6, 2, 0, 0)


def test_uniform_classes_goes_through_a_class_before_it_repeats() -> None:
    labels = labels_of([12, 12])
    ids = uniform_classes(labels, 2, 4, seed=0, epoch=0).ids.reshape(-1, 2, 4)
    for c in (0, 1):
        seen = np.concatenate([group for row in ids for group in row if labels[group[0]] == c])
        assert len(set(seen[:8])) == 8


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 30), min_size=2, max_size=25), st.data())
def test_uniform_classes_on_random_datasets(sizes: list[int], data: st.DataObject) -> None:
    labels = labels_of(sizes)
    p, k = data.draw(st.integers(1, len(sizes))), data.draw(st.integers(2, 6))
    ids = uniform_classes(labels, p, k, data.draw(st.integers(0, 99)), 0).ids
    assert ids.shape == (max(1, (len(labels) - 1) // (p * k)), p * k)
    drawn: dict[int, list[list[int]]] = {}
    for row in ids.reshape(-1, p, k):
        assert len({labels[group[0]] for group in row}) == p
        for group in row:
            assert len(set(labels[group])) == 1
            drawn.setdefault(int(labels[group[0]]), []).append(group.tolist())
    for c, visits in drawn.items():
        a_list = sizes[c] // k
        for start in range(0, len(visits), max(1, a_list)):
            seen = [i for group in visits[start : start + a_list] for i in group]
            assert len(set(seen)) == len(seen), "a list is gone through before it is shuffled again"


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 30), min_size=2, max_size=25), st.data())
def test_combine_on_random_datasets(sizes: list[int], data: st.DataObject) -> None:
    labels = labels_of(sizes)
    k = data.draw(st.integers(2, 7))
    total = sum(max(s, k) // k + 1 for s in sizes)
    p = data.draw(st.integers(1, total))
    groups = combine_sampler(labels, p, k, data.draw(st.integers(0, 99)), 0).ids.reshape(-1, k)
    assert len(groups) == -(-total // p) * p and set(groups.flat) == set(range(len(labels)))
    assert (labels[groups] == labels[groups][:, :1]).all()
    of_class = np.bincount(labels[groups[:, 0]])
    assert (of_class >= [max(s, k) // k + 1 for s in sizes]).all(), "no group is left out"
