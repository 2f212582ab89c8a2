"""The section of the map: places, colours, tiles and neighbours of the images, for map.js to draw."""

from __future__ import annotations

import base64
import json
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float32, Int64

from pipeline.data.store import Store
from pipeline.exploration.embedding_sample import EmbeddingSample
from pipeline.exploration.pictures import Sheet, data_url
from pipeline.exploration.projection import FEWEST_FOR_TSNE, nearest, project
from pipeline.exploration.retrieved import labels_of
from pipeline.exploration.shown_names import shown_name

NEIGHBOURS = 8  # of each point
LEGEND = 12  # classes at most whose colours are named
FILES_BYTES = 300_000  # of the images' file names; where they take more, images are told by their number
_NONE = 65535  # a place without a neighbour, an image of no class

HOW_TO_READ = (
    "Each point is an image; near points have like embeddings ({method}). A class has the colour of its middle's place, so a point in a colour other than those around it "
    "lies far from its class."
)


@dataclass(frozen=True)
class MapSection:
    """Parts of a page."""

    html: str
    css: str
    script: str


def map_section(sample: EmbeddingSample, sheet: Sheet, store: Store, what: str = "test images") -> MapSection:
    """The section of a sample of two images or more, whose tiles are on the sheet; takes some 4 ms an image."""
    labels = labels_of(sample.ids, store)
    places = project(sample.embeddings)
    data, names = _data(sample, labels, places, sheet, store, what)
    encoded = json.dumps(data, separators=(",", ":")).replace(
        "<", "\\u003c"
    )  # the same text in JSON, and no tag in HTML
    drawn = "all" if len(sample.ids) == sample.total else f"{len(sample.ids):,} of"
    of_what = f"{drawn} {sample.total:,} {what}" + (", whole classes drawn with a fixed seed" if drawn != "all" else "")
    few = len(sample.ids) < FEWEST_FOR_TSNE
    method = (
        "two principal components"
        if few
        else "principal components, then t-SNE: distances between far groups mean nothing"
    )
    hint = f"Click a point, or move to it with the arrow keys and press Enter: its nearest {what} are listed here."
    html = f"""<section id="map">
<h2>Map of the {escape(what)}</h2>
<p class="note">Shown: {escape(of_what)}. {HOW_TO_READ.format(method=method)}</p>
<noscript><p>The map is drawn by a script, which is off here; all else on this page needs none.</p></noscript>
<div class="map-controls">
<fieldset><legend>Colour</legend>
<label><input type="radio" name="colouring" value="class" checked> class</label>
<label><input type="radio" name="colouring" value="neighbour"> nearest neighbour <span class="is-right">right</span> or
<span class="is-wrong">wrong</span></label></fieldset>
<label class="map-find">Find a class <input type="search" autocomplete="off" spellcheck="false"></label>
<span class="map-count note" role="status"></span>
</div>
<div class="map">
<div class="map-view">
<canvas tabindex="0" role="application" aria-label="Map of {len(sample.ids):,} images. Arrow keys move from image to image, Enter
lists the neighbours, plus and minus zoom."></canvas>
<div class="map-buttons"><button type="button" data-zoom="1.5" aria-label="Zoom in">+</button><button type="button"
data-zoom="0.6667" aria-label="Zoom out">−</button><button type="button" data-zoom="0">whole</button></div>
<div class="map-tip" hidden></div>
</div>
<div class="map-panel empty" data-hint="{escape(hint)}"></div>
</div>
<p class="map-said" aria-live="polite"></p>
{_legend(names, data)}
</section>
<script type="application/json" id="map-data">{encoded}</script>"""
    css = f".tile{{background-image:url({data_url(sheet.data)});background-size:{sheet.columns * 100}% auto}}\n"
    return MapSection(html, css, Path(__file__).with_name("map.js").read_text(encoding="utf-8"))


def _data(
    sample: EmbeddingSample, labels: np.ndarray, places: np.ndarray, sheet: Sheet, store: Store, what: str
) -> tuple[dict[str, Any], list[str]]:
    """What map.js reads, and the names of the classes that occur."""
    classes, of_class = np.unique(labels, return_inverse=True)
    known = classes >= 0
    number = np.where(known, np.cumsum(known) - 1, _NONE)[of_class]
    names = [shown_name(store.class_name_of[label]) for label in classes[known].tolist()]
    hues, tones = class_colours(places, number, len(names))
    neighbours = nearest(sample.embeddings, NEIGHBOURS)
    cosines = None
    if sample.distance == "cosine":
        pairs = np.einsum("nd,nkd->nk", sample.embeddings, sample.embeddings[np.maximum(neighbours, 0)])
        cosines = _base64(np.clip(np.round(100 * (pairs + 1)), 0, 200).astype(np.uint8))
    files = _short_names(store.sources(sample.ids))
    return {
        "points": len(sample.ids),
        "k": NEIGHBOURS,
        "columns": sheet.columns,
        "rows": -(-len(sample.ids) // sheet.columns),
        "what": what,
        "classes": names,
        "hues": hues,
        "tones": tones,
        "places": _base64(np.round(np.clip(places, 0, 1) * 65535).astype("<u2")),
        "labels": _base64(number.astype("<u2")),
        "neighbours": _base64(np.where(neighbours < 0, _NONE, neighbours).astype("<u2")),
        "cosines": cosines,
        "files": files,
        "ids": None if files else sample.ids.tolist(),
    }, names


def class_colours(
    places: Float32[np.ndarray, "images 2"], number: Int64[np.ndarray, " images"], num_classes: int
) -> tuple[list[int], list[float]]:
    """Hue in degrees and tone from 0 to 1 of each class: the angle and the distance of its middle from the map's middle.

    Both are evenly spread: classes are ranked by angle, and by distance. The middle is the median.
    """
    if not num_classes:
        return [], []
    middles = np.array([np.median(places[number == label], axis=0) for label in range(num_classes)]) - 0.5
    angle = np.arctan2(middles[:, 1], middles[:, 0])
    ranks = [np.argsort(np.argsort(key, kind="stable")) for key in (angle, np.hypot(*middles.T))]
    return (ranks[0] * 360 // num_classes).tolist(), np.round(ranks[1] / max(1, num_classes - 1), 3).tolist()


def _legend(names: Sequence[str], data: dict[str, Any]) -> str:
    """Names and colours of the classes, where they are few."""
    if len(names) > LEGEND:
        return ""
    items = "".join(
        f'<li><span class="dot" style="--hue:{hue};--tone:{tone}"></span>{escape(name)}</li>'
        for name, hue, tone in zip(names, data["hues"], data["tones"], strict=True)
    )
    return f'<ul class="map-legend">{items}</ul>'


def _short_names(paths: list[str] | None) -> list[str] | None:
    """The last two parts of each path; None where they are not known, or take too much of the page."""
    names = ["/".join(path.split("/")[-2:]) for path in paths or []]
    return names if names and sum(map(len, names)) <= FILES_BYTES else None


def _base64(values: np.ndarray) -> str:
    return base64.b64encode(values.tobytes()).decode()
