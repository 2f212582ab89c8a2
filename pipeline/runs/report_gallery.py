"""The gallery of a report: some test queries and what they find, framed green where it is right and red where it is wrong."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from html import escape

import numpy as np
from jaxtyping import Int64

from pipeline.data.store import Store
from pipeline.exploration.picture_book import PictureBook
from pipeline.exploration.retrieved import Retrieved

QUERIES_PER_GROUP = 12
NEIGHBOURS_SHOWN = 8
THUMBNAIL_SIDE = 96  # pixels, longer side

GROUPS = {
    "worst": "Worst: lowest average precision",
    "random": "Random: what to expect (drawn with a fixed seed)",
    "best": "Best: highest average precision",
}

HOW_TO_READ = (
    "At the left a query, then its nearest test images, nearest first. Green with ✓: of the query's class. Red with ✗: "
    "of another class, named below. AP@R: the query's term of MAP@R, from 0 to 1. R: how many images of its class can "
    f"be found; where R is below {NEIGHBOURS_SHOWN}, the others shown can only be red."
)


def gallery_section(found: Retrieved | None, book: PictureBook) -> str:
    """The section of queries with their neighbours; their pictures are added to the book."""
    groups = _choose_queries(found) if found is not None else {}
    note = HOW_TO_READ if groups else "No test query has another image of its class to find."
    content = f'<p class="note">{note}</p>\n'
    if found is not None and groups:
        rows = np.concatenate(list(groups.values()))
        ids = np.unique(np.append(found.query[rows], found.neighbours[rows, :NEIGHBOURS_SHOWN]))
        shown = ids[ids >= 0]
        for sample in shown.tolist():
            book.add(sample, THUMBNAIL_SIDE)
        file_of = _files(shown, book.store)
        for name, group in groups.items():
            html = "".join(_row(found, row, book, file_of) for row in group.tolist())
            content += f'<div class="group" id="{name}">\n<h3>{GROUPS[name]}</h3>\n{html}</div>\n'
    return f'<section id="gallery">\n<h2>What queries find</h2>\n{content}</section>'


def _choose_queries(found: Retrieved) -> Mapping[str, Int64[np.ndarray, " rows"]]:
    """Rows of the worst, random and best queries among those that have a positive; empty if there are none."""
    # Shuffled first, with a fixed seed: among equals, a stable sort then takes images of any class.
    rows = np.random.default_rng(0).permutation(np.flatnonzero(found.counted))
    if not len(rows):
        return {}
    precision = found.average_precision[rows]
    keys = {"worst": precision, "random": np.zeros(len(rows)), "best": -precision}
    return {name: rows[np.argsort(key, kind="stable")][:QUERIES_PER_GROUP] for name, key in keys.items()}


def _files(shown: Int64[np.ndarray, " images"], store: Store) -> dict[int, str]:
    """The file of each image below the folder that they share; empty for stores that do not know it."""
    paths: Sequence[str] = store.sources(shown) or []
    shared = os.path.commonprefix(paths).rpartition("/")[0]  # noqa: RUF071  # cut at a slash; URIs as well
    names = [path.removeprefix(f"{shared}/") for path in paths]
    return dict(zip(shown.tolist(), names, strict=True)) if names else {}


def _row(found: Retrieved, row: int, book: PictureBook, file_of: Mapping[int, str]) -> str:
    """A query with its neighbours, framed green where their class is the query's, else red."""
    query, query_label = int(found.query[row]), int(found.query_labels[row])
    neighbours = ""
    places = zip(found.neighbours[row].tolist(), found.neighbour_labels[row].tolist(), strict=True)
    for sample, label in [place for place in places if place[0] >= 0][:NEIGHBOURS_SHOWN]:
        name = escape(book.class_name(label))
        hint = f"{name} ({escape(file_of[sample])})" if sample in file_of else name
        right = label == query_label
        verdict = "right" if right else "wrong"
        neighbours += (
            f'<figure class="neighbour {verdict}" data-sample="{sample}" title="{hint}">'
            f'<span class="thumb s{sample}" role="img" aria-label="{verdict}: {name}"></span>'
            f'<span class="mark" aria-hidden="true">{"✓" if right else "✗"}</span>'
            f"{'' if right else f'<figcaption>{name}</figcaption>'}</figure>\n"
        )
    name = escape(book.class_name(query_label))
    hint = f"{name} ({escape(file_of[query])})" if query in file_of else name
    return (
        f'<div class="row">\n<figure class="query" data-sample="{query}" title="{hint}">'
        f'<span class="thumb s{query}" role="img" aria-label="query: {name}"></span>'
        f'<figcaption><span class="name">{name}</span>'
        f"<small>AP@R {found.average_precision[row]:.2f}, R = {int(found.relevant[row]):,}</small></figcaption></figure>\n"
        f'<div class="neighbours">\n{neighbours}</div>\n</div>\n'
    )
