"""Sections of a page: classes that fail, classes that are confused, labels in doubt, and test images that are training images."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

import numpy as np

from pipeline.exploration.class_figures import (
    ClassFigures,
    Confusion,
    SuspectLabel,
    class_figures,
    confusions,
    suspect_labels,
)
from pipeline.exploration.duplicates import CORRELATION, DIFFERENCE, SIDE, DuplicateSearch
from pipeline.exploration.picture_book import PictureBook
from pipeline.exploration.retrieved import Retrieved

WORST_CLASSES = 20
CONFUSED_PAIRS = 20
SUSPECTS = 12
DUPLICATES = 24
PICTURES_OF_CLASS = 4
LISTED_CLASSES = 1_500  # in the table of all classes
_BINS = (
    ("0 %", 0.0),
    ("up to 25 %", 0.25),
    ("up to 50 %", 0.5),
    ("up to 75 %", 0.75),
    ("below 100 %", 1.0 - 1e-9),
    ("100 %", 1.0),
)


def class_sections(found: Retrieved, book: PictureBook) -> str:
    """Classes, confusions and labels in doubt; nothing where no query has anything to find."""
    rows = class_figures(found)
    if not rows:
        return ""
    reid = book.store.protocol == "reid"
    pairs, num_pairs = confusions(found, CONFUSED_PAIRS)
    return (
        _classes(rows, found, book, reid)
        + _confusions(pairs, num_pairs, rows, book)
        + _suspects(suspect_labels(found), book)
    )


def _classes(rows: Sequence[ClassFigures], found: Retrieved, book: PictureBook, reid: bool) -> str:
    recall, average = ("CMC@1", "mAP") if reid else ("R@1", "MAP@R")
    shown = rows[:WORST_CLASSES]
    head = f"<tr><th>class</th><th>images</th><th>queries</th><th>{recall}, %</th><th>{average}, %</th><th>most often taken for</th></tr>"
    body = ""
    for row in shown:
        own = found.query[found.query_labels == row.label]
        order = np.argsort(found.average_precision[found.query_labels == row.label], kind="stable")
        pictures = "".join(map(book.picture, own[order][:PICTURES_OF_CLASS].tolist()))
        body += (
            f'<tr data-class="{row.label}"><th scope="row">{escape(book.class_name(row.label))}</th>'
            f'<td class="pictures">{pictures}</td>{_cells(row, book)}</tr>\n'
        )
    every = "".join(
        f'<tr><th scope="row">{escape(book.class_name(row.label))}</th>{_cells(row, book)}</tr>\n'
        for row in rows[:LISTED_CLASSES]
    )
    listed = (
        f"The worst {LISTED_CLASSES:,} of {len(rows):,} classes"
        if len(rows) > LISTED_CLASSES
        else f"All {len(rows):,} classes"
    )
    title = "The worst classes" if len(rows) > len(shown) else "Classes, worst first"
    return f"""<section id="classes">
<h2>{title}</h2>
<p class="note">{recall} of a class: share of its queries whose nearest neighbour is of the class; {average}: their mean average
precision. Classes by {recall}:</p>
{_histogram(rows)}
<div class="scroll" tabindex="0" role="region" aria-label="{title}"><table class="pictured">
{head}
{body}</table></div>
<details><summary>{listed}</summary><div class="scroll" tabindex="0" role="region" aria-label="{listed}"><table>
{head.replace("<th>images</th>", "")}
{every}</table></div></details>
</section>
"""


def _cells(row: ClassFigures, book: PictureBook) -> str:
    mistaken = "–" if row.mistaken_for is None else f"{escape(book.class_name(row.mistaken_for))} ({row.times:,} times)"
    return f'<td>{row.queries:,}</td><td>{100 * row.recall:.1f}</td><td>{100 * row.average_precision:.1f}</td><td class="words">{mistaken}</td>'


def _histogram(rows: Sequence[ClassFigures]) -> str:
    """Numbers of classes by recall, as bars."""
    limits = [limit for _, limit in _BINS]
    counts = np.bincount(np.searchsorted(limits, [row.recall for row in rows]), minlength=len(_BINS))
    bars = "".join(
        f'<li><span>{name}</span><span class="bar" style="--share:{count / len(rows):.4f}"></span><strong>{count:,}</strong></li>'
        for (name, _), count in zip(_BINS, counts.tolist(), strict=True)
    )
    return f'<ul class="bars">{bars}</ul>'


def _confusions(pairs: Sequence[Confusion], num_pairs: int, rows: Sequence[ClassFigures], book: PictureBook) -> str:
    if not pairs:
        return '<section id="confusions">\n<h2>Confused classes</h2>\n<p>No nearest neighbour is of another class.</p>\n</section>\n'
    queries = {row.label: row.queries for row in rows}
    items = ""
    for pair in pairs:
        first, second = escape(book.class_name(pair.first)), escape(book.class_name(pair.second))
        pictures = "".join(
            f'<span class="pair">{book.picture(query)}→{book.picture(neighbour, "wrong")}</span>'
            for query, neighbour in pair.examples
        )
        told = [
            f"{pair.first_as_second:,} of {queries[pair.first]:,} <strong>{first}</strong> find <strong>{second}</strong>"
        ]
        if pair.second_as_first:
            told.append(f"{pair.second_as_first:,} of {queries[pair.second]:,} the other way")
        items += (
            f'<li data-classes="{pair.first} {pair.second}"><span class="pictures">{pictures}</span>'
            f"<span>{'; '.join(told)}</span></li>\n"
        )
    shown = (
        f"The {len(pairs)} most frequent of {num_pairs:,} pairs"
        if num_pairs > len(pairs)
        else f"All {num_pairs:,} pairs"
    )
    return f"""<section id="confusions">
<h2>Confused classes</h2>
<p class="note">{shown} of classes in which the nearest neighbour of an image of one is of the other. The pictures: an image, and
what it finds first.</p>
<ul class="findings">
{items}</ul>
</section>
"""


def _suspects(suspects: Sequence[SuspectLabel], book: PictureBook) -> str:
    items = ""
    for suspect in suspects[:SUSPECTS]:
        neighbours = "".join(map(book.picture, suspect.neighbours))
        items += (
            f'<li data-sample="{suspect.image}"><span class="pictures"><span class="pair">{book.picture(suspect.image, "wrong")}→{neighbours}'
            f"</span></span><span>given as <strong>{escape(book.class_name(suspect.label))}</strong>; its {len(suspect.neighbours)} nearest "
            f"are all <strong>{escape(book.class_name(suspect.other))}</strong></span></li>\n"
        )
    found = f"{len(suspects):,} image{'' if len(suspects) == 1 else 's'}" if suspects else "No image"
    shown = f", the likeliest {SUSPECTS} shown" if len(suspects) > SUSPECTS else ""
    return f"""<section id="labels">
<h2>Labels in doubt</h2>
<p class="note">{found}{shown}: all nearest neighbours are of one other class (5 of them, or as many as that class has, 3 at
least). Either the label is wrong, or the model cannot tell the classes apart: look at the pictures.</p>
{f'<ul class="findings">{chr(10)}{items}</ul>' if items else ""}
</section>
"""


def duplicate_section(search: DuplicateSearch, book: PictureBook, train_book: PictureBook) -> str:
    """The section of near-duplicates across training and test images; both books are one where both are of one store."""
    found, (test, train), (all_test, all_train) = len(search.pairs), search.compared, search.total
    items = "".join(
        f'<li data-samples="{pair.test} {pair.train}"><span class="pictures"><span class="pair">{book.picture(pair.test)}='
        f"{train_book.picture(pair.train)}</span></span><span>test: <strong>{escape(book.name_of(pair.test))}</strong>; training: "
        f"<strong>{escape(train_book.name_of(pair.train))}</strong></span></li>\n"
        for pair in search.pairs[:DUPLICATES]
    )
    parts = [
        f"<strong>{found:,} of {test:,} test images</strong> {'is' if found == 1 else 'are'} also among the training images, all but "
        "identical." if found else f"None of {test:,} test images is also among the training images.",
        f"Compared: {_part(test, all_test)} test images with {_part(train, all_train)} training images, at {SIDE} by {SIDE} pixels; "
        f"near-duplicates correlate at {CORRELATION} or more and differ by at most {DIFFERENCE:g} of 255 on average.",
    ]  # fmt: skip
    if search.identical is not None:
        parts.append(
            f"Files that are identical byte by byte, counted over all when the dataset was prepared: {search.identical:,}."
        )
    warning = ' class="warning"' if found else ""
    shown = f'<p class="note">The {DUPLICATES} most alike:</p>\n' if found > DUPLICATES else ""
    return f"""<section id="duplicates">
<h2>Test images that are training images</h2>
<p{warning}>{parts[0]}</p>
<p class="note">{" ".join(parts[1:])}</p>
{shown}{f'<ul class="findings narrow">{chr(10)}{items}</ul>' if items else ""}
</section>
"""


def _part(some: int, total: int) -> str:
    return f"all {total:,}" if some == total else f"{some:,} of {total:,}"
