"""A finished run as one HTML page that needs no network; only the map of the test images needs its script.

Every picture is embedded once, as the background of a CSS class. A full gallery (36 queries with 8 neighbours each) takes
1 to 2 MB; pure noise, the worst case for JPEG, would take 3.3 MB. A map of 8,000 images takes 2.5 MB at most.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from jaxtyping import Int64

from pipeline.data.store import Store
from pipeline.errors import UserError
from pipeline.exploration.compose import compose
from pipeline.exploration.duplicates import DuplicateSearch, sample_row_groups
from pipeline.exploration.embedding_sample import MAX_IMAGES, EmbeddingSample
from pipeline.exploration.html_page import html_page
from pipeline.exploration.picture_book import PictureBook
from pipeline.exploration.retrieved import Retrieved
from pipeline.metric_names import COUNTS, metric_title
from pipeline.runs.charts import curves_section
from pipeline.runs.report_gallery import gallery_section
from pipeline.runs.run_folder import CONFIG, EMBEDDINGS, NEIGHBOURS, REPORT, SUMMARY, read_changes
from pipeline.runs.summary import warnings
from pipeline.runs.tracking import read_metrics
from pipeline.storage import Folder

NO_MAP = (
    "This run was finished by an earlier version, which kept no embeddings: <code>raydml explore {run}</code> makes a map of "
    "its test images."
)


def write_report(run: Folder, store: Store) -> None:
    """Writes report.html into the folder of a finished run.

    Reads summary.json, config.yaml, metrics.jsonl, changes.jsonl, and test_neighbours.npz and test_embeddings.npz where
    there are any; of the dataset the images that are shown, those of the map, and at most 10,000 training images to compare
    them with. The map of 6,253 images takes some 25 s of CPU time, the comparison 5 to 30 s.

    Args:
        run: The run folder.
        store: The dataset of the run.

    Raises:
        UserError: The run has not finished, or its neighbours are not samples of this dataset.
        RunError: A shard of the dataset is damaged.
    """
    if not run.exists(SUMMARY):
        raise UserError(f"{run} contains no finished run (no summary.json): finish it with `python -m pipeline.train`")
    summary = run.read_json(SUMMARY)
    config = run.read(CONFIG).decode()
    metric = yaml.safe_load(config)["evaluation"]["metric"]
    book = PictureBook(store)
    found = _read_neighbours(run, store)
    gallery = gallery_section(found, book)
    sample = EmbeddingSample.from_bytes(run.read(EMBEDDINGS), f"{run}/{EMBEDDINGS}") if run.exists(EMBEDDINGS) else None
    sections = compose(book, found, sample, _images_to_compare(found, sample), store)
    body = [
        _header(summary, sections.search),
        _metrics(summary, read_changes(run)),
        sections.map.html if sections.map else _no_map(found, sample, summary["name"]),
        curves_section(read_metrics(run), summary, metric),
        gallery,
        sections.classes,
        sections.duplicates,
        f'<section id="config">\n<h2>Configuration</h2>\n<details><summary>The resolved config</summary>'
        f"<pre>{escape(config)}</pre></details>\n</section>",
    ]
    run.write(REPORT, html_page(summary["name"], page_css() + sections.css(book), "\n".join(body), sections.scripts))


def page_css() -> str:
    """The style of a run's pages, but for the pictures."""
    names = ("report.css", "explore.css", "print.css")
    return "".join(Path(__file__).with_name(name).read_text(encoding="utf-8") for name in names)


def _read_neighbours(run: Folder, store: Store) -> Retrieved | None:
    """What the test queries found; None where nothing was measured.

    Raises:
        UserError: An id is not in the store.
    """
    if not run.exists(NEIGHBOURS):
        return None
    with np.load(io.BytesIO(run.read(NEIGHBOURS)), allow_pickle=False) as file:
        columns = dict(file)
    try:
        return Retrieved.of(columns, store)
    except KeyError as error:
        raise UserError(
            f"{run} retrieved images that are not in {store.folder}: it was trained on another dataset"
        ) from error


def _images_to_compare(found: Retrieved | None, sample: EmbeddingSample | None) -> Int64[np.ndarray, " images"]:
    """The test images that are compared with the training images: those of the map, or as many queries."""
    if sample is not None:
        return sample.ids
    return np.empty(0, np.int64) if found is None else np.sort(sample_row_groups(found.query, MAX_IMAGES, 1))


def _no_map(found: Retrieved | None, sample: EmbeddingSample | None, name: str) -> str:
    """A sentence that says how to get the map of a run without embeddings; nothing where there is nothing to draw."""
    return (
        f'<p class="note" id="no-map">{NO_MAP.format(run=escape(name))}</p>'
        if found is not None and sample is None
        else ""
    )


def _header(summary: Mapping[str, Any], search: DuplicateSearch | None) -> str:
    p = summary["protocol"]
    warning = "choices were made on the test classes themselves, so the figures are higher than new classes would give"
    return f"""<header>
<p class="eyebrow">raydml · deep metric learning · run report</p>
<h1>{escape(summary["name"])}</h1>
{_warnings(summary)}<p class="key">{_key_sentence(summary)}</p>
{f'<p class="warning">Paper protocol: {warning}.</p>' if p["profile"] == "paper" else ""}
{f'<p class="warning">Partial dataset: {escape(p["partial"])}.</p>' if "partial" in p else ""}
{_leakage(search)}
<p class="note">{escape(p["method"])} on {escape(p["backbone"])}, dataset
{escape(p["dataset"])}: {summary["step"]:,} steps, {summary["images"]:,} images in
{summary["seconds"]:,.0f} s ({summary["images_per_second"]:,.1f} images/s, {summary["waiting_for_data"]:.1%} of the time
waiting for data)</p>
</header>"""


def _leakage(search: DuplicateSearch | None) -> str:
    """A line where test images are training images as well."""
    if search is None or not search.pairs:
        return ""
    return (
        f'<p class="warning"><a href="#duplicates">{len(search.pairs):,} of {search.compared[0]:,} test images</a> are also '
        "among the training images, all but identical.</p>"
    )


def _warnings(summary: Mapping[str, Any]) -> str:
    """Warnings above the figures."""
    return "".join(f'<p class="warning">{escape(line.partition(": ")[2])}</p>' for line in warnings(summary))


def _key_sentence(summary: Mapping[str, Any]) -> str:
    frozen, final = summary["frozen"], summary["final"]
    name = next((n for n in ("recall@1", *final) if n in final and n not in COUNTS), None)
    if name is None:
        return "Nothing was measured on classes never seen in training: no test images, or evaluation.test is off."
    short = escape(metric_title(name).replace("Recall@", "R@"))
    before = f"goes from {frozen[name]:.1f} % (frozen backbone) to" if name in frozen else "is"
    return (
        f"On classes never seen in training, {short} {before} <strong>{final[name]:.1f} %</strong> (trained), "
        f"measured with {final['queries']:,.0f} queries."
    )


def _metrics(summary: Mapping[str, Any], changes: Sequence[Mapping[str, Any]]) -> str:
    """The section of metrics: tables on the left, the protocol on the right."""
    final, validation = summary["final"], summary["validation"]
    tables = ""
    if final:
        num_without_positive = final.get("queries_without_positive", 0)
        left_out = (
            f"; {num_without_positive:,.0f} more left out, with none of their class to find"
            if num_without_positive
            else ""
        )
        caption = f"Test classes, never seen in training: %, {final['queries']:,.0f} queries{left_out}"
        tables += _table(caption, final, summary["frozen"])
        tables += _dims_table(summary.get("by_dim", {}))
    if validation:
        classes = "test" if summary["protocol"]["profile"] == "paper" else "held-out training"
        tables += _table(f"Best validation, on {classes} classes: %, {validation['queries']:,.0f} queries", validation)
    protocol = [(key.replace("_", " "), escape(str(value))) for key, value in summary["protocol"].items()]
    protocol += [("reproducible", _reproducible(summary)), ("changes while running", _changes(changes))]
    terms = "\n".join(f"<dt>{escape(key)}</dt><dd>{value}</dd>" for key, value in protocol)
    return f"""<section id="metrics">
<h2>Retrieval on unseen classes</h2>
<div class="beside">
<div>{tables or "<p>No test images and no validation fold: nothing was measured.</p>"}
<p class="note">Frozen: pooled features of the pretrained backbone. Gain: percentage points. Recall@K: share of queries
with an image of their class among their K nearest. R-Precision: share of right images among the R nearest, where R is
how many there are; MAP@R also counts how early they come. NMI, AMI: agreement of k-means clusters with the classes.</p>
</div>
<dl class="protocol">{terms}</dl>
</div>
</section>"""


def _table(caption: str, trained: Mapping[str, float], frozen: Mapping[str, float] | None = None) -> str:
    """A table with a row for each metric; if `frozen` is given, also its columns frozen and gain ("–" where missing)."""
    columns = ("trained",) if frozen is None else ("frozen", "trained", "gain")
    head = "".join(f'<th scope="col">{column}</th>' for column in ("metric", *columns))
    lines = [f"<table>\n<caption>{escape(caption)}</caption>\n<tr>{head}</tr>"]
    for name, value in trained.items():
        if name in COUNTS:
            continue
        cells = [f"{value:.2f}"]
        if frozen is not None:
            before = frozen.get(name)
            cells = ["–", *cells, "–"] if before is None else [f"{before:.2f}", *cells, f"{value - before:+.2f}"]
        data = "".join(f"<td>{cell}</td>" for cell in cells)
        lines.append(f'<tr data-metric="{escape(name)}"><th scope="row">{escape(metric_title(name))}</th>{data}</tr>')
    return "\n".join([*lines, "</table>\n"])


def _dims_table(by_dim: Mapping[str, Mapping[str, float]]) -> str:
    """A table with a row for each number of dimensions kept; nothing without any."""
    if not by_dim:
        return ""
    names = [name for name in next(iter(by_dim.values())) if name not in COUNTS]
    head = "".join(f'<th scope="col">{escape(metric_title(name))}</th>' for name in names)
    rows = [
        f'<tr data-dim="{escape(dim)}"><th scope="row">{escape(dim)}</th>'
        f"{''.join(f'<td>{found[name]:.2f}</td>' for name in names)}</tr>"
        for dim, found in by_dim.items()
    ]
    caption = "By dimensions kept: the first of the embedding, at length one, %"
    lines = [f"<table>\n<caption>{caption}</caption>", f'<tr><th scope="col">dimensions</th>{head}</tr>', *rows]
    return "\n".join([*lines, "</table>\n"])


def _reproducible(summary: Mapping[str, Any]) -> str:
    if summary["reproducible"]:
        return "yes: deterministic kernels, and no key that affects the result changed while running"
    keys = summary["changed_while_running"]
    if keys:
        return escape(f"no: changed while running: {', '.join(keys)}")
    if summary["protocol"].get("mining", "").endswith("async"):
        return "no: mining.consistency is async, searches reflect the updates that had arrived"
    return "no: runtime.deterministic is off"


def _changes(changes: Sequence[Mapping[str, Any]]) -> str:
    items = [f"<li>step {int(line['step']):,}: {escape(change)}</li>" for line in changes for change in line["changes"]]
    return f"<ul>{''.join(items)}</ul>" if items else "none"
