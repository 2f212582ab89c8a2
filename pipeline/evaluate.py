"""`python -m pipeline.evaluate RUN [RUN ...] | EMBEDDINGS.npy LABELS.npy [...]`: exact retrieval metrics.

    python -m pipeline.evaluate emoji                          the run of that name (or its folder): the test classes, or the
                                                               validation fold while it is not finished
    python -m pipeline.evaluate emoji --data birds             the run on the test images of another prepared dataset
    python -m pipeline.evaluate seed0 seed1 seed2              the test classes with each run, and with their embeddings side by
                                                               side ("concatenated")
    python -m pipeline.evaluate emoji --embed-to FOLDER        its embeddings, as Parquet files (see `pipeline.inference.embed`)
    python -m pipeline.evaluate x.npy y.npy                    leave-one-out over [N, D] embeddings and [N] labels
    python -m pipeline.evaluate x.npy y.npy --gallery g.npy h.npy   queries against another set
    python -m pipeline.evaluate emoji --dims 16 32 64 --quantise int8 binary   a run or arrays: what fewer dimensions and bits cost

Neighbours are exact (float64, ties by row).
"""

from __future__ import annotations

import argparse
import io
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pipeline.data.entries import SPLITS
from pipeline.errors import RunError, UserError, fail
from pipeline.metric_names import COUNTS

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from pipeline.evaluation.arrays import Evaluation
    from pipeline.evaluation.compact import CompactRow
    from pipeline.evaluation.reid import ReidRetrieval
    from pipeline.evaluation.retrieval import Distance, Retrieval

PROG = "python -m pipeline.evaluate"
SPLITS_OF = {"test": ("test", "query", "gallery"), "train": ("train",), "all": SPLITS}  # by --split, for --embed-to


@dataclass(frozen=True)
class Figures:
    """What is printed and written.

    Attributes:
        metrics: In percent, by name.
        retrieval: Results of every query.
        labels, names: Number of each query's class, and the classes' names.
        lines: Text above the table and below it.
        partial: A sentence for each thing that the dataset lacks.
        compact: Figures by dimensions and precision.
    """

    metrics: dict[str, Any]
    retrieval: Retrieval | ReidRetrieval
    labels: np.ndarray
    names: list[str]
    lines: tuple[list[str], list[str]] = ([], [])
    partial: tuple[str, ...] = ()
    compact: tuple[CompactRow, ...] = ()


def build_parser(prog: str = PROG) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=prog, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("inputs", nargs="+", metavar="RUN [RUN ...] | EMBEDDINGS.npy LABELS.npy")
    parser.add_argument(
        "--gallery", nargs=2, metavar=("EMBEDDINGS", "LABELS"), help="search here instead of leave-one-out"
    )
    parser.add_argument("--recall-at", nargs="+", type=int, help="every K of Recall@K (default: the run's, or 1 2 4 8)")
    parser.add_argument(
        "--split",
        choices=("validation", *SPLITS_OF),
        help="with a run: measure test or validation classes (default: test; validation if the run is not finished); with "
        "--embed-to: embed test, train or all images (default: test)",
    )
    parser.add_argument(
        "--checkpoint", help="with a run: best, last, or a step (default: the run's evaluation.checkpoint)"
    )
    parser.add_argument(
        "--data",
        metavar="DATASET",
        help="with a run: measure the test images of another dataset, a name below STORAGE/data or the folder or s3:// URI "
        "of a store",
    )
    parser.add_argument(
        "--distance",
        choices=("cosine", "euclidean"),
        help="what nearest means (default: the run's evaluation.distance; cosine for arrays)",
    )
    parser.add_argument(
        "--per-class", metavar="PATH.csv", help="write the figures of every class into this file, worst first"
    )
    parser.add_argument(
        "--dims",
        nargs="+",
        type=int,
        metavar="D",
        help="measure the first D dimensions of the embeddings as well (default: those that the run trained by "
        "method.matryoshka)",
    )
    parser.add_argument(
        "--quantise",
        nargs="+",
        choices=("int8", "binary"),
        help="measure embeddings of one byte or one bit a dimension as well, with and without re-scoring",
    )
    parser.add_argument(
        "--oversample",
        type=int,
        metavar="N",
        help="with --quantise: candidates that are scored again, as a multiple of the neighbours that a query needs (default: 4)",
    )
    parser.add_argument("--clustering", action="store_true", help="measure NMI and AMI as well")
    parser.add_argument(
        "--save", metavar="PREFIX", help="with a run: write PREFIX.embeddings.npy and PREFIX.labels.npy"
    )
    parser.add_argument(
        "--embed-to",
        metavar="FOLDER",
        help="with a run: write sample ids, labels and embeddings into this folder (local or s3://) as Parquet files, and "
        "measure nothing",
    )
    parser.add_argument(
        "--workers", type=int, help="with --embed-to: processes on Ray (default: one a core); 0: this process"
    )
    parser.add_argument("--json", metavar="PATH", help="write the metrics into this file as well")
    return parser


def main(arguments: list[str] | None = None, prog: str = PROG) -> int:
    """Exit status: 0 measured or embedded, 2 bad input or a failed evaluation, 130 interrupted."""
    options = build_parser(prog).parse_args(arguments)
    try:
        if options.recall_at and min(options.recall_at) < 1:
            raise UserError(f"--recall-at {options.recall_at}: every K has to be at least 1")
        if options.oversample is not None and (not options.quantise or options.oversample < 1):
            raise UserError(f"--oversample {options.oversample}: expected 1 or more, and --quantise")
        if options.embed_to:
            _embed(options)
            return 0
        if len(options.inputs) > 1 and not _are_arrays(options.inputs):
            _measure_runs(options)
            return 0
        figures = _measure_run(options) if len(options.inputs) == 1 else _measure_arrays(options)
        if options.json:
            notes: dict[str, Any] = {"partial": list(figures.partial)} if figures.partial else {}
            if figures.compact:
                notes["compact"] = [row.as_json() for row in figures.compact]
            _write(options.json, json.dumps(figures.metrics | notes, indent=1).encode())
        if options.per_class:
            from pipeline.evaluation.per_class import as_csv, per_class

            recall_at = [int(key.partition("@")[2]) for key in figures.metrics if key.startswith(("recall@", "cmc@"))]
            _write(options.per_class, as_csv(per_class(figures.retrieval, figures.labels, figures.names, recall_at)))
    except (UserError, RunError) as error:
        return fail(error, 2)
    except KeyboardInterrupt:
        print("error: interrupted; run the same command again", file=sys.stderr)
        return 130
    from rich.console import Console

    from pipeline.runs.terminal import metrics_table

    out = Console(markup=False, emoji=False)
    above, below = figures.lines
    for line in (" ".join(options.inputs), *above):
        out.print(line, highlight=False, soft_wrap=True)
    out.print(metrics_table(figures.metrics))
    if figures.compact:
        from pipeline.console import aligned

        for line in aligned(_compact_table(figures.compact)):
            out.print(line, highlight=False, soft_wrap=True)
    for line in below:
        out.print(line, highlight=False, soft_wrap=True)
    return 0


def _compact_table(rows: Sequence[CompactRow]) -> list[tuple[str, ...]]:
    """Rows of text: how embeddings are stored and searched, their bytes, and the figures in percent."""
    names = [name for name in rows[0].metrics if name not in COUNTS]
    table = [("dims", "stored", "bytes", "found by", "ranked by", *names)]
    for row in rows:
        figures = (f"{row.metrics[name]:.2f}" for name in names)
        table.append((str(row.dim), row.stored, f"{row.bytes_per_image:,}", row.found_by, row.ranked_by, *figures))
    return table


def _write(path: str, data: bytes) -> None:
    try:
        with open(path, "wb") as file:
            file.write(data)
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror}") from error


def _are_arrays(inputs: list[str]) -> bool:
    """True if one of several inputs is a file; runs are folders or names."""
    return any(os.path.isfile(path) or path.endswith((".npy", ".npz")) for path in inputs)


def _measure_arrays(options: argparse.Namespace) -> Figures:
    """Metrics of arrays in files."""
    if len(options.inputs) != 2:
        raise UserError(f"got {len(options.inputs)} inputs, expected runs, or embeddings and labels")
    if options.checkpoint or options.save or options.split or options.data or options.workers is not None:
        raise UserError("--checkpoint, --save, --split, --data and --workers go with a run, not with arrays")
    # here and below: each kind of evaluation imports what it needs
    from pipeline.evaluation.array_files import read_embeddings, read_labels
    from pipeline.evaluation.arrays import evaluate

    pairs = [options.inputs, *([options.gallery] if options.gallery else [])]
    embeddings = [read_embeddings(path) for path, _ in pairs]
    labels = [read_labels(labels, len(x), path) for x, (path, labels) in zip(embeddings, pairs, strict=True)]
    gallery, gallery_labels = (embeddings[1], labels[1]) if options.gallery else (None, None)
    distance: Distance = options.distance or "cosine"
    found = evaluate(
        embeddings[0], labels[0], gallery=gallery, gallery_labels=gallery_labels, distance=distance,
        recall_at=options.recall_at or (1, 2, 4, 8), clustering=options.clustering,
    )  # fmt: skip
    compact = _compact_arrays(options, embeddings, found) if options.dims or options.quantise else ()
    lines: tuple[list[str], list[str]] = ([], [f"distance: {distance}"])
    return Figures(found.metrics, found.retrieval, found.labels, found.class_names, lines, compact=compact)


def _compact_arrays(options: argparse.Namespace, embeddings: list[Tensor], found: Evaluation) -> tuple[CompactRow, ...]:
    import torch

    from pipeline.evaluation.compact import OVERSAMPLE, measure_compact

    labels = torch.from_numpy(found.labels)
    gallery = embeddings[1] if options.gallery else None
    gallery_labels = None if found.gallery_labels is None else torch.from_numpy(found.gallery_labels)
    return tuple(
        measure_compact(
            embeddings[0], labels, gallery, gallery_labels, dims=options.dims or (), quantise=options.quantise or (),
            recall_at=options.recall_at or (1, 2, 4, 8), distance=options.distance or "cosine",
            oversample=options.oversample or OVERSAMPLE,
        )
    )  # fmt: skip


def _measure_run(options: argparse.Namespace) -> Figures:
    """Metrics of a run's checkpoint on one of its splits, or on another dataset."""
    if options.gallery:
        raise UserError("--gallery goes with arrays; a dataset has its own query and gallery splits")
    if options.split not in (None, "test", "validation") or options.workers is not None:
        raise UserError(
            f"--workers and --split {options.split} go with --embed-to; without it, --split is test or validation"
        )
    if options.data and options.split == "validation":
        raise UserError("--data measures the test images of a dataset: leave out --split validation")
    from pipeline.inference.measure import measure

    found = measure(
        options.inputs[0], options.checkpoint, options.split, data=options.data, distance=options.distance,
        recall_at=options.recall_at, clustering=options.clustering, embeddings=bool(options.save),
        dims=options.dims, quantise=options.quantise or (), oversample=options.oversample,
    )  # fmt: skip
    queries = found.result.queries
    _tell_partial(found.partial)
    if found.embeddings is not None:
        import numpy as np

        for name, array in (("embeddings", found.embeddings.cpu().numpy()), ("labels", found.query_labels)):
            buffer = io.BytesIO()
            np.save(buffer, array)
            _write(f"{options.save}.{name}.npy", buffer.getvalue())
    return Figures(
        found.result.metrics, found.result.retrieval, queries.labels, list(queries.class_names),
        ([found.title, *found.notes], [f"protocol: {found.protocol}"]), found.partial, found.compact,
    )  # fmt: skip


def _measure_runs(options: argparse.Namespace) -> None:
    """Prints the figures of several runs on the test classes, and of their concatenated embeddings."""
    for option in ("gallery", "split", "data", "distance", "per_class", "save", "workers", "dims", "quantise"):
        if getattr(options, option) is not None:
            raise UserError(f"--{option.replace('_', '-')} goes with one run, got {len(options.inputs)}")
    from pipeline.runs.records import find_run

    folders = [find_run(name) for name in options.inputs]  # before PyTorch is loaded
    from pipeline.console import aligned
    from pipeline.inference.ensemble import measure_runs

    found = measure_runs(
        folders, checkpoint=options.checkpoint, recall_at=options.recall_at, clustering=options.clustering
    )
    _tell_partial(tuple(found.store.partial))
    concatenated = found.result.metrics
    if options.json:
        each = [{"run": model.run.uri, "metrics": own} for model, own in zip(found.models, found.own, strict=True)]
        _write(options.json, json.dumps({"concatenated": concatenated, "runs": each}, indent=1).encode())
    names = [name for name in concatenated if name not in COUNTS]
    rows = [("%", *names, "checkpoint")]
    for name, model, own in zip(options.inputs, found.models, found.own, strict=True):
        rows.append((name, *(f"{own[key]:.2f}" for key in names), model.title))
    rows.append(("concatenated", *(f"{concatenated[key]:.2f}" for key in names), ""))
    print(f"test classes of {found.store.title}, {concatenated['queries']:,} queries")
    print("\n".join(aligned(rows)))
    print(f"distance {found.models[0].config.evaluation.distance}")


def _tell_partial(partial: tuple[str, ...]) -> None:
    """Prints what a dataset lacks."""
    if partial:
        from rich.console import Console

        Console(stderr=True, markup=False, emoji=False).print(
            f"partial dataset: {'; '.join(partial)}", highlight=False, soft_wrap=True
        )


def _embed(options: argparse.Namespace) -> None:
    """Writes the embeddings of a run's images into files; measures nothing."""
    measuring = (options.gallery, options.save, options.recall_at, options.clustering, options.data, options.per_class)
    if len(options.inputs) != 1 or any(measuring) or options.distance or options.dims or options.quantise:
        raise UserError(
            "--embed-to goes with one run, and neither --gallery, --save, --recall-at, --data, --per-class, --distance, --dims, "
            "--quantise nor --clustering"
        )
    if options.workers is not None and options.workers < 0:
        raise UserError(f"--workers is {options.workers}, expected 0 (this process) or more")
    from pipeline.distributed.cpus import use_cpus
    from pipeline.inference.embed import embed
    from pipeline.inference.trained_model import load_run
    from pipeline.storage import Folder

    trained = load_run(options.inputs[0], options.checkpoint)
    if options.split == "validation":
        raise UserError(
            "--split validation is a part of the training images: embed --split train, and select rows by their label"
        )
    splits = SPLITS_OF[options.split or "test"]
    _tell_partial(tuple(trained.store().partial))
    cores = os.cpu_count() or 1
    if options.workers == 0:
        use_cpus(cores)
    workers = options.workers if options.workers is not None else cores
    manifest = embed(trained, splits, Folder(options.embed_to), workers)
    if options.json:
        _write(options.json, json.dumps(manifest, indent=1).encode())
    print(
        f"{manifest['rows']:,} embeddings of {manifest['dim']} dimensions, {manifest['parts']} files: {options.embed_to}"
    )


if __name__ == "__main__":
    sys.exit(main())
