"""What queries found, as one HTML page that needs no network and no script."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from html import escape
from pathlib import Path

from pipeline.exploration.html_page import html_page
from pipeline.exploration.shown_names import shown_name
from pipeline.searching.index import SearchHit, SearchIndex


def result_page(
    index: SearchIndex, queries: Sequence[tuple[str, bytes]], found: Sequence[Sequence[SearchHit]]
) -> bytes:
    """The page.

    Args:
        index: What was searched.
        queries: Name and thumbnail of each query.
        found: What each of them found.
    """
    manifest = index.manifest
    engine = (
        "exact search"
        if manifest.engine.name == "exact"
        else f"{manifest.engine.name}, recall {manifest.engine.recall:.3f}"
    )
    measure = "cosine similarity" if manifest.distance == "cosine" else "minus the Euclidean distance"
    about = f"{manifest.rows:,} images in {escape(str(index.folder))}, model {escape(manifest.model.source)}; {measure}, {engine}"
    sections = []
    for (name, image), hits in zip(queries, found, strict=True):
        figures = "\n".join(_figure(index, hit) for hit in hits)
        sections.append(
            f'<section>\n<h2>{escape(name)}</h2>\n<div class="row"><figure class="query">{_image(image, "the query")}'
            f"<figcaption>query</figcaption></figure>\n<ol>{figures}</ol></div>\n</section>"
        )
    css = (Path(__file__).parent / "page" / "results.css").read_text(encoding="utf-8")
    header = f'<header><h1>Neighbours</h1><p class="note">{about}</p></header>'
    return html_page("Neighbours", css, "\n".join([header, "<main>", *sections, "</main>"]))


def _figure(index: SearchIndex, hit: SearchHit) -> str:
    name = escape(shown_name(hit.class_name) if hit.class_name else "no class")
    picture = _image(index.thumbnail(hit.id) or b"", f"{name}, {escape(hit.path)}")
    return (
        f'<li><figure title="{escape(hit.path)}">{picture}<figcaption><span class="class">{name}</span>'
        f'<span class="similarity">{hit.similarity:.3f}</span></figcaption></figure></li>'
    )


def _image(data: bytes, text: str) -> str:
    if not data:
        return f'<span class="none" role="img" aria-label="{text}"></span>'
    return f'<img alt="{text}" src="data:image/jpeg;base64,{base64.b64encode(data).decode()}">'


__all__ = ["result_page"]
