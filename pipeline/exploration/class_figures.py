"""Which classes fail, which are taken for one another, and which images may be labelled wrongly; from nearest neighbours."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from pipeline.exploration.retrieved import Retrieved

AGREEING = 5  # neighbours that have to agree on another class before a label is suspected; fewer in smaller classes
FEWEST_AGREEING = 3


@dataclass(frozen=True)
class ClassFigures:
    """How well the images of a class find each other.

    Attributes:
        label: The class.
        queries: Images that have something to find.
        recall: Share of them whose nearest neighbour is of the class: Recall@1, 0 to 1.
        average_precision: Mean of their average precisions, 0 to 1.
        mistaken_for, times: The class that their nearest neighbour is of most often, other than their own, and how often;
            None and 0 if there is none.
    """

    label: int
    queries: int
    recall: float
    average_precision: float
    mistaken_for: int | None
    times: int


@dataclass(frozen=True)
class Confusion:
    """Two classes, and how often the nearest neighbour of an image of one is of the other.

    Attributes:
        first, second: The classes; `first` is mistaken at least as often.
        first_as_second, second_as_first: Numbers of queries.
        examples: Pairs (query, its nearest neighbour), store ids; of either direction the one of the lowest average precision.
    """

    first: int
    second: int
    first_as_second: int
    second_as_first: int
    examples: tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class SuspectLabel:
    """An image whose nearest neighbours are all of one other class.

    Attributes:
        image: Store id.
        label: The class that it is given in.
        other: The class of its nearest neighbours.
        neighbours: Store ids of those.
    """

    image: int
    label: int
    other: int
    neighbours: tuple[int, ...]


def class_figures(found: Retrieved) -> list[ClassFigures]:
    """Figures of each class that has a query with something to find, worst first: by recall, average precision, label."""
    rows = []
    queries = np.flatnonzero(found.counted)
    queries = queries[np.argsort(found.query_labels[queries], kind="stable")]
    labels, starts = np.unique(found.query_labels[queries], return_index=True)
    for label, own in zip(labels.tolist(), np.split(queries, starts[1:]), strict=True) if len(labels) else ():
        nearest = found.neighbour_labels[own, 0]
        others, counts = np.unique(nearest[(nearest != label) & (nearest >= 0)], return_counts=True)
        most = int(counts.argmax()) if len(others) else -1
        rows.append(
            ClassFigures(
                label,
                len(own),
                float((nearest == label).mean()),
                float(found.average_precision[own].mean()),
                int(others[most]) if most >= 0 else None,
                int(counts[most]) if most >= 0 else 0,
            )
        )
    return sorted(rows, key=lambda row: (row.recall, row.average_precision, row.label))


def confusions(found: Retrieved, limit: int) -> tuple[list[Confusion], int]:
    """The pairs of classes that are mistaken for one another most often, at most `limit` of them, and how many there are.

    Pairs are ordered by the number of queries of either class whose nearest neighbour is of the other, then by label.
    Neighbours of no class (distractors) are nobody's.
    """
    nearest = found.neighbour_labels[:, 0]
    wrong = np.flatnonzero(found.counted & (nearest >= 0) & (nearest != found.query_labels))
    pairs = np.stack([found.query_labels[wrong], nearest[wrong]], 1)
    classes, pair_of, counts = np.unique(np.sort(pairs, 1), axis=0, return_inverse=True, return_counts=True)
    rows = []
    for pair in np.argsort(-counts, kind="stable")[:limit]:
        members = wrong[pair_of == pair]
        members = members[np.argsort(found.average_precision[members], kind="stable")]
        low, high = classes[pair].tolist()
        by_class = {label: members[found.query_labels[members] == label] for label in (low, high)}
        first, second = sorted((low, high), key=lambda label: -len(by_class[label]))
        examples = tuple(
            (int(found.query[some[0]]), int(found.neighbours[some[0], 0]))
            for some in (by_class[first], by_class[second])
            if len(some)
        )
        rows.append(Confusion(first, second, len(by_class[first]), len(by_class[second]), examples))
    return rows, len(counts)


def suspect_labels(found: Retrieved) -> list[SuspectLabel]:
    """Images whose nearest neighbours are all of one other class: the likeliest first.

    Looked at are as many neighbours as that class has queries, from 3 to 5. Those of the lowest average precision come
    first, then those with more neighbours that agree, then by id.
    """
    labels, sizes = np.unique(found.query_labels, return_counts=True)
    size_of = dict(zip(labels.tolist(), sizes.tolist(), strict=True))
    agree = (found.neighbour_labels == found.neighbour_labels[:, :1]).cumprod(axis=1).sum(axis=1)
    other = found.neighbour_labels[:, 0]
    rows = []
    for row in np.flatnonzero((other >= 0) & (other != found.query_labels) & (agree >= FEWEST_AGREEING)):
        needed = min(AGREEING, max(FEWEST_AGREEING, size_of.get(int(other[row]), AGREEING)))
        if agree[row] >= needed:
            rows.append((found.average_precision[row], -needed, int(found.query[row]), row, needed))
    return [
        SuspectLabel(
            image, int(found.query_labels[row]), int(other[row]), tuple(found.neighbours[row, :needed].tolist())
        )
        for _, _, image, row, needed in sorted(rows)
    ]
