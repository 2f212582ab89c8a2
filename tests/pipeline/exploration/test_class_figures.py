"""Figures of classes, confusions and suspected labels against cases counted by hand."""

from __future__ import annotations

import numpy as np

from pipeline.exploration.class_figures import (
    ClassFigures,
    Confusion,
    SuspectLabel,
    class_figures,
    confusions,
    suspect_labels,
)
from pipeline.exploration.retrieved import MISSING, Retrieved

DISTRACTOR = -1


def retrieved(
    labels: list[int],
    neighbour_labels: list[list[int]],
    precision: list[float] | None = None,
    relevant: list[int] | None = None,
) -> Retrieved:
    """Queries 100, 101, ...; the neighbours of query i have the ids 1000 + 10 i + place."""
    num, keep = len(labels), len(neighbour_labels[0]) if neighbour_labels else 5
    found = np.array(neighbour_labels, np.int64).reshape(num, keep)
    ids = 1000 + 10 * np.arange(num)[:, None] + np.arange(keep)
    return Retrieved(
        100 + np.arange(num),
        np.where(found == MISSING, -1, ids),
        np.array(precision if precision is not None else [0.5] * num),
        np.array(relevant if relevant is not None else [1] * num, np.int64),
        np.array(labels, np.int64),
        found,
    )


def test_classes_worst_first() -> None:
    found = retrieved(
        [7, 7, 7, 3, 3, 9, 5],
        [[7, 3], [3, 7], [3, 9], [3, 3], [9, 3], [7, 7], [7, 7]],
        [0.75, 0.25, 0.125, 1.0, 0.5, 0.0, 0.25],
        [2, 2, 2, 1, 1, 0, 1],  # class 9 has nothing to find: it is not counted
    )
    assert class_figures(found) == [
        ClassFigures(5, 1, 0.0, 0.25, 7, 1),
        ClassFigures(7, 3, 1 / 3, 0.375, 3, 2),
        ClassFigures(3, 2, 0.5, 0.75, 9, 1),
    ]


def test_a_class_that_finds_itself_is_mistaken_for_none_and_a_distractor_is_no_class() -> None:
    found = retrieved([1, 1, 2], [[1], [1], [DISTRACTOR]])
    assert class_figures(found) == [ClassFigures(2, 1, 0.0, 0.5, None, 0), ClassFigures(1, 2, 1.0, 0.5, None, 0)]
    assert confusions(found, 5) == ([], 0) and suspect_labels(found) == []


def test_without_queries() -> None:
    found = retrieved([], [])
    assert class_figures(found) == [] and confusions(found, 5) == ([], 0) and suspect_labels(found) == []


def test_confusions_count_both_directions() -> None:
    #         1 finds 2 twice (100, 101), 2 finds 1 once (102), 3 finds 1 once (103), 1 finds itself (104); 105 is not counted
    found = retrieved(
        [1, 1, 2, 3, 1, 3], [[2], [2], [1], [1], [1], [2]], [0.4, 0.2, 0.3, 0.3, 1.0, 0.0], [1, 1, 1, 1, 1, 0]
    )
    both = Confusion(1, 2, 2, 1, ((101, 1010), (102, 1020)))  # 101 has the lower average precision
    one = Confusion(3, 1, 1, 0, ((103, 1030),))
    assert confusions(found, 5) == ([both, one], 2)
    assert confusions(found, 1) == ([both], 2)


def test_labels_are_suspected_where_all_neighbours_are_of_one_other_class() -> None:
    sizes = [2] * 6 + [4] * 3  # class 2 has six images or more, class 4 three
    rows = {
        "five agree": (1, [2, 2, 2, 2, 2], True),
        "only four agree": (1, [2, 2, 2, 2, 4], False),
        "three of a class of three": (1, [4, 4, 4, 2, 2], True),
        "two of a class of three": (1, [4, 4, 2, 4, 2], False),
        "right": (2, [2, 2, 2, 2, 2], False),
        "distractors": (1, [DISTRACTOR] * 5, False),
        "nothing found": (1, [MISSING] * 5, False),
        "a small gallery": (1, [2, 2, 2, MISSING, MISSING], False),
    }
    right = {2: [2] * 5, 4: [4] * 5}
    labels = [label for label, _, _ in rows.values()] + sizes
    found = retrieved(labels, [seen for _, seen, _ in rows.values()] + [right[label] for label in sizes])
    expected = {100 + i for i, (_, _, suspected) in enumerate(rows.values()) if suspected}
    assert {suspect.image for suspect in suspect_labels(found)} == expected
    assert suspect_labels(found) == [
        SuspectLabel(100, 1, 2, (1000, 1001, 1002, 1003, 1004)),  # more neighbours agree
        SuspectLabel(102, 1, 4, (1020, 1021, 1022)),
    ]


def test_the_least_precise_is_suspected_first() -> None:
    found = retrieved([1, 1, *[2] * 5], [[2] * 5] * 7, [0.2, 0.1, *[1.0] * 5])
    assert [suspect.image for suspect in suspect_labels(found)] == [101, 100]
