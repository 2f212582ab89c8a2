"""`python -m pipeline.evaluate RUN | EMBEDDINGS.npy LABELS.npy [...]`: exact retrieval metrics.

    python -m pipeline.evaluate emoji                          the run of that name (or its folder), on the test classes
    python -m pipeline.evaluate emoji --embed-to FOLDER        its embeddings, as Parquet files (see `pipeline.inference.embed`)
    python -m pipeline.evaluate x.npy y.npy                    leave-one-out over [N, D] embeddings and [N] labels
    python -m pipeline.evaluate x.npy y.npy --gallery g.npy h.npy   queries against another set

Rows are compared by cosine; neighbours are exact (float64, ties by row).
"""

from __future__ import annotations

import argparse
import io
import json
import os
import sys
from typing import TYPE_CHECKING, Any

from pipeline.data.entries import SPLITS
from pipeline.errors import RunError, UserError, one_line

if TYPE_CHECKING:
    import torch

    from pipeline.data.store import Store
    from pipeline.inference.trained_model import TrainedModel

PROG = "python -m pipeline.evaluate"
SPLITS_OF = {"test": ("test", "query", "gallery"), "train": ("train",), "all": SPLITS}  # by --split, for --embed-to


def build_parser(prog: str = PROG) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=prog, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("inputs", nargs="+", metavar="RUN | EMBEDDINGS.npy LABELS.npy")
    parser.add_argument(
        "--gallery", nargs=2, metavar=("EMBEDDINGS", "LABELS"), help="search here instead of leave-one-out"
    )
    parser.add_argument("--recall-at", nargs="+", type=int, help="every K of Recall@K (default: the run's, or 1 2 4 8)")
    parser.add_argument(
        "--split",
        choices=("validation", *SPLITS_OF),
        default="test",
        help="with a run: measure test or validation classes; with --embed-to: embed test, train or all images",
    )
    parser.add_argument(
        "--checkpoint", help="with a run: best, last, or a step (default: the run's evaluation.checkpoint)"
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
        if options.embed_to:
            _embed(options)
            return 0
        metrics, partial = _measure_run(options) if len(options.inputs) == 1 else (_measure_arrays(options), ())
        if options.json:
            notes = {"partial": list(partial)} if partial else {}
            _write(options.json, json.dumps(metrics | notes, indent=1).encode())
    except (UserError, RunError) as error:
        print(f"error: {one_line(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("error: interrupted; run the same command again", file=sys.stderr)
        return 130
    from rich.console import Console

    from pipeline.runs.terminal import metrics_table

    out = Console(markup=False, emoji=False)
    out.print(" ".join(options.inputs), highlight=False, soft_wrap=True)
    out.print(metrics_table(metrics))
    return 0


def _write(path: str, data: bytes) -> None:
    try:
        with open(path, "wb") as file:
            file.write(data)
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror}") from error


def _measure_arrays(options: argparse.Namespace) -> dict[str, Any]:
    """Metrics of arrays in files."""
    if len(options.inputs) != 2:
        raise UserError(f"got {len(options.inputs)} inputs, expected one run, or embeddings and labels")
    if options.checkpoint or options.save or options.split != "test" or options.workers is not None:
        raise UserError("--checkpoint, --save, --split and --workers go with a run, not with arrays")
    from pipeline.evaluation.retrieval import retrieve  # here and below: each kind of evaluation imports what it needs

    embeddings, labels = _read_arrays(*options.inputs)
    gallery, gallery_labels = _read_arrays(*options.gallery) if options.gallery else (None, None)
    if gallery is not None and gallery.shape[1] != embeddings.shape[1]:
        raise UserError(f"queries have {embeddings.shape[1]} dimensions, the gallery has {gallery.shape[1]}")
    try:
        result = retrieve(embeddings, labels, gallery=gallery, gallery_labels=gallery_labels)
        metrics = result.summary(options.recall_at or (1, 2, 4, 8))
        if options.clustering:
            from pipeline.evaluation.clustering import clustering

            metrics |= clustering(embeddings, labels)
        return metrics
    except ValueError as error:
        raise UserError(str(error)) from error


def _read_arrays(embeddings: str, labels: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Embeddings [N, D] and labels [N] from two .npy files.

    Raises:
        UserError: A file cannot be read, or has another shape or type.
    """
    import numpy as np
    import torch

    arrays = []
    for path, dims, kinds in ((embeddings, 2, "f"), (labels, 1, "iu")):
        try:
            array = np.load(path, allow_pickle=False)
        except (OSError, ValueError) as error:
            raise UserError(f"{path} cannot be read as a .npy array ({error})") from error
        if array.ndim != dims or array.dtype.kind not in kinds:
            expected = "floats [N, D]" if dims == 2 else "integers [N]"
            raise UserError(f"{path} contains {array.dtype} {list(array.shape)}, expected {expected}")
        arrays.append(array)
    if len(arrays[0]) != len(arrays[1]):
        raise UserError(f"{embeddings} has {len(arrays[0])} rows, {labels} has {len(arrays[1])}")
    x = arrays[0] if arrays[0].dtype == np.float64 else arrays[0].astype(np.float32)
    return torch.from_numpy(np.ascontiguousarray(x)), torch.from_numpy(arrays[1].astype(np.int64))


def _measure_run(options: argparse.Namespace) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Metrics of a run's checkpoint on one of its splits, and a sentence for each thing that its dataset lacks."""
    if options.gallery:
        raise UserError("--gallery goes with arrays; a dataset has its own query and gallery splits")
    if options.split not in ("test", "validation") or options.workers is not None:
        raise UserError(
            f"--workers and --split {options.split} go with --embed-to; without it, --split is test or validation"
        )
    import numpy as np
    import torch

    from pipeline.evaluation.evaluate_task import evaluate
    from pipeline.evaluation.tasks import test_task, validation_task
    from pipeline.inference.trained_model import load_run

    trained = load_run(options.inputs[0], options.checkpoint)
    config = trained.config
    store = _open_store(trained)
    task = validation_task(config, store) if options.split == "validation" else test_task(config, store)
    if task is None:
        raise UserError(f"the run has no {options.split} images to evaluate")
    gpu = torch.cuda.is_available() and config.runtime.gpus_per_worker
    torch.set_num_threads(os.cpu_count() or 1)
    embedder, trunk, method = trained.load(store, torch.device("cuda" if gpu else "cpu"))
    if options.save:
        embeddings = embedder(task.queries.ids, trunk, method).cpu().numpy()
        for name, array in (("embeddings", embeddings), ("labels", task.queries.labels)):
            buffer = io.BytesIO()
            np.save(buffer, array)
            _write(f"{options.save}.{name}.npy", buffer.getvalue())
    recall_at = options.recall_at or config.evaluation.recall_at
    return evaluate(task, embedder, trunk, method, recall_at, options.clustering).metrics, tuple(store.partial)


def _open_store(trained: TrainedModel) -> Store:
    """Opens the dataset of a run; prints what it lacks."""
    store = trained.store()
    if store.partial:
        from rich.console import Console

        Console(stderr=True, markup=False, emoji=False).print(
            f"partial dataset: {'; '.join(store.partial)}", highlight=False, soft_wrap=True
        )
    return store


def _embed(options: argparse.Namespace) -> None:
    """Writes the embeddings of a run's images into files; measures nothing."""
    if len(options.inputs) != 1 or options.gallery or options.save or options.recall_at or options.clustering:
        raise UserError("--embed-to goes with one run, and neither --gallery, --save, --recall-at nor --clustering")
    if options.workers is not None and options.workers < 0:
        raise UserError(f"--workers is {options.workers}, expected 0 (this process) or more")
    import torch

    from pipeline.inference.embed import embed
    from pipeline.inference.trained_model import load_run
    from pipeline.storage import Folder

    trained = load_run(options.inputs[0], options.checkpoint)
    if options.split == "validation":
        raise UserError(
            "--split validation is a part of the training images: embed --split train, and select rows by their label"
        )
    splits = SPLITS_OF[options.split]
    _open_store(trained)
    cores = os.cpu_count() or 1
    if options.workers == 0:
        torch.set_num_threads(cores)
    workers = options.workers if options.workers is not None else cores
    manifest = embed(trained, splits, Folder(options.embed_to), workers)
    if options.json:
        _write(options.json, json.dumps(manifest, indent=1).encode())
    print(
        f"{manifest['rows']:,} embeddings of {manifest['dim']} dimensions, {manifest['parts']} files: {options.embed_to}"
    )


if __name__ == "__main__":
    sys.exit(main())
