"""A finished run as one HTML page that needs no network and no script.

Every image that the gallery shows is embedded once, as the background of a CSS class. A full
gallery (36 queries with 8 neighbours each) takes 1 to 2 MB; pure noise, the worst case for JPEG,
would take 3.3 MB.
"""

from __future__ import annotations

import base64
import io
import os
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import yaml
from jaxtyping import Int64
from PIL import Image

from pipeline.data.reader import open_reader
from pipeline.data.store import Store
from pipeline.errors import UserError
from pipeline.metric_names import COUNTS, metric_title
from pipeline.runs.charts import curves_section
from pipeline.runs.run_folder import CONFIG, NEIGHBOURS, REPORT, SUMMARY, read_changes
from pipeline.runs.tracking import read_metrics
from pipeline.storage import Folder

Groups = Mapping[str, Sequence["RetrievedNeighbours"]]
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

# The browser loads nothing and runs nothing, whatever text a class name or a config value contains.
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"

PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<title>{name} – raydml</title>
<style>{css}</style>
</head>
<body>{body}</body>
</html>
"""


def write_report(run: Folder, store: Store) -> None:
    """Writes report.html into the folder of a finished run.

    Reads summary.json, config.yaml, metrics.jsonl, changes.jsonl, and test_neighbours.npz where
    there is one; of the dataset it reads only the images that are shown.

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
    groups = _choose_queries(run, store)
    body = [
        _header(summary),
        _metrics(summary, read_changes(run)),
        curves_section(read_metrics(run), summary, metric),
        _gallery(groups, store),
        f'<section id="config">\n<h2>Configuration</h2>\n<details><summary>The resolved config</summary>'
        f"<pre>{escape(config)}</pre></details>\n</section>",
    ]
    css = Path(__file__).with_name("report.css").read_text(encoding="utf-8") + _thumbnails(groups, store)
    page = PAGE.format(policy=POLICY, name=escape(summary["name"]), css=css, body="\n".join(body))
    run.write(REPORT, page.encode())


def _header(summary: Mapping[str, Any]) -> str:
    p = summary["protocol"]
    warning = "choices were made on the test classes themselves, so the figures are higher than new classes would give"
    return f"""<header>
<p class="eyebrow">raydml · deep metric learning · run report</p>
<h1>{escape(summary["name"])}</h1>
<p class="key">{_key_sentence(summary)}</p>
{f'<p class="warning">Paper protocol: {warning}.</p>' if p["profile"] == "paper" else ""}
{f'<p class="warning">Partial dataset: {escape(p["partial"])}.</p>' if "partial" in p else ""}
<p class="note">{escape(p["method"])} on {escape(p["backbone"])}, dataset
{escape(p["dataset"])}: {summary["step"]:,} steps, {summary["images"]:,} images in
{summary["seconds"]:,.0f} s ({summary["images_per_second"]:,.1f} images/s, {summary["waiting_for_data"]:.1%} of the time
waiting for data)</p>
</header>"""


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


class RetrievedNeighbours(NamedTuple):
    """A query and its neighbours.

    Attributes:
        query: Store id.
        neighbours: Store ids, nearest first; -1 where the gallery is smaller than that.
        average_precision: The query's term of MAP@R, 0 to 1.
        relevant: R, the number of gallery images of its class.
    """

    query: int
    neighbours: Int64[np.ndarray, " keep"]
    average_precision: float
    relevant: int


def _choose_queries(run: Folder, store: Store) -> Groups:
    """Worst, random and best queries among those that have a positive; empty if there are none.

    Raises:
        UserError: An id is not in the store.
    """
    if not run.exists(NEIGHBOURS):
        return {}
    with np.load(io.BytesIO(run.read(NEIGHBOURS)), allow_pickle=False) as file:
        columns = {name: file[name] for name in RetrievedNeighbours._fields}
    columns["neighbours"] = columns["neighbours"][:, :NEIGHBOURS_SHOWN]
    ids = np.append(columns["query"], columns["neighbours"])
    if not np.isin(ids[ids >= 0], store.sample_id).all():
        raise UserError(f"{run} retrieved images that are not in {store.folder}: it was trained on another dataset")
    # Shuffled first, with a fixed seed: among equals, a stable sort then takes images of any class.
    rows = np.random.default_rng(0).permutation(np.flatnonzero(columns["relevant"] > 0))
    if not len(rows):
        return {}
    precision = columns["average_precision"][rows]
    groups = {}
    for name, key in (("worst", precision), ("random", np.zeros(len(rows))), ("best", -precision)):
        group = rows[np.argsort(key, kind="stable")][:QUERIES_PER_GROUP]
        groups[name] = [RetrievedNeighbours(*(column[row] for column in columns.values())) for row in group]
    return groups


def _shown(groups: Groups) -> Int64[np.ndarray, " images"]:
    """Store ids of the distinct images that are shown, ascending."""
    ids = [sample for group in groups.values() for r in group for sample in (r.query, *r.neighbours) if sample >= 0]
    return np.unique(np.array(ids, np.int64))


def _gallery(groups: Groups, store: Store) -> str:
    """The section of queries with their neighbours."""
    note = HOW_TO_READ if groups else "No test query has another image of its class to find."
    content = f'<p class="note">{note}</p>\n'
    shown = _shown(groups)
    labels = store.label[np.searchsorted(store.sample_id, shown)]
    label_of = dict(zip(shown.tolist(), labels.tolist(), strict=True))
    file_of = _files(shown, store)
    for name, group in groups.items():
        rows = "".join(_row(retrieved, label_of, store.class_name_of, file_of) for retrieved in group)
        content += f'<div class="group" id="{name}">\n<h3>{GROUPS[name]}</h3>\n{rows}</div>\n'
    return f'<section id="gallery">\n<h2>What queries find</h2>\n{content}</section>'


def _files(shown: Int64[np.ndarray, " images"], store: Store) -> dict[int, str]:
    """The file of each image below the folder that they share; empty for stores that do not know it."""
    paths = store.sources(shown) or []
    shared = os.path.commonprefix(paths).rpartition("/")[0]  # noqa: RUF071  # cut at a slash; URIs as well
    names = [path.removeprefix(f"{shared}/") for path in paths]
    return dict(zip(shown.tolist(), names, strict=True)) if names else {}


def _row(
    retrieved: RetrievedNeighbours, label_of: Mapping[int, int], name_of: Mapping[int, str], file_of: Mapping[int, str]
) -> str:
    """A query with its neighbours, framed green where their class is the query's, else red."""
    query_label = label_of[retrieved.query]
    neighbours = ""
    for sample in retrieved.neighbours[retrieved.neighbours >= 0].tolist():
        name = escape(name_of[label_of[sample]])
        hint = f"{name} ({escape(file_of[sample])})" if sample in file_of else name
        right = label_of[sample] == query_label
        verdict = "right" if right else "wrong"
        neighbours += (
            f'<figure class="neighbour {verdict}" data-sample="{sample}" title="{hint}">'
            f'<span class="thumb s{sample}" role="img" aria-label="{verdict}: {name}"></span>'
            f'<span class="mark" aria-hidden="true">{"✓" if right else "✗"}</span>'
            f"{'' if right else f'<figcaption>{name}</figcaption>'}</figure>\n"
        )
    name = escape(name_of[query_label])
    hint = f"{name} ({escape(file_of[retrieved.query])})" if retrieved.query in file_of else name
    return (
        f'<div class="row">\n<figure class="query" data-sample="{retrieved.query}" title="{hint}">'
        f'<span class="thumb s{retrieved.query}" role="img" aria-label="query: {name}"></span>'
        f'<figcaption><span class="name">{name}</span>'
        f"<small>AP@R {retrieved.average_precision:.2f}, R = {retrieved.relevant:,}</small></figcaption></figure>\n"
        f'<div class="neighbours">\n{neighbours}</div>\n</div>\n'
    )


def _thumbnails(groups: Groups, store: Store) -> str:
    """CSS rules, one for each distinct image shown, with a small JPEG of it."""
    ids = _shown(groups)
    images = open_reader(store.folder.uri, store.fingerprint, None).read(ids)  # ascending: each row group is read once
    rules = []
    for sample, data in zip(ids.tolist(), images, strict=True):
        image = Image.open(io.BytesIO(data)).convert("RGB")
        image.thumbnail((THUMBNAIL_SIDE, THUMBNAIL_SIDE))
        out = io.BytesIO()
        image.save(out, "JPEG", quality=85, optimize=True)
        encoded = base64.b64encode(out.getvalue()).decode()
        rules.append(f".s{sample}{{background-image:url(data:image/jpeg;base64,{encoded})}}\n")
    return "".join(rules)
